"""A plugin for pytest: which files share a worker, and in which order workers take them."""

from typing import Any

import pytest

GROUPS = (
    # One engine for many files: compatibility last, it needs others.
    (
        "tests/e2e/test_per_request.py",
        "tests/e2e/test_cake.py",
        "tests/e2e/test_traffic.py",
        "tests/e2e/test_plan_figures.py",
        "tests/e2e/test_cascade.py",
        "tests/e2e/test_method_faults.py",
        "tests/e2e/test_decode_budget.py",
        "tests/e2e/test_streaming.py",
        "tests/e2e/test_seeds.py",
        "tests/e2e/test_inference_mode.py",
        "tests/e2e/test_kept_prompt.py",
        "tests/e2e/test_random_traffic.py",
        "tests/e2e/test_scatter.py",
        "tests/e2e/test_compatibility.py",
    ),
    # One process with Triton's interpreter.
    ("tests/e2e/test_gpu_path.py", "tests/e2e/test_gpu_start.py", "tests/e2e/test_v2.py"),
    # Two servers; the one that does its worst to them comes last.
    (
        "tests/e2e/test_server.py",
        "tests/e2e/test_metrics.py",
        "tests/e2e/test_requests_http.py",
        "tests/e2e/test_fuzz.py",
    ),
    ("tests/e2e/test_quality.py", "tests/e2e/test_against_transformers.py"),
    ("tests/e2e/test_eval.py",),
    ("tests/e2e/test_hybrid.py",),
    ("tests/e2e/test_sinks.py",),
    ("tests/tools/test_eval_tasks.py",),
    ("tests/e2e/test_lm_eval.py",),
    ("tests/e2e/test_third_party.py",),
    ("tests/e2e/test_batch_inference.py",),
    ("tests/e2e/test_inspect.py",),
    ("tests/e2e/test_bench.py",),
    ("tests/engine/test_compatibility.py",),
    ("tests/engine/test_admission_traffic.py",),
)
"""Files that share a worker; those that take longest come first. Any other file is alone."""

_PLACES = {
    file: (number, place) for number, group in enumerate(GROUPS) for place, file in enumerate(group)
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the tests, the groups that take longest first."""
    items.sort(key=lambda item: _PLACES.get(_file(item.nodeid), (len(GROUPS), 0)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give a worker all tests of a group, in place of the scheduler that ``--dist`` names.

    The marks that ``--dist loadgroup`` reads have no effect with pytest 9.2 and pytest-xdist 3.8.
    """
    from xdist.scheduler import LoadScopeScheduling

    class GroupScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return GroupScheduling(config, log)


def group_of(nodeid: str) -> str:
    """Name of a test's group: the first of its files."""
    file = _file(nodeid)
    return GROUPS[_PLACES[file][0]][0] if file in _PLACES else file


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0]
