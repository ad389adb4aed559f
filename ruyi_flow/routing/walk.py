"""One stage's walk through a block: what its branch predicts, and what the next stage must be asked. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ruyi_flow.routing.policy import Judge
from ruyi_flow.types import Block, Decision, Reason

__all__ = ["Look", "Walk"]


class Look(NamedTuple):
    """The prediction of one branch at one position whose next token is wanted."""

    position: int
    """The position."""
    draft: int | None
    """The token at position + 1 in the block, if there is one."""
    token: int | None = None
    """The branch's own token; None where the branch does not run."""
    confidence: float = 0.0
    """The branch's confidence, 0 … 1."""
    reason: Reason | None = None
    """Why the branch may decide; None means that the next stage must be asked."""


@dataclass(slots=True)
class Walk:
    """One stage's walk through the wanted positions of a block."""

    exit: int
    """The stage's exit."""
    looks: list[Look] = field(default_factory=list)
    """Predictions of the branch, in the order of positions."""
    undecided: list[int] = field(default_factory=list)
    """Positions that the next stage must be asked about."""

    @classmethod
    def of(cls, judge: Judge, block: Block, found: Sequence[tuple[int, float]] | None) -> Walk:
        """Walk in order, up to the first confident token that contradicts its draft; later positions are void.

        Args:
            judge: the branch's judge.
            block: the block with the wanted positions and the drafts after them.
            found: the branch's token and confidence at each wanted position; None where the branch does not run.
        """
        looks: list[Look] = []
        undecided: list[int] = []
        start, _, ids, wants, _ = block  # Python 3.11 unpacks a named tuple in the time of one of its attributes
        end = start + len(ids) - 1
        for i, position in enumerate(wants):
            draft = ids[position - end] if position < end else None
            if found is None:
                looks.append(Look(position, draft))
                undecided.append(position)
                continue
            token, confidence = found[i]
            reason = judge.decide(position, confidence)
            looks.append(Look(position, draft, token, confidence, reason))
            if reason is None:
                undecided.append(position)
            elif token != draft:
                break
        return cls(judge.exit, looks, undecided)

    def add(self, look: Look) -> None:
        """Append a look at the next position."""
        self.looks.append(look)
        if look.reason is None:
            self.undecided.append(look.position)

    def decide_all(self, reason: Reason) -> None:
        """Decide every undecided position by this branch, since the next stage may not be asked."""
        self.looks = [look if look.reason is not None else look._replace(reason=reason) for look in self.looks]
        self.undecided.clear()

    def merge(self, deeper: Sequence[Decision]) -> tuple[Decision, ...]:
        """Merge the next stage's decisions for the undecided positions, up to the first that contradicts its draft."""
        answers = iter(deeper)
        decisions = []
        for _, draft, token, confidence, reason in self.looks:
            if reason is not None:
                assert token is not None
                decisions.append(Decision(token, self.exit, confidence, reason))
            else:
                answer = next(answers, None)
                if answer is None:
                    break
                decisions.append(answer)
                token = answer.token
            if token != draft:
                break
        return tuple(decisions)
