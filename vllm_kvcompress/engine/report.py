"""What a worker has measured, on its way to the scheduler with the output of a step."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput

_NAME = "kv_compression"


@dataclass
class Report:
    """Compressions since the last report.

    Attributes:
        laps: Phase of a compression, and the microseconds it took on the host.
        counts: Tokens of compressed prompts by ``seen:METHOD``, ``kept:METHOD`` (of an average
            layer) and ``layer:NUMBER``.

    """

    laps: list[tuple[str, int]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def __bool__(self) -> bool:
        return bool(self.laps or self.counts)

    def add(self, other: "Report") -> None:
        """Take in another report. Mutates this one."""
        self.laps += other.laps
        self.counts.update(other.counts)


def attach(output: Any, report: Report) -> bool:
    """Put a report on what a worker returns for a step. Mutates the output.

    Args:
        output: vLLM's ModelRunnerOutput, an asynchronous one, or None.
        report: Compressions so far.

    Returns:
        Whether the output can carry it; if not, it is to go with a later one.

    """
    if output is None or output is EMPTY_MODEL_RUNNER_OUTPUT:  # the latter is shared by all steps
        return False
    if isinstance(output, AsyncModelRunnerOutput):
        get = output.get_output

        def get_output() -> Any:
            result = get()
            setattr(result, _NAME, report)
            return result

        output.get_output = get_output
        return True
    setattr(output, _NAME, report)
    return True


def report_of(output: Any) -> Report | None:
    """Return the report that came with a step's output, None if there is none."""
    return getattr(output, _NAME, None)
