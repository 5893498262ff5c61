"""The worker's record of every request's blocks, kept from the scheduler's messages.

Both model runners get the same messages. With a record of our own, the order of rows is all that a
runner has to be asked for.
"""

from collections.abc import Iterator

from vllm.v1.core.sched.output import SchedulerOutput

from vllm_kvcompress.engine.step.messages import prefill_blocks_of
from vllm_kvcompress.eviction.request import WorkerRequest
from vllm_kvcompress.planning.request_settings import SettingsResolver


class BlockLedger:
    """All requests that the worker knows of.

    Args:
        resolver: Resolves requests' settings as the scheduler does.
        group: The KV-cache group that is compressed.

    """

    def __init__(self, resolver: SettingsResolver, group: int = 0) -> None:
        self._resolver = resolver
        self._group = group
        self._entries: dict[str, WorkerRequest] = {}

    def __getitem__(self, request_id: str) -> WorkerRequest:
        return self._entries[request_id]

    def __iter__(self) -> Iterator[tuple[str, WorkerRequest]]:
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
        for request_id in output.finished_req_ids:
            self._entries.pop(request_id, None)
        prefill_blocks = prefill_blocks_of(output)
        for new in output.scheduled_new_reqs:
            void.append(new.req_id)
            extra = getattr(new.sampling_params, "extra_args", None)
            settings = self._resolver.resolve(extra, new.prompt_len)
            self._entries[new.req_id] = WorkerRequest(
                prompt_len=new.prompt_len,
                settings=settings,
                schedule=settings.schedule(new.prompt_len),
                blocks=list(new.block_ids[self._group]),
                computed=new.num_computed_tokens,
                prefill_blocks=prefill_blocks.get(new.req_id),
            )
        cached = output.scheduled_cached_reqs
        for request_id, blocks, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            request = self._entries[request_id]
            request.computed = computed
            if request_id in cached.resumed_req_ids:
                void.append(request_id)
                own = list(blocks[self._group]) if blocks else []
                request.restart(own, prefill_blocks.get(request_id))
            elif blocks and blocks[self._group]:
                request.blocks.extend(blocks[self._group])
                grown.append(request_id)
        for request_id, count in output.num_scheduled_tokens.items():
            self._entries[request_id].scheduled = count
        return void, grown
