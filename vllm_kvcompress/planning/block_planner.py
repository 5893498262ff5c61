"""What a request will hold, decided from its prompt's length and the settings alone.

Scheduler and worker run the same code on the same numbers, so they agree without a message.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from vllm_kvcompress.methods import Method, Need
from vllm_kvcompress.paging.rounding import cdiv
from vllm_kvcompress.planning.bisection import largest
from vllm_kvcompress.planning.compression_schedule import CompressionSchedule, Cut, DecodeCuts
from vllm_kvcompress.planning.config import KVCompressionConfig


@dataclass(frozen=True)
class EngineLimits:
    """What the engine around a planner can do.

    Attributes:
        num_layers: L, layers that are compressed and share their blocks' pages.
        one_step_tokens: Longest prompt that can run in one step; 0: do not count on any.
        lag: Steps planned before the last one's result is known: 1 under async scheduling.
        alone: Whether these are all layers of the model, none of which needs a prompt's blocks.

    """

    num_layers: int = 1
    one_step_tokens: int = 0
    lag: int = 1
    alone: bool = True


class BlockPlanner:
    """Plans the blocks of one engine's requests.

    Args:
        config: The engine's settings.
        block_size: Tokens per block.
        limits: What the engine can do; by default prompts are taken to run in several steps.

    Raises:
        ValueError: The settings do not go with the block size or the limits.

    """

    def __init__(
        self, config: KVCompressionConfig, block_size: int, limits: EngineLimits | None = None
    ) -> None:
        config.check_block_size(block_size)
        self.config = config
        self.block_size = block_size
        self.limits = limits or EngineLimits()
        self.method = method = config.build_method()
        self.window = method.window
        self.keeps_all = method.scorer.keeps_all
        self.token_by_token = method.scorer.token_by_token
        self.needs_queries = Need.WINDOW_QUERIES in method.needs
        self.decode_window = 1 if method.scorer.token_by_token else method.window
        self.layers_per_division = layers_between_cuts(method, self.limits.num_layers)
        self._stream_chunk = self._checked_chunk()
        if config.prefill == "cascade" and limits is not None and not limits.alone:
            raise ValueError(
                "kv_compression: prefill cascade is not supported for models with sliding-window "
                "layers, which need blocks for the whole prompt in that step; set prefill to auto"
            )
        asked = config.prefill == "cascade" and not config.off
        if asked and limits is not None and not self.can_cascade:
            raise ValueError(
                f"kv_compression: prefill cascade gains nothing with {config.method}, which frees "
                "nothing before its last layer; set prefill to auto"
            )
        # The scheduler asks several times per request and step.
        self.prompt_cut = lru_cache(maxsize=4096)(self._prompt_cut)
        self.schedule = lru_cache(maxsize=8192)(self._schedule)
        self.least_pool = lru_cache(maxsize=8)(self._least_pool)

    @property
    def can_cascade(self) -> bool:
        """Whether layers can be cut while a prefill step runs."""
        saves = (
            self.layers_per_division < self.limits.num_layers and self.limits.one_step_tokens > 0
        )
        return saves and self.limits.alone

    def budget_tokens(self, prompt_len: int) -> int:
        """Tokens per layer, window included, that the budget means for a prompt of this length."""
        budget = self.config.budget
        if isinstance(budget, float):
            # A share of a short prompt may be less than a method can work with.
            return max(math.ceil(budget * prompt_len), self.window + self.block_size)
        return budget

    def budget_blocks(self, prompt_len: int) -> int:
        """Blocks per layer that the budget allows a prompt of this length."""
        return cdiv(self.budget_tokens(prompt_len), self.block_size)

    def cascade_prefill_blocks(self, prompt_len: int, cached_blocks: int = 0) -> int | None:
        """Count the prefill blocks of a cascade.

        Args:
            prompt_len: Prompt tokens.
            cached_blocks: Leading blocks that come from the prefix cache and are used as they are.

        Returns:
            Cached blocks plus workspace; None where a cascade cannot be or saves nothing.

        """
        own = prompt_len - cached_blocks * self.block_size
        if not self.can_cascade or own > self.limits.one_step_tokens:
            return None
        if self.prompt_cut(prompt_len) is None:
            return None
        plain = cdiv(prompt_len, self.block_size)
        prefill_blocks = cached_blocks + self.workspace_blocks(plain - cached_blocks)
        return prefill_blocks if prefill_blocks < plain else None

    def workspace_blocks(self, pages: int) -> int:
        """Blocks needed to hold ``pages`` pages for each of ``layers_per_division`` layers."""
        return cdiv(self.layers_per_division * pages, self.limits.num_layers)

    def peak_blocks(self, prompt_len: int, num_tokens: int, decode: bool = True) -> int:
        """Peak number of blocks that a request holds, with the prefill that needs fewest.

        Args:
            prompt_len: Prompt tokens.
            num_tokens: Prompt and generated tokens.
            decode: Whether the request is cut while it generates, if the settings say so.

        """
        schedule = self.schedule(prompt_len, decode)
        if schedule is None:
            return cdiv(num_tokens, self.block_size)
        prefill_blocks = None
        if self.config.prefill != "full" and not self.streams(prompt_len):
            prefill_blocks = self.cascade_prefill_blocks(prompt_len)
        return schedule.peak_blocks(num_tokens, self.limits.lag, prefill_blocks)

    def _least_pool(self, max_model_len: int) -> int:
        """Count the blocks in which any one prompt of up to max_model_len tokens can be served.

        They hold its prefill and one generated token; :meth:`most_tokens` says how many more fit.
        """
        size, longest = self.block_size, max_model_len
        one_step = self.limits.one_step_tokens
        if self.config.prefill == "streaming":
            # After a few cuts, a longer prompt only repeats what a shorter one holds.
            first = self._stream_blocks() * size + self._stream_chunk
            longest = min(longest, max(first, one_step) + 5 * self._stream_chunk)
        # Where a share of the prompt, or the length of a step, makes a difference.
        prompts = {min(one_step + 1, longest)}
        for start in range(0, longest, size):
            prompts |= {start + 1, min(start + size, longest)}
        return max(self.peak_blocks(prompt, prompt + 1) for prompt in prompts)

    def most_tokens(
        self, prompt_len: int, max_model_len: int, pool_blocks: int, decode: bool = True
    ) -> int:
        """Tokens, prompt included, that a request can reach with the whole pool to itself.

        Args:
            prompt_len: Prompt tokens.
            max_model_len: Most tokens of any request.
            pool_blocks: Blocks that can be handed out.
            decode: As for :meth:`peak_blocks`.

        Returns:
            At most max_model_len; below prompt_len + 1 if not even one token can be generated.

        """
        return largest(
            prompt_len,
            max_model_len,
            lambda tokens: self.peak_blocks(prompt_len, tokens, decode) <= pool_blocks,
        )

    def concurrency(
        self,
        max_model_len: int,
        pool_blocks: int,
        window_group_peak: int = 0,
        window_group_held: int = 0,
    ) -> float:
        """How many prompts of max_model_len tokens can be served at one time.

        Each is admitted at its peak, one after another, and holds what is left after its prefill.

        Args:
            max_model_len: Tokens of each.
            pool_blocks: Blocks that can be handed out.
            window_group_peak: Most blocks that each holds in layers that are not compressed.
            window_group_held: Those that it holds there after its prefill.

        """
        peak = self.peak_blocks(max_model_len, max_model_len) + window_group_peak
        schedule = self.schedule(max_model_len, True)
        if schedule is None:
            return pool_blocks / peak
        number = schedule.count(max_model_len)
        held = schedule.blocks_for(max_model_len, number) + window_group_held
        if pool_blocks < peak:
            return pool_blocks / peak
        return 1.0 + (pool_blocks - peak) / held

    def row_blocks(self, max_model_len: int, most_budget: int = 0) -> int:
        """Count the entries that a row of the runner's block table needs; it never shrinks.

        Args:
            max_model_len: Most tokens of any request.
            most_budget: Tokens per layer that some request may ask for, if more than the budget.

        """
        size = self.block_size
        whole = cdiv(max_model_len, size)
        budget = max(self.budget_blocks(max_model_len), cdiv(most_budget, size))
        if self.keeps_all and not self.config.off:
            budget = whole
        entries = whole + 2 + min(budget, whole)
        if self.config.prefill == "streaming":
            cuts = max_model_len // self._stream_chunk + 1
            entries += cuts * max(self._stream_blocks(), cdiv(2 * most_budget, size))
        if self.config.decode_budget is not None:
            entries += cdiv(self.config.decode_budget, size) + 1
            if self.token_by_token:  # a block each time
                entries += max_model_len
        return entries

    def streams(self, prompt_len: int) -> bool:
        """Whether a prompt is compressed between its chunks."""
        return self.config.prefill == "streaming" and prompt_len > self.limits.one_step_tokens

    def _prompt_cut(self, prompt_len: int) -> Cut | None:
        """Return the cut at a prompt's end; None if the prompt is kept as it is.

        Args:
            prompt_len: Prompt tokens.

        """
        if self.config.off:
            return None
        if self.keeps_all:
            blocks = cdiv(prompt_len, self.block_size)
            return Cut(prompt_len, blocks, slack=blocks * self.block_size - prompt_len)
        blocks = self.budget_blocks(prompt_len)
        return None if prompt_len <= blocks * self.block_size else Cut(prompt_len, blocks)

    def _schedule(self, prompt_len: int, decode: bool = True) -> CompressionSchedule | None:
        """Return when a request is cut; None if it never is.

        Args:
            prompt_len: Prompt tokens.
            decode: Whether it is cut while it generates, if the settings say so.

        """
        if self.config.off:
            return None
        cut = self.prompt_cut(prompt_len)
        cuts: list[Cut] = []
        if cut is not None:
            if self.streams(prompt_len):
                cuts += self._chunk_cuts(prompt_len)
            cuts.append(cut)
        decode_cuts = self._decode_cuts(prompt_len, cuts) if decode else None
        if not cuts and decode_cuts is None:
            return None
        return CompressionSchedule(prompt_len, self.block_size, cuts, decode_cuts)

    def _chunk_cuts(self, prompt_len: int) -> list[Cut]:
        chunk, blocks = self._stream_chunk, self._stream_blocks()
        # Two cuts never share a window, and a cut that has nothing to evict is none.
        last = prompt_len - max(self.window, self.block_size)
        return [
            Cut(position, blocks)
            for position in range(chunk, last + 1, chunk)
            if position > blocks * self.block_size
        ]

    def _decode_cuts(self, prompt_len: int, cuts: list[Cut]) -> DecodeCuts | None:
        if self.config.decode_budget is None:
            return None
        size = self.block_size
        blocks = cdiv(self.config.decode_budget, size)
        buffer = 1 if self.token_by_token else cdiv(self.config.decode_buffer, size) * size
        if self.token_by_token and not cuts:
            return None  # what is judged by single queries must have been compressed before
        held = cuts[-1].blocks * size if cuts else prompt_len
        position = prompt_len + max(blocks * size + buffer - held, buffer)
        moves = not cuts or cuts[-1].blocks != blocks
        return DecodeCuts(Cut(position, blocks, moves=moves), buffer)

    def _stream_blocks(self) -> int:
        budget = self.config.stream_budget
        if budget is None:
            assert isinstance(self.config.budget, int)  # KVCompressionConfig has seen to it
            budget = 2 * self.config.budget
        return cdiv(budget, self.block_size)

    def _checked_chunk(self) -> int:
        """Tokens between two cuts of a prompt, whole blocks."""
        if self.config.prefill != "streaming":
            return 1
        asked = self.config.stream_chunk or self.limits.one_step_tokens or 2048
        chunk = asked - asked % self.block_size
        least = max(self.window, self.block_size)
        if chunk < least:
            raise ValueError(
                f"kv_compression: stream_chunk {asked} is too small: {self.config.method} with "
                f"blocks of {self.block_size} needs at least {least} tokens"
            )
        return chunk


def layers_between_cuts(method: Method, num_layers: int) -> int:
    """Most layers whose full keys and values are held at one time in a cascade."""
    if method.scorer.keeps_all or not method.scorer.budgets_are_nested:
        return num_layers
    if method.allocator.budgets_ignore_scores:
        return 1
    return min(method.allocator.layers_per_division or num_layers, num_layers)
