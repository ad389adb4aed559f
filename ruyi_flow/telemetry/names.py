"""Every metric of the system: its name, what it tells, who reads it, and how many series it can have. Pure.

Names that other servers of language models share have the same words here, after the prefix `ruyi_`
(vLLM's have `vllm:`, SGLang's `sglang:`), so that a dashboard or an autoscaler needs only another prefix.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["ALL", "CAUSES", "CONFIDENCE_BOUNDS", "NODE_LABELS", "Kind", "Metric", "Where"]


class Kind(StrEnum):
    """The kinds of metrics."""

    COUNTER = "counter"
    """A number that grows until the process ends."""
    GAUGE = "gauge"
    """A number of this moment."""
    HISTOGRAM = "histogram"
    """How many values fell into each range."""


class Where(StrEnum):
    """The processes that have a metric."""

    ENTRY = "entry node"
    """The node that requests reach."""
    NODE = "every node"
    """Every node."""
    SERVER = "HTTP server"
    """The HTTP server."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric."""

    name: str
    """Its name, with the unit; counters end in _total."""
    kind: Kind
    """Its kind."""
    where: Where
    """Which processes have it."""
    help: str
    """What it tells."""
    readers: str
    """Who reads it: the panel of the dashboard, the alert, or the program."""
    labels: tuple[str, ...] = ()
    """Its labels."""
    bound: str = "1"
    """The number of its series in one process, at most."""
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram's ranges; the last range has none."""
    known: tuple[str, ...] = ()
    """Values of its one label that are there with 0 from the beginning: a series that appears with its first event
    has not grown, as Prometheus sees it."""

    @property
    def all_labels(self) -> tuple[str, ...]:
        """Its labels with those that all metrics of a node have: its name and tier."""
        is_common = self.where is not Where.SERVER and "node" not in self.labels
        return (*NODE_LABELS, *self.labels) if is_common else self.labels


CAUSES = ("reset", "silent", "dropped", "damaged", "left", "full", "late")
"""Why a session loses a node: its connection fails, it gives no sign of life, a message did not reach it, it sends
garbage, it shuts down, it is full, or its answer is late."""

NODE_LABELS = ("node", "tier")
"""The labels of every metric of a node. Where a metric has its own, they tell who decided a token."""

ALL: list[Metric] = []
"""Every metric."""


def _metric(
    name: str,
    kind: Kind,
    where: Where,
    help: str,
    readers: str,
    labels: tuple[str, ...] = (),
    bound: str = "1",
    buckets: tuple[float, ...] = (),
    known: tuple[str, ...] = (),
) -> Metric:
    ALL.append(Metric(name, kind, where, help, readers, labels, bound, buckets, known))
    return ALL[-1]


CONFIDENCE_BOUNDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
"""Upper bounds of the ranges of confidence, close to each other where thresholds are."""

_LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5)
_ROWS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0)
_STEP = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)

# The state of a node, read when it is asked for.
RUNNING = _metric(
    "ruyi_num_requests_running", Kind.GAUGE, Where.NODE, "Sessions that have capacity.", "autoscalers; Service"
)
WAITING = _metric(
    "ruyi_num_requests_waiting",
    Kind.GAUGE,
    Where.NODE,
    "Sessions that wait for capacity.",
    "autoscalers; Service; alert RuyiFlowQueue",
)
KV_CACHE = _metric(
    "ruyi_kv_cache_usage_perc",
    Kind.GAUGE,
    Where.NODE,
    "Reserved share of the KV cache, 0 to 1.",
    "autoscalers; Nodes; alert RuyiFlowCacheFull",
)
WEIGHT_BYTES = _metric("ruyi_weight_bytes", Kind.GAUGE, Where.NODE, "Bytes of the node's weights.", "Nodes")
INFO = _metric(
    "ruyi_node_info",
    Kind.GAUGE,
    Where.NODE,
    "1; the labels tell the version and the family's fingerprint.",
    "operators, to see what runs where",
    ("version", "family"),
)
DRAINING = _metric("ruyi_node_draining", Kind.GAUGE, Where.NODE, "1 while the node takes no new sessions.", "Nodes")

# Answers, counted by the entry node.
PROMPT_TOKENS = _metric(
    "ruyi_prompt_tokens_total", Kind.COUNTER, Where.ENTRY, "Tokens of prompts that were read.", "Service"
)
REUSED_TOKENS = _metric(
    "ruyi_prompt_tokens_reused_total",
    Kind.COUNTER,
    Where.ENTRY,
    "Tokens of prompts whose caches were there from an earlier answer.",
    "Service",
)
GENERATION_TOKENS = _metric(
    "ruyi_generation_tokens_total", Kind.COUNTER, Where.ENTRY, "New tokens of answers.", "Service"
)
TOKENS = _metric(
    "ruyi_tokens_total",
    Kind.COUNTER,
    Where.ENTRY,
    "New tokens by the exit, node and tier that decided them, and why there.",
    "Tiers; alert RuyiFlowFallback",
    ("exit", "node", "tier", "reason"),
    "exits x reasons (6)",
)
SUCCESSES = _metric(
    "ruyi_request_success_total",
    Kind.COUNTER,
    Where.ENTRY,
    "Complete answers by the reason of their end: eos, stop or length.",
    "Service",
    ("finished_reason",),
    "3",
    known=("eos", "stop", "length"),
)
FAILURES = _metric(
    "ruyi_request_failure_total",
    Kind.COUNTER,
    Where.ENTRY,
    "Requests without a complete answer: cancelled by the client, refused for an option or the prompt (request), full, "
    "unavailable, past the deadline, or a fault.",
    "Service; alert RuyiFlowFailures",
    ("cause",),
    "6",
    known=("cancelled", "request", "full", "unavailable", "deadline", "fault"),
)
FIRST_TOKEN_SECONDS = _metric(
    "ruyi_time_to_first_token_seconds",
    Kind.HISTOGRAM,
    Where.ENTRY,
    "Time to first token, from the request's arrival at the entry node.",
    "Service; alert RuyiFlowSlowStart",
    buckets=_LATENCY,
)
INTER_TOKEN_SECONDS = _metric(
    "ruyi_inter_token_latency_seconds",
    Kind.HISTOGRAM,
    Where.ENTRY,
    "Time per token after the first: a round's time over the tokens that it decided.",
    "Service",
    buckets=_TOKEN,
)
REQUEST_SECONDS = _metric(
    "ruyi_e2e_request_latency_seconds",
    Kind.HISTOGRAM,
    Where.ENTRY,
    "Time of complete answers, from the request's arrival to the last token.",
    "Service",
    buckets=_LATENCY,
)
ESCALATIONS = _metric(
    "ruyi_escalations_total",
    Kind.COUNTER,
    Where.ENTRY,
    "Questions of the entry node to the next one, each of them a round trip.",
    "Tiers",
)
DRAFTED = _metric(
    "ruyi_draft_tokens_total", Kind.COUNTER, Where.ENTRY, "Tokens drafted past an escalated position.", "Tiers"
)
ACCEPTED = _metric(
    "ruyi_accepted_draft_tokens_total", Kind.COUNTER, Where.ENTRY, "Drafts that a deeper exit accepted.", "Tiers"
)
CONFIDENCE = _metric(
    "ruyi_token_confidence",
    Kind.HISTOGRAM,
    Where.ENTRY,
    "Confidence of decided tokens, by exit.",
    "Calibration",
    ("exit",),
    "exits",
    CONFIDENCE_BOUNDS,
)

# Work of every node.
QUEUE_SECONDS = _metric(
    "ruyi_request_queue_time_seconds",
    Kind.HISTOGRAM,
    Where.NODE,
    "Time that sessions waited for capacity before they were admitted.",
    "Service",
    buckets=_LATENCY,
)
ADMISSIONS = _metric("ruyi_admissions_total", Kind.COUNTER, Where.NODE, "Sessions that were admitted.", "Service")
REFUSALS = _metric(
    "ruyi_refusals_total",
    Kind.COUNTER,
    Where.NODE,
    "Sessions that were refused: full, draining, or too_large for the node.",
    "Service; alert RuyiFlowRefusals",
    ("cause",),
    "3",
    known=("full", "draining", "too_large"),
)
STEP_SECONDS = _metric(
    "ruyi_step_duration_seconds",
    Kind.HISTOGRAM,
    Where.NODE,
    "Time of a step of one stage, over all sessions in it; the label is the exit that ends the stage.",
    "Nodes",
    ("exit",),
    "exits of the node",
    _STEP,
)
STEP_ROWS = _metric(
    "ruyi_step_rows",
    Kind.HISTOGRAM,
    Where.NODE,
    "Positions in a step of one stage, over all sessions in it, drafts included.",
    "Nodes",
    ("exit",),
    "exits of the node",
    _ROWS,
)
LINK_BYTES = _metric(
    "ruyi_link_bytes_total",
    Kind.COUNTER,
    Where.NODE,
    "Bytes of messages to the next node (up) and of its replies (down).",
    "Links",
    ("to", "direction"),
    "2",
)
LOSSES = _metric(
    "ruyi_node_losses_total",
    Kind.COUNTER,
    Where.NODE,
    "Times that a session lost a deeper node, by the node and the cause: reset, silent, dropped, damaged, left, full "
    "or late.",
    "Recovery; alert RuyiFlowLosses",
    ("link", "cause"),
    "7 x deeper nodes",
)
RECOVERIES = _metric(
    "ruyi_recoveries_total",
    Kind.COUNTER,
    Where.NODE,
    "Sessions that were taken up again after a loss of the next node, by the first cause.",
    "Recovery",
    ("link", "cause"),
    "6",
)
RECOVERY_SECONDS = _metric(
    "ruyi_recovery_seconds",
    Kind.HISTOGRAM,
    Where.NODE,
    "Seconds from a loss of the next node until the question was answered.",
    "Recovery",
    ("link",),
    "15",
    _LATENCY,
)
REPLAYED = _metric(
    "ruyi_replayed_positions_total",
    Kind.COUNTER,
    Where.NODE,
    "Positions that were sent to the next node again after a loss.",
    "Recovery",
    ("link",),
    "1",
)
LINK_SECONDS = _metric(
    "ruyi_link_wire_seconds",
    Kind.HISTOGRAM,
    Where.NODE,
    "Time that questions to the next node and their answers were on the way, without the time of that node.",
    "Links",
    ("to",),
    buckets=_TOKEN,
)
LINK_MESSAGES = _metric(
    "ruyi_link_messages_total", Kind.COUNTER, Where.NODE, "Messages to the next node.", "Links", ("to",)
)
VERIFIED = _metric(
    "ruyi_verified_drafts_total",
    Kind.COUNTER,
    Where.NODE,
    "Greedy tokens of an early branch that the last exit was asked about anyway, by exit, range of confidence (the "
    "label is the upper bound), and whether the confidence is calibrated.",
    "Calibration; alert RuyiFlowDrift",
    ("exit", "confidence", "calibrated"),
    "exits of the node x 24",
)
CONTRADICTED = _metric(
    "ruyi_contradicted_drafts_total",
    Kind.COUNTER,
    Where.NODE,
    "Those of them for which the last exit decided another token.",
    "Calibration; alert RuyiFlowDrift",
    ("exit", "confidence", "calibrated"),
    "exits of the node x 24",
)
EXPECTED = _metric(
    "ruyi_expected_contradictions_total",
    Kind.COUNTER,
    Where.NODE,
    "How many of them their confidence says to expect: the sum of 1 - confidence. Calibrated, it should equal the "
    "number of contradicted ones.",
    "Calibration; alert RuyiFlowDrift",
    ("exit", "confidence", "calibrated"),
    "exits of the node x 24",
)

# The HTTP server.
HTTP_RUNNING = _metric(
    "ruyi_http_requests_running", Kind.GAUGE, Where.SERVER, "Requests that have not ended.", "autoscalers; HTTP"
)
HTTP_REQUESTS = _metric(
    "ruyi_http_requests_total",
    Kind.COUNTER,
    Where.SERVER,
    "Requests that have ended, by route, method and status; other stands for what the server does not have, and "
    "status 0 for a client that went away before the reply began.",
    "HTTP; alert RuyiFlowHttpErrors",
    ("route", "method", "status"),
    "routes (10) x methods (8) x statuses (about 15)",
)
HTTP_DISCONNECTS = _metric(
    "ruyi_http_disconnects_total",
    Kind.COUNTER,
    Where.SERVER,
    "Clients that went away before their reply was complete, by route.",
    "HTTP",
    ("route",),
    "routes (10)",
)
HTTP_PROMPT_TOKENS = _metric(
    "ruyi_http_prompt_tokens_total",
    Kind.COUNTER,
    Where.SERVER,
    "Tokens of prompts that were answered, by model.",
    "HTTP",
    ("model",),
    "models of the server",
)
HTTP_TOKENS = _metric(
    "ruyi_http_generation_tokens_total",
    Kind.COUNTER,
    Where.SERVER,
    "New tokens, by model.",
    "HTTP",
    ("model",),
    "models of the server",
)
HTTP_REQUEST_SECONDS = _metric(
    "ruyi_http_request_duration_seconds",
    Kind.HISTOGRAM,
    Where.SERVER,
    "Time of a request, from its arrival at the server to the end of the reply, by route.",
    "HTTP",
    ("route",),
    "routes (10)",
    _LATENCY,
)
HTTP_FIRST_TOKEN_SECONDS = _metric(
    "ruyi_http_time_to_first_token_seconds",
    Kind.HISTOGRAM,
    Where.SERVER,
    "Time to first token, from the request's arrival at the server, by model.",
    "HTTP",
    ("model",),
    "models of the server",
    _LATENCY,
)
