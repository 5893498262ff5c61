"""What our scheduler tells the worker beside vLLM's own message."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from vllm.v1.core.sched.output import SchedulerOutput

_NAME = "kv_compression"


@dataclass(frozen=True)
class Orders:
    """Travels on vLLM's SchedulerOutput.

    Attributes:
        fronts: Requests whose prefill begins in this step as a cascade, and the blocks that stand
            in for their prompt's own.
        books: The scheduler's counters, by name.

    """

    fronts: Mapping[str, int] = field(default_factory=dict)
    books: Mapping[str, int] = field(default_factory=dict)


def attach(output: SchedulerOutput, orders: Orders) -> None:
    """Put orders on a step's message. Mutates it."""
    setattr(output, _NAME, orders)


def orders_of(output: SchedulerOutput) -> Orders:
    """Return a message's orders; those of a message without any are empty.

    Raises:
        RuntimeError: The message schedules tokens and does not come from our scheduler.

    """
    orders = getattr(output, _NAME, None)
    if orders is None and output.total_num_scheduled_tokens:
        raise RuntimeError("the step was not planned by the scheduler of vllm_kvcompress")
    return orders or Orders()
