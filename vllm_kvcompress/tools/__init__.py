"""The command ``kvcompress`` and what it runs, beside the server."""
