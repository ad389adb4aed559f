"""Options that several commands share; those of an answer come from the fields of `Routing` and `SamplingParams`."""

from __future__ import annotations

import asyncio
import inspect
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from ruyi_flow.client import make_request
from ruyi_flow.config.examples import Kind, default_topology, examples, find
from ruyi_flow.config.topology import Topology
from ruyi_flow.errors import ConfigError, RequestError, RuyiFlowError
from ruyi_flow.requests import SamplingParams, field_docs, option_names
from ruyi_flow.routing.policy import Routing

__all__ = [
    "JsonOption",
    "MaxOption",
    "PromptArgument",
    "PromptOption",
    "RawOption",
    "TimeoutOption",
    "TokensOption",
    "TopologyArgument",
    "TopologyOption",
    "answer_options",
    "check_target",
    "file_or_example",
    "dashed",
    "integers",
    "is_given",
    "load_topology",
    "networked",
    "on_end_of_input",
    "on_signals",
    "parse_threshold",
    "prompt_text",
]


def file_or_example(kind: Kind) -> Callable[[Path | None], Path | None]:
    """Return the callback of an option or argument that takes a file, or the name of an example of this package."""
    return lambda named: None if named is None else find(named, kind)


def is_given(context: typer.Context, name: str) -> bool:
    """Whether a parameter has its value from the user, rather than by default."""
    source = context.get_parameter_source(name)
    return source is None or source.name != "DEFAULT"


def _topology_file(context: typer.Context, option: typer.CallbackParam, named: Path) -> Path:
    return find(named, "topology") if is_given(context, str(option.name)) else default_topology()


TopologyArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="TOPOLOGY",
        callback=file_or_example("topology"),
        help="Topology file (YAML), or the name of an example; the same as --topology.",
    ),
]
TopologyOption = Annotated[
    Path,
    typer.Option(
        "--topology",
        "-t",
        callback=_topology_file,
        help=f"Topology file (YAML), or the name of an example: {', '.join(examples('topology'))}.",
        show_default="topology.yaml in the current folder, or else local",
    ),
]
PromptArgument = Annotated[
    str | None,
    typer.Argument(metavar="PROMPT", show_default=False, help="The user's text; '-' reads standard input."),
]
PromptOption = Annotated[
    str | None, typer.Option("--prompt", "-p", show_default=False, help="The same as the argument PROMPT.")
]
TokensOption = Annotated[
    bool, typer.Option("--tokens", help="Also list every token with the node that decided it, and why.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON.")]
MaxOption = Annotated[int, typer.Option(min=1, help="End the answer after at most this many new tokens.")]
RawOption = Annotated[bool, typer.Option("--raw", help="Send the text as it is, without the chat template.")]
TimeoutOption = Annotated[float, typer.Option(help="Seconds that the answer may take.")]

_THRESHOLD_HELP = (
    "Modes token, which this implies, and cascade: confidence (0 … 1) that early exits need to decide: 0.8 for all, or "
    "5=0.9,11=0.8; an exit that is not named never decides."
)
_POLICY_HELP = (
    "Policy file of ruyi-flow calibrate, which sets the mode and its thresholds, or the example smollm2-5-percent."
)
_PANELS: dict[type, str] = {Routing: "Routing (default: the topology's policy)", SamplingParams: "Sampling"}


def answer_options(
    *, sampling: Iterable[str] | None = None, skip: Iterable[str] = (), **defaults: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add the options of an answer to a command, which receives those that were given as `options`.

    Args:
        sampling: names of the sampling options to add. Default: all.
        skip: names of sampling options not to add.
        defaults: values of options that are sent when the user gives none.
    """
    parameters = [
        *_parameters(Routing, skip=("threshold", "thresholds", "start", "scale", "family")),
        _parameter("threshold", str, _THRESHOLD_HELP, _PANELS[Routing]),
        _parameter("policy", Path, _POLICY_HELP, _PANELS[Routing]),
        *_parameters(SamplingParams, only=sampling, skip=skip, defaults=asdict(SamplingParams()) | defaults),
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.name != "options"]

        def run(**given: Any) -> None:
            rest = {p.name: given[p.name] for p in own}
            options = {p.name: given[p.name] for p in parameters if given[p.name] not in (None, [])}
            if (threshold := options.pop("threshold", None)) is not None:
                options |= parse_threshold(threshold, "--threshold")
            if "stop" in options:
                options["stop"] = tuple(options["stop"])
            options = defaults | options
            try:
                make_request("", options)  # before anything is loaded or asked
                command(**rest, options=options)
            except RuyiFlowError as error:
                error.args = (dashed(error.message), *error.args[1:])
                raise

        added = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*own, *parameters)]
        run.__signature__ = signature.replace(parameters=added)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in added}
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


def _parameters(
    kind: type,
    *,
    only: Iterable[str] | None = None,
    skip: Iterable[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> list[inspect.Parameter]:
    """Return a command-line option for each field of a dataclass, with the field's docstring as its help."""
    hints, docs = get_type_hints(kind), field_docs(kind)
    names = [f.name for f in fields(kind) if f.name not in skip and (only is None or f.name in set(only))]
    made = []
    for name in names:
        value = None if defaults is None else defaults[name]
        text = docs[name] + ("" if value in (None, ()) else f" Default: {value:g}.")
        made.append(_parameter(name, _option_type(hints[name]), text, _PANELS[kind]))
    return made


def _parameter(name: str, kind: Any, text: str, panel: str) -> inspect.Parameter:
    flag = [f"--{name.replace('_', '-')}"] if kind is bool else []  # without a --no- twin
    option = typer.Option(*flag, help=text, show_default=False, rich_help_panel=panel)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _option_type(hint: Any) -> Any:
    """Return the type of a command-line option for a field: a tuple becomes a list, and an optional type its own."""
    choices = [kind for kind in get_args(hint) if kind is not type(None)] if type(None) in get_args(hint) else [hint]
    kind = choices[0]
    return list[get_args(kind)[0]] if getattr(kind, "__origin__", None) is tuple else kind  # type: ignore[misc]


def dashed(message: str) -> str:
    """Return an error message with the options of an answer named as they are typed: --top-k instead of top_k.

    Names that are also words of the language are options only at the start of a message, as in "exit is -1".
    """
    names = option_names() | {"policy", "timeout_s"}
    long = "|".join(name for name in names if "_" in name)
    short = "|".join(name for name in names if "_" not in name)
    for pattern in (rf"(?<![\w.-])(?:{long})(?!\w)", rf"^(?:{short})(?= (?:is|has|requires|cannot) )"):
        message = re.sub(pattern, lambda match: f"--{match[0].replace('_', '-')}", message)
    return message


def parse_threshold(text: str, option: str) -> dict[str, Any]:
    """Parse a threshold: one number for all exits, or one per exit.

    Raises:
        RequestError: it is neither; `option` names it.
    """
    try:
        if "=" not in text:
            return {"threshold": float(text)}
        pairs = [(int(p), float(value)) for p, value in (pair.split("=") for pair in text.split(","))]
    except ValueError:
        raise RequestError(f"{option} is {text!r}; write 0.8 for all exits, or 5=0.9,11=0.8") from None
    if len(dict(pairs)) < len(pairs):
        raise RequestError(f"{option} is {text!r}; it names an exit twice")
    return {"thresholds": dict(pairs)}


def integers(text: str | None, option: str) -> tuple[int, ...] | None:
    """Parse whole numbers with commas between them; None stays None.

    Raises:
        RequestError: the text is something else; `option` names it.
    """
    try:
        return None if text is None else tuple(int(part) for part in text.split(","))
    except ValueError:
        raise RequestError(f"{option} is {text!r}; write whole numbers with commas, for instance 5,11,17") from None


def check_target(path: Path, option: str, *, folder: bool = False) -> None:
    """Check that a file, or files in a folder, can be written, before a long computation starts.

    Raises:
        ConfigError: the path is of another kind, or must not be written.
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


def prompt_text(argument: str | None, option: str | None, *, default: str | None = None) -> str:
    """Return the prompt, from the argument PROMPT or the option --prompt. '-' reads standard input.

    Raises:
        RequestError: both are given; neither is, and there is no default; or standard input is no text.
    """
    if argument is not None and option is not None:
        raise RequestError("the prompt is given twice, as the argument PROMPT and with --prompt; give one of them")
    given = default if argument is None and option is None else argument if option is None else option
    if given is None:
        raise RequestError(
            'no prompt is given; write it after the command, in quotation marks: "What is rain?"; '
            "'-' reads it from standard input"
        )
    try:
        return sys.stdin.read() if given == "-" else given
    except UnicodeDecodeError as error:
        raise RequestError(f"the prompt on standard input is not text in {error.encoding}: {error.reason}") from None


def load_topology(path: Path) -> Topology:
    """Load a topology file.

    Raises:
        ConfigError: the file is missing or wrong.
    """
    return Topology.load(path)


def networked(path: Path) -> Topology:
    """Load a topology file whose nodes run as daemons.

    Raises:
        ConfigError: the file is missing or wrong, or its node has no address.
    """
    loaded = load_topology(path)
    if loaded.entry.address is None:
        raise ConfigError(
            f"{path}: its one node has no address, so it runs inside its clients and needs no daemon; "
            "add an address to run it as one"
        )
    return loaded


def on_signals(again: Callable[[], None] = lambda: os._exit(130)) -> asyncio.Event:
    """Return an event that the first SIGINT, SIGTERM or Ctrl-Break sets.

    Args:
        again: called at every further signal. Default: the process ends at once.
    """
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            again()
        stop.set()

    def on_plain_signal(number: int, frame: object) -> None:
        if loop.is_closed():
            raise KeyboardInterrupt
        loop.call_soon_threadsafe(on_signal)

    for name in ("SIGINT", "SIGTERM", "SIGBREAK"):
        number = getattr(signal, name, None)
        if number is None:
            continue
        try:
            loop.add_signal_handler(number, on_signal)
        except NotImplementedError:  # Windows
            signal.signal(number, on_plain_signal)
    return stop


def on_end_of_input(stop: asyncio.Event) -> None:
    """Set an event when standard input ends: the process at its other end closes it, or is gone."""
    loop = asyncio.get_running_loop()

    def wait() -> None:
        while os.read(0, 1024):  # not sys.stdin, whose lock would stop the interpreter's exit
            pass
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(stop.set)

    threading.Thread(target=wait, name="input", daemon=True).start()
