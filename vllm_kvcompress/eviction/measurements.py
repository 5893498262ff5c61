"""What a worker has measured of its cuts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


def add_counts(counts: dict[str, int], more: Mapping[str, int]) -> None:
    """Add to each count what ``more`` has under the same key. Mutates counts."""
    for key, count in more.items():
        counts[key] = counts.get(key, 0) + count


@dataclass
class CutReport:
    """Cuts since the last report.

    Attributes:
        phase_times: Per cut and phase: the name of the phase, and the seconds it took on the host.
        tokens_seen: Tokens of compressed prompts, by method.
        tokens_kept: Tokens that an average layer kept of them, by method.
        layer_tokens_kept: Tokens that each layer kept of them, [L]; empty without such a prompt.

    """

    phase_times: list[tuple[str, float]] = field(default_factory=list)
    tokens_seen: dict[str, int] = field(default_factory=dict)
    tokens_kept: dict[str, int] = field(default_factory=dict)
    layer_tokens_kept: list[int] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.phase_times or self.tokens_seen)

    def add_prompt(self, method: str, tokens: int, kept: Sequence[int]) -> None:
        """Count one compressed prompt. Mutates the report.

        Args:
            method: The method's name.
            tokens: Tokens of the prompt.
            kept: Tokens kept by each layer, [L].

        """
        mean = sum(kept) // len(kept)
        self.add(CutReport([], {method: tokens}, {method: mean}, list(kept)))

    def add(self, other: "CutReport") -> None:
        """Add another report's figures. Mutates this one."""
        self.phase_times += other.phase_times
        add_counts(self.tokens_seen, other.tokens_seen)
        add_counts(self.tokens_kept, other.tokens_kept)
        if other.layer_tokens_kept:
            before = self.layer_tokens_kept or [0] * len(other.layer_tokens_kept)
            self.layer_tokens_kept = [
                a + b for a, b in zip(before, other.layer_tokens_kept, strict=True)
            ]
