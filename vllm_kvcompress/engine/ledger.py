"""The worker's record of every request's blocks, read off the scheduler's output.

Both model runners learn the same facts from the same messages; keeping our own record instead of
reading theirs leaves only the order of rows to ask a runner for.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import Tensor
from vllm.v1.core.sched.output import SchedulerOutput

from vllm_kvcompress.arena import ArenaPlan
from vllm_kvcompress.config import Planner
from vllm_kvcompress.methods import LayerScores


@dataclass
class Entry:
    """One request.

    Attributes:
        prompt_len: Prompt tokens.
        plan: What it will hold, None if it is never compressed.
        blocks: All block ids it was ever sent since its prefill began.
        computed: Tokens computed before this step.
        scheduled: Tokens of this step.
        window: Queries of the prompt's last tokens, [L, w, H, D], while they are collected.
        scores: Layers already scored, in a prompt that runs in one step.
        score_seconds: Time that took.

    """

    prompt_len: int
    plan: ArenaPlan | None
    blocks: list[int]
    computed: int
    scheduled: int = 0
    window: Tensor | None = field(default=None, repr=False)
    scores: dict[int, LayerScores] = field(default_factory=dict, repr=False)
    score_seconds: float = 0.0

    def private_blocks(self) -> list[int]:
        """Arena and growth blocks."""
        return self.blocks[self.plan.prompt_blocks :] if self.plan else []

    def forget_window(self) -> None:
        """Let go of what was collected for scoring. Mutates the entry."""
        self.window = None
        self.scores = {}
        self.score_seconds = 0.0


class Ledger:
    """All requests the worker knows of.

    Args:
        planner: The one the scheduler uses too.

    """

    def __init__(self, planner: Planner) -> None:
        self._planner = planner
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
        for new in output.scheduled_new_reqs:
            void.append(new.req_id)
            self._entries[new.req_id] = Entry(
                prompt_len=new.prompt_len,
                plan=self._planner.plan(new.prompt_len),
                blocks=list(new.block_ids[0]),
                computed=new.num_computed_tokens,
            )
        cached = output.scheduled_cached_reqs
        for request_id, blocks, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            entry = self._entries[request_id]
            entry.computed = computed
            if request_id in cached.resumed_req_ids:
                void.append(request_id)
                entry.blocks = list(blocks[0]) if blocks else []
                entry.forget_window()
            elif blocks and blocks[0]:
                entry.blocks.extend(blocks[0])
                grown.append(request_id)
        for request_id, count in output.num_scheduled_tokens.items():
            self._entries[request_id].scheduled = count
        return void, grown

    def _forget(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._entries.pop(request_id, None)
