"""Who is in a node's rooms: open sessions, the pages of each, and when one has left. Pure."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import TypeVar

from ruyi_flow.errors import CapacityError, ContextLengthError
from ruyi_flow.loop.pages import PagePool, Run
from ruyi_flow.loop.session import Session

__all__ = ["Rooms"]

S = TypeVar("S", bound=Session)


class Rooms:
    """Sessions at once, and positions of keys and values over all of them.

    Args:
        max_positions: over all sessions.
        max_sessions: at once.
        context: positions of a session, at the most.
    """

    def __init__(self, max_positions: int, max_sessions: int, context: int) -> None:
        self.pool = PagePool(max_positions)
        self.max_sessions, self._context = max_sessions, context
        self.sessions: dict[int, Session] = {}
        self.on_release: Callable[[], None] = lambda: None
        """Called, on whatever thread, when a session has given its room back."""
        self._ids = itertools.count()
        self._lock = threading.Lock()  # sessions open on the event loop and close on the compute thread

    def open(self, max_positions: int, make: Callable[[int, Run], S]) -> S:
        """Let a session in that never holds more than `max_positions`; `make` it from its number and its pages.

        Raises:
            CapacityError: too many sessions, or no room for its keys and values.
            ContextLengthError: more positions than the family's context.
        """
        if max_positions > self._context:
            raise ContextLengthError(
                f"a session of {max_positions} positions is past the family's context of {self._context}"
            )
        with self._lock:
            if len(self.sessions) >= self.max_sessions:
                raise CapacityError(f"{len(self.sessions)} sessions are running, the limit here is {self.max_sessions}")
            session_id = next(self._ids)
            run = self.pool.allocate(session_id, max_positions)
            try:
                session = make(session_id, run)
            except BaseException:  # whatever it is, nobody else would give the pages back
                self.pool.release(run)
                raise
            self.sessions[session_id] = session
            return session

    def release(self, session: Session) -> None:
        """Take a session's pages back; it must not be used any more. Releasing twice is fine."""
        with self._lock:
            if self.sessions.pop(session.session_id, None) is None:
                return
            self.pool.release(session.run)
        self.on_release()

    def check_integrity(self) -> None:
        """Raise AssertionError unless the pool's pages and the open sessions agree."""
        with self._lock:
            self.pool.check_integrity()
            assert self.pool.used == sum(s.run.count for s in self.sessions.values()), "pages of a closed session"
