"""Figures that others have published, quoted apart from ours.

The only figures of docs/results.md that are typed by hand; every table says where they stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_kvcompress.tools.evaluation import tables
from vllm_kvcompress.tools.evaluation.document import Document


@dataclass(frozen=True)
class Quoted:
    """A table of somebody else's.

    Attributes:
        title: What it is.
        source: Where it stands.
        model: Which models, with their full-cache scores where these are given.
        measure: Tasks and score.
        budget: What a budget counts.
        head: Column names.
        rows: Cells as published; empty where the source has none.

    """

    title: str
    source: str
    model: str
    measure: str
    budget: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


QUOTED = (
    Quoted(
        "CAKE's own averages",
        "reading notes on CAKE (arXiv 2503.12491), not checked against the paper",
        "Llama-2-7B (2-7B) and Llama-3.1-8B (3.1-8B), full cache not given",
        "LongBench, mean of 16 tasks",
        "tokens per layer on average over L layers, prefill and decode",
        ("method", "2-7B, 128", "2-7B, 1024", "3.1-8B, 128"),
        (
            ("H2O", "26.06", "31.05", "41.67"),
            ("TOVA", "25.31", "31.46", "42.47"),
            ("SnapKV", "28.09", "32.50", "42.53"),
            ("PyramidKV", "28.20", "32.55", "41.94"),
            ("CAKE", "29.29", "32.98", "43.39"),
        ),
    ),
    Quoted(
        "CAKE's ablation",
        "reading notes on CAKE (arXiv 2503.12491), not checked against the paper",
        "Llama-2-7B, full cache not given",
        "LongBench, mean of 16 tasks",
        "128 tokens per layer on average",
        ("part", "variant", "score"),
        (
            ("allocation", "uniform", "28.36"),
            ("allocation", "pyramid", "28.69"),
            ("allocation", "random", "28.3 \u00b10.2"),
            ("allocation", "CAKE", "29.29"),
            ("indicator", "mean", "28.82"),
            ("indicator", "variance", "28.68"),
            ("indicator", "mean times variance", "28.60"),
            ("indicator", "mean plus gamma times variance", "29.29"),
        ),
    ),
    Quoted(
        "DynamicKV's own averages",
        "README of DynamicKV's released code",
        "as in the first column",
        "LongBench, mean of 16 tasks",
        "512 tokens per layer; in the released code counted per query head",
        ("model", "full", "StreamingLLM", "H2O", "SnapKV", "PyramidKV", "DynamicKV"),
        (
            ("Llama-3-8B-Instruct", "41.95", "34.70", "37.20", "40.30", "40.18", "40.73"),
            ("Mistral-7B-Instruct-v0.2", "42.71", "30.06", "37.37", "40.71", "40.47", "40.90"),
            ("Qwen2-7B-Instruct", "40.71", "29.65", "35.63", "38.47", "38.19", "39.16"),
            ("InternLM-2.5-7B-Chat-1M", "43.21", "32.25", "34.65", "37.84", "37.86", "38.39"),
        ),
    ),
    Quoted(
        "CompressKV's comparison, Llama-3.1-8B",
        "arXiv 2508.02401, Table 5",
        "Llama-3.1-8B, full cache 49.08",
        "LongBench, mean of 16 tasks; all methods with window 8 and average pooling of 5",
        "tokens per layer, cut after the prefill only",
        ("method", "128", "256", "512", "1024", "2048"),
        (
            ("StreamingLLM", "32.28", "33.92", "35.59", "36.96", "38.99"),
            ("SnapKV", "42.58", "45.21", "46.71", "47.82", "48.47"),
            ("PyramidKV", "42.02", "44.36", "46.49", "47.65", "48.34"),
            ("CAKE", "44.84", "46.30", "47.25", "47.97", "48.26"),
            ("CompressKV", "45.10", "46.71", "47.78", "48.24", "48.71"),
        ),
    ),
    Quoted(
        "CompressKV's comparison, Mistral-7B-v0.3",
        "arXiv 2508.02401, Table 5",
        "Mistral-7B-v0.3, full cache 47.82",
        "LongBench, mean of 16 tasks; all methods with window 8 and average pooling of 5",
        "tokens per layer, cut after the prefill only",
        ("method", "128", "256", "512", "1024", "2048"),
        (
            ("StreamingLLM", "29.85", "31.22", "32.65", "34.73", "36.51"),
            ("SnapKV", "40.79", "43.76", "45.38", "46.49", "47.05"),
            ("PyramidKV", "40.29", "43.06", "44.82", "45.96", "46.85"),
            ("CAKE", "43.04", "44.73", "46.06", "46.66", "47.22"),
            ("CompressKV", "43.56", "45.43", "46.39", "46.96", "47.55"),
        ),
    ),
    Quoted(
        "LAVa's comparison, Mistral-7B-v0.2",
        "LAVa, EMNLP 2025",
        "Mistral-7B-v0.2, full cache 45.07",
        "LongBench, mean of 20 to 21 tasks, English and Chinese; max pooling of 7, CAKE tuned",
        "tokens per KV head and layer on average",
        ("method", "128", "256", "512", "1024"),
        (
            ("SnapKV", "34.42", "38.49", "41.48", "43.00"),
            ("PyramidKV", "34.51", "38.23", "41.15", "42.79"),
            ("Ada-SnapKV", "35.82", "39.40", "42.11", "43.34"),
            ("CAKE", "35.06", "38.84", "41.76", "43.36"),
            ("LAVa", "36.74", "40.12", "42.59", "43.65"),
        ),
    ),
    Quoted(
        "LAVa's comparison, Qwen2.5-7B",
        "LAVa, EMNLP 2025",
        "Qwen2.5-7B, full cache 48.96",
        "LongBench, mean of 20 to 21 tasks, English and Chinese; max pooling of 7, CAKE tuned",
        "tokens per KV head and layer on average",
        ("method", "128", "256", "512", "1024"),
        (
            ("SnapKV", "39.60", "43.32", "45.32", "47.43"),
            ("PyramidKV", "37.88", "41.30", "44.48", "46.47"),
            ("Ada-SnapKV", "40.24", "43.41", "45.71", "47.47"),
            ("CAKE", "40.26", "43.53", "45.45", "47.47"),
            ("LAVa", "40.69", "43.84", "45.74", "47.64"),
        ),
    ),
    Quoted(
        "LAVa's comparison, Llama-3-8B",
        "LAVa, EMNLP 2025",
        "Llama-3-8B, full cache 44.71",
        "LongBench, mean of 20 to 21 tasks, English and Chinese; max pooling of 7, CAKE tuned",
        "tokens per KV head and layer on average",
        ("method", "128", "256", "512", "1024"),
        (
            ("SnapKV", "39.51", "41.84", "43.25", "43.80"),
            ("PyramidKV", "39.76", "41.71", "43.26", "43.66"),
            ("Ada-SnapKV", "40.58", "42.26", "43.55", "44.16"),
            ("CAKE", "39.88", "41.84", "43.37", "43.81"),
            ("LAVa", "40.38", "42.65", "43.70", "44.30"),
        ),
    ),
    Quoted(
        "LAVa's comparison on RULER",
        "LAVa, EMNLP 2025",
        "Mistral-7B-v0.2, full cache not given",
        "RULER",
        "1024 tokens per KV head and layer on average",
        ("method", "4k", "8k", "16k"),
        (
            ("SnapKV", "70.71", "61.52", "55.61"),
            ("PyramidKV", "72.55", "62.02", "55.42"),
            ("Ada-SnapKV", "71.14", "60.31", "55.05"),
            ("CAKE", "72.41", "61.55", "55.84"),
            ("LAVa", "75.39", "62.61", "56.70"),
        ),
    ),
    Quoted(
        "SurrogateKV's comparison",
        "data of SurrogateKV's released code (kimjunewon/SurrogateKV)",
        "Llama-3-8B-Instruct, full cache 41.92",
        "LongBench, mean of 16 tasks",
        "tokens per layer",
        ("method", "64", "128", "256", "512", "1024", "2048"),
        (
            ("H2O", "33.53", "35.56", "37.81", "39.68", "40.68", "41.51"),
            ("SnapKV", "33.24", "35.67", "38.89", "40.26", "40.92", "41.72"),
            ("PyramidKV", "35.01", "37.43", "39.33", "40.18", "41.04", "41.69"),
            ("DynamicKV", "34.69", "37.80", "39.70", "40.61", "41.19", "41.59"),
            ("Ada-KV", "34.46", "38.60", "39.99", "40.77", "41.43", "41.75"),
        ),
    ),
    Quoted(
        "kvpress's leaderboard, Qwen3-8B",
        "kvpress's leaderboard and notes on arXiv 2510.00636, as others quote them; Compactor: "
        "kvpress, pull request 143",
        "Qwen3-8B, full cache 95.3; AdaKV (SnapKV) on a sample of 10 %",
        "RULER 4k, 13 tasks, query-agnostic",
        "share of the prompt's cache that is kept, window included",
        ("method", "75 %", "50 %", "25 %", "12.5 %"),
        (
            ("Knorm", "87.2", "68.3", "32.6", "8.9"),
            ("AdaKV (SnapKV)", "92.2", "64.0", "37.4", "24.6"),
            ("SnapKV", "", "55.7", "", ""),
            ("TOVA", "", "77.6", "", ""),
            ("KeyDiff", "", "78.6", "", ""),
            ("Expected Attention", "", "94.7", "", ""),
            ("Compactor", "92.6", "85.0", "72.3", ""),
        ),
    ),
    Quoted(
        "kvpress, Llama-3.1-8B",
        "kvpress, pull requests 93 (KVzip) and 143 (Compactor); notes on arXiv "
        "2510.00636 (Expected Attention and KeyDiff at 50 %)",
        "Llama-3.1-8B, full cache 95.7",
        "RULER 4k, 13 tasks, query-agnostic",
        "share of the prompt's cache that is kept, window included",
        ("method", "75 %", "50 %", "25 %"),
        (
            ("Expected Attention", "", "92.2", ""),
            ("KeyDiff", "", "85.5", ""),
            ("Compactor", "94.0", "87.7", "77.8"),
            ("KVzip", "95.5", "95.5", "94.9 at 20 %"),
        ),
    ),
    Quoted(
        "kvpress, with and without AdaKV",
        "kvpress, pull request 38",
        "Llama-3.1-8B, full cache not given there",
        "RULER 4k, 13 tasks, query-agnostic",
        "75 % of the prompt's cache is kept, window included",
        ("method", "alone", "with AdaKV"),
        (("SnapKV", "81.8", "88.1"), ("Expected Attention", "88.5", "93.6")),
    ),
)


def papers(document: Document) -> None:
    """Every quoted table with its model, its budgets and its source."""
    document.heading(2, "What papers report")
    document.add(
        "Taken over as published, and not comparable with the tables above: other models, tasks "
        "and precisions, and budgets that count something else. None of them was measured here."
    )
    for quoted in QUOTED:
        document.heading(3, quoted.title)
        document.add(
            f"Source: {quoted.source}. Model: {quoted.model}. Measured: {quoted.measure}. "
            f"Budget: {quoted.budget}.",
            tables.table(
                quoted.head, [[cell or tables.MISSING for cell in row] for row in quoted.rows]
            ),
        )
