"""Who answers: a model behind a cache that is compressed or not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from vllm_kvcompress.tools.evaluation.setting import Setting
from vllm_kvcompress.tools.evaluation.task import Prompt


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as it is run.

    Attributes:
        prompt: What is asked.
        token_ids: What is prefilled, and compressed then.
        fed_ids: Given to the model after the compression, before it answers: the question in the
            query-agnostic protocol, else nothing.
        measured_ids: Continuation whose likelihood is measured; empty: the model answers.

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
    """What came of a case.

    Attributes:
        text: Generated; empty where a likelihood was measured.
        tokens: Generated or measured.
        kept_tokens: A layer's average after the prefill.
        nll: Mean negative log-likelihood of the measured tokens, in nats; None where one answered.

    """

    text: str
    tokens: int
    kept_tokens: int
    nll: float | None = None


class Backend(ABC):
    """Answers cases.

    Attributes:
        source: Name and version, as in the records.
        block_size: Tokens of a block, by which budgets are rounded up.

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
        """How many cases of up to ``longest`` tokens in all make a good chunk; at least 1."""

    @abstractmethod
    def run(
        self,
        cases: Sequence[EncodedPrompt],
        settings: Sequence[Setting],
        wanted: Callable[[EncodedPrompt, Setting], bool],
    ) -> Iterator[tuple[EncodedPrompt, Setting, Answer]]:
        """Answer every wanted pair of a chunk of cases, in any order, each prefilled as seldom as
        the backend can.

        Args:
            cases: At most :meth:`cases_at_once`.
            settings: What :meth:`check` has passed.
            wanted: Whether a pair is to be answered.

        """

    @abstractmethod
    def close(self) -> None:
        """Give back what the backend holds."""
