"""What a model's configuration tells is refused before it is built: no layer says more later."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support.refusals import BASE, GEMMA3, GEMMA4, LLAMA, QWEN2

WIDE = {**BASE, "num_attention_heads": 2, "num_key_value_heads": 1}
"""Heads of 32, the smallest that CPU attention has."""
GEMMA4_ALIKE = {**GEMMA4, "global_head_dim": 32}
"""All layers of one size."""

MODELS = {
    "llama": LLAMA,
    "mistral": {**WIDE, "architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    | {"sliding_window": None},
    "qwen2": {**QWEN2, **WIDE, "use_sliding_window": False},
    "phi3": {**WIDE, "architectures": ["Phi3ForCausalLM"], "model_type": "phi3"}
    | {"sliding_window": None, "pad_token_id": 0},
    "gemma3": GEMMA3,
    "gemma4": GEMMA4_ALIKE,
    "gpt_oss": {**GEMMA3, "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss"}
    | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "cohere2": {**GEMMA3, "architectures": ["Cohere2ForCausalLM"], "model_type": "cohere2"},
    "falcon": {**WIDE, "architectures": ["FalconForCausalLM"], "model_type": "falcon"}
    | {"alibi": False, "multi_query": True, "parallel_attn": True},
    "mixtral": {**WIDE, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
}
"""Models that nothing refuses: one of each kind of layers that the rules look at."""

BUILD = """
import json, sys
from pathlib import Path
from tests.support.model_classes import inspect_in_process
from tests.support.refusals import start
from vllm.config import set_current_vllm_config
from vllm.distributed import destroy_model_parallel, init_distributed_environment
from vllm.distributed import initialize_model_parallel
from vllm.model_executor.model_loader.utils import initialize_model
from vllm_kvcompress.engine.attention import register_backends
from vllm_kvcompress.engine.attention.common import ArenaImpl
from vllm_kvcompress.engine.layer_checks import check_specs
from vllm_kvcompress.engine.model_layers import layers_of
from vllm_kvcompress.engine.plugin import register
from vllm_kvcompress.engine.scheduler.arena_spec import ArenaSpec

register(); inspect_in_process(); register_backends()
root = Path(sys.argv[1])
ready = False
for name, model in json.loads(sys.stdin.read()).items():
    config = start(root, model=model, dtype="float32", enforce_eager=True)
    with set_current_vllm_config(config):
        if ready:
            destroy_model_parallel()  # its groups are those of the last model
        else:
            init_distributed_environment(1, 0, f"file://{root}/store", 0, "gloo")
        ready = True
        initialize_model_parallel(1, 1)
        initialize_model(vllm_config=config)
        layers = config.compilation_config.static_forward_context
        specs = {
            name: layer.attn_backend.customize_spec(layer.get_kv_cache_spec(config))
            for name, layer in layers.items()
            if hasattr(layer, "attn_backend")
        }
    check_specs(specs, layers, ArenaImpl)
    arena = sum(isinstance(spec, ArenaSpec) for spec in specs.values())
    assert arena == layers_of(config).compressed, (name, arena, layers_of(config))
    print("built", name)
"""


def test_layers_of_a_model_that_is_accepted_are_accepted(tmp_path: Path) -> None:
    """Models whose layers would be refused once built: REFUSED_MODELS, which no start accepts."""
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(tmp_path)],
        input=json.dumps(MODELS),
        env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n")[:-1] == [f"built {name}" for name in MODELS]
