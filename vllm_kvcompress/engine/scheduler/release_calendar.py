"""When each request may next have something to give back, so that no step has to ask all of them.

A request that generates gains at most a token a step, so one that is n tokens away from its next
release is not looked at for n steps.
"""

from collections.abc import Iterator, Mapping

from vllm.v1.request import Request

from vllm_kvcompress.engine.scheduler.reservations import Reservation
from vllm_kvcompress.planning.compression_schedule import NEVER


class ReleaseCalendar:
    """Requests by the step at which to look at them.

    Args:
        requests: The scheduler's live requests, read only.
        reservations: Those of all admitted requests, read only.

    """

    def __init__(
        self, requests: Mapping[str, Request], reservations: Mapping[str, Reservation]
    ) -> None:
        self._requests = requests
        self._reservations = reservations
        self._step = 0
        self._days: dict[int, list[tuple[str, Reservation]]] = {}

    def add(self, request_id: str) -> None:
        """Look at a request that was just admitted from the next step on."""
        self._enter(request_id, self._reservations[request_id], 1)

    def due(self) -> Iterator[Request]:
        """Begin a step: requests whose computed tokens reach their next release. Consume it all."""
        self._step += 1
        for request_id, reservation in self._days.pop(self._step, ()):
            if self._reservations.get(request_id) is not reservation:
                continue  # finished, or preempted and perhaps admitted anew
            request = self._requests[request_id]
            computed = request.num_computed_tokens
            if computed >= reservation.next_release:
                yield request
            if reservation.next_release == NEVER:
                continue
            generates = computed >= reservation.known_tokens
            wait = reservation.next_release - computed if generates else 1
            self._enter(request_id, reservation, max(wait, 1))

    def _enter(self, request_id: str, reservation: Reservation, wait: int) -> None:
        self._days.setdefault(self._step + wait, []).append((request_id, reservation))
