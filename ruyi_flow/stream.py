"""Answers that arrive token by token: an asynchronous iterator, and one for code without an event loop."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator

from ruyi_flow.errors import RequestError
from ruyi_flow.reply import Reply, shortened
from ruyi_flow.types import Event, Final, PromptTokens, Token

__all__ = ["AsyncStream", "Stream"]


class AsyncStream:
    """An answer that arrives: an asynchronous iterator of its tokens, and the answer so far. See `Stream`.

    Leaving an `async with` block, or `await stream.close()`, ends the answer on the nodes.

    Args:
        events: the prompt's tokens if they were asked for, the tokens, then one `Final`.
    """

    def __init__(self, events: AsyncGenerator[Event, None]) -> None:
        self._events = events
        self._prompt: PromptTokens | None = None
        self._tokens: list[Token] = []
        self._reply: Reply | None = None

    @property
    def tokens(self) -> tuple[Token, ...]:
        """The tokens that have arrived."""
        return tuple(self._tokens)

    @property
    def text(self) -> str:
        """The text that has arrived."""
        return "".join(token.text for token in self._tokens)

    @property
    def prompt(self) -> PromptTokens | None:
        """The prompt's tokens, if `prompt_logprobs` asked for them and they have arrived."""
        return self._prompt

    @property
    def reply(self) -> Reply:
        """The complete answer.

        Raises:
            RequestError: the answer is not complete; `text` and `tokens` have what arrived.
        """
        if self._reply is None:
            raise RequestError(
                f"the answer is not complete: {len(self._tokens)} tokens have arrived (stream.text, stream.tokens); "
                "a stream has a reply after its last token"
            )
        return self._reply

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> Token:
        event = await anext(self._events, None)
        if isinstance(event, PromptTokens):
            self._prompt, event = event, await anext(self._events, None)
        if isinstance(event, Token):
            self._tokens.append(event)
            return event
        if isinstance(event, Final):
            self._reply = Reply(event.text, tuple(self._tokens), event.finish_reason, event.stats, self._prompt)
        raise StopAsyncIteration

    async def close(self) -> None:
        """End the answer on the nodes, unless it has ended."""
        await self._events.aclose()

    async def aclose(self) -> None:
        """Call `close`; `contextlib.aclosing` knows it by this name."""
        await self.close()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return _describe(self)


class Stream:
    """An answer that arrives: an iterator of its tokens, and the answer so far.

        stream = client.stream("Why is the sky blue?")
        for token in stream:
            print(token.text, end="", flush=True)
        stream.reply  # the complete answer, which a notebook shows in colour

    Leaving a `with` block, or `close`, ends the answer on the nodes. So does Ctrl-C.

    Args:
        answer: the answer as it arrives on the client's event loop.
        tokens: its tokens, for this thread.
    """

    def __init__(self, answer: AsyncStream, tokens: Generator[Token, None, None]) -> None:
        self._answer, self._iterator = answer, tokens

    @property
    def tokens(self) -> tuple[Token, ...]:
        """The tokens that have arrived."""
        return self._answer.tokens

    @property
    def text(self) -> str:
        """The text that has arrived."""
        return self._answer.text

    @property
    def prompt(self) -> PromptTokens | None:
        """The prompt's tokens, if `prompt_logprobs` asked for them and they have arrived."""
        return self._answer.prompt

    @property
    def reply(self) -> Reply:
        """The complete answer.

        Raises:
            RequestError: the answer is not complete; `text` and `tokens` have what arrived.
        """
        return self._answer.reply

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Token:
        return next(self._iterator)

    def close(self) -> None:
        """End the answer on the nodes, unless it has ended."""
        self._iterator.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return _describe(self)


def _describe(stream: AsyncStream | Stream) -> str:
    return f"{type(stream).__name__}({shortened(stream.text)}, {len(stream.tokens)} tokens have arrived)"
