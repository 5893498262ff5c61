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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import vllm
from transformers import AutoTokenizer
from vllm import SamplingParams

from vllm_kvcompress import LLM
from vllm_kvcompress.paging.rounding import cdiv
from vllm_kvcompress.tools.bench.stepped_engine import SteppedEngine
from vllm_kvcompress.tools.evaluation.forced_tokens import FORCED_KEY, ForcedTokens
from vllm_kvcompress.tools.evaluation.metrics import match_all
from vllm_kvcompress.tools.evaluation.tasks.needle import niah_single_2

REPO = Path(__file__).resolve().parents[1]
RESULTS = REPO / "benchmarks" / "results" / "approximations.csv"

Variant = tuple[str, Any, dict[str, Any]]
"""What is compared: its name, its budget and the engine's settings."""


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
    if args.case == "decode":
        _compare(args, 1024, args.generate, _decode_variants(args))
        return
    for length in map(int, args.lengths.split(",")):
        _compare(args, length, 128, _streaming_variants(args))


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


def _compression(budget: int, method: str = "cake", **config: Any) -> dict[str, Any]:
    return {
        "kv_compression": method,
        "kv_compression_budget": budget,
        "kv_compression_config": config,
    }


def _streaming_variants(args: argparse.Namespace) -> Iterator[Variant]:
    step = {"max_num_batched_tokens": 2048}
    yield "full cache", "", step
    for budget in map(int, (args.budgets or "512,1024").split(",")):
        yield "exact", budget, {**step, **_compression(budget)}
        for chunk in (2048, 1024):
            settings = _compression(
                budget, prefill="streaming", stream_chunk=chunk, stream_budget=2 * budget
            )
            yield "streaming", budget, {**settings, "max_num_batched_tokens": chunk}


def _decode_variants(args: argparse.Namespace) -> Iterator[Variant]:
    yield "full cache", "", {}
    for budget in map(int, (args.budgets or "256,512,1024").split(",")):
        yield "prompt cut only", budget, _compression(budget)
        for method in args.methods.split(","):
            settings = _compression(budget, method, decode_budget=budget, decode_buffer=128)
            yield f"{method}, decode budget", budget, settings


def _compare(
    args: argparse.Namespace, length: int, generated: int, variants: Iterator[Variant]
) -> None:
    """Measure all variants on the same prompts; the full cache comes first.

    In the case "streaming" prompts run one at a time, and needles are asked for as well.
    """
    streaming = args.case == "streaming"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    # Pieces spread evenly over the essays that scripts/fetch_ruler.py fetches.
    essays = json.loads((args.ruler / "PaulGrahamEssays.json").read_text(encoding="utf-8"))
    text = list(tokenizer(essays["text"][:600_000])["input_ids"])
    stride = (len(text) - length - generated) // max(args.passages - 1, 1)
    if stride < 1:
        raise ValueError(f"the text has {len(text)} tokens, {length + generated} are needed")
    starts = [stride * i for i in range(args.passages)]
    prompts = [{"prompt_token_ids": text[start : start + length]} for start in starts]
    ends = [text[start + length : start + length + generated] for start in starts]
    needles = niah_single_2(
        args.ruler,
        lambda s: len(tokenizer(s)["input_ids"]),
        length=length,
        count=args.prompts if streaming else 0,
    )
    greedy = SamplingParams(temperature=0.0, max_tokens=128)
    base = None
    for name, budget, settings in variants:
        runner = _Runner(args, length + max(512, generated + 64), **settings)
        asked = runner.run([n.text for n in needles], [greedy] * len(needles))
        found = sum(match_all(o.text, n.references) for o, n in zip(asked, needles, strict=True))
        forced = [_forcing(end) for end in ends]
        completions = (runner.run if streaming else runner.together)(prompts, forced)
        values = [_nll(c, end) for c, end in zip(completions, ends, strict=True)]
        loss = statistics.fmean(value for one in values for value in one)
        base = loss if base is None else base
        config = settings.get("kv_compression_config", {})
        row = {
            "date": datetime.date.today().isoformat(),
            "model": Path(args.model).name,
            "case": args.case,
            "prefill": name,
            "method": settings.get("kv_compression", ""),
            "budget": budget,
            "prompt": length,
            "generated": generated,
            "settings": " ".join(f"{k}={v}" for k, v in config.items() if k != "prefill"),
            "needles": f"{int(found)}/{len(needles)}" if streaming else "",
            "nll": f"{loss:.3f}",
            "nll_change": f"{loss - base:+.3f}",
            "prompts": len(prompts),
            "peak_blocks": runner.peak,
            "late_blocks": "" if streaming else runner.late,
            "blocks_uncompressed": (1 if streaming else len(prompts))
            * cdiv(length + generated, args.block_size),
            "block_size": args.block_size,
            "vllm": vllm.__version__,
            "torch": torch.__version__,
        }
        new = not RESULTS.exists()
        with RESULTS.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(row), lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)
        print(row, flush=True)
        runner.close()
        del runner  # and its memory, before the next engine starts
        gc.collect()


if __name__ == "__main__":
    main()
