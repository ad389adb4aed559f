"""The SDK: a client of a topology, synchronous or asynchronous, and a whole family in one process.

The async client is the one that works; the sync one runs it on a background event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from anyio.from_thread import BlockingPortal, start_blocking_portal

from ruyi_flow.config.policy_file import PolicyFile
from ruyi_flow.config.topology import Topology
from ruyi_flow.config.yaml_files import did_you_mean
from ruyi_flow.errors import DeadlineExceeded, NodeError, RequestError
from ruyi_flow.requests import GenerateRequest
from ruyi_flow.routing.policy import Routing
from ruyi_flow.types import Final, FinishReason, Mode, NodeStatus, SamplingParams, Stats, Token, is_token_id, parse_mode

if TYPE_CHECKING:
    from ruyi_flow.serving.answering import Entry
    from ruyi_flow.transport.peer import Peer

__all__ = ["AsyncClient", "Client", "Prompt", "Reply", "make_request"]

Prompt = str | Sequence[Mapping[str, str]] | Sequence[int]
"""A text (one user turn), a list of {"role": …, "content": …} messages, or token ids."""

_SAMPLING = {f.name for f in fields(SamplingParams)}
_ROUTING = {f.name for f in fields(Routing)}


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer."""

    text: str
    tokens: tuple[Token, ...]
    finish_reason: FinishReason
    stats: Stats

    @property
    def token_ids(self) -> list[int]:
        """The answer's token ids, the one that ended it included."""
        return [token.id for token in self.tokens]

    def to_dict(self) -> dict[str, Any]:
        """As one JSON object."""
        stats = asdict(self.stats) | {"token_s": self.stats.token_s}
        return {
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "tokens": [asdict(token) for token in self.tokens],
            "stats": stats,
        }


class AsyncClient:
    """A client of a topology's entry node.

    A topology of one node without an address is loaded and run in this process. Use it as an async context manager.

    Args:
        topology: a YAML file, or a loaded `Topology`.
        timeout_s: deadline of a request, unless the call gives another.
    """

    def __init__(self, topology: str | Path | Topology, *, timeout_s: float = 600.0) -> None:
        self.topology = topology if isinstance(topology, Topology) else Topology.load(topology)
        self._timeout_s = timeout_s
        self._peers: dict[str, Peer] = {}
        self._local: Entry | None = None

    async def __aenter__(self) -> AsyncClient:
        if self.topology.entry.address is None:
            from ruyi_flow.serving.answering import Entry
            from ruyi_flow.serving.engine import Engine

            self._local = Entry(await asyncio.to_thread(Engine.load, self.topology, self.topology.entry.name))
            return self
        from ruyi_flow.transport.peer import Peer

        for node in self.topology.nodes:
            self._peers[node.name] = Peer(node.name, str(node.address), max_message_bytes=node.limits.max_message_bytes)
        return self

    async def __aexit__(self, *_: object) -> None:
        peers, self._peers = self._peers, {}
        for peer in peers.values():
            await peer.close()
        local, self._local = self._local, None
        if local is not None:
            await local.engine.close()

    async def generate(self, prompt: Prompt, **options: Any) -> Reply:
        """Answer a prompt.

        Args:
            prompt: see `Prompt`; `raw=True` sends a text as it is, without the chat template.
            options: any field of `SamplingParams` (max_new_tokens, temperature, top_k, top_p, repetition_penalty,
                no_repeat_ngram_size, min_new_tokens, stop, eos_token_ids, seed) and of `Routing` (mode, exit,
                threshold, thresholds, window, back, draft, fallback), `policy` (a file of `ruyi-flow calibrate`),
                `raw`, and `timeout_s`. Routing that is left out is the topology's; an exit without a mode means
                `fixed`, a threshold without one means `token`. An answer ends with the family's context, if not before.

        Raises:
            RequestError: a parameter or a prompt that no node could serve.
            NodeError: a node that cannot serve it now.
        """
        tokens: list[Token] = []
        async with aclosing(self.events(prompt, **options)) as events:
            async for event in events:
                if isinstance(event, Final):
                    return Reply(event.text, tuple(tokens), event.finish_reason, event.stats)
                tokens.append(event)
        raise NodeError("the answer ended in the middle")

    async def stream(self, prompt: Prompt, **options: Any) -> AsyncGenerator[Token, None]:
        """Answer a prompt token by token; takes what `generate` takes."""
        async with aclosing(self.events(prompt, **options)) as events:
            async for event in events:
                if isinstance(event, Token):
                    yield event

    async def events(self, prompt: Prompt, **options: Any) -> AsyncGenerator[Token | Final, None]:
        """Answer a prompt token by token, then one `Final` with text and figures; takes what `generate` takes."""
        timeout_s = options.pop("timeout_s", self._timeout_s)
        if not isinstance(timeout_s, (int, float)) or not 0 < timeout_s < 1e9:
            raise RequestError(f"timeout_s is {timeout_s!r}; it must be a number of seconds above 0")
        request = make_request(prompt, options)
        if self._local is None:
            if not self._peers:
                raise RequestError("use the client in an async with block: async with AsyncClient(…) as client: …")
            entry = self._peers[self.topology.entry.name]
            async with aclosing(entry.generate(request, timeout_s=timeout_s)) as events:
                async for event in events:
                    yield event
            return
        deadline = asyncio.get_running_loop().time() + timeout_s
        async with aclosing(self._local.generate(request, timeout_s)) as events:
            async for event in events:
                if asyncio.get_running_loop().time() > deadline:
                    raise DeadlineExceeded(f"no whole answer within {timeout_s:g} s")
                yield event

    async def status(self, *, timeout_s: float = 3.0) -> dict[str, NodeStatus | NodeError]:
        """What every node holds, or why it cannot be asked."""
        if self._local is not None:
            return {self.topology.entry.name: self._local.engine.status()}

        async def ask(peer: Peer) -> NodeStatus | NodeError:
            try:
                return await peer.status(timeout_s=timeout_s)
            except NodeError as error:
                return error

        answers = await asyncio.gather(*(ask(peer) for peer in self._peers.values()))
        return dict(zip(self._peers, answers, strict=True))


class Client:
    """`AsyncClient` for code without an event loop; the same methods and options, as plain calls and iterators.

    Its calls may come from several threads at once.

    Args:
        topology: a YAML file, or a loaded `Topology`.
        timeout_s: deadline of a request, unless the call gives another.
    """

    def __init__(self, topology: str | Path | Topology, *, timeout_s: float = 600.0) -> None:
        self._async = AsyncClient(topology, timeout_s=timeout_s)
        self._portal: BlockingPortal | None = None

    @property
    def topology(self) -> Topology:
        """The topology."""
        return self._async.topology

    def __enter__(self) -> Client:
        if self._portal is not None:
            raise RequestError("this client is open already; make another one")
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

    def generate(self, prompt: Prompt, **options: Any) -> Reply:
        """Answer a prompt: `client.generate("Why is the sky blue?", mode="exact", max_new_tokens=64)`.

        Takes and raises what `AsyncClient.generate` does.
        """

        async def call() -> Reply:
            return await self._async.generate(prompt, **options)

        return self._running().call(call)

    def stream(self, prompt: Prompt, **options: Any) -> Generator[Token, None, None]:
        """Answer a prompt token by token; takes what `generate` takes. Closing it early ends it on the nodes."""
        return self._iterate(self._async.stream(prompt, **options))

    def events(self, prompt: Prompt, **options: Any) -> Generator[Token | Final, None, None]:
        """Answer a prompt token by token, then one `Final` with text and figures; takes what `generate` takes."""
        return self._iterate(self._async.events(prompt, **options))

    def status(self, *, timeout_s: float = 3.0) -> dict[str, NodeStatus | NodeError]:
        """What every node holds, or why it cannot be asked."""

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
                finally:  # Ctrl-C reaches this thread only: the task on the loop must end before the answer is closed
                    coming.cancel()
                if event is None:
                    return
                yield event
        finally:  # also when the caller stops in the middle: the nodes' caches are freed at once
            if self._portal is portal:
                portal.call(_close, events)

    def _running(self) -> BlockingPortal:
        if self._portal is None:
            raise RequestError("use the client in a with block: with Client(…) as client: …")
        return self._portal


async def _next_of(events: AsyncGenerator[Any, None]) -> Any:
    """The next event, or None at the end."""
    return await anext(events, None)


async def _close(events: AsyncGenerator[Any, None]) -> None:
    for _ in range(100):
        try:
            return await events.aclose()
        except RuntimeError:  # a step that was cancelled has not ended yet
            await asyncio.sleep(0.01)


def make_request(prompt: Prompt, options: dict[str, Any]) -> GenerateRequest:
    """A request from a call's keywords; an unknown one is an error, never dropped."""
    known = _SAMPLING | _ROUTING | {"policy", "raw", "timeout_s"}
    for name in options:
        if name not in known:
            hint = did_you_mean(name, sorted(known)) or f"; known: {', '.join(sorted(known))}"
            raise RequestError(f"unknown option {name!r}{hint}")
    raw = bool(options.get("raw", False))
    sampling = SamplingParams(**{k: v for k, v in options.items() if k in _SAMPLING})
    given = {k: v for k, v in options.items() if k in _ROUTING and v is not None}
    overrides = {k: v for k, v in given.items() if k in ("draft", "fallback")}
    Routing(**overrides)  # raises when they cannot be
    routing = None
    if (policy := options.get("policy")) is not None:
        if others := sorted(set(given) - {*overrides, "mode"}):
            raise RequestError(f"{others[0]} goes without policy, which says it")
        mode = parse_mode(given["mode"]) if "mode" in given else None
        routing = PolicyFile.load(policy).routing(mode)
    elif set(given) - {*overrides}:
        routing = Routing(**(given | {"mode": parse_mode(given.get("mode") or _mode_of(given))}))
    return GenerateRequest(_prompt(prompt), raw, sampling, routing, **overrides)


def _mode_of(given: Mapping[str, Any]) -> Mode:
    """The mode that a call means which gives only the parameters of one."""
    return Mode.FIXED if "exit" in given else Mode.TOKEN


def _prompt(prompt: Prompt) -> str | tuple[tuple[str, str], ...] | tuple[int, ...]:
    if isinstance(prompt, str):
        return _text(prompt)
    if not isinstance(prompt, Iterable):
        raise RequestError(f"a prompt is a text, a list of messages, or token ids; this is {type(prompt).__name__}")
    items = list(prompt)
    if items and all(isinstance(item, int) for item in items):
        if not all(is_token_id(item) for item in items):
            raise RequestError("a prompt of token ids has numbers that cannot be one")
        return tuple(int(item) for item in items if isinstance(item, int))
    turns = []
    for item in items:
        if not isinstance(item, Mapping) or not {"role", "content"} <= item.keys():
            raise RequestError(
                'a message is {"role": …, "content": …}; a prompt is a text, a list of those, or token ids'
            )
        if not isinstance(item["role"], str) or not isinstance(item["content"], str):
            raise RequestError("a message's role and content must be texts")
        turns.append((_text(item["role"]), _text(item["content"])))
    return tuple(turns)


def _text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the prompt is not valid Unicode: {error}") from None
    return text
