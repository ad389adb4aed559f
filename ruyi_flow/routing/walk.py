"""One stage's way through a block: what its branch says, what must be asked deeper, what holds. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ruyi_flow.routing.policy import Judge
from ruyi_flow.types import Block, Decision, Reason

__all__ = ["Look", "Walk"]


class Look(NamedTuple):
    """What one branch says of one wanted position."""

    position: int
    draft: int | None
    """The token at position + 1 in the block, if there is one."""
    token: int | None = None
    """The branch's own; None where this stage does not look."""
    confidence: float = 0.0
    reason: Reason | None = None
    """Why the branch may decide; None means that the position must be asked deeper."""


@dataclass(slots=True)
class Walk:
    """One stage's way through the wanted positions of a block. Pure."""

    exit: int
    looks: list[Look] = field(default_factory=list)
    unsure: list[int] = field(default_factory=list)
    """Positions that must be asked deeper."""

    @classmethod
    def of(cls, judge: Judge, block: Block, found: Sequence[tuple[int, float]] | None) -> Walk:
        """Walk in order, up to the first sure token that contradicts its draft: everything after it is void.

        Args:
            judge: the branch's.
            block: with the wanted positions, and drafts for them.
            found: what the branch says at each of them; None where this stage does not look.
        """
        looks: list[Look] = []
        unsure: list[int] = []
        start, _, ids, wants = block  # Python 3.11 unpacks a named tuple in the time of one of its attributes
        end = start + len(ids) - 1
        for i, position in enumerate(wants):
            draft = ids[position - end] if position < end else None
            if found is None:
                looks.append(Look(position, draft))
                unsure.append(position)
                continue
            token, confidence = found[i]
            reason = judge.sure(position, confidence)
            looks.append(Look(position, draft, token, confidence, reason))
            if reason is None:
                unsure.append(position)
            elif token != draft:
                break
        return cls(judge.exit, looks, unsure)

    def add(self, look: Look) -> None:
        """One more, after those that are there."""
        self.looks.append(look)
        if look.reason is None:
            self.unsure.append(look.position)

    def force(self, reason: Reason) -> None:
        """Decide here what is unsure, since nothing deeper may be asked."""
        self.looks = [look if look.reason is not None else look._replace(reason=reason) for look in self.looks]
        self.unsure.clear()

    def settle(self, deeper: Sequence[Decision]) -> tuple[Decision, ...]:
        """Merge the deeper stage's decisions for the unsure positions, up to the first that contradicts its draft."""
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
