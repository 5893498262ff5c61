"""The order of a batch's rows, and which of them are compressed, kept while neither changes."""

from collections.abc import Mapping, Sequence

import numpy as np

from vllm_kvcompress.paging.arena import IntArray, PageArena


class BatchOrder:
    """The last batch's rows. A decoding batch keeps its order for many steps.

    Args:
        arena: The compressed requests.

    Attributes:
        rows: int64 [C], rows of compressed requests, ascending.
        slots: int64 [C], their slots in the arena.

    """

    def __init__(self, arena: PageArena) -> None:
        self._arena = arena
        self._ids: list[str] = []
        self._places: dict[str, int] = {}
        self._membership = -1
        self.rows: IntArray = np.zeros(0, dtype=np.int64)
        self.slots: IntArray = np.zeros(0, dtype=np.int64)

    def follow(self, request_ids: Sequence[str], scheduled: Mapping[str, int]) -> bool:
        """Take in a batch. Mutates the order unless the batch is a dummy.

        Args:
            request_ids: Its requests in the order of its rows.
            scheduled: By request, the tokens of the step that has begun.

        Returns:
            Whether the batch is that step's, and no dummy.

        """
        if not scheduled or not all(map(scheduled.__contains__, request_ids)):
            return False
        ids, arena = list(request_ids), self._arena
        if ids == self._ids and arena.membership == self._membership:
            return True
        known = [(row, name) for row, name in enumerate(ids) if name in arena]
        self.rows = np.asarray([row for row, _ in known], dtype=np.int64)
        self.slots = arena.slots(name for _, name in known)
        self._ids, self._places, self._membership = ids, {}, arena.membership
        return True

    def place(self, request_id: str) -> int | None:
        """Row of a request; None if it has none in this batch."""
        if not self._places:
            self._places = {name: row for row, name in enumerate(self._ids)}
        return self._places.get(request_id)
