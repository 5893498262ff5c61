"""Settings of single requests on a real engine: exact in mixed batches, refused when wrong."""

from typing import Any

import pytest

from tests.e2e.engine import Engine
from tests.e2e.harness import LAYERS, Engines
from vllm_kvcompress.engine import requests

pytestmark = pytest.mark.engine

BUDGET = 256
ASKED: list[dict[str, Any]] = [
    {},
    {"kv_compression": "none"},
    {"kv_compression_budget": 96},
    {"kv_compression_budget": 0.2},
    {"kv_compression": "dynamickv", "kv_compression_budget": 128},
    {"kv_compression": "snapkv", "kv_compression_config": {"window": 8, "kernel": 7}},
    {"kv_compression": "pyramidkv"},
    {"kv_compression": "streamingllm", "kv_compression_budget": 160},
    {"kv_compression": "h2o"},
    {"kv_compression": "tova", "kv_compression_budget": 64},
    {"kv_compression": "keydiff"},
    {"kv_compression": "knorm"},
    {"kv_compression": "random"},
    {"kv_compression": "uniform", "kv_compression_config": {"window": 64}},
    {"kv_compression": "cake", "kv_compression_config": {"scorer": "keydiff"}},
    {"kv_compression": "snapkv", "kv_compression_config": {"allocator": "dynamickv"}},
    {"kv_compression_config": {"gamma": 0, "tau1": 2.0}},
]


def run(
    engine: Engine, prompts: list[list[int]], asked: list[dict[str, Any]]
) -> list[tuple[list[int], float]]:
    """Greedy answers, and their log-probability, of requests that run together."""
    names = [
        engine.caller_id[engine.add(prompt, 12, extra_args=extra or None, logprobs=1)]
        for prompt, extra in zip(prompts, asked, strict=True)
    ]
    done: dict[str, tuple[list[int], float]] = {}
    for outputs in engine.steps():
        for output in outputs:
            if output.finished:
                (answer,) = output.outputs
                done[output.request_id] = (list(answer.token_ids), answer.cumulative_logprob)
    return [done[name] for name in names]


def alone(engines: Engines, prompt: list[int], asked: dict[str, Any]) -> tuple[list[int], float]:
    """The answer of an engine that has those settings for every request."""
    method = asked.get("kv_compression", "cake")
    engine = engines.get(
        None if method == "none" else method,
        asked.get("kv_compression_budget", BUDGET),
        config=asked.get("kv_compression_config", {}),
    )
    return run(engine, [prompt], [{}])[0]


def test_a_mixed_batch_is_exact(engines: Engines, prose: list[int]) -> None:
    """Every request as on an engine of its own whose settings are the server's."""
    engine = engines.open()
    prompts = [prose[97 * i : 97 * i + 330 + 23 * i] for i in range(len(ASKED))]
    together = run(engine, prompts, ASKED)
    # Not because nothing was compressed, or all in the same way.
    assert engine.stats["prompt_cuts"] == len(ASKED) - 1
    ways = {round(run(engine, [prompts[3]], [asked])[0][1], 4) for asked in ASKED}
    assert len(ways) > 12
    for prompt, asked, (tokens, logprob) in zip(prompts, ASKED, together, strict=True):
        expected = alone(engines, prompt, asked)
        assert tokens == expected[0], asked
        assert logprob == pytest.approx(expected[1], abs=1e-3), asked


@pytest.mark.parametrize("prefill", ["full", "cascade"])
@pytest.mark.parametrize("method", ["cake", "dynamickv", "streamingllm", "tova", "keydiff"])
def test_kept_ranges_survive_in_every_layer_and_head(
    engines: Engines, prose: list[int], method: str, prefill: str
) -> None:
    engine = engines.open(config={"prefill": prefill})
    kept = engine.record_kept()
    keep = [40, 61, 200, 290]
    asked = {"kv_compression": method, "kv_compression_keep": keep}
    wanted = {*range(40, 61), *range(200, 290)}
    run(engine, [prose[:700], prose[:700]], [asked, {"kv_compression": method}])
    by_decree, free = kept
    assert len(by_decree) == LAYERS
    for layer in by_decree:
        for head in layer:
            assert wanted <= set(head)
            assert len(set(head)) == len(head)
    assert sum(len(layer[0]) for layer in by_decree) == LAYERS * BUDGET
    assert any(not wanted <= set(head) for layer in free for head in layer)


@pytest.mark.parametrize("method", ["cake", "knorm"])
def test_kept_ranges_survive_cuts_while_generating(
    engines: Engines, prose: list[int], method: str
) -> None:
    """What must stay is in the cache at the end, key for key, wherever it has moved to."""
    import torch

    engine = engines.limited()
    prompt, keep = prose[:500], [10, 50]
    kept = {"kv_compression": method, "kv_compression_keep": keep, "kv_compression_budget": 128}
    keys: dict[int, Any] = {}
    request_id = engine.add(prompt, 100, extra_args=kept)
    for _ in engine.steps():
        if request_id in engine.arena:
            entry = engine.worker_request(request_id)
            pages = engine.arena.layer_pages(request_id)
            for layer in (0, 2, LAYERS - 1):
                places = entry.pinned.places[layer]
                assert places.shape == (3, 40)
                held = int(places.max()) + 1
                found = engine.codec.read_keys(pages[layer], held)
                index = places.unsqueeze(-1).expand(-1, -1, found.shape[-1])
                rows = found.gather(1, index)
                assert torch.equal(rows, keys.setdefault(layer, rows))
    assert engine.stats["decode_cuts"] >= 2
    engine.check()


def test_wrong_settings_are_the_requests_own_error(engines: Engines, prose: list[int]) -> None:
    from vllm.exceptions import VLLMValidationError

    engine = engines.get("cake", BUDGET, max_num_batched_tokens=160)  # test_cake has it, too
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"kv_compression": "zip"}, "kv_compression must be one of .*cake.*none.*'zip'"),
        ({"kv_compression_budget": 257}, "kv_compression_budget must be at most 256 tokens"),
        ({"kv_compression_budget": 1.5}, "kv_compression_budget must be a whole number"),
        ({"kv_compression_budget": 33}, "33 is too small: cake needs at least 64"),
        ({"kv_compression_config": '{"gamma": 1}'}, "'gamma' may not be set by requests"),
        ({"kv_compression_config": "{"}, "kv_compression_config must be a JSON object"),
        ({"kv_compression_keep": [0, 5]}, "kv_compression_keep may not be set by requests"),
        ({"kv_compression_bugdet": 64}, "'kv_compression_bugdet' is not a setting of a request"),
        ({"kv_compression_decode": False}, "kv_compression_decode may not be set to false"),
    ]
    for asked, sentence in wrong:
        with pytest.raises(VLLMValidationError, match=sentence):
            engine.generate([prose[:400]], 4, extra_args=asked)
    generous = engines.open()
    more: list[tuple[dict[str, Any], str]] = [
        ({"kv_compression_keep": [0, 401]}, "the range 0 to 401, but ranges must lie within"),
        ({"kv_compression_keep": [5]}, "kv_compression_keep must be start and end"),
        ({"kv_compression_keep": [0, 225]}, "names 225 tokens .* has room for 224"),
        ({"kv_compression_config": {"gama": 1}}, 'cake: unknown parameter "gama"'),
        ({"kv_compression_config": {"window": 200}}, "window must be at most 128"),
    ]
    for asked, sentence in more:
        with pytest.raises(VLLMValidationError, match=sentence):
            generous.generate([prose[:400]], 4, extra_args=asked)
    assert len(generous.generate([prose[:400]], 4, extra_args={"kv_compression_keep": [0, 224]}))


def test_compression_for_those_who_ask(engines: Engines, prose: list[int]) -> None:
    """A server whose default is none: plain vLLM's path, unless a request names a method."""
    engine = engines.get("none", BUDGET)
    assert engine.generate([prose[:600]], 12) == engines.get().generate([prose[:600]], 12)
    assert engine.stats["compressed_steps"] == 0
    asked = {"kv_compression": "cake"}
    answer = engine.generate([prose[:600]], 12, extra_args=asked)
    assert answer == engines.open().generate([prose[:600]], 12)
    assert engine.stats["prompt_cuts"] == 1


def test_a_share_of_the_prompt_bounds_tokens(engines: Engines, prose: list[int]) -> None:
    from vllm.exceptions import VLLMValidationError

    engine = engines.get("cake", 0.25)
    assert engine.generate([prose[:800]], 4, extra_args={"kv_compression_budget": 200})
    with pytest.raises(VLLMValidationError, match=r"at most 0\.25 of the prompt here, got 201"):
        engine.generate([prose[:800]], 4, extra_args={"kv_compression_budget": 201})


def test_what_no_front_end_has_judged_ends_alone(
    engines: Engines, prose: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if it came from a front end that knows nothing of compression."""
    engine = engines.open()
    prompts = [prose[:330], prose[:350], prose[97:500]]
    good = [{}, {"kv_compression": "snapkv"}]
    expected = [tokens for tokens, _ in run(engine, [prompts[0], prompts[2]], good)]
    monkeypatch.setattr(requests, "check_request", lambda *_: None)
    asked = [good[0], {"kv_compression": "zip"}, good[1]]
    names = [
        engine.caller_id[engine.add(prompt, 12, extra_args=extra or None)]
        for prompt, extra in zip(prompts, asked, strict=True)
    ]
    ended = {o.request_id: o.outputs[0] for step in engine.steps() for o in step if o.finished}
    first, wrong, last = (ended[name] for name in names)
    assert [list(first.token_ids), list(last.token_ids)] == expected
    assert (wrong.finish_reason, list(wrong.token_ids)) == ("error", [])
