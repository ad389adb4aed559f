"""The resumption of an answer: what the client has of it, and whether and when it asks an entry node again.

docs/design/0010-recovery.md explains how the nodes go on with an answer.
"""

from __future__ import annotations

import random
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from ruyi_flow.errors import CapacityError, NodeError, NodeUnavailable, RequestCancelled, WireError, loss_cause
from ruyi_flow.types import Event, PromptTokens, Recovery, Token

if TYPE_CHECKING:
    from ruyi_flow.transport.replicas import Replicas

__all__ = ["MAX_RETRIES", "RECOVER_S", "PartialAnswer"]

MAX_RETRIES = 8
"""Default number of times that a request is sent again to a full node."""

RECOVER_S = 10.0
"""Default number of seconds for which an answer is taken up again after its entry node was last heard."""

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.25, 8.0
"""Seconds before the first retry, at most, and before any retry: each wait is up to twice as long as the one before."""

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 0.5
"""Seconds between attempts to take up an answer."""

_LOST = (NodeUnavailable, WireError, RequestCancelled, CapacityError)
"""Errors after which an answer is taken up again, if the entry node had been heard before."""

_MOST_DAMAGED = 2
"""Times that an answer may end with garbage; after more, it is not the connection that damages it."""


class PartialAnswer:
    """The part of an answer that has arrived, over all attempts to get the whole of it.

    Args:
        entry: the replicas of the entry node; None if it runs in this process and cannot be lost.
        max_retries: number of times that the request is sent again to a full node.
    """

    def __init__(self, entry: Replicas | None, max_retries: int) -> None:
        self.tokens: list[Token] = []
        """The tokens that have arrived."""
        self._entry, self._max_retries = entry, max_retries
        self._began = time.monotonic()
        self._retries = 0
        self._is_recovering = False
        """Whether the entry node was lost, and the answer begins again or goes on."""
        self._damaged = 0
        """Number of times that it ended with garbage."""
        self._offset_s = 0.0
        """Seconds from the first request to the one under way."""
        self._has_prompt = False
        self._lost: tuple[str, float] | None = None
        """Why the entry node was lost, and when, until another event arrives."""
        self._pause_s = 0.0
        self._recoveries: list[Recovery] = []

    @property
    def resumed(self) -> tuple[tuple[int, int], ...]:
        """The tokens with which the answer goes on, and their exits."""
        return tuple((token.id, token.exit) for token in self.tokens)

    def begin_attempt(self) -> None:
        """Note that the request is sent now, for the first time or again."""
        self._offset_s = time.monotonic() - self._began if self._is_recovering else 0.0

    def take(self, event: Event) -> Event | None:
        """Take in an event; return it as the user sees it, or None if the user has it."""
        if self._lost is not None:
            cause, since = self._lost
            self._recoveries.append(Recovery(cause, time.monotonic() - since, len(self.tokens)))
            self._lost, self._pause_s = None, 0.0
        if isinstance(event, PromptTokens):
            is_new, self._has_prompt = not self._has_prompt, True
            return event if is_new else None
        if isinstance(event, Token):
            if self._offset_s:
                event = replace(event, after_s=event.after_s + self._offset_s)
            self.tokens.append(event)
            return event
        if not self._recoveries:
            return event
        stats = event.stats
        first_s = self.tokens[0].after_s if self.tokens else stats.first_token_s
        stats = replace(
            stats,
            first_token_s=first_s,
            total_s=stats.total_s + self._offset_s,
            recoveries=tuple(self._recoveries),
        )
        return replace(event, stats=stats)

    def pause_s(self, error: NodeError, left_s: float) -> float | None:
        """Note that an attempt failed.

        Args:
            error: why it failed.
            left_s: seconds that are left of the answer's time.

        Returns:
            The seconds to wait before the next attempt; None if the error is final.
        """
        if isinstance(error, CapacityError) and not self.tokens and not self._is_recovering:
            wait_s: float = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2**self._retries) * random.uniform(0.5, 1)
            if self._retries >= self._max_retries or wait_s > left_s:
                return None
            self._retries += 1
            return wait_s
        left_s = min(left_s, self._recoverable_s(error))
        if left_s <= 0:
            return None
        self._is_recovering = True
        self._damaged += isinstance(error, WireError)
        self._lost = self._lost or (loss_cause(error), time.monotonic())
        pause_s, self._pause_s = self._pause_s, min(_LONGEST_PAUSE_S, 2 * self._pause_s or _FIRST_PAUSE_S)
        return min(pause_s, left_s)

    def _recoverable_s(self, error: NodeError) -> float:
        """Return the seconds for which it makes sense to ask an entry node again; 0 if the error is final."""
        if self._entry is None or not isinstance(error, _LOST) or not self._entry.was_heard:
            return 0.0
        if isinstance(error, WireError) and self._damaged > _MOST_DAMAGED:
            return 0.0
        waited_s = 0.0 if self._lost is None else time.monotonic() - self._lost[1]
        return self._entry.left_s(error, began=self._is_recovering or bool(self.tokens), waited_s=waited_s)
