"""One answer explained token by token: who decided it and why, what the last branch would have said, what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment
from torch import Tensor

from ruyi_flow.config.topology import Topology
from ruyi_flow.family.checkpoint import Checkpoint
from ruyi_flow.family.every_exit import Tree, each_exit
from ruyi_flow.family.transformer import Probe
from ruyi_flow.local import Family, load_family
from ruyi_flow.requests import GenerateRequest
from ruyi_flow.routing.confidence import Score
from ruyi_flow.routing.policy import Policy
from ruyi_flow.runtime.scores import measure
from ruyi_flow.serving.answering import prompt_ids
from ruyi_flow.types import Mode, Stats, Token

__all__ = ["Explained", "explain", "like_the_last_node", "score_name", "write_html"]


@dataclass(frozen=True, slots=True)
class Explained:
    """One token of an answer."""

    text: str
    exit: int
    node: str
    reason: str
    own: float | None
    """What confidence is made of: the likeliest token's probability, or the policy's score, at its curve's temperature;
    None where the exit has no curve in a policy that has some."""
    confidence: float
    """Calibrated, where the policy is."""
    mean: float | None
    """Mode cascade: the mean confidence over the window that the decision went by; None where the exit needs none."""
    threshold: float | None
    """That the confidence, or in mode cascade its mean, had to reach; None where the exit needs none."""
    last: str
    """What the last branch would have said here."""
    agrees: bool
    bytes_up: int
    ms: float
    """Since the token before it; tokens that were settled together have 0, but for the first of them."""


def explain(
    family: Family, topology: Topology, request: GenerateRequest, policy: Policy, tokens: Sequence[Token]
) -> list[Explained]:
    """Explain an answer that a topology gave.

    Args:
        family: the topology's, whole, as `like_the_last_node` loads it.
        request: that was answered.
        policy: that its tokens were decided by.
        tokens: the answer.
    """
    if not tokens:
        return []
    prompt = prompt_ids(request, family.tokenizer, family.config.vocab_size, topology.family)
    tree = Tree((*prompt, *(token.id for token in tokens[:-1])), ())
    rows = torch.arange(len(prompt) - 1, len(tree))
    own: list[float | None] = [None] * len(tokens)
    means: list[float | None] = [None] * len(tokens)
    said: list[int] = []
    for p, logits, read in each_exit(family.model, family.exits, [tree], [rows]):
        raw, sure = _measured(policy, p, family.model.branch_at[p].probe, logits, read)
        seen: list[float] = []
        for i, token in enumerate(tokens):
            if token.exit == p and raw is not None:
                own[i] = raw[i]
            if token.exit >= p:  # it was asked, and then either decided or did not
                seen.append(token.confidence if token.exit == p else sure[i])
            if token.exit == p and policy.mode is Mode.CASCADE and _threshold(policy, p) is not None:
                recent = seen[-policy.window :]
                means[i] = (sum(recent) + policy.window - len(recent)) / policy.window  # missing ones count as sure
        said = logits.argmax(-1).tolist()  # the last exit comes last
    before = [0.0, *(token.after_s for token in tokens)]
    return [
        Explained(
            text=token.text,
            exit=token.exit,
            node=topology.node(token.node).label,
            reason=str(token.reason),
            own=own[i],
            confidence=token.confidence,
            mean=means[i],
            threshold=_threshold(policy, token.exit),
            last=str(said[i]) if family.tokenizer is None else str(family.tokenizer.decode([said[i]])),
            agrees=said[i] == token.id,
            bytes_up=token.bytes_up,
            ms=1000 * (token.after_s - before[i]),
        )
        for i, token in enumerate(tokens)
    ]


def like_the_last_node(topology: Topology) -> Family:
    """A topology's family, whole, in the number format and with the weights that its last node holds.

    Raises:
        CheckpointError: it is not in this machine's store, or cannot be held like this.
    """
    last = topology.nodes[-1]
    weights = last.weights
    if weights is None and last.shard is not None and last.shard.exists():
        weights = Checkpoint(last.shard).weights
    return load_family(topology.family, exits=topology.exits, dtype=last.dtype, weights=weights)


def _measured(
    policy: Policy, exit: int, probe: Probe | None, logits: Tensor, read: Tensor
) -> tuple[list[float] | None, list[float]]:
    """An exit's scores before calibration, where confidence is made of them, and what its confidences are."""
    curve = None if policy.scale is None else policy.scale.curves.get(exit)
    if policy.scale is None or curve is None:
        plain = measure(logits, Score.MAX_PROBABILITY).tolist()
        return (plain if policy.scale is None else None), plain
    raw = measure(logits, policy.scale.score, curve.temperature, probe=probe, head_input=read).tolist()
    return raw, [curve(score) for score in raw]


def _threshold(policy: Policy, exit: int) -> float | None:
    value = policy.thresholds.get(exit)
    return value if value is not None and value <= 1 else None


def write_html(out: Path, prompt: str, rows: Sequence[Explained], stats: Stats, policy: Policy) -> None:
    """Write an explanation as one HTML file that needs no network."""
    nodes = list(dict.fromkeys(row.node for row in rows))
    colours = {node: _COLOURS[i % len(_COLOURS)] for i, node in enumerate(nodes)}
    page = Environment(autoescape=True).from_string(_PAGE)
    text = page.render(prompt=prompt, rows=rows, stats=asdict(stats), policy=_described(policy), colours=colours)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")


def _described(policy: Policy) -> Mapping[str, Any]:
    sure = {p: f"{t:.3f}" for p, t in policy.thresholds.items() if t <= 1}
    score = "the likeliest token's probability" if policy.scale is None else f"calibrated {policy.scale.score}"
    window = policy.window if policy.mode is Mode.CASCADE else None
    return {
        "mode": str(policy.mode),
        "thresholds": sure,
        "confidence": score,
        "own": score_name(policy),
        "window": window,
    }


def score_name(policy: Policy) -> str:
    """What the column of `Explained.own` is called."""
    return "own" if policy.scale is None else str(policy.scale.score).replace("_", " ")


_COLOURS = ("#bfe3b4", "#f5e0a3", "#b9dcf2", "#e4c1ee", "#f4c2b5", "#cfd3d8")

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
td.t { font-family: ui-monospace, monospace; text-align: left; white-space: pre; }
b.key { padding: 0 .5em; border-radius: 2px; font-weight: normal; margin-right: 1em; }
</style>
<h1>An answer, token by token</h1>
<p><b>{{ prompt }}</b></p>
<p>Mode {{ policy.mode }}; confidence is {{ policy.confidence }}
{%- if policy.window %}, which decides by its mean over {{ policy.window }} tokens{% endif %}
{%- if policy.thresholds %}; an exit needs {% for p, t in policy.thresholds.items() %}{{ p }}: {{ t }}
{%- if not loop.last %}, {% endif %}{% endfor %}{% endif %}.
{{ stats.new_tokens }} tokens in {{ "%.2f"|format(stats.total_s) }} s, the first after
{{ "%.0f"|format(1000 * stats.first_token_s) }} ms; {{ stats.escalations }} questions beyond the first node.</p>
<p>{% for node, colour in colours.items() %}<b class="key" style="background:{{ colour }}">{{ node }}</b>{% endfor %}
<span class="differs">underlined</span>: the last branch would have said something else.</p>
<div class="answer">{% for r in rows %}<span style="background:{{ colours[r.node] }}"
{%- if not r.agrees %} class="differs"{% endif %} title="exit {{ r.exit }}, {{ r.reason }}, confidence
 {{ "%.2f"|format(r.confidence) }}{% if r.mean is not none %}, mean {{ "%.2f"|format(r.mean) }}{% endif %}
{%- if not r.agrees %}; last: {{ r.last }}{% endif %}">{{ r.text }}</span>
{%- endfor %}</div>
<table><tr><th>#<th>token<th>node<th>exit<th>{{ policy.own }}<th>confidence
{%- if policy.window %}<th>mean{% endif %}<th>threshold<th>why<th>the last branch
<th>bytes up<th>ms</tr>
{% for r in rows %}<tr style="background:{{ colours[r.node] }}44"><td>{{ loop.index0 }}<td class="t">{{ r.text }}</td>
<td>{{ r.node }}<td>{{ r.exit }}<td>{% if r.own is not none %}{{ "%.3f"|format(r.own) }}{% endif %}
<td>{{ "%.3f"|format(r.confidence) }}
{%- if policy.window %}<td>{% if r.mean is not none %}{{ "%.3f"|format(r.mean) }}{% endif %}{% endif %}
<td>{% if r.threshold is not none %}{{ "%.3f"|format(r.threshold) }}{% endif %}<td>{{ r.reason }}
<td class="t">{% if r.agrees %}the same{% else %}{{ r.last }}{% endif %}</td><td>{{ r.bytes_up }}
<td>{{ "%.1f"|format(r.ms) }}</tr>
{% endfor %}</table></html>
"""
