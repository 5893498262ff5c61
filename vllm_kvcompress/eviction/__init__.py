"""From scores to kept tokens, on pages; knows nothing of vLLM."""
