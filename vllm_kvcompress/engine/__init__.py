"""All that touches vLLM's internals. Written against vLLM 0.32."""
