"""The SDK: an asynchronous client of a topology, and a synchronous one that runs it on a background event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator, Mapping
from contextlib import aclosing
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from anyio.from_thread import BlockingPortal, start_blocking_portal

from ruyi_flow.config.policy_file import PolicyFile
from ruyi_flow.config.topology import Topology
from ruyi_flow.errors import DeadlineExceeded, NodeError, RequestError
from ruyi_flow.requests import GenerateRequest, PromptInput, check_option_names, option_names, parse_request
from ruyi_flow.types import Final, FinishReason, NodeStatus, Stats, Token

if TYPE_CHECKING:
    from ruyi_flow.serving.answering import Answering
    from ruyi_flow.serving.engine import Engine
    from ruyi_flow.transport.peer import Peer

__all__ = ["AsyncClient", "Client", "Reply", "make_request"]


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
        self._timeout_s = timeout_s
        self._peers: dict[str, Peer] = {}
        self._engine: Engine | None = None
        self._answering: Answering | None = None

    async def __aenter__(self) -> AsyncClient:
        if self.topology.entry.address is None:
            from ruyi_flow.serving.engine import Engine

            engine = await asyncio.to_thread(Engine.load, self.topology, self.topology.entry.name)
            try:
                self._answering = await asyncio.to_thread(engine.answering)
            except BaseException:  # the engine's thread and memory must not outlive this call
                await engine.close()
                raise
            self._engine = engine
            return self
        from ruyi_flow.transport.peer import Peer

        for node in self.topology.nodes:
            self._peers[node.name] = Peer(node.name, str(node.address), max_message_bytes=node.limits.max_message_bytes)
        return self

    async def __aexit__(self, *_: object) -> None:
        peers, self._peers = self._peers, {}
        for peer in peers.values():
            await peer.close()
        engine, self._engine, self._answering = self._engine, None, None
        if engine is not None:
            await engine.close()

    async def generate(self, prompt: PromptInput, **options: Any) -> Reply:
        """Answer a prompt.

        Args:
            prompt: a text (one user turn), {"role": …, "content": …} messages, or token ids.
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
        timeout_s = options.pop("timeout_s", self._timeout_s)
        if not isinstance(timeout_s, (int, float)) or not 0 < timeout_s < 1e9:
            raise RequestError(f"timeout_s is {timeout_s!r}; it must be a number of seconds above 0")
        request = make_request(prompt, options)
        if self._answering is None:
            if not self._peers:
                raise RequestError("use the client in an async with block: async with AsyncClient(…) as client: …")
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
        if self._engine is not None:
            return {self.topology.entry.name: self._engine.status()}

        async def ask(peer: Peer) -> NodeStatus | NodeError:
            try:
                return await peer.status(timeout_s=timeout_s)
            except NodeError as error:
                return error

        answers = await asyncio.gather(*(ask(peer) for peer in self._peers.values()))
        return dict(zip(self._peers, answers, strict=True))


class Client:
    """A client of a topology's entry node for code without an event loop, for use as a context manager.

    It has the methods and options of `AsyncClient`, as plain calls and iterators. Several threads may call it at once.

    Args:
        topology: a YAML file, or a loaded `Topology`.
        timeout_s: seconds that an answer may take, unless the call sets another limit.
    """

    def __init__(self, topology: str | Path | Topology, *, timeout_s: float = 600.0) -> None:
        self._async = AsyncClient(topology, timeout_s=timeout_s)
        self._portal: BlockingPortal | None = None

    @property
    def topology(self) -> Topology:
        """The loaded topology."""
        return self._async.topology

    def __enter__(self) -> Client:
        if self._portal is not None:
            raise RequestError("this client is already open; make another one")
        self._portal_manager = start_blocking_portal()
        self._portal = self._portal_manager.__enter__()
        try:
            self._portal.call(self._async.__aenter__)
        except BaseException:  # Ctrl-C too: the portal's thread must end
            self._portal = None
            self._portal_manager.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        portal, self._portal = self._running(), None
        portal.call(self._async.__aexit__, None, None, None)
        self._portal_manager.__exit__(kind, error, trace)

    def generate(self, prompt: PromptInput, **options: Any) -> Reply:
        """Answer a prompt: `client.generate("Why is the sky blue?", mode="exact", max_new_tokens=64)`.

        The options and errors are those of `AsyncClient.generate`.
        """

        async def call() -> Reply:
            return await self._async.generate(prompt, **options)

        return self._running().call(call)

    def stream(self, prompt: PromptInput, **options: Any) -> Generator[Token, None, None]:
        """Answer a prompt token by token, with the options of `generate`. Closing it ends the answer on the nodes."""
        return self._iterate(self._async.stream(prompt, **options))

    def events(self, prompt: PromptInput, **options: Any) -> Generator[Token | Final, None, None]:
        """Answer a prompt token by token, then yield one `Final` with the text and statistics."""
        return self._iterate(self._async.events(prompt, **options))

    def status(self, *, timeout_s: float = 3.0) -> dict[str, NodeStatus | NodeError]:
        """Return the status of every node, or the error of a node that cannot be asked."""

        async def call() -> dict[str, NodeStatus | NodeError]:
            return await self._async.status(timeout_s=timeout_s)

        return self._running().call(call)

    def _iterate(self, events: AsyncGenerator[Any, None]) -> Generator[Any, None, None]:
        portal = self._running()
        try:
            while self._running() is portal:
                coming = portal.start_task_soon(_next_of, events)
                try:
                    event = coming.result()
                finally:  # Ctrl-C reaches only this thread: the task on the loop must end before the answer is closed
                    coming.cancel()
                if event is None:
                    return
                yield event
        finally:  # also when the caller stops early, so that the nodes free their KV caches at once
            if self._portal is portal:
                portal.call(_close, events)

    def _running(self) -> BlockingPortal:
        if self._portal is None:
            raise RequestError("use the client in a with block: with Client(…) as client: …")
        return self._portal


async def _next_of(events: AsyncGenerator[Any, None]) -> Any:
    """Return the next event, or None at the end."""
    return await anext(events, None)


async def _close(events: AsyncGenerator[Any, None]) -> None:
    for _ in range(100):
        try:
            return await events.aclose()
        except RuntimeError:  # a cancelled step has not ended yet
            await asyncio.sleep(0.01)


def make_request(prompt: PromptInput, options: Mapping[str, Any]) -> GenerateRequest:
    """Build a request from the keyword arguments of a call; see `AsyncClient.generate`.

    Raises:
        RequestError: an option is unknown, or an option or the prompt has a value that it cannot have.
        ConfigError: the policy file cannot be read.
    """
    check_option_names(options, option_names() | {"policy", "timeout_s"})
    given = {name: value for name, value in options.items() if value is not None and name != "timeout_s"}
    if (policy := given.pop("policy", None)) is not None:
        given = PolicyFile.load(policy).options(given)
    return parse_request(prompt, given)
