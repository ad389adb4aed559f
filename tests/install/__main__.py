"""Try the package as a user gets it: wheels, installed with pip into empty environments outside of the checkout.

    python -m tests.install                                  what CI runs
    python -m tests.install --download-torch                 the extra `node` with the index's torch, on every Python
    python -m tests.install --python PYTHON --torch FOLDER   on this Python, with the torch in that site-packages

Every trial ends with an AssertionError at the first thing that is wrong. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ruyi_flow import __version__
from ruyi_flow.testing import free_ports
from tests.install.environment import Environment, build_wheels, find_pythons, link_torch, lowest_versions

NOT_PLAIN = ("torch", "transformers", "accelerate", "gguf", "safetensors", "tokenizers", "huggingface_hub")
"""Distributions that a plain install must not have."""

NEEDS_NODE = {
    "demo": "node",
    "up": "node",
    "pull smollm2": "node",
    "node device": "node",
    "shard --out shards": "node",
    "trace p.jsonl --family smollm2": "node",
    "explain --prompt x": "node",
    "profile smollm2": "node",
    "train recipe.yaml": "train",
    "eval --family smollm2": "eval",
    "bench decode": "bench",
}
"""Commands that a plain install cannot run, and the extra that each names."""

TORCH_BYTES = 15e9
"""Free disk that installing PyPI's torch takes while pip unpacks it."""

ASK = """
from ruyi_flow import Client
with Client("topology.yaml") as client:
    reply = client.generate("Why is the sky blue?", max_new_tokens=8)
assert len(reply.tokens) == 8 and reply.text, reply
"""


def try_plain(env: Environment, *, pins: Sequence[str]) -> dict[str, Any]:
    """Try the package without extras: the SDK, the client's commands and the simulator."""
    installed_s = env.install(f"ruyi-flow=={__version__}", pins)
    sizes = env.sizes()
    there = {name.lower().replace("-", "_") for name in sizes}
    assert not there & {*NOT_PLAIN}, there
    assert env.run("ruyi-flow", "--version") == f"ruyi-flow {__version__}\n"
    shown = env.run("ruyi-flow", "--help")
    assert all(f"│ {command} " in shown for command in ("demo", "init", "generate", "simulate", "plan"))
    assert "written: topology.yaml, policies/smollm2-5-percent.yaml" in env.run("ruyi-flow", "init")
    use_free_ports(env.here / "topology.yaml")
    assert '"device"' in env.run("ruyi-flow", "status", "--json", status=1)
    assert '"laptop"' in env.run("ruyi-flow", "status", "--json", "--topology", "two", status=1)
    said = env.run("ruyi-flow", "simulate", "city", "--set", "load.duration_s=60", "--json")
    assert json.loads(said)["requests"] > 0 and (env.here / "runs/sim/city/report.html").exists()
    grid = ("--grid", "policy.threshold=0.6,0.9", "--set", "load.requests=20", "--repeat", "1")
    assert "pareto.csv" in env.run("ruyi-flow", "sweep", "factory", *grid)
    env.run(
        "python", "-c", "from ruyi_flow import AsyncClient, Client, Topology; Client('local'); Topology.load('two')"
    )
    env.run("python", "-c", "import ruyi_flow.cli.commands")
    for command, extra in NEEDS_NODE.items():
        said = env.run("ruyi-flow", *command.split(), status=2)
        needs = rf"error: ruyi-flow {command.split()[0]} needs [\w -]+, which is not installed: "
        assert re.fullmatch(needs + rf"pip install 'ruyi-flow\[{extra}\]'\n", said), said
    said = env.run("python", "-c", "from ruyi_flow import load_family", status=1)
    assert said.endswith("load_family needs PyTorch, which is not installed: pip install 'ruyi-flow[node]'\n"), said
    bare = env.seconds("python", "-c", "pass")
    imports = env.seconds("python", "-c", "import ruyi_flow")
    return {
        "install_s": installed_s,
        "mb": sum(sizes.values()) / 1e6,
        "sizes": sizes,
        "import_s": [imports[0] - bare[0], imports[1] - bare[1]],
        "help_s": env.seconds("ruyi-flow", "--help"),
    }


def try_node(env: Environment, *, pins: Sequence[str], torch: Path | None) -> dict[str, Any]:
    """Try the extra `node`: the demo, then nodes that a client asks.

    Args:
        env: a new environment.
        pins: constraints.
        torch: folder with torch to use. Default: pip downloads it.
    """
    if torch is not None:
        env.add_folder(torch)
    began = time.monotonic()
    installed_s = env.install(f"ruyi-flow[node]=={__version__}", pins)
    said = env.run("ruyi-flow", "demo", "--max-new-tokens", "12")
    assert (
        re.search(r"Of \d+ tokens", said) and "Paris" in said and f"fetching ruyi-flow-demo=={__version__}" in said
    ), said
    answered_s = time.monotonic() - began
    env.run("ruyi-flow", "init")
    use_free_ports(env.here / "topology.yaml")
    with env.start("ruyi-flow", "up") as nodes:
        try:
            assert nodes.stderr is not None and any("all 3 nodes serve" in line for line in nodes.stderr)
            said = env.run("ruyi-flow", "generate", "--prompt", "Hi", "--max-new-tokens", "6", "--json")
            assert len(json.loads(said)["token_ids"]) == 6
            env.run("python", "-c", ASK)
        finally:
            nodes.send_signal(signal.SIGINT)
            nodes.communicate(timeout=60)
    mb = sum(env.sizes().values()) / 1e6
    return {"install_s": installed_s, "mb": mb, "answer_s": answered_s}


def use_free_ports(topology: Path) -> None:
    """Give the nodes of the file that `init` writes ports that are free on this machine."""
    text = topology.read_text()
    for port, free in zip((7101, 7102, 7103), free_ports(3), strict=True):
        text = text.replace(f":{port}", f":{free}")
    topology.write_text(text)


def version_of(python: Path) -> str:
    """Return an interpreter's version, such as 3.11."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def say(trial: str, figures: dict[str, Any]) -> None:
    """Print what a trial measured."""
    shown = {name: value for name, value in figures.items() if name != "sizes"}
    words = (
        f"{name} {', '.join(f'{v:.3f}' for v in value)}" if isinstance(value, tuple | list) else f"{name} {value:.1f}"
        for name, value in shown.items()
    )
    print(f"{trial}: {'; '.join(words)}", flush=True)
    for name, size in list(figures.get("sizes", {}).items())[:12]:
        print(f"    {size / 1e6:7.1f} MB  {name}", flush=True)


def main() -> None:
    """Run the trials."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, action="append", help="interpreter to use; may be repeated")
    parser.add_argument("--plain", action="store_true", help="only the package without extras")
    parser.add_argument("--download-torch", action="store_true", help="the extra `node` with the index's torch")
    parser.add_argument(
        "--torch", type=Path, help="site-packages with a torch for --python, to use instead of this one"
    )
    given = parser.parse_args()
    pythons = given.python or find_pythons()
    mine = f"{sys.version_info.major}.{sys.version_info.minor}"
    found: dict[str, Any] = {}
    with TemporaryDirectory(prefix="ruyi-flow-install-") as name:
        folder = Path(name)
        build_wheels(folder / "wheels")
        torch = folder / "torch"
        link_torch(torch)

        def trial(what: str, python: Path, versions: str) -> None:
            title = f"{what}, Python {version_of(python)}, {versions} versions"
            pins = lowest_versions(*([] if what == "plain" else ["node"])) if versions == "lowest" else []
            env = Environment(folder / "trial", python, folder / "wheels")
            linked = given.torch or (torch if version_of(python) == mine and not given.download_torch else None)
            found[title] = try_plain(env, pins=pins) if what == "plain" else try_node(env, pins=pins, torch=linked)
            say(title, found[title])
            shutil.rmtree(env.folder)

        for python in pythons:
            is_mine = version_of(python) == mine and not given.download_torch
            if python in (pythons[0], pythons[-1]) and not given.download_torch:
                trial("plain", python, "newest")
            if is_mine:  # older releases have no wheels for newer Pythons
                trial("plain", python, "lowest")
            if not given.plain and (is_mine or python == pythons[-1] or given.download_torch):
                if is_mine or given.torch or shutil.disk_usage(folder).free > TORCH_BYTES:
                    trial("node", python, "newest")
                else:
                    needed = f"{TORCH_BYTES / 1e9:.0f} GB"
                    print(f"node, Python {version_of(python)}: skipped, because torch needs {needed} of free disk")
            if not given.plain and is_mine:
                trial("node", python, "lowest")
    print(json.dumps({"install": found}))


if __name__ == "__main__":
    main()
