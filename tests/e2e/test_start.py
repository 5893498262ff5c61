"""What ``kvcompress plan`` prints starts, and ``LLM`` compresses where vLLM loads no plugin."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import folder, plan
from vllm_kvcompress.tools.serving import serve

DUMMY = ["--load-format", "dummy", "--skip-tokenizer-init", "--enforce-eager"]
"""Beside the printed words: the model is only a configuration."""


@pytest.mark.engine
def test_the_printed_command_starts_on_the_cpu(tmp_path: Path) -> None:
    model = folder(tmp_path, head_dim=32, num_hidden_layers=2)
    words = "--device cpu --block-size 32 --context 512 --budget 128 --max-num-seqs 4"
    command = plan(model, *words.split(), memory="8MiB").commands()["compressed"]
    assert command[:3] == ["vllm", "serve", model]
    log = tmp_path / "log"
    # This tree's plugin is on the path; serve() runs the command and waits for its answer.
    with serve(model, [*command[3:], *DUMMY], log, timeout=280) as server:
        metrics = server.get("/metrics", timeout=30)
    assert metrics is not None
    assert "vllm:kv_compression_cuts_total" in metrics


@pytest.mark.parametrize("words", [["--block-size", "32"], []])
def test_the_printed_command_is_one_that_vllm_reads(words: list[str], tmp_path: Path) -> None:
    """A GPU's command, as far as vLLM looks at it without one: its words."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_kvcompress.engine.plugin import register

    register()
    model = folder(tmp_path, head_dim=32)
    more = ["--kv-cache-dtype", "fp8", "--config", '{"gamma": 3}', "--budget", "0.25"]
    report = plan(model, "--gpu-memory", "80GiB", *more, *words)
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    for name, command in report.commands().items():
        args = AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", model, *command[3:]]))
        assert args.block_size == report.server.block_size
        assert args.max_model_len == report.work.context
        settings = {"method": "cake", "budget": 0.25, "gamma": 3}
        assert (args.additional_config or {}).get("kv_compression") == (
            settings if name == "compressed" else None
        )


LLM = """
import sys
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm_kvcompress import LLM

if __name__ == "__main__":
    llm = LLM(
        sys.argv[1], skip_tokenizer_init=True, load_format="dummy", enforce_eager=True,
        max_model_len=512, block_size=32, kv_cache_memory_bytes=8 << 20,
        additional_config={"kv_compression": {"method": "cake", "budget": 64}},
    )
    sampling = SamplingParams(max_tokens=2, detokenize=False)
    llm.collective_rpc("kv_compression_record", args=(True,))
    llm.generate({"prompt_token_ids": list(range(3, 203))}, sampling, use_tqdm=False)
    print("cuts", [len(records) for records in llm.collective_rpc("kv_compression_records")])
    sampling.extra_args = {"kv_compression": "zip"}
    try:
        llm.generate({"prompt_token_ids": [3, 4]}, sampling, use_tqdm=False)
    except VLLMValidationError as error:
        print("refused", error)
"""


@pytest.mark.engine
def test_llm_compresses_where_an_allow_list_leaves_the_plugin_out(tmp_path: Path) -> None:
    """In all its processes: with vLLM's own LLM this is plain vLLM without a word."""
    script = tmp_path / "run.py"
    script.write_text(LLM)
    model = folder(tmp_path, head_dim=32, num_hidden_layers=2)
    env = {**os.environ, "VLLM_PLUGINS": "", "VLLM_LOGGING_LEVEL": "ERROR"}
    env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    done = subprocess.run(
        [sys.executable, str(script), model], env=env, capture_output=True, text=True, timeout=290
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "cuts [1]" in done.stdout
    assert "refused kv_compression must be one of" in done.stdout
