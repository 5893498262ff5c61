"""Answers from vLLM with this plugin: one engine, in which every request has its own setting."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vllm_kvcompress import __version__
from vllm_kvcompress.planning.config import KVCompressionConfig
from vllm_kvcompress.planning.request_policy import OFF
from vllm_kvcompress.planning.request_settings import BUDGET_KEY, METHOD_KEY, PARAMS_KEY
from vllm_kvcompress.tools.evaluation.backend import Answer, Asked, Backend, EncodedPrompt
from vllm_kvcompress.tools.evaluation.metrics import METRICS
from vllm_kvcompress.tools.evaluation.setting import Setting, kept_tokens
from vllm_kvcompress.tools.evaluation.task import EvaluationError
from vllm_kvcompress.tools.kv_space import check_kv_space

ENVIRONMENT = {
    # In this process the engine starts sooner and a step costs less.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Environment variables for vLLM, set where the user's environment does not set them."""

MOST_AT_ONCE = 96


class VllmBackend(Backend):
    """One engine for all settings.

    It is started with the method "none" and allows requests everything, so each request brings its
    setting with it; a prompt's second and later prefills come from the prefix cache. Changes the
    process's environment variables (:data:`ENVIRONMENT`) where they are not set.

    Args:
        model: Folder or hub identifier.
        dtype: Data type, as vLLM takes it.
        block_size: Tokens of a block.
        max_model_len: Tokens of the longest case, its answer included.
        cache_mib: KV cache, MiB; None: what vLLM chooses.
        plain: Whether to start vLLM without compression, for the full cache alone.
        engine_args: Further keyword arguments of vLLM's ``LLM``.

    Raises:
        EvaluationError: vLLM or the plugin refuses the options.
        CommandError: A variable would overrule cache_mib.

    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str,
        block_size: int,
        max_model_len: int,
        cache_mib: int | None,
        plain: bool,
        engine_args: Mapping[str, Any],
    ) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from vllm_kvcompress.tools.evaluation.forced_tokens import ForcedTokens

        settings: dict[str, Any] = {
            "dtype": dtype,
            "enforce_eager": True,
            "block_size": block_size,
            "max_model_len": max_model_len,
            "max_num_seqs": MOST_AT_ONCE,
            **engine_args,
            "logits_processors": [ForcedTokens],
        }
        if cache_mib is not None:
            check_kv_space("--cache-mib")
            settings["kv_cache_memory_bytes"] = cache_mib << 20
        self.block_size = block_size
        self._plain = plain
        try:
            if plain:
                import vllm

                self._llm = vllm.LLM(model, **settings)
                self.source = f"vllm {vllm.__version__}"
            else:
                from vllm_kvcompress import LLM

                allowed = {"method": True, "budget": {"max": max_model_len}, "params": True}
                self._llm = LLM(
                    model, kv_compression=OFF, kv_compression_config={"allow": allowed}, **settings
                )
                self.source = f"vllm_kvcompress {__version__}"
        except ValueError as error:  # vLLM's and the plugin's word for a setting that cannot be
            raise EvaluationError(str(error).strip().splitlines()[-1]) from error
        cache = self._llm.llm_engine.vllm_config.cache_config
        self._blocks = int(cache.num_gpu_blocks or 1)
        self._count = 0

    def check(self, settings: Sequence[Setting]) -> None:
        """Refuse what the plugin refuses, and compression where the engine is plain vLLM."""
        check_settings(settings, self.block_size, plain=self._plain)

    def cases_at_once(self, longest: int) -> int:
        """As many prompts as fit the pool, with half as much again for their compressed copies."""
        blocks = -(-longest // self.block_size)
        return max(1, min(MOST_AT_ONCE, int(self._blocks / (1.5 * blocks))))

    def run(self, chunk: Sequence[Asked]) -> Iterator[tuple[EncodedPrompt, Setting, Answer]]:
        """See the base class: the first settings prefill, all others then share one queue."""
        first = [(case, settings[0]) for case, settings in chunk]
        most = max(len(settings) for _, settings in chunk)
        others = [(case, s[n]) for n in range(1, most) for case, s in chunk if n < len(s)]
        for pairs in (first, others):
            for case, setting, output in self._generate(pairs):
                yield case, setting, self._answer(case, setting, output)

    def close(self) -> None:
        """Stop the engine."""
        self._llm.llm_engine.engine_core.shutdown()

    def _generate(
        self, pairs: Sequence[tuple[EncodedPrompt, Setting]]
    ) -> Iterator[tuple[EncodedPrompt, Setting, Any]]:
        """Run the engine until all have their output, each stopped where its score is settled.

        Raises:
            EvaluationError: A method has failed; no answer that it should have made is yielded.

        """
        engine = self._llm.llm_engine
        running: dict[str, tuple[EncodedPrompt, Setting]] = {}
        for case, setting in pairs:
            self._count += 1
            name = f"eval-{self._count}"
            engine.add_request(
                name, {"prompt_token_ids": list(case.token_ids)}, sampling(case, setting)
            )
            running[name] = (case, setting)
        while running:
            for output in engine.step():
                case, setting = running[output.request_id]
                if not output.finished and not self._is_settled(case, output):
                    continue
                if not output.finished:
                    engine.abort_request([output.request_id])
                del running[output.request_id]
                self._check_faults(list(running))
                yield case, setting, output

    def _check_faults(self, running: list[str]) -> None:
        """Stop if a method has failed: what is kept then are the most recent tokens, not its own.

        Before an answer is complete its cuts have been made.
        """
        if self._plain:
            return
        for faults in self._llm.collective_rpc("kv_compression_faults"):
            for reason in faults.values():
                self._llm.llm_engine.abort_request(running)
                raise EvaluationError(
                    f"a method failed, so its answers would not be its own: {reason}"
                )

    def _is_settled(self, case: EncodedPrompt, output: Any) -> bool:
        if case.measured_ids or not case.prompt.metric:
            return False
        done = output.outputs[0]
        if len(done.token_ids) <= len(case.fed_ids):
            return False
        metric = METRICS[case.prompt.metric]
        return metric.monotone and metric.settled(self._text(case, done), case.prompt.references)

    def _text(self, case: EncodedPrompt, completion: Any) -> str:
        """Text that the model itself generated, without the tokens that it was given."""
        if not case.fed_ids:
            return str(completion.text)
        own = list(completion.token_ids)[len(case.fed_ids) :]
        return str(self._llm.get_tokenizer().decode(own, skip_special_tokens=True))

    def _answer(self, case: EncodedPrompt, setting: Setting, output: Any) -> Answer:
        completion = output.outputs[0]
        kept = kept_tokens(
            setting.budget,
            len(case.token_ids),
            self.block_size,
            1 if setting.is_full else config_of(setting).build_method().window,
        )
        ids = list(completion.token_ids)
        forced = [*case.fed_ids, *case.measured_ids]
        if ids[: len(forced)] != forced:
            raise RuntimeError("the engine did not produce the tokens that it was given")
        nll = None
        if case.measured_ids:
            steps = completion.logprobs[len(case.fed_ids) :]
            pairs = zip(steps, case.measured_ids, strict=True)
            nll = -sum(step[token].logprob for step, token in pairs) / len(case.measured_ids)
        return Answer(
            text="" if case.measured_ids else self._text(case, completion),
            tokens=len(ids) - len(case.fed_ids),
            kept_tokens=kept,
            nll=nll,
        )


def check_settings(settings: Sequence[Setting], block_size: int, *, plain: bool) -> None:
    """Refuse what the plugin refuses, and compression where the engine is plain vLLM.

    Raises:
        EvaluationError: One sentence that names the setting.

    """
    for setting in settings:
        if setting.is_full:
            continue
        if plain:
            raise EvaluationError("plain vLLM answers with the full cache only")
        try:
            config_of(setting).check_block_size(block_size)
        except ValueError as error:
            raise EvaluationError(f"{setting.label}: {error}") from error


def config_of(setting: Setting) -> KVCompressionConfig:
    """The plugin's settings for a setting that compresses; ValueError if they are wrong."""
    return KVCompressionConfig(setting.method, setting.budget or 0, dict(setting.params))


def sampling(case: EncodedPrompt, setting: Setting) -> Any:
    """vLLM's sampling parameters for a case: greedy, under its setting, forced where it says so."""
    from vllm import SamplingParams

    from vllm_kvcompress.tools.evaluation.forced_tokens import FORCED_KEY

    extra: dict[str, Any] = {}
    if not setting.is_full:
        extra = {METHOD_KEY: setting.method, BUDGET_KEY: setting.budget}
        if setting.params:
            extra[PARAMS_KEY] = dict(setting.params)
    forced = [*case.fed_ids, *case.measured_ids]
    if forced:
        extra[FORCED_KEY] = forced
    own = 0 if case.measured_ids else case.prompt.max_tokens
    return SamplingParams(
        temperature=0.0,
        max_tokens=len(forced) + own,
        min_tokens=len(forced),
        logprobs=0 if case.measured_ids else None,
        extra_args=extra or None,
    )
