"""What the soak counts as a fault. Answers are made by hand."""

import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks.soak.asks import Answer, Ask
from benchmarks.soak.books import Books
from benchmarks.soak.client import complaint
from benchmarks.soak.comparison import Bounds, compare
from benchmarks.soak.report import Life, judge_memory
from benchmarks.soak.traffic import Dealer
from benchmarks.soak.watch import slope

BOUNDS = Bounds(tie=0.01, drift=0.01)
PLACES = [{5: -0.5, 6: -0.505, 7: -2.0}, {8: -0.1, 9: -3.0}]


def answer(
    tokens: list[int], finish: str = "length", moved: float = 0.0, prompt: int = 3
) -> Answer:
    """An answer as a server gives it; log-probabilities are those of PLACES where they name it."""
    found = Answer()
    logprobs = [PLACES[i].get(token, -9.0) + moved for i, token in enumerate(tokens)]
    tops = [{f"token_id:{t}": p for t, p in PLACES[i].items()} for i in range(len(tokens))]
    choice = {
        "index": 0, "text": str(tokens), "finish_reason": finish, "token_ids": tokens,
        "logprobs": {"token_logprobs": logprobs, "top_logprobs": tops},
    }  # fmt: skip
    usage = {"prompt_tokens": prompt, "completion_tokens": len(tokens)}
    found.add({"choices": [choice], "usage": usage})
    return found


@pytest.mark.parametrize(
    ("crowd", "sampled", "verdict"),
    [
        (answer([5, 8]), False, "equal"),
        (answer([5, 8], moved=0.005), False, "equal"),
        (answer([5, 8], moved=0.02), False, "unlike"),
        # 0.005 nats between the two, then 1.5.
        (answer([6, 8]), False, "near tie"),
        (answer([6, 8]), True, "unlike"),
        (answer([7, 8]), False, "unlike"),
        (answer([5]), False, "unlike"),
        (answer([5, 8], finish="stop"), False, "unlike"),
        (answer([5, 8], prompt=4), False, "unlike"),
    ],
)
def test_verdicts(crowd: Answer, sampled: bool, verdict: str) -> None:
    found = compare(crowd, answer([5, 8]), BOUNDS, sampled=sampled, parsed=False)
    assert found.verdict == verdict


@pytest.mark.parametrize(
    ("body", "got", "says"),
    [
        ({}, answer([5, 8]), None),
        ({"max_tokens": 1}, answer([5, 8]), "has 2 tokens, asked for 1"),
        ({"max_tokens": 9}, answer([5, 8]), "ended for its length after 2 of 9 tokens"),
        ({"min_tokens": 2}, answer([5], finish="stop"), "has 1 tokens, asked for 2 at least"),
        ({"n": 2}, answer([5, 8]), "has choices [0] instead of 2"),
        ({"stop": ["8"]}, answer([5, 8]), "has the stop string '8'"),
        ({}, answer([5, 8], finish="error"), "ended with 'error'"),
    ],
)
def test_an_answer_is_looked_at_by_itself(
    body: dict[str, Any], got: Answer, says: str | None
) -> None:
    found = complaint(Ask("x", False, {"prompt": [1, 2, 3], "max_tokens": 2, **body}), got)
    assert found == says


def test_streamed_events_make_the_same_answer() -> None:
    whole, streamed = answer([5, 8]), Answer()
    for number, token in enumerate([5, 8]):
        top = {f"token_id:{t}": p for t, p in PLACES[number].items()}
        choice = {
            "index": 0, "text": "[5, 8]" if number else "", "token_ids": [token],
            "finish_reason": "length" if number else None,
            "logprobs": {"token_logprobs": [PLACES[number][token]], "top_logprobs": [top]},
        }  # fmt: skip
        streamed.add({"choices": [choice], "usage": None})
    streamed.add({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}})
    assert streamed == whole


def test_growth_is_a_fault_once_memory_had_time_to_settle(tmp_path: Path) -> None:
    books = Books(tmp_path / "faults.jsonl")
    assert slope([(0, 10), (1, 12), (2, 500), (3, 16)]) == pytest.approx(2, abs=1)
    short = Life(600, {}, 0, 0, 900, (0, 0), {})
    judge_memory([short, Life(3600, {}, 0, 0, 90, (0, 0), {})], 100, books)
    assert not books.faults
    judge_memory([Life(3600, {}, 0, 0, 110, (0, 0), {})], 100, books)
    assert books.faults == {"memory": 1}


def test_a_seed_gives_the_same_deck() -> None:
    def deck(seed: int) -> list[Any]:
        dealer = Dealer(
            "word " * 1000, range(4000), compression=True, shares=True, seeds=True, adapter=False
        )
        return dealer.deal(random.Random(seed), 60)

    assert deck(1) == deck(1)
    assert deck(1) != deck(2)
    kinds = {talk.ask.kind for talk in deck(1)}
    assert {"chat", "tools", "JSON schema", "n > 1", "seeded", "own settings", "refused"} <= kinds
