"""Options and arguments that several commands share, and what they mean."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ruyi_flow.config.topology import Topology
from ruyi_flow.errors import ConfigError, RequestError
from ruyi_flow.types import Mode

__all__ = [
    "DEFAULT_TOPOLOGY",
    "DraftOption",
    "ExitOption",
    "JsonOption",
    "MaxOption",
    "MinOption",
    "ModeOption",
    "NgramOption",
    "PenaltyOption",
    "PolicyOption",
    "PromptOption",
    "RawOption",
    "SeedOption",
    "StopOption",
    "TemperatureOption",
    "ThresholdOption",
    "TimeoutOption",
    "TopKOption",
    "TopPOption",
    "TopologyOption",
    "WindowOption",
    "BackOption",
    "FallbackOption",
    "check_target",
    "integers",
    "keywords",
    "load_topology",
    "networked",
    "on_signals",
    "prompt_text",
]

DEFAULT_TOPOLOGY = Path("configs/local.yaml")

TopologyOption = Annotated[Path, typer.Option("--topology", "-t", help="Topology file (YAML).")]
PromptOption = Annotated[str, typer.Option("--prompt", "-p", help="The user's text; '-' reads standard input.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
ModeOption = Annotated[Mode | None, typer.Option(help="What decides a token; left out: the topology's policy.")]
ExitOption = Annotated[int | None, typer.Option(help="Mode fixed: the exit that decides every token.")]
ThresholdOption = Annotated[
    str | None,
    typer.Option(
        help="Modes token and cascade: the confidence (0 … 1) that early exits need: 0.8 for all, or 5=0.9,11=0.8."
    ),
]
PolicyOption = Annotated[
    Path | None, typer.Option("--policy", help="File of ruyi-flow calibrate: its mode and thresholds.")
]
WindowOption = Annotated[
    int | None, typer.Option(help="Mode cascade: tokens over which confidence is averaged; 8 when left out.")
]
BackOption = Annotated[
    float | None, typer.Option(help="Mode cascade: mean confidence at which a shallower exit decides again; never.")
]
FallbackOption = Annotated[
    bool | None,
    typer.Option(
        "--fallback", help="When a node cannot be reached, let the one before it decide the rest instead of failing."
    ),
]
DraftOption = Annotated[
    int | None, typer.Option(help="Tokens drafted past an unsure position before it is asked deeper; 0 asks at once.")
]
MaxOption = Annotated[int, typer.Option(min=1, help="The answer ends after this many tokens at the latest.")]
MinOption = Annotated[int, typer.Option(help="No end of sequence before this many tokens.")]
TemperatureOption = Annotated[float, typer.Option(help="0 is greedy.")]
TopKOption = Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")]
TopPOption = Annotated[float, typer.Option(help="Keep the likeliest tokens with this much probability.")]
PenaltyOption = Annotated[float, typer.Option(help="Above 1 discourages tokens that are there already.")]
NgramOption = Annotated[int, typer.Option(help="Never repeat an n-gram of this size; 0 is off.")]
StopOption = Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")]
SeedOption = Annotated[
    int | None, typer.Option(help="Of the sampling noise; left out: a new one, shown in the figures.")
]
RawOption = Annotated[bool, typer.Option("--raw", help="Send the text as it is, without the chat template.")]
TimeoutOption = Annotated[float, typer.Option(help="Deadline of the whole answer, in seconds.")]


def keywords(given: dict[str, Any]) -> dict[str, Any]:
    """A command's arguments as keywords of `Client.generate`."""
    sampling = ("max_new_tokens", "min_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty")
    names = (
        *sampling,
        "no_repeat_ngram_size",
        "seed",
        "raw",
        "mode",
        "exit",
        "policy",
        "draft",
        "window",
        "back",
        "fallback",
    )
    options = {name: given[name] for name in names if given.get(name) is not None}
    if given.get("stop"):
        options["stop"] = tuple(given["stop"])
    if (threshold := given["threshold"]) is not None:
        try:
            if "=" in threshold:
                pairs = [(int(p), float(value)) for p, value in (pair.split("=") for pair in threshold.split(","))]
                options["thresholds"] = dict(pairs)
                if len(options["thresholds"]) < len(pairs):
                    raise RequestError(f"--threshold is {threshold!r}; it names an exit twice")
            else:
                options["threshold"] = float(threshold)
        except ValueError:
            raise RequestError(f"--threshold is {threshold!r}; write 0.8 for all exits, or 5=0.9,11=0.8") from None
    return options


def integers(text: str | None, option: str) -> tuple[int, ...] | None:
    try:
        return None if text is None else tuple(int(part) for part in text.split(","))
    except ValueError:
        raise RequestError(f"{option} is {text!r}; write whole numbers with commas, for instance 5,11,17") from None


def check_target(path: Path, option: str, *, folder: bool = False) -> None:
    """Check that a file can be written there, or files in a folder, before what takes its time.

    Raises:
        ConfigError: what is there already is something else, or nothing may be written there.
    """
    kind = "a folder" if folder else "a file"
    if path.is_dir() and not folder:
        raise ConfigError(f"{option} {path}: is a folder; name {kind}")
    inside = path if folder else path.parent
    there = next(one for one in (inside, *inside.absolute().parents) if one.exists())
    if not there.is_dir():
        raise ConfigError(f"{option} {path}: {there} is a file; name {kind}{'' if folder else ' in a folder'}")
    if not os.access(path if path.exists() else there, os.W_OK):
        raise ConfigError(f"{option} {path}: cannot be written")


def prompt_text(text: str) -> str:
    return sys.stdin.read() if text == "-" else text


def load_topology(path: Path) -> Topology:
    if path == DEFAULT_TOPOLOGY and not path.exists():
        raise ConfigError(f"{path}: no such topology file (the default); name yours with --topology FILE")
    return Topology.load(path)


def networked(path: Path) -> Topology:
    loaded = load_topology(path)
    if loaded.entry.address is None:
        raise ConfigError(
            f"{path}: its one node has no address, so it runs inside its clients and needs no daemon; "
            "add an address to run it as one"
        )
    for i, node in enumerate(loaded.nodes):
        if str(node.address).endswith(":0"):
            raise ConfigError(f"{path}: nodes.{i}.address: nobody would know which port 0 becomes; give it a number")
    return loaded


def on_signals() -> asyncio.Event:
    """An event that the first SIGINT or SIGTERM sets; the second ends the process."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(130)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    return stop
