"""A complete answer, and how a notebook shows it: short as text, and in colour as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any, NamedTuple

from ruyi_flow.types import FinishReason, PromptTokens, Stats, Token

__all__ = ["TIER_COLOURS", "Reply", "TierColour", "shortened", "tier_colour"]


class TierColour(NamedTuple):
    """The colour of a node, wherever tokens are shown."""

    terminal: str
    """Name of the colour in a terminal."""
    html: str
    """The colour as #rrggbb. Text stands on `background`."""

    @property
    def background(self) -> str:
        """A translucent background, on which the text of a light or a dark page can be read."""
        return f"{self.html}55"


TIER_COLOURS = (
    TierColour("green", "#3fa34d"),
    TierColour("yellow", "#d9a400"),
    TierColour("cyan", "#2e8fd0"),
    TierColour("magenta", "#b04fc4"),
    TierColour("blue", "#5a6ee0"),
    TierColour("red", "#d9534f"),
)
"""The colours of a topology's nodes, the entry node first. More nodes begin again with the first colour."""


def tier_colour(nodes: Sequence[str], name: str) -> TierColour:
    """Return the colour of a node, given the names of all nodes from shallow to deep."""
    return TIER_COLOURS[nodes.index(name) % len(TIER_COLOURS)]


def shortened(text: str, length: int = 60) -> str:
    """Return the repr of a text, whose rest becomes an ellipsis after `length` characters."""
    return repr(text if len(text) <= length else f"{text[: length - 2]} …")


@dataclass(frozen=True, slots=True, repr=False)
class Reply:
    """A complete answer. A notebook shows it with each token in the colour of the node that decided it."""

    text: str
    """The answer's text."""
    tokens: tuple[Token, ...]
    """Tokens of the answer, each with the exit and the node that decided it."""
    finish_reason: FinishReason
    """Why the answer ended."""
    stats: Stats
    """Statistics of the answer: durations, drafts, and the time and traffic of each node."""
    prompt: PromptTokens | None = None
    """The prompt's tokens; None unless `prompt_logprobs` asked for them."""

    @property
    def token_ids(self) -> list[int]:
        """The answer's token ids, including the one that ended it."""
        return [token.id for token in self.tokens]

    @property
    def decided_by(self) -> dict[str, int]:
        """Number of tokens that each node decided, the entry node first; a node that decided none has 0."""
        counts = {hop.node: 0 for hop in self.stats.hops}
        for token in self.tokens:
            counts[token.node] = counts.get(token.node, 0) + 1
        return counts

    def to_dict(self) -> dict[str, Any]:
        """Return the answer as a JSON object."""
        stats = asdict(self.stats) | {"token_s": self.stats.token_s}
        return {
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "tokens": [asdict(token) for token in self.tokens],
            "stats": stats,
            **({} if self.prompt is None else {"prompt": asdict(self.prompt)}),
        }

    def __repr__(self) -> str:
        decided = ", ".join(f"{node} {count}" for node, count in self.decided_by.items())
        tokens = f"{len(self.tokens)} tokens" + (f": {decided}" if decided else "")
        return f"Reply({shortened(self.text)}, {tokens}; {self.finish_reason})"

    def _repr_html_(self) -> str:
        """Return the answer as HTML for a notebook: styles within the elements, no scripts, nothing to be loaded."""
        decided = self.decided_by
        styles = {
            node: f"background:{tier_colour(list(decided), node).background};border-radius:2px" for node in decided
        }
        text = "".join(
            f'<span style="{styles[token.node]}" title="{escape(_tooltip(token))}">{escape(token.text)}</span>'
            for token in self.tokens
            if token.text
        )
        legend = " ".join(
            f'<span style="{styles[node]};padding:0 .5em">{escape(node)} {count}</span>'
            for node, count in decided.items()
        )
        return (
            f'<div style="white-space:pre-wrap;line-height:1.6;max-width:50em">{text}</div>'
            f'<div style="margin-top:.6em;font-size:85%">{legend} '
            f"{escape(self.stats.summary)} · {escape(self.finish_reason)}</div>"
        )


def _tooltip(token: Token) -> str:
    return f"{token.node}, exit {token.exit}, confidence {token.confidence:.2f}, {token.reason}"
