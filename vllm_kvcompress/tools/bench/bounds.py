"""How much faster compression could be if a step cost nothing but the bytes that it reads."""

from vllm_kvcompress.tools.bench.measure import Queue


def decode_bound(weights: int, full: int, kept: int) -> float:
    """Ratio of the bytes of one decode step.

    Args:
        weights: Bytes of weights that it reads.
        full: Bytes of the batch's KV caches in plain vLLM.
        kept: Bytes of them with compression.

    """
    return (weights + full) / (weights + kept)


def token_bytes(queue: Queue, weights: int, block_bytes: int) -> float:
    """Bytes read for one generated token, at the concurrency that was seen.

    Args:
        queue: A run with decode steps.
        weights: Bytes of weights that each step reads.
        block_bytes: Bytes of a block.

    """
    read = queue.decode_steps * weights + queue.decode_blocks * block_bytes
    return read / queue.decode_tokens


def whole_bound(prefill_share: float, decode: float) -> float:
    """Ratio of whole runs if prefills take what they take in plain vLLM.

    Args:
        prefill_share: Of plain vLLM's time that goes into steps with a prompt.
        decode: Bound of the other steps.

    """
    return 1 / (prefill_share + (1 - prefill_share) / decode)
