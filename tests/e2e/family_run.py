"""Serve small models of many families, plain and compressed, each in a process of its own.

``python -m tests.e2e.family_run [FAMILY...]`` prints a line of the table in docs/compatibility.md
for each; without names it writes the table. vLLM is imported once and every model gets a forked
child, as vLLM makes its groups of experts for the first model of a process alone.
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.support.compatibility_page import REFUSED, UNTESTED, WORKS, write_family_table
from tests.support.model_families import FAMILIES, VOCABULARY, make_model

SETTINGS: dict[str, Any] = {
    "dtype": "float32", "enforce_eager": True, "block_size": 32, "max_model_len": 1024,
    "max_num_seqs": 8, "max_num_batched_tokens": 512, "kv_cache_memory_bytes": 64 << 20,
    "skip_tokenizer_init": True, "seed": 0, "enable_prefix_caching": True,
}  # fmt: skip
METHODS = ("cake", "dynamickv", "snapkv")
BUDGET = 128
LENGTHS = ((100, 0), (333, 0), (700, 256), (900, 256), (129, 0))
"""Of each prompt: its tokens, and how many of them begin others too."""
SECONDS = 240
"""Time that a child gets."""


@dataclass
class Outcome:
    """What came of one family.

    Attributes:
        state: As the page's: served, refused by us, or plain vLLM does not serve it here either.
        sentence: Of the refusal; empty in the last case, as vLLM's errors are no sentences.
        weights_loaded: Whether the refusal came after loading had begun.
        faults: What is wrong with answers or blocks of a served one.

    """

    state: str
    sentence: str = ""
    weights_loaded: bool = False
    faults: list[str] = field(default_factory=list)


def prompts() -> list[list[int]]:
    """Random tokens, the same at every call."""
    rng = random.Random(3)
    shared = [rng.randrange(3, VOCABULARY) for _ in range(256)]
    return [
        shared[:common] + [rng.randrange(3, VOCABULARY) for _ in range(length - common)]
        for length, common in LENGTHS
    ]


def _answers(llm: Any, tokens: int, **asked: Any) -> list[tuple[list[int], float]]:
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=0, detokenize=False,
        extra_args=asked or None,
    )  # fmt: skip
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts()], params, use_tqdm=False)
    return [(list(o.outputs[0].token_ids), o.outputs[0].cumulative_logprob) for o in outputs]


def _serve_plain(folder: str) -> dict[str, Any]:
    from vllm_kvcompress import LLM

    llm = LLM(folder, **SETTINGS)
    # The second time from the prefix cache.
    return {"answers": [_answers(llm, 16) for _ in range(2)]}


def _serve_scatter(folder: str) -> dict[str, Any]:
    engine = _compressed(folder, "scatter")
    answers = [_answers(engine.llm, 16) for _ in range(2)]
    faults = (
        [] if engine.stats["prompt_cuts"] == 2 * len(LENGTHS) else ["not every prompt was moved"]
    )
    return {"answers": answers, "faults": faults + _held(engine)}


def _serve_methods(folder: str) -> dict[str, Any]:
    """Every method cuts prompts, and again what is generated."""
    engine = _compressed(folder, METHODS[0], decode_budget=BUDGET, decode_buffer=32)
    faults = []
    for method in METHODS:
        before = engine.stats
        answers = _answers(engine.llm, 100, kv_compression=method)
        made = engine.stats - before
        if made["prompt_cuts"] != sum(length > BUDGET for length, _ in LENGTHS):
            faults.append(f"{method}: {made['prompt_cuts']} prompts were cut")
        if made["decode_cuts"] < len(LENGTHS):
            faults.append(f"{method}: {made['decode_cuts']} cuts while it generated")
        if not all(math.isfinite(logprob) for _, logprob in answers):
            faults.append(f"{method}: a probability is no number")
    return {"faults": faults + _held(engine)}


def _compressed(folder: str, method: str, **config: Any) -> Any:
    from tests.e2e.engine import Engine
    from vllm_kvcompress import LLM

    settings = {"check_integrity": True, "allow": {"method": list(METHODS)}, **config}
    llm = LLM(folder, kv_compression=method, kv_compression_budget=BUDGET,
              kv_compression_config=settings, **SETTINGS)  # fmt: skip
    return Engine(llm, compressed=True)


def _held(engine: Any) -> list[str]:
    held = engine.total_blocks() - engine.free_blocks()
    return [f"{held} blocks are not given back"] if held else []


def _in_child(serve: Any, folder: str) -> dict[str, Any]:
    """Call it in a forked child, whose log goes nowhere; returns what it found or its error."""
    with tempfile.TemporaryDirectory() as scratch:
        result, log = Path(scratch, "result"), Path(scratch, "log")
        child = os.fork()
        if child == 0:
            _run_and_exit(serve, folder, result, log)
        end = time.monotonic() + SECONDS
        while not os.waitpid(child, os.WNOHANG)[0]:
            if time.monotonic() > end:
                os.kill(child, 9)
                os.waitpid(child, 0)
                return {"error": f"not done in {SECONDS} seconds", "weights_loaded": True}
            time.sleep(0.1)
        if not result.exists():
            return {"error": f"died: {log.read_text()[-500:]}", "weights_loaded": True}
        found: dict[str, Any] = json.loads(result.read_text())
        return found


def _run_and_exit(serve: Any, folder: str, result: Path, log: Path) -> None:
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    from vllm.v1.worker.cpu_worker import CPUWorker

    loading = False
    load = CPUWorker.load_model

    def noted(*args: Any, **options: Any) -> Any:
        nonlocal loading
        loading = True
        return load(*args, **options)

    CPUWorker.load_model = noted
    try:
        found = serve(folder)
    except Exception as error:
        found = {"error": str(error), "trace": traceback.format_exc(), "weights_loaded": loading}
    result.write_text(json.dumps(found))
    os._exit(0)


def run(family: str) -> Outcome:
    """Make a model of a family and serve it, plain and compressed."""
    with tempfile.TemporaryDirectory() as folder:
        make_model(family, Path(folder))
        scatter = _in_child(_serve_scatter, folder)
        if "--kv-compression" in scatter.get("error", ""):
            return Outcome(REFUSED, scatter["error"], scatter["weights_loaded"])
        plain = _in_child(_serve_plain, folder)
        if "error" in plain:
            print(family, "and plain vLLM:", plain["error"].strip()[-300:], file=sys.stderr)
            return Outcome(UNTESTED)
        methods = _in_child(_serve_methods, folder)
    failed = [
        found.get("trace", found["error"]) for found in (scatter, methods) if "error" in found
    ]
    if failed:
        return Outcome(WORKS, faults=failed)
    faults = [*scatter["faults"], *methods["faults"]]
    if scatter["answers"] != plain["answers"]:
        faults.append(f"scatter answers {scatter['answers']} and plain vLLM {plain['answers']}")
    return Outcome(WORKS, faults=faults)


def main() -> None:
    """Print outcomes as JSON, a line each; without names the page's table is written."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind", OMP_NUM_THREADS="1"
    )
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    import torch

    torch.set_num_threads(1)
    # What a child would import anyway.
    import vllm.model_executor.models
    import vllm.v1.engine.core
    import vllm.v1.worker.cpu_worker  # noqa: F401

    import vllm_kvcompress  # noqa: F401
    from tests.support.model_classes import inspect_in_process

    inspect_in_process()
    names = sys.argv[1:] or list(FAMILIES)
    outcomes = {}
    for name in names:
        outcomes[name] = run(name)
        print("RESULT", json.dumps({"family": name, **asdict(outcomes[name])}), flush=True)
    if not sys.argv[1:]:
        write_family_table(
            [(name, FAMILIES[name][0], o.state, o.sentence) for name, o in outcomes.items()]
        )


if __name__ == "__main__":
    main()
