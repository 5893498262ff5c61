"""What the user asked for: method, budget, parameters. Parsed once, checked, immutable."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from vllm_kvcompress.arena import ArenaPlan
from vllm_kvcompress.methods import Method, get_method

CONFIG_KEY = "kv_compression"
"""Name of the entry in vLLM's ``additional_config``."""

DEFAULT_BUDGET = 1024


@dataclass(frozen=True)
class KVCompressionConfig:
    """Settings of one engine.

    Attributes:
        method: Registered name of the method.
        budget: Tokens each layer keeps on average, window included (int), or that number as a
            share of the prompt, in (0, 1) (float).
        params: The method's own parameters, by name.
        check_integrity: Verify arena and block pool after every step (slow; for tests).
        log_requests: Log one JSON line per compressed request.

    """

    method: str
    budget: int | float = DEFAULT_BUDGET
    params: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    check_integrity: bool = False
    log_requests: bool = False

    def __post_init__(self) -> None:
        _check_budget(self.budget)
        for name in ("check_integrity", "log_requests"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(
                    f"{CONFIG_KEY}: {name} must be true or false, got {getattr(self, name)!r}"
                )
        self.build_method()

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
        flat.update({k: True for k in ("check_integrity", "log_requests") if getattr(self, k)})
        return flat

    def build_method(self) -> Method:
        """Make the method object.

        Raises:
            ValueError: Unknown method, unknown parameter or wrong value.

        """
        return get_method(self.method, self.params)

    def check_block_size(self, block_size: int) -> None:
        """Refuse a budget that leaves no room beside the window.

        Args:
            block_size: Tokens per block.

        Raises:
            ValueError: A token budget below window + one block.

        """
        method = self.build_method()
        least = method.window + block_size
        if method.keeps_all or isinstance(self.budget, float) or self.budget >= least:
            return
        raise ValueError(
            f"kv-compression-budget {self.budget} is too small: {self.method} needs at least "
            f"{least} tokens per layer (window {method.window} + one block of {block_size}); "
            "raise the budget or lower --block-size"
        )


class Planner:
    """Decides, from the prompt's length alone, what a request will hold after its prefill.

    Scheduler and worker run the same code on the same numbers, so neither has to tell the other.

    Args:
        config: The engine's settings.
        block_size: Tokens per block.

    """

    def __init__(self, config: KVCompressionConfig, block_size: int) -> None:
        config.check_block_size(block_size)
        self.config = config
        self.block_size = block_size
        method = config.build_method()
        self.window = method.window
        self.keeps_all = method.keeps_all
        # The scheduler asks several times per request and step.
        self.plan = lru_cache(maxsize=4096)(self._plan)

    def budget_blocks(self, prompt_len: int) -> int:
        """Blocks per layer that the budget allows a prompt of this length."""
        budget = self.config.budget
        if isinstance(budget, float):
            # A share of a short prompt may be less than a method can work with.
            budget = max(math.ceil(budget * prompt_len), self.window + self.block_size)
        return -(-budget // self.block_size)

    def _plan(self, prompt_len: int) -> ArenaPlan | None:
        """Return what a request with this prompt holds, or None if it stays as it is.

        Args:
            prompt_len: Prompt tokens.

        """
        bs = self.block_size
        prompt_blocks = -(-prompt_len // bs)
        if self.keeps_all:
            slack = prompt_blocks * bs - prompt_len
            return ArenaPlan(prompt_len, bs, prompt_blocks, prompt_blocks, slack)
        blocks = self.budget_blocks(prompt_len)
        if prompt_len <= blocks * bs:
            return None
        return ArenaPlan(prompt_len, bs, prompt_blocks, blocks, 0)

    def peak_blocks(self, max_model_len: int) -> int:
        """Most blocks any one request of up to max_model_len tokens holds at one time."""
        whole = -(-max_model_len // self.block_size)
        arena = self.budget_blocks(max_model_len)
        if self.keeps_all:
            arena = whole
        elif isinstance(self.config.budget, float):
            # A share may leave the longest prompt whole and still cut a shorter one.
            arena = min(arena, (max_model_len - 1) // self.block_size)
        elif self.plan(max_model_len) is None:
            arena = 0
        # Prompt and generated tokens each end in a block of their own.
        return whole + 1 + arena


_OPTIONS = ("method", "budget", "check_integrity", "log_requests")


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
            raise ValueError(_budget_error(text)) from None
    _check_budget(value)
    return value


def _check_budget(budget: object) -> None:
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise ValueError(_budget_error(budget))
    if isinstance(budget, int) and budget < 1:
        raise ValueError(_budget_error(budget))
    if isinstance(budget, float) and not 0.0 < budget < 1.0:
        raise ValueError(_budget_error(budget))


def _budget_error(budget: object) -> str:
    return (
        "kv-compression-budget must be a whole number of tokens per layer, window included, "
        f"or a share of the prompt between 0 and 1, got {budget!r}"
    )
