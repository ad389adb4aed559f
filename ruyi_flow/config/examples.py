"""The example files of this package, by name: topologies, scenarios and policy files.

An installed package has them in its own folder `configs`, a checkout beside the package.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from ruyi_flow.errors import ConfigError, did_you_mean

__all__ = ["DEFAULT_TOPOLOGY", "Kind", "default_topology", "examples", "find", "shortest"]

Kind = Literal["topology", "scenario", "policy"]

DEFAULT_TOPOLOGY = Path("topology.yaml")
"""The topology of a command or a client that names none, if there is such a file in the current folder."""

_PACKAGE = Path(__file__).parent.parent
_CONFIGS = next((folder for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if folder.is_dir()), _PACKAGE)
_FOLDERS: dict[str, Path] = {
    "topology": _CONFIGS,
    "scenario": _CONFIGS / "sim",
    "policy": _CONFIGS / "policies",
}


_ADDRESS = re.compile(r"(\w+://?)?[^/\\\s]+:\d{1,5}/?")
"""host:port, also behind http://, which a `Path` makes http:/."""


def examples(kind: Kind) -> dict[str, Path]:
    """Return the example files of a kind, by name."""
    return {file.stem: file for file in sorted(_FOLDERS[kind].glob("*.yaml"))}


def default_topology() -> Path:
    """Return the topology where none is named: the file in the current folder, or else the example `local`."""
    return DEFAULT_TOPOLOGY if DEFAULT_TOPOLOGY.exists() else find("local", "topology")


def find(named: str | Path, kind: Kind) -> Path:
    """Return the file that a path names, or the example that a plain name such as `local` names.

    A file that exists wins over an example.

    Raises:
        ConfigError: there is neither; the message lists the examples.
    """
    path, known = Path(named), examples(kind)
    try:
        if path.exists() and not (path.is_dir() and path.name in known):
            return path
    except (OSError, ValueError) as error:  # a name that is too long, a NUL
        raise ConfigError(f"{str(path)[:80]!r} cannot be the path of a {kind} file: {str(error)[:80]}") from None
    if str(named) in known:
        return known[str(named)]
    if _ADDRESS.fullmatch(str(named)):
        raise ConfigError(
            f"{named} is an address, and no {kind}; name a {kind} file (YAML) or an example: {', '.join(known)}"
        )
    if path.name == str(named) and not path.suffix:
        names = f", and no example of this name; the examples are {', '.join(known)}"
        raise ConfigError(f"{path}: no such {kind} file{names}{did_you_mean(path.name, list(known))}")
    hint = f"; the example of this package is named {path.stem!r}" if path.stem in known else ""
    raise ConfigError(f"{path}: no such {kind} file{hint}")


def shortest(path: Path, kind: Kind) -> str:
    """Return the name of an example, or the path of any other file."""
    return path.stem if path in examples(kind).values() else str(path)
