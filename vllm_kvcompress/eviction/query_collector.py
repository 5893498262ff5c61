"""Which queries of a step a coming cut will look at, and where they are kept until then."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_kvcompress.eviction.decode_query_buffer import DecodeQueryBuffer
from vllm_kvcompress.eviction.request import WorkerRequest


@dataclass(frozen=True)
class WindowCapture:
    """Queries of one row that belong to the observation window of its prompt's next cut.

    Attributes:
        window: Destination, [L, w, H, D].
        offset: First of the window's w places.
        start: First of the batch's tokens.
        count: Number of tokens.
        request: The request.
        whole: Whether this step holds all tokens up to the prompt's end, none of them computed
            before, so that its keys can be scored at once.

    """

    window: Tensor
    offset: int
    start: int
    count: int
    request: WorkerRequest
    whole: bool

    def take(self, layer: int, query: Tensor) -> None:
        """Copy one layer's queries [T, H, D]. Mutates the window."""
        self.window[layer, self.offset : self.offset + self.count] = query[
            self.start : self.start + self.count
        ].view(self.count, *self.window.shape[2:])


class QueryCollector:
    """Collects the queries of one worker's requests, step by step.

    The queries before a cut of the prompt go to a window of the request's own; those before a cut
    of the generation to a buffer that all requests share.

    Args:
        num_layers: L.
        query_shape: [H, D].
        dtype: Dtype of the queries.
        device: Device of the queries.
        buffer: Takes queries of generated tokens; None if no request is cut while it generates.

    Attributes:
        captures: Queries of prompts that the step at hand has to take.

    """

    def __init__(
        self,
        num_layers: int,
        query_shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        buffer: DecodeQueryBuffer | None,
    ) -> None:
        self.captures: list[WindowCapture] = []
        self.buffer = buffer
        self._num_layers = num_layers
        self._query_shape = tuple(query_shape)
        self._dtype = dtype
        self._device = device
        self._generated: list[tuple[str, int, range]] = []

    def begin_step(self) -> None:
        """Forget the last step's rows. Mutates the collector."""
        self.captures = []
        self._generated = []

    def needs(self, request: WorkerRequest) -> bool:
        """Whether this step holds queries for the window of the request's next prefill cut."""
        return request.settings.planner.needs_queries and bool(_prompt_part(request))

    def add(self, request_id: str, request: WorkerRequest, start: int) -> None:
        """Note which queries of a row are needed. Mutates the collector and the request's window.

        Args:
            request_id: The row's request.
            request: The same.
            start: The row's first token in the batch.

        """
        planner = request.settings.planner
        if not planner.needs_queries:
            return
        if part := _prompt_part(request):
            self.captures.append(self._capture(request, part, start))
        elif self.buffer is not None and not request.next_is_prefill_cut:
            part = _part(request, planner.decode_window)
            if part:
                places = _places(request, part, planner.decode_window)
                first = start + part.start - request.computed
                self._generated.append((request_id, first, places))

    def select_generated(self) -> DecodeQueryBuffer | None:
        """Tell the buffer which tokens it needs; None if nothing is to be copied in this step."""
        if self.buffer is not None and self.buffer.select(self._generated):
            return self.buffer
        return None

    def select_none(self) -> DecodeQueryBuffer | None:
        """The same for a batch of dummies, whose tokens nobody needs."""
        if self.buffer is not None:
            self.buffer.select(())
        return self.buffer

    def windows(self, request_id: str, request: WorkerRequest) -> Tensor | None:
        """Return the queries that the cut now due looks at, [L, w, H, D]; None if it needs none."""
        planner = request.settings.planner
        if request.window is None and self.buffer is not None and planner.needs_queries:
            return self.buffer.windows(request_id, planner.decode_window)
        return request.window

    def drop(self, request_id: str) -> None:
        """Forget a request's generated queries, if there are any. Mutates the buffer."""
        if self.buffer is not None:
            self.buffer.drop(request_id)

    def _capture(self, request: WorkerRequest, part: range, start: int) -> WindowCapture:
        window = request.settings.planner.window
        if request.window is None:
            shape = (self._num_layers, window, *self._query_shape)
            request.window = torch.empty(shape, dtype=self._dtype, device=self._device)
        whole = request.computed == 0 and part.stop == request.prompt_len
        return WindowCapture(
            window=request.window,
            offset=_places(request, part, window).start,
            start=start + part.start - request.computed,
            count=len(part),
            request=request,
            whole=whole and request.prefill_blocks is None,
        )


def _prompt_part(request: WorkerRequest) -> range:
    """Positions of this step's tokens in the window of the next cut, if that is of the prefill."""
    if not request.next_is_prefill_cut:
        return range(0)
    return _part(request, request.settings.planner.window)


def _part(request: WorkerRequest, window: int) -> range:
    """Positions of this step's tokens among the last ones before the next cut."""
    cut = request.next_cut
    if cut is None:
        return range(0)
    first = max(cut.position - window, request.computed)
    return range(first, min(request.computed + request.scheduled, cut.position))


def _places(request: WorkerRequest, part: range, window: int) -> range:
    """Places of positions in the window of the next cut."""
    assert request.next_cut is not None
    first = request.next_cut.position - window
    return range(part.start - first, part.stop - first)
