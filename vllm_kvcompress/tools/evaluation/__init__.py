"""Evaluation: what a budget costs in quality, against the full cache, on a user's own model.

``task`` says what is asked, ``backend`` who answers, ``runner`` goes through all cells and writes
``record`` after ``record``; ``result_groups`` sums them up, ``tables`` and ``plots`` show them.
Importing this package imports neither vLLM nor torch.
"""
