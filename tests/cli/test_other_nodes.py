"""Answers of nodes that the client's topology does not have."""

import io
from pathlib import Path

from rich.console import Console

from ruyi_flow.cli.asking import describe_gain
from ruyi_flow.cli.display import node_legend, token_table, token_text
from ruyi_flow.client import AsyncClient
from ruyi_flow.config.topology import Topology
from ruyi_flow.testing import cluster, cut_topology


async def test_an_answer_of_a_node_that_the_clients_file_does_not_have_is_shown(tiny: Path) -> None:
    """A device's file may be older than the nodes that it shares with others."""
    async with cluster(cut_topology(tiny, [[2], [4], [6]])) as nodes:
        data = nodes.topology.model_dump(mode="json", by_alias=True)
        data["nodes"][2]["name"] = data["links"][1]["to"] = "renamed"
        ours = Topology.parse(data)
        async with AsyncClient(ours) as client:
            reply = await client.generate([5, 6, 7], mode="exact", max_new_tokens=4, eos_token_ids=())
    assert {token.node for token in reply.tokens} == {"n2"}
    shown = io.StringIO()
    console = Console(file=shown, width=120)
    console.print(node_legend(ours), *(token_text(ours, token) for token in reply.tokens))
    console.print(token_table(ours, reply.tokens, reply.finish_reason))
    console.print(describe_gain(ours, list(reply.tokens), reply.stats))
    assert "renamed" in shown.getvalue() and shown.getvalue().count("│ n2 ") == 4
    assert "round trips to the n2" in shown.getvalue()
