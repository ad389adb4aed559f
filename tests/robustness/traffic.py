"""The traffic of a trial: conversations drawn from a seed, and clients that hold them."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruyi_flow.client import AsyncClient
from ruyi_flow.config.topology import Topology
from ruyi_flow.errors import RuyiFlowError
from ruyi_flow.testing import tiny_family
from ruyi_flow.types import Stats, Token
from tests.families import MIN_VOCAB, add_tokenizer

__all__ = [
    "DEMO",
    "TINY",
    "Answer",
    "Conversation",
    "Family",
    "Turn",
    "draw_conversations",
    "expected_answers",
    "hold",
]


@dataclass(frozen=True)
class Family:
    """A family with five exits over three nodes."""

    name: str
    """Its name, or that of the store's."""
    cuts: tuple[tuple[int, ...], ...]
    """The exits of each node."""
    slowness: float = 1.0
    """Factor on the time that an answer may take."""

    @property
    def exits(self) -> tuple[int, ...]:
        """All exits."""
        return tuple(exit for cut in self.cuts for exit in cut)

    def make(self, folder: Path) -> str:
        """Write it to a folder, unless it is in the store; return what a topology calls it."""
        if self != TINY:
            return self.name
        sizes: dict[str, Any] = {"early_exit_branch_layers": [2, 1, 3, 1, 1], "early_exit_probe_size": 5}
        sizes |= {"vocab_size": MIN_VOCAB, "eos_token_id": 258}
        return str(add_tokenizer(tiny_family(folder, base="qwen2", exits=self.exits, seed=3, **sizes)))

    def whole(self, where: str) -> Topology:
        """Return a topology of one node, which runs in this process and which nothing happens to."""
        whole = {"name": "whole", "exits": list(self.exits), "dtype": "float32", "threads": 1}
        return Topology.parse({"family": where, "nodes": [whole]})


TINY = Family("tiny", ((1, 3), (4, 6), (7,)))
"""A tiny one with random weights, branches of several depths, and a tokenizer."""

DEMO = Family("smollm2", ((5, 11), (17, 23), (29,)), slowness=8.0)
"""The demo family, which must be in the store."""

_LENGTHS = ((1, 12), (13, 60), (130, 260))
"""Ranges of prompt lengths; the last one goes to the next node in several parts."""


@dataclass(frozen=True)
class Turn:
    """One question of a conversation."""

    says: tuple[int, ...]
    """Token ids that follow what was said before."""
    options: dict[str, Any]
    """Options of the request."""


@dataclass(frozen=True)
class Conversation:
    """The questions of one client; the prompt of each begins with all that was said before."""

    turns: tuple[Turn, ...]


@dataclass
class Answer:
    """What a client receives for one question."""

    began: float
    """Time of the question, on the clock of `time.monotonic`."""
    tokens: list[Token] = field(default_factory=list)
    """Tokens in the order of their arrival."""
    times: list[float] = field(default_factory=list)
    """Time of arrival of each token."""
    text: str | None = None
    """The text of the complete answer; None while it is not complete."""
    stats: Stats | None = None
    """Statistics of the complete answer."""
    error: RuyiFlowError | None = None
    """Why it will not be complete."""
    ended: float | None = None
    """Time of its end or its error."""

    @property
    def recoveries(self) -> list[str]:
        """Each node that it lost before it went on, and why, as its statistics say."""
        if self.stats is None:
            return []
        of_nodes = [f"{hop.node}: {one.cause}" for hop in self.stats.hops for one in hop.recoveries]
        return [*of_nodes, *(f"entry node: {one.cause}" for one in self.stats.recoveries)]

    @property
    def decided(self) -> list[tuple[int, int]]:
        """Each token with its exit."""
        return [(token.id, token.exit) for token in self.tokens]


def draw_conversations(rng: random.Random, family: Family) -> tuple[Conversation, ...]:
    """Draw the conversations of a trial, which are held at the same time."""
    count = rng.choice((1, 1, 2, 3))
    return tuple(_draw_conversation(rng, family, is_deep=i == 0) for i in range(count))


def _draw_conversation(rng: random.Random, family: Family, *, is_deep: bool) -> Conversation:
    """Draw a conversation; a deep one needs the deepest node for most of its tokens, so that every fault meets it."""
    turns = []
    for i in range(rng.choice((1, 1, 1, 3))):
        low, high = rng.choice(_LENGTHS) if i == 0 else (1, 20)
        says = tuple(rng.randrange(3, 258) for _ in range(rng.randint(low, high)))
        options = (
            _draw_routing(rng, family, is_deep=is_deep) | _draw_sampling(rng) | {"max_new_tokens": rng.randint(8, 48)}
        )
        turns.append(Turn(says, options))
    return Conversation(tuple(turns))


def _draw_routing(rng: random.Random, family: Family, *, is_deep: bool) -> dict[str, Any]:
    *shallow, last = family.exits
    mode = rng.choice(("exact", "exact", "token", "token", "cascade", "cascade", "cascade", "fixed"))
    options: dict[str, Any] = {"mode": mode, "draft": rng.choice((0, 1, 4))}
    if mode == "fixed":
        options["exit"] = last if is_deep else rng.choice((shallow[0], *shallow[2:]))
    elif mode in ("token", "cascade"):
        low, high = (0.3, 1.0) if is_deep else (0.1, rng.choice((0.4, 0.7, 1.0)))
        options["thresholds"] = {exit: rng.uniform(low, high) for exit in shallow}
    if mode == "cascade":  # an exit is given up when its mean confidence is below its threshold
        options |= {"window": rng.choice((1, 2, 3, 8)), "back": rng.choice((None, 0.1, 0.3, 0.5))}
    return options


def _draw_sampling(rng: random.Random) -> dict[str, Any]:
    options: dict[str, Any] = {} if rng.random() < 0.1 else {"eos_token_ids": ()}
    if rng.random() < 0.5:
        options |= {"temperature": rng.uniform(0.3, 1.5), "seed": rng.randrange(2**31)}
        options |= rng.choice(({}, {"top_k": 20}, {"top_p": 0.9}))
    if rng.random() < 0.3:
        options |= rng.choice(({"repetition_penalty": 1.2}, {"frequency_penalty": 0.5}, {"no_repeat_ngram_size": 3}))
    if rng.random() < 0.1:
        options["logprobs"] = 2
    return options


async def hold(
    client: AsyncClient,
    conversation: Conversation,
    answers: list[Answer],
    arrived: Callable[[], None] = lambda: None,
    *,
    timeout_s: float = 30.0,
) -> None:
    """Hold a conversation until its end or its first error.

    Args:
        client: the client.
        conversation: the conversation.
        answers: where each answer is added when its question is asked.
        arrived: called for each token.
        timeout_s: seconds that each answer may take.
    """
    said: list[int] = []
    for turn in conversation.turns:
        said += turn.says
        answer = Answer(time.monotonic())
        answers.append(answer)
        try:
            async with client.stream(list(said), timeout_s=timeout_s, **turn.options) as stream:
                async for token in stream:
                    answer.tokens.append(token)
                    answer.times.append(time.monotonic())
                    arrived()
            answer.text, answer.stats = stream.reply.text, stream.reply.stats
        except RuyiFlowError as error:
            answer.error = error
            return
        finally:
            answer.ended = time.monotonic()
        said += [token.id for token in answer.tokens]


async def expected_answers(whole: AsyncClient, conversations: Sequence[Conversation]) -> list[list[Answer]]:
    """Return the answers of a client to which nothing happens."""
    answers: list[list[Answer]] = [[] for _ in conversations]
    await asyncio.gather(*(hold(whole, *pair) for pair in zip(conversations, answers, strict=True)))
    for answer in (answer for held in answers for answer in held):
        if answer.error is not None:
            raise answer.error
    return answers
