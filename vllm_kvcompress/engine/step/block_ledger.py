"""The worker's record of every request's blocks, read off the scheduler's output.

Both model runners learn the same facts from the same messages; keeping our own record instead of
reading theirs leaves only the order of rows to ask a runner for.
"""

from collections.abc import Iterable, Iterator

from vllm.v1.core.sched.output import SchedulerOutput

from vllm_kvcompress.engine.step.messages import orders_of
from vllm_kvcompress.eviction.request import Entry
from vllm_kvcompress.planning.request_settings import Plans


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
