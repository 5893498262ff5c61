"""vLLM's CPU worker with compression, for both model runners."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_kvcompress.engine.worker.arena_worker import ArenaWorker


class ArenaCPUWorker(ArenaWorker, CPUWorker):
    """CPU worker of an engine with compression on."""

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """See vLLM's Worker; rows whose sample nobody takes draw nothing from their seeds."""
        with untouched_generators(self.model_runner):
            return super().sample_tokens(*args, **kwargs)


@contextmanager
def untouched_generators(runner: Any) -> Iterator[None]:
    """Keep the random generators of requests away from rows whose sample is thrown away.

    Model runner V1 samples every row, and winds the generator of a row that has not reached the end
    of its known tokens back afterwards, which a generator on the CPU cannot do. Our steps end at
    cuts, so a request that is replayed has such rows wherever it is cut, even where plain vLLM
    would replay it in one step. Model runner V2 has no generators: it draws from seed and position.

    Args:
        runner: vLLM's; mutated, and as it was at the end.

    """
    batch = getattr(runner, "input_batch", None)
    if batch is None or not batch.generators:
        yield
        return
    thrown_away = np.flatnonzero(runner.discard_request_mask.np[: batch.num_reqs]).tolist()
    set_aside = {row: batch.generators.pop(row) for row in thrown_away if row in batch.generators}
    try:
        yield
    finally:
        batch.generators.update(set_aside)
