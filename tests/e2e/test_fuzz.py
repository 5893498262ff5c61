"""Requests with settings of every kind, sane and not, at a real server: 200 or 400, nothing else.

Hypothesis makes volleys of requests, which are sent over several connections at a time. What is
valid by construction must be answered, and the server must be whole when all is over.
"""

import json
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.e2e.server import NAME, Server
from vllm_kvcompress.methods import ROLES, get_spec

pytestmark = pytest.mark.engine

BLOCK, BUDGET, CONNECTIONS, VOLLEY = 32, 256, 8, 16
PATIENCE = 60.0
"""Seconds without an answer that count as a hang."""


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        path: Where it goes.
        body: Its JSON as text, which may say what no Python object can.
        valid: Whether it must be answered with 200.
        abort: The client hangs up: "read" once something has come, "wait" without waiting long.

    """

    path: str
    body: str
    valid: bool
    abort: str | None


@dataclass
class Tally:
    """What came back so far; every volley adds to it."""

    statuses: Counter[str] = field(default_factory=Counter)
    complaints: list[str] = field(default_factory=list)
    slowest: float = 0.0


# --- settings that are wrong, or nearly right ----------------------------------------------------

BIG = 10**400
numbers = st.sampled_from([-BIG, -1, 0, 1, 2, 31, 2**31, 2**63, 2**64, 10**30, BIG]) | st.integers()
fractions = st.floats() | st.sampled_from([1e-300, 5e-324, 1e308, 1.0, 0.5])
texts = st.text(max_size=20) | st.sampled_from(
    ["", "\ud800", "none", "true", "cake", "scatter", "zip", "x" * 50_000, "\x00", "NaN", "é" * 99]
)
scalars = st.none() | st.booleans() | numbers | fractions | texts
tree = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
deep = st.sampled_from([50, 900, 940, 970, 985, 50_000]).map(lambda n: "[" * n + "]" * n)
broken = st.sampled_from(["{", "[]", "7", '"cake"', '{"window": 8}x', '{"a":' + "1" * 5000 + "}"])

# --- settings that are right ---------------------------------------------------------------------

count = st.integers(0, 2**31 - 1)
odd = st.sampled_from([1, 3, 5, 7, 31, 129])
positive = st.floats(0.05, 1000) | st.integers(1, 1000)
votes = {
    "kernel": odd,
    "pooling": st.sampled_from(["avg", "max"]),
    "reduce": st.sampled_from(["mean", "max"]),
}
PARAMS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "cake": {
        "tau1": positive, "tau2": positive, "gamma": st.just(0) | st.floats(1e-6, 1e9),
        "kernel": odd, "every": st.integers(0, 9),
    },
    "dynamickv": {
        **votes, "r_max": st.floats(1, 1e9), "every": st.integers(1, 9), "min_tokens": count,
    },
    "snapkv": votes,
    "pyramidkv": {**votes, "beta": st.integers(1, 2**31 - 1)},
    "streamingllm": {"sinks": count, "variant": st.sampled_from(["recent", "first"])},
    "random": {"seed": count},
    "uniform": {"kernel": odd},
    "h2o": {}, "tova": {}, "keydiff": {}, "knorm": {},
}  # fmt: skip
LEAST_WINDOW = {"cake": 2}
OWN_WINDOW = {"tova": 1}


def read_by(name: str, roles: Sequence[str]) -> dict[str, st.SearchStrategy[Any]]:
    """Parameters of a method of which only some parts are used."""
    spec = get_spec(name)
    idle = {key for role in ROLES if role not in roles for key in spec.parameters_of(role)}
    return {key: value for key, value in PARAMS[name].items() if key not in idle}


def heard(params: dict[str, Any]) -> dict[str, Any]:
    """Without what no part reads beside the rest."""
    first = params.get("variant") == "first"
    return {name: value for name, value in params.items() if not (first and name == "sinks")}


@st.composite
def part(draw: st.DrawFn, role: str) -> Any:
    """A method to take a scorer or an allocator from."""
    name = draw(st.sampled_from(sorted(PARAMS)))
    if draw(st.booleans()):
        return name
    own = st.fixed_dictionaries({}, optional=read_by(name, [role]))
    return {"method": name, **heard(draw(own))}


def named(value: Any) -> str:
    return str(value["method"] if isinstance(value, dict) else value)


@st.composite
def sound(draw: st.DrawFn, prompt: int) -> dict[str, Any]:
    """Settings that the server must take for a prompt of that many tokens."""
    method = draw(st.sampled_from([*sorted(PARAMS), "cake"]))
    asked: dict[str, Any] = {}
    params: dict[str, Any] = {}
    if method != "cake" or draw(st.booleans()):
        asked["kv_compression"] = method
    if draw(st.integers(0, 9)) == 0:
        asked = {"kv_compression": "none"}
        method, window = "none", 1
    else:
        roles = draw(
            st.sampled_from([(), (), ("scorer",), ("allocator",), ("scorer", "allocator")])
        )
        for role in roles:
            params[role] = draw(part(role))
        left_over = [role for role in ("scorer", "allocator") if role not in roles]
        if left_over:
            own = read_by(method, left_over)
            params.update(heard(draw(st.fixed_dictionaries({}, optional=own))))
        used = [method, *(named(params[role]) for role in roles)]
        least = max(LEAST_WINDOW.get(name, 1) for name in used)
        window = OWN_WINDOW.get(method, 32)
        if window < least or draw(st.booleans()):
            window = params["window"] = draw(st.integers(least, 32))
        if draw(st.booleans()) or params:
            asked["kv_compression_config"] = json.dumps(params)
    room = BUDGET
    if method != "none" and draw(st.booleans()):
        edge = st.sampled_from([window + BLOCK, window + BLOCK + 1, 2 * BLOCK + window])
        budget = draw(edge | st.integers(window + BLOCK, 2000) | st.floats(0.001, 0.999))
        asked["kv_compression_budget"] = budget
        room = window + BLOCK if isinstance(budget, float) else budget
    if draw(st.booleans()):
        left = min(room, BUDGET) - window
        ranges: list[int] = []
        for _ in range(draw(st.integers(1, 3))):
            length = min(draw(st.integers(1, 80)), left, prompt)
            if length > 0:
                start = draw(st.integers(0, prompt - length))
                ranges += [start, start + length]
                left -= length
        if ranges:
            asked["kv_compression_keep"] = ranges
    if draw(st.booleans()):
        asked["kv_compression_decode"] = draw(st.sampled_from([0, 1, False, True]))
    return asked


@st.composite
def nearly(draw: st.DrawFn, prompt: int) -> dict[str, Any]:
    """Sound settings with something wrong or strange in them."""
    asked = draw(sound(prompt))
    key = draw(st.sampled_from([
        "kv_compression", "kv_compression_budget", "kv_compression_keep", "kv_compression_decode",
        "param", "param", "config", "unknown", "range", "range",
    ]))  # fmt: skip
    if key == "param":
        params = json.loads(asked.get("kv_compression_config", "{}"))
        known = sorted({name for names in PARAMS.values() for name in names})
        name = draw(st.sampled_from([*known, "window", "scorer", "allocator", "faithful"]) | texts)
        params[name] = draw(part("scorer") | tree)
        asked["kv_compression_config"] = json.dumps(params)
    elif key == "config":
        asked["kv_compression_config"] = draw(
            deep | broken | tree | deep.map('{{"tau1":{}}}'.format)
        )
    elif key == "unknown":
        asked[draw(texts.map("kv_compression".__add__) | texts)] = draw(scalars)
    elif key == "range":
        ends = st.integers(-2, prompt + 2) | numbers
        asked["kv_compression_keep"] = draw(st.lists(ends, max_size=8))
    else:
        asked[key] = draw(tree)
    return asked


absurd = st.dictionaries(
    texts | st.sampled_from(["kv_compression", "kv_compression_budget", "kv_compression_config"]),
    tree,
    max_size=5,
)


def sendable(asked: dict[str, Any]) -> dict[str, Any]:
    """Without what plain vLLM answers with 500: lone surrogates in entries that are not ours."""
    ours = {k: v for k, v in asked.items() if k.startswith("kv_compression")}
    return {k: v for k, v in asked.items() if k in ours or "\\ud" not in json.dumps({k: v})}


@st.composite
def asks(draw: st.DrawFn) -> Ask:
    """Any request."""
    kind = draw(st.sampled_from(["sound"] * 5 + ["nearly"] * 5 + ["absurd", "deep"]))
    edge = st.sampled_from([1, 31, 32, 33, 64, 65, BUDGET, BUDGET + 1])
    prompt = draw(edge | st.integers(1, 600) | st.integers(BUDGET, 600))
    body: dict[str, Any] = {
        "model": NAME,
        "max_tokens": draw(st.sampled_from([1, 2, 3, 3, 3, 3, 3, 72])),
        "temperature": 1.0,
        "n": draw(st.sampled_from([1, 1, 1, 2, 3])),
        "stream": draw(st.booleans()),
        "ignore_eos": True,
    }
    path = "/v1/completions"
    first = draw(st.integers(1000, 1200))
    if kind != "sound" and draw(st.integers(0, 3)) == 0:
        path = "/v1/chat/completions"
        body["messages"] = [{"role": "user", "content": f"{first} " * (prompt // 6)}]
    else:
        body["prompt"] = [first + i * first % 2801 for i in range(prompt)]
    asked = {"sound": sound(prompt), "nearly": nearly(prompt)}.get(kind, absurd)
    body["vllm_xargs"] = sendable(draw(asked))
    text = json.dumps(body)
    if kind == "deep":
        text = text.replace('"n":', f'"vllm_xargs": {draw(deep)}, "m":')
    abort = draw(st.sampled_from([None] * 8 + ["wait", "read"]))
    return Ask(path, text, kind == "sound", abort)


# --- what comes back -----------------------------------------------------------------------------


def send(client: httpx.Client, ask: Ask) -> tuple[str, str]:
    """Status, "aborted" where the client hung up, and the error's message."""
    timeout = httpx.Timeout(0.02 if ask.abort == "wait" else PATIENCE)
    headers = {"Content-Type": "application/json"}
    try:
        with client.stream(
            "POST", ask.path, content=ask.body, headers=headers, timeout=timeout
        ) as answer:
            if ask.abort == "read" and answer.status_code < 500:
                next(answer.iter_raw(), None)
                return "aborted", ""
            text = answer.read().decode()
    except httpx.TransportError as error:
        hung_up = ask.abort == "wait" and isinstance(error, httpx.TimeoutException)
        return "aborted" if hung_up else repr(error), ""
    if not answer.headers["content-type"].startswith("text/event-stream"):
        found = json.loads(text)
        # A body that is no JSON at all is refused by the web framework, in a form of its own.
        told = found.get("detail") or found.get("error", {}).get("message", "")
        return str(answer.status_code), str(told)
    streamed = [line.removeprefix("data: ") for line in text.split("\n") if line]
    # The status is sent before the request is judged; what is wrong is the stream's only content.
    for piece in streamed:
        if piece != "[DONE]" and "error" in (found := json.loads(piece)):
            return str(found["error"]["code"]), found["error"]["message"]
    assert streamed[-1] == "[DONE]"
    return str(answer.status_code), ""


def complaint(ask: Ask, status: str, message: str) -> str | None:
    """What is wrong with an answer; None if nothing is."""
    told = f"{status} {message[:1000]!r} to {ask.body[:200]} ... {ask.body[-2000:]}"
    if status not in ({"200", "aborted"} if ask.valid else {"200", "400", "aborted"}):
        return f"unexpected: {told}"
    if status != "400" or "validation error" in message:  # vLLM's own way with a body's types
        return None
    good = message and "\n" not in message and len(message) < 600 and "Traceback" not in message
    return None if good else f"not a sentence: {told}"


def fly(server: Server, volleys: int, derandomize: bool) -> Tally:
    """Send that many volleys; every answer is checked."""
    tally = Tally()

    @settings(
        max_examples=volleys, derandomize=derandomize, database=None, deadline=None,
        phases=[Phase.generate],  # nothing can be shrunk on a server that has died
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.lists(asks(), min_size=VOLLEY, max_size=VOLLEY))
    def volley(sent: list[Ask]) -> None:
        if tally.complaints:
            return  # Hypothesis would send the same again, to a server that may have died

        def one(ask: Ask) -> tuple[str, str]:
            begin = time.monotonic()
            result = send(client, ask)
            tally.slowest = max(tally.slowest, time.monotonic() - begin)
            return result

        for ask, (status, message) in zip(sent, pool.map(one, sent), strict=True):
            tally.statuses[status] += 1
            if wrong := complaint(ask, status, message):
                tally.complaints.append(wrong)

    with httpx.Client(base_url=server.url) as client, ThreadPoolExecutor(CONNECTIONS) as pool:
        volley()
    assert not tally.complaints, "\n".join(tally.complaints[:5])
    return tally


def plain(server: Server) -> tuple[list[str], list[float]]:
    """Greedy tokens and log-probabilities of a request that sets nothing."""
    prompt = [1000 + i * 37 % 2801 for i in range(500)]
    answer = server.client.completions.create(
        model=NAME, prompt=prompt, max_tokens=8, temperature=0, logprobs=1,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    return list(logprobs.tokens or []), [float(p or 0) for p in logprobs.token_logprobs or []]


def check_whole(server: Server, before: tuple[list[str], list[float]]) -> dict[str, float]:
    """The server is well, answers as it did before, and has all its blocks."""
    assert httpx.get(f"{server.url}/health", timeout=PATIENCE).status_code == 200
    total = server.lines("KVCOMPRESS_POOL")[0]["total"]
    end = time.monotonic() + PATIENCE
    while True:  # requests of clients that hung up may still be on their way out
        tokens, logprobs = plain(server)
        assert tokens == before[0]
        assert logprobs == pytest.approx(before[1], abs=1e-3)
        figures = server.metrics()
        if figures["blocks_held"] == 0 or time.monotonic() > end:
            break
        time.sleep(0.5)
    assert (figures["blocks_held"], figures["blocks_free"]) == (0, total)
    return figures


@pytest.mark.parametrize(
    "volleys",
    [20, pytest.param(313, marks=pytest.mark.slow)],
    ids=["320 requests", "5008 requests"],
)
def test_every_answer_is_200_or_400(server: Server, volleys: int) -> None:
    before = plain(server)
    begin = time.monotonic()
    tally = fly(server, volleys, derandomize=volleys < 100)
    seconds = time.monotonic() - begin
    figures = check_whole(server, before)
    print(f"{dict(tally.statuses)} in {seconds:.0f} s, slowest {tally.slowest:.1f} s, {figures}")
    assert tally.statuses["200"] > 4 * volleys
    assert tally.statuses["400"] > 2 * volleys
