"""Whether to draft is decided by what rounds of either kind have cost a token."""

import pytest

from ruyi_flow.routing.drafting import Length, Pace


@pytest.mark.parametrize(("with_drafts_s", "mostly"), [(0.5, True), (2.0, False)])
def test_a_pace_prefers_the_rounds_that_cost_less_a_token(with_drafts_s: float, mostly: bool) -> None:
    pace, kinds = Pace(), []
    for _ in range(100):
        kinds.append(pace.drafts())
        pace.settled(kinds[-1], 2 * with_drafts_s if kinds[-1] else 1.0, 2 if kinds[-1] else 1)
    assert kinds[:12] == [True] * 6 + [False] * 6
    assert kinds[12:].count(mostly) == 83 and kinds[12:].count(not mostly) > 0, "the other is tried again"


def test_a_length_stops_where_a_draft_would_not_hold() -> None:
    pace = Pace()
    assert Length(pace).goes_on(0.0), "nothing is known yet"
    pace.stepped(0.01)
    pace.asked(0.09)
    sure, unsure = Length(pace), Length(pace)
    for length in (sure, unsure):
        length.stepped(0.01)
    assert sure.goes_on(0.9) and not unsure.goes_on(0.05)
