"""A stop that all ranks make after the same step, whichever of them was asked."""

from __future__ import annotations

from megadiff.parallel.topology import Topology
from megadiff.supervision.stopping import STOP_FILE, StopRequest


class AgreedStop:
    """Asked once a step, by every rank."""

    def __init__(self, request: StopRequest | None, topology: Topology) -> None:
        """Without a request nothing is asked and nobody is waited for."""
        self._request, self._topology = request, topology
        self._is_by_file = False

    def reason(self) -> str | None:
        """Why the run stops now, in the words of the first rank that was asked; None to go on.

        Collective over the world: one integer over the host's network, which waits for no device.
        """
        if self._request is None:
            return None
        asked = self._request.reason()
        ranks = self._topology.layout.world_size
        first = self._topology.largest(ranks - self._topology.rank if asked is not None else 0)
        if not first:
            return None
        answers = self._topology.from_main(self._topology.gather_to_main(asked))
        self._is_by_file = any(answer is not None and answer.startswith(STOP_FILE) for answer in answers)
        return answers[ranks - first]

    def honoured(self) -> None:
        """The run has saved itself: a stop file that was seen is cleared away; one that came later asks again."""
        if self._request is not None and self._is_by_file:
            self._request.honoured()
