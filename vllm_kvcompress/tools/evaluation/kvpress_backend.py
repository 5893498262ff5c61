"""Answers of kvpress in transformers, which keeps as many tokens as this package.

Runs where kvpress is installed (scripts/setup_kvpress_env.sh) and imports no vLLM. kvpress cuts a
layer's cache after that layer's attention, so what the prefill computes is the same for every press
and budget: a prompt is prefilled once, and each press cuts a copy of every layer's cache on the
way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from vllm_kvcompress.tools.evaluation.backend import Answer, Asked, Backend, EncodedPrompt
from vllm_kvcompress.tools.evaluation.batched_decoding import Continuation, prepare
from vllm_kvcompress.tools.evaluation.metrics import METRICS
from vllm_kvcompress.tools.evaluation.setting import Setting, kept_tokens
from vllm_kvcompress.tools.evaluation.task import EvaluationError, Prompt

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


Check = tuple[Callable[[Any], bool], str]
"""Whether a parameter has an allowed value, and the allowed values in words."""


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


_COUNT: Check = (lambda value: _whole(value, 1), "a whole number from 1")
_SINKS: Check = (lambda value: _whole(value, 0), "a whole number from 0")
_ODD: Check = (lambda value: _whole(value, 1) and value % 2 == 1, "an odd number from 1")
_FLAG: Check = (lambda value: isinstance(value, bool), "true or false")
_SHIFT: Check = (_number, "a number from 0")
_SNAPKV = {"window_size": _COUNT, "kernel_size": _ODD}
_EXPECTED_ATTENTION = {
    "n_future_positions": _COUNT,
    "n_sink": _SINKS,
    "use_covariance": _FLAG,
    "use_vnorm": _FLAG,
    "epsilon": _SHIFT,
}

PRESSES: Mapping[str, tuple[str, Mapping[str, Check]]] = MappingProxyType(
    {
        "snapkv": ("SnapKVPress", _SNAPKV),
        "pyramidkv": ("PyramidKVPress", {**_SNAPKV, "beta": _COUNT}),
        "streamingllm": ("StreamingLLMPress", {"n_sink": _SINKS}),
        "expected_attention": ("ExpectedAttentionPress", _EXPECTED_ATTENTION),
        "keydiff": ("KeyDiffPress", {}),
    }
)
"""Class in kvpress and the parameters that it takes, by the method's name in a :class:`Setting`;
parameters that are not given have kvpress's defaults."""


def check_setting(setting: Setting, block_size: int) -> None:
    """Refuse what kvpress does not have.

    Raises:
        EvaluationError: Method, parameter or budget is none.

    """
    if setting.is_full:
        return
    if setting.method not in PRESSES:
        raise EvaluationError(
            f"method {setting.method!r} is not compared with kvpress; it is one of "
            f"{', '.join(PRESSES)}"
        )
    _, checks = PRESSES[setting.method]
    for name, value in setting.params.items():
        if name not in checks:
            raise EvaluationError(
                f"parameter {name!r} is none of {setting.method} in kvpress, which takes "
                f"{', '.join(checks) or 'none'}"
            )
        accepts, text = checks[name]
        if not accepts(value):
            raise EvaluationError(
                f"parameter {name} of {setting.method} in kvpress must be {text}, got {value!r}"
            )
    try:
        kept_tokens(setting.budget, 1, block_size)
    except ValueError as error:
        raise EvaluationError(str(error)) from error


def ratio_for(method: str, kept: int, tokens: int) -> float:
    """The compression ratio with which a press keeps exactly ``kept`` of ``tokens`` on average.

    Most presses keep int(tokens * (1 - ratio)), for which half a token more stays clear of the next
    smaller number; PyramidKV takes tokens * (1 - ratio) as the mean of its layers and rounds those.
    """
    if method == "pyramidkv":
        return 1 - kept / tokens
    return 1 - (kept + 0.5) / tokens


def once_per_layer(score: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A press's ``score`` for all presses that share it: computed once for each layer in turn."""
    held: dict[int, torch.Tensor] = {}

    def shared(module: Any, *args: Any) -> torch.Tensor:
        if module.layer_idx not in held:
            held.clear()
            held[module.layer_idx] = score(module, *args)
        return held[module.layer_idx]

    return shared


class PressCut(NamedTuple):
    """One setting of a prompt: its press (None: no cut), tokens to keep, and the cut cache."""

    setting: Setting
    press: Any
    kept: int
    row: DynamicCache


class KvpressBackend(Backend):
    """Presses of kvpress on a model of transformers, on the CPU.

    Args:
        model: Folder of the model; nothing is fetched.
        dtype: Data type of weights and cache, one of :data:`DTYPES`.
        block_size: Block size of the engine that is compared with; budgets are rounded up to it.

    Attributes:
        source: Such as ``kvpress 0.5.5``.

    Raises:
        EvaluationError: kvpress is not installed, or the model is none that can be compared.

    """

    def __init__(self, model: str | Path, *, dtype: str = "bfloat16", block_size: int = 32) -> None:
        if dtype not in DTYPES:
            raise EvaluationError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        try:
            self._kvpress = import_module("kvpress")
        except ModuleNotFoundError as error:
            raise EvaluationError(
                f"kvpress cannot be imported ({error}); run scripts/setup_kvpress_env.sh and use "
                "the Python of the environment it makes"
            ) from error
        self.block_size = block_size
        self.source = f"kvpress {version('kvpress')}"
        self._tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
        self._model = AutoModelForCausalLM.from_pretrained(
            model, dtype=DTYPES[dtype], local_files_only=True
        ).eval()
        prepare(self._model)
        self._check_model(Path(model).name)
        for layer in self._model.model.layers:
            # Expected Attention asks the layer for the angles of future positions.
            layer.self_attn.rotary_emb = self._model.model.rotary_emb
        ends = self._model.generation_config.eos_token_id
        self._ends = {ends} if isinstance(ends, int) else set(ends or ())

    def check(self, settings: Sequence[Setting]) -> None:
        """Refuse settings that kvpress does not have."""
        for setting in settings:
            check_setting(setting, self.block_size)

    def cases_at_once(self, longest: int) -> int:
        """As many prompts as make a good batch and whose caches do not fill the memory."""
        return max(1, min(16, 16384 // longest))

    @torch.inference_mode()
    def run(self, chunk: Sequence[Asked]) -> Iterator[tuple[EncodedPrompt, Setting, Answer]]:
        """Prefill each prompt once, then decode all prompts under all settings together.

        Raises:
            EvaluationError: A press cannot cut a prompt that short, or to a budget that small.

        """
        answers: list[tuple[EncodedPrompt, Setting, Answer]] = []
        answering: list[tuple[EncodedPrompt, PressCut]] = []
        parts = []
        for case, settings in chunk:
            cuts = self._cuts(settings, len(case.token_ids))
            after = self._prefill(case, cuts)
            if case.fed_ids:
                after.feed(torch.tensor([case.fed_ids]))
            if case.measured_ids:
                nlls = after.measure(torch.tensor(case.measured_ids))
                answers += (
                    (case, cut.setting, Answer("", len(case.measured_ids), cut.kept, nll))
                    for cut, nll in zip(cuts, nlls, strict=True)
                )
            else:
                answering += ((case, cut) for cut in cuts)
                parts.append(after)
        if parts:
            prompts = [case.prompt for case, _ in answering]
            generated = self._generate(prompts, Continuation.join(parts))
            answers += (
                (case, cut.setting, Answer(text, tokens, cut.kept))
                for (case, cut), (text, tokens) in zip(answering, generated, strict=True)
            )
        return iter(answers)

    def close(self) -> None:
        """Free the model."""
        self._model = None

    def _cuts(self, settings: Sequence[Setting], tokens: int) -> list[PressCut]:
        shared: dict[Any, Callable[..., torch.Tensor]] = {}
        cuts = []
        for setting in settings:
            kept = kept_tokens(setting.budget, tokens, self.block_size)
            press = None if kept == tokens else self._press(setting, kept, tokens)
            # The ratio is part of StreamingLLM's scores.
            if press is not None and setting.method != "streamingllm":
                read = {
                    k: v for k, v in vars(press).items() if k not in ("compression_ratio", "beta")
                }
                key = (type(press).score, tuple(sorted(read.items())))
                press.score = shared.setdefault(key, once_per_layer(press.score))
            cuts.append(PressCut(setting, press, kept, DynamicCache()))
        return cuts

    def _press(self, setting: Setting, kept: int, tokens: int) -> Any:
        name, _ = PRESSES[setting.method]
        press = getattr(self._kvpress, name)(
            compression_ratio=ratio_for(setting.method, kept, tokens), **setting.params
        )
        for name in ("window_size", "n_sink"):
            always = getattr(press, name, 0)
            if not always <= kept or not always < tokens:
                raise EvaluationError(
                    f"{setting.label} in kvpress cannot cut {tokens} tokens to {kept} with "
                    f"{name} {always}; set {name} to at most {min(kept, tokens - 1)}"
                )
        press.post_init_from_model(self._model)
        return press

    def _prefill(self, case: EncodedPrompt, cuts: Sequence[PressCut]) -> Continuation:
        """Fill the cuts' rows."""

        def cut_layer(module: Any, _: Any, kwargs: dict[str, Any], output: Any) -> None:
            cache = kwargs["past_key_values"].layers[module.layer_idx]
            for cut in cuts:
                states = cache.keys, cache.values
                if cut.press is not None:
                    hidden = kwargs["hidden_states"]
                    states = cut.press.compress(module, hidden, *states, output[1], kwargs)
                cut.row.update(*states, module.layer_idx)

        hooks = [
            layer.self_attn.register_forward_hook(cut_layer, with_kwargs=True)
            for layer in self._model.model.layers
        ]
        try:
            token_ids = torch.tensor([case.token_ids])
            logits = self._model(input_ids=token_ids, use_cache=True, logits_to_keep=1).logits
        finally:
            for hook in hooks:
                hook.remove()
        for cut in cuts:
            _check_kept(cut)
        rows = [cut.row for cut in cuts]
        return Continuation.after(self._model, rows, logits[:, -1], len(case.token_ids))

    def _generate(self, prompts: Sequence[Prompt], after: Continuation) -> list[tuple[str, int]]:
        """Greedy answers, one a row: text and number of tokens, the ending one included."""
        token_ids: list[list[int]] = [[] for _ in prompts]
        texts = [""] * len(prompts)
        going = list(range(len(prompts)))
        while True:
            left = []
            chosen = after.logits.argmax(dim=-1).tolist()
            for place, (row, token) in enumerate(zip(going, chosen, strict=True)):
                token_ids[row].append(token)
                texts[row] = self._tokenizer.decode(token_ids[row], skip_special_tokens=True)
                prompt = prompts[row]
                settled = METRICS[prompt.metric].settled(texts[row], prompt.references)
                full = len(token_ids[row]) == prompt.max_tokens
                if not full and token not in self._ends and not settled:
                    left.append(place)
            if not left:
                break
            if len(left) < len(going):
                after.select(left)
                going = [going[place] for place in left]
            after.feed(torch.tensor([[token_ids[row][-1]] for row in going]))
        return [(text, len(ids)) for text, ids in zip(texts, token_ids, strict=True)]

    def _check_model(self, name: str) -> None:
        supported = import_module("kvpress.presses.base_press").SUPPORTED_MODELS
        if not isinstance(self._model, supported):
            raise EvaluationError(
                f"model {name} is a {type(self._model).__name__}, which kvpress does not support"
            )
        kinds = getattr(self._model.config, "layer_types", None) or ()
        if any(kind != "full_attention" for kind in kinds):
            raise EvaluationError(
                f"model {name} has layers without full attention, which kvpress would cut too and "
                "vllm_kvcompress does not"
            )


def _check_kept(cut: PressCut) -> None:
    lengths = [layer.get_seq_length() for layer in cut.row.layers]
    mean = sum(lengths) / len(lengths)
    if round(mean) != cut.kept:
        raise RuntimeError(
            f"{cut.setting.label} kept {mean} tokens per layer on average where {cut.kept} were due"
        )
