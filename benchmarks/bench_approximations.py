"""Quality and blocks of the two approximations: streaming prefill, and cutting generated tokens.

    python -m benchmarks.bench_approximations streaming  # needles and NLL against exact compression
    python -m benchmarks.bench_approximations decode     # NLL of a long forced continuation

One engine after another on the same prompts; NLL is that of a forced continuation through the
decode path. Rows go to benchmarks/results/approximations.csv, a table is printed.
"""

import argparse
import csv
import datetime
import gc
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from transformers import AutoTokenizer
from vllm import SamplingParams

from vllm_kvcompress import LLM
from vllm_kvcompress.paging.rounding import cdiv
from vllm_kvcompress.tools.bench.stepped_engine import SteppedEngine
from vllm_kvcompress.tools.evaluation.forced_tokens import FORCED_KEY, ForcedTokens
from vllm_kvcompress.tools.evaluation.tasks.haystack import (
    TOKENS_TO_GENERATE,
    Needle,
    match,
    niah_single_2,
)

REPO = Path(__file__).resolve().parents[1]
RESULTS = REPO / "benchmarks" / "results" / "approximations.csv"
FIELDS = [
    *("date", "model", "case", "prefill", "method", "budget", "prompt", "generated", "settings"),
    *("needles", "nll", "nll_change", "prompts", "peak_blocks", "late_blocks"),
    *("blocks_uncompressed",),
    *("block_size", "vllm", "torch"),
]


def main() -> None:
    """Run one of the cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("case", choices=["streaming", "decode"])
    parser.add_argument("--model", default=str(REPO / "models" / "qwen2.5-coder-0.5b-instruct"))
    parser.add_argument("--ruler", type=Path, default=REPO / "models" / "ruler")
    parser.add_argument("--lengths", default="4096,8192")
    parser.add_argument("--budgets", default="")
    parser.add_argument("--methods", default="cake,random", help="that cut generated tokens")
    parser.add_argument("--passages", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--generate", type=int, default=2000)
    parser.add_argument("--block-size", type=int, default=32)
    args = parser.parse_args()
    {"streaming": _streaming, "decode": _decode}[args.case](args)


class _Runner(SteppedEngine):
    """One engine, whose pool is watched while it runs.

    Attributes:
        peak: Most blocks held.
        late: Most blocks held since each request has generated half of its tokens.

    """

    def __init__(self, args: argparse.Namespace, max_len: int, **settings: Any) -> None:
        super().__init__(
            LLM(
                args.model,
                dtype="bfloat16",
                enforce_eager=True,
                block_size=args.block_size,
                max_model_len=max_len,
                max_num_seqs=16,
                kv_cache_memory_bytes=3 << 30,
                logits_processors=[ForcedTokens],
                enable_prefix_caching=False,
                **settings,
            )
        )
        self.peak = 0
        self.late = 0

    def run(self, prompts: Sequence[Any], params: Sequence[SamplingParams]) -> list[Any]:
        """Return the completions of prompts that run one at a time: the peak is that of one."""
        pairs = zip(prompts, params, strict=True)
        return [self.together([prompt], [sampling])[0] for prompt, sampling in pairs]

    def together(self, prompts: Sequence[Any], params: Sequence[SamplingParams]) -> list[Any]:
        """Return the completions of prompts that run at one time: the peak is that of all."""
        engine, done = self.llm_engine, {}
        steps, half = 0, params[0].max_tokens // 2 + len(prompts)
        for index, (prompt, sampling) in enumerate(zip(prompts, params, strict=True)):
            engine.add_request(str(index), prompt, sampling)
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    done[output.request_id] = output.outputs[0]
            held = self.blocks_held
            self.peak = max(self.peak, held)
            steps += 1
            self.late = max(self.late, held) if steps > half else 0
        return [done[str(index)] for index in range(len(prompts))]


def _forcing(tokens: Sequence[int]) -> SamplingParams:
    """Return sampling parameters under which a request produces just these tokens."""
    return SamplingParams(
        temperature=0.0,
        max_tokens=len(tokens),
        ignore_eos=True,
        logprobs=0,
        extra_args={FORCED_KEY: list(tokens)},
    )


def _nll(completion: Any, tokens: Sequence[int]) -> list[float]:
    """Return the negative log-likelihood in nats of each forced token."""
    if list(completion.token_ids) != list(tokens):
        raise ValueError("the engine did not produce the forced tokens")
    steps = completion.logprobs
    return [-steps[i][token].logprob for i, token in enumerate(tokens)]


def _compression(budget: int, **config: Any) -> dict[str, Any]:
    return {
        "kv_compression": "cake",
        "kv_compression_budget": budget,
        "kv_compression_config": config,
    }


def _passages(args: argparse.Namespace, tokenizer: Any, length: int, count: int) -> list[list[int]]:
    """Cut pieces, spread evenly, out of the essays that scripts/fetch_ruler.py fetches."""
    essays = json.loads((args.ruler / "PaulGrahamEssays.json").read_text(encoding="utf-8"))
    text = list(tokenizer(essays["text"][:600_000])["input_ids"])
    stride = (len(text) - length) // max(count - 1, 1)
    if stride < 1:
        raise ValueError(f"the text has {len(text)} tokens, {length} are needed")
    return [text[stride * i : stride * i + length] for i in range(count)]


def _streaming(args: argparse.Namespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    for length in map(int, args.lengths.split(",")):
        needles = niah_single_2(
            args.ruler,
            lambda s: len(tokenizer(s)["input_ids"]),
            length=length,
            count=args.prompts,
            seed=42,
        )
        passages = _passages(args, tokenizer, length + 128, count=args.passages)
        step = {"max_num_batched_tokens": 2048}
        variants: list[tuple[str, Any, dict[str, Any]]] = [("full cache", "", step)]
        for budget in map(int, (args.budgets or "512,1024").split(",")):
            variants.append(("exact", budget, {**step, **_compression(budget)}))
            for chunk in (2048, 1024):
                settings = _compression(
                    budget, prefill="streaming", stream_chunk=chunk, stream_budget=2 * budget
                )
                settings["max_num_batched_tokens"] = chunk
                variants.append(("streaming", budget, settings))
        base = None
        for prefill, budget, settings in variants:
            runner = _Runner(args, length + 512, **settings)
            row = _row(prefill, budget, length, 128, settings)
            found, losses = _needles_and_nll(runner, needles, passages, length)
            base = base if base is not None else losses
            row |= {
                "needles": f"{found}/{len(needles)}",
                "nll": f"{losses:.3f}",
                "nll_change": f"{losses - base:+.3f}",
                "prompts": len(passages),
                "peak_blocks": runner.peak,
                "blocks_uncompressed": cdiv(length + 128, args.block_size),
            }
            _save(args, row)
            runner.close()
            del runner  # and its memory, before the next engine starts
            gc.collect()


def _needles_and_nll(
    runner: _Runner, needles: Sequence[Needle], passages: Sequence[list[int]], length: int
) -> tuple[int, float]:
    greedy = SamplingParams(temperature=0.0, max_tokens=TOKENS_TO_GENERATE)
    outputs = runner.run([n.prompt for n in needles], [greedy] * len(needles))
    found = sum(match(o.text, n.answers) for o, n in zip(outputs, needles, strict=True))
    ends = [p[length:] for p in passages]
    completions = runner.run(
        [{"prompt_token_ids": p[:length]} for p in passages], [_forcing(end) for end in ends]
    )
    losses = [
        value
        for completion, end in zip(completions, ends, strict=True)
        for value in _nll(completion, end)
    ]
    return int(found), statistics.fmean(losses)


def _decode(args: argparse.Namespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    length = 1024
    passages = _passages(args, tokenizer, length + args.generate, count=args.passages)
    prompts = [{"prompt_token_ids": p[:length]} for p in passages]
    ends = [p[length:] for p in passages]
    variants: list[tuple[str, Any, dict[str, Any]]] = [("full cache", "", {})]
    for budget in map(int, (args.budgets or "256,512,1024").split(",")):
        variants.append(("prompt cut only", budget, _compression(budget)))
        for method in args.methods.split(","):
            settings = _compression(budget, decode_budget=budget, decode_buffer=128)
            variants.append(
                (f"{method}, decode budget", budget, {**settings, "kv_compression": method})
            )
    base = None
    for name, budget, settings in variants:
        runner = _Runner(args, length + args.generate + 64, **settings)
        completions = runner.together(prompts, [_forcing(end) for end in ends])
        values = [_nll(c, end) for c, end in zip(completions, ends, strict=True)]
        loss = statistics.fmean(v for one in values for v in one)
        base = base if base is not None else loss
        row = _row(name, budget, length, args.generate, settings)
        row |= {
            "nll": f"{loss:.3f}",
            "nll_change": f"{loss - base:+.3f}",
            "prompts": len(prompts),
            "peak_blocks": runner.peak,
            "late_blocks": runner.late,
            "blocks_uncompressed": len(prompts) * cdiv(length + args.generate, args.block_size),
        }
        _save(args, row)
        runner.close()
        del runner
        gc.collect()


def _row(prefill: str, budget: Any, prompt: int, generated: int, settings: Any) -> dict[str, Any]:
    config = settings.get("kv_compression_config", {})
    return {
        "prefill": prefill,
        "method": settings.get("kv_compression", ""),
        "budget": budget,
        "prompt": prompt,
        "generated": generated,
        "settings": " ".join(f"{k}={v}" for k, v in config.items() if k != "prefill"),
    }


def _save(args: argparse.Namespace, row: dict[str, Any]) -> None:
    import torch
    import vllm

    facts = {
        "date": datetime.date.today().isoformat(),
        "model": Path(args.model).name,
        "case": args.case,
        "block_size": args.block_size,
        "vllm": vllm.__version__,
        "torch": torch.__version__,
    }
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow({**facts, **row})
    print(row, flush=True)


if __name__ == "__main__":
    main()
