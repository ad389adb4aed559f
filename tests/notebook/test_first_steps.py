"""The notebook of the docs and a client's life in a notebook, with a real kernel and real nodes."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

from ruyi_flow.testing import Cluster
from tests.conftest import until, write_topology

DOCS = Path(__file__).parents[2] / "docs"
NOTEBOOK, GUIDE = DOCS / "notebooks" / "first-steps.ipynb", DOCS / "guides" / "notebook.md"

pytestmark = pytest.mark.timeout(240)  # a kernel starts in seconds, and a busy machine needs more of them


@pytest.fixture
def file(nodes: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The topology file of running nodes, which the notebook finds by its variable."""
    path = write_topology(nodes.topology, tmp_path / "topology.yaml")
    monkeypatch.setenv("RUYI_FLOW_TOPOLOGY", str(path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # the debugger's warning would be on standard error
    return path


async def test_the_notebook_of_the_docs_runs(file: Path) -> None:
    notebook: Any = nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit it without outputs"
    await NotebookClient(notebook, timeout=200, kernel_name="python3").async_execute()
    shown: list[str] = []
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            assert output.get("name") != "stderr", output
            shown.append(output.get("data", {}).get("text/html", ""))
    coloured = [html for html in shown if html]
    assert len(coloured) == 3, "the reply, the stream's reply, the exact reply"
    for html in coloured:
        assert '<span style="background:#' in html and "n0 " in html and "script" not in html


# ---- A client in a kernel ----


@dataclass
class Kernel:
    """A kernel that runs cells."""

    manager: AsyncKernelManager
    client: AsyncKernelClient
    stderr: Path
    running: asyncio.Task[Any] | None = None
    outputs: list[dict[str, Any]] = field(default_factory=list)

    async def run(self, code: str) -> dict[str, Any]:
        """Run a cell to its end, and return what it printed, its result, and its error."""
        self.outputs.clear()
        reply = await self.client.execute_interactive(
            code, timeout=120, output_hook=lambda message: self.outputs.append(message["content"])
        )
        text = "".join(str(output.get("text", "")) for output in self.outputs)
        data = [output["data"] for output in self.outputs if "data" in output]
        return {"text": text, "data": data, "error": reply["content"].get("ename")}


@asynccontextmanager
async def kernel(stderr: Path) -> AsyncIterator[Kernel]:
    """Start a kernel, and shut it down as a notebook's server does."""
    manager = AsyncKernelManager(kernel_name="python3", transport="ipc")  # TCP would be a warning on standard error
    with stderr.open("w") as file:
        await manager.start_kernel(stderr=file)
        client = manager.client()
        client.start_channels()
        await client.wait_for_ready(timeout=120)
        yield Kernel(manager, client, stderr)
        await manager.shutdown_kernel()  # asks it to end, and kills it only after a while
        client.stop_channels()


START = """
import os
from ruyi_flow import AsyncClient, Client
client = Client(os.environ["RUYI_FLOW_TOPOLOGY"])
SHORT = {"max_new_tokens": 3, "eos_token_ids": ()}
LONG = {"max_new_tokens": 450, "eos_token_ids": (), "draft": 0}
"""


async def test_a_client_lives_from_cell_to_cell(file: Path, nodes: Cluster, tmp_path: Path) -> None:
    async with kernel(tmp_path / "stderr") as cells:
        await cells.run(START)
        assert (await cells.run("print(len(client.generate('hi', **SHORT).tokens))"))["text"] == "3\n"
        shown = await cells.run("client.generate('hi', **SHORT)")
        assert "background:#" in shown["data"][0]["text/html"] and "Reply(" in shown["data"][0]["text/plain"]
        code = "other = AsyncClient(client.topology)\nprint(len((await other.generate('hi', **SHORT)).tokens))"
        assert (await cells.run(code))["text"] == "3\n"
        again = "print(len((await other.generate('hi', **SHORT)).tokens))\nawait other.close()"
        assert (await cells.run(again))["text"] == "3\n", "all cells share one event loop"
        found = await completions(cells, "client.generate('hi', max_n")
        assert "max_new_tokens=" in found
        await cells.run("stream = client.stream('hi', **LONG)\nnext(stream)")
    assert (tmp_path / "stderr").read_text() == "", "the kernel ended in the middle of a stream without a trace"
    await nodes.settle()


async def test_the_examples_of_the_guide_run(file: Path, tmp_path: Path) -> None:
    examples = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
    async with kernel(tmp_path / "stderr") as cells:
        for code in [*examples, "await ask_both()"]:
            done = await cells.run(code.replace('"local"', repr(str(file))))
            assert done["error"] is None, done
        assert done["text"] == "[8, 8]\n" or done["text"].startswith("[")
    assert (tmp_path / "stderr").read_text() == ""


async def completions(cells: Kernel, code: str) -> list[str]:
    reply = await cells.client.complete(code, len(code), reply=True, timeout=60)
    return list(reply["content"]["matches"])


async def test_an_interrupt_ends_the_answer_and_nothing_else(file: Path, nodes: Cluster, tmp_path: Path) -> None:
    async with kernel(tmp_path / "stderr") as cells:
        await cells.run(START)
        for call in (
            "while True:\n for token in client.stream('hi', **LONG): print('begun', flush=True)",
            "while True: print('begun', flush=True); client.generate('hi', **LONG)",
        ):
            answer = asyncio.create_task(cells.run(call))
            await until(lambda: any("begun" in str(output.get("text")) for output in cells.outputs))
            await cells.manager.interrupt_kernel()
            assert (await answer)["error"] == "KeyboardInterrupt"
            await nodes.settle(30)
            assert (await cells.run("print(len(client.generate('hi', **SHORT).tokens))"))["text"] == "3\n"
    assert (tmp_path / "stderr").read_text() == ""


async def test_a_kernel_that_restarts_leaves_the_nodes_as_they_are(file: Path, nodes: Cluster, tmp_path: Path) -> None:
    async with kernel(tmp_path / "stderr") as cells:
        for _ in range(2):
            await cells.run(START)
            await cells.run("stream = client.stream('hi', **LONG)\nnext(stream)")
            await cells.manager.restart_kernel()
            await cells.client.wait_for_ready(timeout=120)
            await nodes.settle(30)
        await cells.run(START)
        assert (await cells.run("print(len(client.generate('hi', **SHORT).tokens))"))["text"] == "3\n"
    assert (tmp_path / "stderr").read_text() == ""
