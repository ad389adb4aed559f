"""Draw docs/images/demo.svg from a real run of the demo; `make picture` runs this."""

from __future__ import annotations

import asyncio
import io
import re
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from ruyi_flow.cli import asking, display
from ruyi_flow.client import AsyncClient
from ruyi_flow.config.topology import Topology
from ruyi_flow.serving.supervisor import supervise

OUT = Path(__file__).parent.parent / "docs" / "images" / "demo.svg"


async def run(console: Console) -> None:
    """Ask the nodes of configs/local.yaml, and print what the demo prints with --tokens."""
    file = Path("configs/local.yaml")
    topology = Topology.load(file)
    async with supervise(file, topology, lambda name, line: None) as supervisor:
        await supervisor.start()
        async with AsyncClient(topology) as client:
            reply = await client.generate(asking.DEMO_PROMPT, max_new_tokens=48)
    console.print(f"[bold]> {asking.DEMO_PROMPT}[/bold]")
    console.print(display.node_legend(topology))
    console.print(Text().join(display.token_text(topology, token) for token in reply.tokens))
    console.print()
    console.print(display.token_table(topology, reply.tokens, reply.finish_reason))
    console.print(asking.describe_gain(topology, list(reply.tokens), reply.stats), highlight=False)


def main() -> None:
    console = Console(record=True, width=100, force_terminal=True, file=io.StringIO())
    asyncio.run(run(console))
    offline = re.sub(r"@font-face \{\{.*?\}\}\n", "", CONSOLE_SVG_FORMAT, flags=re.S)  # rich names fonts of a web host
    OUT.write_text(
        console.export_svg(title="ruyi-flow demo --tokens", theme=MONOKAI, code_format=offline, unique_id="demo")
    )


if __name__ == "__main__":
    main()
