"""``kvcompress plan``: blocks and concurrent requests of a server, worked out without a model."""
