"""What a worker knows of one request."""

from dataclasses import dataclass, field

from torch import Tensor

from vllm_kvcompress.eviction.pinned_tokens import Keepsakes
from vllm_kvcompress.methods import LayerScores
from vllm_kvcompress.planning.compression_schedule import Course
from vllm_kvcompress.planning.request_settings import Terms


@dataclass
class Entry:
    """One request.

    Attributes:
        prompt_len: Prompt tokens.
        terms: Its method, budget and the like.
        course: When it is cut, None if it never is.
        blocks: All block ids it was ever sent since its prefill began.
        computed: Tokens computed before this step.
        scheduled: Tokens of this step.
        front: In a cascade, blocks in place of the prompt's own; None otherwise.
        cached: In a cascade, how many of them come from the prefix cache.
        cuts: Cuts behind it.
        home: Where in ``blocks`` the survivors' blocks begin.
        growth: Where those of the tokens after the last cut begin.
        window: Queries of the last tokens before a cut of the prompt, [L, w, H, D], while they
            are collected.
        scores: Layers already scored, in a prompt that runs in one step.
        score_seconds: Time that took.
        keepsakes: Where tokens lie that must stay; None if there are none.

    """

    prompt_len: int
    terms: Terms
    course: Course | None
    blocks: list[int]
    computed: int
    scheduled: int = 0
    front: int | None = None
    cached: int = 0
    cuts: int = 0
    home: int = 0
    growth: int = 0
    window: Tensor | None = field(default=None, repr=False)
    scores: dict[int, LayerScores] = field(default_factory=dict, repr=False)
    score_seconds: float = 0.0
    keepsakes: Keepsakes | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._forget_keepsakes()

    @property
    def next_cut(self) -> int | None:
        """Position of the next cut; None if there is none."""
        if self.course is None or not self.course.has_cut(self.cuts + 1):
            return None
        return self.course.cut(self.cuts + 1).position

    def home_blocks(self) -> list[int]:
        """Blocks that hold the survivors of the last cut."""
        assert self.course is not None
        return self.blocks[self.home : self.home + self.course.home(self.cuts)]

    def private_blocks(self) -> list[int]:
        """Blocks of survivors and of the tokens after the last cut; none before the first."""
        return [*self.home_blocks(), *self.blocks[self.growth :]] if self.cuts else []

    def advance(self) -> None:
        """Note that the next cut is behind the request. Mutates the entry."""
        assert self.course is not None
        start = self.growth + self.course.segment(self.cuts, None, self.front)
        self.cuts += 1
        if self.course.cut(self.cuts).moves:
            self.home = start
            start += self.course.home(self.cuts)
        self.growth = start
        self.forget_window()

    def restart(self, blocks: list[int], front: int | None) -> None:
        """Begin the prefill anew. Mutates the entry."""
        self.blocks = blocks
        self.front = front
        self.cuts = self.home = self.growth = 0
        self.forget_window()
        self._forget_keepsakes()

    def forget_window(self) -> None:
        """Let go of what was collected for scoring. Mutates the entry."""
        self.window = None
        self.scores = {}
        self.score_seconds = 0.0

    def _forget_keepsakes(self) -> None:
        self.keepsakes = Keepsakes(self.terms.keep) if self.terms.keep else None
