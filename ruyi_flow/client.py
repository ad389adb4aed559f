"""The SDK: an asynchronous client of a topology, and a synchronous one that runs it on a background event loop.

docs/design/0008-client.md explains who owns the loop, the thread and the connections.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import weakref
from collections.abc import AsyncGenerator, Generator, Mapping
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from ruyi_flow.background_loop import CLOSED, FORKED, BackgroundLoop
from ruyi_flow.config.examples import DEFAULT_TOPOLOGY, default_topology
from ruyi_flow.config.policy_file import with_policy_file
from ruyi_flow.config.topology import Topology
from ruyi_flow.errors import (
    DeadlineExceeded,
    NodeError,
    RequestCancelled,
    RequestError,
    WireError,
    shown,
)
from ruyi_flow.extras import needed_by
from ruyi_flow.reply import Reply
from ruyi_flow.requests import (
    GenerateRequest,
    Options,
    PromptInput,
    check_request_options,
    parse_request,
    takes_options,
)
from ruyi_flow.resumption import MAX_RETRIES, RECOVER_S, PartialAnswer
from ruyi_flow.stream import AsyncStream, Stream
from ruyi_flow.types import (
    Event,
    Final,
    NodeStatus,
    Token,
    Tokenized,
    check_number,
    to_float,
    to_int,
)

if TYPE_CHECKING:
    from ruyi_flow.config.topology import Node
    from ruyi_flow.serving.answering import Answering
    from ruyi_flow.serving.engine import Engine
    from ruyi_flow.transport.peer import Peer
    from ruyi_flow.transport.replicas import Replicas

__all__ = ["AsyncClient", "AsyncStream", "Client", "Reply", "Stream", "make_request"]

_connected_in: int | None = None
"""The process in which a client of this program first connected: gRPC crashes in a process forked from it."""

_SAME = 16
"""Tokens or characters at the beginning of a prompt that tell one conversation from another."""


class AsyncClient:
    """A client of a topology's entry node for asyncio. It connects at its first use.

        client = AsyncClient("local")
        reply = await client.generate("Why is the sky blue?")
        await client.close()

    As a context manager, `async with AsyncClient(…) as client`, it connects at once and closes itself. A topology of
    one node without an address is loaded and run in this process. A client belongs to the event loop of its first use.

    Args:
        topology: a YAML file, the name of an example, or a loaded `Topology`. Default: topology.yaml in the current
            folder if there is one, or else the example `local`.
        timeout_s: seconds that an answer may take, unless the call sets another limit.
        max_retries: number of times that a request is sent again to a full node, before its first token and within its
            time limit. The waits between grow from 0.25 to 8 s, with jitter: half a minute in all. 0 never retries.
        recover_s: seconds for which an answer is taken up again after its entry node was lost, since that node was last
            heard. 0 never does it.
    """

    def __init__(
        self,
        topology: str | Path | Topology = DEFAULT_TOPOLOGY,
        *,
        timeout_s: float = 600.0,
        max_retries: int = MAX_RETRIES,
        recover_s: float = RECOVER_S,
    ) -> None:
        named = default_topology() if topology is DEFAULT_TOPOLOGY else topology
        self.topology = named if isinstance(named, Topology) else Topology.load(named)
        self._timeout_s = _check_timeout(timeout_s)
        self._max_retries = check_number(
            "max_retries", max_retries, to_int(max_retries), low=0, high=1000, meaning="a whole number from 0 to 1000"
        )
        self._recover_s = check_number(
            "recover_s", recover_s, to_float(recover_s), low=0, high=1e6, meaning="a number of seconds, 0 or more"
        )
        self._peers: dict[str, Peer] = {}
        self._entry: Replicas | None = None
        self._engine: Engine | None = None
        self._answering: Answering | None = None
        self._owner: tuple[int, asyncio.AbstractEventLoop] | None = None
        """The process and the event loop that the connections belong to, once there are any."""
        self._opening: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._closed = asyncio.Event()

    async def __aenter__(self) -> AsyncClient:
        try:
            await self._connect()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @takes_options
    async def generate(self, prompt: PromptInput, **options: Unpack[Options]) -> Reply:
        """Answer a prompt: `reply = await client.generate("Why is the sky blue?", mode="exact")`.

        `Client.generate` explains the prompt and the errors.
        """
        async with self.stream(prompt, **options) as stream:
            async for _ in stream:
                pass
        return stream.reply

    @takes_options
    def stream(self, prompt: PromptInput, **options: Unpack[Options]) -> AsyncStream:
        """Answer a prompt token by token: `async for token in client.stream("Why is the sky blue?")`.

        The stream has the answer so far, and after the last token the complete `reply`.
        """
        return AsyncStream(self.events(prompt, **options))

    @takes_options
    async def events(self, prompt: PromptInput, **options: Unpack[Options]) -> AsyncGenerator[Event, None]:
        """Answer a prompt token by token, then yield one `Final` with the text and the statistics.

        With `prompt_logprobs`, the first event is one `PromptTokens`.
        """
        self._check_usable()
        given = options.pop("timeout_s", None)
        timeout_s = self._timeout_s if given is None else _check_timeout(given)
        # A request may name a policy file, and a prompt may be long.
        request = await asyncio.to_thread(make_request, prompt, options)
        await self._connect()  # not a part of the answer's time: it may load the node
        if request.sampling.temperature and request.sampling.seed is None:  # so that the answer can be taken up again
            request = replace(request, sampling=replace(request.sampling, seed=secrets.randbits(63)))
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        answer = PartialAnswer(self._entry, self._max_retries)
        while True:
            try:
                asked = replace(request, resumed=answer.resumed)
                async with aclosing(self._ask(asked, timeout_s, deadline)) as events:
                    answer.begin_attempt()
                    async for event in events:
                        seen = answer.take(event)
                        if seen is not None:
                            yield seen
                        if isinstance(event, Final):
                            return
                raise WireError("the stream ended before the answer was complete", node=self.topology.entry.name)
            except NodeError as error:
                error.tokens = tuple(answer.tokens)
                pause_s = answer.pause_s(error, deadline - loop.time())
                if pause_s is None:
                    if isinstance(error, RequestCancelled):
                        self._check_usable()  # closing the client has cancelled it
                    raise
            await self._sleep(pause_s)
            self._check_usable()

    async def tokenize(self, prompt: PromptInput, *, raw: bool = False, timeout_s: float = 30.0) -> Tokenized:
        """Return a prompt's tokens; `Client.tokenize` explains the arguments and the errors."""
        _check_timeout(timeout_s)
        request = await asyncio.to_thread(make_request, prompt, {"raw": raw})
        await self._connect()
        if self._answering is not None:
            return await self._answering.tokenize(request)
        assert self._entry is not None
        return await self._entry.pick().tokenize(request, timeout_s=timeout_s)

    async def status(self, *, timeout_s: float = 3.0) -> dict[str, NodeStatus | NodeError]:
        """Return the status of every node, or the error of one that cannot be asked; see `Client.status`."""
        _check_timeout(timeout_s)
        await self._connect()
        if self._engine is not None:
            return {self.topology.entry.name: self._engine.status()}

        from ruyi_flow.serving.placement import look_up
        from ruyi_flow.transport.peer import Peer

        async def ask(node: Node, address: str) -> NodeStatus | NodeError:
            listed = self._peers.get(address)  # no address that a name stands for: those change
            limit = node.limits.max_message_bytes
            peer = listed or Peer(node.name, address, max_message_bytes=limit, keys=self.topology.user_keys)
            try:
                return await peer.status(timeout_s=timeout_s)
            except NodeError as error:
                return error
            finally:
                if listed is None:
                    await peer.close()

        nodes = self.topology.nodes
        found = await asyncio.gather(*(look_up(node) for node in nodes))
        asked = [(name, node, address) for node, of in zip(nodes, found, strict=True) for name, address in of.items()]
        answers = await asyncio.gather(*(ask(node, address) for _, node, address in asked))
        return {name: answer for (name, _, _), answer in zip(asked, answers, strict=True)}

    async def close(self) -> None:
        """Close the connections, and end the answers that are under way. A closed client stays closed."""
        if self._closing is None:
            if self._owner is not None and self._owner[0] != os.getpid():
                return  # the connections are those of another process
            self._check_loop()
            self._closing = asyncio.ensure_future(self._close())
        await asyncio.shield(self._closing)

    @property
    def is_connected(self) -> bool:
        """Whether the client has been used, so that it has connections or a loaded node."""
        return self._owner is not None and self._closing is None

    @property
    def engine(self) -> Engine | None:
        """The node that runs in this process; None if there is none, or the client is not connected."""
        return self._engine

    def __repr__(self) -> str:
        return f"AsyncClient({_describe(self.topology, self.is_connected, self._closing is not None)})"

    def _ask(self, request: GenerateRequest, timeout_s: float, deadline: float) -> AsyncGenerator[Event, None]:
        """Send a request, which may be a repeated one: less than `timeout_s` is left until the deadline."""
        left = max(0.001, deadline - asyncio.get_running_loop().time())
        if self._answering is not None:
            return _within(self._answering.generate(request, left), timeout_s, deadline)
        assert self._entry is not None
        return self._entry.pick(_conversation(request)).generate(request, timeout_s=left)

    async def _sleep(self, seconds: float) -> None:
        """Wait, unless the client is closed before."""
        try:
            async with asyncio.timeout(seconds):
                await self._closed.wait()
        except TimeoutError:
            pass

    async def _connect(self) -> None:
        """Connect, or load the node of this process, unless that is done. Every call does it by itself."""
        self._check_usable()
        if self._opening is None:
            self._owner = (os.getpid(), asyncio.get_running_loop())
            self._opening = asyncio.ensure_future(self._open())
            self._opening.add_done_callback(self._forget_failure)
        await asyncio.shield(self._opening)  # one caller does it for all, and may be cancelled
        self._check_usable()

    def _forget_failure(self, opening: asyncio.Task[None]) -> None:
        if opening.cancelled() or opening.exception() is not None:
            self._opening = self._owner = None  # the next call tries again

    def _check_usable(self) -> None:
        if self._closing is not None:
            raise RequestError(CLOSED)
        if self._owner is not None and self._owner[0] != os.getpid():
            raise RequestError(FORKED)
        self._check_loop()

    def _check_loop(self) -> None:
        if self._owner is not None and self._owner[1] is not asyncio.get_running_loop():
            raise RequestError(
                "this AsyncClient was first used on another event loop, which its connections belong to: make one "
                "client for each event loop (each asyncio.run has its own), or use Client"
            )

    async def _open(self) -> None:
        if self.topology.entry.address is None:
            self._engine, self._answering = await asyncio.to_thread(_load, self.topology)
            return
        from ruyi_flow.transport.peer import Peer
        from ruyi_flow.transport.replicas import Replicas

        global _connected_in
        _connected_in = _connected_in or os.getpid()
        if _connected_in != os.getpid():
            raise RequestError(FORKED)
        entry = self.topology.entry
        self._entry = Replicas(
            entry.name,
            entry.addresses,
            max_message_bytes=entry.limits.max_message_bytes,
            recover_s=self._recover_s,
            timeout_s=self._timeout_s,
            keys=self.topology.user_keys,
        )
        for node in self.topology.nodes:
            given: Any = {"max_message_bytes": node.limits.max_message_bytes, "keys": self.topology.user_keys}
            self._peers |= {a: Peer(node.name, a, **given) for a in node.addresses}

    async def _close(self) -> None:
        self._closed.set()
        if self._opening is not None:
            await asyncio.wait([self._opening])
        peers, self._peers = self._peers, {}
        engine, self._engine, self._answering = self._engine, None, None
        await asyncio.gather(*(peer.close() for peer in peers.values()))
        if self._entry is not None:
            await self._entry.close()
        if engine is not None:
            await engine.close()


class Client:
    """A client of a topology's entry node. It connects at its first use, also in a notebook.

        client = Client("local")
        print(client.generate("Why is the sky blue?").text)
        client.close()

    As a context manager, `with Client(…) as client`, it connects at once and closes itself. It may stay open as long as
    the process: it then closes itself at the end. Several threads may use it at once. A topology of one node without
    an address is loaded and run in this process.

    Args:
        topology: a YAML file, the name of an example, or a loaded `Topology`. Default: topology.yaml in the current
            folder if there is one, or else the example `local`.
        timeout_s: seconds that an answer may take, unless the call sets another limit.
        max_retries: number of times that a request is sent again to a full node, before its first token and within its
            time limit. The waits between grow from 0.25 to 8 s, with jitter: half a minute in all. 0 never retries.
        recover_s: seconds for which an answer is taken up again after its entry node was lost, since that node was last
            heard. 0 never does it.
    """

    def __init__(
        self,
        topology: str | Path | Topology = DEFAULT_TOPOLOGY,
        *,
        timeout_s: float = 600.0,
        max_retries: int = MAX_RETRIES,
        recover_s: float = RECOVER_S,
    ) -> None:
        self._async = AsyncClient(topology, timeout_s=timeout_s, max_retries=max_retries, recover_s=recover_s)
        self._loop = BackgroundLoop(self._async.close)
        # A client that nobody has any more closes itself; at the end of the interpreter, the loop does it.
        weakref.finalize(self, self._loop.stop).atexit = False

    @property
    def topology(self) -> Topology:
        """The loaded topology."""
        return self._async.topology

    def __enter__(self) -> Client:
        try:
            self._loop.run(self._async.__aenter__)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @takes_options
    def generate(self, prompt: PromptInput, **options: Unpack[Options]) -> Reply:
        """Answer a prompt. Ctrl-C ends the answer on the nodes.

            reply = client.generate("Why is the sky blue?", mode="token", threshold=0.8, max_new_tokens=64)
            print(reply.text)

        Args:
            prompt: a text (one user turn), {"role": …, "content": …} messages, or token ids. A content is a text, or a
                list of {"type": "text", "text": …}. Roles are system, user, assistant, and those that the family's
                chat template names. Token ids are integers, or a 1-dimensional array of numpy or torch.
            options: see `Options`. Without a mode, `exit` means mode `fixed`, and a threshold means mode `token`.
                Without any of them, the topology's policy decides.

        Returns:
            The complete answer: its text, its tokens with the node that decided each, and statistics.

        Raises:
            RequestError: no node could serve an option or the prompt, or the client is closed.
            ConfigError: the policy file cannot be read.
            NodeError: a node cannot serve the request now. Its `tokens` and `text` are what arrived before.
        """
        return self._loop.run(lambda: self._async.generate(prompt, **options))

    @takes_options
    def stream(self, prompt: PromptInput, **options: Unpack[Options]) -> Stream:
        """Answer a prompt token by token: `for token in client.stream("Why is the sky blue?")`.

        The stream has the answer so far, and after the last token the complete `reply`. Closing it ends the answer on
        the nodes. `generate` explains the prompt and the errors.
        """
        answer = self._async.stream(prompt, **options)
        return Stream(answer, self._tokens(answer))

    @takes_options
    def events(self, prompt: PromptInput, **options: Unpack[Options]) -> Generator[Event, None, None]:
        """Answer a prompt token by token, then yield one `Final` with the text and the statistics.

        With `prompt_logprobs`, the first event is one `PromptTokens`.
        """
        events = self._async.events(prompt, **options)
        yield from self._loop.iterate(events, events.aclose)

    def tokenize(self, prompt: PromptInput, *, raw: bool = False, timeout_s: float = 30.0) -> Tokenized:
        """Return a prompt's tokens, as the entry node makes them.

        Args:
            prompt: a text (one user turn), messages, or token ids; see `generate`.
            raw: whether a text is encoded as it is, instead of as one user turn of the chat template.
            timeout_s: seconds that the answer may take.

        Raises:
            RequestError: the prompt is empty, too long, or refused by the tokenizer or the chat template.
            NodeError: the entry node cannot be asked.
        """
        return self._loop.run(lambda: self._async.tokenize(prompt, raw=raw, timeout_s=timeout_s))

    def status(self, *, timeout_s: float = 3.0) -> dict[str, NodeStatus | NodeError]:
        """Return the status of every node, or the error of one that cannot be asked.

        The key is the name of a node with one address. Replicas are `cloud/1`, `cloud/2` and so on, in the order of the
        node's addresses; a DNS name stands for the addresses that it resolves to, sorted.
        """
        return self._loop.run(lambda: self._async.status(timeout_s=timeout_s))

    def close(self) -> None:
        """Close the connections, and end the answers that are under way. A closed client stays closed."""
        self._loop.close()

    def __repr__(self) -> str:
        return f"Client({_describe(self.topology, self._async.is_connected, self._loop.is_closed)})"

    def _tokens(self, answer: AsyncStream) -> Generator[Token, None, None]:
        """Yield a stream's tokens; the generator keeps this client, which would close itself."""
        yield from self._loop.iterate(answer, answer.close)


def _describe(topology: Topology, is_connected: bool, is_closed: bool) -> str:
    state = "closed" if is_closed else "connected" if is_connected else "not connected yet"
    return f"{topology.family} on {', '.join(node.name for node in topology.nodes)}; {state}"


def _conversation(request: GenerateRequest) -> bytes:
    """Return the beginning of a prompt, which the turns of a conversation have in common."""
    prompt = request.prompt
    if prompt and isinstance(prompt[0], tuple):
        users = next((i for i, turn in enumerate(prompt) if isinstance(turn, tuple) and turn[0] == "user"), 0)
        return repr(prompt[: users + 1]).encode()
    return repr(prompt[:_SAME]).encode()


async def _within(
    events: AsyncGenerator[Event, None], timeout_s: float, deadline: float
) -> AsyncGenerator[Event, None]:
    """Yield an answer's events until a deadline of the event loop's clock.

    Raises:
        DeadlineExceeded: it passed.
    """
    async with aclosing(events):
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    event = await anext(events, None)
            except TimeoutError:
                raise DeadlineExceeded(f"the answer was not complete within {timeout_s:g} s (timeout_s)") from None
            if event is None:
                return
            yield event


def _load(topology: Topology) -> tuple[Engine, Answering]:
    """Load the one node of a topology. Its compute thread ends at the latest with the engine or the interpreter."""
    with needed_by("a node in the client's process"):
        from ruyi_flow.serving.engine import Engine

        engine = Engine.load(topology, topology.entry.name)
    end = weakref.finalize(engine, engine.worker.shutdown)
    try:
        return engine, engine.answering()
    except BaseException:  # the traceback holds the engine
        end()
        raise


def _check_timeout(timeout_s: object) -> float:
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)) or not 0 < timeout_s < 1e9:
        raise RequestError(f"timeout_s is {shown(timeout_s)}; it must be a number of seconds above 0")
    return timeout_s


def make_request(prompt: PromptInput, options: Mapping[str, Any]) -> GenerateRequest:
    """Build a request from the keyword arguments of a call; see `Client.generate`.

    Raises:
        RequestError: an option is unknown, or an option or the prompt has a value that it cannot have.
        ConfigError: the policy file cannot be read.
    """
    check_request_options(options, "policy", "timeout_s")
    return parse_request(prompt, with_policy_file({n: v for n, v in options.items() if n != "timeout_s"}))
