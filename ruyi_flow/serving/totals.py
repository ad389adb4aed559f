"""What an answer adds up to: its statistics, and what the entry node counts about it."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

from ruyi_flow.errors import CapacityError, DeadlineExceeded, NodeUnavailable, RequestCancelled, RequestError
from ruyi_flow.loop.chain import Round
from ruyi_flow.telemetry.counters import NodeCounters
from ruyi_flow.types import Decision, FinishReason, Hop, Stats

__all__ = ["Totals"]


class Totals:
    """The sums over one answer. As a context manager it counts a request that fails or is cancelled.

    Args:
        counters: the entry node's counters.
        place_of: the node and the tier of every exit.
    """

    def __init__(self, counters: NodeCounters, place_of: Mapping[int, tuple[str, str]]) -> None:
        self.prompt_tokens = 0
        """Number of tokens of the prompt, which is set before the first round."""
        self.reused = 0
        """Number of these whose caches were there already."""
        self.new_tokens = self._drafted = self._accepted = self._escalations = 0
        self._first_token_s = self._last_s = 0.0
        self._hops: dict[str, Hop] = {}
        self._counters, self._place_of = counters, place_of
        self._is_complete = False

    def __enter__(self) -> Totals:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if not self._is_complete:
            self._counters.failures.add(_cause(error))

    def add(self, settled: Round, after_s: float) -> int:
        """Add a round that ended at this time, and return the bytes that it sent upward."""
        counters = self._counters
        if self._first_token_s:
            count = len(settled.decisions)
            for _ in range(count):
                counters.inter_token_s.observe((after_s - self._last_s) / count)
        else:
            self._first_token_s = after_s
            counters.first_token_s.observe(after_s)
            counters.prompt_tokens.add(amount=self.prompt_tokens)
            counters.reused_tokens.add(amount=self.reused)
        self._last_s = after_s
        if settled.drafted:
            self._drafted += settled.drafted
            self._accepted += settled.accepted
            counters.drafted.add(amount=settled.drafted)
            counters.accepted.add(amount=settled.accepted)
        if len(settled.hops) > 1:
            self._escalations += 1
            counters.escalations.add()
        for hop in settled.hops:
            self._hops.setdefault(hop.node, Hop(hop.node)).add(hop)
        return sum(hop.bytes_up for hop in settled.hops)

    def add_token(self, decision: Decision) -> None:
        """Add a token of the answer."""
        self.new_tokens += 1
        self._counters.generation_tokens.add()
        exit = decision.exit
        self._counters.tokens.add(exit, *self._place_of[exit], decision.reason)
        self._counters.confidence.observe(decision.confidence, exit)

    def end(self, finish: FinishReason, total_s: float, seed: int | None) -> Stats:
        """Count the complete answer, and return its statistics."""
        self._is_complete = True
        counters = self._counters
        counters.successes.add(finish)
        counters.request_s.observe(total_s)
        return Stats(
            prompt_tokens=self.prompt_tokens,
            new_tokens=self.new_tokens,
            first_token_s=self._first_token_s,
            total_s=total_s,
            seed=seed,
            drafted=self._drafted,
            accepted=self._accepted,
            escalations=self._escalations,
            hops=tuple(self._hops.values()),
            reused=self.reused,
        )


def _cause(error: BaseException | None) -> str:
    """Return why there is no complete answer, as the metrics name it."""
    if error is None or not isinstance(error, Exception) or isinstance(error, RequestCancelled):
        return "cancelled"
    return next((cause for kind, cause in _CAUSES.items() if isinstance(error, kind)), "fault")


_CAUSES = {
    RequestError: "request",
    CapacityError: "full",
    DeadlineExceeded: "deadline",
    NodeUnavailable: "unavailable",
}
