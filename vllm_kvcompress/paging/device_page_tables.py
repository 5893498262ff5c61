"""Per-layer tables in buffers on the device that never move, filled by one launch a step."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvcompress_kernels.dispatch import Implementation
from kvcompress_kernels.page_tables import ArenaTables, StepTables, fill_page_tables
from kvcompress_kernels.transfer import upload
from vllm_kvcompress.paging.arena import PageArena
from vllm_kvcompress.paging.page_tables import BatchRows, LayerTables, StepTableBuilder, TableLimits


class DeviceTableBuilder(StepTableBuilder):
    """Builds tables on an accelerator, safe to read from a captured CUDA graph.

    The device keeps a mirror of what the arena knows of each request at its admission. Growth needs
    no upload: a growth block's pages follow from the runner's own block table.

    Args:
        arena: Where the compressed requests' tables are.
        limits: Sizes of the buffers.
        device: Device of the buffers.
        implementation: Kernel that fills them.

    """

    in_place = True

    def __init__(
        self,
        arena: PageArena,
        limits: TableLimits,
        device: torch.device,
        implementation: Implementation = "auto",
    ) -> None:
        self._arena = arena
        self._device = device
        self._implementation = implementation
        layers = arena.geometry.num_layers
        self._out = StepTables.allocate(
            layers, limits.rows, limits.width, limits.tokens, device=device
        )
        self._origin = torch.from_numpy(arena.geometry.origin.astype(np.int64)).to(device)
        self._mirror = self._allocate(slots=4, pages=16)
        self._uploaded: NDArray[np.int64] = np.zeros(4, dtype=np.int64)
        self._slots_key = b""
        self._slots = torch.empty(0, dtype=torch.int32, device=device)
        # What was in the arena when the mirror was last compared with it, and in which slots.
        self._mirrored: tuple[int, bytes] = (-1, b"")
        self._shift: NDArray[np.int64] = np.zeros((layers, 0), dtype=np.int64)

    def build(self, batch: BatchRows) -> LayerTables:
        """See the base class; ``batch`` may have no compressed row, its tensors are on the device.

        Raises:
            ValueError: The batch is larger than the limits.

        """
        rows, tokens = len(batch.seq_lens), len(batch.slot_mapping)
        out = self._out
        if rows > out.seq_lens.shape[1] or tokens > out.slot_mapping.shape[1]:
            raise ValueError(
                f"a batch of {rows} rows and {tokens} tokens exceeds the table buffers"
            )
        self._upload(batch.slots)
        fill_page_tables(
            self._mirror,
            out,
            slots=self._slot_of_row(batch, rows),
            block_table=batch.block_table,
            seq_lens=batch.seq_lens,
            query_start=batch.query_start,
            num_tokens=tokens,
            implementation=self._implementation,
        )
        return self._views(rows, tokens, self._max_lens(batch))

    def capture(self, seq_lens: Tensor, num_tokens: int) -> LayerTables:
        """Return the buffers of a batch that a CUDA graph is captured with. Mutates them.

        Args:
            seq_lens: int32 [B], the lengths that all layers shall see: every token in page 0.
            num_tokens: Tokens of the batch, all of them padding.

        """
        rows = len(seq_lens)
        self._out.block_tables[:, :rows].zero_()
        self._out.seq_lens[:, :rows] = seq_lens
        self._out.slot_mapping[:, :num_tokens] = -1
        return self._views(rows, num_tokens, None)

    def warm_up(self) -> None:
        """See the base class; fills the tables of an empty row."""
        nothing = torch.zeros(1, 1, dtype=torch.int32, device=self._device)
        fill_page_tables(
            self._mirror,
            self._out,
            slots=torch.full((1,), -1, dtype=torch.int32, device=self._device),
            block_table=nothing,
            seq_lens=nothing[0],
            query_start=nothing.expand(1, 2)[0].contiguous(),
            num_tokens=0,
            implementation=self._implementation,
        )

    def _views(self, rows: int, tokens: int, max_lens: list[int] | None) -> LayerTables:
        out = self._out
        return LayerTables(
            block_tables=out.block_tables[:, :rows],
            seq_lens=out.seq_lens[:, :rows],
            slot_mapping=out.slot_mapping[:, :tokens],
            max_lens=max_lens,
        )

    def _max_lens(self, batch: BatchRows) -> list[int] | None:
        if batch.seq_lens_bound is None:
            return None
        lengths = batch.seq_lens_bound.astype(np.int64)
        highest = np.ones(len(self._shift), dtype=np.int64)
        if len(batch.rows):
            highest = np.maximum(highest, (lengths[batch.rows] + self._shift).max(axis=1))
        if len(batch.rows) < len(lengths):
            plain = np.delete(lengths, batch.rows)
            highest = np.maximum(highest, plain.max())
        result: list[int] = highest.tolist()
        return result

    def _slot_of_row(self, batch: BatchRows, rows: int) -> Tensor:
        slots = np.full(rows, -1, dtype=np.int32)
        slots[batch.rows] = batch.slots
        key = slots.tobytes()
        if key != self._slots_key:
            self._slots, self._slots_key = self._send(slots), key
        return self._slots

    def _upload(self, slots: NDArray[np.int64]) -> None:
        """Bring requests admitted since the last step into the mirror."""
        arena = self._arena
        seen = (arena.membership, slots.tobytes())
        if seen == self._mirrored:
            return
        self._mirrored = seen
        self._shift = arena.shift[:, slots]
        num_slots, pages = arena.serial.shape[0], int(arena.dealt.max(initial=1))
        if num_slots > len(self._uploaded) or pages > self._mirror.pages.shape[2]:
            old = self._mirror.pages.shape
            slots_now = max(num_slots, old[1])
            self._mirror = self._allocate(slots_now, max(pages, 2 * old[2]))
            self._uploaded = np.zeros(slots_now, dtype=np.int64)
        new = slots[self._uploaded[slots] != arena.serial[slots]]
        if len(new):
            self._send_requests(new)
            self._uploaded[new] = arena.serial[new]

    def _send_requests(self, slots: NDArray[np.int64]) -> None:
        """Copy what the arena knows of some slots into the mirror, in one upload."""
        arena, mirror = self._arena, self._mirror
        layers, count = arena.geometry.num_layers, len(slots)
        width = int(arena.dealt[:, slots].max())
        parts = (
            slots,
            arena.growth_column[slots],
            arena.dealt[:, slots],
            arena.shift[:, slots],
            arena.tables[:, slots, :width],
        )
        packed = np.concatenate([part.astype(np.int32).reshape(-1) for part in parts])
        sent = torch.split(self._send(packed), [part.size for part in parts])
        index = sent[0].long()
        mirror.growth[index] = sent[1]
        mirror.used[:, index] = sent[2].view(layers, count)
        mirror.shift[:, index] = sent[3].view(layers, count)
        mirror.pages[:, index, :width] = sent[4].view(layers, count, width)

    def _allocate(self, slots: int, pages: int) -> ArenaTables:
        geometry, device = self._arena.geometry, self._device
        layers = geometry.num_layers
        return ArenaTables(
            pages=torch.zeros(layers, slots, pages, dtype=torch.int32, device=device),
            used=torch.zeros(layers, slots, dtype=torch.int32, device=device),
            shift=torch.zeros(layers, slots, dtype=torch.int32, device=device),
            growth=torch.zeros(slots, dtype=torch.int32, device=device),
            origin=self._origin,
            step=geometry.step,
            block_size=geometry.block_size,
        )

    def _send(self, array: NDArray[np.int32]) -> Tensor:
        return upload(torch.from_numpy(np.ascontiguousarray(array)), self._device)
