"""A model with attention sinks, gpt-oss: random weights, its sinks a parameter with gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.engine import Engine, setting
from tests.e2e.harness import ALL, Engines

pytestmark = pytest.mark.engine

PROMPTS = [[(7 * i + n) % 480 + 3 for i in range(300 + 90 * n)] for n in range(3)]
LAYERS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers with windows, two without."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(7)
    config = GptOssConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        sliding_window=128,
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=["sliding_attention", "full_attention"] * (LAYERS // 2),
    )
    network = GptOssForCausalLM(config).float()
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "sink" in name or weight.ndim >= 2:
                weight.normal_(0, 1.0 if "sink" in name else 0.1)
    folder = tmp_path_factory.mktemp("sinks")
    network.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("step", [1024, 192], ids=["one-step", "chunked"])
def test_scored_within_the_step_and_after_it(engines: Engines, model: Path, step: int) -> None:
    settings: dict[str, Any] = {"max_num_batched_tokens": step, "kv_cache_memory_bytes": 64 << 20}
    config = {"allow": {**ALL, "method": ["none", "scatter", "cake", "dynamickv"]}}
    engine: Engine = engines.get(
        "cake", 128, model=model, config=config, skip_tokenizer_init=True, **settings
    )
    layers = engine.core.vllm_config.compilation_config.static_forward_context.values()
    sinks = [layer.impl.sinks for layer in layers if hasattr(layer, "impl")]
    assert [parameter.requires_grad for parameter in sinks] == [True] * LAYERS
    kept = engine.record_kept()
    found = {
        method: engine.generate(PROMPTS, 12, detokenize=False, **setting(method))
        for method in ("none", "scatter", "cake", "dynamickv")
    }
    assert found["scatter"] == found["none"]
    assert len(kept) == 2 * len(PROMPTS)
    assert all(len(layers) == LAYERS // 2 for layers in kept)
