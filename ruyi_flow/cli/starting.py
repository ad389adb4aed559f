"""The command init, which writes a topology, a scenario or a policy file to start from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, get_args

import typer

from ruyi_flow.cli.app import Panel, app
from ruyi_flow.cli.display import out, print_json
from ruyi_flow.cli.options import JsonOption, check_target
from ruyi_flow.config.examples import DEFAULT_TOPOLOGY, Kind, examples
from ruyi_flow.config.topology import Topology
from ruyi_flow.config.yaml_files import read_yaml
from ruyi_flow.errors import ConfigError, did_you_mean

__all__ = ["init"]

_EVERY = {name: kind for kind in get_args(Kind) for name in examples(kind)}
"""The kind of each example, by its name."""


@app.command(rich_help_panel=Panel.RUN)
def init(
    folder: Annotated[Path, typer.Argument(help="Folder to write to. It is created.")] = Path("."),
    example: Annotated[
        str | None,
        typer.Option("--from", help=f"Write this example, under its own name: {', '.join(_EVERY)}."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a topology file to start from: three nodes of the demo family on this machine.

    It is topology.yaml, which the other commands use in that folder when they
    are given no other, and the policy file that it names. Comments explain the
    keys that people change first.

    Example: ruyi-flow init my-nodes
    """
    if example is not None and example not in _EVERY:
        hint = did_you_mean(example, list(_EVERY))
        raise ConfigError(f"--from {example}: no such example; the examples are {', '.join(_EVERY)}{hint}")
    kind: Kind = "topology" if example is None else _EVERY[example]
    source = examples(kind)[example or "local"]
    target = folder / (DEFAULT_TOPOLOGY if example is None else source.name)
    files = {target: source} | {folder / named: source.parent / named for named in _named_by(source, kind)}
    check_target(folder, "FOLDER", folder=True)
    for file in files:
        if file.exists() and not force:
            raise ConfigError(f"{file}: exists already; name another folder, or replace it with --force")
    for file, origin in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(origin, file)
    if as_json:
        print_json({"files": [str(file) for file in files]})
        return
    out.print(f"written: {', '.join(map(str, files))}", markup=False, highlight=False, soft_wrap=True)
    for line in _next_steps(target, kind):
        out.print(line, markup=False, highlight=False, soft_wrap=True)


def _named_by(source: Path, kind: Kind) -> list[Path]:
    """Return the policy file that a topology or a scenario names, as it names it."""
    data = read_yaml(source, kind)
    policy = data.get("policy") if isinstance(data, dict) else None
    return [Path(policy["file"])] if kind != "policy" and isinstance(policy, dict) and "file" in policy else []


def _next_steps(target: Path, kind: Kind) -> list[str]:
    """Return what to do with a file, one command a line."""
    file = "" if target.name == str(DEFAULT_TOPOLOGY) else target.name
    steps, several = [], False
    if target.parent != Path("."):
        steps.append((f"cd {target.parent}", ""))
    if kind == "policy":
        steps.append((f'ruyi-flow generate --policy {file} -p "How do I make tea?"', "ask nodes that run, with it"))
    elif kind == "scenario":
        steps.append((f"ruyi-flow simulate {file}", "predict latency, traffic, energy and cost"))
    else:
        topology = Topology.load(target)
        if topology.family == "smollm2":
            steps.append(("ruyi-flow pull smollm2", "fetch the demo family, once"))
        asks = "load the family, and ask it"
        if topology.entry.address is not None:
            steps.append((" ".join(["ruyi-flow up", file]).strip(), "run its nodes on this machine"))
            asks, several = "ask them, in a second terminal", True
        named = f" -t {file}" if file else ""
        steps.append((f'ruyi-flow generate{named} -p "How do I make tea?"', asks))
    width = max(len(command) for command, _ in steps)
    lines = ["next:", *(f"  {command:{width}}  {meaning}".rstrip() for command, meaning in steps)]
    if several:
        lines.append(f"to use several machines, give each node in {target.name} its machine's address")
    return lines
