"""Queries of generated tokens, collected until the next cut looks at them.

One indexed copy a layer and step takes the queries of all rows that need it, however many. On a
device the index lies in a buffer that never moves, so that the copy can be part of a CUDA graph.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from kvcompress_kernels.transfer import upload


class DecodeQueryBuffer:
    """The last ``window`` queries before the next cut, of every request that has one coming.

    Args:
        num_layers: L.
        window: Most queries of one cut.
        heads: Query heads H.
        head_size: D.
        rows: Most requests at one time.
        tokens: Most tokens of a step, padding included.
        dtype: Dtype of the queries.
        device: Device of the queries.
        in_place: Whether the copy may be part of a CUDA graph: then every step takes all its
            tokens, those that nobody needs into a row that nobody reads.

    """

    def __init__(
        self,
        num_layers: int,
        window: int,
        heads: int,
        head_size: int,
        *,
        rows: int,
        tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        in_place: bool = False,
    ) -> None:
        self.window = window
        self._trash = rows * window
        shape = (num_layers, self._trash + 1, heads, head_size)
        self._queries = torch.zeros(shape, dtype=dtype, device=device)
        self._in_place = in_place
        self._places = torch.full((tokens,), self._trash, dtype=torch.int64, device=device)
        self._tokens = torch.zeros(0, dtype=torch.int64)
        self._filled = 0
        self._slot: dict[str, int] = {}
        self._free = list(range(rows - 1, -1, -1))

    def select(self, parts: Iterable[tuple[str, int, range]]) -> bool:
        """Set which of a step's tokens are needed. Mutates the index, not the queries.

        Args:
            parts: Per request its id, the batch's token that its first needed one is, and the
                needed ones' places in its window.

        Returns:
            Whether :meth:`take` is to be called in this step.

        Raises:
            IndexError: More requests than rows.

        """
        tokens: list[int] = []
        places: list[int] = []
        for request_id, first, window_part in parts:
            if request_id not in self._slot:
                self._slot[request_id] = self._free.pop()
            start = self._slot[request_id] * self.window
            tokens += range(first, first + len(window_part))
            places += range(start + window_part.start, start + window_part.stop)
        if self._in_place:
            self._fill(tokens, places)
            return True
        self._tokens = torch.tensor(tokens, dtype=torch.int64)
        self._places[: len(places)] = torch.tensor(places, dtype=torch.int64)
        return bool(tokens)

    def take(self, layer: int, query: Tensor) -> None:
        """Copy one layer's needed queries out of a step's, [T, H, D]. Mutates the buffer.

        Those of an FP8 cache may be FP8 themselves; the buffer holds the same numbers, their scale
        is part of :class:`AttentionParams`.
        """
        rows = self._queries[layer]
        query = query.view(len(query), *rows.shape[1:]).to(rows.dtype)
        if self._in_place:
            rows.index_copy_(0, self._places[: len(query)], query)
        else:
            rows.index_copy_(0, self._places[: len(self._tokens)], query[self._tokens])

    def windows(self, request_id: str, count: int | None = None) -> Tensor:
        """Return a request's queries, [L, w, H, D], a view.

        Args:
            request_id: The request.
            count: Its w, at most the buffer's; None: all of those.

        """
        start = self._slot[request_id] * self.window
        return self._queries[:, start : start + (self.window if count is None else count)]

    def drop(self, request_id: str) -> None:
        """Forget a request, if it is here. Mutates the buffer."""
        slot = self._slot.pop(request_id, None)
        if slot is not None:
            self._free.append(slot)

    def _fill(self, tokens: list[int], places: list[int]) -> None:
        end = max(tokens) + 1 if tokens else 0
        if not end and not self._filled:
            return
        length = max(end, self._filled)
        index = np.full(length, self._trash, dtype=np.int64)
        index[tokens] = places
        self._places[:length] = upload(torch.from_numpy(index), self._places.device)
        self._filled = end
