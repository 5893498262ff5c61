"""Settings of single requests over HTTP, and that docs/requests.md says how it is."""

import ast
import json
import re
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from openai import BadRequestError

from tests.e2e.harness import LAYERS, REPO, Engines, small_model
from tests.e2e.server import NAME, Server

pytestmark = pytest.mark.engine

BLOCK, BUDGET, ANSWER = 32, 256, 48
DOCS = (REPO / "docs" / "requests.md").read_text(encoding="utf-8")
ASKED: list[dict[str, Any]] = [
    {},
    {"kv_compression": "none"},
    {"kv_compression_budget": 96},
    {"kv_compression": "dynamickv", "kv_compression_budget": 0.4},
    {"kv_compression": "snapkv", "kv_compression_config": {"window": 8, "kernel": 7}},
    {"kv_compression": "pyramidkv"},
    {"kv_compression": "streamingllm", "kv_compression_budget": 160},
    {"kv_compression": "h2o"},
    {"kv_compression": "tova", "kv_compression_budget": 64},
    {"kv_compression": "keydiff"},
    {"kv_compression": "knorm"},
    {"kv_compression": "random", "kv_compression_config": {"seed": 3}},
    {"kv_compression": "uniform"},
    {"kv_compression_config": {"scorer": "h2o", "allocator": {"method": "cake", "tau1": 2.0}}},
]
Answer = tuple[list[int], list[float]]


def xargs(asked: dict[str, Any]) -> dict[str, Any]:
    """Settings as they go over HTTP: parameters in a string."""
    params = asked.get("kv_compression_config")
    return {**asked, **({"kv_compression_config": json.dumps(params)} if params else {})}


def complete(server: Server, prompt: list[int], asked: dict[str, Any]) -> Answer:
    """Greedy tokens and their log-probabilities."""
    answer = server.client.completions.create(
        model=NAME, prompt=prompt, max_tokens=ANSWER, temperature=0, logprobs=1,
        extra_body={"ignore_eos": True, "return_token_ids": True, "vllm_xargs": xargs(asked)},
    )  # fmt: skip
    (choice,) = answer.choices
    return token_ids(choice), token_logprobs(choice)


def token_ids(choice: Any) -> list[int]:
    """What vLLM adds to OpenAI's answer when it is asked for."""
    return choice.model_extra.get("token_ids") or []


def token_logprobs(choice: Any) -> list[float]:
    return [float(p or 0) for p in choice.logprobs.token_logprobs]


def stream(
    server: Server, prompt: list[int], asked: dict[str, Any]
) -> tuple[Answer, tuple[float, float]]:
    """As :func:`complete`, and when the first and the last token came."""
    pieces = server.client.completions.create(
        model=NAME, prompt=prompt, max_tokens=ANSWER, temperature=0, logprobs=1, stream=True,
        extra_body={"ignore_eos": True, "return_token_ids": True, "vllm_xargs": xargs(asked)},
    )  # fmt: skip
    tokens: list[int] = []
    logprobs: list[float] = []
    times: list[float] = []
    with pieces:
        for piece in pieces:
            (choice,) = piece.choices
            tokens += token_ids(choice)
            if choice.logprobs is not None:
                logprobs += token_logprobs(choice)
                times.append(time.monotonic())
    return (tokens, logprobs), (times[0], times[-1])


def offline(engines: Engines, prompt: list[int], asked: dict[str, Any]) -> Answer:
    """The answer without a server; test_per_request compares settings of requests and engines."""
    engine = engines.get() if asked.get("kv_compression") == "none" else engines.open()
    extra = {"extra_args": asked} if engine.compressed and asked else {}
    (answer,) = engine.complete([prompt], ANSWER, logprobs=1, **extra)
    steps = zip(answer.token_ids, answer.logprobs, strict=True)
    return list(answer.token_ids), [step[token].logprob for token, step in steps]


def same(one: Answer, other: Answer) -> bool:
    return one[0] == other[0] and one[1] == pytest.approx(other[1], abs=1e-3)


# --- a mixed batch -------------------------------------------------------------------------------


def test_a_mixed_batch_is_exact(server: Server, engines: Engines, prose: list[int]) -> None:
    """Every request as alone and offline."""
    prompts = [prose[97 * i : 97 * i + 330 + 23 * i] for i in range(len(ASKED))]
    before = len(server.lines("KVCOMPRESS"))
    with ThreadPoolExecutor(len(ASKED)) as pool:
        found = list(pool.map(stream, [server] * len(ASKED), prompts, ASKED))
    # One batch: the last to begin did so before the first had ended.
    assert max(first for _, (first, _) in found) < min(last for _, (_, last) in found)
    facts = server.wait_for("KVCOMPRESS", before + len(ASKED) - 1)[before:]
    assert len(facts) == len(ASKED) - 1
    assert len({line["method"] for line in facts}) == len(ASKED) - 2
    assert len({line["blocks_after"] for line in facts}) > 3
    for prompt, asked, (answer, _) in zip(prompts, ASKED, found, strict=True):
        assert same(answer, offline(engines, prompt, asked)), asked


def test_the_same_over_every_way_in(server: Server, prose: list[int]) -> None:
    """Chat and completions, streamed and whole: settings reach the engine in the same way."""
    prompt = prose[200:800]
    asked = {"kv_compression": "streamingllm", "kv_compression_budget": 96}
    whole = complete(server, prompt, asked)
    assert same(stream(server, prompt, asked)[0], whole)
    assert not same(complete(server, prompt, {}), whole)
    messages: Any = [{"role": "user", "content": "Who was it? " * 100}]
    texts = {}
    for name, extra in {"asked": asked, "else": {}}.items():
        chat = server.client.chat.completions.create(
            model=NAME, messages=messages, max_tokens=12, temperature=0,
            extra_body={"vllm_xargs": extra},
        )  # fmt: skip
        pieces = server.client.chat.completions.create(
            model=NAME, messages=messages, max_tokens=12, temperature=0, stream=True,
            extra_body={"vllm_xargs": extra},
        )  # fmt: skip
        texts[name] = chat.choices[0].message.content
        assert texts[name] == "".join(p.choices[0].delta.content or "" for p in pieces)
    last = [line["blocks_after"] for line in server.wait_for("KVCOMPRESS", 4)[-4:]]
    assert last == [96 // BLOCK] * 2 + [BUDGET // BLOCK] * 2


# --- tokens that must stay -----------------------------------------------------------------------


def kept_example() -> dict[str, Any]:
    """What the functions of the document's example are, without its requests."""
    (example,) = [code for code in blocks("python") if "/tokenize" in code]
    functions: list[ast.stmt] = [
        part for part in ast.parse(example).body if isinstance(part, ast.FunctionDef)
    ]
    space: dict[str, Any] = {}
    exec(compile(ast.Module(functions, type_ignores=[]), "docs/requests.md", "exec"), space)
    return space


def test_a_system_prompt_survives(server: Server, engines: Engines, prose: list[int]) -> None:
    """The range as the document finds it; kept in all layers, as the engine offline keeps it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small_model())
    system: Any = {"role": "system", "content": tokenizer.decode(prose[:150])}
    question: Any = {"role": "user", "content": tokenizer.decode(prose[300:800])}
    prompt = server.tokenize(messages=[system, question])
    other = server.tokenize(messages=[system, {"role": "user", "content": "Something else."}])
    end = kept_example()["alike"](prompt, other)
    assert 150 <= end < 175
    assert system["content"] in tokenizer.decode(prompt[:end])
    asked = {"kv_compression": "cake", "kv_compression_keep": [0, end]}

    before = len(server.lines("KVCOMPRESS"))
    chat = server.client.chat.completions.create(
        model=NAME, messages=[system, question], max_tokens=ANSWER, temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True, "vllm_xargs": asked},
    )  # fmt: skip
    (facts,) = server.wait_for("KVCOMPRESS", before + 1)[before:]
    assert facts["prompt_tokens"] == len(prompt)
    assert min(facts["tokens_per_layer"]) >= end + 32
    assert sum(facts["tokens_per_layer"]) == BUDGET * LAYERS

    kept = engines.open().record_kept()
    tokens, _ = offline(engines, prompt, asked)
    assert token_ids(chat.choices[0]) == tokens
    (layers,) = kept
    assert all(set(range(end)) <= set(head) for layer in layers for head in layer)


def test_more_than_the_budget_cannot_be_kept(server: Server, prose: list[int]) -> None:
    with pytest.raises(BadRequestError, match=r"names 225 tokens .* 32, .* 256 .* room for 224"):
        complete(server, prose[:400], {"kv_compression_keep": [0, 225]})
    assert complete(server, prose[:400], {"kv_compression_keep": [0, 224]})


# --- the default policy --------------------------------------------------------------------------


def test_default_policy_lets_requests_take_less(
    strict: Server, engines: Engines, prose: list[int]
) -> None:
    for asked in ASKED[1], {"kv_compression": "h2o", "kv_compression_budget": 128}:
        prompt = prose[50:650]
        assert same(complete(strict, prompt, asked), offline(engines, prompt, asked))


def error_table() -> list[tuple[dict[str, Any], str]]:
    """Settings and messages of the document."""
    rows = re.findall(r"^\| `(\{.*\})` \| `(.*)` \|$", DOCS, flags=re.MULTILINE)
    return [(json.loads(asked), message) for asked, message in rows]


def test_the_errors_are_the_documents(strict: Server) -> None:
    table = error_table()
    keys = [key for asked, _ in table for key in asked]
    assert {"kv_compression_budget", "kv_compression_keep", "kv_compression_decode"} <= set(keys)
    assert len(table) >= 9
    plain = {"model": NAME, "max_tokens": 2}
    chat = {**plain, "messages": [{"role": "user", "content": "Hello"}]}
    for asked, message in table:
        for path, body in (
            ("/v1/completions", {**plain, "prompt": "Hello"}),
            ("/v1/chat/completions", chat),
        ):
            status, answer = strict.post(path, {**body, "vllm_xargs": asked})
            assert (status, answer["error"]["message"]) == (400, message)


def test_an_error_ends_a_stream(strict: Server) -> None:
    """Wherever vLLM notices it, the client sees an error and never a token."""
    from openai import APIError

    with pytest.raises(APIError, match="at most 256 tokens per layer here, got 512") as caught:
        list(stream(strict, list(range(1000, 1400)), {"kv_compression_budget": 512}))
    assert str(caught.value.code) == "400"
    assert strict.post("/v1/completions", {"model": NAME, "prompt": "a", "max_tokens": 1})[0] == 200


# --- the document --------------------------------------------------------------------------------


def blocks(language: str) -> list[str]:
    """Code of the document."""
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCS, flags=re.MULTILINE | re.DOTALL)


def localised(code: str, server: Server) -> str:
    return code.replace("http://localhost:8000", server.url).replace("MODEL", NAME)


def test_the_documents_client_code_runs(server: Server) -> None:
    ran = [code for code in blocks("python") if "localhost" in code]
    assert len(ran) == 2
    for code in ran:
        space: dict[str, Any] = {}
        exec(compile(localised(code, server), "docs/requests.md", "exec"), space)
        assert space["answer"].choices[0].message.content
    assert space["end"] > 5


def test_the_documents_curl_runs(server: Server) -> None:
    (code,) = [code for code in blocks("sh") if "curl" in code]
    done = subprocess.run(
        ["bash", "-c", localised(code, server)],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout)["choices"][0]["text"]


def test_the_documents_policy_is_one() -> None:
    from vllm_kvcompress.planning.request_policy import RequestPolicy

    (policy,) = blocks("json")
    parsed = RequestPolicy.parse(json.loads(policy)["allow"])
    assert parsed.methods == frozenset({"cake", "snapkv"})
    assert parsed.keep == 512
