"""The real `vllm serve` on a real port, asked through the OpenAI client."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from openai import BadRequestError

from tests.e2e.harness import LAYERS, small_model
from tests.e2e.server import Server
from vllm_kvcompress.tools.serving import VLLM

pytestmark = pytest.mark.engine

BUDGET = 256


def test_start_says_what_is_on(strict: Server) -> None:
    (line,) = [s for s in strict.log.read_text().splitlines() if "compression is on" in s]
    assert "cake" in line
    assert "2048 tokens holds 8 blocks of 32 after its prefill instead of 64" in line


def test_completion_is_compressed_and_blocks_come_back(strict: Server, text: str) -> None:
    before, pools = (len(strict.lines(prefix)) for prefix in ("KVCOMPRESS", "KVCOMPRESS_POOL"))
    answer = strict.client.completions.create(
        model="small", prompt=text, max_tokens=40, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 40
    facts = strict.wait_for("KVCOMPRESS", before + 1)[-1]
    assert facts["prompt_tokens"] == answer.usage.prompt_tokens
    assert facts["blocks_after"] == BUDGET // 32
    assert sum(facts["tokens_per_layer"]) == BUDGET * LAYERS
    assert len(set(facts["tokens_per_layer"])) > 1
    pool = strict.wait_for("KVCOMPRESS_POOL", pools + 1)[-1]
    assert pool["released"] == facts["blocks_before"]
    # The block for the first new tokens is taken in the same breath, after the release.
    assert pool["held"] == facts["blocks_after"]


def test_chat_and_streaming_agree(strict: Server, text: str) -> None:
    messages: Any = [{"role": "user", "content": f"{text}\n\nWho is this about?"}]
    whole = strict.client.chat.completions.create(
        model="small", messages=messages, max_tokens=24, temperature=0
    )
    stream = strict.client.chat.completions.create(
        model="small", messages=messages, max_tokens=24, temperature=0, stream=True
    )
    pieces = [c.choices[0].delta.content or "" for c in stream if c.choices]
    assert whole.choices[0].message.content == "".join(pieces)
    assert len(pieces) > 3


def test_several_choices(strict: Server, text: str) -> None:
    answer = strict.client.completions.create(
        model="small", prompt=text, n=3, max_tokens=16, temperature=1.0, seed=1
    )
    assert len(answer.choices) == 3
    assert len({c.text for c in answer.choices}) > 1


def test_logprobs(strict: Server, text: str) -> None:
    answer = strict.client.completions.create(
        model="small", prompt=text, max_tokens=6, temperature=0, logprobs=3,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert len(logprobs.token_logprobs) == 6
    assert all(p is not None and p <= 0 for p in logprobs.token_logprobs)


def test_stop_string(strict: Server, text: str) -> None:
    free = strict.client.completions.create(
        model="small", prompt=text, max_tokens=40, temperature=0
    )
    words = free.choices[0].text.split()
    stop = words[3]
    answer = strict.client.completions.create(
        model="small", prompt=text, max_tokens=40, temperature=0, stop=[stop]
    )
    assert answer.choices[0].finish_reason == "stop"
    assert stop not in answer.choices[0].text
    assert free.choices[0].text.startswith(answer.choices[0].text)


def test_second_question_hits_the_prefix_cache(strict: Server, text: str) -> None:
    usage = []
    for question in ("What is the name of the house?", "Which year is mentioned first here?"):
        answer = strict.client.completions.create(
            model="small", prompt=f"{text}\n\nQuestion: {question} Think about the text above, "
            "then answer in one short sentence. Do not say anything else at all.\nAnswer:",
            max_tokens=4, temperature=0,
        )  # fmt: skip
        assert answer.usage is not None
        details = answer.usage.prompt_tokens_details
        usage.append(details.cached_tokens if details else 0)
    assert usage[1] is not None
    assert usage[1] >= 896 - 32


def test_metrics_tell_what_was_freed(strict: Server, text: str) -> None:
    """Blocks of one request: freed ones are its prompt's, none stay held."""
    before = strict.metrics()
    answer = strict.client.completions.create(
        model="small", prompt="Once. " + text, max_tokens=8, temperature=0
    )
    # The figures of the step that frees the last block come with the next step's.
    strict.client.completions.create(model="small", prompt="Hello", max_tokens=2)
    after = strict.metrics()
    assert answer.usage is not None
    prompt_blocks = -(-answer.usage.prompt_tokens // 32)
    assert after["blocks_freed_total"] - before["blocks_freed_total"] == prompt_blocks
    path = 'prefills_total{path="full"}'
    assert after[path] - before[path] == 1
    assert after['cuts_total{kind="prompt"}'] - before['cuts_total{kind="prompt"}'] == 1
    assert after["blocks_held"] <= after["blocks_reserved"] <= 1
    total = strict.lines("KVCOMPRESS_POOL")[0]["total"]
    assert after["blocks_free"] + after["blocks_held"] == total


def test_a_wrong_setting_of_a_request_is_a_400(strict: Server) -> None:
    with pytest.raises(BadRequestError, match="kv_compression_decode must be true or false"):
        strict.client.completions.create(
            model="small", prompt="Hello", max_tokens=2,
            extra_body={"vllm_xargs": {"kv_compression_decode": "never"}},
        )  # fmt: skip
    assert strict.client.completions.create(model="small", prompt="Hello", max_tokens=2).choices


def test_vllm_bench_serve(strict: Server, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            str(VLLM), "bench", "serve", "--backend", "openai", "--model", "small",
            "--tokenizer", str(small_model()), "--base-url", strict.url,
            "--dataset-name", "random", "--random-input-len", "300",
            "--random-output-len", "12", "--num-prompts", "8", "--ignore-eos",
            "--save-result", "--result-dir", str(tmp_path), "--result-filename", "bench.json",
        ],
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads((tmp_path / "bench.json").read_text())
    assert result["completed"] == 8
    assert result["total_output_tokens"] == 8 * 12
