"""Node processes for benches."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from ruyi_flow.client import AsyncClient
from ruyi_flow.family import store
from ruyi_flow.supervisor import supervise
from ruyi_flow.testing import Relay, free_ports
from ruyi_flow.topology import Topology

__all__ = ["daemons"]


@asynccontextmanager
async def daemons(
    cuts: list[list[int]],
    *,
    encoding: str = "bf16",
    dtype: str = "bfloat16",
    relay_to: dict[int, Relay] | None = None,
    cores: list[int] | None = None,
) -> AsyncIterator[AsyncClient]:
    """Node processes of the demo family, one thread each, and a client of them."""
    async with AsyncExitStack() as stack:
        addresses = [f"127.0.0.1:{port}" for port in free_ports(len(cuts))]
        names = [f"n{i}" for i in range(len(cuts))]
        dialled = {i: await stack.enter_async_context(relay.run(addresses[i])) for i, relay in (relay_to or {}).items()}
        data = {
            "family": store.DEMO,
            "nodes": [
                {"name": n, "address": a, "exits": e, "threads": 1, "cores": cores, "dtype": dtype}
                for n, a, e in zip(names, addresses, cuts, strict=True)
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
