"""The interface of the software that answers: a model with a cache that may be compressed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vllm_kvcompress.tools.evaluation.setting import Setting
from vllm_kvcompress.tools.evaluation.task import Prompt


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt in tokens.

    Attributes:
        prompt: The prompt.
        token_ids: Tokens that are prefilled and then compressed.
        fed_ids: Tokens given to the model after the compression, before it answers: the question
            in the query-agnostic protocol, else none.
        measured_ids: Continuation whose likelihood is measured; empty if the model answers.

    """

    prompt: Prompt
    token_ids: tuple[int, ...]
    fed_ids: tuple[int, ...] = ()
    measured_ids: tuple[int, ...] = ()

    @property
    def most_tokens(self) -> int:
        """Most tokens of prompt and continuation together."""
        continuation = len(self.measured_ids) or self.prompt.max_tokens
        return len(self.token_ids) + len(self.fed_ids) + continuation


@dataclass(frozen=True)
class Answer:
    """What a backend answered.

    Attributes:
        text: Generated text; empty where a likelihood was measured.
        tokens: Number of tokens generated or measured.
        kept_tokens: Tokens that a layer held on average after the prefill.
        nll: Mean negative log-likelihood of the measured tokens in nats; None if text was
            generated.

    """

    text: str
    tokens: int
    kept_tokens: int
    nll: float | None = None


Asked = tuple[EncodedPrompt, Sequence[Setting]]
"""A prompt and the settings under which it is to be answered, at least one."""


class Backend(ABC):
    """Software that answers prompts.

    Attributes:
        source: Name and version, as in the records.
        block_size: Tokens of a block; budgets are rounded up to whole blocks.

    """

    source: str
    block_size: int

    @abstractmethod
    def check(self, settings: Sequence[Setting]) -> None:
        """Refuse settings that this backend does not have.

        Raises:
            EvaluationError: One sentence that names the setting.

        """

    @abstractmethod
    def cases_at_once(self, longest: int) -> int:
        """Number of prompts of up to ``longest`` tokens in all for a good chunk, at least 1."""

    @abstractmethod
    def run(self, chunk: Sequence[Asked]) -> Iterator[tuple[EncodedPrompt, Setting, Answer]]:
        """Answer every pair of a chunk, in any order, with as few prefills as the backend can.

        Args:
            chunk: At most :meth:`cases_at_once` prompts, with settings that :meth:`check` passed.

        """

    @abstractmethod
    def close(self) -> None:
        """Free what the backend holds."""
