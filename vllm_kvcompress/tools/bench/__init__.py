"""``kvcompress bench``: compressed against plain vLLM, in one run and taking turns.

``job`` says what is measured, ``measure`` drives one engine, ``cases`` lets two take turns and
makes the rows, ``apart`` does so in a process of its own, and ``report`` writes them.
``vllm_bench`` lets vLLM's own benchmarks do the measuring instead.
"""
