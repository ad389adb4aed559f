"""/health says that the server is alive, /ready that every node serves or which does not, /metrics what it counts.

A node serves while one of its replicas does.
"""

from __future__ import annotations

import asyncio

from starlette.responses import Response

from ruyi_flow.config.replicas import node_of
from ruyi_flow.http.asking import Site
from ruyi_flow.http.events import JsonResponse
from ruyi_flow.telemetry.exposition import make_registry, node_metrics, page, server_metrics

__all__ = ["Health"]

_FRESH_S = 1.0
"""Seconds for which the nodes' states are taken from the last time they were asked."""


class Health:
    """Answers those who watch the server.

    Args:
        site: the server's parts.
    """

    def __init__(self, site: Site) -> None:
        self._site = site
        self.draining = False
        """Whether the server takes no new requests."""
        self._asking: asyncio.Task[dict[str, str]] | None = None
        self._asked_at = 0.0
        usage, engine = site.usage, site.entry.engine
        mine = server_metrics(usage.counters, lambda: usage.running)
        self._registry = make_registry(
            mine, *([] if engine is None else [node_metrics(engine.counters, engine.status)])
        )

    async def health(self) -> JsonResponse:
        """Say that the server is alive."""
        return JsonResponse({"status": "ok"})

    def metrics(self, accept: str) -> Response:
        """Return the server's metrics, and those of a node that runs in its process."""
        body, content_type = page(self._registry, accept)
        return Response(body, headers={"content-type": content_type})

    async def ready(self) -> JsonResponse:
        """Say whether at least one replica of every node of the topology serves."""
        if self.draining:
            return JsonResponse({"status": "draining"}, status_code=503)
        states = await self._states()
        serving = {node_of(name) for name, state in states.items() if state == "serving"}
        if serving == {node_of(name) for name in states}:
            return JsonResponse({"status": "ready", "nodes": states})
        return JsonResponse({"status": "not ready", "nodes": states}, status_code=503, headers={"retry-after": "1"})

    async def _states(self) -> dict[str, str]:
        """Return the nodes' states; everyone who asks at the same time shares one question."""
        now = asyncio.get_running_loop().time()
        if self._asking is None or (self._asking.done() and now - self._asked_at > _FRESH_S):
            self._asking, self._asked_at = asyncio.create_task(self._site.entry.states()), now
        return await asyncio.shield(self._asking)
