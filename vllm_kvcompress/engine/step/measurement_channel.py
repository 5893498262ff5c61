"""What a worker has measured, on its way to the scheduler with the output of a step."""

from typing import Any

from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput

from vllm_kvcompress.eviction.measurements import CutReport

_NAME = "kv_compression"


def attach(output: Any, report: CutReport) -> bool:
    """Put a report on what a worker returns for a step. Mutates the output.

    Args:
        output: vLLM's ModelRunnerOutput, an asynchronous one, or None.
        report: What was measured since the last one.

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


def report_of(output: Any) -> CutReport | None:
    """Return the report that came with a step's output, None if there is none."""
    return getattr(output, _NAME, None)
