"""The numbers behind a picture, for other programs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from vllm_kvcompress.tools.inspection.kept_tokens import Inspection


def save_arrays(inspection: Inspection, path: Path) -> None:
    """Write everything that the picture and the page are made of to ``path`` (npz).

    ``token_ids`` int64 [S] and ``pieces`` (strings, S) are the prompt. Of run r, counted from 0:
    ``r_kept`` int64 [N, sum of T_l] holds the kept ids of all layers one after another,
    ``r_lengths`` int64 [L] is T_l, ``r_weights`` fp64 [L] (empty if the method has none) and
    ``r_NAME`` fp64 [L] every number the allocator read. ``meta`` is a JSON text: model, budget,
    question, the layers' numbers in the model, and per run method, window and block size, and
    ``fallback``: why the method failed, so that the most recent tokens were kept; null if it did
    not.

    Raises:
        OSError: The file cannot be written.

    """
    meta = {
        "model": inspection.model,
        "budget": inspection.budget,
        "question": inspection.question,
        "layers": inspection.layer_numbers,
        "runs": [
            {
                "method": run.method,
                "window": run.window,
                "block_size": run.block_size,
                "fallback": run.fallback,
            }
            for run in inspection.runs
        ],
    }
    arrays = {
        "meta": np.array(json.dumps(meta)),
        "token_ids": inspection.token_ids,
        "pieces": np.array(inspection.pieces),
    }
    for number, run in enumerate(inspection.runs):
        arrays[f"{number}_kept"] = np.concatenate(run.kept, axis=1)
        arrays[f"{number}_lengths"] = run.lengths
        arrays[f"{number}_weights"] = np.zeros(0) if run.weights is None else run.weights
        for name in run.stats[0] if run.stats else ():
            arrays[f"{number}_{name}"] = np.array([s[name] for s in run.stats], dtype=np.float64)
    with path.open("wb") as file:  # given a name, NumPy would append .npz to it
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
