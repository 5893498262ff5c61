"""The page that says which of vLLM's tests is where names tests that exist."""

import re
from pathlib import Path

FOLDER = Path(__file__).parent


def test_every_test_of_the_page_exists_and_every_test_is_on_it() -> None:
    page = (FOLDER / "as_vllm.md").read_text(encoding="utf-8")
    named = {name for name in re.findall(r"\b(test_\w+)(?!\w*\.py)", page) if " " not in name}
    files = [FOLDER / f"test_as_vllm_{part}.py" for part in ("scheduler", "prefix_cache")]
    written = {
        name
        for file in files
        for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert written <= named
    # Beside them the page names files: vLLM's and ours.
    rest = {
        name for name in named - written if f"{name}.py" not in page and f"{name}*.py" not in page
    }
    assert rest <= {"test_priority_"}
