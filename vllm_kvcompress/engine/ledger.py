"""The worker's record of every request's blocks, read off the scheduler's output.

Both model runners learn the same facts from the same messages; keeping our own record instead of
reading theirs leaves only the order of rows to ask a runner for.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import Tensor
from vllm.v1.core.sched.output import SchedulerOutput

from vllm_kvcompress.course import Course
from vllm_kvcompress.engine.orders import orders_of
from vllm_kvcompress.keep import Keepsakes
from vllm_kvcompress.methods import LayerScores
from vllm_kvcompress.plans import Plans, Terms


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


class Ledger:
    """All requests the worker knows of.

    Args:
        plans: Those the scheduler uses too.
        group: The KV-cache group that is compressed.

    """

    def __init__(self, plans: Plans, group: int = 0) -> None:
        self._plans = plans
        self._group = group
        self._entries: dict[str, Entry] = {}

    def __getitem__(self, request_id: str) -> Entry:
        return self._entries[request_id]

    def __iter__(self) -> Iterator[tuple[str, Entry]]:
        return iter(self._entries.items())

    def update(self, output: SchedulerOutput) -> tuple[list[str], list[str]]:
        """Take in one step's message. Mutates the ledger.

        Args:
            output: What the scheduler sent.

        Returns:
            Requests whose compressed cache is void (gone, preempted or begun anew), and running
            requests that got more blocks.

        """
        void: list[str] = [*output.finished_req_ids, *(output.preempted_req_ids or ())]
        grown: list[str] = []
        self._forget(output.finished_req_ids)
        fronts = orders_of(output).fronts
        for new in output.scheduled_new_reqs:
            void.append(new.req_id)
            extra = getattr(new.sampling_params, "extra_args", None)
            terms = self._plans.terms(extra, new.prompt_len)
            entry = self._entries[new.req_id] = Entry(
                prompt_len=new.prompt_len,
                terms=terms,
                course=terms.course(new.prompt_len),
                blocks=list(new.block_ids[self._group]),
                computed=new.num_computed_tokens,
                front=fronts.get(new.req_id),
            )
            entry.cached = self._cached(entry)
        cached = output.scheduled_cached_reqs
        for request_id, blocks, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            entry = self._entries[request_id]
            entry.computed = computed
            if request_id in cached.resumed_req_ids:
                void.append(request_id)
                own = list(blocks[self._group]) if blocks else []
                entry.restart(own, fronts.get(request_id))
                entry.cached = self._cached(entry)
            elif blocks and blocks[self._group]:
                entry.blocks.extend(blocks[self._group])
                grown.append(request_id)
        for request_id, count in output.num_scheduled_tokens.items():
            self._entries[request_id].scheduled = count
        return void, grown

    def _cached(self, entry: Entry) -> int:
        return 0 if entry.front is None else entry.computed // self._plans.own.block_size

    def _forget(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._entries.pop(request_id, None)
