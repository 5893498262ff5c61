"""Every setting that there is, at its extremes: it changes something, or is refused by its name.

What there is to set is read from the code's own tables, so a new setting is walked without a word
here. Only what cannot show in a plan or in the tokens kept is named below, with the test that shows
it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from tests.support.layers import score_random
from vllm_kvcompress.eviction.selection import select_survivors
from vllm_kvcompress.methods import Method, available, get_method, get_spec, to_numbers
from vllm_kvcompress.planning.block_planner import BlockPlanner, EngineLimits, layers_between_cuts
from vllm_kvcompress.planning.config import KVCompressionConfig
from vllm_kvcompress.planning.request_settings import (
    BUDGET_KEY,
    DECODE_KEY,
    KEEP_KEY,
    KEEP_PROMPT_KEY,
    METHOD_KEY,
    PARAMS_KEY,
    REQUEST_KEYS,
    SettingsResolver,
)

LAYERS, BLOCK, BUDGET, FITS, SHORT, LONG = 6, 16, 128, 64, 300, 900
LIMITS = EngineLimits(num_layers=LAYERS, one_step_tokens=400)

INTEGERS = (0, 1, 2, 3, 33, 96, 2001, 4095, 2**31 - 1, 2**31, 2**63 + 1)
NUMBERS = (0.0, 5e-324, 1e-6, 0.001, 0.5, 0.999, 1.0, 3.0, 2.0**31 - 1, 1e38, 1.7e308)

BESIDE: Mapping[str, dict[str, Any]] = {
    "stream_chunk": {"prefill": "streaming"},
    "stream_budget": {"prefill": "streaming"},
    "decode_buffer": {"decode_budget": BUDGET},
    "decode_keep_prompt": {"decode_budget": BUDGET},
}
"""Options that say more about another one, with that one: without it they are refused."""

ELSEWHERE = {
    "reserve_tokens": "engine/test_admission.py",
    "check_integrity": "e2e/harness.py",
    "log_requests": "e2e/server.py",
}
"""Options that change neither a plan nor the tokens kept, and the file that shows their effect."""

CHOICES: Mapping[str, tuple[Any, ...]] = {
    "method": ("snapkv", "none", "zip"),
    "prefill": ("full", "streaming", "cascade", "fast"),
    "budget": (*INTEGERS, *NUMBERS),
    "allow": ({}, {"keep": True}, {"params": True}, {"method": ["zip"]}, {"parameters": True}),
}
"""Values of options whose default does not tell what they take."""

WITH: Mapping[tuple[str, str], dict[str, Any]] = {("streamingllm", "window"): {"sinks": 2001}}
"""What a parameter needs beside it to show: the most recent tokens stay without a window too."""

WITHIN_REACH = {("dynamickv", "r_max"): "no layer of six can hold ten averages"}
"""Parameters whose largest value lifts a bound that the default does not reach here."""

OWN = [
    name for name in available() if get_spec(name).scorer.__module__.startswith("vllm_kvcompress.")
]
"""Methods of this package; those of others are theirs to test."""


# --- what a setting can change -------------------------------------------------------------------


@cache
def _scores(text: str) -> Any:
    method = _methods[text]
    return to_numbers(score_random(method, LAYERS, tokens=SHORT))


_methods: dict[str, Method] = {}


def kept(method: Method, budget: int = BUDGET) -> Any:
    """Tokens that every layer keeps of a random prompt, and when layers are cut."""
    if method.scorer.keeps_all:
        return method.name
    _methods[repr(method)] = method
    found = select_survivors(
        method,
        _scores(repr(method)),
        capacity=-(-budget // BLOCK) * BLOCK,
        block_size=BLOCK,
        lengths=[SHORT] * LAYERS,
        lap=lambda phase: None,
    )
    tokens = [layer.tolist() for layer in found.tokens]
    assert all(len(set(head)) == len(head) for layer in tokens for head in layer)
    return found.pages.tolist(), tokens, layers_between_cuts(method, LAYERS)


def planned(planner: BlockPlanner) -> Any:
    """All that a request is told by a plan."""
    found: list[Any] = []
    for prompt in (SHORT, LONG):
        schedule = planner.schedule(prompt, True)
        cuts = schedule and (schedule.prefill_cuts, schedule.decode_cuts)
        found += [cuts, planner.peak_blocks(prompt, prompt + 500), planner.streams(prompt)]
    return found


def outcome(settings: Mapping[str, Any]) -> Any:
    config = KVCompressionConfig.parse(settings)
    planner = BlockPlanner(config, BLOCK, LIMITS)
    tokens = planner.budget_tokens(SHORT)
    survivors = kept(planner.method, tokens) if planner.prompt_cut(SHORT) else None
    request = SettingsResolver(config, BLOCK, LIMITS).resolve(None, FITS)
    plan = planned(planner), config.prefill == "cascade", request.keeps_prompt(FITS)
    return plan, survivors, config.policy


def tried(make: Callable[[], Any]) -> tuple[Any, str]:
    """What is made, or the sentence that refuses it."""
    try:
        return make(), ""
    except ValueError as error:
        return None, str(error)


def changed(plain: Mapping[str, Any], name: str, values: tuple[Any, ...]) -> list[bool]:
    """Whether each accepted value changes the outcome; what is refused must name the setting."""
    default, found = outcome(plain), []
    for value in values:
        made, refusal = tried(lambda value=value: outcome({**plain, name: value}))  # type: ignore[misc]
        if refusal:
            assert name in refusal, value
            assert "\n" not in refusal
        else:
            found.append(made != default)
    return found


def values_of(name: str, default: Any, words: tuple[Any, ...]) -> tuple[Any, ...]:
    """Values from one end to the other, without the default."""
    if words:
        found: tuple[Any, ...] = words
    elif isinstance(default, bool):
        found = (not default,)
    elif default is None:
        found = tuple(sorted((*INTEGERS, *NUMBERS)))
    else:
        found = NUMBERS if isinstance(default, float) else INTEGERS
    return tuple(value for value in found if value != default)


# --- options of a server -------------------------------------------------------------------------

OPTIONS = [option for option in fields(KVCompressionConfig) if option.name != "params"]


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_an_option_does_something_or_is_refused(option: Any) -> None:
    name = option.name
    plain = {"method": "cake", "budget": BUDGET, **BESIDE.get(name, {})}
    default = None if option.default is MISSING else option.default
    values = CHOICES.get(name) or values_of(name, default, ())
    if name in ELSEWHERE:
        assert changed(plain, name, values).count(True) == 0
        assert name in (Path(__file__).parents[1] / ELSEWHERE[name]).read_text(encoding="utf-8")
        return
    found = changed(plain, name, values)
    assert found
    assert all(found), f"{name} is accepted and changes nothing"
    if name in BESIDE:
        assert not changed({"method": "cake", "budget": BUDGET}, name, values)


# --- parameters of methods -----------------------------------------------------------------------


def words_of(method: str) -> dict[str, tuple[Any, ...]]:
    """Parameters that take a few words, or true and false, with all of these."""
    spec, found = get_spec(method), {}
    for part in (spec.scorer, spec.allocator):
        for name, kind in get_type_hints(part).items():
            if get_origin(kind) is Literal and name in spec.parameters:
                found[name] = get_args(kind)
    return found | {n: (False, True) for n, v in spec.parameters.items() if isinstance(v, bool)}


def contexts() -> Iterator[Any]:
    """Each method as it is, and with each word of each of its parameters."""
    for method in OWN:
        yield pytest.param(method, {}, id=method)
        for name, words in words_of(method).items():
            for word in values_of(name, get_spec(method).parameters[name], words):
                yield pytest.param(method, {name: word}, id=f"{method}-{name}-{word}")


@pytest.mark.parametrize(("method", "beside"), list(contexts()))
def test_a_parameter_does_something_or_is_refused(method: str, beside: dict[str, Any]) -> None:
    """Alone, and beside each choice that could make it idle (``background`` by ``mass``)."""
    plain = {"method": method, "budget": BUDGET, **beside}
    for name, default in get_spec(method).parameters.items():
        if name in beside:
            continue
        values = values_of(name, default, words_of(method).get(name, ()))
        more = {} if beside else WITH.get((method, name), {})
        found = changed(plain | more, name, values)
        if not found:  # each value is refused, by the parameter's name
            continue
        if default != 0:  # else the least is the default
            assert found[0], f"{name}: its least value changes nothing"
        if (method, name) not in WITHIN_REACH:
            assert found[-1], f"{name}: its greatest value changes nothing"


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "dynamickv", "compare": "mass", "background": 0.3},
        {"method": "dynamickv", "faithful": True, "compare": "mass"},
        {"method": "dynamickv", "faithful": True, "background": 0.3},
        {"method": "snapkv", "allocator": {"method": "dynamickv", "compare": "mass",
                                           "background": 0.3}},
        {"method": "streamingllm", "variant": "first", "sinks": 8},
        {"method": "none", "window": 64},
        {"method": "scatter", "window": 64},
    ],
)  # fmt: skip
def test_an_idle_parameter_is_refused_with_the_reason(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^\w+: \w+ has no effect, as .*, got"):
        KVCompressionConfig.parse({"budget": BUDGET, **settings})


@pytest.mark.parametrize("faithful", [False, True])
def test_a_floor_above_the_budget_is_an_even_split(faithful: bool) -> None:
    """Each layer is given ``min_tokens`` first, as far as the budget has them."""
    even = [BUDGET // BLOCK] * LAYERS
    for tokens in (BUDGET - 32, BUDGET - 31, BUDGET, 10**6):
        method = get_method("dynamickv", {"min_tokens": tokens, "faithful": faithful})
        assert kept(method)[0] == even
    assert kept(get_method("dynamickv", {"faithful": faithful}))[0] != even


# --- settings of a request -----------------------------------------------------------------------

ALL = {"method": available(), "budget": {"min": 1}, "params": True, "keep": True, "decode": True}


def resolver(**server: Any) -> SettingsResolver:
    settings = {"method": "cake", "budget": BUDGET, "decode_budget": BUDGET, "allow": ALL}
    return SettingsResolver(KVCompressionConfig.parse({**settings, **server}), BLOCK, LIMITS)


def asked(server: SettingsResolver, **extra_args: Any) -> Any:
    """What a request is told: its plan, its method, its pins."""
    found = server.resolve(extra_args, SHORT)
    schedule = found.schedule(SHORT)
    cuts = schedule and (schedule.prefill_cuts, schedule.decode_cuts)
    return cuts, found.planner.method, found.pinned_ranges, found.keeps_prompt(FITS)


@pytest.mark.parametrize("key", REQUEST_KEYS)
def test_a_setting_of_a_request_does_something_or_is_refused(key: str) -> None:
    server, values = (
        resolver(),
        {
            METHOD_KEY: ("snapkv", "none", "zip", 3),
            BUDGET_KEY: (*INTEGERS, *NUMBERS),
            PARAMS_KEY: ('{"gamma": 3}', '{"gama": 3}', "[]", {"kernel": 2**31}),
            KEEP_KEY: ([0, 4], [0, SHORT + 1], [0, SHORT], "all"),
            DECODE_KEY: (0, False, 2, "no"),
            KEEP_PROMPT_KEY: (0, False, 2, "no"),
        }[key],
    )
    default, accepted = asked(server), 0
    for value in values:
        if value == BUDGET:
            continue
        made, refusal = tried(lambda value=value: asked(server, **{key: value}))  # type: ignore[misc]
        if refusal:
            params = json.loads(value) if key == PARAMS_KEY and isinstance(value, str) else ()
            assert any(name in refusal for name in (key, *params)), value
        else:
            assert made != default, value
            accepted += 1
    assert accepted


@pytest.mark.parametrize("method", OWN)
def test_a_parameter_of_a_request_is_the_servers(method: str) -> None:
    """What a server does with a value a request gets too, or is refused by name."""
    server = resolver()
    for name, default in get_spec(method).parameters.items():
        for value in values_of(name, default, words_of(method).get(name, ())):
            given = {METHOD_KEY: method, PARAMS_KEY: json.dumps({name: value})}
            made, refusal = tried(lambda given=given: asked(server, **given))  # type: ignore[misc]
            if refusal:
                assert name in refusal or PARAMS_KEY in refusal, value
            else:
                assert made[1] == get_method(method, {name: value})


def test_a_request_drops_what_its_own_choice_makes_idle() -> None:
    server = resolver(method="dynamickv", background=0.3, min_tokens=16)
    mass = server.resolve({PARAMS_KEY: {"compare": "mass"}}, SHORT).planner.method
    assert mass == get_method("dynamickv", {"compare": "mass", "min_tokens": 16})
    faithful = server.resolve({PARAMS_KEY: {"kernel": 3}}, SHORT).planner.method
    assert faithful == get_method("dynamickv", {"background": 0.3, "min_tokens": 16, "kernel": 3})
    with pytest.raises(ValueError, match='background has no effect, as compare is "mass"'):
        server.resolve({PARAMS_KEY: {"compare": "mass", "background": 0.2}}, SHORT)


@pytest.mark.parametrize("key", ["kv-compression", "kvcompression", "KV_Compression_Budget"])
def test_a_near_miss_of_a_requests_key_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=f"'{key}' is not a setting of a request; there are kv_"):
        resolver().resolve({key: "snapkv"}, SHORT)


def test_a_budget_of_what_keeps_everything_is_refused() -> None:
    with pytest.raises(ValueError, match=r"needs a kv_compression that compresses, .* scatter"):
        resolver().resolve({METHOD_KEY: "scatter", BUDGET_KEY: 64}, SHORT)
