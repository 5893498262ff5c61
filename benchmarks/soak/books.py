"""What happened: counts, and faults with the request that shows each."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.soak.asks import Ask

MOST_SHOWN = 400
"""Characters of a request that are printed; the file has all of it."""


@dataclass
class Books:
    """Counts of a whole soak.

    Attributes:
        file: Takes one JSON object for each fault.
        asked: Requests by kind.
        counts: Everything else, by name.
        faults: Number of faults by what they are.
        worst_drift: Largest difference of a log-probability by kind, in nats, of answers that
            count as alike.
        in_flight: Requests without an answer yet.
        noted: What :meth:`note` has printed.

    """

    file: Path
    asked: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    worst_drift: dict[str, float] = field(default_factory=dict)
    in_flight: dict[int, Ask] = field(default_factory=dict)
    noted: set[str] = field(default_factory=set)

    def fault(self, what: str, detail: str, ask: Ask | None = None, **more: Any) -> None:
        """Enter a fault, print it, and keep the request that shows it.

        Args:
            what: Its kind.
            detail: One sentence.
            ask: The request.
            more: Further things for the file.

        """
        self.faults[what] += 1
        row: dict[str, Any] = {"fault": what, "detail": detail, **more}
        shown = ""
        if ask is not None:
            row |= {"kind": ask.kind, "path": ask.path, "body": ask.body}
            body = json.dumps(ask.body)
            shown = f"\n  {ask.path} {body[:MOST_SHOWN]}{'...' if len(body) > MOST_SHOWN else ''}"
            detail = f"{ask.kind}: {detail}"
        with self.file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")
        print(f"FAULT {what}: {detail}{shown}", flush=True)

    def note(self, what: str, detail: str) -> None:
        """Count what is no fault, and print each detail once."""
        self.counts[what] += 1
        if detail not in self.noted:
            self.noted.add(detail)
            print(f"NOTE {what}: {detail[:300]}", flush=True)

    def died(self, log: str) -> None:
        """Enter the death of a server with all requests that it had."""
        crowd = [
            {"kind": ask.kind, "path": ask.path, "body": ask.body}
            for ask in self.in_flight.values()
        ]
        self.fault("death", "the server is gone or answers nothing", crowd=crowd, log=log)
