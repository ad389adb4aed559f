"""Try clients in an environment of their own, against real daemons: LiteLLM, and curl.

    python -m tests.http.clients        what CI runs, as `make client-trial`

LiteLLM brings 30 packages that this project does not need, so they stay out of its environment. The trial ends with an
AssertionError at the first thing that is wrong. The last line is one JSON object.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import yaml

from ruyi_flow import Client, __version__
from ruyi_flow.testing import cut_topology, free_ports, tiny_family
from tests.conftest import write_topology
from tests.families import MIN_VOCAB, add_tokenizer
from tests.http.clients.guide import ADDRESS, sections
from tests.http.clients.served import http_server
from tests.install.environment import Environment

LITELLM = "litellm>=1.110"

START_S = 90.0
"""Seconds in which three daemons must serve."""


def main() -> None:
    """Run the trial."""
    began = time.monotonic()
    with TemporaryDirectory(prefix="ruyi-flow-clients-") as name:
        folder = Path(name)
        env = Environment(folder / "litellm", Path(sys.executable), folder / "wheels")
        env.variables["PIP_NO_COMPILE"] = "1"  # thousands of files, of which few are imported
        installed_s = env.install(LITELLM)
        file = small_topology(folder)
        with http_server("up", "--topology", str(file), "--serve") as (url, lines, process):
            wait_until_ready(url, lines)
            given = {
                "base_url": f"{url}/v1",
                "model": "small",
                "snippet": guides_snippet(url),
                "answers": expected(file),
                "node": "n2",
                "node_pid": node_process(process.pid, "n2"),
            }
            trial = str(Path(__file__).with_name("litellm_trial.py"))
            said = env.run("python", trial, json.dumps(given), timeout_s=120)
            [version] = re.findall(r"^litellm ([\d.]+)$", said, re.MULTILINE)
            curl_a_stream(url)
    figures = {
        "litellm": version,
        "ruyi_flow": __version__,
        "install_s": round(installed_s, 1),
        "all_s": round(time.monotonic() - began, 1),
    }
    print(json.dumps({"clients": figures}))


def small_topology(folder: Path) -> Path:
    """Write a tiny family and a topology of three nodes that run it; return the topology's file."""
    family = add_tokenizer(
        tiny_family(folder / "small", vocab_size=MIN_VOCAB, eos_token_id=258, max_position_embeddings=100_000)
    )
    limits = {"max_positions": 400_000, "grace_s": 1}
    file = write_topology(cut_topology(family, [[2], [4], [6]], limits=limits, recover_s=0), folder / "topology.yaml")
    topology = yaml.safe_load(file.read_text())
    for node, port in zip(topology["nodes"], free_ports(len(topology["nodes"])), strict=True):
        node["address"] = f"127.0.0.1:{port}"
    file.write_text(yaml.safe_dump(topology))
    return file


def guides_snippet(url: str) -> str:
    """Return what the guide to clients shows of LiteLLM, for this server and its family."""
    [code] = sections("python")["LiteLLM"]
    return code.replace(ADDRESS, url).replace("smollm2", "small")


def expected(file: Path) -> dict[str, str]:
    """Return the answers of the SDK, which asks the same nodes."""
    options: dict[str, Any] = {"max_new_tokens": 16}
    with Client(file) as client:
        answers = {text: client.generate(text, **options).text for text in ("hi", "one", "two", "three")}
        assert len(set(answers.values())) > 1
        return answers | {"raw hello": client.generate("hello", raw=True, **options).text}


def wait_until_ready(url: str, lines: list[str]) -> None:
    """Wait until every node serves, as a script would: with curl."""
    assert shutil.which("curl"), "this trial needs curl"
    deadline = time.monotonic() + START_S
    while curl("--fail", f"{url}/ready").returncode:
        assert time.monotonic() < deadline, "\n".join(lines)
        time.sleep(0.5)


def node_process(parent: int, name: str) -> int:
    """Return the process id of a node's daemon."""
    found = [child for child in psutil.Process(parent).children(recursive=True) if name in child.cmdline()]
    assert found, f"no process of node {name}"
    return found[0].pid


def curl(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run curl."""
    command = ["curl", "--silent", "--noproxy", "*", "--max-time", "30", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def curl_a_stream(url: str) -> None:
    """Stream an answer with curl."""
    body = {"model": "small", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "stream": True}
    said = curl("-N", f"{url}/v1/chat/completions", "-d", json.dumps(body))
    assert said.returncode == 0 and said.stdout.endswith("data: [DONE]\n\n"), said


if __name__ == "__main__":
    main()
