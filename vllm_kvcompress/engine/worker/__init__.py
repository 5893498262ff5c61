"""vLLM's workers with compression around each step."""
