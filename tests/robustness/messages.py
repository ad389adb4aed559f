"""A relay that counts gRPC's messages, and does something when a certain one arrives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

from ruyi_flow.testing import Relay

__all__ = ["MessageRelay", "MessageStarts"]

_PREFACE = 24
"""Bytes with which an HTTP/2 client begins."""

_FRAME, _PREFIX = 9, 5
"""Bytes before a frame of HTTP/2, and before a message of gRPC: both begin with a length."""


class MessageRelay(Relay):
    """A relay that loses one message, and all that comes after it until the connections are closed.

    Everything before the message is delivered, so that it is that message whose loss is tried.
    """

    def __init__(self, *, delay_s: float = 0.0, bytes_per_s: float | None = None) -> None:
        super().__init__(delay_s=delay_s, bytes_per_s=bytes_per_s)
        self.count = 0
        """Number of messages that have arrived, in both directions."""
        self._lost: int | None = None
        self._then: Callable[[], None] = self.cut
        self._parsers: dict[tuple[int, bool], MessageStarts] = {}
        self._dead: set[int] = set()
        """Numbers of the connections that carry nothing any more."""

    def lose(self, number: int, then: Callable[[], None] | None = None) -> None:
        """Lose the message of this number, counted from 0 and from now.

        Args:
            number: the message's number.
            then: what is called at that moment; it must end every connection soon. Default: `cut`.
        """
        self.count, self._lost, self._then = 0, number, then or self.cut

    def relayed(self, connection: int, data: bytes, *, up: bool) -> bytes:
        """Count the messages in the data, and drop everything from the one that is lost on."""
        if connection in self._dead:
            return b""
        starts = self._parsers.setdefault((connection, up), MessageStarts(up=up))
        for start in starts.feed(data):
            self.count += 1
            if self._lost is not None and self.count > self._lost:
                self._lost = None
                self._dead |= {number for number, _ in self._parsers}
                # What was before is written by now, or at the next turns of the event loop.
                asyncio.get_running_loop().call_later(0.002 + self.delay_s, self._then)
                return data[:start]
        return data


class MessageStarts:
    """Finds where gRPC's messages begin in one direction of a connection of HTTP/2.

    Args:
        up: whether it is the direction from the client to the server.
    """

    def __init__(self, *, up: bool) -> None:
        self._skip = _PREFACE if up else 0
        self._head = b""
        """The bytes of a frame's head that have arrived."""
        self._left = 0
        """Bytes of the frame that are still to come."""
        self._stream: int | None = None
        """The stream of a frame with data; None in other frames."""
        self._messages: dict[int, tuple[bytes, int]] = {}
        """Of each stream: the bytes of a message's head that have arrived, and how many bytes of it are to come."""

    def feed(self, data: bytes) -> Iterator[int]:
        """Yield the offset in these bytes of each message that begins in them."""
        at = min(self._skip, len(data))
        self._skip -= at
        while at < len(data):
            if self._left:
                stop = min(at + self._left, len(data))
                if self._stream is not None:
                    yield from self._feed_stream(self._stream, data, at, stop)
                self._left -= stop - at
                at = stop
                continue
            head = data[at : at + _FRAME - len(self._head)]
            self._head, at = self._head + head, at + len(head)
            if len(self._head) == _FRAME:
                self._left = int.from_bytes(self._head[:3], "big")
                self._stream = int.from_bytes(self._head[5:], "big") if self._head[3] == 0 else None
                self._head = b""

    def _feed_stream(self, stream: int, data: bytes, at: int, stop: int) -> Iterator[int]:
        head, left = self._messages.get(stream, (b"", 0))
        while at < stop:
            if left:
                taken = min(left, stop - at)
                left -= taken
            else:
                if not head:
                    yield at
                taken = min(_PREFIX - len(head), stop - at)
                head += data[at : at + taken]
                if len(head) == _PREFIX:
                    head, left = b"", int.from_bytes(head[1:], "big")
            at += taken
        self._messages[stream] = head, left
