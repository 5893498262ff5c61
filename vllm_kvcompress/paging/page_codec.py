"""Read and write tokens of KV pages, whatever order a kernel stores them in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress_kernels.scoring import PagedStatistics
from vllm_kvcompress.paging.arena import IntArray
from vllm_kvcompress.paging.attention_layer import AttentionParams


@dataclass(frozen=True)
class JobPages:
    """Pages of several jobs; a job is one layer of one request.

    Attributes:
        pages: Per job the flat page ids in token order, int64.
        lengths: Per job the tokens in them.

    """

    pages: Sequence[IntArray]
    lengths: Sequence[int]

    def part(self, first: int, stop: int) -> JobPages:
        """Return some neighbouring jobs."""
        return JobPages(self.pages[first:stop], self.lengths[first:stop])


class PageCodec(ABC):
    """Tokens in, tokens out, for one way of storing pages.

    Attributes:
        shares_launches: Whether :meth:`observe` and :meth:`keep_best` serve many jobs at once.
        block_size: Tokens per page.
        num_kv_heads: Heads of a page.
        head_size: D.
        device: Device of the pages.

    """

    shares_launches: bool = False
    block_size: int
    num_kv_heads: int
    head_size: int
    device: torch.device

    @abstractmethod
    def read_keys(self, pages: IntArray, num_tokens: int) -> Tensor:
        """Return the keys of the first num_tokens tokens of some pages, [N, num_tokens, D].

        Args:
            pages: Flat page ids in token order.
            num_tokens: At most len(pages) * block_size.

        """

    @abstractmethod
    def move(
        self, sources: Sequence[IntArray], kept: Sequence[Tensor], targets: Sequence[IntArray]
    ) -> None:
        """Copy survivors of several layers. Mutates just the target pages, from slot 0 on.

        Args:
            sources: Per layer the flat page ids of the prompt in token order.
            kept: Per layer int [N, T_l], token numbers, ascending, each head its own.
            targets: Per layer the flat page ids that take them; none is a source.

        """

    @abstractmethod
    def rewrite(self, source: IntArray, kept: Tensor, target: IntArray) -> None:
        """Copy survivors of one layer to pages that may be among its own. Mutates the targets.

        Args:
            source: Flat page ids in token order.
            kept: int [N, T], token numbers, each head its own; what is not kept may be lost.
            target: Flat page ids that take them, from slot 0 on.

        """

    def hold(
        self,
        source: IntArray,
        kept: Tensor,
        target: IntArray,
        keys: Tensor | None = None,
        values: Tensor | None = None,
    ) -> None:
        """Copy survivors of one layer of a cascade. Mutates just the target pages.

        Until :meth:`settle`, nothing but this codec reads those pages.

        Args:
            source: Flat page ids of the prompt in token order.
            kept: int [N, len(target) * block_size], token numbers, each head its own.
            target: Flat page ids that take them; none is a source.
            keys: All keys of the layer after RoPE, [N, S, D], where they are at hand.
            values: As keys.

        """
        self.move([source], [kept], [target])

    def settle(self, pages: Sequence[IntArray], orders: Sequence[Tensor]) -> None:
        """Make what several layers :meth:`hold` readable for attention. Mutates just their pages.

        Args:
            pages: Per layer its flat page ids.
            orders: Per layer where its tokens lie in them, in the order in which they shall lie,
                int [N, len(pages) * block_size].

        """
        for own, order in zip(pages, orders, strict=True):
            self.rewrite(own, order, own)

    @abstractmethod
    def copy(self, source: IntArray, target: IntArray) -> None:
        """Copy whole pages. Mutates the target pages, none of which is a source."""

    def open(self, pages: Sequence[IntArray], lengths: Sequence[int]) -> JobPages:
        """Return pages as :meth:`observe` and :meth:`keep_best` take them."""
        return JobPages(pages, lengths)

    def observe(
        self, windows: Tensor, jobs: JobPages, facts: Sequence[AttentionParams]
    ) -> PagedStatistics | None:
        """Statistics of the window's attention of several jobs, straight from the pages.

        Args:
            windows: Queries [jobs, w, H, D].
            jobs: From :meth:`open`, or some of those.
            facts: Per job how products become logits.

        Returns:
            None if this codec has no kernel for it: keys have to be read then.

        """
        return None

    def keep_best(
        self,
        jobs: JobPages,
        scores: Sequence[Tensor],
        counts: Sequence[int],
        window: Sequence[int],
        targets: Sequence[IntArray | None],
    ) -> list[Tensor]:
        """Choose the best tokens of several jobs and copy them. Mutates just the target pages.

        Args:
            jobs: From :meth:`open`.
            scores: Per job the scores of its history, fp32 [N, S'].
            counts: Per job how many history tokens each head keeps.
            window: Per job how many tokens follow the history; all of them are kept.
            targets: Per job the flat page ids that take them, from slot 0 on, none of which is a
                source; None: the first of its own pages. Jobs with targets come first.

        Returns:
            Per job int [N, counts + window], token numbers, ascending.

        Raises:
            NotImplementedError: This codec does not share launches.

        """
        raise NotImplementedError

    def layers_per_launch(self, num_tokens: int, num_heads: int) -> int:
        """How many layers :meth:`observe` should be given in one call."""
        return 1

    def warm_up(self) -> None:  # noqa: B027 - most codecs have nothing to compile
        """Compile what :meth:`move` needs. Mutates no page."""
