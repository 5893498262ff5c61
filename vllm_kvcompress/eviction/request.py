"""What a worker knows of one request."""

from dataclasses import dataclass, field

from torch import Tensor

from vllm_kvcompress.eviction.pinned_tokens import PinnedTokens
from vllm_kvcompress.methods import LayerScores
from vllm_kvcompress.planning.compression_schedule import CompressionSchedule
from vllm_kvcompress.planning.request_settings import RequestSettings


@dataclass
class WorkerRequest:
    """One request.

    Attributes:
        prompt_len: Prompt tokens.
        terms: Its method, budget and the like.
        course: When it is cut, None if it never is.
        blocks: All block ids it was ever sent since its prefill began.
        computed: Tokens computed before this step.
        scheduled: Tokens of this step.
        prefill_blocks: In a cascade, blocks in place of the prompt's own; None otherwise.
        cached: In a cascade, how many of them come from the prefix cache.
        cuts: Cuts behind it.
        home: Where in ``blocks`` the survivors' blocks begin.
        growth: Where those of the tokens after the last cut begin.
        window: Queries of the last tokens before a cut of the prompt, [L, w, H, D], while they
            are collected.
        scores: Layers already scored, in a prompt that runs in one step.
        score_seconds: Time that took.
        pinned_tokens: Where tokens lie that must stay; None if there are none.

    """

    prompt_len: int
    settings: RequestSettings
    schedule: CompressionSchedule | None
    blocks: list[int]
    computed: int
    scheduled: int = 0
    prefill_blocks: int | None = None
    cached: int = 0
    cuts_made: int = 0
    survivors_start: int = 0
    tail_start: int = 0
    window: Tensor | None = field(default=None, repr=False)
    scores: dict[int, LayerScores] = field(default_factory=dict, repr=False)
    score_seconds: float = 0.0
    pinned_tokens: PinnedTokens | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._forget_keepsakes()

    @property
    def next_cut(self) -> int | None:
        """Position of the next cut; None if there is none."""
        if self.schedule is None or not self.schedule.has_cut(self.cuts_made + 1):
            return None
        return self.schedule.cut(self.cuts_made + 1).position

    def survivor_blocks(self) -> list[int]:
        """Blocks that hold the survivors of the last cut."""
        assert self.schedule is not None
        return self.blocks[
            self.survivors_start : self.survivors_start
            + self.schedule.survivor_blocks(self.cuts_made)
        ]

    def private_blocks(self) -> list[int]:
        """Blocks of survivors and of the tokens after the last cut; none before the first."""
        return [*self.survivor_blocks(), *self.blocks[self.tail_start :]] if self.cuts_made else []

    def advance(self) -> None:
        """Note that the next cut is behind the request. Mutates the entry."""
        assert self.schedule is not None
        start = self.tail_start + self.schedule.tail_blocks(
            self.cuts_made, None, self.prefill_blocks
        )
        self.cuts_made += 1
        if self.schedule.cut(self.cuts_made).moves:
            self.survivors_start = start
            start += self.schedule.survivor_blocks(self.cuts_made)
        self.tail_start = start
        self.forget_window()

    def restart(self, blocks: list[int], prefill_blocks: int | None) -> None:
        """Begin the prefill anew. Mutates the entry."""
        self.blocks = blocks
        self.prefill_blocks = prefill_blocks
        self.cuts_made = self.survivors_start = self.tail_start = 0
        self.forget_window()
        self._forget_keepsakes()

    def forget_window(self) -> None:
        """Let go of what was collected for scoring. Mutates the entry."""
        self.window = None
        self.scores = {}
        self.score_seconds = 0.0

    def _forget_keepsakes(self) -> None:
        self.pinned_tokens = (
            PinnedTokens(self.settings.pinned_ranges) if self.settings.pinned_ranges else None
        )
