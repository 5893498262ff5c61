"""The server of a soak: its model, its adapter and its settings."""

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.soak.client import ADAPTER, NAME


@dataclass(frozen=True)
class Part:
    """One server of a soak.

    Attributes:
        name: For the command line.
        weight: Its share of the time, beside the others'.
        config: For --kv-compression-config.
        adapter: Whether it has a LoRA adapter.
        shares: Whether budgets may be shares of the prompt.

    """

    name: str
    weight: int
    config: dict[str, Any] = field(default_factory=dict)
    adapter: bool = False
    shares: bool = True


STREAMING = {
    "prefill": "streaming", "stream_chunk": 256, "decode_budget": 256, "decode_buffer": 64,
}  # fmt: skip
PARTS = {
    part.name: part
    for part in (
        Part("default", 1),
        Part("adapter", 1, adapter=True),
        Part("streaming", 2, STREAMING, shares=False),
    )
}
"""Servers by name: as most start one, with a LoRA adapter, and with cuts at every stage."""

PAGE = 2 * 32 * 4
"""Bytes that a block of 32 tokens takes in fp32 for each layer, KV head and dimension."""


def make_adapter(model: Path, folder: Path) -> Path:
    """Write a random LoRA adapter for a model's attention, in PEFT's format.

    Args:
        model: Folder with the model's config.json.
        folder: To be made.

    """
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    widths = {"q_proj": heads * size, "v_proj": config["num_key_value_heads"] * size}
    folder.mkdir(parents=True, exist_ok=True)
    adapter = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": model.name,
        "r": 8, "lora_alpha": 16, "bias": "none", "target_modules": sorted(widths),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(adapter), encoding="utf-8")
    dice = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, width in widths.items():
            path = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(8, hidden, generator=dice) / 8
            tensors[f"{path}.lora_B.weight"] = torch.randn(width, 8, generator=dice) / 8
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def pool_bytes(model: Path, blocks: int) -> int:
    """Return the size of a pool of so many blocks of 32 tokens in fp32."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    layers, heads = config["num_hidden_layers"], config["num_key_value_heads"]
    return int(PAGE * size * layers * heads * blocks)


def options(
    arguments: argparse.Namespace, part: Part, model: Path, adapter: Path | None
) -> list[str]:
    """Return the words of `vllm serve` behind the model.

    Args:
        arguments: Of the command line.
        part: Which server.
        model: Folder.
        adapter: Folder; None for a server without adapters.

    """
    words = [
        "--served-model-name", NAME, "--dtype", "float32", "--enforce-eager",
        "--max-model-len", "2048", "--block-size", "32",
        "--max-num-seqs", "16", "--max-num-batched-tokens", "512",
        "--kv-cache-memory-bytes", str(pool_bytes(model, arguments.blocks)),
        "--scheduling-policy", "priority",
        # Those that the choice was made with, so that near ties can be told.
        "--logprobs-mode", "processed_logprobs",
        "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
    ]  # fmt: skip
    if adapter is not None:
        # With room for one adapter only, vLLM's CPU build gives it to requests without one, too.
        words += ["--enable-lora", "--max-lora-rank", "8", "--max-loras", "2"]
        words += ["--lora-modules", f"{ADAPTER}={adapter}"]
    if not arguments.plain:
        settings: dict[str, Any] = {
            "allow": {"method": True, "budget": {"min": 64, "max": 256}, "params": True,
                      "keep": True, "decode": True},
            "reserve_tokens": 0, "check_integrity": True, **part.config,
            **json.loads(arguments.config),
        }  # fmt: skip
        words += ["--kv-compression", arguments.method, "--kv-compression-budget", "256"]
        words += ["--kv-compression-config", json.dumps(settings)]
    return [*words, *arguments.options]
