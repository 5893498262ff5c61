"""Settings, and what they mean in blocks: when a request is cut, what it holds in between."""
