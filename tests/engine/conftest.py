"""Models that are only a config.json, for whoever drives vLLM's schedulers or its start-up.

What needs vLLM is imported in the fixtures: test_hooks.py must run beside any vLLM.
"""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers."""
    from tests.support.scheduling import make_folder

    return make_folder(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with enough layers for a cascade to save anything."""
    from tests.support.scheduling import make_folder
    from tests.support.traffic import LAYERS

    return make_folder(tmp_path_factory.mktemp("deep"), LAYERS)


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for models."""
    from tests.support.refusals import models_folder

    return models_folder(tmp_path_factory)
