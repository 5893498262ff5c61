"""The HTML page of ``kvcompress inspect``: its text, its data, and that it loads nothing."""

import base64
import json
import zlib
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest

from tests.support.inspections import inspection
from vllm_kvcompress.tools.inspection import html_page
from vllm_kvcompress.tools.inspection.kept_tokens import binned
from vllm_kvcompress.tools.inspection.style import run_title


class Parsed(HTMLParser):
    """The page's elements: attributes that load something, scripts, and the marked text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[tuple[str, str | None]] = []
        self.policy = ""
        self.scripts: dict[str, str] = {}
        self.tokens: list[str] = []
        self.classes: list[str] = []
        self.elements: set[str] = set()
        self._open: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.elements.add(tag)
        self.loads += [(n, v) for n, v in attrs if n in ("src", "href", "srcset", "action", "data")]
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"] or ""
        if tag not in ("meta", "input"):
            self._open.append((tag, given))
        if tag == "i":
            self.tokens.append("")
            self.classes.append(given.get("class") or "")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        tag, given = self._open[-1] if self._open else ("", {})
        if tag == "i":
            self.tokens[-1] += data
        elif tag == "script":
            self.scripts[given.get("id") or f"script{len(self.scripts)}"] = data


def test_page_shows_the_prompt_and_nothing_of_it_is_markup() -> None:
    shown = inspection(600, 4, 2)
    parsed = Parsed(html_page.render(shown))
    assert parsed.tokens == list(shown.pieces)
    assert parsed.elements & {"b", "iframe", "img", "link"} == set()
    levels = html_page.levels(shown, shown.runs[0])
    assert parsed.classes == [f"s{level}" if level else "" for level in levels]
    assert set(levels) <= set(range(html_page.LEVELS + 1))
    # The window is kept by all, so its marks are the strongest there are.
    assert levels[-32:] == [html_page.LEVELS] * 32
    never = shown.runs[0].token_share == 0
    assert never.any()
    assert [level == 0 for level in levels] == never.tolist()


def test_page_needs_no_network() -> None:
    parsed = Parsed(html_page.render(inspection(600, 4, 2)))
    assert parsed.loads == []
    assert parsed.policy.startswith("default-src 'none'")
    assert "http" not in parsed.policy
    own = [text for text in parsed.scripts.values() if "Plotly.newPlot(chart" in text]
    assert len(own) == 1
    assert not any(word in own[0] for word in ("http", "fetch(", "import(", "XMLHttpRequest"))


def test_page_has_the_data_to_hover_over() -> None:
    shown = inspection(900, 4, 3)
    scripts = Parsed(html_page.render(shown)).scripts
    data, figure = json.loads(scripts["data"]), json.loads(scripts["figure"])
    assert [run["title"] for run in data["runs"]] == [run_title(run) for run in shown.runs]
    for packed, run in zip(data["runs"], shown.runs, strict=True):
        raw = zlib.decompress(base64.b64decode(packed["counts"]))
        counts = np.frombuffer(raw, "<u2").reshape(data["layers"], -1)
        assert (counts == run.counts).all()
        assert [int(c, 36) for c in packed["levels"]] == html_page.levels(shown, run)
    heats = [t for t in figure["data"] if t["type"] == "heatmap"]
    bars = [t for t in figure["data"] if t["type"] == "bar"]
    # cake and keydiff+cake: only the first of the two has stats here
    assert (len(heats), len(bars)) == (3, 3 + 3)
    assert all("%{customdata[0]}" in t["hovertemplate"] for t in heats)
    for trace, run in zip(heats, shown.runs, strict=True):
        z = np.frombuffer(base64.b64decode(trace["z"]["bdata"]), np.float32).reshape(4, -1)
        assert z.shape[1] == len(data["columns"])
        edges = np.frombuffer(base64.b64decode(trace["x"]["bdata"]), trace["x"]["dtype"])
        assert z == pytest.approx(binned(run, edges.astype(np.int64)), abs=1e-6)
    ends = [(span.split()[0], span.split()[-1]) for span, _ in data["columns"]]
    assert ends[0][0] == "0"
    assert ends[-1][1] == "899"
    assert all(int(b) == int(a) + 1 for (_, a), (b, _) in pairwise(ends))
    assert "log_entropy" in bars[0]["customdata"][0]
    texts = [text for _, text in data["columns"]]
    assert any("&lt;b&gt;" in text for text in texts)
    assert not any("<" in text or "\n" in text for text in texts)


@pytest.mark.parametrize("layers", [32, 80])
def test_page_of_a_long_prompt_stays_small(layers: int) -> None:
    shown = inspection(8000, layers, 3 if layers == 32 else 1)
    assert len(html_page.render(shown).encode()) < 6_000_000
