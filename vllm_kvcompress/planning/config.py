"""What the user asked for: method, budget, parameters. Parsed once, checked, immutable."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from vllm_kvcompress.methods import Method, get_method
from vllm_kvcompress.planning.pinned_ranges import shown
from vllm_kvcompress.planning.policy_names import check_policy_names
from vllm_kvcompress.planning.request_policy import OFF, RequestPolicy

CONFIG_KEY = "kv_compression"
"""Name of the entry in vLLM's ``additional_config``."""

DEFAULT_BUDGET = 1024

DEFAULT_DECODE_BUFFER = 128

PREFILLS = ("auto", "full", "cascade", "streaming")


@dataclass(frozen=True)
class KVCompressionConfig:
    """Settings of one engine.

    Attributes:
        method: Registered name of the method; ``none`` compresses only requests that ask for it.
        budget: Tokens each layer keeps on average, window included (int), or that number as a
            share of the prompt, in (0, 1) (float).
        params: The method's own parameters, by name.
        prefill: Where a prompt's keys and values lie while it is computed. ``full``: in blocks of
            its own, which stay in the prefix cache. ``cascade``: a prompt that runs in one step
            gets a workspace that all layers reuse in turn, and leaves nothing in the prefix cache.
            ``auto``: full while the pool has room for it, else cascade. ``streaming``: as auto,
            but prompts longer than one step are compressed between their chunks too, which is an
            approximation.
        stream_chunk: Tokens between two such compressions, in whole blocks; None: as many as fit
            one step.
        stream_budget: Tokens each layer keeps on average between chunks; None: twice the budget.
        decode_budget: Tokens each layer is cut back to whenever a request's kept and generated
            tokens exceed it by ``decode_buffer``; None: generated tokens are never evicted.
        decode_buffer: Generated tokens between two such cuts, rounded up to whole blocks; at least
            the method's window. 1 where the method evicts one token for each generated token.
        decode_keep_prompt: Whether those cuts keep a prompt, or what its own cut has left of it, if
            there is room for it (:meth:`.RequestSettings.keeps_prompt`).
        reserve_tokens: Generated tokens that blocks are reserved for when a compressed request is
            admitted, at most its max_tokens; later blocks are given as the pool has them.
        allow: What requests may set for themselves, as :meth:`RequestPolicy.parse` reads it;
            None: their method, and a budget up to this one.
        check_integrity: Verify arena and block pool after every step (slow; for tests).
        log_requests: Log one JSON line per compressed request.

    """

    method: str
    budget: int | float = DEFAULT_BUDGET
    params: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    prefill: str = "auto"
    stream_chunk: int | None = None
    stream_budget: int | None = None
    decode_budget: int | None = None
    decode_buffer: int = DEFAULT_DECODE_BUFFER
    decode_keep_prompt: bool = True
    reserve_tokens: int = 256
    allow: Mapping[str, Any] | None = None
    check_integrity: bool = False
    log_requests: bool = False

    def __post_init__(self) -> None:
        check_budget(self.budget)
        for name in ("decode_keep_prompt", "check_integrity", "log_requests"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(
                    f"{CONFIG_KEY}: {name} must be true or false, got {getattr(self, name)!r}"
                )
        if self.prefill not in PREFILLS:
            raise ValueError(
                f"{CONFIG_KEY}: prefill must be one of {', '.join(PREFILLS)}, got {self.prefill!r}"
            )
        for name in ("stream_chunk", "stream_budget", "decode_budget", "decode_buffer"):
            value = getattr(self, name)
            optional = name != "decode_buffer"
            if not (_is_count(value) or (optional and value is None)):
                raise ValueError(
                    f"{CONFIG_KEY}: {name} must be a whole number of tokens of at least 1, "
                    f"got {value!r}"
                )
        if not (_is_count(self.reserve_tokens) or self.reserve_tokens == 0):
            raise ValueError(
                f"{CONFIG_KEY}: reserve_tokens must be a whole number of tokens of at least 0, "
                f"got {self.reserve_tokens!r}"
            )
        try:
            check_policy_names(self.policy)
        except ValueError as error:
            raise ValueError(f"{CONFIG_KEY}: {error}") from None
        method = self.build_method()
        self._check_streaming(method)
        self._check_decode(method)

    @classmethod
    def parse(cls, value: object) -> "KVCompressionConfig":
        """Read the flat mapping that flags, keyword arguments and ``additional_config`` carry.

        Args:
            value: ``{"method": ..., "budget": ..., <engine option or method parameter>: ...}``.

        Raises:
            ValueError: One sentence that names the wrong field, its value and what is allowed.

        """
        if not isinstance(value, Mapping):
            raise ValueError(
                f'{CONFIG_KEY} must be a mapping such as {{"method": "cake", "budget": 1024}}, '
                f"got {value!r}"
            )
        rest = dict(value)
        if not isinstance(rest.get("method"), str):
            raise ValueError(
                f"{CONFIG_KEY} needs a method by name, e.g. cake, got {rest.get('method')!r}"
            )
        known = {k: rest.pop(k) for k in _OPTIONS if k in rest}
        return cls(**known, params=MappingProxyType(rest))

    def as_dict(self) -> dict[str, Any]:
        """Return the flat JSON form that :meth:`parse` reads."""
        flat: dict[str, Any] = {"method": self.method, "budget": self.budget, **self.params}
        for option in fields(self):
            value = getattr(self, option.name)
            if option.name in _OPTIONS and value != option.default:
                flat[option.name] = value
        return flat

    @property
    def off(self) -> bool:
        """Whether only requests that ask for it are compressed."""
        return self.method == OFF

    @property
    def policy(self) -> RequestPolicy:
        """What requests may set."""
        return RequestPolicy.parse(self.allow)

    def build_method(self) -> Method:
        """Make the method object.

        Raises:
            ValueError: Unknown method, unknown parameter or wrong value.

        """
        return get_method(self.method, self.params)

    def check_block_size(
        self,
        block_size: int,
        name: str = "kv-compression-budget",
        remedy: str = "raise the budget or lower --block-size",
    ) -> None:
        """Refuse a budget that leaves no room beside the window.

        Args:
            block_size: Tokens per block.
            name: Name of the budget, for the message.
            remedy: What the user should do, for the message.

        Raises:
            ValueError: A token budget below window + one block.

        """
        method = self.build_method()
        if method.scorer.keeps_all:
            return
        least = method.window + block_size
        budgets = {name: self.budget, "decode_budget": self.decode_budget}
        for which, budget in budgets.items():
            if budget is None or isinstance(budget, float) or budget >= least:
                continue
            raise ValueError(
                f"{which} {budget} is too small: {self.method} needs at least {least} tokens per "
                f"layer (window {method.window} + one block of {block_size}); {remedy}"
            )

    def _check_streaming(self, method: Method) -> None:
        for name in ("stream_chunk", "stream_budget"):
            if getattr(self, name) is not None and self.prefill != "streaming":
                raise ValueError(f"{CONFIG_KEY}: {name} needs prefill to be streaming")
        if self.prefill != "streaming":
            return
        if method.scorer.keeps_all and not self.off:
            raise ValueError(
                f"{CONFIG_KEY}: prefill streaming needs a method that evicts, not {self.method}"
            )
        if isinstance(self.budget, float):
            raise ValueError(
                f"{CONFIG_KEY}: prefill streaming needs a budget in tokens, got {self.budget}"
            )
        if self.stream_budget is not None and self.stream_budget < self.budget:
            raise ValueError(
                f"{CONFIG_KEY}: stream_budget must be at least the budget of {self.budget}, "
                f"got {self.stream_budget}"
            )

    def _check_decode(self, method: Method) -> None:
        if self.decode_budget is None and self.decode_buffer != DEFAULT_DECODE_BUFFER:
            raise ValueError(f"{CONFIG_KEY}: decode_buffer needs a decode_budget")
        if self.decode_budget is None and not self.decode_keep_prompt:
            raise ValueError(f"{CONFIG_KEY}: decode_keep_prompt needs a decode_budget")
        if self.decode_budget is None or self.off:
            return
        if method.scorer.keeps_all:
            raise ValueError(
                f"{CONFIG_KEY}: decode_budget needs a method that evicts, not {self.method}"
            )
        if method.scorer.token_by_token:
            if self.decode_buffer != 1 or self.decode_budget != self.budget:
                raise ValueError(
                    f"{CONFIG_KEY}: {self.method} evicts a token for each that it generates with "
                    "these parameters; set decode_buffer to 1 and decode_budget to the budget"
                )
        elif self.decode_buffer < method.window:
            raise ValueError(
                f"{CONFIG_KEY}: decode_buffer must be at least the window of {method.window}, "
                f"got {self.decode_buffer}"
            )


_OPTIONS = tuple(option.name for option in fields(KVCompressionConfig) if option.name != "params")


def parse_budget(text: str) -> int | float:
    """Read a budget from the command line: tokens per layer, or a share in (0, 1).

    Raises:
        ValueError: Not such a number.

    """
    try:
        value: int | float = int(text)
    except ValueError:
        try:
            value = float(text)
        except ValueError:
            value = math.nan  # refused below, under the text's own name
    check_budget(text if math.isnan(value) else value)
    return value


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_budget(budget: object, name: str = "kv-compression-budget") -> None:
    """Refuse what is no budget.

    Args:
        budget: A number, or anything else.
        name: Name of the setting, for the message.

    Raises:
        ValueError: Neither a whole number of tokens nor a share in (0, 1).

    """
    number = isinstance(budget, int | float) and not isinstance(budget, bool)
    if number and (budget >= 1 if isinstance(budget, int) else 0.0 < budget < 1.0):  # type: ignore[operator]
        return
    raise ValueError(
        f"{name} must be a whole number of tokens per layer, window included, or a share of the "
        f"prompt between 0 and 1, got {shown(budget)}"
    )
