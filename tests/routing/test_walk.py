"""A walk through a block: which positions are looked at, which are asked about, and what comes of the answers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ruyi_flow.routing.policy import Judge, Policy, Routing
from ruyi_flow.routing.walk import Look, Walk
from ruyi_flow.types import Block, Decision, Mode, Reason

EXITS = (2, 4, 6)
STATES = torch.empty(0)
JUDGE = Policy.resolve(Routing(Mode.TOKEN, threshold=0.5), EXITS)
tokens = st.integers(1, 3)  # few, so that drafts often hold


def deeper(*given_tokens: int) -> list[Decision]:
    return [Decision(token, 6, 1.0, Reason.DEEPEST) for token in given_tokens]


def look(position: int, draft: int | None, token: int, sure: bool) -> Look:
    return Look(position, draft, token, 0.5, Reason.CONFIDENT if sure else None)


@st.composite
def blocks(draw: st.DrawFn) -> tuple[Block, list[tuple[int, float]]]:
    """A block whose last positions are wanted, and what a branch says about them."""
    start, ids = draw(st.integers(0, 5)), draw(st.lists(tokens, min_size=1, max_size=6))
    wanted = draw(st.integers(1, len(ids)))
    stop = start + len(ids)
    found = draw(st.lists(st.tuples(tokens, st.sampled_from([0.4, 0.6])), min_size=wanted, max_size=wanted))
    return Block(start, STATES, tuple(ids), tuple(range(stop - wanted, stop))), found


@given(blocks(), st.lists(tokens, max_size=6))
def test_a_walk_decides_a_run_of_tokens_that_drafts_agree_with(
    given_block: tuple[Block, list[tuple[int, float]]], answers: list[int]
) -> None:
    block, found = given_block
    walk = Walk.of(Judge(JUDGE, 2), block, found)
    token_at = {block.start + i: token for i, token in enumerate(block.token_ids)}
    assert walk.exit == 2
    assert [seen.position for seen in walk.looks] == list(block.wants[: len(walk.looks)])
    assert [seen.draft for seen in walk.looks] == [token_at.get(seen.position + 1) for seen in walk.looks]
    assert [(seen.token, seen.confidence) for seen in walk.looks] == found[: len(walk.looks)]
    assert [seen.reason is not None for seen in walk.looks] == [sure >= 0.5 for _, sure in found[: len(walk.looks)]]
    assert walk.undecided == [seen.position for seen in walk.looks if seen.reason is None]
    wrong = [seen.reason is not None and seen.token != seen.draft for seen in walk.looks]
    assert not any(wrong[:-1]), "what follows a confident token that contradicts its draft is void"
    assert wrong[-1] or len(walk.looks) == len(block.wants)

    decided = walk.merge(deeper(*answers))
    asked = [seen.reason is None for seen in walk.looks[: len(decided)]]
    assert [d for d, was_asked in zip(decided, asked, strict=True) if was_asked] == deeper(*answers)[: sum(asked)]
    for decision, seen in zip(decided, walk.looks, strict=False):
        if seen.reason is not None:
            assert decision == Decision(seen.token or 0, 2, seen.confidence, Reason.CONFIDENT)
    agrees = [d.token == seen.draft for d, seen in zip(decided, walk.looks, strict=False)]
    assert all(agrees[:-1])
    if len(decided) < len(walk.looks) and (not agrees or agrees[-1]):
        assert walk.looks[len(decided)].reason is None and len(answers) == sum(asked), "it ends for lack of an answer"


def test_a_branch_that_does_not_run_leaves_every_position_to_the_next_stage() -> None:
    walk = Walk.of(Judge(JUDGE, 2), Block(4, STATES, (9, 10), (4, 5)), None)
    assert walk.looks == [Look(4, 10, None, 0.0, None), Look(5, None, None, 0.0, None)] and walk.undecided == [4, 5]
    assert [d.token for d in walk.merge(deeper(10, 3))] == [10, 3]
    assert [d.token for d in walk.merge(deeper(9, 3))] == [9]


def test_a_walk_tells_its_judge_the_positions_that_a_rewind_takes_back() -> None:
    judge = Judge(Policy.resolve(Routing(Mode.CASCADE, threshold=0.5, window=1), EXITS), 2)
    Walk.of(judge, Block(7, STATES, (1, 2, 3), (7, 8)), [(2, 0.9), (3, 0.1)])
    assert judge.retired
    judge.rewind(9)
    assert judge.retired
    judge.rewind(8)
    assert not judge.retired


def test_a_walk_grows_while_it_drafts() -> None:
    walk = Walk(2)
    walk.add(look(0, 5, 5, False))
    walk.add(look(1, 6, 6, True))
    walk.add(look(2, None, 7, False))
    assert [seen.position for seen in walk.looks] == [0, 1, 2] and walk.undecided == [0, 2]
    assert [d.token for d in walk.merge(deeper(5, 8))] == [5, 6, 8]
    assert [d.token for d in walk.merge(deeper(4))] == [4]
    assert walk.merge([]) == ()


@pytest.mark.parametrize("reason", [Reason.BUDGET, Reason.UNREACHABLE])
def test_a_branch_that_decides_all_keeps_what_it_was_sure_of(reason: Reason) -> None:
    walk = Walk(2, [look(0, 5, 5, False), look(1, 6, 6, True), look(2, None, 7, False)], [0, 2])
    walk.decide_all(reason)
    assert walk.undecided == [] and [d.reason for d in walk.merge([])] == [reason, Reason.CONFIDENT, reason]
    assert [(d.token, d.exit, d.confidence) for d in walk.merge([])] == [(5, 2, 0.5), (6, 2, 0.5), (7, 2, 0.5)]


def test_a_walk_stops_at_the_first_sure_contradiction() -> None:
    block = Block(3, STATES, (8, 9, 10, 11, 12), (4, 5, 6, 7))
    walk = Walk.of(Judge(JUDGE, 2), block, [(10, 0.9), (99, 0.1), (77, 0.8), (5, 0.9)])
    assert [seen.position for seen in walk.looks] == [4, 5, 6]
    assert walk.undecided == [5]
    assert [d.token for d in walk.merge(deeper(11))] == [10, 11, 77]
    assert [d.token for d in walk.merge(deeper(44))] == [10, 44]
