"""The SDK: an asynchronous client of a topology, and a synchronous one that runs it on a background event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Mapping
from contextlib import aclosing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ruyi_flow.config.policy_file import with_policy_file
from ruyi_flow.config.topology import Topology
from ruyi_flow.errors import DeadlineExceeded, NodeError, RequestError
from ruyi_flow.extras import needed_by
from ruyi_flow.requests import GenerateRequest, PromptInput, check_option_names, option_names, parse_request
from ruyi_flow.types import Final, FinishReason, NodeStatus, Stats, Token

if TYPE_CHECKING:
    from ruyi_flow.serving.answering import Answering
    from ruyi_flow.serving.engine import Engine
    from ruyi_flow.transport.peer import Peer

__all__ = ["AsyncClient", "Client", "Reply", "make_request"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Reply:
    """A complete answer."""

    text: str
    """The answer's text."""
    tokens: tuple[Token, ...]
    """Tokens of the answer, each with the exit and the node that decided it."""
    finish_reason: FinishReason
    """Why the answer ended."""
    stats: Stats
    """Statistics of the answer: durations, drafts, and the time and traffic of each node."""

    @property
    def token_ids(self) -> list[int]:
        """The answer's token ids, including the one that ended it."""
        return [token.id for token in self.tokens]

    def to_dict(self) -> dict[str, Any]:
        """Return the answer as a JSON object."""
        stats = asdict(self.stats) | {"token_s": self.stats.token_s}
        return {
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "tokens": [asdict(token) for token in self.tokens],
            "stats": stats,
        }


class AsyncClient:
    """A client of a topology's entry node, for use as an async context manager.

    A topology of one node without an address is loaded and run in this process.

    Args:
        topology: a YAML file, or a loaded `Topology`.
        timeout_s: seconds that an answer may take, unless the call sets another limit.
    """

    def __init__(self, topology: str | Path | Topology, *, timeout_s: float = 600.0) -> None:
        self.topology = topology if isinstance(topology, Topology) else Topology.load(topology)
        self._timeout_s = _check_timeout(timeout_s)
        self._is_open = False
        self._peers: dict[str, Peer] = {}
        self._engine: Engine | None = None
        self._answering: Answering | None = None

    async def __aenter__(self) -> AsyncClient:
        if self._is_open:
            raise RequestError("this client is already open; make another one")
        self._is_open = True
        try:
            await self._open()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def _open(self) -> None:
        if self.topology.entry.address is None:
            loading = asyncio.ensure_future(asyncio.to_thread(_load, self.topology))
            try:
                self._engine, self._answering = await asyncio.shield(loading)
            except asyncio.CancelledError:  # the thread goes on; what it loads must not outlive this call
                await asyncio.shield(asyncio.ensure_future(_discard(loading)))
                raise
            return
        from ruyi_flow.transport.peer import Peer

        for node in self.topology.nodes:
            self._peers[node.name] = Peer(node.name, str(node.address), max_message_bytes=node.limits.max_message_bytes)

    async def __aexit__(self, *_: object) -> None:
        self._is_open = False
        peers, self._peers = self._peers, {}
        engine, self._engine, self._answering = self._engine, None, None
        await asyncio.gather(*(peer.close() for peer in peers.values()))
        if engine is not None:
            await engine.close()

    async def generate(self, prompt: PromptInput, **options: Any) -> Reply:
        """Answer a prompt.

        Args:
            prompt: a text (one user turn), {"role": …, "content": …} messages, or token ids. A content is a text, or a
                list of {"type": "text", "text": …}. Roles are system, user, assistant, and those that the family's
                chat template names. Token ids are integers, or a 1-dimensional array of numpy or torch.
            options: any of the following.
                Sampling: max_new_tokens, temperature, top_k, top_p, repetition_penalty, no_repeat_ngram_size,
                min_new_tokens, stop, eos_token_ids, seed (see `SamplingParams`).
                Routing: mode, exit, threshold, thresholds, window, back, draft, fallback, and scale, start, family,
                which a policy file sets (see `Routing`). Without a mode, `exit` means mode `fixed`, and a threshold
                means mode `token`. Default: the topology's policy.
                `policy`: a policy file of `ruyi-flow calibrate`.
                `raw`: True encodes a text as it is, without the chat template.
                `timeout_s`: seconds that the answer may take.

        Raises:
            RequestError: no node could serve an option or the prompt.
            NodeError: a node cannot serve the request now.
        """
        tokens: list[Token] = []
        async with aclosing(self.events(prompt, **options)) as events:
            async for event in events:
                if isinstance(event, Final):
                    return Reply(event.text, tuple(tokens), event.finish_reason, event.stats)
                tokens.append(event)
        raise NodeError("the stream ended before the answer was complete")

    async def stream(self, prompt: PromptInput, **options: Any) -> AsyncGenerator[Token, None]:
        """Answer a prompt token by token, with the options of `generate`."""
        async with aclosing(self.events(prompt, **options)) as events:
            async for event in events:
                if isinstance(event, Token):
                    yield event

    async def events(self, prompt: PromptInput, **options: Any) -> AsyncGenerator[Token | Final, None]:
        """Answer a prompt token by token, then yield one `Final` with the text and statistics.

        The options are those of `generate`.
        """
        self._check_open()
        timeout_s = options.pop("timeout_s", None)
        timeout_s = self._timeout_s if timeout_s is None else _check_timeout(timeout_s)
        # A request may name a policy file, and a prompt may be long.
        request = await asyncio.to_thread(make_request, prompt, options)
        if self._answering is None:
            entry = self._peers[self.topology.entry.name]
            async with aclosing(entry.generate(request, timeout_s=timeout_s)) as events:
                async for event in events:
                    yield event
            return
        deadline = asyncio.get_running_loop().time() + timeout_s
        async with aclosing(self._answering.generate(request, timeout_s)) as events:
            async for event in events:
                if asyncio.get_running_loop().time() > deadline:
                    raise DeadlineExceeded(f"the answer was not complete within {timeout_s:g} s (timeout_s)")
                yield event

    async def status(self, *, timeout_s: float = 3.0) -> dict[str, NodeStatus | NodeError]:
        """Return the status of every node, or the error of a node that cannot be asked."""
        self._check_open()
        _check_timeout(timeout_s)
        if self._engine is not None:
            return {self.topology.entry.name: self._engine.status()}

        async def ask(peer: Peer) -> NodeStatus | NodeError:
            try:
                return await peer.status(timeout_s=timeout_s)
            except NodeError as error:
                return error

        answers = await asyncio.gather(*(ask(peer) for peer in self._peers.values()))
        return dict(zip(self._peers, answers, strict=True))

    def _check_open(self) -> None:
        if not self._is_open:
            raise RequestError("use the client in an async with block: async with AsyncClient(…) as client: …")


class Client:
    """A client of a topology's entry node for code without an event loop, for use as a context manager.

    It has the methods and options of `AsyncClient`, as plain calls and iterators. Several threads may call it at once.

    Args:
        topology: a YAML file, or a loaded `Topology`.
        timeout_s: seconds that an answer may take, unless the call sets another limit.
    """

    def __init__(self, topology: str | Path | Topology, *, timeout_s: float = 600.0) -> None:
        self._async = AsyncClient(topology, timeout_s=timeout_s)
        self._loop: _LoopThread | None = None

    @property
    def topology(self) -> Topology:
        """The loaded topology."""
        return self._async.topology

    def __enter__(self) -> Client:
        if self._loop is not None:
            raise RequestError("this client is already open; make another one")
        loop = _LoopThread(self._async)
        loop.open()
        self._loop = loop
        return self

    def __exit__(self, *_: object) -> None:
        loop, self._loop = self._running(), None
        loop.close()

    def generate(self, prompt: PromptInput, **options: Any) -> Reply:
        """Answer a prompt: `client.generate("Why is the sky blue?", mode="exact", max_new_tokens=64)`.

        The options and errors are those of `AsyncClient.generate`. Ctrl-C ends the answer on the nodes.
        """
        return self._running().run(lambda: self._async.generate(prompt, **options))

    def stream(self, prompt: PromptInput, **options: Any) -> Generator[Token, None, None]:
        """Answer a prompt token by token, with the options of `generate`. Closing it ends the answer on the nodes."""
        return self._iterate(self._async.stream(prompt, **options))

    def events(self, prompt: PromptInput, **options: Any) -> Generator[Token | Final, None, None]:
        """Answer a prompt token by token, then yield one `Final` with the text and statistics."""
        return self._iterate(self._async.events(prompt, **options))

    def status(self, *, timeout_s: float = 3.0) -> dict[str, NodeStatus | NodeError]:
        """Return the status of every node, or the error of a node that cannot be asked."""
        return self._running().run(lambda: self._async.status(timeout_s=timeout_s))

    def _iterate(self, events: AsyncGenerator[T, None]) -> Generator[T, None, None]:
        async def next_event() -> T | None:
            return await anext(events, None)

        loop = self._running()
        try:
            while self._running() is loop:
                event = loop.run(next_event)
                if event is None:
                    return
                yield event
        finally:  # also when the caller stops early, so that the nodes free their KV caches at once
            if self._loop is loop:
                loop.run(lambda: _close(events))

    def _running(self) -> _LoopThread:
        if self._loop is None:
            raise RequestError("use the client in a with block: with Client(…) as client: …")
        return self._loop


class _LoopThread:
    """An open `AsyncClient` and its event loop, on a thread of their own, for callers without a loop.

    Args:
        client: the client, which is open from `open` until `close`.
    """

    def __init__(self, client: AsyncClient) -> None:
        self._client, self._loop = client, asyncio.new_event_loop()
        self._stop, self._opened = asyncio.Event(), threading.Event()
        self._error: BaseException | None = None
        self._lock, self._closing = threading.Lock(), False
        # A daemon: when Ctrl-C interrupts `close`, the process can end before the thread does.
        self._thread = threading.Thread(target=self._work, name="ruyi-flow client", daemon=True)

    def open(self) -> None:
        """Open the client."""
        self._thread.start()
        try:
            self._opened.wait()
        except BaseException:  # Ctrl-C
            self.close()
            raise
        if self._error is not None:
            self._thread.join()
            raise self._error

    def close(self) -> None:
        """Close the client and end the thread. Ctrl-C ends the wait for it only."""
        with self._lock:
            self._closing = True
            with suppress(RuntimeError):  # the loop is closed: the client could not be opened
                self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def run(self, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine on the loop and return its result.

        Ctrl-C reaches only the calling thread, so it cancels the coroutine and waits for its end.
        """
        tasks: list[asyncio.Task[T]] = []
        ended = threading.Event()

        def start() -> None:
            tasks.append(self._loop.create_task(call()))
            tasks[0].add_done_callback(lambda _: ended.set())

        with self._lock:
            if self._closing:
                raise RequestError(_CLOSED)
            self._loop.call_soon_threadsafe(start)
        try:
            ended.wait()
        except BaseException:
            self._loop.call_soon_threadsafe(lambda: tasks[0].cancel())  # after `start`: the loop keeps the order
            ended.wait()
            raise
        if tasks[0].cancelled():
            raise RequestError(_CLOSED)
        return tasks[0].result()

    def _work(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._serve())
        except BaseException as error:  # the thread that opens or closes the client raises it
            self._error = error
        finally:
            self._opened.set()

    async def _serve(self) -> None:
        async with self._client:
            self._opened.set()
            await self._stop.wait()
        # Answers that other threads wait for end with an error of their own. gRPC's tasks end when its calls have:
        # what completes after the loop is closed would be a stack trace on another loop.
        ending = asyncio.all_tasks() - {asyncio.current_task()}
        if ending:
            await asyncio.wait(ending, timeout=_CLOSING_S)


_CLOSED = "the client was closed while it answered"

_CLOSING_S = 2.0
"""Seconds that a closing client waits for the calls on its event loop to end."""


async def _close(events: AsyncGenerator[Any, None]) -> None:
    await events.aclose()


def _load(topology: Topology) -> tuple[Engine, Answering]:
    """Load the one node of a topology."""
    with needed_by("a node in the client's process"):
        from ruyi_flow.serving.engine import Engine

        engine = Engine.load(topology, topology.entry.name)
    try:
        return engine, engine.answering()
    except BaseException:  # the engine's thread and memory must not outlive this call
        engine.worker.shutdown()
        raise


async def _discard(loading: asyncio.Future[tuple[Engine, Answering]]) -> None:
    """Close an engine that nobody waits for any more, once it has been loaded."""
    with suppress(Exception):
        engine, _ = await loading
        await engine.close()


def _check_timeout(timeout_s: object) -> float:
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)) or not 0 < timeout_s < 1e9:
        raise RequestError(f"timeout_s is {timeout_s!r}; it must be a number of seconds above 0")
    return timeout_s


def make_request(prompt: PromptInput, options: Mapping[str, Any]) -> GenerateRequest:
    """Build a request from the keyword arguments of a call; see `AsyncClient.generate`.

    Raises:
        RequestError: an option is unknown, or an option or the prompt has a value that it cannot have.
        ConfigError: the policy file cannot be read.
    """
    check_option_names(options, option_names() | {"policy", "timeout_s"})
    return parse_request(prompt, with_policy_file({n: v for n, v in options.items() if n != "timeout_s"}))
