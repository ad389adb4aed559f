"""Whether to draft is decided by what rounds with and without drafts have cost per token."""

import pytest

from ruyi_flow.routing.drafting import DraftCosts, DraftLength


@pytest.mark.parametrize(("with_drafts_s", "mostly"), [(0.5, True), (2.0, False)])
def test_rounds_that_cost_less_per_token_are_preferred(with_drafts_s: float, mostly: bool) -> None:
    costs, kinds = DraftCosts(), []
    for _ in range(100):
        kinds.append(costs.next_round_drafts())
        costs.add_round(kinds[-1], 2 * with_drafts_s if kinds[-1] else 1.0, 2 if kinds[-1] else 1)
    assert kinds[:12] == [True] * 6 + [False] * 6
    assert kinds[12:].count(mostly) == 83 and kinds[12:].count(not mostly) > 0, "the other is tried again"


def test_a_round_stops_drafting_where_a_draft_would_be_rejected() -> None:
    costs = DraftCosts()
    assert DraftLength(costs).continues(0.0), "nothing is known yet"
    costs.add_step(0.01)
    costs.add_question(0.09)
    likely, unlikely = DraftLength(costs), DraftLength(costs)
    for length in (likely, unlikely):
        length.add_step(0.01)
    assert likely.continues(0.9) and not unlikely.continues(0.05)
