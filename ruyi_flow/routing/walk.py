"""One stage's way through a block: what its branch says, what must be asked deeper, what holds. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ruyi_flow.routing.policy import Judge
from ruyi_flow.types import Decision, Reason

__all__ = ["Look", "Walk"]


@dataclass(frozen=True, slots=True)
class Look:
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

    @classmethod
    def of(
        cls,
        judge: Judge,
        wants: Sequence[int],
        drafts: Sequence[int | None],
        found: Sequence[tuple[int, float]] | None,
    ) -> Walk:
        """Walk in order, up to the first sure token that contradicts its draft: everything after it is void."""
        walk = cls(judge.exit)
        for i, (position, draft) in enumerate(zip(wants, drafts, strict=True)):
            if found is None:
                walk.looks.append(Look(position, draft))
                continue
            token, confidence = found[i]
            reason = judge.sure(position, confidence)
            walk.looks.append(Look(position, draft, token, confidence, reason))
            if reason is not None and token != draft:
                break
        return walk

    @property
    def unsure(self) -> tuple[int, ...]:
        """Positions that must be asked deeper."""
        return tuple(look.position for look in self.looks if look.reason is None)

    def force(self, reason: Reason) -> None:
        """Decide here what is unsure, since nothing deeper may be asked."""
        self.looks = [look if look.reason is not None else replace(look, reason=reason) for look in self.looks]

    def settle(self, deeper: Sequence[Decision]) -> tuple[Decision, ...]:
        """Merge the deeper stage's decisions for the unsure positions, up to the first that contradicts its draft."""
        answers = iter(deeper)
        decisions = []
        for look in self.looks:
            if look.reason is not None:
                assert look.token is not None
                decision = Decision(look.token, self.exit, look.confidence, look.reason)
            else:
                answer = next(answers, None)
                if answer is None:
                    break
                decision = answer
            decisions.append(decision)
            if decision.token != look.draft:
                break
        return tuple(decisions)
