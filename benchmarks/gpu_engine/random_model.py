"""Models of a realistic shape whose weights are drawn on the device: nothing to bring along."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOAD_FORMAT = "kvcompress_random"


@dataclass(frozen=True)
class ModelShape:
    """What decides how long a step takes; the layers are Llama's."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    positions: int


LLAMA_8B = ModelShape(8, 4096, 14336, 32, 8, 128, 32768, 131072)
"""Eight layers of Llama 3.1 8B, and a quarter of its vocabulary."""

SMALL = ModelShape(4, 1024, 2048, 16, 4, 128, 4096, 32768)
"""For checks: quick to make; heads as in LLAMA_8B."""

TINY = ModelShape(2, 64, 128, 4, 2, 32, 256, 1024)
"""For Triton's interpreter."""


def write_config(folder: Path, shape: ModelShape) -> Path:
    """Write a model's folder, which holds config.json alone; return it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_size,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.positions,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def register_loader() -> None:
    """Teach vLLM the load format :data:`LOAD_FORMAT`; doing it twice is harmless."""
    import torch
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    class RandomLoader(DummyModelLoader):
        """Weights that keep activations of one size, so that attention decides what comes out.

        vLLM's own dummy weights are so small that every token attends to all others alike.
        """

        def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
            parameters = dict(model.named_parameters())
            device = next(iter(parameters.values())).device
            generator = torch.Generator(device).manual_seed(0)
            for name, weight in parameters.items():
                if weight.dim() < 2:
                    weight.data.fill_(1.0)
                    continue
                # Queries and keys twice as large as the rest: attention with peaks.
                gain = 2.0 if "qkv_proj" in name else 1.0
                fan_in = 1 if "embed_tokens" in name else weight.shape[1]
                weight.data.normal_(0.0, gain * fan_in**-0.5, generator=generator)

    register_model_loader(LOAD_FORMAT)(RandomLoader)
