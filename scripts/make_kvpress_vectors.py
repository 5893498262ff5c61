#!/usr/bin/env python3
"""Record what kvpress keeps of fixed inputs, for tests/methods/test_kvpress.py.

Runs the presses of an installed kvpress on the attention layers of a tiny Llama with random
weights, one layer after another, and writes inputs, scores and kept tokens to npz files. Not part
of the tests: kvpress wants another version of transformers than vLLM, so it gets an environment of
its own, which needs nothing of this repository:

    python3 -m venv kvpress-env
    kvpress-env/bin/pip install kvpress==0.5.5 torch
    kvpress-env/bin/python scripts/make_kvpress_vectors.py

The committed files come from kvpress 0.5.5 with torch 2.13 and transformers 5.2 on a CPU; versions
and parameters are part of every file. tests/golden/README.md says what the arrays are.
"""

import argparse
import json
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

TARGET = Path(__file__).resolve().parent.parent / "tests" / "golden" / "kvpress"
LAYERS, HEADS, KV_HEADS, HEAD_SIZE, TOKENS, QUERIES = 4, 4, 2, 16, 160, 32
SHARPNESS = 1.5  # of the attention: weights this much larger than those that keep variances

# File name: press, its parameters.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "snapkv_w8_k5": ("SnapKVPress", {"compression_ratio": 0.5, "window_size": 8}),
    "snapkv_w32_k7": (
        "SnapKVPress",
        {"compression_ratio": 0.75, "window_size": 32, "kernel_size": 7},
    ),
    "pyramidkv_beta20": ("PyramidKVPress", {"compression_ratio": 0.75, "window_size": 2}),
    "pyramidkv_beta5": (
        "PyramidKVPress",
        {"compression_ratio": 0.75, "window_size": 8, "beta": 5},
    ),
    "pyramidkv_whole_first_layer": (
        "PyramidKVPress",
        {"compression_ratio": 0.5, "window_size": 8},
    ),
    "streamingllm": ("StreamingLLMPress", {"compression_ratio": 0.75}),
    "streamingllm_no_sinks": ("StreamingLLMPress", {"compression_ratio": 0.5, "n_sink": 0}),
    "tova": ("TOVAPress", {"compression_ratio": 0.75}),
    "keydiff": ("KeyDiffPress", {"compression_ratio": 0.75}),
    "knorm": ("KnormPress", {"compression_ratio": 0.75}),
}


class Layer(NamedTuple):
    """One attention layer and what it sees: hidden states [1, S, H D], keys [1, N, S, D]."""

    module: LlamaAttention
    hidden: torch.Tensor
    position_embeddings: tuple[torch.Tensor, torch.Tensor]
    queries: torch.Tensor
    keys: torch.Tensor


def make_layers() -> list[Layer]:
    """The fixed inputs: fp32, seeded, queries and keys after RoPE."""
    config = LlamaConfig(
        hidden_size=HEADS * HEAD_SIZE,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_SIZE,
        num_hidden_layers=LAYERS,
        attn_implementation="eager",
    )
    rotary = LlamaRotaryEmbedding(config)
    generator = torch.Generator().manual_seed(20)
    layers = []
    for index in range(LAYERS):
        module = LlamaAttention(config, index)
        for weight in (module.q_proj.weight, module.k_proj.weight):
            drawn = torch.randn(weight.shape, generator=generator)
            weight.data = drawn * SHARPNESS / weight.shape[1] ** 0.5
        hidden = torch.randn(1, TOKENS, HEADS * HEAD_SIZE, generator=generator)
        # Keys that share a direction, as in real models; without one KeyDiff has nothing to find.
        hidden += torch.randn(1, 1, HEADS * HEAD_SIZE, generator=generator)
        cos, sin = rotary(hidden, torch.arange(TOKENS)[None])
        shape = (1, TOKENS, -1, HEAD_SIZE)
        queries = module.q_proj(hidden).view(shape).transpose(1, 2)
        keys = module.k_proj(hidden).view(shape).transpose(1, 2)
        queries, keys = apply_rotary_pos_emb(queries, keys, cos, sin)
        layers.append(Layer(module, hidden, (cos, sin), queries, keys))
    return layers


def run(press: Any, layer: Layer) -> tuple[np.ndarray, np.ndarray]:
    """A press's scores, fp32 [N, S], and the tokens it keeps, bool [N, S]."""
    kwargs = {"position_embeddings": layer.position_embeddings}
    # Values that spell the token's number say which ones were kept.
    values = torch.arange(TOKENS, dtype=torch.float32)[None, None, :, None].expand_as(layer.keys)
    arguments = (layer.module, layer.hidden, layer.keys, values, None, kwargs)
    scores = press.score(*arguments)[0]
    _, left = press.compress(*arguments)
    kept = np.zeros((KV_HEADS, TOKENS), dtype=np.bool_)
    np.put_along_axis(kept, left[0, :, :, 0].long().numpy(), True, axis=1)
    return scores.float().numpy(), kept


def main() -> None:
    """Write all files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=TARGET, help="folder of the npz files")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    kvpress = import_module("kvpress")  # absent where the rest of this repository is checked
    versions = {name: version(name) for name in ("kvpress", "torch", "transformers")}
    with torch.no_grad():
        layers = make_layers()
        np.savez_compressed(
            out / "inputs.npz",
            queries=torch.cat([layer.queries[..., -QUERIES:, :] for layer in layers]).numpy(),
            keys=torch.cat([layer.keys for layer in layers]).numpy(),
        )
        for name, (press_name, params) in CASES.items():
            press = getattr(kvpress, press_name)(**params)
            scores, kept = zip(*(run(press, layer) for layer in layers), strict=True)
            meta = json.dumps({"press": press_name, "params": params, "versions": versions})
            np.savez_compressed(
                out / f"{name}.npz",
                meta=np.frombuffer(meta.encode(), dtype=np.uint8),
                scores=np.stack(scores),
                kept=np.stack(kept),
            )
            print(f"{name}: {np.stack(kept).sum(axis=2).tolist()} tokens kept per layer and head")


if __name__ == "__main__":
    main()
