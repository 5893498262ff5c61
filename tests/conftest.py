"""Settings of the whole suite: engines run in this process, offline, on few threads."""

import os

import pytest
from hypothesis import settings

# Read by vLLM when it is imported, so they have to be here rather than in a fixture.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
# It would override the pool sizes that tests choose.
os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)

from tests.support.interpreted_kernels import import_interpreted
from tests.support.poison import poison_allocations

import_interpreted()
poison_allocations()

# A busy machine is no failure.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run what compares vLLM with our table first: it explains what fails later."""
    items.sort(key=lambda item: item.path.name != "test_hooks.py")


pytest_plugins = ["tests.support.golden_option", "tests.support.worker_groups"]
