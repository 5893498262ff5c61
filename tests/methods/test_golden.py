"""Faithful modes against outputs recorded from the released code, whichever files are there.

Run with ``--golden-dir DIR`` for another set of vectors. What is checked is decided by the
parameters and arrays each file holds, so that cases unknown to this file are covered as well.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.budgets import token_budgets
from tests.support.golden_files import Golden, kind, load
from tests.support.layers import score_layers
from tests.support.released_pipelines import (
    CakePrefill,
    DynamicPrefill,
    ReleasedCake,
    ReleasedDynamicKV,
)
from vllm_kvcompress.methods import Cake, DynamicKV, LayerScores, Method
from vllm_kvcompress.methods.released_cake import adjust_budgets

# Relative tolerance of statistics and of ranks by score. Half precision is for reference only.
RTOL = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 4e-2}
RANK_RTOL = {"float32": 2e-6, "float16": 1e-2, "bfloat16": 4e-2}
CLOSE_CALL = 1e-6  # relative gap below which rounding may swap kept and dropped tokens


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    folder: Path = metafunc.config.getoption("golden_dir")
    files = sorted(path for path in folder.glob("*") if path.suffix in (".npz", ".json"))
    if "folder" in metafunc.fixturenames:
        metafunc.parametrize("folder", [folder], ids=str)
    if "any_file" in metafunc.fixturenames:
        metafunc.parametrize("any_file", files, ids=lambda path: path.name)
    kinds = {
        "adjust_file": ("adjust",),
        "cake_file": ("cake",),
        "dynamickv_file": ("dynamickv",),
        "end_to_end_file": ("cake", "dynamickv"),
    }
    for name in kinds.keys() & metafunc.fixturenames:
        chosen = [path for path in files if kind(path) in kinds[name]]
        metafunc.parametrize(name, chosen, ids=lambda path: path.stem)


def test_there_are_vectors(folder):
    assert folder.is_dir(), f"--golden-dir {folder} is not a folder"
    assert any(folder.glob("*.npz")), f"no *.npz file in {folder}"


def test_every_file_is_understood(any_file):
    assert kind(any_file) != "unknown", (
        f"{any_file.name}: neither budget fix-up cases (JSON list with budget_list, total_budget, "
        "seq_len, out) nor an npz whose meta names the method cake or dynamickv"
    )


def test_adjust_budgets(adjust_file):
    for number, case in enumerate(json.loads(adjust_file.read_text(encoding="utf-8"))):
        found = adjust_budgets(case["budget_list"], case["total_budget"], case["seq_len"])
        assert found == case["out"], f"case {number}"


# ------------------------------------------------------------------------------------------ CAKE


def cake_params(golden: Golden) -> dict[str, Any]:
    meta = golden.meta
    names = {"kernel": "pool_kernel"} | {n: n for n in ("window", "tau1", "tau2", "gamma")}
    return {ours: meta[theirs] for ours, theirs in names.items()}


def cake_pipeline(golden: Golden, *, cascading: bool) -> ReleasedCake:
    capacity = golden.meta["cache_size"]
    return ReleasedCake(**cake_params(golden), capacity=capacity, cascading=cascading)


@lru_cache(maxsize=32)
def cake_run(path: Path, cascading: bool | None = None) -> CakePrefill:
    golden = load(path)
    cascading = golden.meta["cascading"] if cascading is None else cascading
    pipeline = cake_pipeline(golden, cascading=cascading)
    return pipeline.prefill(golden.real("q_window"), golden.prompt_keys)


def test_cake_statistics(cake_file):
    golden, run = load(cake_file), cake_run(cake_file)
    golden.need("H", "V", "pref", "evict_scores")
    rtol = RTOL[golden.meta["dtype"]]
    columns = np.array(run.preferences)
    np.testing.assert_allclose(columns[:, 0], golden.arrays["H"], rtol=rtol)
    np.testing.assert_allclose(columns[:, 1], golden.arrays["V"], rtol=rtol)
    # A power of a small V is a multiple of half precision's smallest step, one of which may differ.
    step = 6e-8 * golden.arrays["H"].max() ** (1 / golden.meta["tau1"])
    np.testing.assert_allclose(
        columns[:, 2],
        golden.arrays["pref"],
        rtol=rtol / min(1.0, golden.meta["tau1"], golden.meta["tau2"]),
        atol=step if golden.meta["dtype"] == "float16" else 0,
    )
    expected = golden.arrays["evict_scores"]
    np.testing.assert_allclose(
        run.scores.float(), expected, rtol=rtol, atol=0 if golden.exact else rtol * expected.max()
    )


def skip_unless_same_preferences(golden: Golden, run: CakePrefill) -> None:
    if not golden.exact and not np.array_equal(
        np.array(run.preferences)[:, 2], golden.arrays["pref"]
    ):
        pytest.skip("half-precision preferences round differently here, so budgets may differ")


def test_cake_stage_budgets(cake_file):
    golden, run = load(cake_file), cake_run(cake_file)
    skip_unless_same_preferences(golden, run)
    golden.need("stage_budget")
    for name in ("stage_budget", "stage_budget_raw", "stage_kept"):
        if name in golden.arrays:
            expected, found = golden.arrays[name], getattr(run, name).numpy()
            decided = (expected >= 0) & (found >= 0) if name.endswith("raw") else expected >= 0
            assert np.array_equal(found[decided], expected[decided]), name
    if "final_budget" in golden.arrays:
        assert run.stage_budget[-1].tolist() == golden.arrays["final_budget"].tolist()


def assert_same_tokens(golden: Golden, scores: Tensor, found: Tensor, expected: Tensor) -> None:
    """Storage order by score, window rows in place, and the same sets unless it is a close call."""
    assert found.shape == expected.shape
    history = golden.history
    rtol = RANK_RTOL[golden.meta["dtype"]]
    in_history = expected < history
    assert torch.equal(found < history, in_history)
    assert torch.equal(found[~in_history], expected[~in_history])
    rank = scores.float()
    ours = rank.gather(-1, found.clamp(max=history - 1))[in_history]
    theirs = rank.gather(-1, expected.clamp(max=history - 1))[in_history]
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=0 if golden.exact else 1e-5)
    if not golden.exact:
        return
    for row, head in np.ndindex(*expected.shape[:2]):
        a, b = (set(ids[row, head].tolist()) for ids in (found, expected))
        line = rank[row, head]
        kept = torch.tensor(sorted(i for i in b if i < history), dtype=torch.int64)
        dropped = torch.ones(history, dtype=torch.bool)
        dropped[kept] = False
        if len(kept) and dropped.any():
            last, first = float(line[kept].min()), float(line[dropped].max())
            if last - first <= CLOSE_CALL * abs(last):
                continue
        assert a == b


@pytest.mark.parametrize("oneshot", [False, True], ids=["cascade", "oneshot"])
def test_cake_kept_tokens(cake_file, oneshot):
    golden = load(cake_file)
    run = cake_run(cake_file, False) if oneshot else cake_run(cake_file)
    expected = golden.kept("oneshot_kept" if oneshot else "kept")
    skip_unless_same_preferences(golden, run)
    if oneshot and "oneshot_budget" in golden.arrays:
        assert run.stage_budget[-1].tolist() == golden.arrays["oneshot_budget"].tolist()
    scores = torch.from_numpy(golden.arrays["evict_scores"])
    for layer, ids in enumerate(run.kept):
        assert_same_tokens(golden, scores[layer], ids, expected[layer])


def test_cake_decode(cake_file):
    golden = load(cake_file)
    golden.need("q_decode", "final_budget")
    steps = golden.arrays["q_decode"].shape[3]
    queries, keys = golden.real("q_decode"), golden.real("k")
    values = golden.values(golden.meta["Hkv"])
    pipeline = cake_pipeline(golden, cascading=True)
    for layer, ids in enumerate(golden.kept("kept")):
        budget = int(golden.arrays["final_budget"][layer])
        for step in range(steps if golden.exact else 1):
            token = golden.meta["S"] + step
            ids, output = pipeline.decode(
                ids, budget, queries[layer, :, :, step], keys[layer], values, token
            )
            compare_decode_step(golden, layer, step, ids, output)


def compare_decode_step(golden: Golden, layer: int, step: int, ids: Tensor, output: Tensor) -> None:
    assert ids.shape[-1] >= golden.meta["window"]
    if "dec_len" in golden.arrays:
        lengths = golden.arrays["dec_len"]
        last = golden.meta["T"] - 1
        if lengths.ndim == 2:
            assert ids.shape[-1] == lengths[step, layer]
        elif step == last:
            assert ids.shape[-1] == lengths[layer]
    if "dec_attn_out" in golden.arrays:
        expected = golden.arrays["dec_attn_out"][step, layer]
        rtol, atol = (1e-5, 1e-4) if golden.exact else (2e-2, 0.5)
        np.testing.assert_allclose(output.flatten(1).numpy(), expected, rtol=rtol, atol=atol)
    name = f"dec{step}_kept_l{layer}"
    if name in golden.arrays:
        assert golden.arrays[name].shape == tuple(ids.shape)
        if golden.exact:
            assert ids.tolist() == golden.arrays[name].tolist(), name


# ------------------------------------------------------------------------------------- DynamicKV


@lru_cache(maxsize=32)
def dynamic_run(path: Path) -> DynamicPrefill:
    golden = load(path)
    return dynamic_pipeline(golden).prefill(golden.real("q_window"), golden.prompt_keys)


def dynamic_params(golden: Golden) -> dict[str, Any]:
    meta = golden.meta
    return {
        "window": meta["window"],
        "kernel": meta["kernel"],
        "pooling": "max" if meta["pooling"].startswith("max") else "avg",
        "r_max": meta["radio_max"],
        "every": meta["update_every"],
    }


def dynamic_pipeline(golden: Golden) -> ReleasedDynamicKV:
    return ReleasedDynamicKV(**dynamic_params(golden), capacity=golden.meta["max_capacity_prompt"])


def test_dynamickv_scores(dynamickv_file):
    golden, run = load(dynamickv_file), dynamic_run(dynamickv_file)
    golden.need("scores")
    rtol = RTOL[golden.meta["dtype"]]
    np.testing.assert_allclose(run.scores.float(), golden.arrays["scores"], rtol=rtol)


@pytest.mark.parametrize("name", ["update_budget", "update_cache_len"])
def test_dynamickv_updates(dynamickv_file, name):
    golden, run = load(dynamickv_file), dynamic_run(dynamickv_file)
    golden.need(name)
    found = getattr(run, name)
    expected = golden.arrays[name]
    assert len(found) == len(expected)
    for line, values in zip(expected, found, strict=True):
        assert values == line[: len(values)].tolist()
        assert (line[len(values) :] < 0).all()


def test_dynamickv_kept_tokens(dynamickv_file):
    golden, run = load(dynamickv_file), dynamic_run(dynamickv_file)
    golden.need("scores")
    expected = golden.kept("kept")
    scores = torch.from_numpy(golden.arrays["scores"])
    for layer, ids in enumerate(run.kept):
        assert_same_tokens(golden, scores[layer], ids, expected[layer])
    if "dup_tokens" in golden.arrays:
        assert run.duplicates() == golden.arrays["dup_tokens"].tolist()


def test_dynamickv_decode(dynamickv_file):
    golden = load(dynamickv_file)
    golden.need("q_decode", "dec_attn_out")
    queries, keys = golden.real("q_decode"), golden.real("k")
    values = golden.values(golden.meta["Hkv"])
    pipeline = dynamic_pipeline(golden)
    for layer, ids in enumerate(golden.kept("kept")):
        for step in range(queries.shape[3]):
            ids, output = pipeline.decode(
                ids,
                queries[layer, :, :, step],
                keys[layer],
                values,
                golden.meta["S"] + step,
            )
            compare_decode_step(golden, layer, step, ids, output)


# ---------------------------------------------------------- the methods on the recorded inputs


def method_for(golden: Golden, *, faithful: bool) -> Method:
    if golden.meta["method"] == "cake":
        return Cake(**cake_params(golden), faithful=faithful)
    return DynamicKV(**dynamic_params(golden), faithful=faithful)


def score_all(golden: Golden, method: Method, row: int = 0) -> list[LayerScores]:
    queries, keys = golden.real("q_window")[:, row], golden.prompt_keys[:, row]
    return score_layers(method, queries, keys, golden.base)


def test_corrected_cake_statistics(cake_file):
    """fp32 statistics of the corrected mode agree with the release where that was fp32, too."""
    golden = load(cake_file)
    golden.need("H", "V", "evict_scores")
    if not golden.exact:
        pytest.skip("recorded in half precision")
    rows = [
        score_all(golden, method_for(golden, faithful=False), b) for b in range(golden.meta["B"])
    ]
    for name, array in (("log_entropy", "H"), ("log_shift", "V")):
        total = [sum(np.exp(row[i].stat(name)) for row in rows) for i in range(golden.meta["L"])]
        np.testing.assert_allclose(total, golden.arrays[array], rtol=1e-5)
    for b, row in enumerate(rows):
        found = np.stack([layer.tokens.numpy() for layer in row])
        np.testing.assert_allclose(found, golden.arrays["evict_scores"][:, b], rtol=1e-5)


def test_faithful_method_has_released_budgets(end_to_end_file):
    golden = load(end_to_end_file)
    meta = golden.meta
    if meta["B"] != 1 or not golden.exact:
        pytest.skip("a method sees one request; half precision is for reference only")
    method = method_for(golden, faithful=True)
    found = method.weights(score_all(golden, method), base=golden.base, num_layers=meta["L"])
    if meta["method"] == "cake":
        golden.need("oneshot_budget")
        if meta["S"] <= meta["cache_size"] + meta["window"]:
            assert found.sum() <= golden.base * meta["L"]
        else:
            assert found.tolist() == golden.arrays["oneshot_budget"].tolist()
    else:
        golden.need("update_budget")
        expected = golden.arrays["update_budget"][-1]
        if meta["L"] % meta["update_every"]:
            assert len(found) == meta["L"]
        else:
            assert found.tolist() == expected.tolist()


def test_corrected_budgets_spend_the_pool(end_to_end_file):
    """Where the release loses budget, keeps too much or cuts short prompts, we do not."""
    golden = load(end_to_end_file)
    layers = golden.meta["L"]
    method = method_for(golden, faithful=False)
    found = token_budgets(method, score_all(golden, method), base=golden.base, num_layers=layers)
    pool = min(golden.base * layers, golden.history * layers)
    assert found.sum() == pool
    assert found.max() <= golden.history
    kept = [ids.shape[-1] - golden.meta["window"] for ids in golden.kept("kept")]
    duplicated = "dup_tokens" in golden.arrays and golden.arrays["dup_tokens"].any()
    if sum(kept) != pool or duplicated:
        assert found.tolist() != kept
