"""Explanations of one answer, token by token: which node decided it and why, the last exit's token, and the cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment
from torch import Tensor

from ruyi_flow.atomic_file import atomic_file
from ruyi_flow.config.topology import Topology
from ruyi_flow.family.checkpoint import Checkpoint
from ruyi_flow.family.every_exit import Tree, exit_logits
from ruyi_flow.family.tokenizer import PromptEncoder
from ruyi_flow.family.transformer import Probe
from ruyi_flow.local import Family, load_family
from ruyi_flow.reply import tier_colour
from ruyi_flow.requests import GenerateRequest
from ruyi_flow.routing.confidence import Score
from ruyi_flow.routing.policy import Policy
from ruyi_flow.runtime.scores import measure
from ruyi_flow.types import Mode, Stats, Token

__all__ = ["ExplainedToken", "explain", "load_like_last_node", "score_name", "write_html"]


@dataclass(frozen=True, slots=True)
class ExplainedToken:
    """One token of an answer, with what led to it."""

    text: str
    exit: int
    """Exit that decided the token."""
    node: str
    """Label of this exit's node."""
    reason: str
    own: float | None
    """Score that confidence is computed from: the most probable token's probability, or the policy's score at the
    temperature of the exit's curve. None when the policy has curves, but none for this exit."""
    confidence: float
    """Confidence of the exit, calibrated if the policy is."""
    mean: float | None
    """Mean confidence over the window, which decides in mode cascade; None when the exit has no threshold."""
    threshold: float | None
    """Threshold for the confidence, or in mode cascade for its mean; None when the exit has none."""
    last: str
    """Token of the last exit after the same text."""
    agrees: bool
    """Whether the two tokens are equal."""
    bytes_up: int
    """Bytes sent upward by the round that decided this token; 0 on the round's other tokens."""
    ms: float
    """Milliseconds since the previous token; 0 on the round's other tokens."""


def explain(
    family: Family, topology: Topology, request: GenerateRequest, policy: Policy, tokens: Sequence[Token]
) -> list[ExplainedToken]:
    """Explain an answer of a topology's nodes.

    Args:
        family: the topology's whole family, as `load_like_last_node` loads it.
        topology: the nodes that answered.
        request: the request.
        policy: the policy that decided the tokens.
        tokens: the answer.
    """
    if not tokens:
        return []
    prompts = PromptEncoder(family.tokenizer, family.config, family=topology.family)
    prompt = prompts.encode(request.prompt, raw=request.raw)
    tree = Tree((*prompt, *(token.id for token in tokens[:-1])), ())
    rows = torch.arange(len(prompt) - 1, len(tree))
    own: list[float | None] = [None] * len(tokens)
    means: list[float | None] = [None] * len(tokens)
    last: list[int] = []
    for p, logits, states in exit_logits(family.model, family.exits, [tree], [rows]):
        raw, confidence = _measure_exit(policy, p, family.model.branch_at[p].probe, logits, states)
        seen: list[float] = []
        for i, token in enumerate(tokens):
            if token.exit == p and raw is not None:
                own[i] = raw[i]
            if token.exit >= p:  # the exit saw this token: it decided, or left it to a deeper one
                seen.append(token.confidence if token.exit == p else confidence[i])
            if token.exit == p and policy.routing.mode is Mode.CASCADE and _threshold(policy, p) is not None:
                window = policy.routing.window
                recent = seen[-window:]
                means[i] = (sum(recent) + window - len(recent)) / window  # missing ones count as 1
        last = logits.argmax(-1).tolist()  # the last exit comes last
    before = [0.0, *(token.after_s for token in tokens)]
    return [
        ExplainedToken(
            text=token.text,
            exit=token.exit,
            node=topology.label_of(token.node),
            reason=str(token.reason),
            own=own[i],
            confidence=token.confidence,
            mean=means[i],
            threshold=_threshold(policy, token.exit),
            last=str(last[i]) if family.tokenizer is None else str(family.tokenizer.decode([last[i]])),
            agrees=last[i] == token.id,
            bytes_up=token.bytes_up,
            ms=1000 * (token.after_s - before[i]),
        )
        for i, token in enumerate(tokens)
    ]


def load_like_last_node(topology: Topology) -> Family:
    """Load a topology's whole family with the number format and weight format of its last node.

    Raises:
        CheckpointError: the family is not in this machine's store, or does not support the format.
    """
    last = topology.nodes[-1]
    weights = last.weights
    if weights is None and last.shard is not None and last.shard.exists():
        weights = Checkpoint(last.shard).weights
    return load_family(topology.family, exits=topology.exits, dtype=last.dtype, weights=weights)


def _measure_exit(
    policy: Policy, exit: int, probe: Probe | None, logits: Tensor, states: Tensor
) -> tuple[list[float] | None, list[float]]:
    """Return an exit's scores before calibration, or None if it has no curve, and its confidences."""
    scale = policy.routing.scale
    curve = None if scale is None else scale.curves.get(exit)
    if scale is None or curve is None:
        plain = measure(logits, Score.MAX_PROBABILITY).tolist()
        return (plain if scale is None else None), plain
    raw = measure(logits, scale.score, curve.temperature, probe=probe, head_input=states).tolist()
    return raw, [curve(score) for score in raw]


def _threshold(policy: Policy, exit: int) -> float | None:
    value = policy.thresholds.get(exit)
    return value if value is not None and value <= 1 else None


def write_html(out: Path, prompt: str, rows: Sequence[ExplainedToken], stats: Stats, policy: Policy) -> None:
    """Write an explanation as one HTML file that needs no network."""
    nodes = list(dict.fromkeys(row.node for row in sorted(rows, key=lambda row: row.exit)))  # tiers in order
    colours = {node: tier_colour(nodes, node) for node in nodes}
    page = Environment(autoescape=True).from_string(_PAGE)
    text = page.render(prompt=prompt, rows=rows, stats=asdict(stats), policy=_describe(policy), colours=colours)
    with atomic_file(out) as new:
        new.write_text(text, encoding="utf-8")


def _describe(policy: Policy) -> Mapping[str, Any]:
    thresholds = {p: f"{t:.3f}" for p, t in policy.thresholds.items() if t <= 1}
    scale = policy.routing.scale
    score = "the most probable token's probability" if scale is None else f"calibrated {scale.score}"
    window = policy.routing.window if policy.routing.mode is Mode.CASCADE else None
    return {
        "mode": str(policy.routing.mode),
        "thresholds": thresholds,
        "confidence": score,
        "own": score_name(policy),
        "window": window,
    }


def score_name(policy: Policy) -> str:
    """Return the column title of `ExplainedToken.own`."""
    return "own" if policy.routing.scale is None else str(policy.routing.scale.score).replace("_", " ")


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>An answer, token by token</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222; }
.answer { white-space: pre-wrap; font-size: 17px; border: 1px solid #ddd; padding: 1rem; border-radius: 4px; }
.answer span { border-radius: 2px; }
.differs { text-decoration: underline wavy #c0392b; }
table { border-collapse: collapse; margin-top: 1rem; width: 100%; font-size: 13px; }
th, td { text-align: right; padding: 2px 8px; border-bottom: 1px solid #eee; }
th { position: sticky; top: 0; background: #fff; }
.text { text-align: left; }
td.code { font-family: ui-monospace, monospace; white-space: pre; }
b.key { padding: 0 .5em; border-radius: 2px; font-weight: normal; margin-right: 1em; }
</style>
<h1>An answer, token by token</h1>
<p><b>{{ prompt }}</b></p>
<p>Mode {{ policy.mode }}; confidence is {{ policy.confidence }}
{%- if policy.window %}, averaged over {{ policy.window }} tokens{% endif %}
{%- if policy.thresholds %}; thresholds by exit: {% for p, t in policy.thresholds.items() %}{{ p }}: {{ t }}
{%- if not loop.last %}, {% endif %}{% endfor %}{% endif %}.
{{ stats.new_tokens }} tokens in {{ "%.2f"|format(stats.total_s) }} s, the first after
{{ "%.0f"|format(1000 * stats.first_token_s) }} ms; {{ stats.escalations }} questions to the next node.</p>
<p>{% for node, colour in colours.items() -%}
<b class="key" style="background:{{ colour.background }}">{{ node }}</b>{% endfor %}
<span class="differs">underlined</span>: the last exit predicts another token here.</p>
<div class="answer">{% for r in rows %}<span style="background:{{ colours[r.node].background }}"
{%- if not r.agrees %} class="differs"{% endif %} title="exit {{ r.exit }}, {{ r.reason }}, confidence
 {{ "%.2f"|format(r.confidence) }}{% if r.mean is not none %}, mean {{ "%.2f"|format(r.mean) }}{% endif %}
{%- if not r.agrees %}; last exit: {{ r.last }}{% endif %}">{{ r.text }}</span>
{%- endfor %}</div>
<table><tr><th>#<th class="text">token<th class="text">node<th>exit<th>{{ policy.own }}<th>confidence
{%- if policy.window %}<th>mean{% endif %}<th>threshold<th class="text">reason<th class="text">last exit
<th>bytes up<th>ms</tr>
{% for r in rows %}<tr style="background:{{ colours[r.node].html }}22"><td>{{ loop.index0 }}
<td class="text code">{{ r.text }}</td>
<td class="text">{{ r.node }}<td>{{ r.exit }}<td>{% if r.own is not none %}{{ "%.3f"|format(r.own) }}{% endif %}
<td>{{ "%.3f"|format(r.confidence) }}
{%- if policy.window %}<td>{% if r.mean is not none %}{{ "%.3f"|format(r.mean) }}{% endif %}{% endif %}
<td>{% if r.threshold is not none %}{{ "%.3f"|format(r.threshold) }}{% endif %}<td class="text">{{ r.reason }}
<td class="text code">{% if r.agrees %}the same{% else %}{{ r.last }}{% endif %}</td><td>{{ r.bytes_up }}
<td>{{ "%.1f"|format(r.ms) }}</tr>
{% endfor %}</table></html>
"""
