"""Settings as users write them: what is accepted, and the sentence for what is not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vllm_kvcompress.methods import Cake, available
from vllm_kvcompress.planning.config import KVCompressionConfig, parse_budget


def config(method: str = "uniform", budget: Any = 64, **params: Any) -> KVCompressionConfig:
    return KVCompressionConfig.parse({"method": method, "budget": budget, **params})


def is_one_sentence(text: str) -> bool:
    """What a user sees must fit on a line and carry no stack of text with it."""
    return "\n" not in text and "Traceback" not in text and 20 < len(text) < 300


STREAMING = {"method": "cake", "budget": 100, "prefill": "streaming"}

# --- parse and as_dict ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        {"method": "cake", "budget": 1024},
        {"method": "cake", "budget": 0.25, "gamma": 3.5, "window": 16},
        {"method": "dynamickv", "budget": 512, "pooling": "max", "faithful": True},
        {"method": "random", "budget": 99, "seed": 7, "check_integrity": True},
        {"method": "scatter", "budget": 1, "log_requests": True, "check_integrity": True},
        {"method": "cake", "budget": 64, "prefill": "cascade", "window": 16},
        {"method": "cake", "budget": 64, "prefill": "streaming", "stream_chunk": 96},
        {"method": "cake", "budget": 64, "prefill": "streaming", "stream_budget": 64},
        {"method": "uniform", "budget": 0.5, "decode_budget": 80, "decode_buffer": 33},
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


def test_options_have_defaults_that_change_nothing_about_a_plain_prefill() -> None:
    parsed = KVCompressionConfig.parse({"method": "cake"})
    assert parsed.prefill == "auto"
    assert parsed.stream_chunk is parsed.stream_budget is parsed.decode_budget is None
    assert parsed.decode_buffer == 128
    # Written out, a default is one all the same.
    assert KVCompressionConfig.parse({"method": "cake", "prefill": "auto"}) == parsed


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
        # Of parameters every wrong value: tests/methods/test_methods.py.
        ({"method": "cake", "window": 1}, ["window", "1", "cake"]),
        ({"method": "dynamickv", "pooling": ["avg"]}, ["pooling", "['avg']"]),
        ({"method": "cake", "check_integrity": "yes"}, ["check_integrity", "'yes'"]),
        ({"method": "cake", "log_requests": 1}, ["log_requests", "1", "true or false"]),
        ({"method": "cake", "prefill": "fast"}, ["prefill", "'fast'", "auto", "full", "cascade"]),
        ({"method": "cake", "prefill": None}, ["prefill", "None", "streaming"]),
        ({"method": "cake", "prefill": ["full"]}, ["prefill", "['full']"]),
        ({**STREAMING, "stream_chunk": 0}, ["stream_chunk", "0", "at least 1"]),
        ({**STREAMING, "stream_chunk": 64.0}, ["stream_chunk", "64.0", "whole number"]),
        ({**STREAMING, "stream_chunk": True}, ["stream_chunk", "True", "whole number"]),
        ({**STREAMING, "stream_budget": "64"}, ["stream_budget", "'64'", "whole number"]),
        ({**STREAMING, "stream_budget": 99}, ["stream_budget", "99", "budget of 100"]),
        ({"method": "cake", "stream_chunk": 64}, ["stream_chunk", "prefill", "streaming"]),
        (
            {"method": "cake", "prefill": "full", "stream_budget": 2048},
            ["stream_budget", "prefill", "streaming"],
        ),
        ({**STREAMING, "budget": 0.5}, ["prefill streaming", "0.5", "tokens"]),
        ({**STREAMING, "method": "scatter"}, ["prefill streaming", "scatter", "evicts"]),
        ({"method": "cake", "decode_keep_prompt": False}, ["decode_keep_prompt", "decode_budget"]),
        ({"method": "cake", "decode_keep_prompt": 1}, ["decode_keep_prompt", "true or false", "1"]),
        ({"method": "cake", "decode_budget": 0}, ["decode_budget", "0", "at least 1"]),
        ({"method": "cake", "decode_budget": 0.5}, ["decode_budget", "0.5", "whole number"]),
        ({"method": "scatter", "decode_budget": 64}, ["decode_budget", "scatter", "evicts"]),
        ({"method": "cake", "decode_buffer": None}, ["decode_buffer", "None", "whole number"]),
        ({"method": "cake", "decode_buffer": 64}, ["decode_buffer", "needs a decode_budget"]),
        ({"method": "none", "decode_buffer": 64}, ["decode_buffer", "needs a decode_budget"]),
        ({"method": "cake", "decode_buffer": -1}, ["decode_buffer", "-1", "at least 1"]),
        ({"method": "cake", "reserve_tokens": -1}, ["reserve_tokens", "-1", "at least 0"]),
        ({"method": "cake", "reserve_tokens": True}, ["reserve_tokens", "True", "at least 0"]),
        (
            {"method": "cake", "decode_budget": 64, "decode_buffer": 31},
            ["decode_buffer", "31", "window of 32"],
        ),
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


# --- check_block_size ----------------------------------------------------------------------------


def test_a_budget_needs_room_beside_the_window() -> None:
    # cake's window is 32 by default, so 64 is the least with blocks of 32.
    config("cake", 64).check_block_size(32)
    with pytest.raises(ValueError, match="kv-compression-budget 63 is too small") as caught:
        config("cake", 63).check_block_size(32)
    text = str(caught.value)
    assert is_one_sentence(text)
    assert "at least 64 tokens" in text
    assert "--block-size" in text
    # A smaller window or block makes room; a share is raised as far as it must be, and a method
    # that keeps everything has no use for a budget.
    config("cake", 63, window=16).check_block_size(32)
    config("cake", 63).check_block_size(16)
    config("cake", 0.01).check_block_size(32)
    config("scatter", 1).check_block_size(32)


def test_a_budget_of_the_generation_needs_the_same_room() -> None:
    config("cake", 0.5, decode_budget=64).check_block_size(32)
    with pytest.raises(ValueError, match=r"^decode_budget 63 is too small: cake needs") as caught:
        config("cake", 0.5, decode_budget=63).check_block_size(32)
    assert is_one_sentence(str(caught.value))
