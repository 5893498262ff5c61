"""Settings as users write them, and the planner's promises about what a request holds."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvcompress.arena import ArenaPlan
from vllm_kvcompress.config import KVCompressionConfig, Planner, parse_budget
from vllm_kvcompress.methods import Cake, available


def config(method: str = "uniform", budget: Any = 64, **params: Any) -> KVCompressionConfig:
    return KVCompressionConfig.parse({"method": method, "budget": budget, **params})


def is_one_sentence(text: str) -> bool:
    """What a user sees must fit on a line and carry no stack of text with it."""
    return "\n" not in text and "Traceback" not in text and 20 < len(text) < 300


# --- parse and as_dict ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        {"method": "cake", "budget": 1024},
        {"method": "cake", "budget": 0.25, "gamma": 3.5, "window": 16},
        {"method": "dynamickv", "budget": 512, "pooling": "max", "faithful": True},
        {"method": "random", "budget": 99, "seed": 7, "check_integrity": True},
        {"method": "scatter", "budget": 1, "log_requests": True, "check_integrity": True},
    ],
)
def test_settings_survive_the_way_through_json(given: dict[str, Any]) -> None:
    parsed = KVCompressionConfig.parse(given)
    # Settings travel to other processes and into vLLM's config hash in this form.
    carried = json.loads(json.dumps(parsed.as_dict()))
    assert carried == given
    assert KVCompressionConfig.parse(carried) == parsed


@pytest.mark.parametrize("method", available())
def test_defaults_of_every_method_are_accepted(method: str) -> None:
    parsed = KVCompressionConfig.parse({"method": method})
    assert parsed.as_dict() == {"method": method, "budget": 1024}
    assert not parsed.check_integrity
    assert not parsed.log_requests


def test_parameters_reach_the_method() -> None:
    method = config("cake", gamma=3, tau1=0.5, window=16, every=4).build_method()
    assert method == Cake(gamma=3, tau1=0.5, window=16, every=4)


def test_parsing_leaves_the_given_mapping_alone_and_is_immutable() -> None:
    given = {"method": "cake", "budget": 64, "window": 8}
    parsed = KVCompressionConfig.parse(given)
    assert given == {"method": "cake", "budget": 64, "window": 8}
    with pytest.raises(TypeError):
        parsed.params["window"] = 9  # type: ignore[index]


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("cake", ["kv_compression", "mapping", "'cake'"]),
        (["cake"], ["kv_compression", "mapping", "['cake']"]),
        (True, ["kv_compression", "mapping", "True"]),
        ({}, ["method", "None"]),
        ({"budget": 64}, ["method", "None"]),
        ({"method": None}, ["method", "None"]),
        ({"method": 3}, ["method", "3"]),
        ({"method": ["cake"]}, ["method", "['cake']"]),
        ({"method": "snapkv2"}, ["method", "snapkv2", "cake", "dynamickv"]),
        ({"method": ""}, ["method", '""', "cake"]),
        ({"method": "cake", "budget": "1024"}, ["budget", "'1024'", "0 and 1"]),
        ({"method": "cake", "budget": None}, ["budget", "None"]),
        ({"method": "cake", "budget": True}, ["budget", "True"]),
        ({"method": "cake", "budget": 0}, ["budget", "0"]),
        ({"method": "cake", "budget": -3}, ["budget", "-3"]),
        ({"method": "cake", "budget": 0.0}, ["budget", "0.0"]),
        ({"method": "cake", "budget": 1.0}, ["budget", "1.0"]),
        ({"method": "cake", "budget": 1024.0}, ["budget", "1024.0"]),
        ({"method": "cake", "budget": float("nan")}, ["budget", "nan"]),
        ({"method": "cake", "budget": float("inf")}, ["budget", "inf"]),
        ({"method": "cake", "budget": [64]}, ["budget", "[64]"]),
        ({"method": "cake", "gama": 2}, ["gama", "gamma", "cake"]),
        ({"method": "uniform", "gamma": 2}, ["gamma", "uniform", "kernel"]),
        ({"method": "cake", "params": {}}, ["params", "cake"]),
        ({"method": "cake", "window": 1}, ["window", "1", "cake"]),
        ({"method": "cake", "window": "32"}, ["window", "'32'", "cake"]),
        ({"method": "cake", "window": 32.0}, ["window", "32.0"]),
        ({"method": "cake", "kernel": 4}, ["kernel", "4", "odd"]),
        ({"method": "cake", "gamma": "a lot"}, ["gamma", "'a lot'"]),
        ({"method": "cake", "gamma": float("nan")}, ["gamma", "nan"]),
        ({"method": "cake", "tau1": 0}, ["tau1", "0"]),
        ({"method": "cake", "faithful": 1}, ["faithful", "1", "true or false"]),
        ({"method": "dynamickv", "pooling": "median"}, ["pooling", "'median'", "avg"]),
        ({"method": "dynamickv", "pooling": ["avg"]}, ["pooling", "['avg']"]),
        ({"method": "dynamickv", "r_max": 0.5}, ["r_max", "0.5"]),
        ({"method": "random", "seed": -1}, ["seed", "-1"]),
        ({"method": "cake", "check_integrity": "yes"}, ["check_integrity", "'yes'"]),
        ({"method": "cake", "log_requests": 1}, ["log_requests", "1", "true or false"]),
    ],
)
def test_wrong_values_get_one_sentence(given: Any, names: list[str]) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        KVCompressionConfig.parse(given)
    text = str(caught.value)
    assert is_one_sentence(text), text
    assert [n for n in names if n not in text] == [], text


# --- parse_budget --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"), [("1024", 1024), ("1", 1), ("0.25", 0.25), (".5", 0.5), ("1e-2", 0.01)]
)
def test_budgets_of_the_command_line(text: str, value: float) -> None:
    parsed = parse_budget(text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    "text", ["", "lots", "0", "-5", "1.0", "0.0", "1024.0", "nan", "inf", "25%", "1e3", "64 tokens"]
)
def test_wrong_budgets_of_the_command_line_get_one_sentence(text: str) -> None:
    with pytest.raises(ValueError, match="kv-compression-budget must be") as caught:
        parse_budget(text)
    assert is_one_sentence(str(caught.value))


# --- Planner -------------------------------------------------------------------------------------


def test_a_budget_needs_room_beside_the_window() -> None:
    # cake's window is 32 by default, so 64 is the least with blocks of 32.
    Planner(config("cake", 64), 32)
    with pytest.raises(ValueError, match="kv-compression-budget 63 is too small") as caught:
        Planner(config("cake", 63), 32)
    text = str(caught.value)
    assert is_one_sentence(text)
    assert "at least 64 tokens" in text
    assert "--block-size" in text
    # A smaller window makes room; a method that keeps everything has no use for a budget.
    Planner(config("cake", 63, window=16), 32)
    Planner(config("scatter", 1), 32)


def test_prompts_within_the_kept_blocks_stay_as_they_are() -> None:
    planner = Planner(config("uniform", 100), 32)
    assert planner.budget_blocks(5000) == 4
    assert [planner.plan(n) for n in (1, 100, 128)] == [None, None, None]
    assert planner.plan(129) == ArenaPlan(129, 32, prompt_blocks=5, arena_blocks=4, slack=0)


def test_a_share_of_the_prompt_is_rounded_up_and_never_below_what_a_method_needs() -> None:
    planner = Planner(config("uniform", 0.25), 32)
    assert planner.budget_blocks(4096) == 32
    assert planner.budget_blocks(4097) == 33
    assert planner.budget_blocks(10) == 2  # window 32 + one block
    assert planner.plan(64) is None
    assert planner.plan(65) == ArenaPlan(65, 32, prompt_blocks=3, arena_blocks=2, slack=0)


@given(st.integers(1, 300), st.sampled_from([1, 16, 32]))
def test_keeping_everything_takes_as_many_blocks_and_fills_the_last_page(
    prompt: int, size: int
) -> None:
    plan = Planner(config("scatter"), size).plan(prompt)
    assert plan is not None
    assert plan.arena_blocks == plan.prompt_blocks == -(-prompt // size)
    assert plan.arena_blocks * size - plan.slack == prompt
    assert plan.growth_blocks(prompt + plan.slack) == 0
    assert plan.growth_blocks(prompt + plan.slack + 1) == 1


budgets = st.integers(40, 400) | st.floats(0.01, 0.99)


@given(budgets, st.integers(1, 2000))
def test_evicting_plans_keep_less_than_the_prompt_and_leave_no_slack(
    budget: float, prompt: int
) -> None:
    planner = Planner(config("uniform", budget, window=24), 16)
    plan = planner.plan(prompt)
    kept = planner.budget_blocks(prompt) * 16
    if plan is None:
        assert prompt <= kept
        return
    assert plan.slack == 0
    assert planner.window + 1 <= plan.arena_blocks * 16 == kept < prompt
    assert plan.arena_blocks < plan.prompt_blocks


# Bounds for start-up: what vLLM reserves for one request of max_model_len tokens, and how many
# entries a row of the runner's block table has.


def check_bounds(budget: float, prompt: int, generated: int, extra: int, size: int) -> None:
    planner = Planner(config("uniform", budget, window=8), size)
    tokens = prompt + generated
    bound = planner.peak_blocks(tokens + extra)
    plan = planner.plan(prompt)
    if plan is None:
        assert bound >= -(-tokens // size)
        return
    assert bound >= plan.peak_blocks(tokens)
    row = plan.prompt_blocks + plan.arena_blocks + plan.growth_blocks(tokens)
    assert bound >= row


@settings(max_examples=300)
@given(st.integers(12, 120), st.integers(1, 300), st.integers(0, 60), st.integers(0, 60))
def test_start_up_bounds_every_request_with_a_token_budget(
    budget: int, prompt: int, generated: int, extra: int
) -> None:
    check_bounds(budget, prompt, generated, extra, 4)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.75, 0.9])
def test_start_up_bounds_every_request_with_a_share(share: float) -> None:
    # All of them: the lengths at which rounding makes a difference are rare.
    for limit in range(8, 120):
        for prompt in range(1, limit + 1):
            check_bounds(share, prompt, limit - prompt, 0, 4)


def test_start_up_bounds_a_share_whose_longest_prompt_stays_whole() -> None:
    # 0.9 of 256 rounds up to all 8 blocks of 32, but 225 tokens are cut from 8 to 7.
    planner = Planner(config("uniform", 0.9), 32)
    assert planner.plan(256) is None
    plan = planner.plan(225)
    assert plan is not None
    assert planner.peak_blocks(256) >= plan.prompt_blocks + plan.arena_blocks


@given(st.integers(40, 400), st.integers(1, 1000), st.integers(0, 200))
def test_a_longer_context_never_needs_less(budget: int, length: int, more: int) -> None:
    planner = Planner(config("uniform", budget, window=24), 16)
    assert planner.peak_blocks(length) <= planner.peak_blocks(length + more)


def test_start_up_bounds_scatter() -> None:
    planner = Planner(config("scatter"), 8)
    for prompt in range(1, 60):
        for tokens in range(prompt, 70):
            plan = planner.plan(prompt)
            assert plan is not None
            assert planner.peak_blocks(70) >= plan.peak_blocks(tokens)
            row = plan.prompt_blocks + plan.arena_blocks + plan.growth_blocks(tokens)
            assert planner.peak_blocks(70) >= row
