"""What a worker knows of one request."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from vllm_kvcompress.eviction.pinned_tokens import PinnedPlaces, PinnedTokens
from vllm_kvcompress.methods import LayerScores, Method, MethodError
from vllm_kvcompress.planning.compression_schedule import NEVER, CompressionSchedule, Cut
from vllm_kvcompress.planning.request_settings import RequestSettings


@dataclass
class WorkerRequest:
    """One request.

    Attributes:
        prompt_len: Prompt tokens.
        settings: Its method, budget and the like.
        schedule: When it is cut; None if it never is.
        blocks: All block ids it was ever sent since its prefill began.
        computed: Tokens computed before this step; up to date in steps that go beyond
            ``quiet_until``.
        scheduled: Tokens of this step; up to date where ``computed`` is.
        prefill_blocks: In a cascade, blocks in place of the prompt's own; None otherwise.
        cuts_made: Cuts behind it.
        survivors_start: Where in ``blocks`` the survivors' blocks begin.
        tail_start: Where in ``blocks`` those of the tokens after the last cut begin.
        quiet_until: Steps up to this many tokens hold no query of a window and no cut.
        window: Queries of the last tokens before a cut of the prompt, [L, w, H, D], while they
            are collected.
        scores: Layers already scored, in a prompt that runs in one step.
        score_seconds: Time that scoring them took.
        fault: What the method failed with while they were scored.
        told_of_fault: Whether a fault of the request has been logged.
        pinned: Where its pinned tokens lie; None if it has none.
        keeps_prompt: Whether its decode cuts keep all that is left of the prompt.

    """

    prompt_len: int
    settings: RequestSettings
    schedule: CompressionSchedule | None
    blocks: list[int]
    computed: int
    scheduled: int = 0
    prefill_blocks: int | None = None
    cuts_made: int = 0
    survivors_start: int = 0
    tail_start: int = 0
    quiet_until: int = field(init=False, default=0)
    window: Tensor | None = field(default=None, repr=False)
    scores: dict[int, LayerScores] = field(default_factory=dict, repr=False)
    score_seconds: float = 0.0
    fault: MethodError | None = field(default=None, repr=False)
    told_of_fault: bool = False
    pinned: PinnedTokens | None = field(default=None, repr=False)
    keeps_prompt: bool = field(init=False, default=False)
    _prompt_left: list[int] = field(init=False, default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self.keeps_prompt = self.settings.keeps_prompt(self.prompt_len)
        self._forget_pinned()
        self._look_ahead()

    @property
    def method(self) -> Method:
        """The method that compresses it."""
        return self.settings.planner.method

    @property
    def next_cut(self) -> Cut | None:
        """The next cut; None if there is none."""
        if self.schedule is None or not self.schedule.has_cut(self.cuts_made + 1):
            return None
        return self.schedule.cut(self.cuts_made + 1)

    @property
    def ends_at_cut(self) -> bool:
        """Whether this step computes the last token before the next cut."""
        cut = self.next_cut
        return cut is not None and cut.position == self.computed + self.scheduled

    @property
    def next_is_prefill_cut(self) -> bool:
        """Whether the next cut, if any, is one of the prefill."""
        return self.schedule is not None and self.cuts_made < len(self.schedule.prefill_cuts)

    def survivor_blocks(self) -> list[int]:
        """Blocks that hold the survivors of the last cut."""
        assert self.schedule is not None
        start = self.survivors_start
        return self.blocks[start : start + self.schedule.survivor_blocks(self.cuts_made)]

    def private_blocks(self) -> list[int]:
        """Blocks of survivors and of the tokens after the last cut; none before the first."""
        return [*self.survivor_blocks(), *self.blocks[self.tail_start :]] if self.cuts_made else []

    def advance(self) -> None:
        """Note that the next cut is behind the request. Mutates the request."""
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
        self._look_ahead()

    def pinned_places(
        self, cut: Cut, lengths: Sequence[int], num_kv_heads: int
    ) -> PinnedPlaces | None:
        """Find its pinned tokens in the storage of the layers; None if it has none.

        At the first decode cut it notes what is left of the prompt. From there on that is stored in
        front of everything else, whatever the order, for it is chosen before everything else.

        Args:
            cut: The next cut.
            lengths: Tokens that each layer holds.
            num_kv_heads: N.

        """
        if self._holds_prompt_at(cut):
            assert self.schedule is not None
            if self.cuts_made == len(self.schedule.prefill_cuts):
                generated = cut.position - self.prompt_len
                self._prompt_left = [length - generated for length in lengths]
            return PinnedPlaces(self._prompt_left, self._prompt_left)
        if self.pinned is None:
            return None
        places = [
            self.pinned.find(layer, cut.position, length, num_kv_heads)
            for layer, length in enumerate(lengths)
        ]
        return PinnedPlaces(places, self.settings.pinned_count(self.prompt_len))

    def follow_pinned(
        self,
        cut: Cut,
        places: PinnedPlaces | None,
        stored: Sequence[Tensor],
        lengths: Sequence[int],
    ) -> None:
        """Note where its pinned tokens went in a cut. Mutates the request.

        Args:
            cut: The cut just made, behind the request.
            places: Where they were; None if it has none.
            stored: Per layer the places before the cut of what it holds now, int [N, T].
            lengths: Tokens that each layer held before.

        """
        if self.pinned is None or places is None or self.next_cut is None:
            return
        if not self._holds_prompt_at(cut):
            self.pinned.follow(cut.position, places.places, stored, lengths)

    def restart(self, blocks: list[int], prefill_blocks: int | None) -> None:
        """Begin the prefill anew. Mutates the request."""
        self.blocks = blocks
        self.prefill_blocks = prefill_blocks
        self.cuts_made = self.survivors_start = self.tail_start = 0
        self.forget_window()
        self._forget_pinned()
        self._look_ahead()

    def forget_window(self) -> None:
        """Let go of what was collected for scoring. Mutates the request."""
        self.window = None
        self.scores = {}
        self.fault = None
        self.score_seconds = 0.0

    def _look_ahead(self) -> None:
        cut = self.next_cut
        if cut is None:
            self.quiet_until = NEVER
            return
        planner = self.settings.planner
        window = planner.window if self.next_is_prefill_cut else planner.decode_window
        self.quiet_until = cut.position - max(window, 1)

    def _holds_prompt_at(self, cut: Cut) -> bool:
        return self.keeps_prompt and cut.position > self.prompt_len

    def _forget_pinned(self) -> None:
        ranges = self.settings.pinned_ranges
        self.pinned = PinnedTokens(ranges) if ranges else None
