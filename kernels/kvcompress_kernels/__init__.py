"""Numerical kernels of vllm_kvcompress, importable as ``kvcompress_kernels``.

Nothing here knows vLLM or requests: each module is one piece of tensor arithmetic. Its torch
implementation serves on the CPU and is the reference for the Triton kernel, which lies in the
module of the same name that ends in ``_triton`` and is imported when a tensor on an accelerator
first needs it. Where the torch implementation is long, it lies in a module that ends in ``_torch``.
"""
