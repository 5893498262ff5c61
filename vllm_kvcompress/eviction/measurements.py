"""What a worker has measured of its compressions."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Report:
    """Compressions since the last report.

    Attributes:
        laps: Phase of a compression, and the microseconds it took on the host.
        counts: Tokens of compressed prompts by ``seen:METHOD``, ``kept:METHOD`` (of an average
            layer) and ``layer:NUMBER``.

    """

    laps: list[tuple[str, int]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def __bool__(self) -> bool:
        return bool(self.laps or self.counts)

    def add(self, other: "Report") -> None:
        """Take in another report. Mutates this one."""
        self.laps += other.laps
        self.counts.update(other.counts)
