"""Node processes for benches, and what they are asked."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from ruyi_flow.client import AsyncClient, Reply
from ruyi_flow.config.topology import Topology
from ruyi_flow.errors import RuyiFlowError
from ruyi_flow.family import store
from ruyi_flow.family.checkpoint import Checkpoint
from ruyi_flow.family.tokenizer import load_tokenizer, prompt_ids
from ruyi_flow.requests import PromptInput
from ruyi_flow.serving.supervisor import supervise
from ruyi_flow.testing import Relay, free_ports

__all__ = ["PROMPT", "PROMPTS", "ask", "check_whole", "daemons", "prompts"]

PROMPT = "Why is the sky blue?"

PROMPTS = (PROMPT, "Write a short note to a friend who moved to another city.", "How do plants make food?")
"""Where much depends on how often branches agree, which they do more along some answers than along others."""


def prompts(checkpoint: Checkpoint, texts: Sequence[str]) -> list[list[int]]:
    """Users' texts as token ids, through the family's chat template.

    Raises:
        RequestError: the family has no tokenizer or no chat template.
    """
    tokenizer, vocab, folder = load_tokenizer(checkpoint), checkpoint.config.vocab_size, str(checkpoint.folder)
    return [prompt_ids(text, tokenizer, vocab_size=vocab, family=folder) for text in texts]


async def ask(client: AsyncClient, prompt: PromptInput, tokens: int, **options: Any) -> Reply:
    """An answer of exactly so many tokens, all of them the last exit's; without drafts, unless options say so.

    Raises:
        RuyiFlowError: it ended early.
    """
    reply = await client.generate(
        prompt, **{"mode": "exact", "draft": 0} | options, max_new_tokens=tokens, eos_token_ids=()
    )
    check_whole("an answer", len(reply.tokens), tokens)
    return reply


def check_whole(what: str, came: int, asked: int) -> None:
    """Raise RuyiFlowError unless as many tokens came as were asked for: figures a token would be of others."""
    if came != asked:
        raise RuyiFlowError(f"{what} ended after {came} of {asked} tokens; is its context too short?")


@asynccontextmanager
async def daemons(
    cuts: Sequence[Sequence[int]],
    *,
    family: str = store.DEMO,
    encoding: str = "bf16",
    dtype: str = "bfloat16",
    weights: Sequence[str | None] | str | None = None,
    threads: int = 1,
    device: str = "cpu",
    limits: Mapping[str, Any] | None = None,
    relay_to: Mapping[int, Relay] | None = None,
    cores: Sequence[int] | None = None,
) -> AsyncIterator[AsyncClient]:
    """Node processes n0, n1, … on loopback that serve, and a client of them; all are gone when the block is left.

    Args:
        cuts: the exits of each.
        family: a folder, or a name in the store.
        weights: how each node holds its products, or how all of them do.
        threads: of each node.
        device: that they compute on.
        limits: of each node, as in a topology.
        relay_to: by a node's number, a relay in front of it.
        cores: that all nodes stay on.

    Raises:
        ConfigError: a topology of this cannot work.
        NodeError: a node does not start.
    """
    async with AsyncExitStack() as stack:
        addresses = [f"127.0.0.1:{port}" for port in free_ports(len(cuts))]
        names = [f"n{i}" for i in range(len(cuts))]
        dialled = {i: await stack.enter_async_context(relay.run(addresses[i])) for i, relay in (relay_to or {}).items()}
        held = [weights] * len(cuts) if weights is None or isinstance(weights, str) else weights
        common = {
            "dtype": dtype,
            "threads": threads,
            "device": device,
            "cores": cores and [*cores],
            "limits": dict(limits or {}),
        }
        data = {
            "family": str(store.locate(family).resolve()),
            "nodes": [
                {"name": n, "address": a, "exits": [*e], "weights": w and str(w), **common}
                for n, a, e, w in zip(names, addresses, cuts, held, strict=True)
            ],
            "links": [
                {"from": names[i - 1], "to": names[i], "encoding": encoding, "address": dialled.get(i)}
                for i in range(1, len(cuts))
            ],
        }
        path = Path(stack.enter_context(TemporaryDirectory())) / "bench.yaml"
        path.write_text(yaml.safe_dump(data))
        topology = Topology.load(path)
        supervisor = await stack.enter_async_context(supervise(path, topology, lambda name, line: None))
        await supervisor.start()
        yield await stack.enter_async_context(AsyncClient(topology))
