"""Nothing of ours in a worker runs outside of inference mode, on any way that a request can take.

After every test with an engine the same is asked of all that it has called (``conftest.py``), and
of every job under model runner V2 (``interpreted.py``).
"""

import pytest

from tests.e2e.harness import Engines
from tests.e2e.test_streaming import streaming
from tests.support.inference_mode import WATCH

pytestmark = pytest.mark.engine


def test_every_way(engines: Engines, prose: list[int]) -> None:
    for engine in (
        engines.open(config={"prefill": "full"}),
        engines.open(config={"prefill": "cascade"}),
        engines.get("cake", 256, max_num_batched_tokens=160),
        streaming(engines),
        engines.limited(),
    ):
        engine.generate([prose[:700]], 40)
    assert {
        "Session.__init__",
        "Session.begin_step",
        "ArenaBuilder.step_inputs",
        "ArenaImpl.forward",
        "CpuPageCodec.__init__",
        "Compressor.score_in_step",
        "CascadePrefill.cut_layer",
        "CascadePrefill.finish",
        "Compressor.cut",
        "DecodeQueryBuffer.take",
        "Method.score",
        "TableBuilder.build",
    } <= WATCH.inside
    assert WATCH.outside == set()
