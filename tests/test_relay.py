"""The relay of `ruyi_flow.testing`: what each kind of damage does to the two ends of a connection."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from ruyi_flow.testing import Relay
from tests.conftest import until


@dataclass
class Target:
    """A server that records what it receives on all connections."""

    received: bytearray = field(default_factory=bytearray)
    ended: int = 0
    """Connections whose end it has seen."""
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        try:
            while data := await reader.read(1024):
                self.received += data
        except ConnectionResetError:
            pass
        self.ended += 1


@asynccontextmanager
async def relayed(relay: Relay) -> AsyncIterator[tuple[Target, str, int]]:
    """Run a target behind a relay; yield it with the relay's host and port."""
    target = Target()
    server = await asyncio.start_server(target.serve, "127.0.0.1", 0)
    async with relay.run(f"127.0.0.1:{server.sockets[0].getsockname()[1]}") as address:
        host, _, port = address.rpartition(":")
        yield target, host, int(port)
    for writer in target.writers:
        writer.transport.abort()
    server.close()
    await server.wait_closed()


@asynccontextmanager
async def connected(
    relay: Relay,
) -> AsyncIterator[tuple[Target, asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection through a relay that has carried a byte each way."""
    async with relayed(relay) as (target, host, port):
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(b"a")
        await until(lambda: target.received == b"a")
        target.writers[0].write(b"b")
        assert await reader.read(10) == b"b" and relay.connections == 1
        yield target, reader, writer
        writer.transport.abort()


async def test_a_cut_ends_both_ends() -> None:
    relay = Relay()
    async with connected(relay) as (target, reader, _):
        relay.cut()
        assert await reader.read(1) == b""
        await until(lambda: target.ended == 1 and not relay.connections)


@pytest.mark.skipif(os.name != "posix", reason="the loop of Windows reports a reset in another way")
async def test_a_reset_is_an_error_of_the_connection_and_not_its_end() -> None:
    relay = Relay()
    async with connected(relay) as (target, reader, _):
        relay.reset()
        with pytest.raises(ConnectionResetError):
            await reader.read(1)
        await until(lambda: target.ended == 1)


async def test_a_blackhole_swallows_open_connections_and_spares_new_ones() -> None:
    relay = Relay()
    async with connected(relay) as (target, reader, writer):
        relay.blackhole()
        writer.write(b"lost")
        target.writers[0].write(b"lost")
        host, port = writer.get_extra_info("peername")
        _, second = await asyncio.open_connection(host, port)
        second.write(b"c")
        await until(lambda: target.received == b"ac")
        writer.write_eof()
        second.close()
        await until(lambda: target.ended == 1)  # the second one's: the first one's end is swallowed too
        assert not reader.at_eof() and target.received == b"ac"
        relay.cut()
        assert await reader.read(10) == b""
        await until(lambda: target.ended == 2)


@pytest.mark.parametrize("up", [True, False])
async def test_a_half_closed_connection_still_works_in_the_other_direction(up: bool) -> None:
    relay = Relay()
    async with connected(relay) as (target, reader, writer):
        relay.half_close(up=up)
        if up:
            await until(lambda: target.ended == 1)
            target.writers[0].write(b"d")
            assert await reader.read(10) == b"d"
        else:
            assert await reader.read(10) == b""
            writer.write(b"d")
            await until(lambda: target.received == b"ad")
        relay.half_close(up=up)  # nothing is left to close


async def test_the_end_of_a_half_closed_connection_ends_the_rest() -> None:
    relay = Relay()
    async with connected(relay) as (target, _, writer):
        relay.half_close(up=False)
        writer.close()
        await until(lambda: target.ended == 1)


async def test_flipped_bytes_are_those_that_were_named() -> None:
    relay = Relay()
    async with connected(relay) as (target, reader, writer):
        relay.flip(2, up=True, bits=0x20)
        relay.flip(3, up=True)
        relay.flip(0, up=False, bits=0x80)
        writer.write(b"xy")
        await until(lambda: target.received == b"axy")
        writer.write(b"zz")
        await until(lambda: target.received == b"axyZ{")
        writer.write(b"zz")
        target.writers[0].write(b"zz")
        assert await reader.readexactly(2) == b"\xfaz"
        await until(lambda: target.received == b"axyZ{zz")
        relay.flip(0, up=True)
        relay.flip_nothing()
        writer.write(b"z")
        await until(lambda: target.received == b"axyZ{zzz")


async def test_a_frozen_link_loses_nothing() -> None:
    relay = Relay()
    async with connected(relay) as (target, reader, writer):
        relay.frozen = True
        writer.write(b"c")
        await asyncio.sleep(0.03)
        assert target.received == b"a" and not reader.at_eof()
        relay.frozen = False
        await until(lambda: target.received == b"ac")


async def test_a_subclass_may_drop_what_passes_and_knows_the_connection() -> None:
    class Deaf(Relay):
        seen: list[tuple[int, bytes, bool]] = []

        def relayed(self, connection: int, data: bytes, *, up: bool) -> bytes:
            self.seen.append((connection, data, up))
            return b"" if data == b"drop" else data

    relay = Deaf()
    async with connected(relay) as (target, _, writer):
        writer.write(b"drop")
        await until(lambda: len(relay.seen) == 3)
        writer.write(b"keep")
        await until(lambda: target.received == b"akeep")
        host, port = writer.get_extra_info("peername")
        _, second = await asyncio.open_connection(host, port)
        second.write(b"c")
        await until(lambda: target.received == b"akeepc")
        second.transport.abort()
    assert relay.seen == [(0, b"a", True), (0, b"b", False), (0, b"drop", True), (0, b"keep", True), (1, b"c", True)]
    assert (relay.bytes_up, relay.bytes_down) == (10, 1)
