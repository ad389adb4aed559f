"""Counters and histograms in plain Python: an addition where something happens, and no library. Pure.

Each object has one writing thread. Any thread may read: it sees every number, though not all of one moment.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from ruyi_flow.telemetry import names
from ruyi_flow.telemetry.names import CONFIDENCE_BOUNDS, Metric
from ruyi_flow.types import Recovery

__all__ = ["Counter", "Histogram", "LinkCounters", "NodeCounters", "ServerCounters", "StepCounters"]

Labels = tuple[str | int, ...]
"""The values of a metric's labels, in their order."""


class Counter:
    """Numbers that grow, by the values of labels.

    Args:
        metric: what is counted.
    """

    __slots__ = ("metric", "values")

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.values: dict[Labels, float] = {(value,): 0 for value in metric.known}

    def add(self, *labels: str | int, amount: float = 1) -> None:
        """Add to the number with these labels."""
        values = self.values
        values[labels] = values.get(labels, 0) + amount

    @property
    def total(self) -> float:
        """The sum over all labels."""
        return sum(list(self.values.values()))


class _Buckets:
    """The values of a histogram with the same labels."""

    __slots__ = ("counts", "sum")

    def __init__(self, count: int) -> None:
        self.counts = [0] * count
        self.sum = 0.0


class Histogram:
    """How often values fall into ranges, by the values of labels.

    Args:
        metric: what is measured; its buckets are the ranges' upper bounds.
    """

    __slots__ = ("_bounds", "metric", "rows")

    def __init__(self, metric: Metric) -> None:
        self.metric, self._bounds = metric, metric.buckets
        self.rows: dict[Labels, _Buckets] = {}

    def expect(self, *labels: str | int) -> None:
        """Begin the series of these labels with no values."""
        self.rows.setdefault(labels, _Buckets(len(self._bounds) + 1))

    def observe(self, value: float, *labels: str | int) -> None:
        """Count a value."""
        row = self.rows.get(labels)
        if row is None:
            row = self.rows[labels] = _Buckets(len(self._bounds) + 1)
        row.counts[bisect_left(self._bounds, value)] += 1
        row.sum += value


class StepCounters:
    """The steps of one thread of a node."""

    __slots__ = ("rows", "seconds")

    def __init__(self) -> None:
        self.seconds = Histogram(names.STEP_SECONDS)
        self.rows = Histogram(names.STEP_ROWS)

    def ran(self, exit: int, seconds: float, rows: int) -> None:
        """Count a step at the stage that ends at an exit."""
        self.seconds.observe(seconds, exit)
        self.rows.observe(rows, exit)


class LinkCounters:
    """The traffic of a node with the next one, and the sessions that it lost there."""

    __slots__ = ("bytes", "losses", "messages", "recoveries", "recovery_s", "replayed", "seconds")

    def __init__(self) -> None:
        self.losses = Counter(names.LOSSES)
        self.recoveries = Counter(names.RECOVERIES)
        self.recovery_s = Histogram(names.RECOVERY_SECONDS)
        self.replayed = Counter(names.REPLAYED)
        self.bytes = Counter(names.LINK_BYTES)
        self.messages = Counter(names.LINK_MESSAGES)
        self.seconds = Histogram(names.LINK_SECONDS)

    def expect(self, link: str) -> None:
        """Begin the series of losses of a node with 0, so that a first loss can be seen as growth."""
        for cause in names.CAUSES:
            self.losses.add(link, cause, amount=0)
            self.recoveries.add(link, cause, amount=0)
        self.replayed.add(link, amount=0)
        self.recovery_s.expect(link)

    def exchanged(self, link: str, *, messages: int, bytes_up: int, bytes_down: int, wire_s: float) -> None:
        """Count an exchange over a link."""
        self.messages.add(link, amount=messages)
        self.seconds.observe(wire_s, link)
        self.bytes.add(link, "up", amount=bytes_up)
        self.bytes.add(link, "down", amount=bytes_down)

    def recovered(self, link: str, recovery: Recovery) -> None:
        """Count a session that was taken up again after a loss."""
        self.recoveries.add(link, recovery.cause)
        self.recovery_s.observe(recovery.seconds, link)
        self.replayed.add(link, amount=recovery.positions)

    @property
    def all(self) -> Sequence[Counter | Histogram]:
        """The counters and histograms."""
        return [getattr(self, name) for name in self.__slots__]


class NodeCounters:
    """What one node counts. Its event loop writes all of it, but for the steps of the compute thread."""

    def __init__(self) -> None:
        # The entry node's answers.
        self.tokens = Counter(names.TOKENS)
        self.prompt_tokens = Counter(names.PROMPT_TOKENS)
        self.reused_tokens = Counter(names.REUSED_TOKENS)
        self.generation_tokens = Counter(names.GENERATION_TOKENS)
        self.successes = Counter(names.SUCCESSES)
        self.failures = Counter(names.FAILURES)
        self.first_token_s = Histogram(names.FIRST_TOKEN_SECONDS)
        self.inter_token_s = Histogram(names.INTER_TOKEN_SECONDS)
        self.request_s = Histogram(names.REQUEST_SECONDS)
        self.confidence = Histogram(names.CONFIDENCE)
        self.escalations = Counter(names.ESCALATIONS)
        self.drafted = Counter(names.DRAFTED)
        self.accepted = Counter(names.ACCEPTED)
        # Every node.
        self.queue_s = Histogram(names.QUEUE_SECONDS)
        self.admissions = Counter(names.ADMISSIONS)
        self.refusals = Counter(names.REFUSALS)
        self.verified = Counter(names.VERIFIED)
        self.contradicted = Counter(names.CONTRADICTED)
        self.expected = Counter(names.EXPECTED)
        self.link = LinkCounters()
        self.steps = (StepCounters(), StepCounters())
        """Steps of the compute thread, and of the event loop."""

    def verify(self, exit: int, confidence: float, *, is_calibrated: bool, agrees: bool) -> None:
        """Count an early branch's token that the last exit was asked about.

        Args:
            exit: the branch's exit.
            confidence: the branch's confidence in the token.
            is_calibrated: whether the confidence comes from a policy file.
            agrees: whether the last exit decided the same token.
        """
        labels = (exit, _RANGES[bisect_left(CONFIDENCE_BOUNDS, confidence)], "true" if is_calibrated else "false")
        self.verified.add(*labels)
        self.contradicted.add(*labels, amount=not agrees)
        self.expected.add(*labels, amount=max(0.0, 1.0 - confidence))

    @property
    def all(self) -> Sequence[Counter | Histogram]:
        """The counters and histograms, those of two threads side by side."""
        found: list[Counter | Histogram] = [c for c in vars(self).values() if isinstance(c, (Counter, Histogram))]
        found += self.link.all
        return found + [one for steps in self.steps for one in (steps.seconds, steps.rows)]


class ServerCounters:
    """What the HTTP server counts, on its event loop."""

    def __init__(self) -> None:
        self.requests = Counter(names.HTTP_REQUESTS)
        self.disconnects = Counter(names.HTTP_DISCONNECTS)
        self.tokens = Counter(names.HTTP_TOKENS)
        self.prompt_tokens = Counter(names.HTTP_PROMPT_TOKENS)
        self.request_s = Histogram(names.HTTP_REQUEST_SECONDS)
        self.first_token_s = Histogram(names.HTTP_FIRST_TOKEN_SECONDS)

    @property
    def all(self) -> Sequence[Counter | Histogram]:
        """The counters and histograms."""
        return [c for c in vars(self).values() if isinstance(c, (Counter, Histogram))]


_RANGES = [f"{bound:g}" for bound in (*CONFIDENCE_BOUNDS, 1)]
