"""vLLM's look at a model's class, made cheap for tests."""

from vllm.model_executor.models import registry


def inspect_in_process() -> None:
    """Let vLLM import model classes in this process; idempotent.

    By itself it starts a new process for each class that it has not met, which imports all of vLLM
    again, lest CUDA be initialized in this one. Tests that call this start nothing on a GPU.
    """
    registry._run_in_subprocess = lambda look: look()
