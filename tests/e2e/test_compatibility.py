"""What docs/compatibility.md says works beside compression, on a real engine.

Where a feature has nothing to do with what is kept, ``scatter`` says whether it is served right:
it keeps every token on pages of foreign layers, so its answers are plain vLLM's to the last bit.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.e2e.cut_model import NUM_TOKENS, first_layers
from tests.e2e.engine import Engine, greedy, setting
from tests.e2e.harness import LAYERS, MODELS, REPO, SMALL, Engines, small_model

pytestmark = pytest.mark.engine

BUDGET = 256
POOL: dict[str, Any] = {"kv_cache_memory_bytes": 64 << 20}
METHODS: dict[str | None, int | None] = {None: None, "scatter": 1024, "cake": BUDGET}
EITHER = {"allow": {"method": ["scatter", "cake"]}}


@pytest.fixture
def three(engines: Engines) -> dict[str | None, Engine]:
    """Plain vLLM, every token kept, and real compression."""
    return {None: engines.get(), "scatter": engines.get("scatter"), "cake": engines.open()}


def two(engines: Engines, **settings: Any) -> dict[str | None, tuple[Engine, dict[str, Any]]]:
    """As `three`, with one engine for both methods: engines and what requests set."""
    plain = engines.get(**settings, **POOL)
    either = engines.get("scatter", BUDGET, config=EITHER, **settings, **POOL)
    return {None: (plain, {}), "scatter": (either, {}), "cake": (either, setting("cake"))}


def ask(engine: Engine, prompts: list[Any], params: Any, **options: Any) -> list[Any]:
    """VLLM's outputs of prompts that run together."""
    given = [{"prompt_token_ids": p} if isinstance(p, list) else p for p in prompts]
    outputs: list[Any] = engine.llm.generate(given, params, use_tqdm=False, **options)
    return outputs


def answers(outputs: list[Any]) -> list[list[tuple[list[int], float]]]:
    """Tokens and log-probability of every completion."""
    return [[(list(o.token_ids), o.cumulative_logprob) for o in r.outputs] for r in outputs]


# --- sampling ------------------------------------------------------------------------------------


def test_parallel_sampling(three: dict[str | None, Engine], prose: list[int]) -> None:
    params = greedy(12, n=3, temperature=1.0, seed=7, logprobs=0)
    found = {m: answers(ask(e, [prose[:400]], params)) for m, e in three.items()}
    assert found["scatter"] == found[None]
    assert len({tuple(tokens) for tokens, _ in found["cake"][0]}) == 3
    assert found["cake"] != found[None]


def test_prompt_logprobs_are_plain_vllms(three: dict[str | None, Engine], prose: list[int]) -> None:
    """They belong to the prompt, which is computed before anything is evicted."""
    params = greedy(8, prompt_logprobs=2)
    found = {}
    for method, engine in three.items():
        (output,) = ask(engine, [prose[:400]], params)
        found[method] = [
            None if at is None else {token: entry.logprob for token, entry in at.items()}
            for at in output.prompt_logprobs
        ]
    assert len(found[None]) == 400
    assert found["scatter"] == found[None]
    assert found["cake"] == found[None]


def test_beam_search_is_plain_vllms(three: dict[str | None, Engine], prose: list[int]) -> None:
    """Each of vLLM's beams asks for one token of a new prompt: nothing is read after a cut."""
    from vllm.sampling_params import BeamSearchParams

    params = BeamSearchParams(beam_width=3, max_tokens=5, ignore_eos=True)
    found = {}
    for method, engine in three.items():
        before = engine.stats["prompt_cuts"]
        (result,) = engine.llm.beam_search([{"prompt_token_ids": prose[:400]}], params)
        found[method] = [(s.tokens, round(s.cum_logprob, 4)) for s in result.sequences]
        assert not engine.compressed or engine.stats["prompt_cuts"] > before
    assert len(found[None]) == 3
    assert found["scatter"] == found["cake"] == found[None]


def test_structured_output(three: dict[str | None, Engine], prose: list[int]) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    rules = [
        StructuredOutputsParams(json={"enum": ["north", "south"]}),
        StructuredOutputsParams(regex="[a-c]{4}-[0-9]{3}"),
        StructuredOutputsParams(choice=["yes, it is", "no, it is not"]),
    ]
    params = [greedy(40, ignore_eos=False, structured_outputs=rule) for rule in rules]
    found = {}
    for method, engine in three.items():
        outputs = ask(engine, [prose[:400]] * 3, params)
        found[method] = [o.outputs[0].text for o in outputs]
        schema, code, choice = found[method]
        assert json.loads(schema) in ("north", "south")
        assert re.fullmatch("[a-c]{4}-[0-9]{3}", code)
        assert choice in ("yes, it is", "no, it is not")
    assert found["scatter"] == found[None]


# --- the engine's life ---------------------------------------------------------------------------


def test_the_prefix_cache_is_reset_under_running_requests(
    three: dict[str | None, Engine], prose: list[int]
) -> None:
    """What vLLM offers for new weights: all requests are preempted and replayed."""
    engine = three["cake"]
    expected = engine.generate([prose[:400], prose[100:420]], 20)
    engine.add(prose[:400], 20)
    engine.add(prose[100:420], 20)
    for step, _ in enumerate(engine.steps(), start=1):
        if step == 6:
            assert engine.llm.llm_engine.reset_prefix_cache(reset_running_requests=True)
            break
    assert sorted(engine.drain().values()) == sorted(expected)


def test_pausing_and_going_on(three: dict[str | None, Engine], prose: list[int]) -> None:
    engine = three["cake"]
    expected = engine.generate([prose[:400]], 8)
    engine.llm.sleep(level=0)
    engine.llm.wake_up(tags=["scheduling"])
    assert engine.generate([prose[:400]], 8) == expected


# --- prompts -------------------------------------------------------------------------------------


def test_prompt_embeds_answer_as_tokens_do(engines: Engines, prose: list[int]) -> None:
    with safe_open(str(small_model() / "model.safetensors"), "pt") as file:
        (name,) = (n for n in file.keys() if "embed_tokens" in n)  # noqa: SIM118 - not a dict
        table = file.get_tensor(name).float()
    engine = engines.get("cake", BUDGET, enable_prompt_embeds=True, **POOL)
    by_tokens = ask(engine, [prose[:400]], greedy(12))
    embeds = {"prompt_embeds": table[torch.tensor(prose[:400])]}
    by_embeds = ask(engine, [embeds], greedy(12))
    assert engine.stats["prompt_cuts"] == 2
    assert answers(by_embeds)[0][0][0] == answers(by_tokens)[0][0][0]


# --- models --------------------------------------------------------------------------------------


def make_adapter(folder: Path) -> Path:
    """Write a random LoRA adapter for the attention of the small model, in PEFT's format."""
    folder.mkdir()
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": SMALL, "r": 8,
        "lora_alpha": 16, "bias": "none", "target_modules": ["q_proj", "v_proj"],
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(LAYERS):
        for name, width in (("q_proj", 9 * 64), ("v_proj", 3 * 64)):
            path = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(8, 576, generator=generator)
            tensors[f"{path}.lora_B.weight"] = torch.randn(width, 8, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_lora(engines: Engines, prose: list[int], tmp_path: Path) -> None:
    """The same prompt with and without an adapter in one batch: kept apart, also in the cache."""
    from vllm.lora.request import LoRARequest

    adapter = LoRARequest("random", 1, str(make_adapter(tmp_path / "adapter")))
    # With room for one adapter only, vLLM's CPU build gives it to requests without one, too.
    lora: dict[str, Any] = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
    found = {}
    for method, (engine, asked) in two(engines, **lora).items():
        params = greedy(12, logprobs=0, **asked)
        pair = answers(ask(engine, [prose[:400]] * 2, params, lora_request=[None, adapter]))
        turned = answers(ask(engine, [prose[:400]] * 2, params, lora_request=[adapter, None]))
        assert turned == pair[::-1]
        assert pair[0] != pair[1]
        found[method] = pair
    assert found["scatter"] == found[None]
    assert found["cake"] != found[None]


def quantize(source: Path, target: Path) -> Path:
    """Write the model with int8 weights, one scale per row, as compressed-tensors stores them."""
    shutil.copytree(source, target)
    eight = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**eight, "strategy": "channel", "dynamic": False},
        "input_activations": {**eight, "strategy": "token", "dynamic": True},
    }
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "int-quantized",
        "quantization_status": "compressed", "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }  # fmt: skip
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {}
    with safe_open(str(source / "model.safetensors"), "pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            tensors[name] = file.get_tensor(name)
            if name.endswith("_proj.weight"):
                weight = tensors[name].float()
                scale = weight.abs().amax(dim=1, keepdim=True) / 127
                tensors[name] = (weight / scale).round().to(torch.int8)
                tensors[f"{name}_scale"] = scale
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_quantized_weights(engines: Engines, prose: list[int], tmp_path: Path) -> None:
    small = quantize(small_model(), tmp_path / "w8a8")
    prompts = [prose[:400], prose[300:600]]
    found = {}
    for method, (engine, asked) in two(engines, model=small, dtype="bfloat16").items():
        found[method] = answers(ask(engine, prompts, greedy(12, logprobs=0, **asked)))
        worker = engine.core.model_executor.driver_worker.worker
        layer = worker.model_runner.model.model.layers[0].self_attn.qkv_proj
        # Not the weight: where oneDNN multiplies, it has packed it and vLLM has let go of it.
        assert "Int8" in type(layer.scheme).__name__
    assert found["scatter"] == found[None]
    assert found["cake"] != found[None]


def make_mixture(tokenizer: Path, folder: Path) -> Path:
    """Write a small mixture of experts with random weights that make attention matter."""
    from transformers import MixtralConfig, MixtralForCausalLM

    shutil.copytree(tokenizer, folder, ignore=shutil.ignore_patterns("*.safetensors", "config*"))
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=128, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, vocab_size=NUM_TOKENS, num_local_experts=4,
        num_experts_per_tok=2, max_position_embeddings=2048, sliding_window=None,
        initializer_range=0.2, dtype="float32",
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder


RUN_MIXTURE = """
import json, sys
from tests.e2e.harness import Engines
folder, methods, prompts = json.loads(sys.stdin.read())
engines, found = Engines(), []
for method, budget in methods:
    engine = engines.get(method, budget, model=folder)
    outputs = engine.complete(prompts, 12, logprobs=0)
    found.append([[list(o.token_ids), o.cumulative_logprob] for o in outputs])
    found[-1].append(engine.stats["prompt_cuts"])
    engine.check()
print("RESULT", json.dumps(found))
"""


def test_mixture_of_experts(prose: list[int], tmp_path: Path) -> None:
    """Random weights. In a process of its own: vLLM makes groups of experts for the first model."""
    folder = str(make_mixture(small_model(), tmp_path / "moe"))
    job = [folder, list(METHODS.items()), [prose[:400], prose[300:600]]]
    done = subprocess.run(
        [sys.executable, "-c", RUN_MIXTURE], input=json.dumps(job), cwd=REPO,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = (s for s in done.stdout.splitlines() if s.startswith("RESULT "))
    plain, scatter, cake = json.loads(line.removeprefix("RESULT "))
    assert scatter[:-1] == plain[:-1]
    assert scatter[-1] == cake[-1] == 2
    assert cake[:-1] != plain[:-1]


def test_compiled_model(engines: Engines, prose: list[int]) -> None:
    """As `vllm serve` starts without --enforce-eager: on the CPU a compiled model, no graphs."""
    from vllm.config import CompilationMode

    prompts = [prose[:400], prose[300:364], prose[300:600]]
    # Compiling takes as long as there are layers.
    model = first_layers(MODELS / SMALL, 2)
    expected = answers(ask(engines.open(model=model), prompts, greedy(12, logprobs=0)))
    found = {}
    for method, (engine, asked) in two(engines, model=model, enforce_eager=False).items():
        assert engine.llm.llm_engine.vllm_config.compilation_config.mode != CompilationMode.NONE
        found[method] = answers(ask(engine, prompts, greedy(12, logprobs=0, **asked)))
    # Each is compiled by itself, and rounds where its own kernels do.
    for one, other in (("scatter", found[None]), ("cake", expected)):
        for [(tokens, logprob)], [(same, near)] in zip(found[one], other, strict=True):
            assert tokens == same
            assert logprob == pytest.approx(near, abs=1e-3)


# --- several engines ---------------------------------------------------------------------------
