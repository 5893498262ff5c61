"""Colours and words that the picture and the page share."""

from __future__ import annotations

import numpy as np

from vllm_kvcompress.tools.inspection.kept_tokens import Inspection, Run

HEAT = "Viridis"
"""Colour scale of shares, by plotly's name; matplotlib's is the same in small letters."""

HEAT_POWER = 0.5
"""Colours follow the square root of a share: of a bin of many tokens few are kept."""

HEAT_TICKS = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0)

BAR = "#0072B2"
MEAN = "#D55E00"
PROFILE = {"H": "#56B4E9", "V": "#009E73", "P": "#CC79A7"}
MARK = "#E69F00"
"""Okabe and Ito's colours, which people with any of the common colour blindnesses tell apart."""

PROFILE_NAMES = {
    "H": "H = exp(log_entropy)",
    "V": "V = exp(log_shift)",
    "P": "P, the layer's preference",
}

HEAT_TITLE = "share of KV heads that keep a token"
BAR_TITLE = "tokens kept"
TEXT_TITLE = (
    "Best-kept passages, tokens marked by the share of layers \u00d7 KV heads that keep them"
)
PROFILE_NOTE = "relative to the largest layer"

_VISIBLE = str.maketrans({"\n": "\u21b5", "\t": " ", "\r": " "})


def headline(inspection: Inspection) -> str:
    """Model, budget and length of the prompt."""
    return (
        f"{shorten(inspection.model, 48)} \u00b7 budget {inspection.budget_text} \u00b7 "
        f"prompt {inspection.prompt_len} tokens"
    )


def run_title(run: Run) -> str:
    """Method, what it kept of the cache and how many tokens that are in a layer."""
    name = run.method if run.fallback is None else f"{run.method} (failed, most recent tokens kept)"
    return f"{name}: {run.kept_share:.1%} of the cache, {run.mean_length:.0f} tokens a layer"


def window_note(inspection: Inspection) -> str:
    """A note on the tokens that the passages leave out."""
    windows = {run.window for run in inspection.runs}
    last = f"last {windows.pop()} tokens" if len(windows) == 1 else "methods' windows"
    return f"the {last}, always kept, left out"


def strongest(inspection: Inspection) -> float:
    """The share of layers x heads that has the full colour of a mark in the text.

    Few tokens are kept by most layers, so the scale ends where 99.5 % of the tokens before the
    window do, in whole tenths.
    """
    shares = [run.token_share[: run.prompt_len - run.window] for run in inspection.runs]
    high = float(np.quantile(np.concatenate(shares), 0.995)) if shares[0].size else 1.0
    return min(1.0, max(1.0, np.ceil(high * 10)) / 10)


def one_line(text: str) -> str:
    """The text with line ends as arrows and without other control characters."""
    visible = text.translate(_VISIBLE)
    return "".join(c if c.isprintable() else "\ufffd" for c in visible)


def shorten(text: str, limit: int) -> str:
    """Shorten a text to ``limit`` characters, with an ellipsis in the middle."""
    if len(text) <= limit:
        return text
    half = (limit - 1) // 2
    return f"{text[: limit - 1 - half]}\u2026{text[len(text) - half :]}"
