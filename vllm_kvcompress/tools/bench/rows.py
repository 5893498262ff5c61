"""One measured case: its cells in a table and its record in a file."""

from dataclasses import dataclass
from typing import Any

from vllm_kvcompress.tools.bench.pairs import Paired

NOTHING = "-"
HEADINGS = (
    *("case", "plain", "compressed", "ratio (spread)", "byte bound", "plain at budget (ratio)"),
    *("blocks held", "at one time", "verdict"),
)
COLUMNS = (
    *("case", "pool", "prompt", "requests", "generated", "unit", "plain", "plain_spread"),
    *("compressed", "compressed_spread", "ratio", "ratio_min", "ratio_max", "ratio_rounds"),
    *("byte_bound", "budget_prompt", "budget_plain", "budget_ratio", "budget_rounds"),
    *("pool_blocks", "blocks_plain", "blocks_compressed", "running_plain"),
    *("running_compressed", "preemptions_plain", "preemptions_compressed", "verdict", "notes"),
)


BUDGET_COLUMNS = frozenset(("budget_prompt", "budget_plain", "budget_ratio", "budget_rounds"))
"""Columns that files written before there were any do not have."""


@dataclass(frozen=True)
class AtBudget:
    """Plain vLLM with prompts of as many tokens as compression keeps: the bound of any eviction.

    Attributes:
        prompt: Tokens of each of these prompts.
        paired: Its figures, and those of the compressed engine that took turns with it.

    """

    prompt: int
    paired: Paired


@dataclass(frozen=True)
class BenchRow:
    """One case.

    Attributes:
        case: What was measured, without the sizes.
        unit: Unit of the figures.
        paired: The figures.
        prompt: Tokens of each prompt; None: not known.
        requests: Requests at one time, or all of them where they queue; None: not known.
        generated: Tokens that each generates; None: does not matter.
        pool: Name of the pool, or nothing.
        pool_blocks: Blocks that can be handed out in each engine.
        bound: Ratio if a step cost only the bytes that it reads; None: not known.
        at_budget: Plain vLLM at prompts of the budget's length; None: not measured.
        blocks: Most blocks that requests held at one time, plain and compressed.
        running: Most requests past their prefill in one step, plain and compressed.
        preemptions: Preemptions over all rounds, plain and compressed.
        notes: What a reader should know, each without a capital letter and a full stop.

    """

    case: str
    unit: str
    paired: Paired
    prompt: int | None = None
    requests: int | None = None
    generated: int | None = None
    pool: str = ""
    pool_blocks: int | None = None
    bound: float | None = None
    at_budget: AtBudget | None = None
    blocks: tuple[int, int] | None = None
    running: tuple[int, int] | None = None
    preemptions: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The case with its sizes."""
        return title_of(self.case, self.prompt, self.requests, self.generated, self.pool)

    def cells(self) -> tuple[str, ...]:
        """Text under each of :data:`HEADINGS`."""
        plain, compressed = self.paired.medians
        low, high = self.paired.spread
        rounds = len(self.paired.plain)
        spread = f" ({low:.2f}-{high:.2f})" if rounds > 1 else ""
        return (
            self.title,
            f"{figure(plain)} {self.unit}",
            f"{figure(compressed)} {self.unit}",
            f"{self.paired.ratio:.2f}{spread}",
            NOTHING if self.bound is None else f"{self.bound:.2f}",
            self._budget_cell(),
            _change(self.blocks),
            _change(self.running),
            self.paired.verdict,
        )

    def _budget_cell(self) -> str:
        if self.at_budget is None:
            return NOTHING
        paired = self.at_budget.paired
        return f"{figure(paired.medians[0])} {self.unit} ({paired.ratio:.2f})"

    def record(self) -> dict[str, Any]:
        """Values by :data:`COLUMNS`; nothing where there is none."""
        plain, compressed = self.paired.medians
        low, high = self.paired.spread
        values = {
            "case": self.case,
            "pool": self.pool,
            "prompt": self.prompt,
            "requests": self.requests,
            "generated": self.generated,
            "unit": self.unit,
            "plain": figure(plain),
            "plain_spread": _range(self.paired.plain),
            "compressed": figure(compressed),
            "compressed_spread": _range(self.paired.compressed),
            "ratio": f"{self.paired.ratio:.3f}",
            "ratio_min": f"{low:.3f}",
            "ratio_max": f"{high:.3f}",
            "ratio_rounds": " ".join(f"{ratio:.3f}" for ratio in self.paired.ratios),
            "byte_bound": None if self.bound is None else f"{self.bound:.3f}",
            "pool_blocks": self.pool_blocks,
            "verdict": self.paired.verdict,
            "notes": "; ".join(self.notes),
        }
        at = self.at_budget
        values |= {
            "budget_prompt": None if at is None else at.prompt,
            "budget_plain": None if at is None else figure(at.paired.medians[0]),
            "budget_ratio": None if at is None else f"{at.paired.ratio:.3f}",
            "budget_rounds": None
            if at is None
            else " ".join(f"{ratio:.3f}" for ratio in at.paired.ratios),
        }
        for name in ("blocks", "running", "preemptions"):
            both = getattr(self, name) or (None, None)
            values[f"{name}_plain"], values[f"{name}_compressed"] = both
        return {name: "" if values[name] is None else values[name] for name in COLUMNS}


def title_of(
    case: str, prompt: int | None, requests: int | None, generated: int | None, pool: str
) -> str:
    """Name a case with its sizes, each as in :class:`BenchRow`."""
    sizes = "" if prompt is None else f"{prompt:,}"
    if sizes and requests is not None:
        sizes = f"{requests} x {sizes}"
    if sizes and generated is not None:
        sizes += f" + {generated}"
    words = [case, f"{sizes} tokens" if sizes else "", f"{pool} pool"]
    return ", ".join(words[: 3 if pool else 2]).removesuffix(", ")


def figure(value: float) -> str:
    """Write a number with four significant digits, or whole if it has more."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _change(both: tuple[int, int] | None) -> str:
    return NOTHING if both is None else f"{both[0]:,} -> {both[1]:,}"


def _range(values: tuple[float, ...]) -> str:
    return f"{figure(min(values))}-{figure(max(values))}"
