"""What a plan takes an engine to be: vLLM's defaults, and what compression holds beside the pool.

Figures of vLLM 0.32, config/cache.py and EngineArgs.get_batch_defaults; of ours,
engine/gpu_worker.py.
"""

from dataclasses import dataclass

from vllm_kvcompress.paging.page_tables import TableLimits
from vllm_kvcompress.planning.block_planner import EngineLimits
from vllm_kvcompress.planning.layer_groups import LayerGroups
from vllm_kvcompress.planning.request_settings import SettingsResolver
from vllm_kvcompress.planning.workspace_memory import (
    ModelShape,
    query_buffer_bytes,
    table_bytes,
    transient_bytes,
)
from vllm_kvcompress.tools.plan.model import ModelFacts

GPU_MEMORY_UTILIZATION = 0.92
"""vLLM's default."""

BLOCK_SIZES = {"gpu": 16, "cpu": 128}
"""Tokens per block that vLLM chooses on each device."""

STATISTICS_BYTES = 256 << 20
"""Statistics held while a prompt is scored on a GPU: OBSERVED_BYTES of engine/strided_codec.py,
which cannot be imported without vLLM (tests/e2e/test_plan_figures.py compares the two)."""


@dataclass(frozen=True)
class EngineFacts:
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
        """What the planner has to know, as engine/settings.py states it."""
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


def beside_bytes(resolver: SettingsResolver, model: ModelFacts, engine: EngineFacts) -> int:
    """Bytes that compression holds on a GPU beside the pool: page tables, and scoring a prompt.

    Args:
        plans: Of the engine.
        model: Its model.
        engine: Its settings.

    """
    if engine.device != "gpu":
        return 0
    shape = ModelShape(
        model.groups.compressed,
        model.heads,
        model.kv_heads,
        model.head_size,
        model.dtype.itemsize,
    )
    planner, longest, size = resolver.default_planner, engine.max_model_len, engine.block_size
    limits = TableLimits(
        rows=engine.max_num_seqs,
        width=resolver.row_blocks(longest),
        tokens=engine.max_num_batched_tokens,
    )
    staged, ring = 0, 0
    if planner.can_cascade and planner.config.prefill != "full":
        staged = -(-min(planner.limits.one_step_tokens, longest) // size)
    if planner.config.decode_budget is not None:
        ring = query_buffer_bytes(shape, limits.rows, resolver.largest_decode_window)
    cut = planner.prompt_cut(longest)
    most = cut.blocks * size * shape.layers if cut else 0
    transient = transient_bytes(
        shape,
        max_model_len=longest,
        window=resolver.largest_window,
        most_kept=min(most, longest),
        observed=STATISTICS_BYTES,
    )
    return table_bytes(shape, limits, staged) + ring + transient
