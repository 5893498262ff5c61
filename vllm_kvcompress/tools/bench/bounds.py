"""How much faster compression could be if a step cost only the bytes that it reads."""

from vllm_kvcompress.tools.bench.measure import Queue


def decode_bound(weights: int, full: int, kept: int) -> float:
    """Return the ratio of the bytes that one decode step reads, plain / compressed.

    Args:
        weights: Bytes of weights.
        full: Bytes of the batch's KV caches in plain vLLM.
        kept: Bytes of the batch's KV caches with compression.

    """
    return (weights + full) / (weights + kept)


def token_bytes(queue: Queue, weights: int, block_bytes: int) -> float:
    """Return the bytes read for one generated token, with as many requests at a time as there were.

    Args:
        queue: A run with decode steps.
        weights: Bytes of weights that each step reads.
        block_bytes: Bytes of a block.

    """
    read = queue.decode_steps * weights + queue.decode_blocks * block_bytes
    return read / queue.decode_tokens


def whole_bound(prefill_share: float, decode: float) -> float:
    """Return the ratio of whole runs if prefills take as long as in plain vLLM.

    Args:
        prefill_share: Share of plain vLLM's time in steps with a prompt.
        decode: The bound of the other steps.

    """
    return 1 / (prefill_share + (1 - prefill_share) / decode)
