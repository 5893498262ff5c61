"""Model runner V2, CUDA's default, on the CPU through Triton's interpreter."""

from typing import Any

import pytest

from tests.e2e.engine import setting
from tests.e2e.harness import Engines, small_model
from tests.e2e.interpreted import Interpreted

pytestmark = pytest.mark.engine


def _check_scatter(v2: Interpreted, limit: int, job: dict[str, Any]) -> None:
    job["model"] = str(small_model())
    plain = v2.run(limit, **job)
    scatter = v2.run(limit, method="scatter", **job)
    assert scatter["outputs"] == plain["outputs"]
    assert scatter["stats"]["prompt_cuts"] == len(job["prompts"]) * job["rounds"]


def test_scatter_equals_plain(v2: Interpreted, prose: list[int]) -> None:
    """On and off block borders, chunked, the second round from the prefix cache."""
    prompts = [prose[:250], prose[50:114], prose[80:145], prose[90:91]]
    settings = {"max_num_batched_tokens": 160}
    job = {"prompts": prompts, "max_tokens": 8, "rounds": 2, "settings": settings}
    _check_scatter(v2, 400, job)


@pytest.mark.slow
@pytest.mark.parametrize("caching", [True, False], ids=["prefix-caching", "no-prefix-caching"])
@pytest.mark.parametrize("chunk", [2048, 160], ids=["one-step", "chunked"])
def test_scatter_equals_plain_for_200_tokens(
    v2: Interpreted, prose: list[int], chunk: int, caching: bool
) -> None:
    prompts = [prose[:640], prose[50:114], prose[80:145], prose[90:121], prose[7:8]]
    settings = {"max_num_batched_tokens": chunk, "enable_prefix_caching": caching}
    job = {"prompts": prompts, "max_tokens": 200, "rounds": 1, "settings": settings}
    _check_scatter(v2, 1500, job)


def test_cake_equals_model_runner_v1(v2: Interpreted, engines: Engines, prose: list[int]) -> None:
    """The same tokens kept, so the same output, whichever runner drives it."""
    prompts = [prose[:500], prose[100:164], prose[300:700]]
    engine = engines.open()
    kept = engine.record_kept()
    expected = engine.generate(prompts, 8, **setting("cake", 128))
    job = {"model": str(small_model()), "prompts": prompts, "max_tokens": 8}
    result = v2.run(400, method="cake", budget=128, **job)
    assert sorted(result["kept"]) == sorted(kept)
    assert result["outputs"] == [expected]
    assert result["stats"]["prompt_cuts"] == len(kept) == 2
