"""Real vLLM with this plugin on a GPU: packed where nothing can be installed, checked, timed.

``pack.py`` and ``device_code.py`` make what a machine without a network needs; ``suite.py`` runs
``checks.py`` and ``speed.py``; ``rehearsal.py`` stands in for the GPU where there is none.
"""
