"""The worker's record of every request's blocks, kept from the scheduler's messages.

Both model runners get the same messages. With a record of our own, the order of rows is all that a
runner has to be asked for.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from vllm.v1.core.sched.output import SchedulerOutput

from vllm_kvcompress.engine.step.messages import prefill_blocks_of
from vllm_kvcompress.eviction.request import WorkerRequest
from vllm_kvcompress.planning.compression_schedule import NEVER
from vllm_kvcompress.planning.request_settings import SettingsResolver


@dataclass(frozen=True)
class StepChanges:
    """What a step's message changes for compression.

    Attributes:
        void: Requests whose compressed cache is void: gone, preempted or begun anew.
        grown: By running request that got more blocks, those.
        busy: Requests that this step does not leave alone: a window looks at some of its tokens, or
            it ends at a cut.

    """

    void: list[str]
    grown: dict[str, list[int]]
    busy: list[str]


class BlockLedger:
    """All requests that the worker knows of.

    What the rows compute is noted only in steps in which one of them is busy: a batch whose rows
    decode, far from any cut, is compared with the last one as a whole.

    Args:
        resolver: Resolves requests' settings as the scheduler does.
        group: The KV-cache group that is compressed.

    """

    def __init__(self, resolver: SettingsResolver, group: int = 0) -> None:
        self._resolver = resolver
        self._group = group
        self._entries: dict[str, WorkerRequest] = {}
        # The last step's requests in the message's order, which most steps keep.
        self._names: list[str] = []
        self._rows: list[WorkerRequest] = []
        # Steps of one token each that these can make before one of them is busy.
        self._quiet_steps = 0

    def __getitem__(self, request_id: str) -> WorkerRequest:
        return self._entries[request_id]

    def __iter__(self) -> Iterator[tuple[str, WorkerRequest]]:
        return iter(self._entries.items())

    def update(self, output: SchedulerOutput) -> StepChanges:
        """Take in one step's message. Mutates the ledger.

        Args:
            output: What the scheduler sent.

        """
        cached, counts = output.scheduled_cached_reqs, output.num_scheduled_tokens
        void = [*output.finished_req_ids, *(output.preempted_req_ids or ())]
        for request_id in output.finished_req_ids:
            self._entries.pop(request_id, None)
        void += self._begin(output)
        grown: dict[str, list[int]] = {}
        for row, blocks in enumerate(cached.new_block_ids):
            if blocks is None and not cached.resumed_req_ids:
                continue
            request_id = cached.req_ids[row]
            own = list(blocks[self._group]) if blocks else []
            if request_id in cached.resumed_req_ids:
                void.append(request_id)
                prefill_blocks = prefill_blocks_of(output).get(request_id)
                self._entries[request_id].restart(own, prefill_blocks)
            elif own:
                self._entries[request_id].blocks += own
                grown[request_id] = own
        names = list(counts)
        same = not void and names == self._names
        self._quiet_steps -= 1
        if same and self._quiet_steps >= 0 and output.total_num_scheduled_tokens == len(names):
            return StepChanges(void, grown, [])  # without a look at any row
        if not same:
            self._names, self._rows = names, [self._entries[name] for name in names]
        return StepChanges(void, grown, self._look_at_rows(output))

    def _begin(self, output: SchedulerOutput) -> list[str]:
        """Take in the requests that are new to the worker; returns their ids."""
        for new in output.scheduled_new_reqs:
            extra = getattr(new.sampling_params, "extra_args", None)
            settings = self._resolver.resolve(extra, new.prompt_len)
            self._entries[new.req_id] = WorkerRequest(
                prompt_len=new.prompt_len,
                settings=settings,
                schedule=settings.schedule(new.prompt_len),
                blocks=list(new.block_ids[self._group]),
                computed=new.num_computed_tokens,
                prefill_blocks=prefill_blocks_of(output).get(new.req_id),
            )
        return [new.req_id for new in output.scheduled_new_reqs]

    def _look_at_rows(self, output: SchedulerOutput) -> list[str]:
        """Note what each row computes; returns the busy ones. Mutates the rows."""
        cached = output.scheduled_cached_reqs
        for request_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            self._entries[request_id].computed = computed
        busy = []
        quiet = NEVER
        counts = output.num_scheduled_tokens.values()
        for name, request, count in zip(self._names, self._rows, counts, strict=True):
            request.scheduled = count
            left = request.quiet_until - request.computed - count
            if left < 0:
                busy.append(name)
            if left < quiet:
                quiet = left
        self._quiet_steps = quiet
        return busy
