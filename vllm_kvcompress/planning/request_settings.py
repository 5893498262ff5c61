"""The settings of each request: the server's, changed by its own where the policy allows it.

A request's settings are a few entries in vLLM's ``extra_args`` (``vllm_xargs`` over HTTP). They are
checked in the process that takes the request in; scheduler and worker resolve the same entries
again, with the same result.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from vllm_kvcompress.methods import Method, available, get_method, get_spec
from vllm_kvcompress.planning.block_planner import BlockPlanner, EngineLimits
from vllm_kvcompress.planning.compression_schedule import CompressionSchedule
from vllm_kvcompress.planning.config import KVCompressionConfig, check_budget
from vllm_kvcompress.planning.pinned_ranges import Ranges, count_before, parse_ranges, shown
from vllm_kvcompress.planning.possible_methods import possible_methods
from vllm_kvcompress.planning.setting_names import is_near_miss

METHOD_KEY = "kv_compression"
BUDGET_KEY = "kv_compression_budget"
PARAMS_KEY = "kv_compression_config"
KEEP_KEY = "kv_compression_keep"
DECODE_KEY = "kv_compression_decode"
KEEP_PROMPT_KEY = "kv_compression_decode_keep_prompt"
REQUEST_KEYS = (METHOD_KEY, BUDGET_KEY, PARAMS_KEY, KEEP_KEY, DECODE_KEY, KEEP_PROMPT_KEY)

MOST_WINDOW = 128
"""Largest window that a request may ask for where the policy sets no bound of its own."""


@dataclass(frozen=True)
class RequestSettings:
    """What one request gets.

    Attributes:
        planner: Plans requests with its method, budget and parameters.
        pinned_ranges: Prompt tokens that stay whatever their scores.
        decode: Whether generated tokens are cut back, if the engine does that.
        keep_prompt: Whether that leaves its prompt alone where it fits.

    """

    planner: BlockPlanner
    pinned_ranges: Ranges = ()
    decode: bool = True
    keep_prompt: bool = True

    def schedule(self, prompt_len: int) -> CompressionSchedule | None:
        """Return when a request with this prompt is cut, None if it never is."""
        return self.planner.schedule(prompt_len, self.decode)

    def keeps_prompt(self, prompt_len: int) -> bool:
        """Whether decode cuts keep all that the layers hold of the prompt by then.

        They do where at least a quarter of what they leave, and two windows, stays for generated
        tokens; a prompt that takes more competes with them.
        """
        schedule = self.schedule(prompt_len)
        if not self.keep_prompt or schedule is None or schedule.decode_cuts is None:
            return False
        size, cuts = self.planner.block_size, schedule.prefill_cuts
        held = cuts[-1].blocks * size if cuts else prompt_len
        left = schedule.decode_cuts.first.blocks * size
        return held + max(2 * self.planner.window, left // 4) <= left

    def pinned_count(self, prompt_len: int) -> int:
        """Tokens outside of the window that every layer must have room for at every cut."""
        schedule = self.schedule(prompt_len)
        if schedule is None or not self.pinned_ranges:
            return 0
        # What is in the window at the prompt's end is not, when the first answer is cut back.
        stays = schedule.decode_cuts is not None
        return count_before(
            self.pinned_ranges, prompt_len if stays else prompt_len - self.planner.window
        )


class SettingsResolver:
    """Resolves the settings of one engine's requests.

    Args:
        config: The engine's settings.
        block_size: Tokens per block.
        limits: What the engine can do.

    Attributes:
        default_planner: Plans requests that set nothing.

    Raises:
        ValueError: As :class:`BlockPlanner` does.

    """

    def __init__(
        self, config: KVCompressionConfig, block_size: int, limits: EngineLimits | None = None
    ) -> None:
        self.default_planner = BlockPlanner(config, block_size, limits)
        self._policy = config.policy
        self._own_settings = RequestSettings(
            self.default_planner, keep_prompt=config.decode_keep_prompt
        )
        self._planner = lru_cache(maxsize=256)(self._make_planner)

    def resolve(self, extra_args: Mapping[str, Any] | None, prompt_len: int) -> RequestSettings:
        """Resolve the settings of one request.

        Args:
            extra_args: The entry of that name of its sampling parameters, or None.
            prompt_len: Prompt tokens.

        Raises:
            ValueError: One sentence that names the setting, its value and what is allowed.

        """
        asked = {k: v for k, v in (extra_args or {}).items() if _meant_for_us(str(k))}
        if not asked:
            return self._own_settings
        for key in asked:
            if key not in REQUEST_KEYS:
                raise ValueError(
                    f"{shown(key)} is not a setting of a request; there are "
                    f"{', '.join(REQUEST_KEYS)}"
                )
        planner = self._asked_planner(asked, prompt_len)
        settings = RequestSettings(
            planner, self._keep(asked, prompt_len), self._decode(asked), self._keep_prompt(asked)
        )
        self._check_room(settings, prompt_len)
        return settings

    def possible_methods(self) -> Iterator[Method]:
        """Yield methods that together do all that requests' methods do."""
        return possible_methods(self.default_planner.config, self.largest_window)

    @property
    def largest_window(self) -> int:
        """Largest window that any request can have."""
        named = self._policy.methods
        allowed = [n for n in available() if named is None or n in named]
        most = max(
            [self.default_planner.window, *(get_method(name, {}).window for name in allowed)]
        )
        return int(max(most, self._policy.most("window", MOST_WINDOW) or 0))

    @property
    def largest_decode_window(self) -> int:
        """Most queries that a cut of generated tokens looks at."""
        return 1 if self.default_planner.token_by_token else self.largest_window

    def row_blocks(self, max_model_len: int) -> int:
        """Count the entries that a row of the runner's block table needs for any request."""
        bounds = self._policy.budget
        most: float = 0
        if not isinstance(bounds, bool):
            most = max_model_len if bounds.high is None else bounds.high
            if isinstance(most, float) and most < 1:
                most *= max_model_len
        if "scatter" in (self._policy.methods or ()):
            most = max_model_len
        # A share of the prompt is never less than a method's window and a block.
        most = max(int(most) + 1, self.largest_window + self.default_planner.block_size)
        return self.default_planner.row_blocks(max_model_len, min(most, max_model_len))

    # --- method, budget and parameters -----------------------------------------------------------

    def _asked_planner(self, asked: Mapping[str, Any], prompt_len: int) -> BlockPlanner:
        method = self._method(asked)
        params = self._params(asked)
        own = self.default_planner.config
        budget = asked.get(BUDGET_KEY, own.budget)
        if get_spec(method).scorer.keeps_all:
            for key in (BUDGET_KEY, PARAMS_KEY):
                if key in asked:
                    raise ValueError(
                        f"{key} needs a {METHOD_KEY} that compresses, and this request has {method}"
                    )
        check_budget(budget, BUDGET_KEY)
        merged = self._merged(method, params)
        key = repr((method, budget, sorted(merged.items())))
        if key == repr((own.method, own.budget, sorted(own.params.items()))):
            return self.default_planner
        planner = self._planner(_Hashed(key, method, budget, MappingProxyType(merged)))
        if BUDGET_KEY in asked:
            self._check_budget(planner, prompt_len)
        if PARAMS_KEY in asked and planner.window > self.largest_window:
            raise ValueError(
                f"{PARAMS_KEY}: window must be at most {self.largest_window} on this server, got "
                f"{planner.window}"
            )
        return planner

    def _merged(self, method: str, params: Mapping[str, Any]) -> Mapping[str, Any]:
        """A request's parameters, and the server's that have an effect beside them."""
        own = self.default_planner.config
        return get_spec(method).override(own.params if method == own.method else {}, params)

    def _make_planner(self, asked: "_Hashed") -> BlockPlanner:
        server = self.default_planner
        method = get_method(asked.method, asked.params)
        if (
            method.scorer.token_by_token
            and not server.token_by_token
            and server.config.decode_budget
        ):
            raise ValueError(
                f"{PARAMS_KEY}: {asked.method} with these parameters evicts a token for each that "
                f"it generates, which this server does not offer; drop them"
            )
        config = replace(
            server.config, method=asked.method, budget=asked.budget, params=asked.params
        )
        config.check_block_size(server.block_size, BUDGET_KEY, "raise it or lower the window")
        return BlockPlanner(config, server.block_size, server.limits)

    def _method(self, asked: Mapping[str, Any]) -> str:
        own = self.default_planner.config.method
        method = asked.get(METHOD_KEY, own)
        if METHOD_KEY not in asked or method == own:
            return own
        if not isinstance(method, str) or method not in available():
            raise ValueError(f"{METHOD_KEY} must be one of {self._offered()}, got {shown(method)}")
        if not self._policy.allows_method(method):
            raise ValueError(
                f"{METHOD_KEY} {method} may not be set by requests on this server, which allows "
                f"{self._offered()}"
            )
        return method

    def _offered(self) -> str:
        own = self.default_planner.config.method
        return ", ".join(n for n in available() if n == own or self._policy.allows_method(n))

    def _params(self, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        value = asked.get(PARAMS_KEY, {})
        if isinstance(value, str):
            try:
                value = json.loads(value.encode())  # what is no Unicode could not be sent on
            except (ValueError, RecursionError):  # a number may have too many digits
                value = None
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise ValueError(
                f"{PARAMS_KEY} must be a JSON object of parameters of the method, got "
                f"{shown(asked[PARAMS_KEY])}"
            )
        for name, setting in value.items():
            if refusal := self._policy.refusal_of_param(name, setting):
                raise ValueError(f"{PARAMS_KEY}: {shown(name)} {refusal}, got {shown(setting)}")
        return value

    def _check_budget(self, planner: BlockPlanner, prompt_len: int) -> None:
        bounds, budget = self._policy.budget, planner.config.budget
        tokens = planner.budget_tokens(prompt_len)
        if bounds is False and budget != self.default_planner.config.budget:
            raise ValueError(
                f"{BUDGET_KEY} may not be set by requests on this server, got {budget}"
            )
        if bounds is True:
            self._check_most(budget, tokens, self.default_planner.config.budget, prompt_len)
        elif not isinstance(bounds, bool):
            if bounds.high is not None:
                self._check_most(budget, tokens, bounds.high, prompt_len)
            low = _tokens(bounds.low, prompt_len)
            if tokens < low:
                raise ValueError(
                    f"{BUDGET_KEY} must be at least {bounds.low} on this server, got {budget}"
                )

    def _check_most(self, budget: float, tokens: int, most: float, prompt_len: int) -> None:
        if type(budget) is type(most):
            good = budget <= most
        else:
            good = tokens <= max(
                _tokens(most, prompt_len), self.default_planner.budget_tokens(prompt_len)
            )
        if not good:
            kind = "of the prompt" if most < 1 else "tokens per layer"
            raise ValueError(f"{BUDGET_KEY} must be at most {most} {kind} here, got {budget}")

    # --- what else a request may set -------------------------------------------------------------

    def _keep(self, asked: Mapping[str, Any], prompt_len: int) -> Ranges:
        if KEEP_KEY not in asked:
            return ()
        allowed = self._policy.keep
        if allowed is False:
            raise ValueError(f"{KEEP_KEY} may not be set by requests on this server")
        try:
            ranges = parse_ranges(asked[KEEP_KEY], prompt_len)
        except ValueError as error:
            raise ValueError(f"{KEEP_KEY} {error}") from None
        kept = count_before(ranges, prompt_len)
        if allowed is not True and kept > allowed:
            raise ValueError(
                f"{KEEP_KEY} must name at most {allowed} tokens on this server, got {kept}"
            )
        return ranges

    def _decode(self, asked: Mapping[str, Any]) -> bool:
        return self._switch(asked, DECODE_KEY, True)

    def _keep_prompt(self, asked: Mapping[str, Any]) -> bool:
        own = self.default_planner.config.decode_keep_prompt
        return self._switch(asked, KEEP_PROMPT_KEY, own)

    def _switch(self, asked: Mapping[str, Any], key: str, own: bool) -> bool:
        """What a request says of decode cuts; ``own`` is the server's."""
        value = asked.get(key, own)
        # In a request's JSON true and false reach vLLM as 1 and 0.
        if not isinstance(value, int) or value not in (0, 1):
            raise ValueError(f"{key} must be true or false, got {shown(value)}")
        if value != own and not self._policy.decode:
            other = "true" if value else "false"
            raise ValueError(f"{key} may not be set to {other} by requests on this server")
        return bool(value)

    def _check_room(self, settings: RequestSettings, prompt_len: int) -> None:
        planner, kept = settings.planner, settings.pinned_count(prompt_len)
        schedule = settings.schedule(prompt_len)
        if schedule is None or planner.keeps_all:
            return
        cuts = [
            *schedule.prefill_cuts,
            *([schedule.decode_cuts.first] if schedule.decode_cuts else []),
        ]
        held = min(cut.blocks for cut in cuts) * planner.block_size
        if kept > held - planner.window:
            raise ValueError(
                f"{KEEP_KEY} names {kept} tokens beside the last {planner.window}, which always "
                f"stay, but a budget of {held} tokens per layer has room for "
                f"{held - planner.window}"
            )


@dataclass(frozen=True)
class _Hashed:
    """Settings of a planner, compared by their text."""

    key: str
    method: str = field(compare=False)
    budget: int | float = field(compare=False)
    params: Mapping[str, Any] = field(compare=False)


def _meant_for_us(name: str) -> bool:
    return name.startswith(METHOD_KEY) or is_near_miss(name)


def _tokens(budget: float | None, prompt_len: int) -> int:
    if budget is None:
        return 0
    return math.ceil(budget * prompt_len) if budget < 1 else int(budget)
