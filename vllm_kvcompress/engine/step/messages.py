"""What our scheduler tells the worker beside vLLM's own message."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from vllm.v1.core.sched.output import SchedulerOutput

_NAME = "kv_compression"


@dataclass(frozen=True)
class StepMessage:
    """Travels on vLLM's SchedulerOutput.

    Attributes:
        prefill_blocks: Requests whose prefill begins in this step as a cascade, and the blocks
            that stand in for their prompt's own.

    """

    prefill_blocks: Mapping[str, int] = field(default_factory=dict)


def attach(output: SchedulerOutput, message: StepMessage) -> None:
    """Put our message on vLLM's. Mutates vLLM's."""
    setattr(output, _NAME, message)


def message_of(output: SchedulerOutput) -> StepMessage:
    """Return our part of a message; an empty one where there is none and nothing is scheduled.

    Raises:
        RuntimeError: The message schedules tokens and does not come from our scheduler.

    """
    message = getattr(output, _NAME, None)
    if message is None and output.total_num_scheduled_tokens:
        raise RuntimeError("the step was not planned by the scheduler of vllm_kvcompress")
    return message or StepMessage()
