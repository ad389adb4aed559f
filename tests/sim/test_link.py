"""Links in virtual time: whose messages wait for whose."""

import pytest

from ruyi_flow.sim.link import Direction
from ruyi_flow.sim.times import VirtualTime


def _arrivals(*messages: tuple[float, int, int], shared: bool) -> list[float]:
    """When messages are there, each sent at a time, with its bytes, by a flow, over 1,000 bytes a second."""
    time = VirtualTime()
    link, came = Direction(time, 0.5, bytes_per_s=1000.0, shared=shared), [0.0] * len(messages)

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
