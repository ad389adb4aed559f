"""Servers that several tests of clients share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ruyi_flow import Client
from ruyi_flow.testing import Relay, cut_topology, tiny_family
from tests.families import MIN_VOCAB, add_tokenizer
from tests.http.clients.served import Served, serve_topology


@pytest.fixture(scope="module")
def served(spoken: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Three nodes and a server."""
    with serve_topology(cut_topology(spoken, [[2], [4], [6]]), tmp_path_factory.mktemp("served")) as running:
        yield running


@pytest.fixture(scope="module")
def sdk(served: Served) -> Iterator[Client]:
    """The SDK, which asks the same nodes."""
    with Client(served.cluster.topology) as client:
        yield client


@pytest.fixture(scope="session")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family with a long context, whose answers never end by themselves."""
    folder = tmp_path_factory.mktemp("endless") / "endless"
    return add_tokenizer(tiny_family(folder, vocab_size=MIN_VOCAB, eos_token_id=258, max_position_embeddings=100_000))


@pytest.fixture
def far(endless: Path, tmp_path: Path) -> Iterator[tuple[Served, Relay]]:
    """A server whose answers are long and take their time: each token crosses a slow network to the last node.

    The relay stands before the last node.
    """
    relay = Relay(delay_s=0.01)
    limits = {"max_positions": 200_000, "grace_s": 1}
    with serve_topology(
        cut_topology(endless, [[2], [4], [6]], limits=limits, recover_s=0), tmp_path, relays={"n2": relay}
    ) as running:
        yield running, relay
