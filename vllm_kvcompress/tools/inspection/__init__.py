"""What a cut kept, as numbers, a picture and a page; only ``run`` imports vLLM."""
