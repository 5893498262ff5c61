"""What our scheduler tells the worker beside vLLM's own message, on which it travels.

It is which requests' prefill begins in the step as a cascade, and the number of blocks that stand
in for their prompt's own.
"""

from collections.abc import Mapping

from vllm.v1.core.sched.output import SchedulerOutput

_NAME = "kv_compression"


def attach(output: SchedulerOutput, prefill_blocks: Mapping[str, int]) -> None:
    """Put our message on vLLM's. Mutates vLLM's."""
    setattr(output, _NAME, prefill_blocks)


def is_planned(output: SchedulerOutput) -> bool:
    """Whether a message comes from our scheduler, with a part of ours on it."""
    return hasattr(output, _NAME)


def prefill_blocks_of(output: SchedulerOutput) -> Mapping[str, int]:
    """Return our part of a message; empty where there is none and nothing is scheduled.

    Raises:
        RuntimeError: The message schedules tokens and does not come from our scheduler.

    """
    message = getattr(output, _NAME, None)
    if message is None and output.total_num_scheduled_tokens:
        raise RuntimeError("the step was not planned by the scheduler of vllm_kvcompress")
    return message or {}
