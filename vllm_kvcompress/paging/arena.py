"""The page arena: pages of whole blocks, dealt to layers in different numbers.

A *block* holds ``block_size`` tokens of all layers. *Page* (l, b) is layer l's slice of block b.
All pages have one size, so any page can serve any layer; a compressed request owns every page of
its private blocks and gives each layer as many as its budget says.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vllm_kvcompress.paging.rounding import cdiv

IntArray = NDArray[np.int64]


class IntegrityError(AssertionError):
    """The arena or the block pool is inconsistent."""


@dataclass(frozen=True)
class PageGeometry:
    """Where page (l, b) lies in the flat view of the pool: ``origin[l] + b * step``.

    Attributes:
        origin: int64 [L], flat index of each layer's page of block 0.
        step: Pages from one block to the next in the same layer.
        num_blocks: Blocks in the pool.
        block_size: Tokens per page.

    """

    origin: IntArray
    step: int
    num_blocks: int
    block_size: int

    @property
    def num_layers(self) -> int:
        """Layers that share the pool."""
        return len(self.origin)

    def pages(self, layer: int, blocks: Sequence[int]) -> IntArray:
        """Flat page ids of one layer in the given blocks, int64 [len(blocks)]."""
        return np.asarray(self.origin[layer] + np.asarray(blocks, dtype=np.int64) * self.step)

    def all_pages(self, blocks: Sequence[int] | IntArray) -> IntArray:
        """Flat page ids of every layer, int64 [L, len(blocks)]."""
        ids = np.asarray(blocks, dtype=np.int64)
        return np.asarray(self.origin[:, None] + ids[None, :] * self.step)


def deal_pages(
    geometry: PageGeometry, blocks: Sequence[int], counts: IntArray, *, shuffle: bool = False
) -> list[IntArray]:
    """Share the pages of some blocks between the layers.

    A layer keeps pages of its own while it can, so that equal counts give each layer just its own
    slice of each block.

    Args:
        geometry: The pool's shape.
        blocks: Block ids.
        counts: int64 [L], pages per layer; the sum must be ``len(blocks) * L``.
        shuffle: Deal in a fixed random order instead (debugging: every page in a foreign layer).

    Returns:
        Per layer its flat page ids, int64 [counts[l]].

    Raises:
        ValueError: The counts do not add up to the pages there are.

    """
    own = geometry.all_pages(blocks)
    if int(counts.sum()) != own.size or (counts < 0).any():
        raise ValueError(f"{own.size} pages cannot be dealt as {counts.tolist()}")
    if shuffle:
        order = np.random.default_rng(0).permutation(own.reshape(-1))
        return [np.asarray(part) for part in np.split(order, np.cumsum(counts)[:-1])]
    spare = np.concatenate([row[count:] for row, count in zip(own, counts, strict=True)])
    missing = np.maximum(counts - own.shape[1], 0)
    extra = np.split(spare, np.cumsum(missing)[:-1])
    return [
        np.concatenate([row[:count], more])
        for row, count, more in zip(own, counts, extra, strict=True)
    ]


class _Admission(NamedTuple):
    """What :meth:`PageArena.admit` was told of a request, to verify its lengths later."""

    num_tokens: int
    slack: int
    num_blocks: int


class PageArena:
    """Page tables and lengths of one worker's compressed requests.

    Tables are kept per slot in one array per quantity, so that a decode step gathers the rows of
    its batch without a Python loop. Both axes grow on demand.

    Args:
        geometry: The pool's shape.

    Attributes:
        tables: int32 [L, slots, pages], flat page ids in token order.
        used: int64 [L, slots], entries of ``tables`` in use, growth included.
        dealt: int64 [L, slots], entries in use at admission; what follows is growth.
        shift: int64 [L, slots], tokens held minus tokens of the text, at most 0.
        growth_column: int64 [slots], where growth blocks begin among all blocks that the request
            was ever given, prompt blocks first.
        serial: int64 [slots], number of the admission that filled the slot, from 1 on.
        version: Changes whenever any of these does.
        membership: Changes whenever a request comes or goes.

    """

    def __init__(self, geometry: PageGeometry) -> None:
        self.geometry = geometry
        layers = geometry.num_layers
        self._slot: dict[str, int] = {}
        self._free: list[int] = []
        self._staged: set[str] = set()
        self._blocks: dict[str, list[int]] = {}
        self._admissions: dict[str, _Admission] = {}
        self.tables: NDArray[np.int32] = np.zeros((layers, 0, 0), dtype=np.int32)
        self.used: IntArray = np.zeros((layers, 0), dtype=np.int64)
        self.dealt: IntArray = np.zeros((layers, 0), dtype=np.int64)
        self.shift: IntArray = np.zeros((layers, 0), dtype=np.int64)
        self.growth_column: IntArray = np.zeros(0, dtype=np.int64)
        self.serial: IntArray = np.zeros(0, dtype=np.int64)
        self.version = self.membership = 0
        self._admitted = 0

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._slot

    def slot(self, request_id: str) -> int:
        """Return the row of a request in :attr:`tables`; KeyError if it is not here."""
        return self._slot[request_id]

    def slots(self, request_ids: Iterable[str]) -> IntArray:
        """Return the rows of several requests, int64 [n]."""
        return np.fromiter((self._slot[r] for r in request_ids), dtype=np.int64)

    def stage(self, request_id: str, pages: Sequence[IntArray]) -> None:
        """Give a request tables for one step, in which layers reuse pages. Mutates the arena.

        Args:
            request_id: A request that is not here yet; :meth:`drop` it after the step.
            pages: Per layer the flat page ids in token order, as many for each.

        Raises:
            ValueError: The request is here already.

        """
        slot = self._fill(request_id, pages)
        self.shift[:, slot] = 0
        self.growth_column[slot] = 0
        self._staged.add(request_id)

    def admit(
        self,
        request_id: str,
        blocks: Sequence[int],
        pages: Sequence[IntArray],
        *,
        num_tokens: int,
        slack: int = 0,
        growth_column: int | None = None,
    ) -> None:
        """Take in a request whose survivors were just placed. Mutates the arena.

        Args:
            request_id: A request that is not here yet.
            blocks: The private blocks whose pages the layers share.
            pages: Per layer the flat page ids in token order; together all pages of the blocks.
            num_tokens: Tokens of the text that were compressed.
            slack: Free slots in every layer's last page.
            growth_column: Where growth blocks begin among all blocks the request was ever given;
                by default after those of num_tokens tokens and these.

        Raises:
            ValueError: The request is here already, or pages and blocks do not agree.

        """
        held = sum(len(p) for p in pages)
        layers = self.geometry.num_layers
        if len(pages) != layers or held != len(blocks) * layers:
            raise ValueError(
                f"request {request_id}: {held} pages of {len(pages)} layers in {len(blocks)} blocks"
            )
        slot = self._fill(request_id, pages)
        size = self.geometry.block_size
        self.shift[:, slot] = self.used[:, slot] * size - slack - num_tokens
        if growth_column is None:
            growth_column = cdiv(num_tokens, size) + len(blocks)
        self.growth_column[slot] = growth_column
        self._blocks[request_id] = list(blocks)
        self._admissions[request_id] = _Admission(num_tokens, slack, len(blocks))

    def layer_pages(self, request_id: str) -> list[IntArray]:
        """Per layer the flat page ids in use, in token order, growth included."""
        slot = self._slot[request_id]
        return [
            table[slot, : used[slot]].astype(np.int64)
            for table, used in zip(self.tables, self.used, strict=True)
        ]

    def dealt_pages(self, request_id: str) -> IntArray:
        """Pages of each layer at admission, growth apart, int64 [L]."""
        return self.dealt[:, self._slot[request_id]].copy()

    def lengths(self, request_id: str, num_tokens: int) -> IntArray:
        """Tokens that each layer holds when the text has num_tokens, int64 [L]."""
        return self.shift[:, self._slot[request_id]] + num_tokens

    def _fill(self, request_id: str, pages: Sequence[IntArray]) -> int:
        """Take a slot for a request and put its tables there."""
        if request_id in self._slot:
            raise ValueError(f"request {request_id} is in the arena already")
        if not self._free:
            self._reserve(slots=max(4, 2 * self.tables.shape[1]))
        slot = self._free.pop()
        self._reserve(pages=max(len(p) for p in pages))
        for layer, ids in enumerate(pages):
            self.tables[layer, slot, : len(ids)] = ids
            self.used[layer, slot] = len(ids)
        self.dealt[:, slot] = self.used[:, slot]
        self._admitted += 1
        self.serial[slot] = self._admitted
        self._slot[request_id] = slot
        self.version += 1
        self.membership += 1
        return slot

    def grow(self, new_blocks: Mapping[str, Sequence[int]]) -> None:
        """Give every layer its own page of each new block. Mutates the arena.

        Args:
            new_blocks: By request in the arena, private blocks beyond those it holds.

        """
        layers = np.arange(self.geometry.num_layers)[:, None]
        growing = [(self._slot[name], blocks) for name, blocks in new_blocks.items() if blocks]
        for name, blocks in new_blocks.items():
            self._blocks[name] += blocks
        # All requests at once; nearly always they get one block each.
        for turn in range(max((len(blocks) for _, blocks in growing), default=0)):
            part = [(slot, blocks[turn]) for slot, blocks in growing if turn < len(blocks)]
            slots, ids = np.asarray(part, dtype=np.int64).T
            place = self.used[:, slots]
            self._reserve(pages=int(place.max()) + 1)
            self.tables[layers, slots, place] = self.geometry.all_pages(ids)
            self.used[:, slots] = place + 1
            self.version += 1

    def drop(self, request_id: str) -> None:
        """Forget a request, if it is here. Mutates the arena; no page is written."""
        slot = self._slot.pop(request_id, None)
        if slot is None:
            return
        self._free.append(slot)
        if request_id in self._staged:
            self._staged.remove(request_id)
        else:
            del self._blocks[request_id], self._admissions[request_id]
        self.used[:, slot] = 0
        self.version += 1
        self.membership += 1

    def check_integrity(self, blocks_of: Mapping[str, Sequence[int]] | None = None) -> None:
        """Verify that every page is used once and belongs to its request's own blocks.

        Args:
            blocks_of: Per request the private blocks that the scheduler says it holds; if given,
                the arena must agree.

        Raises:
            IntegrityError: It does not.

        """
        seen: dict[int, str] = {}
        for request_id, slot in self._slot.items():
            if request_id in self._staged:
                continue  # its layers share pages on purpose, for this step
            admission, blocks = self._admissions[request_id], self._blocks[request_id]
            owned = set(self.geometry.all_pages(blocks).reshape(-1).tolist())
            held = np.concatenate(self.layer_pages(request_id)).tolist()
            if len(set(held)) != len(held) or set(held) != owned:
                raise IntegrityError(f"request {request_id} does not hold each of its pages once")
            if blocks_of is not None and list(blocks_of.get(request_id, ())) != blocks:
                raise IntegrityError(
                    f"request {request_id}: arena blocks {blocks}, scheduler's "
                    f"{list(blocks_of.get(request_id, ()))}"
                )
            kept = self.shift[:, slot] + admission.num_tokens
            grown = len(blocks) - admission.num_blocks
            if (self.dealt[:, slot] + grown != self.used[:, slot]).any():
                raise IntegrityError(f"request {request_id}: {grown} growth blocks, other pages")
            capacity = (self.used[:, slot] - grown) * self.geometry.block_size
            if (kept + admission.slack != capacity).any() or (kept < 1).any():
                raise IntegrityError(f"request {request_id}: lengths and pages disagree")
            for block in blocks:
                other = seen.setdefault(block, request_id)
                if other != request_id:
                    raise IntegrityError(f"block {block} is held by {other} and {request_id}")

    def _reserve(self, *, slots: int = 0, pages: int = 0) -> None:
        """Make room for that many slots or pages a layer; contents are kept."""
        layers, old_slots, old_pages = self.tables.shape
        new_slots = max(old_slots, slots)
        new_pages = old_pages if pages <= old_pages else max(pages, 2 * old_pages)
        if (new_slots, new_pages) == (old_slots, old_pages):
            return
        tables = np.zeros((layers, new_slots, new_pages), dtype=np.int32)
        tables[:, :old_slots, :old_pages] = self.tables
        self.tables = tables
        if new_slots > old_slots:
            grow = ((0, 0), (0, new_slots - old_slots))
            self.used = np.pad(self.used, grow)
            self.dealt = np.pad(self.dealt, grow)
            self.shift = np.pad(self.shift, grow)
            self.growth_column = np.pad(self.growth_column, grow[1])
            self.serial = np.pad(self.serial, grow[1])
            self._free.extend(range(new_slots - 1, old_slots - 1, -1))
