"""The server that is planned: vLLM's defaults, whatever machine the plan is made on.

Figures of vLLM 0.32, config/cache.py and EngineArgs.get_batch_defaults.
"""

from dataclasses import dataclass

from vllm_kvcompress.planning.block_planner import EngineLimits
from vllm_kvcompress.planning.layer_groups import LayerGroups

GPU_MEMORY_UTILIZATION = 0.92
"""vLLM's default."""

BLOCK_SIZES = {"gpu": 16, "cpu": 128}
"""Tokens per block that vLLM chooses on each device."""


@dataclass(frozen=True)
class ServerSettings:
    """Settings of a server that a plan depends on.

    Attributes:
        device: ``gpu`` or ``cpu``.
        block_size: Tokens per block.
        max_num_batched_tokens: Tokens of one step.
        max_num_seqs: Requests of one step.
        max_model_len: Tokens of the longest request.
        lag: Steps planned before the last one's result is known: 1 on a GPU, where scheduling is
            asynchronous, else 0.

    """

    device: str
    block_size: int
    max_num_batched_tokens: int
    max_num_seqs: int
    max_model_len: int

    @property
    def lag(self) -> int:
        return int(self.device == "gpu")

    @property
    def in_flight(self) -> int:
        """Most tokens that are scheduled and not processed: vLLM's max_in_flight_tokens."""
        return (1 + self.lag) * self.max_num_batched_tokens

    def limits(self, layers: LayerGroups) -> EngineLimits:
        """Limits of the planner, as engine/settings.py states them for a real engine."""
        alone = not layers.window_groups
        return EngineLimits(layers.compressed, self.max_num_batched_tokens, self.lag, alone)


def batch_defaults(device: str, gpu_memory: int | None) -> tuple[int, int]:
    """Tokens and requests of one step that ``vllm serve`` chooses by itself.

    Args:
        device: ``gpu`` or ``cpu``.
        gpu_memory: Bytes of the whole GPU; None: not known, taken to be below 70 GiB.

    """
    if device == "cpu":
        return 2048, 128
    gib = (gpu_memory or 0) / 2**30
    if gib >= 160:
        return 16384, 1024
    return (8192, 1024) if gib >= 70 else (2048, 256)
