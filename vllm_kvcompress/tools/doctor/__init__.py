"""``kvcompress doctor``: what this environment would do with compression, and why."""
