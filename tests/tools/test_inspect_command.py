"""``kvcompress inspect`` up to the engine: arguments, prompts and refusals."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.harness import MODELS, SMALL
from tests.support import commands
from tests.support.commands import parsed, refusal
from tests.support.inspections import inspection
from vllm_kvcompress.planning.layer_groups import LayerGroups
from vllm_kvcompress.tools.arguments import CommandError
from vllm_kvcompress.tools.inspection.arrays_file import save_arrays
from vllm_kvcompress.tools.inspection.command import make_job
from vllm_kvcompress.tools.inspection.html_chart import chart
from vllm_kvcompress.tools.inspection.html_page import page_data
from vllm_kvcompress.tools.inspection.run import cache_bytes, check_length, read_prompt


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Arguments that are right, with a model that has no weights."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "text").write_text("word " * 400)
    given = {"--model": tmp_path, "--input": tmp_path / "text", "--output": tmp_path / "out"}
    return ["inspect", *(str(word) for pair in given.items() for word in pair)]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["--model", "/nowhere"], "--model must be a folder with a config.json, got /nowhere"),
        (["--input", "/nowhere"], "--input: cannot read /nowhere: No such file or directory"),
        (["--output", "/nowhere/out"], "--output must be a name in a folder that exists"),
        (["--method", "lru"], 'unknown method "lru", known are '),
        (["--method", "scatter"], "scatter keeps every token, there is nothing to draw"),
        (["--method", "none"], "none keeps every token, there is nothing to draw"),
        (["--compare", "cake,cake"], "--compare must name each method once, got cake,cake"),
        (["--compare", "cake,", "--budget", "64"], 'unknown method ""'),
        (["--method", "cake", "--compare", "cake"], "not allowed with argument --method"),
        (["--budget", "much"], "got 'much'"),
        (["--budget", "0"], "got 0"),
        (["--config", '{"tau": 1}'], 'cake: unknown parameter "tau"'),
        (["--config", "[]"], "argument --config: must be a JSON object, got '[]'"),
        (["--config", "{"], "argument --config: must be a JSON object, got '{'"),
        (
            ["--compare", "cake,snapkv", "--config", '{"gamma": 1}'],
            '(cake, snapkv), got {"gamma": 1}',
        ),
        (["--block-size", "0"], "argument --block-size: must be a whole number of at least 1"),
        (["--budget", "32"], "32"),
    ],
)
def test_user_errors_are_one_sentence(
    words: list[str], capsys: pytest.CaptureFixture[str], change: list[str], sentence: str
) -> None:
    assert sentence in refusal(capsys, [*words, *change])


@pytest.mark.parametrize(
    ("content", "sentence"), [(b"\xff", "must be UTF-8"), (b" \n", "has no text")]
)
def test_unusable_texts_are_refused(
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes,
    sentence: str,
) -> None:
    (tmp_path / "text").write_bytes(content)
    assert sentence in refusal(capsys, words)


def test_settings_reach_the_methods(words: list[str]) -> None:
    job = make_job(parsed(words, "--compare", "cake, snapkv", "--config", '{"cake": {"gamma": 5}}'))
    assert [c.method for c in job.configs] == ["cake", "snapkv"]
    assert [dict(c.params) for c in job.configs] == [{"gamma": 5}, {}]
    assert [c.budget for c in job.configs] == [0.25, 0.25]
    single = make_job(parsed(words, "--config", '{"gamma": 5}', "--budget", "128"))
    assert [(c.method, dict(c.params), c.budget) for c in single.configs] == [
        ("cake", {"gamma": 5}, 128)
    ]


SERVED = replace(commands.SERVED, max_model_len=512, default_model_len=512)


@pytest.mark.parametrize(
    ("more", "tokens", "sentence"),
    [
        ([], 100, "a prompt of 100 tokens fits --budget 128"),
        ([], 512, "a prompt of 512 tokens is too long for the model's 512"),
        (
            ["--max-model-len", "300"],
            300,
            "--max-model-len must be at least 301 for a prompt of 300 tokens, got 300",
        ),
    ],
)
def test_prompts_that_are_kept_whole_or_too_long_are_refused(
    words: list[str], more: list[str], tokens: int, sentence: str
) -> None:
    with pytest.raises(CommandError, match=sentence):
        check_length(make_job(parsed(words, "--budget", "128", *more)), SERVED, tokens)


def test_engine_gets_what_the_prompt_needs(words: list[str]) -> None:
    job = make_job(parsed(words, "--budget", "128"))
    assert check_length(job, SERVED, 300) == 301
    longer = make_job(parsed(words, "--budget", "128", "--max-model-len", "400"))
    assert check_length(longer, SERVED, 300) == 400
    # Keys and values of 2 bytes: at least those of the prompt and of what it is compressed into.
    token = 2 * 2 * SERVED.layers * SERVED.kv_heads * SERVED.head_size
    assert (300 + 128) * token < cache_bytes(job, SERVED, 301) < 1000 * token


def test_a_hybrids_cache_has_room_for_its_windows(words: list[str]) -> None:
    job = make_job(parsed(words, "--budget", "128"))
    hybrid = replace(SERVED, layers=9, groups=LayerGroups(3, 1, 2, 64), compressed=(2, 5, 8))
    # Of both groups of windows what they would hold without any; a block is as large as before.
    page = 2 * 2 * job.block_size * SERVED.layers * SERVED.kv_heads * SERVED.head_size
    more = cache_bytes(job, hybrid, 301) - cache_bytes(job, SERVED, 301)
    assert more == 2 * (-(-301 // job.block_size) + 1) * page


def test_layers_have_the_models_numbers_where_only_some_are_compressed(tmp_path: Path) -> None:
    some = replace(inspection(layers=3), layers=(5, 11, 17))
    figure = chart(some)
    assert all(list(trace.y) == ["5", "11", "17"] for trace in figure.data)
    assert figure.layout.yaxis.title.text == "compressed layer"
    assert chart(inspection(layers=3)).layout.yaxis.title.text == "layer"
    assert page_data(some)["numbers"] == (5, 11, 17)
    assert page_data(inspection(layers=3))["numbers"] == (0, 1, 2)
    save_arrays(some, tmp_path / "raw.npz")
    meta = json.loads(str(np.load(tmp_path / "raw.npz")["meta"]))
    assert meta["layers"] == [5, 11, 17]


def test_prompt_of_a_chat_is_the_templates_text(words: list[str], tmp_path: Path) -> None:
    words = [*words, "--model", str(MODELS / SMALL), "--question", "How many? \N{GRINNING FACE}"]
    (tmp_path / "text").write_text("Three\tships <b>sailed</b>.\n\n")
    ids, pieces = read_prompt(make_job(parsed(words)))
    assert "".join(pieces) == "Three\tships <b>sailed</b>.\n\nHow many? \N{GRINNING FACE}"
    assert len(pieces) == len(ids)
    _, chat = read_prompt(make_job(parsed(words, "--chat")))
    assert chat[0] == "<|im_start|>"
    assert "".join(chat).endswith("assistant\n")
    assert "".join(pieces) in "".join(chat)
