"""A server of the tiny family on three nodes, and clients of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from ruyi_flow.http.serving import Listening, serve
from ruyi_flow.testing import Cluster, cluster, cut_topology

FAMILY = "spoken"


@pytest.fixture
async def three(spoken: Path) -> AsyncIterator[Cluster]:
    """Three nodes of the tiny family that has a tokenizer."""
    async with cluster(cut_topology(spoken, [[2], [4], [6]])) as running:
        yield running
        await running.settle()


@pytest.fixture
async def server(three: Cluster) -> AsyncIterator[Listening]:
    """An HTTP server in front of the three nodes."""
    async with serve(three.topology, port=0, grace_s=1) as listening:
        yield listening


@asynccontextmanager
async def client_of(listening: Listening) -> AsyncIterator[httpx.AsyncClient]:
    """Connect to a server."""
    async with httpx.AsyncClient(base_url=listening.url, timeout=20, trust_env=False) as client:
        yield client


@pytest.fixture
async def http(server: Listening) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the server."""
    async with client_of(server) as client:
        yield client


def chat(content: Any = "hi", **fields: Any) -> dict[str, Any]:
    """Make the body of a chat request that is greedy, short and never ends by itself."""
    defaults = {"model": FAMILY, "temperature": 0, "max_tokens": 8, "ignore_eos": True}
    return {**defaults, "messages": [{"role": "user", "content": content}], **fields}
