"""The dashboard and the page on metrics name what a server really shows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from tests.engine.test_compression_stats import STATS
from vllm_kvcompress.engine.metrics import CompressionMetrics

DOCS = Path(__file__).resolve().parents[2] / "docs"
BOARD = json.loads((DOCS / "grafana" / "kv-compression.json").read_text(encoding="utf-8"))
NAME = re.compile(r"vllm:[a-z0-9_]+")


@pytest.fixture
def metrics() -> Iterator[CompressionMetrics]:
    before = set(REGISTRY._collector_to_names)
    yield CompressionMetrics("m")
    for collector in set(REGISTRY._collector_to_names) - before:
        REGISTRY.unregister(collector)


def samples() -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for family in REGISTRY.collect():
        for sample in family.samples:
            if sample.name.startswith("vllm:kv_compression_"):
                found.setdefault(sample.name, []).append(sample)
    return found


def expressions() -> list[str]:
    return [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]


def test_every_metric_of_the_dashboard_exists(metrics: CompressionMetrics) -> None:
    metrics.observe(STATS, 0)
    shown = samples()
    queries = [variable["query"] for variable in BOARD["templating"]["list"]]
    named = {name for text in [*expressions(), *queries] for name in NAME.findall(text)}
    assert len(named) > 10
    assert named - set(shown) == set()
    # Nothing that is measured is left out.
    suffixes = ("_created", "_bucket", "_count", "_sum")
    families = {name for name in shown if not name.endswith(suffixes)}
    assert families - named == {"vllm:kv_compression_layer_tokens_kept_total"}


def test_labels_of_the_dashboard_exist(metrics: CompressionMetrics) -> None:
    metrics.observe(STATS, 0)
    shown = samples()
    for panel in BOARD["panels"]:
        for target in panel["targets"]:
            (first, *_) = NAME.findall(target["expr"])
            labels = set(shown[first][0].labels) | {"le"}
            used = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            for group in re.findall(r"by \(([^)]*)\)", target["expr"]):
                used |= {label.strip() for label in group.split(",")}
            used |= set(re.findall(r"(\w+)=~", target["expr"]))
            assert used <= labels, (panel["title"], used - labels)


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        assert panel["description"]
        taken |= cells


def test_the_page_names_every_metric(metrics: CompressionMetrics) -> None:
    metrics.observe(STATS, 0)
    page = (DOCS / "metrics.md").read_text(encoding="utf-8")
    listed = set(NAME.findall(page)) | {
        "vllm:kv_compression_blocks" + s for s in ("_reserved", "_free")
    }
    shown = {re.sub(r"_(created|bucket|count|sum)$", "", name) for name in samples()}
    assert {name for name in shown if not name.endswith("_created")} <= listed | {
        name.removesuffix("_total") for name in listed
    }
    assert listed <= shown | {"vllm:kv_compression_phase_time_seconds"}


def test_figures_are_those_that_were_sent(metrics: CompressionMetrics) -> None:
    def value(name: str, **labels: str) -> float | None:
        return REGISTRY.get_sample_value(
            f"vllm:kv_compression_{name}", {"model_name": "m", "engine": "1", **labels}
        )

    metrics.observe(STATS, 1)
    assert value("ratio") == 4
    assert value("requests_total", method="cake", compressed="true") == 3
    assert value("prompt_tokens_seen_total", method="cake") == 800
    assert value("prompt_tokens_kept_total", method="cake") == 200
    assert value("layer_tokens_kept_total", layer="0") == 300
    assert value("layer_kept_share", layer="0") == 300 / 800
    assert value("phase_time_seconds_count", phase="score") == 1
    assert value("phase_time_seconds_sum", phase="move") == 0.5
    # Every path and kind is there before it first happens.
    assert value("prefills_total", path="streaming") == value("cuts_total", kind="chunk") == 0
    # Gauges are told as they stand, all else is new each time.
    metrics.observe(replace(STATS, blocks=replace(STATS.blocks, running_held=0)), 1)
    assert value("ratio") == 1.0
    assert value("blocks_held") == 3
    assert value("requests_total", method="cake", compressed="true") == 6
    assert value("blocks_freed_total") == 22
    assert value("prompt_tokens_seen_total", method="cake") == 1600
    assert value("layer_kept_share", layer="0") == 300 / 800
