"""Records as a pandas frame: a row for each prompt under each setting."""

from __future__ import annotations

import json
from collections.abc import Iterable

import pandas as pd

from vllm_kvcompress.tools.evaluation.record import Record
from vllm_kvcompress.tools.evaluation.task import EvaluationError

DIGITS = 5
"""Decimals of a score or likelihood that count; packed files have no more."""

DEPTH = "depth"
"""Label of a prompt: where in the context the needle lies, in per cent."""

CELL = ["model", "dtype", "source", "task", "length", "protocol", "label", "budget", "block_size"]
"""Columns that are equal in a cell: one task's prompts of one length under one setting."""

PROMPT = ["seed", "index"]
"""Columns that tell the prompts of a task and length apart."""

_COPIED = [*CELL, *PROMPT, "method", "prompt_tokens", "kept_tokens", "score", "nll"]


def make_frame(records: Iterable[Record]) -> pd.DataFrame:
    """Put records into a frame.

    Returns:
        A row for each record, in the order of the records. Columns: :data:`CELL`, :data:`PROMPT`,
        ``method``, ``params`` (JSON with sorted keys), ``prompt_tokens``, ``kept_tokens``,
        ``depth`` (per cent, NaN for prompts without a depth), ``likelihood`` (whether a likelihood
        was measured) and ``value`` (score from 0 to 1, or nats per token).

    Raises:
        EvaluationError: A prompt occurs twice in a cell, two settings have the same label, or a
            cell has both scores and likelihoods.

    """
    rows = [
        {
            **{name: getattr(record, name) for name in _COPIED},
            "params": json.dumps(record.params, sort_keys=True, default=dict),
            "depth": record.labels.get(DEPTH),
        }
        for record in records
    ]
    frame = pd.DataFrame(rows, columns=[*_COPIED, "params", "depth"])
    frame = frame.astype(dict.fromkeys(("depth", "score", "nll"), "float64"))
    frame["likelihood"] = frame["score"].isna()
    frame["value"] = frame["score"].fillna(frame["nll"]).round(DIGITS)
    frame.loc[frame["score"].notna() & frame["nll"].notna(), "value"] = float("nan")
    check_frame(frame)
    return frame.drop(columns=["score", "nll"])


def check_frame(frame: pd.DataFrame) -> None:
    """Check that records fit together.

    Raises:
        EvaluationError: The same as for :func:`make_frame`.

    """
    prompts = frame[frame.duplicated([*CELL, *PROMPT])]
    settings = frame.drop_duplicates([*CELL, "method", "params"])
    kinds = frame.drop_duplicates([*CELL, "likelihood"])
    kinds = pd.concat([kinds[kinds.duplicated(CELL)], frame[frame["value"].isna()]])
    for wrong, problem in (
        (prompts, "seed and index ({seed}, {index}) are there twice"),
        (
            settings[settings.duplicated(CELL)],
            "the label stands for several settings: {params}",
        ),
        (kinds, "every prompt must have a score, or every one an nll"),
    ):
        for row in wrong.to_dict("records"):
            where = f"{row['label']!r} at {row['budget'] or 'full'} on {row['task']}"
            raise EvaluationError(f"{where}, {row['length']} tokens: {problem.format(**row)}")


def cell_means(frame: pd.DataFrame) -> pd.DataFrame:
    """Sum every cell of a frame up.

    Returns:
        A row for each cell with the columns of :data:`CELL`, ``prompts`` (their number), the means
        ``prompt_tokens`` and ``kept_tokens`` (of a layer after the prefill), and ``share``, the
        share of the cache that was kept.

    """
    cells = frame.groupby(CELL, sort=False).agg(
        prompts=("index", "size"),
        prompt_tokens=("prompt_tokens", "mean"),
        kept_tokens=("kept_tokens", "mean"),
    )
    cells["share"] = cells["kept_tokens"] / cells["prompt_tokens"]
    return cells.reset_index()
