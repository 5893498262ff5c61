"""What a compression kept, for those who want to look at it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from vllm_kvcompress.methods import LayerScores, Method, MethodError, to_numbers
from vllm_kvcompress.paging.arena import IntArray


@dataclass(frozen=True)
class CutRecord:
    """One compression of a request.

    Attributes:
        request_id: vLLM's id of the request.
        number: Number of the cut, from 1. Before the first, a token lies where it stands in the
            text.
        method: Name of the method.
        prompt_len: Tokens S of the text before the cut: the prompt's, for the cut at its end.
        block_size: Tokens per block.
        window: Tokens at the end that are always kept.
        kept: Per layer int64 [N, T_l], where kept tokens lay, ascending for every KV head: for the
            first cut positions in the text, for a later one places in what the layer held.
        stats: Per layer what the method's allocator read beside the scores; for CAKE
            ``log_entropy`` and ``log_shift``, natural logarithms.
        weights: fp64 [L], the allocator's weights of the layers, which sum to 1; None if it treats
            all layers alike, or was not asked because every layer keeps the pages it has.
        fallback: Why the method failed, so that the most recent tokens were kept; None: it did not.

    """

    request_id: str
    number: int
    method: str
    prompt_len: int
    block_size: int
    window: int
    kept: tuple[IntArray, ...]
    stats: tuple[Mapping[str, float], ...]
    weights: npt.NDArray[np.float64] | None
    fallback: str | None = None


def make_record(
    method: Method,
    scores: Sequence[LayerScores],
    kept: Sequence[Tensor],
    weights: npt.NDArray[np.float64] | None,
    *,
    request_id: str,
    number: int,
    prompt_len: int,
    block_size: int,
    fault: MethodError | None = None,
) -> CutRecord:
    """Describe a compression.

    Args:
        method: The method that made it.
        scores: Scores of all layers, stats on any device.
        kept: Per layer int [N, T_l], where kept tokens lay, in any order.
        weights: The allocator's weights of the layers, fp64 [L]; None if it was not asked.
        request_id: vLLM's id of the request.
        number: Number of the cut, from 1.
        prompt_len: Tokens of the text before the cut.
        block_size: Tokens per block.
        fault: What the method has failed with, if it has.

    """
    found = to_numbers(scores)
    if weights is not None and (not weights.sum() > 0.0 or bool((weights == weights[0]).all())):
        weights = None
    return CutRecord(
        request_id=request_id,
        number=number,
        method=method.name,
        prompt_len=prompt_len,
        block_size=block_size,
        window=method.window,
        kept=tuple(
            np.asarray(tokens.sort(dim=1).values.cpu().numpy(), np.int64) for tokens in kept
        ),
        stats=tuple(
            {k: v for k, v in s.stats.items() if isinstance(v, int | float)} for s in found
        ),
        weights=None if weights is None else weights / weights.sum(),
        fallback=None if fault is None else str(fault),
    )
