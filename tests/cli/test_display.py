"""Tables and lines about an answer."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from ruyi_flow.cli.display import (
    fallback_note,
    stats_table,
    status_table,
    status_tables,
    summary_line,
    token_summary,
    token_table,
)
from ruyi_flow.config.topology import Topology
from ruyi_flow.errors import NodeError
from ruyi_flow.testing import cut_topology
from ruyi_flow.types import FinishReason, Hop, NodeStatus, Reason, Stats, Token


@pytest.fixture
def topology(tiny: Path) -> Topology:
    """Nodes n0 and n1, the latter in the tier cloud."""
    made = cut_topology(tiny, [[2], [4, 6]])
    return made.model_copy(update={"nodes": (made.nodes[0], made.nodes[1].model_copy(update={"tier": "cloud"}))})


def token(node: str, reason: Reason = Reason.CONFIDENT, confidence: float = 0.5, text: str = "x") -> Token:
    return Token(id=1, text=text, exit=2, node=node, confidence=confidence, reason=reason)


NOTES = {
    Reason.CONFIDENT: "",
    Reason.FIXED: "",
    Reason.DEEPEST: "",
    Reason.LIMIT: "the operator of a node allows no deeper exit (limits.deepest)",
    Reason.BUDGET: "it had used up its bytes per minute (limits.bytes_up_per_minute)",
    Reason.UNREACHABLE: "the next node, cloud (n1), was unreachable or full (fallback)",
}


@pytest.mark.parametrize("reason", Reason)
def test_what_no_deeper_node_could_be_asked_for_is_said_with_the_reason(topology: Topology, reason: Reason) -> None:
    answer = [token("n0"), token("n0", reason), token("n0", reason), token("n1", Reason.DEEPEST)]
    why = NOTES[reason]
    assert fallback_note(topology, answer) == (why and f"2 of 4 tokens were decided by n0 because {why}.")
    one = fallback_note(topology, answer[1:2])
    assert one == (why and f"1 of 1 token was decided by n0 because {why}.")


def test_several_reasons_are_several_sentences_of_one_line(topology: Topology) -> None:
    answer = [token("n0", Reason.UNREACHABLE), token("n0", Reason.BUDGET), token("elsewhere", Reason.UNREACHABLE)]
    note = fallback_note(topology, answer)
    assert note.count(" of 3 tokens was decided by ") == 3 and "\n" not in note
    assert note.endswith("by elsewhere because the next node was unreachable or full (fallback).")


def test_the_summary_of_tokens_has_the_nodes_from_shallow_to_deep(topology: Topology) -> None:
    answer = [token("n1", confidence=0.25), token("n0", confidence=1.0), token("n1", confidence=0.5)]
    assert token_summary(topology, answer) == (
        "3 tokens: n0 decided 1 (mean confidence 1.00), cloud (n1) decided 2 (mean confidence 0.38)"
    )


def stats(nodes: int) -> Stats:
    hops = tuple(Hop(f"node-{i}", 1.5, 0.2, 12.25, 1500, 123_456, 123_456_789, 12_345_678) for i in range(nodes))
    return Stats(10, 100, 0.5, 2.0, 77, 0, 0, 1, hops)


def shown(renderable: object, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_the_table_of_statistics_fits_into_a_terminal_of_80_columns() -> None:
    for width, nodes in ((60, 2), (80, 3)):
        lines = shown(stats_table(stats(nodes)), width)
        assert "…" not in lines and lines.count("123,456,789") == nodes
        for name in ("compute, ms/token", "queue, ms/token", "link, ms/token", "positions received", "bytes returned"):
            assert lines.count(name) == 1, lines
        assert lines.count("15.00") == nodes  # 1.5 s over 100 tokens


def test_the_table_of_states_fits_into_a_terminal_of_80_columns() -> None:
    serving = NodeStatus(
        *("device", "device", "serving", "abc", (5, 11), 0, 11, 77_900_000, 212_000_000, 538_000_000, "bfloat16"),
        *("cpu", 16, 16, 3, 16000, 16384, 60.0, "cloud", "idle", 1),
    )
    lines = shown(status_table({"device": serving, "edge": serving, "cloud": NodeError("it is down")}), 80)
    assert "…" not in lines and lines.count("cloud: not connected") == 2 and lines.count("down") == 1
    assert lines.count("16/16 + 3 waiting") == 2 and lines.count("16000/16384") == 2 and lines.count("device (") == 0
    assert "cloud: lost" in shown(status_table({"device": replace(serving, next_state="shutdown")}), 80)


def test_the_states_of_many_replicas_are_several_tables_with_their_addresses() -> None:
    serving = NodeStatus(
        *("cloud", "cloud", "serving", "abc", (29,), 23, 29, 53_000_000, 106_000_000, 407_000_000, "bfloat16"),
        *("cpu", 1, 16, 0, 128, 16384, 60.0, "", "", 1),
    )
    names = [f"cloud/{i}" for i in range(1, 7)]
    answers = {name: serving if i % 2 else NodeError("down") for i, name in enumerate(names)}
    addresses = {name: f"192.168.10.{i}:7103" for i, name in enumerate(names, 13)}
    lines = shown(status_tables(answers, addresses), 110)
    assert "…" not in lines and lines.count("address") == 2 and lines.count("next node") == 2
    for name, address in addresses.items():
        assert lines.count(f" {name} ") == lines.count(f" {address} ") == 1  # the tier is the name of the node
    assert lines.count("down") == 3 and lines.count("128/16384") == 3
    assert "address" not in shown(status_tables(answers), 110)


def test_the_table_of_tokens_cuts_only_texts(topology: Topology) -> None:
    lines = shown(token_table(topology, [token("n1", Reason.UNREACHABLE, text="a" * 30)], None), 56)
    assert "…" not in lines and "confidence" in lines and "unreachable" in lines and "cloud (n1)" in lines


def test_the_token_that_ends_an_answer_has_a_name_in_the_table(topology: Topology) -> None:
    answer = [token("n0", text=""), token("n1", text="")]
    lines = shown(token_table(topology, answer, FinishReason.EOS), 80).splitlines()
    assert [("''" in line, "<end>" in line) for line in lines[3:5]] == [(True, False), (False, True)]
    for tokens, reason in ((answer, FinishReason.LENGTH), (answer, None), ([token("n0")], FinishReason.EOS)):
        assert "<end>" not in shown(token_table(topology, tokens, reason), 80)


def test_an_answer_that_was_cut_off_says_by_what() -> None:
    ended = {
        (FinishReason.EOS, 100): "",
        (FinishReason.LENGTH, 100): " · ended at --max-new-tokens 100",
        (FinishReason.LENGTH, 300): " · ended because the context is full",
    }
    for (reason, limit), said in ended.items():
        assert summary_line(stats(1), reason, limit) == stats(1).summary + said


def test_the_seed_is_shown_when_tokens_were_sampled() -> None:
    assert "seed" not in replace(stats(1), seed=None).summary
    assert stats(1).summary.endswith("1 escalation · 123,456,789 bytes up · seed 77")
