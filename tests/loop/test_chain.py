"""The loop: every decided token is that of the shallowest sure exit given the prefix as decided, however it is cut."""

import asyncio
import itertools
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ruyi_flow.errors import CapacityError, NodeError, NodeUnavailable, RequestCancelled, WireError
from ruyi_flow.family.checkpoint import Checkpoint
from ruyi_flow.family.loading import load_slice
from ruyi_flow.local import load_family
from ruyi_flow.loop.chain import PART, Chain, decode
from ruyi_flow.loop.next_stage import NextStage, Uplink
from ruyi_flow.requests import SamplingParams
from ruyi_flow.routing.confidence import Curve, Scale, Score
from ruyi_flow.routing.drafting import DraftCosts
from ruyi_flow.routing.policy import Policy, Routing
from ruyi_flow.routing.start import Start
from ruyi_flow.runtime.sampling import Sampler
from ruyi_flow.runtime.stage import Shard, ShardSession
from ruyi_flow.runtime.worker import InlineWorker, ThreadWorker
from ruyi_flow.testing import open_session, tiny_family
from ruyi_flow.types import Block, Decision, Mode, Reason, Stage, Verdict
from tests.conftest import Oracle

EXITS = (1, 3, 4, 6, 7)
CUTS: list[list[tuple[int, ...]]] = [
    [EXITS],
    [(1,), (3, 4, 6, 7)],
    [(1, 3), (4, 6), (7,)],
    [(1,), (3,), (4,), (6,), (7,)],
]


def chained(
    session: ShardSession,
    node: str,
    make: Callable[[Policy, int], Stage] | None = None,
    kind: type[Chain] = Chain,
    costs: DraftCosts | None = None,
    **options: Any,
) -> Chain:
    """A chain of a session, whose next stage is made by `make` and has these options."""
    return kind(session, InlineWorker(), node, next_stage=NextStage(session, make, **options), costs=costs)


def always(stage: Stage) -> Callable[[Policy, int], Stage]:
    """Return what makes a next stage, where it has been made already."""
    return lambda policy, position: stage


class World:
    """A family cut in every way of CUTS, and the truth about it."""

    def __init__(self, folder: Path) -> None:
        checkpoint = Checkpoint(folder)
        self.oracle = Oracle(load_family(folder, dtype="float32"))
        self.cuts = [
            [Shard(load_slice(checkpoint, cut, dtype=torch.float32), max_positions=512, max_sessions=2) for cut in cuts]
            for cuts in CUTS
        ]

    async def run(
        self,
        cut: int,
        routing: Routing,
        params: SamplingParams,
        prompt: list[int],
        count: int,
        ahead: int = 0,
        costs: DraftCosts | None = None,
    ) -> tuple[list[Decision], int]:
        """Decided tokens and escalations, with the shards chained directly; checks every cache afterwards.

        Args:
            ahead: positions that each node may send up before they are asked for.
            costs: the entry node's.
        """
        policy = Policy.resolve(routing, EXITS)
        chain, sessions = self.open(cut, policy, params, len(prompt), len(prompt) + count, ahead, costs)
        decisions: list[Decision] = []
        escalations = 0
        async with self.closing(cut, chain, sessions):
            async for settled in decode(chain, prompt, count):
                decisions += settled.decisions
                escalations += len(settled.hops) > 1
                held = [p for s in sessions for p in s.positions[: len(s.exits)]]
                assert held == sorted(held, reverse=True), "a deeper stage never holds more than a shallower one"
                await turns()
        return decisions, escalations

    def open(
        self,
        cut: int,
        policy: Policy,
        params: SamplingParams,
        prompt_length: int,
        max_positions: int,
        ahead: int = 0,
        costs: DraftCosts | None = None,
    ) -> tuple[Chain, list[ShardSession]]:
        """The entry node's chain, whose next stages are chains too, and the sessions that they open over time."""
        pieces, sessions = self.cuts[cut], list[ShardSession]()

        def node(i: int, policy: Policy, position: int = 0) -> Chain:
            sessions.append(
                open_session(pieces[i], policy, params, prompt_length=prompt_length, max_positions=max_positions)
            )
            beyond = None if i + 1 == len(pieces) else partial(node, i + 1)
            return chained(sessions[-1], f"n{i}", beyond, costs=None if i else costs, ahead=ahead)

        return node(0, policy), sessions

    @asynccontextmanager
    async def closing(self, cut: int, chain: Chain, sessions: list[ShardSession]) -> AsyncIterator[None]:
        """Close a chain at the end of the block; check that it has freed every cache."""
        try:
            yield
            await chain.close()
        finally:
            for session in sessions:
                session.close()
        for piece in self.cuts[cut]:
            piece.capacity.check_integrity()
            assert piece.capacity.pool.used == 0


class Answering:
    """A next stage that only answers questions, as `answer` does."""

    def __init__(self, answer: Callable[[Block], Awaitable[Verdict]]) -> None:
        self._answer = answer

    async def advance(self, block: Block) -> Verdict:
        return await self._answer(block)

    async def feed(self, block: Block) -> None:
        raise AssertionError("nothing goes up without a question")

    async def arrived(self) -> None:
        raise AssertionError("nothing goes up without a question")

    async def rewind(self, position: int) -> None:
        raise AssertionError("nothing that this stage was told is taken back")

    async def close(self) -> None: ...


class Whims(DraftCosts):
    """Costs after which a round drafts or not as it is told, over and over."""

    def __init__(self, whims: Sequence[bool]) -> None:
        super().__init__()
        self._whims = itertools.cycle(whims)

    def next_round_drafts(self) -> bool:
        return next(self._whims)


@pytest.fixture(scope="module")
def world(five: Path) -> World:
    return World(five)


scales = st.builds(
    Scale,
    score=st.sampled_from(Score),
    curves=st.dictionaries(
        st.sampled_from(EXITS[:-1]),
        st.builds(
            lambda temperature, low: Curve(temperature, (-5.0, low, 0.9), (0.0, 0.3, 1.0)),
            st.sampled_from([0.5, 1.0, 2.0]),
            st.floats(-4.0, 0.8),
        ),
        max_size=4,
    ),
)
routings = st.one_of(
    st.builds(
        Routing, mode=st.just(Mode.EXACT), draft=st.sampled_from([0, 1, 4, 8]), scale=st.one_of(st.none(), scales)
    ),
    st.builds(Routing, mode=st.just(Mode.FIXED), exit=st.sampled_from(EXITS), draft=st.sampled_from([0, 1, 4])),
    st.builds(
        Routing,
        mode=st.just(Mode.TOKEN),
        thresholds=st.dictionaries(st.sampled_from(EXITS[:-1]), st.floats(0.0, 1.1), min_size=1),
        draft=st.sampled_from([0, 1, 2, 5]),
        scale=st.one_of(st.none(), scales),
    ),
    st.builds(
        Routing,
        mode=st.just(Mode.CASCADE),
        thresholds=st.dictionaries(st.sampled_from(EXITS[:-1]), st.floats(0.0, 1.1), min_size=1),
        window=st.sampled_from([1, 2, 3, 8]),
        back=st.one_of(st.none(), st.floats(0.0, 1.0)),
        start=st.one_of(
            st.none(),
            st.builds(
                Start,
                weights=st.dictionaries(
                    st.sampled_from(EXITS[:-1]),
                    st.tuples(*[st.floats(-2, 2, width=16)] * 5),
                    max_size=4,
                ),
                chance=st.floats(0.05, 0.95),
            ),
        ),
        draft=st.sampled_from([0, 1, 4]),
        scale=st.one_of(st.none(), scales),
    ),
)


@pytest.mark.timeout(300)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(
    routing=Routing(Mode.CASCADE, threshold=0.0, start=Start({}, 0.5), draft=1),
    cut=1,
    prompt=[3],
    count=2,
    eos=set(),
    ahead=0,
    whims=[True],
)
@given(
    routing=routings,
    cut=st.integers(0, len(CUTS) - 1),
    prompt=st.lists(st.integers(3, 60), min_size=1, max_size=12),
    count=st.integers(1, 14),
    eos=st.sets(st.integers(3, 60), max_size=12),
    ahead=st.sampled_from([0, 9, 100]),
    whims=st.lists(st.booleans(), min_size=1, max_size=5),
)
async def test_any_run_is_what_the_uncached_oracle_decides(
    world: World,
    routing: Routing,
    cut: int,
    prompt: list[int],
    count: int,
    eos: set[int],
    ahead: int,
    whims: list[bool],
) -> None:
    params = SamplingParams(eos_token_ids=tuple(sorted(eos)))
    expected = world.oracle.judge(Policy.resolve(routing, EXITS), prompt, count, eos=tuple(eos))
    decisions, _ = await world.run(cut, routing, params, prompt, count, ahead, Whims(whims))
    assert [(d.token, d.exit) for d in decisions] == [(token, exit) for token, exit, _ in expected]
    assert [d.confidence for d in decisions] == pytest.approx([sure for _, _, sure in expected], abs=1e-3)


@pytest.mark.parametrize("seed", range(4))
async def test_sampling_with_history_does_not_depend_on_cut_or_draft(world: World, seed: int) -> None:
    rng = random.Random(seed)
    prompt = [rng.randrange(3, 61) for _ in range(10)]
    params = SamplingParams(
        temperature=0.8,
        top_k=20,
        top_p=0.95,
        repetition_penalty=1.2,
        presence_penalty=0.4,
        frequency_penalty=0.3,
        no_repeat_ngram_size=3,
        min_new_tokens=5,
        eos_token_ids=(2, 9, 17),
        seed=seed,
    )
    sampler = Sampler(params, len(prompt))

    def pick(logits: torch.Tensor, ids: list[int]) -> int:
        return sampler.pick(logits[None], [len(ids) - 1], ids)[0][0]

    expected = world.oracle.decide(Policy.resolve(Routing(), EXITS), prompt, 24, pick, eos=(2, 9, 17))
    for cut in range(len(CUTS)):
        for draft in (0, 1, 4, 8):
            decisions, _ = await world.run(cut, Routing(Mode.EXACT, draft=draft), params, prompt, 24)
            assert [(d.token, d.exit) for d in decisions] == expected


async def test_threshold_zero_never_escalates_and_above_one_escalates_every_token(world: World) -> None:
    prompt = [5, 6, 7]
    decisions, escalations = await world.run(3, Routing(Mode.TOKEN, threshold=0.0), SamplingParams(), prompt, 12)
    assert escalations == 0 and {d.exit for d in decisions} == {1}
    routing = Routing(Mode.TOKEN, threshold=1.01, draft=0)
    decisions, escalations = await world.run(3, routing, SamplingParams(), prompt, 12)
    assert escalations == 12 and {d.exit for d in decisions} == {7}
    assert {d.reason for d in decisions} == {Reason.DEEPEST}


async def test_drafts_that_hold_save_escalations(world: World, five: Path) -> None:
    """With a stage beyond that agrees with every draft, one question settles them all."""
    shard = world.cuts[3][0]
    policy = Policy.resolve(Routing(Mode.EXACT, draft=4), EXITS)
    blocks: list[Block] = []

    async def agree(block: Block) -> Verdict:
        """Say of every wanted position what the draft says."""
        blocks.append(block)
        ids = (*block.token_ids, 60)
        return Verdict(tuple(Decision(ids[p - block.start + 1], 7, 1.0, Reason.DEEPEST) for p in block.wants), ())

    chain = chained(
        open_session(shard, policy, SamplingParams(), prompt_length=3, max_positions=40),
        "n0",
        lambda policy, position: Answering(agree),
    )
    rounds = [settled async for settled in decode(chain, [5, 6, 7], 11)]
    await chain.close()
    assert [len(r.decisions) for r in rounds] == [5, 5, 1]
    assert [(r.drafted, r.accepted) for r in rounds] == [(4, 4), (4, 4), (0, 0)]
    assert [(b.start, len(b.token_ids)) for b in blocks] == [(0, 7), (7, 5), (12, 1)]
    shard.capacity.check_integrity()


@pytest.mark.parametrize("whims", [[True], [False], [True, False], [True, True, False]])
async def test_what_was_drafted_ahead_is_not_run_again_by_a_round_that_would_not_draft(
    world: World, whims: list[bool]
) -> None:
    prompt, count = [5, 6, 7], 24
    first = Policy.resolve(Routing(Mode.FIXED, exit=1), EXITS)
    said = [*prompt, *(token for token, _ in world.oracle.decide(first, prompt, count + 1))]
    scale = Scale(Score.MAX_PROBABILITY, {1: Curve(1.0, (0.0, 1.0), (0.99, 1.0))})
    policy = Policy.resolve(Routing(Mode.EXACT, draft=4, scale=scale), EXITS)

    async def answer_slowly(block: Block) -> Verdict:
        """Say what the first branch says, after a while."""
        assert list(block.token_ids) == said[block.start : block.start + len(block.token_ids)]
        for _ in range(6):
            await asyncio.sleep(0)
        return Verdict(tuple(Decision(said[p + 1], 7, 1.0, Reason.DEEPEST) for p in block.wants), ())

    session = open_session(
        world.cuts[3][0], policy, SamplingParams(), prompt_length=len(prompt), max_positions=len(prompt) + count
    )
    chain = chained(session, "n0", lambda policy, position: Answering(answer_slowly), costs=Whims(whims))
    try:
        decided = [d.token async for settled in decode(chain, prompt, count) for d in settled.decisions]
    finally:
        await chain.close()
    assert decided == said[len(prompt) : len(prompt) + count]


@pytest.mark.parametrize("draft", [0, 3])
@pytest.mark.parametrize("error", [NodeUnavailable, WireError, RequestCancelled])
@pytest.mark.parametrize("mode", [Mode.EXACT, Mode.TOKEN, Mode.CASCADE])
async def test_a_node_without_the_next_one_decides_itself(
    world: World, mode: Mode, error: type[NodeError], draft: int
) -> None:
    async def lost(block: Block) -> Verdict:
        raise error("gone")

    shard = world.cuts[2][0]
    given: dict[str, Any] = {} if mode is Mode.EXACT else {"threshold": 0.05}
    given |= {"window": 2} if mode is Mode.CASCADE else {}
    routing = Routing(mode, draft=draft, fallback=True, **given)
    policy = Policy.resolve(routing, EXITS)
    session = open_session(shard, policy, SamplingParams(), prompt_length=3, max_positions=20, covers_next=True)
    chain = chained(session, "n0", lambda policy, position: Answering(lost))
    decided = [d async for settled in decode(chain, [5, 6, 7], 12) for d in settled.decisions]
    await chain.close()
    assert [(d.token, d.exit) for d in decided] == world.oracle.decide(policy.limited_to(3), [5, 6, 7], 12)
    assert {d.reason for d in decided if d.exit == 3} <= {Reason.UNREACHABLE, Reason.CONFIDENT}
    assert mode is not Mode.EXACT or {d.reason for d in decided} == {Reason.UNREACHABLE}
    shard.capacity.check_integrity()
    with pytest.raises(error):
        strict = Policy.resolve(Routing(Mode.EXACT, draft=draft), EXITS)
        chain = chained(
            open_session(shard, strict, SamplingParams(), prompt_length=3, max_positions=20),
            "n0",
            lambda policy, position: Answering(lost),
        )
        try:
            _ = [settled async for settled in decode(chain, [5, 6, 7], 12)]
        finally:
            await chain.close()


@pytest.mark.parametrize(
    "decisions",
    [
        (),
        (Decision(5, 7, 1.0, Reason.DEEPEST),) * 2,
        (Decision(61, 7, 1.0, Reason.DEEPEST),),
        (Decision(5, 3, 1.0, Reason.CONFIDENT),),
        (Decision(5, 5, 1.0, Reason.CONFIDENT),),
        (Decision(5, 9, 1.0, Reason.DEEPEST),),
    ],
    ids=["none", "too many", "token", "an exit of this node", "no exit", "a deeper exit than there is"],
)
async def test_a_verdict_that_cannot_be_right_is_none(world: World, decisions: tuple[Decision, ...]) -> None:
    class Wrong:
        async def advance(self, block: Block) -> Verdict:
            return Verdict(decisions, ())

        async def close(self) -> None: ...

    for fallback in (False, True):
        policy = Policy.resolve(Routing(Mode.EXACT, draft=0, fallback=fallback), EXITS)
        shard = world.cuts[2][0]
        session = open_session(shard, policy, SamplingParams(), prompt_length=3, max_positions=20, covers_next=fallback)
        chain = chained(session, "n0", lambda policy, position: Wrong())  # type: ignore[arg-type, return-value]
        try:
            decided = [d async for settled in decode(chain, [5, 6, 7], 4) for d in settled.decisions]
        except WireError:
            assert not fallback
        else:
            assert [d.reason for d in decided] == [Reason.UNREACHABLE] * 4
        await chain.close()
    shard.capacity.check_integrity()


async def test_what_a_gate_holds_back_is_decided_here_and_caught_up_later(world: World) -> None:
    near, far = world.cuts[1]
    policy = Policy.resolve(Routing(Mode.EXACT, draft=0), EXITS)
    asked: list[int] = []

    def gate(positions: int) -> Reason | None:
        asked.append(positions)
        return Reason.BUDGET if len(asked) % 3 else None

    deeper = chained(open_session(far, policy, SamplingParams(), prompt_length=3, max_positions=20), "n1")
    session = open_session(near, policy, SamplingParams(), prompt_length=3, max_positions=20, covers_next=True)
    chain = chained(session, "n0", lambda policy, position: deeper, gate=gate)
    ids, decided = [5, 6, 7], []
    async for settled in decode(chain, [5, 6, 7], 12):
        for d in settled.decisions:
            here = policy.limited_to(1) if d.reason is Reason.BUDGET else policy
            assert [(d.token, d.exit)] == world.oracle.decide(here, ids, 1)
            ids.append(d.token)
            decided.append(d)
    await chain.close()
    assert [d.reason is Reason.BUDGET for d in decided] == [True, True, False] * 4
    assert asked == [3, 4, 5, 1, 2, 3, 1, 2, 3, 1, 2, 3]
    near.capacity.check_integrity()


async def test_a_budget_is_spent_on_the_event_loop_alone(world: World) -> None:
    near, far = world.cuts[1]
    policy = Policy.resolve(Routing(Mode.EXACT, draft=2), EXITS)
    deeper = chained(open_session(far, policy, SamplingParams(), prompt_length=3, max_positions=20), "n1")
    session = open_session(near, policy, SamplingParams(), prompt_length=3, max_positions=20, covers_next=True)
    spenders: list[threading.Thread] = []

    def gate(positions: int) -> None:
        spenders.append(threading.current_thread())

    worker = ThreadWorker()  # whose tasks run on the compute thread
    try:
        chain = Chain(session, worker, "n0", next_stage=NextStage(session, always(deeper), gate=gate, ahead=8))
        async for _ in decode(chain, [5, 6, 7], 12):
            pass
        await chain.close()
    finally:
        await asyncio.to_thread(worker.shutdown)
    assert len(spenders) >= 4 and set(spenders) == {threading.current_thread()}


async def test_decided_states_go_up_ahead_in_lots_and_within_their_budget(world: World) -> None:
    near, far = world.cuts[1]
    policy = Policy.resolve(Routing(Mode.TOKEN, threshold=0.0), EXITS)
    fed: list[tuple[int, int]] = []

    class Noted(Chain):
        async def feed(self, block: Block) -> None:
            fed.append((block.start, len(block.token_ids)))
            await super().feed(block)

    for budget, expected in ((100, [(0, 12), (12, 8), (20, 8)]), (16, [(0, 12)]), (7, []), (0, [])):
        fed.clear()
        deeper = chained(
            open_session(far, policy, SamplingParams(), prompt_length=12, max_positions=40), "n1", kind=Noted
        )
        session = open_session(near, policy, SamplingParams(), prompt_length=12, max_positions=40)
        chain = chained(session, "n0", always(deeper), ahead=budget)
        async for _ in decode(chain, list(range(3, 15)), 20):
            await turns()
        await chain.close()
        await deeper.close()
        assert fed == expected
    for piece in (near, far):
        piece.capacity.check_integrity()
        assert piece.capacity.pool.used == 0


async def turns() -> None:
    """Let what goes up ahead go, and arrive."""
    for _ in range(4):
        await asyncio.sleep(0)


@pytest.mark.parametrize("when", ["feed", "arrived", "advance"])
async def test_what_goes_up_ahead_never_ends_an_answer(world: World, when: str) -> None:
    near, far = world.cuts[1]
    source, opened = random.Random(5), 0
    prompt, routing = [source.randrange(3, 61) for _ in range(12)], Routing(Mode.TOKEN, threshold=0.2)
    expected = world.oracle.decide(Policy.resolve(routing, EXITS), prompt, 30)
    exits = [exit for _, exit in expected]
    first = next(i for i, p in enumerate(exits) if p > near.exits[-1])
    assert 10 < first < 28, "some tokens are decided near, then one is asked about"

    class Full(Chain):
        """Turns the first session away, which is opened for states that nobody asked about."""

        async def feed(self, block: Block) -> None:
            if when == "feed":
                raise CapacityError("full", node="n1")
            if when == "advance":
                return
            await super().feed(block)

        async def arrived(self) -> None:
            if when == "arrived":
                raise CapacityError("full", node="n1")

        async def advance(self, block: Block) -> Verdict:
            raise CapacityError("full", node="n1")

    def beyond(policy: Policy, position: int) -> Chain:
        nonlocal opened
        opened += 1
        kind = Full if opened == 1 else Chain
        return chained(
            open_session(far, policy, SamplingParams(), prompt_length=len(prompt), max_positions=60), "n1", kind=kind
        )

    policy = Policy.resolve(routing, EXITS)
    chain = chained(
        open_session(near, policy, SamplingParams(), prompt_length=12, max_positions=60), "n0", beyond, ahead=100
    )
    found = []
    async for settled in decode(chain, prompt, 30):
        found += [(d.token, d.exit) for d in settled.decisions]
        await turns()
    await chain.close()
    assert found == expected and opened == 2
    for piece in (near, far):
        piece.capacity.check_integrity()
        assert piece.capacity.pool.used == 0


async def test_nothing_goes_up_ahead_while_the_link_is_in_use(world: World) -> None:
    near, far = world.cuts[1]
    policy, uplink = Policy.resolve(Routing(Mode.TOKEN, threshold=0.0), EXITS), Uplink()
    fed: list[int] = []
    arrives = asyncio.Event()

    class Slow(Chain):
        async def feed(self, block: Block) -> None:
            fed.append(len(block.token_ids))
            await super().feed(block)

        async def arrived(self) -> None:
            await arrives.wait()

    def beyond(policy: Policy, position: int) -> Chain:
        return chained(
            open_session(far, policy, SamplingParams(), prompt_length=100, max_positions=130), "n1", kind=Slow
        )

    def chain() -> Chain:
        session = open_session(near, policy, SamplingParams(), prompt_length=100, max_positions=130)
        return chained(session, "n0", beyond, ahead=1000, uplink=uplink)

    async def go(chain: Chain) -> None:
        async for _ in decode(chain, [5] * 100, 10):
            await turns()

    one, other = chain(), chain()
    uplink.questions = 1
    await go(one)
    assert fed == [], "somebody waits for an answer"
    uplink.questions = 0
    await go(other)
    assert fed == [32] and uplink.uploader is other._next, "one part, until it has arrived"
    arrives.set()
    await turns()
    assert uplink.idle
    for each in (one, other):
        await each.close()
    hasty = chain()
    async for _ in decode(hasty, [5] * 100, 1):
        assert uplink.uploader is hasty._next
        break  # before what goes up has begun to
    await hasty.close()
    assert uplink.idle and len(fed) == 1
    near.capacity.check_integrity()


@pytest.mark.parametrize("cuts", [[(2, 4, 6)], [(2,), (4, 6)], [(2,), (4,), (6,)]])
@pytest.mark.parametrize(
    "routing",
    [
        Routing(Mode.EXACT, draft=2),
        Routing(Mode.TOKEN, threshold=0.9),
        Routing(
            Mode.CASCADE,
            thresholds={2: 1.5, 4: 0.0},
            start=Start({2: (-9.0, 0, 0, 0, 0), 4: (-9.0, 0, 0, 0, 0)}, 0.5),  # exit 6, although exit 4 is sure
            draft=0,
        ),
    ],
    ids=["exact", "token", "start"],
)
async def test_a_long_prompt_goes_in_parts_and_gives_the_same(
    tmp_path: Path, cuts: list[tuple[int, ...]], routing: Routing
) -> None:
    folder = tiny_family(tmp_path / "long", max_position_embeddings=4096)
    checkpoint = Checkpoint(folder)
    oracle = Oracle(load_family(folder, dtype="float32"))
    prompt = [3 + i * 7 % 57 for i in range(3 * PART + 40)]
    policy = Policy.resolve(routing, (2, 4, 6))
    fed: list[tuple[int, int]] = []

    class Noted(Chain):
        async def feed(self, block: Block) -> None:
            fed.append((block.start, len(block.token_ids)))
            await super().feed(block)

    chain: Chain | None = None
    pieces = [
        Shard(load_slice(checkpoint, cut, dtype=torch.float32), max_positions=2048, max_sessions=1) for cut in cuts
    ]
    for i, shard in reversed(list(enumerate(pieces))):
        session = open_session(
            shard, policy, SamplingParams(), prompt_length=len(prompt), max_positions=len(prompt) + 10
        )
        chain = chained(session, f"n{i}", always(chain) if chain else None, kind=Noted)
    assert chain is not None
    decided = [d async for settled in decode(chain, prompt, 4) for d in settled.decisions]
    await chain.close()
    assert [(d.token, d.exit) for d in decided] == oracle.decide(policy, prompt, 4)
    once = [(0, PART), (PART, PART), (2 * PART, PART)] if routing.mode is Mode.EXACT else []
    assert sorted(fed) == sorted(once * (len(cuts) - 1))
    for shard in pieces:
        shard.capacity.check_integrity()


async def test_a_block_that_does_not_continue_is_refused(world: World) -> None:
    shard = world.cuts[1][1]
    session = open_session(shard, Policy.resolve(Routing(), EXITS), SamplingParams(), prompt_length=1, max_positions=8)
    chain = chained(session, "n1")
    states = torch.zeros(2, 32)
    for block, message in (
        (Block(1, states, (5, 6), ()), "starts at position 1; this session is at 0"),
        (Block(0, states, (5, 6, 7), ()), "3 positions has 2 states"),
        (Block(0, states, (5, 6), (2,)), r"wants \(2,\)"),
        (Block(0, torch.zeros(9, 32), (5,) * 9, ()), "ends at position 9; the session has 8"),
    ):
        with pytest.raises(WireError, match=message):
            await chain.advance(block)
    await chain.close()
    shard.capacity.check_integrity()
