"""The commands that make and check the keys of a deployment: keys init, node, user, renew, check."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError
from rich.table import Table
from rich.text import Text

from ruyi_flow.cli.app import Panel, app
from ruyi_flow.cli.display import out, print_json
from ruyi_flow.cli.options import JsonOption, TopologyArgument, TopologyOption, load_topology
from ruyi_flow.config.examples import DEFAULT_TOPOLOGY
from ruyi_flow.config.security import OPERATOR, Keys, Security
from ruyi_flow.config.topology import Topology
from ruyi_flow.config.yaml_files import explain
from ruyi_flow.errors import ConfigError
from ruyi_flow.extras import require

if TYPE_CHECKING:
    from ruyi_flow.keys.authority import Authority

__all__ = ["check", "init", "node", "renew", "user"]

keys = typer.Typer(no_args_is_help=True)
app.add_typer(
    keys,
    name="keys",
    rich_help_panel=Panel.RUN,
    help="Make and check the certificates by which nodes and users prove who they are.",
)

DaysOption = Annotated[int, typer.Option(min=1, max=3650, help="Days for which a certificate is valid.")]
_CA_DAYS = 3650


@keys.command()
def init(
    file: TopologyArgument = None,
    topology: TopologyOption = DEFAULT_TOPOLOGY,
    deployment: Annotated[
        str, typer.Option(help="Name of the deployment, where the topology does not have it yet.")
    ] = "home",
    days: DaysOption = 365,
    as_json: JsonOption = False,
) -> None:
    """Make a private CA, a certificate for each node of a topology, and one for the user "operator".

    The files go to the folder of the topology's key security.ca; without that
    section, to a folder keys beside the topology, and the lines to add to it are
    printed. Copy ca.pem and a node's two files to the node's machine, and ca.pem
    and a user's two files to where clients or ruyi-flow serve run. Keep ca.key on
    this machine: whoever has it can make certificates.

    ruyi-flow keys init topology.yaml --deployment home
    """
    path = file or topology
    loaded = load_topology(path)
    is_new = loaded.security is None
    if is_new:
        folder = path.parent / "keys"
        try:
            security = Security(deployment=deployment, ca=folder / "ca.pem")
        except ValidationError as error:
            raise ConfigError(explain(error, Security, "--deployment")) from None
        loaded = loaded.model_copy(update={"security": security})
    authority = _authority(loaded, days=_CA_DAYS)
    made = {f"node {one.name}": authority.issue_node(loaded, one.name, days=days) for one in loaded.nodes}
    from ruyi_flow.keys.authority import hosts_of

    made[f"user {OPERATOR}"] = authority.issue_user(OPERATOR, hosts_of(loaded, loaded.entry.name), days=days)
    _print(made, as_json=as_json)
    if is_new and not as_json:
        out.print(f"add these lines to {path}:\n\nsecurity:\n  deployment: {deployment}", highlight=False)


@keys.command()
def node(
    name: Annotated[str, typer.Argument(help="The node's name in the topology.")],
    topology: TopologyOption = DEFAULT_TOPOLOGY,
    days: DaysOption = 365,
    as_json: JsonOption = False,
) -> None:
    """Make a certificate for one node, for instance after its address has changed. An old one is replaced.

    ruyi-flow keys node cloud --topology topology.yaml
    """
    loaded = _with_security(topology)
    loaded.node(name)
    _print({f"node {name}": _authority(loaded).issue_node(loaded, name, days=days)}, as_json=as_json)


@keys.command()
def user(
    name: Annotated[str, typer.Argument(help="Name of a person or a program.")],
    topology: TopologyOption = DEFAULT_TOPOLOGY,
    host: Annotated[
        list[str] | None,
        typer.Option(
            show_default=False,
            help="Host name or address at which this user runs ruyi-flow serve. May be given several times.",
        ),
    ] = None,
    days: DaysOption = 365,
    as_json: JsonOption = False,
) -> None:
    """Make a certificate for a user, with which clients ask the nodes. An old one is replaced.

    The topology of that user names the two files as security.certificate and
    security.key.

    ruyi-flow keys user ann --topology topology.yaml
    """
    loaded = _with_security(topology)
    _print({f"user {name}": _authority(loaded).issue_user(name, host or (), days=days)}, as_json=as_json)


@keys.command()
def renew(
    file: TopologyArgument = None,
    topology: TopologyOption = DEFAULT_TOPOLOGY,
    within: Annotated[
        int | None, typer.Option(min=0, help="Renew only what ends within this many days. Default: everything.")
    ] = None,
    days: DaysOption = 365,
    as_json: JsonOption = False,
) -> None:
    """Make new certificates and keys, with the same names, in place of those in the folder of keys.

    Copy them to their machines. Nodes that run use them from their next
    connection on, and no connection is lost.

    ruyi-flow keys renew topology.yaml --within 30
    """
    loaded = _with_security(file or topology)
    authority = _authority(loaded)
    from ruyi_flow.keys.authority import read_certificate
    from ruyi_flow.keys.check import all_keys

    made = {}
    for owner, files in all_keys(loaded).items():
        if not files.certificate.exists():
            continue
        left = read_certificate(files.certificate).not_valid_after_utc - datetime.now(UTC)
        if within is None or left <= timedelta(days=within):
            authority.renew(files, days=days)
            made[owner] = files
    _print(made, as_json=as_json)


@keys.command()
def check(
    file: TopologyArgument = None, topology: TopologyOption = DEFAULT_TOPOLOGY, as_json: JsonOption = False
) -> None:
    """Say what is wrong with the keys that are on this machine, and when they end.

    The exit status is 1 if one is wrong.

    ruyi-flow keys check topology.yaml
    """
    loaded = _with_security(file or topology)
    from ruyi_flow.keys.check import State
    from ruyi_flow.keys.check import check as check_keys

    found = check_keys(loaded)
    if as_json:
        print_json(
            [
                {
                    "owner": one.owner,
                    "file": str(one.file),
                    "state": one.state.value,
                    "text": one.text,
                    "ends": None if one.ends is None else one.ends.isoformat(),
                }
                for one in found
            ]
        )
    else:
        styles = {State.OK: "green", State.SOON: "yellow", State.WRONG: "red", State.ELSEWHERE: "dim"}
        for one in found:
            line = Text.assemble((one.state.value, styles[one.state]), f"  {one.owner} ({one.file}): {one.text}")
            out.print(line, soft_wrap=True)
    if any(one.state is State.WRONG for one in found):
        raise typer.Exit(1)


def _with_security(path: Path) -> Topology:
    """Load a topology that has keys.

    Raises:
        ConfigError: it has none.
    """
    require("cryptography")
    loaded = load_topology(path)
    if loaded.security is None:
        raise ConfigError(f"{path}: has no section security; make keys with ruyi-flow keys init")
    return loaded


def _authority(topology: Topology, *, days: int | None = None) -> Authority:
    """Return the CA of a topology; with `days`, a new one."""
    require("cryptography")
    from ruyi_flow.keys.authority import Authority

    assert topology.security is not None
    return Authority(topology.security) if days is None else Authority.create(topology.security, days=days)


def _print(made: dict[str, Keys], *, as_json: bool) -> None:
    """Print the files that were made."""
    if as_json:
        print_json([{"owner": o, "certificate": str(k.certificate), "key": str(k.key)} for o, k in made.items()])
        return
    if not made:
        out.print("nothing is due")
        return
    table = Table("made for", "certificate", "private key (mode 0600)")
    for owner, files in made.items():
        table.add_row(owner, str(files.certificate), str(files.key))
    out.print(table)
