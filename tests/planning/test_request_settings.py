"""What single requests get: the server's settings, their own, and the rules in between."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from vllm_kvcompress.planning.block_planner import EngineLimits
from vllm_kvcompress.planning.compression_schedule import CompressionSchedule
from vllm_kvcompress.planning.config import KVCompressionConfig
from vllm_kvcompress.planning.request_settings import RequestSettings, SettingsResolver

BLOCK, PROMPT = 32, 1000
ALL = {"method": True, "budget": True, "params": True, "keep": True, "decode": True}


def resolver(allow: dict[str, Any] | None = None, **config: Any) -> SettingsResolver:
    given = {"method": "cake", "budget": 256, "allow": allow, **config}
    return SettingsResolver(
        KVCompressionConfig.parse(given), BLOCK, EngineLimits(num_layers=4, one_step_tokens=512)
    )


def refusal(server: SettingsResolver, asked: dict[str, Any], prompt: int = PROMPT) -> str:
    with pytest.raises(ValueError, match=r"\w") as caught:
        server.resolve(asked, prompt)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


# --- what a request gets -------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [None, {}, {"other": 1, "session_id": "x"}])
def test_a_request_that_asks_for_nothing_has_the_servers_settings(asked: Any) -> None:
    server = resolver()
    assert server.resolve(asked, PROMPT) == RequestSettings(server.default_planner)


def test_the_servers_own_settings_cost_no_second_planner() -> None:
    server = resolver(ALL, gamma=7)
    for asked in (
        {"kv_compression": "cake"},
        {"kv_compression_budget": 256},
        {"kv_compression_config": '{"gamma": 7}'},
    ):
        assert server.resolve(asked, PROMPT).planner is server.default_planner


def test_equal_settings_share_a_planner() -> None:
    server = resolver(ALL)
    one = server.resolve({"kv_compression_config": '{"gamma": 1, "tau1": 2}'}, PROMPT)
    two = server.resolve({"kv_compression_config": {"tau1": 2, "gamma": 1}}, PROMPT)
    other = server.resolve({"kv_compression_config": {"tau1": 2.0, "gamma": 1}}, PROMPT)
    assert one.planner is two.planner is not other.planner


def test_parameters_of_the_server_go_with_its_method_only() -> None:
    server = resolver(ALL, gamma=7, tau1=2.0)
    mine = server.resolve({"kv_compression_config": {"tau1": 3.0}}, PROMPT).planner.config
    assert dict(mine.params) == {"gamma": 7, "tau1": 3.0}
    other = server.resolve({"kv_compression": "snapkv"}, PROMPT).planner.config
    assert (other.method, other.budget, dict(other.params)) == ("snapkv", 256, {})


def test_parameters_of_the_server_that_a_replaced_part_would_read_are_left_out() -> None:
    server = resolver(ALL, gamma=7, tau1=2)
    settings = server.resolve({"kv_compression_config": '{"scorer": "keydiff"}'}, PROMPT)
    assert settings.planner.config.params == {"tau1": 2, "scorer": "keydiff"}
    settings = server.resolve({"kv_compression_config": '{"allocator": "pyramidkv"}'}, PROMPT)
    assert settings.planner.config.params == {"gamma": 7, "allocator": "pyramidkv"}
    asked = {"kv_compression_config": '{"scorer": "keydiff", "gamma": 1}'}
    assert "gamma has no effect, as the scorer is replaced" in refusal(server, asked)


def test_none_leaves_a_request_alone() -> None:
    settings = resolver().resolve({"kv_compression": "none"}, PROMPT)
    assert settings.schedule(PROMPT) is None
    assert settings.pinned_count(PROMPT) == 0


def test_decode_may_be_left_alone() -> None:
    server = resolver(ALL, decode_budget=128, decode_buffer=32)
    for value, repeats in [(True, True), (1, True), (False, False), (0, False)]:
        schedule = server.resolve({"kv_compression_decode": value}, PROMPT).schedule(PROMPT)
        assert schedule is not None
        assert (schedule.decode_cuts is not None) == repeats


@pytest.mark.parametrize(
    ("prompt", "budget", "kept"),
    [(192, 256, True), (193, 256, False), (900, 256, False), (900, 192, True), (900, 193, False)],
)
def test_decode_cuts_keep_a_prompt_that_leaves_room(prompt: int, budget: int, kept: bool) -> None:
    """Itself or what its own cut leaves of it, in whole blocks."""
    on: Any = {"decode_budget": 256, "budget": budget}
    asked = {"kv_compression_decode_keep_prompt": 0}
    assert resolver(**on).resolve(None, prompt).keeps_prompt(prompt) == kept
    assert not resolver(**on, decode_keep_prompt=False).resolve(None, prompt).keeps_prompt(prompt)
    assert not resolver(ALL, **on).resolve(asked, prompt).keeps_prompt(prompt)
    asked = {"kv_compression_decode_keep_prompt": 1}
    server = resolver(ALL, **on, decode_keep_prompt=False)
    assert server.resolve(asked, prompt).keeps_prompt(prompt) == kept
    # Without decode cuts there is nothing to keep it from.
    assert not server.resolve({**asked, "kv_compression_decode": 0}, prompt).keeps_prompt(prompt)
    wide: Any = {"decode_budget": 256, "budget": budget, "window": 64}
    assert resolver(**wide).resolve(None, 128).keeps_prompt(128)
    assert not resolver(**wide).resolve(None, 129).keeps_prompt(129)


def test_a_policy_covers_what_becomes_of_the_prompt() -> None:
    key = "kv_compression_decode_keep_prompt"
    server = resolver(decode_budget=256)
    assert server.resolve({key: True}, PROMPT).keep_prompt
    assert f"{key} may not be set to false" in refusal(server, {key: False})
    server = resolver(decode_budget=256, decode_keep_prompt=False)
    assert f"{key} may not be set to true" in refusal(server, {key: True})
    assert f"{key} must be true or false" in refusal(resolver(ALL), {key: "no"})


def test_room_is_kept_for_what_has_left_the_window_by_the_first_decode_cut() -> None:
    asked: dict[str, Any] = {"kv_compression_keep": [0, 10, PROMPT - 8, PROMPT]}
    assert resolver(ALL).resolve(asked, PROMPT).pinned_count(PROMPT) == 10
    assert resolver(ALL, decode_budget=128).resolve(asked, PROMPT).pinned_count(PROMPT) == 18
    asked = {**asked, "kv_compression_decode": False}
    assert resolver(ALL, decode_budget=128).resolve(asked, PROMPT).pinned_count(PROMPT) == 10
    assert resolver(ALL).resolve(asked, 1000).pinned_ranges == ((0, 10), (992, 1000))


# --- rules ---------------------------------------------------------------------------------------


def test_unknown_settings_are_refused() -> None:
    assert "'kv_compression_bugdet' is not a setting" in refusal(
        resolver(ALL), {"kv_compression_bugdet": 1}
    )


@pytest.mark.parametrize("method", ["zip", "Cake", "", None, 3, ["cake"], "scatter"])
def test_methods_that_may_not_be_asked_for(method: Any) -> None:
    sentence = refusal(resolver(ALL), {"kv_compression": method})
    assert "snapkv" in sentence
    assert "none" in sentence


def test_methods_are_those_of_the_list_and_the_servers_own() -> None:
    server = resolver({"method": ["h2o", "scatter"]})
    assert "which allows cake, h2o, scatter" in refusal(server, {"kv_compression": "snapkv"})
    assert server.resolve({"kv_compression": "cake"}, PROMPT).planner is server.default_planner
    assert server.resolve({"kv_compression": "scatter"}, PROMPT).planner.keeps_all
    with pytest.raises(ValueError, match='allow: unknown method "zip", known are'):
        resolver({"method": ["zip"]})


@pytest.mark.parametrize(
    ("allow", "own", "budget", "sentence"),
    [
        (None, 256, 256, None),
        (None, 256, 257, "must be at most 256 tokens per layer here, got 257"),
        (None, 256, 0.25, None),
        (None, 256, 0.26, "must be at most 256 tokens per layer here, got 0.26"),
        (None, 0.25, 250, None),
        (None, 0.25, 251, "must be at most 0.25 of the prompt here, got 251"),
        (None, 0.25, 0.3, "must be at most 0.25 of the prompt here, got 0.3"),
        ({}, 256, 256, None),
        ({}, 256, 255, "may not be set by requests on this server, got 255"),
        ({"budget": {"max": 512}}, 256, 512, None),
        ({"budget": {"max": 512}}, 256, 513, "must be at most 512 tokens"),
        ({"budget": {"max": 0.5}}, 256, 500, None),
        ({"budget": {"max": 0.5}}, 256, 501, "must be at most 0.5 of the prompt"),
        ({"budget": {"min": 128}}, 256, 127, "must be at least 128 on this server, got 127"),
        ({"budget": {"min": 0.2}}, 256, 199, "must be at least 0.2 on this server, got 199"),
        ({"budget": {"min": 0.2}}, 256, 5000, None),
        (None, 256, 63, "63 is too small: cake needs at least 64"),
    ],
)
def test_budgets(allow: Any, own: float, budget: float, sentence: str | None) -> None:
    server, asked = resolver(allow, budget=own), {"kv_compression_budget": budget}
    if sentence is None:
        assert server.resolve(asked, PROMPT).planner.config.budget == budget
    else:
        assert sentence in refusal(server, asked)


@pytest.mark.parametrize("budget", [0, -1, 1.0, 1.5, 0.0, float("nan"), True, "256", None, [256]])
def test_what_is_no_budget(budget: Any) -> None:
    assert "must be a whole number of tokens per layer" in refusal(
        resolver(ALL), {"kv_compression_budget": budget}
    )


def test_a_budget_of_nothing() -> None:
    asked = {"kv_compression": "none", "kv_compression_budget": 128}
    assert "needs a kv_compression that compresses" in refusal(resolver(ALL), asked)


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("{", "must be a JSON object of parameters of the method, got '{'"),
        ("[]", "must be a JSON object"),
        (7, "must be a JSON object"),
        ({1: 2}, "must be a JSON object"),
        ("[" * 100_000, "must be a JSON object"),
        ('{"gamma": "\ud800", "gamma": 1}', "must be a JSON object"),
        ('{"gamma": ' + "1" * 5000 + "}", "must be a JSON object"),
        ('{"gamma": 1' + "0" * 400 + "}", "'gamma' must be 0 or 1e-06 to 2147483647 in size"),
        ('{"gamma": Infinity}', "'gamma' must be 0 or 1e-06"),
        ('{"gamma": ' + "[" * 900 + "]" * 900 + "}", "'gamma' must not be nested"),
        ({"gama": 1}, 'cake: unknown parameter "gama"'),
        ({"gamma": "x"}, "cake: gamma must be a number of at least 0, got 'x'"),
        ({"window": 129}, "window must be at most 128 on this server, got 129"),
        ({"scorer": {"method": "h2o", "window": 8}}, "scorer must not have a window"),
    ],
)
def test_parameters(value: Any, sentence: str) -> None:
    assert sentence in refusal(resolver(ALL), {"kv_compression_config": value})


def test_long_values_are_cut_short_in_messages() -> None:
    for asked in {"kv_compression": "x" * 9999}, {"kv_compression_keep": ["x" * 9999]}:
        assert len(refusal(resolver(ALL), asked)) < 400


def test_a_method_that_evicts_token_by_token_needs_a_server_that_does() -> None:
    server = resolver(ALL, decode_budget=256)
    asked = {"kv_compression_config": {"faithful": True}}
    assert refusal(server, asked)
    assert resolver(ALL).resolve(asked, PROMPT).planner.token_by_token


@pytest.mark.parametrize(
    ("keep", "allowed", "sentence"),
    [
        ([0, 5], False, "may not be set by requests on this server"),
        ([0, 5], 4, "must name at most 4 tokens on this server, got 5"),
        ([0, 5, 2, 7], 7, None),
        ([0, 5], 0, "must name at most 0 tokens"),
        ([0, 224], True, None),
        ([0, 225], True, "names 225 tokens beside the last 32, which always stay, but a budget of"),
        ([0, 225], True, "a budget of 256 tokens per layer has room for 224"),
        ([0, 224, 968, 1000], True, None),  # the window stays anyway
        ([0, 1001], True, "has the range 0 to 1001"),
        ([], True, None),
    ],
)  # fmt: skip
def test_kept_ranges(keep: Any, allowed: Any, sentence: str | None) -> None:
    server, asked = resolver({"keep": allowed}), {"kv_compression_keep": keep}
    if sentence is None:
        assert server.resolve(asked, PROMPT).pinned_count(PROMPT) <= 224
    else:
        assert sentence in refusal(server, asked)


def test_kept_ranges_must_fit_every_cut() -> None:
    server = resolver(ALL, decode_budget=128)
    asked = {"kv_compression_keep": [0, 97]}
    assert "a budget of 128 tokens per layer has room for 96" in refusal(server, asked)
    assert server.resolve({**asked, "kv_compression_decode": 0}, PROMPT)
    # What is never cut has room for everything.
    assert server.resolve({"kv_compression_keep": [0, 9], "kv_compression": "none"}, 9)


@pytest.mark.parametrize("value", [2, -1, "true", None, 1.0, [1]])
def test_decode_is_true_or_false(value: Any) -> None:
    assert "kv_compression_decode must be true or false" in refusal(
        resolver(ALL), {"kv_compression_decode": value}
    )
    assert "may not be set to false" in refusal(resolver(), {"kv_compression_decode": 0})
    assert resolver().resolve({"kv_compression_decode": 1}, PROMPT).decode


def test_windows_and_queries_that_any_request_can_have() -> None:
    assert resolver({}).largest_window == 32
    assert resolver(ALL).largest_window == resolver(ALL).largest_decode_window == 128
    assert resolver({"params": {"window": {"max": 48}}}).largest_window == 48
    assert resolver({"params": {"window": {"max": 8}}}).largest_window == 32


# --- rows of the runner's block table ------------------------------------------------------------


def appended(schedule: CompressionSchedule | None, longest: int) -> int:
    """Blocks that are ever appended to a request's row on its way to a length."""
    if schedule is None:
        return -(-longest // BLOCK)
    number = schedule.count(longest)
    homes = sum(schedule.survivor_blocks(n) for n in range(1, number + 1) if schedule.cut(n).moves)
    return homes + sum(schedule.tail_blocks(n, longest) for n in range(number + 1))


budgets = st.integers(40, 1500) | st.floats(0.001, 0.99)
bounds = st.fixed_dictionaries({}, optional={"min": st.integers(1, 99), "max": budgets})
allows = st.fixed_dictionaries(
    {},
    optional={
        "method": st.booleans() | st.just(["h2o", "scatter", "tova"]),
        "budget": st.booleans() | bounds.filter(bool),
        "params": st.just(True) | st.just({"window": {"max": 64}}) | st.just({"window": [8, 90]}),
        "decode": st.just(True),
    },
)
servers = st.fixed_dictionaries(
    {
        "method": st.sampled_from(["cake", "none", "tova", "snapkv"]),
        "budget": budgets,
        "allow": st.none() | allows,
    },
    optional={
        "decode_budget": st.integers(64, 500),
        "decode_buffer": st.sampled_from([32, 100, 128]),
        "prefill": st.sampled_from(["auto", "streaming"]),
        "stream_chunk": st.sampled_from([64, 500]),
    },
)
requests = st.fixed_dictionaries(
    {},
    optional={
        "kv_compression": st.sampled_from(["cake", "h2o", "tova", "scatter", "none", "dynamickv"]),
        "kv_compression_budget": budgets,
        "kv_compression_config": st.builds(dict, window=st.integers(1, 128)).map(json.dumps),
        "kv_compression_decode": st.booleans(),
    },
)


@settings(max_examples=1500)
@example(  # a window that is more than the share of the prompt
    {"method": "cake", "budget": 0.01, "allow": {"params": True}},
    {"kv_compression_config": '{"window": 128}'},
    3000,
    3000,
)
@given(servers, requests, st.integers(1, 3000), st.sampled_from([700, 3000]))
def test_a_row_has_room_for_whatever_is_allowed(
    config: dict[str, Any], asked: dict[str, Any], prompt: int, longest: int
) -> None:
    assume(prompt <= longest)
    try:
        server = SettingsResolver(
            KVCompressionConfig.parse(config),
            BLOCK,
            EngineLimits(num_layers=4, one_step_tokens=512),
        )
        settings = server.resolve(asked, prompt)
    except ValueError:
        return
    assert settings.planner.window <= server.largest_window
    assert appended(settings.schedule(prompt), longest) <= server.row_blocks(longest)
