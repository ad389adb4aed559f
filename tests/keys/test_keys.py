"""The command line makes keys, and says in words what is wrong with them; servers use them."""

import json
import os
import ssl
from pathlib import Path

import httpx
import pytest

from ruyi_flow.config.security import Security, node_identity
from ruyi_flow.config.topology import Topology
from ruyi_flow.errors import ConfigError
from ruyi_flow.http.serving import serve
from ruyi_flow.keys.authority import Authority
from ruyi_flow.testing import cluster, cut_topology
from tests.conftest import Command, write_topology


@pytest.fixture
def file(tiny: Path, tmp_path: Path) -> Path:
    """A topology with fixed ports and keys."""
    topology = cut_topology(tiny, [[2], [4, 6]])
    nodes = [n.model_copy(update={"address": f"192.0.2.{i}:7101"}) for i, n in enumerate(topology.nodes)]
    return write_topology(topology.model_copy(update={"nodes": tuple(nodes)}), tmp_path / "topology.yaml")


def keyed(file: Path, run: Command) -> Path:
    code, told, _ = run("keys", "init", str(file), "--deployment", "lab")
    assert code == 0 and "deployment: lab" in told
    with file.open("a") as out:
        out.write("security:\n  deployment: lab\n")
    return file.parent / "keys"


def states(file: Path, run: Command) -> dict[str, tuple[str, str]]:
    code, told, _ = run("keys", "check", str(file), "--json")
    found = {one["owner"]: (one["state"], one["text"]) for one in json.loads(told)}
    assert code == any(state == "wrong" for state, _ in found.values())
    return found


def test_what_init_makes_is_right_and_private(file: Path, run: Command) -> None:
    folder = keyed(file, run)
    assert {owner: state for owner, (state, _) in states(file, run).items()} == {
        "CA": "ok",
        "node n0": "ok",
        "node n1": "ok",
        "user operator": "ok",
    }
    if os.name != "nt":
        assert {key.stat().st_mode & 0o777 for key in folder.rglob("*.key")} == {0o600}
    code, _, error = run("keys", "init", str(file))
    assert code == 2 and "a new CA would end all certificates" in error


def test_check_says_what_is_wrong(file: Path, run: Command) -> None:
    folder = keyed(file, run)
    security = Topology.load(file).security
    assert security is not None
    (folder / "nodes" / "n0.key").chmod(0o644)
    for kind in ("pem", "key"):
        (folder / "nodes" / f"n1.{kind}").write_bytes((folder / "nodes" / f"n0.{kind}").read_bytes())
    Authority(security).issue_user("late", days=0)
    Authority(security).issue_user("soon", days=20)
    other = Authority.create(Security(deployment="lab", ca=folder / "other" / "ca.pem"), days=1)
    made = other.issue_user("operator", days=90)
    (folder / "users" / "operator.pem").write_bytes(made.certificate.read_bytes())
    found = states(file, run)
    assert found["node n1"][0] == "wrong" and "names n0.nodes.lab.ruyi-flow and not n1.nodes" in found["node n1"][1]
    assert found["user late"][0] == "wrong" and "it has expired on" in found["user late"][1]
    assert found["user soon"][0] == "ends soon"
    assert "of another CA" in found["user operator"][1] and "is the key of another" in found["user operator"][1]
    if os.name != "nt":
        assert "can be read by others" in found["node n0"][1]


def test_renew_makes_new_certificates_of_what_ends(file: Path, run: Command) -> None:
    folder = keyed(file, run)
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    assert "nothing is due" in run("keys", "renew", str(file), "--within", "30")[1]
    assert run("keys", "node", "n1", "-t", str(file), "--days", "10")[0] == 0
    assert run("keys", "renew", str(file), "--within", "30")[0] == 0
    changed = {path.name for path, old in before.items() if path.read_bytes() != old}
    assert changed == {"n1.pem", "n1.key"} and states(file, run)["node n1"][0] == "ok"


def test_any_name_of_a_node_is_a_name_in_dns() -> None:
    assert node_identity("cloud", "lab") == "cloud.nodes.lab.ruyi-flow"
    odd = [node_identity(name, "lab") for name in ("Cloud", "cloud_1", "cloud.1", "x-1", "a" * 80)]
    assert len(set(odd)) == 5 and all(name.startswith("x-") and len(name) < 60 for name in odd)


def test_a_node_without_keys_is_told_how_to_go_on(file: Path, run: Command) -> None:
    code, _, error = run("node", "n0", "-t", str(file), "--listen", "0.0.0.0:7191")
    assert code == 2 and "ruyi-flow keys init" in error and "--insecure" in error


async def test_the_http_server_speaks_https(spoken: Path, tmp_path: Path) -> None:
    async with (
        cluster(cut_topology(spoken, [[2], [4, 6]]), keys=tmp_path) as nodes,
        serve(nodes.topology, port=0, grace_s=1) as listening,
    ):
        assert listening.url.startswith("https://")
        context = ssl.create_default_context(cafile=tmp_path / "ca.pem")
        async with httpx.AsyncClient(base_url=listening.url, verify=context) as http:
            asked = {"model": "spoken", "prompt": "abc", "max_tokens": 4}
            answer = await http.post("/v1/completions", json=asked)
            assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] > 0
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        async with httpx.AsyncClient(base_url=listening.url, verify=context) as http:
            with pytest.raises(httpx.ConnectError):
                await http.get("/health")


def test_the_ca_needs_its_own_key(file: Path, run: Command) -> None:
    folder = keyed(file, run)
    security = Topology.load(file).security
    assert security is not None
    (folder / "ca.key").write_bytes((folder / "nodes" / "n0.key").read_bytes())
    with pytest.raises(ConfigError, match="is not the key of"):
        Authority(security)


def test_doctor_says_whether_the_keys_are_right(file: Path, run: Command) -> None:
    folder = keyed(file, run)

    def told() -> list[tuple[str, str]]:
        checks = json.loads(run("doctor", str(file), "--json")[1])
        return [(check["mark"], check["text"]) for check in checks if check["name"] == "keys"]

    [(mark, text)] = told()
    assert mark == "ok" and "node n1, user operator, are right until 20" in text
    (folder / "nodes" / "n1.pem").write_bytes((folder / "nodes" / "n0.pem").read_bytes())
    [(mark, text)] = told()
    assert mark == "failed" and text.startswith("node n1: it names n0.nodes.lab.ruyi-flow")
