"""Speed: ratios against plain vLLM in the same run."""
