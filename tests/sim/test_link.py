"""Links in virtual time: the order of messages, shared bandwidth, and outages."""

import itertools

import pytest

from ruyi_flow.sim.clock import VirtualTime
from ruyi_flow.sim.instance import Outage, merged
from ruyi_flow.sim.link import Direction, Outages


def _arrivals(*messages: tuple[float, int, int], shared: bool) -> list[float]:
    """Return when messages (second, bytes, flow) arrive over a link of 1,000 bytes per second."""
    time = VirtualTime()
    link, came = Direction(time, latency_s=0.5, bytes_per_s=1000.0, shared=shared), [0.0] * len(messages)

    async def send(i: int, at: float, count: int, flow: int) -> None:
        await time.sleep(at)
        await link.carry(count, flow=flow)
        came[i] = time.now()

    for i, message in enumerate(messages):
        time.process(send(i, *message))
    time.env.run()
    assert link.carried == sum(count for _, count, _ in messages)
    return came


def test_messages_of_one_connection_go_in_order() -> None:
    sent = ((0.0, 4000, 0), (1.0, 1000, 0), (7.0, 1000, 0))
    for shared in (False, True):
        assert _arrivals(*sent, shared=shared) == pytest.approx([4.5, 5.5, 8.5])


def test_connections_share_a_link_evenly() -> None:
    assert _arrivals((0.0, 4000, 0), (0.0, 1000, 1), shared=True) == pytest.approx([5.5, 2.5])
    assert _arrivals((0.0, 2000, 0), (0.0, 2000, 0), (0.0, 2000, 1), shared=True) == pytest.approx([4.5, 6.5, 4.5])


def test_what_is_given_up_leaves_the_link_to_the_next() -> None:
    for shared in (False, True):
        time = VirtualTime()
        link = Direction(time, latency_s=0.5, bytes_per_s=1000.0, shared=shared)
        long = time.process(link.carry(9000))
        time.env.run(until=2.0)
        long.interrupt()
        time.env.run(until=3.0)
        time.env.run(until=time.process(link.carry(1000)))
        assert time.now() == pytest.approx(4.5)


def test_outages_may_overlap() -> None:
    down = Outages([(1.0, 11.0), (2.0, 3.0), (10.0, 12.0), (12.0, 13.0), (20.0, 21.0)])
    assert down and not Outages()
    assert [down.ends(at) > at for at in (0.5, 1.0, 3.5, 11.5, 12.5, 13.0, 19.0, 20.5, 21.0)] == [
        *(False, True, True, True, True),
        *(False, False, True, False),
    ]


def test_a_nodes_outages_that_touch_are_one_of_the_first_ones_kind() -> None:
    spans = [Outage(1, 4, "hang"), Outage(2, 3), Outage(4, 6, "drain"), Outage(8, 9)]
    assert [*merged(spans)] == [Outage(1, 6, "hang"), Outage(8, 9)]
    endless = merged(Outage(10.0 * i, 10.0 * i + 1) for i in itertools.count())
    assert next(itertools.islice(endless, 5000, None)) == Outage(50_000, 50_001)
