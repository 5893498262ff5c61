"""What a worker has measured of its cuts."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class CutReport:
    """Cuts since the last report.

    Attributes:
        phase_times: Per cut and phase: the name of the phase, and the seconds it took on the host.
        tokens_seen: Tokens of compressed prompts, by method.
        tokens_kept: Tokens that an average layer kept of them, by method.
        layer_tokens_kept: Tokens that each layer kept of them, [L]; empty without such a prompt.
        fallbacks: Cuts in which the method failed, by method.

    """

    phase_times: list[tuple[str, float]] = field(default_factory=list)
    # Counters where they are counted, dicts where they have been sent to.
    tokens_seen: dict[str, int] = field(default_factory=Counter)
    tokens_kept: dict[str, int] = field(default_factory=Counter)
    layer_tokens_kept: list[int] = field(default_factory=list)
    fallbacks: dict[str, int] = field(default_factory=Counter)

    def __bool__(self) -> bool:
        return bool(self.phase_times or self.tokens_seen)

    def add_prompt(self, method: str, tokens: int, kept: Sequence[int]) -> None:
        """Count one compressed prompt. Mutates the report.

        Args:
            method: The method's name.
            tokens: Tokens of the prompt.
            kept: Tokens kept by each layer, [L].

        """
        self.tokens_seen[method] += tokens
        self.tokens_kept[method] += sum(kept) // len(kept)
        before = self.layer_tokens_kept or [0] * len(kept)
        self.layer_tokens_kept = [a + b for a, b in zip(before, kept, strict=True)]
