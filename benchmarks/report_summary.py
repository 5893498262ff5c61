"""The opening of docs/results.md: one table, five sentences and what others have published."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from benchmarks.report_data import Results
from vllm_kvcompress.tools.evaluation import tables
from vllm_kvcompress.tools.evaluation.markdown_page import RULER, MarkdownPage
from vllm_kvcompress.tools.evaluation.record import AGNOSTIC, AWARE
from vllm_kvcompress.tools.evaluation.result_groups import ResultGroup, SettingRow, make_groups

MODEL = "qwen2.5-coder-0.5b-instruct"
LONG, SHORT = 4096, 1024
SHOWN = ("full", "cake", "dynamickv", "snapkv", "pyramidkv")
HALF, QUARTER, EIGHTH = "0.5", "0.25", "0.125"

PAPERS = """\
* **CAKE** ([arXiv 2503.12491](https://arxiv.org/abs/2503.12491); from reading notes, not checked
  against the paper). Llama-2-7B and Llama-3.1-8B on LongBench: with 128 and with 1024 tokens per
  layer CAKE has the best mean, ahead of PyramidKV, SnapKV, TOVA and H2O. In its ablation on
  Llama-2-7B with 128 tokens, its shares of the layers are worth 0.6 to 1.0 points against equal,
  pyramid-shaped and random ones, its indicator 0.5 to 0.7 against mean, variance or their product.
* **DynamicKV** ([arXiv 2412.14838](https://arxiv.org/abs/2412.14838), README of its code). Four
  models of 7 and 8 billion parameters on LongBench with 512 tokens per layer, counted per query
  head: DynamicKV is 0.2 to 0.7 points ahead of SnapKV and 1.2 to 4.8 behind the full cache.
* **CompressKV** ([arXiv 2508.02401](https://arxiv.org/abs/2508.02401), Table 5). Llama-3.1-8B and
  Mistral-7B-v0.3 on LongBench with 128 to 2048 tokens per layer: CAKE is ahead of SnapKV and
  PyramidKV up to 1024 tokens, by most where least is kept, and behind CompressKV.
* **LAVa** ([arXiv 2509.09754](https://arxiv.org/abs/2509.09754), Findings of EMNLP 2025).
  Mistral-7B-v0.2, Qwen2.5-7B and Llama-3-8B on LongBench with 128 to 1024 tokens per KV head and
  layer: CAKE is at most 0.7 points ahead of SnapKV, close to Ada-SnapKV (0.8 behind to 0.1 ahead)
  and behind LAVa. Mistral-7B-v0.2 on RULER of 4k to 16k tokens: up to 1.7 points ahead of SnapKV.
* **SurrogateKV** ([data of its code](https://github.com/kimjunewon/SurrogateKV)).
  Llama-3-8B-Instruct on LongBench with 64 to 2048 tokens per layer: DynamicKV is ahead of SnapKV
  up to 1024 tokens.
* **kvpress** ([leaderboard](https://huggingface.co/spaces/nvidia/kvpress-leaderboard), as others
  quote it, notes on [arXiv 2510.00636](https://arxiv.org/abs/2510.00636), pull requests
  [38](https://github.com/NVIDIA/kvpress/pull/38), [93](https://github.com/NVIDIA/kvpress/pull/93)
  and [143](https://github.com/NVIDIA/kvpress/pull/143)). Qwen3-8B and Llama-3.1-8B on RULER of 4k
  tokens, query-agnostic: with half of the cache SnapKV loses about 40 of 95 points, Expected
  Attention fewer than 4; AdaKV's shares of the heads add 5 to 6 points to either with three
  quarters of the cache; KVzip keeps the score down to a fifth of it."""
"""A line for each source; the figures themselves are to be read there."""


def opening(page: MarkdownPage, results: Results) -> None:
    """Write the main model's means at one length, and what follows from them."""
    main = _find(results, AWARE, LONG)
    if main is None:
        return
    rows = [row for row in main.rows if row.ours and row.label in SHOWN]
    page.add(
        tables.means(main, rows),
        f"{len(main.tasks)} tasks of RULER with {LONG} tokens, {MODEL}, scores in per cent; "
        "budgets are shares of the prompt, and the question is part of what is compressed.",
        "\n".join(f"* {sentence}" for sentence in _sentences(main, results)),
    )


def papers(page: MarkdownPage) -> None:
    """Write what others have published: where it stands and what it shows."""
    page.heading(2, "What papers report")
    page.add(
        "Not comparable with the results here: other models, tasks and precisions, and budgets "
        "that count something else. None of it was measured here.",
        PAPERS,
    )


def _sentences(main: ResultGroup, results: Results) -> Iterator[str]:
    cake, full = _row(main, "cake"), _row(main, "full")
    against = main.difference(cake, HALF, full)
    if against is not None:
        kept = {name: _kept(main, name, QUARTER) for name in ("cake", "dynamickv", "snapkv")}
        yield (
            f"With half of the cache `cake` scores {_score(main, cake, HALF)} where the full cache "
            f"scores {_score(main, full, HALF)} (difference on the same prompts "
            f"{tables.signed(against.estimate)}); with a quarter it keeps {kept['cake']} of the "
            f"full score, `dynamickv` {kept['dynamickv']} and `snapkv` {kept['snapkv']}."
        )
    ablation = next((file for file in results.ablations if file.name == "ablation-cake"), None)
    for group in make_groups(ablation.frame) if ablation else ():
        rows = (_row(group, label) for label in ("cake", "equal shares"))
        own, equal = (_score(group, row, EIGHTH) for row in rows)
        yield (
            "How the layers share the budget makes the difference: with an eighth of the cache "
            f"`cake` scores {own} over {len(group.tasks)} tasks of {group.length} tokens, and "
            f"{equal} if all layers get the same."
        )
    short = _find(results, AWARE, SHORT)
    if short is not None:
        yield (
            f"Tokens count more than shares: an eighth of {LONG} tokens leaves `cake` "
            f"{_kept(main, 'cake', EIGHTH)} of the full score, an eighth of {SHORT} tokens "
            f"{_kept(short, 'cake', EIGHTH)}."
        )
    later = _find(results, AGNOSTIC, SHORT)
    if short is not None and later is not None:
        same = short.only(set(later.tasks))
        before, after = (_score(g, _row(g, "cake"), QUARTER) for g in (same, later))
        yield (
            f"The question should be part of what is compressed: over {len(later.tasks)} tasks of "
            f"{SHORT} tokens `cake` with a quarter of the cache scores {before} then, and {after} "
            "where the question comes after the compression."
        )
    first, second = (_rows(results, "capacity", case="bound", generated=n) for n in ("128", "512"))
    step = _rows(results, "bench-smol", case="decode step", prompt="4096", requests="8")
    if first and second and step:
        yield (
            f"Memory for {first['running_plain']} requests of {first['prompt']} tokens holds "
            f"{first['running_compressed']} under a budget of {first['budget']} tokens "
            f"({first['model']} on two CPU cores), which makes {float(first['ratio']):.1f} times "
            f"as many tokens a second with answers of {first['generated']} tokens and "
            f"{float(second['ratio']):.1f} times with {second['generated']}; a decode step of "
            f"{step['requests']} such requests is {float(step['ratio']):.1f} times as fast."
        )


def _find(results: Results, protocol: str, length: int) -> ResultGroup | None:
    wanted = (MODEL, RULER, protocol, length, False)
    for group in results.groups:
        if (group.model, group.family, group.protocol, group.length, group.likelihood) == wanted:
            return group
    return None


def _row(group: ResultGroup, label: str) -> SettingRow:
    return next(row for row in group.rows if row.ours and row.label == label)


def _score(group: ResultGroup, row: SettingRow, budget: str) -> str:
    mean = group.mean(row, budget)
    return tables.MISSING if mean is None else tables.per_cent(mean.value)


def _kept(group: ResultGroup, label: str, budget: str) -> str:
    """Share of the full cache's mean score that a setting keeps."""
    mean, full = (group.mean(_row(group, name), budget) for name in (label, "full"))
    return tables.MISSING if not mean or not full else f"{100 * mean.value / full.value:.0f} %"


def _rows(results: Results, name: str, **values: str) -> Mapping[str, str]:
    """The first row of a file of measured times with these values; empty if there is none."""
    rows = results.speed.get(name, ())
    return next((row for row in rows if values.items() <= row.items()), {})
