"""Node processes for benchmarks, and the prompts that they answer."""

from __future__ import annotations

import time
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
from ruyi_flow.family.tokenizer import PromptEncoder, load_tokenizer
from ruyi_flow.requests import PromptInput
from ruyi_flow.serving.supervisor import supervise
from ruyi_flow.testing import Relay, free_ports

__all__ = [
    "PROMPT",
    "PROMPTS",
    "check_token_count",
    "generate_exactly",
    "running_nodes",
    "token_times",
    "tokenize_prompts",
]

PROMPT = "Why is the sky blue?"

PROMPTS = (PROMPT, "Write a short note to a friend who moved to another city.", "How do plants make food?")
"""Prompts of benchmarks of drafts: how often branches agree differs from answer to answer, so several are needed."""


def tokenize_prompts(checkpoint: Checkpoint, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of user messages, rendered with the family's chat template.

    Raises:
        RequestError: the family has no tokenizer or no chat template.
    """
    prompts = PromptEncoder(load_tokenizer(checkpoint), checkpoint.config, family=str(checkpoint.folder))
    return [prompts.encode(text) for text in texts]


async def generate_exactly(client: AsyncClient, prompt: PromptInput, tokens: int, **options: Any) -> Reply:
    """Generate an answer of exactly this many tokens; in mode exact without drafts, unless the options differ.

    Raises:
        RuyiFlowError: the answer ended early.
    """
    asked: dict[str, Any] = {"mode": "exact", "draft": 0} | options
    reply = await client.generate(prompt, max_new_tokens=tokens, eos_token_ids=(), **asked)
    check_token_count("an answer", len(reply.tokens), tokens)
    return reply


async def token_times(client: AsyncClient, ids: Sequence[int], tokens: int) -> list[float]:
    """Stream an answer; return the time of the request and of each token, in seconds of one clock.

    Raises:
        RuyiFlowError: the answer ended early.
    """
    options: dict[str, Any] = {"mode": "exact", "draft": 0, "max_new_tokens": tokens, "eos_token_ids": ()}
    times = [time.perf_counter()]
    async with client.stream(ids, **options) as stream:
        async for _ in stream:
            times.append(time.perf_counter())
    check_token_count("an answer", len(times) - 1, tokens)
    return times


def check_token_count(what: str, generated: int, wanted: int) -> None:
    """Raise RuyiFlowError unless all wanted tokens were generated: a time per token would be wrong."""
    if generated != wanted:
        raise RuyiFlowError(f"{what} ended after {generated} of {wanted} tokens; is its context too short?")


@asynccontextmanager
async def running_nodes(
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
    replicas: int = 1,
) -> AsyncIterator[AsyncClient]:
    """Start node processes n0, n1, … on loopback and yield a client of them; leaving the block ends them.

    Args:
        cuts: exits of each node.
        family: folder of the family, or its name in the store.
        encoding: number format of hidden states on the links.
        dtype: number format of hidden states in the nodes.
        weights: number format of the weight matrices, one for all nodes or one for each. Default: as in the family.
        threads: CPU threads of each node.
        device: torch device of all nodes.
        limits: `limits` of each node, as in a topology file.
        relay_to: relays in front of nodes, by the node's number.
        cores: numbers of the cores that the nodes may use. Default: all.
        replicas: number of processes of the deepest node.

    Raises:
        ConfigError: the topology of these nodes is not valid.
        NodeError: a node does not start.
    """
    async with AsyncExitStack() as stack:
        dialled = [f"127.0.0.1:{port}" for port in free_ports(len(cuts) - 1 + replicas)]
        addresses: list[str | list[str]] = [*dialled]
        if replicas > 1:
            addresses = [*dialled[: len(cuts) - 1], dialled[len(cuts) - 1 :]]
        names = [f"n{i}" for i in range(len(cuts))]
        relays = {i: await stack.enter_async_context(relay.run(dialled[i])) for i, relay in (relay_to or {}).items()}
        formats = [weights] * len(cuts) if weights is None or isinstance(weights, str) else weights
        common = {
            "dtype": dtype,
            "threads": threads,
            "device": device,
            "cores": cores and [*cores],
            "limits": {"park_s": 0, **(limits or {})},  # prompts are repeated, and each is to be computed
        }
        data = {
            "family": str(store.locate(family).resolve()),
            "nodes": [
                {"name": n, "address": a, "exits": [*e], "weights": w and str(w), **common}
                for n, a, e, w in zip(names, addresses, cuts, formats, strict=True)
            ],
            "links": [
                {"from": names[i - 1], "to": names[i], "encoding": encoding, "address": relays.get(i)}
                for i in range(1, len(cuts))
            ],
        }
        path = Path(stack.enter_context(TemporaryDirectory())) / "bench.yaml"
        path.write_text(yaml.safe_dump(data), encoding="utf-8")
        topology = Topology.load(path)
        supervisor = await stack.enter_async_context(supervise(path, topology, lambda name, line: None))
        await supervisor.start()
        yield await stack.enter_async_context(AsyncClient(topology, max_retries=0))
