"""Programs that end with an open client, in the middle of an answer, or after a fork: no hang and no stack trace."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from ruyi_flow.config.topology import Topology
from ruyi_flow.testing import Cluster
from tests.conftest import write_topology

PROGRAM = """
import asyncio, atexit, os, sys, threading, time
from ruyi_flow import AsyncClient, Client, RuyiFlowError
FILE = sys.argv[1]
SHORT = {"max_new_tokens": 3, "eos_token_ids": ()}
LONG = {"max_new_tokens": 400, "eos_token_ids": ()}
"""

ENDS = {
    "never used": "client, other = Client(FILE), AsyncClient(FILE)\nprint('done')",
    "not closed": "client = Client(FILE)\nclient.generate('hi', **SHORT)\nprint('done')",
    "in the middle of a stream": "stream = Client(FILE).stream('hi', **LONG)\nnext(stream)\nprint('done')",
    "used by a function that runs at exit": """
client = Client(FILE)
client.status()
atexit.register(lambda: client.generate('hi', **SHORT) and print('done'))
""",
    "a daemon thread in the middle of an answer": """
client, begun = Client(FILE), threading.Event()
def work():
    for token in client.stream('hi', **LONG):
        begun.set()
threading.Thread(target=work, daemon=True).start()
begun.wait()
print('done')
""",
    "a thread that goes on when the main thread has ended": """
client = Client(FILE)
def work():
    threading.main_thread().join()
    client.generate('hi', **SHORT)
    print('done')
threading.Thread(target=work).start()
""",
    "asyncio, not closed": """
async def main():
    global client
    client = AsyncClient(FILE)
    await client.generate('hi', **SHORT)
asyncio.run(main())
print('done')
""",
    "asyncio, in the middle of a stream": """
async def main():
    global stream
    stream = AsyncClient(FILE).stream('hi', **LONG)
    await anext(stream)
asyncio.run(main())
print('done')
""",
}


async def run_program(code: str, file: Path) -> tuple[int, str, str]:
    """Run a program, while this process's event loop serves its nodes; give exit status, output and error."""
    program = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM + code, str(file), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, err = await program.communicate()
    return int(program.returncode or 0), out.decode(), err.decode()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("how", ENDS)
async def test_a_program_ends_without_a_trace(nodes: Cluster, spoken: Path, tmp_path: Path, how: str) -> None:
    alone = Topology.parse({"family": str(spoken), "nodes": [{"name": "whole", "exits": [2, 4, 6]}]})
    for topology in (nodes.topology, alone):
        file = write_topology(topology, tmp_path / "topology.yaml")
        assert await run_program(ENDS[how], file) == (0, "done\n", ""), topology.nodes


FORKED = """
client = Client(FILE)
client.generate('hi', **SHORT)
child = os.fork()
if not child:
    for use in (client, Client(FILE)):
        try:
            use.generate('hi', **SHORT)
        except RuyiFlowError as error:
            print(error, flush=True)
        use.close()
    sys.exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(len(client.generate('hi', **SHORT).tokens))
"""


async def test_a_forked_process_is_told_that_connections_do_not_survive(nodes: Cluster, tmp_path: Path) -> None:
    file = write_topology(nodes.topology, tmp_path / "topology.yaml")
    code, out, err = await run_program(FORKED, file)
    told, again, status, tokens = out.splitlines()
    assert told == again and "connections do not survive os.fork: make a client in each process" in told
    assert (code, status, tokens) == (0, "7", "3") and "Traceback" not in err


FORKED_BEFORE = """
client = Client(FILE)
child = os.fork()
print(len(client.generate('hi', **SHORT).tokens), flush=True)
if not child:
    sys.exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


async def test_a_client_that_was_not_used_before_a_fork_works_after_it(nodes: Cluster, tmp_path: Path) -> None:
    file = write_topology(nodes.topology, tmp_path / "topology.yaml")
    assert await run_program(FORKED_BEFORE, file) == (0, "3\n3\n7\n", "")
