"""Stages with caches against whole sequences without: invariants 1, 2, 5 and 7, on float32."""

import gc
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from _pytest.mark import ParameterSet
from torch import Tensor

from ruyi_flow.errors import CapacityError, ContextLengthError, NodeFault
from ruyi_flow.family.checkpoint import Checkpoint
from ruyi_flow.family.loading import load_slice
from ruyi_flow.local import Family, load_family
from ruyi_flow.loop.pages import PAGE_SIZE, PageRun
from ruyi_flow.loop.session import Pass
from ruyi_flow.loop.steps import Task, drive
from ruyi_flow.requests import SamplingParams
from ruyi_flow.routing.policy import Policy, Routing
from ruyi_flow.runtime.sampling import Sampler
from ruyi_flow.runtime.stage import Shard, ShardSession
from ruyi_flow.testing import open_session, tiny_family
from ruyi_flow.types import Mode

LOOK_EVERYWHERE = Routing(Mode.TOKEN, threshold=0.5)


class Recorder(Sampler):
    """Keeps the logits of each position and picks token 0."""

    def __init__(self) -> None:
        super().__init__(SamplingParams(), 1)
        self.logits: dict[int, Tensor] = {}

    def pick(
        self, logits: Tensor, positions: Sequence[int], history: Sequence[int], **_: Any
    ) -> tuple[list[int], list[float]]:
        for row, position in zip(logits, positions, strict=True):
            self.logits[position] = row.float().cpu()
        return [0] * len(positions), [0.0] * len(positions)


def shards(
    folder: Path, cuts: Sequence[Sequence[int]], max_positions: int = 2048, *, device: str = "cpu", paged: bool = False
) -> list[Shard]:
    checkpoint = Checkpoint(folder)
    return [
        Shard(
            load_slice(checkpoint, cut, dtype=torch.float32, device=device),
            max_positions=max_positions,
            max_sessions=4,
            paged=paged,
        )
        for cut in cuts
    ]


def one_pass(session: ShardSession, stage: int, states: Tensor, wants: Sequence[int]) -> Task[None]:
    yield Pass(session, stage, states, wants)


class Pipeline:
    """A sequence over shards, driven by hand: every stage advances as far as it is told."""

    def __init__(self, pieces: Sequence[Shard], size: int = 500) -> None:
        exits = pieces[0].config.exits
        policy = Policy.resolve(LOOK_EVERYWHERE, exits)
        self.sessions: list[ShardSession] = [
            open_session(p, policy, SamplingParams(), prompt_length=1, max_positions=size) for p in pieces
        ]
        self.stages = [(s, i) for s in self.sessions for i in range(len(s.exits))]
        self.recorders = {id(session): Recorder() for session in self.sessions}
        for session in self.sessions:
            session.sampler = self.recorders[id(session)]

    def feed(self, ids: Sequence[int], wants: Sequence[int]) -> None:
        session, stage = self.stages[0]
        session.token_ids.extend(ids)
        drive(one_pass(session, stage, session.embed(ids), wants))

    def escalate(self, depth: int, stop: int, wants: Sequence[int]) -> None:
        """Catch stage `depth` up to `stop` from the states that the stage before it has kept."""
        (giver, index), (taker, stage) = self.stages[depth - 1], self.stages[depth]
        if taker is giver:
            states = giver.take_unsent(index, stop)
        else:
            start = len(taker.token_ids)
            states = giver.states(start, stop)
            taker.token_ids.extend(giver.token_ids[start:stop])
        drive(one_pass(taker, stage, states, wants))

    def logits(self, depth: int) -> dict[int, Tensor]:
        return self.recorders[id(self.stages[depth][0])].logits

    def close(self) -> None:
        for session in self.sessions:
            session.close()


@pytest.mark.parametrize("cuts", [[(2, 4, 6)], [(2,), (4, 6)], [(2, 4), (6,)], [(2,), (4,), (6,)]], ids=str)
@pytest.mark.parametrize("length", [1, 30, 700])
def test_sharded_is_whole(tmp_path: Path, cuts: list[tuple[int, ...]], length: int) -> None:
    folder = tiny_family(tmp_path / "f", max_position_embeddings=2048)
    family = load_family(folder, dtype="float32")
    ids = torch.randint(3, 61, (length,), generator=torch.Generator().manual_seed(2)).tolist()
    pieces = shards(folder, cuts)
    pipeline = Pipeline(pieces, 1200)
    wants = sorted({0, length // 2, length - 1})
    pipeline.feed(ids, wants)
    for depth, exit in enumerate(family.exits):
        if depth:
            pipeline.escalate(depth, length, wants)
        expected = family.logits(torch.tensor([ids]), exit)[0]
        for position in wants:
            assert (pipeline.logits(depth)[position] - expected[position]).abs().max() < 1e-4
    pipeline.close()
    for piece in pieces:
        piece.capacity.check_integrity()
        assert piece.capacity.pool.used == 0


def padded(device: str) -> list[ParameterSet]:
    """Short steps as they come and as padded rows, on a device."""
    cuda = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
    marks = cuda if device == "cuda" else []
    return [pytest.param(device, paged, marks=marks, id=f"{device}{'-padded' * paged}") for paged in (False, True)]


@pytest.mark.parametrize(("device", "paged"), padded("cpu") + padded("cuda"))
@pytest.mark.parametrize("seed", range(12))
def test_cached_is_uncached_after_any_interleaving(seed: int, device: str, paged: bool, five: Path) -> None:
    rng = random.Random(seed)
    family: Family = load_family(five, dtype="float32")
    cuts: list[tuple[int, ...]] = rng.choice([[(1, 3, 4, 6, 7)], [(1, 3), (4, 6), (7,)], [(1,), (3, 4, 6), (7,)]])
    pipeline = Pipeline(shards(five, cuts, device=device, paged=paged))
    ids: list[int] = []
    held = [0] * len(family.exits)
    for _ in range(40):
        action = rng.random()
        if action < 0.45 or not ids:  # more tokens at the first stage
            new = [rng.randrange(3, 61) for _ in range(rng.choice([1, 1, 1, 2, 5, 20]))]
            ids += new
            wants = sorted(rng.sample(range(held[0], len(ids)), rng.randint(0, min(3, len(new)))))
            pipeline.feed(new, wants)
            depth, held[0] = 0, len(ids)
        elif action < 0.8:  # some stage catches up with the one before it
            depth = rng.randrange(1, len(family.exits))
            if held[depth - 1] == held[depth]:
                continue
            stop = rng.randint(held[depth] + 1, held[depth - 1])
            wants = sorted(rng.sample(range(held[depth], stop), rng.randint(0, min(3, stop - held[depth]))))
            pipeline.escalate(depth, stop, wants)
            held[depth] = stop
        else:  # everything past some position was a wrong draft
            position = rng.randint(0, len(ids))
            for session in pipeline.sessions:
                session.rewind(position)
            ids, held = ids[:position], [min(h, position) for h in held]
            continue
        if wants:
            expected = family.logits(torch.tensor([ids]), family.exits[depth])[0]
            for position in wants:
                assert (pipeline.logits(depth)[position] - expected[position]).abs().max() < 1e-4
    pipeline.close()


def test_sessions_do_not_mix(tiny: Path) -> None:
    family = load_family(tiny, dtype="float32")
    [piece] = shards(tiny, [(2, 4, 6)])
    pipelines = [Pipeline([piece], 100) for _ in range(4)]
    sequences = torch.randint(3, 61, (4, 30), generator=torch.Generator().manual_seed(4)).tolist()
    for position in range(30):
        for pipeline, ids in zip(pipelines, sequences, strict=True):
            pipeline.feed(ids[position : position + 1], [position])
    for pipeline, ids in zip(pipelines, sequences, strict=True):
        assert (pipeline.logits(0)[29] - family.logits(torch.tensor([ids]), 2)[0, -1]).abs().max() < 1e-4
        pipeline.close()
    piece.capacity.check_integrity()


def test_limits_are_said(tiny: Path) -> None:
    [piece] = shards(tiny, [(2, 4, 6)], max_positions=256)
    policy = Policy.resolve(Routing(), (2, 4, 6))
    first = open_session(piece, policy, SamplingParams(), prompt_length=1, max_positions=200)
    with pytest.raises(CapacityError, match="this request needs 100 positions of KV cache; 0 of 256 are free"):
        open_session(piece, policy, SamplingParams(), prompt_length=1, max_positions=100)
    with pytest.raises(ContextLengthError, match="needs 600 positions; the family's context has 512"):
        open_session(piece, policy, SamplingParams(), prompt_length=1, max_positions=600)
    first.close()
    first.close()
    sessions = [open_session(piece, policy, SamplingParams(), prompt_length=1, max_positions=10) for _ in range(4)]
    with pytest.raises(CapacityError, match="4 sessions are running"):
        open_session(piece, policy, SamplingParams(), prompt_length=1, max_positions=10)
    for session in sessions:
        session.close()
    piece.capacity.check_integrity()
    assert piece.capacity.pool.used == 0


def test_a_quiet_session_keeps_little_more_memory_alive_than_its_own_states(tmp_path: Path) -> None:
    folder = tiny_family(tmp_path / "wide", hidden_size=256, exits=(1, 2, 3), max_position_embeddings=2048)
    (shard,) = shards(folder, [[1, 2]], max_positions=4096)
    policy = Policy.resolve(Routing(Mode.TOKEN, threshold=0.0), (1, 2, 3))  # always confident: nothing goes up
    quiet = open_session(shard, policy, SamplingParams(), prompt_length=1, max_positions=600)

    def tensor_bytes() -> int:
        tensors = [
            t for t in gc.get_objects() if type(t) is Tensor and t.layout is torch.strided and t.device.type == "cpu"
        ]
        return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())

    def step_beside(prompt: int) -> None:
        """Decode one token of the quiet session in the step of another one's prompt."""
        other = open_session(shard, policy, SamplingParams(), prompt_length=prompt, max_positions=prompt)
        quiet.token_ids.append(5)
        other.token_ids.extend([7] * prompt)
        mine = Pass(quiet, 0, quiet.embed((5,)), (len(quiet.token_ids) - 1,))
        shard.run([(mine, 1), (Pass(other, 0, other.embed([7] * prompt), ()), prompt)])
        other.close()

    step_beside(200)
    before = tensor_bytes()
    for _ in range(40):
        step_beside(200)
    own = 40 * 256 * 4
    assert own <= tensor_bytes() - before <= 2 * own
    quiet.take_unsent(0, 20)  # the rest must not keep what was sent
    assert tensor_bytes() - before <= own
    quiet.rewind(25)
    assert tensor_bytes() - before <= 10 * 256 * 4


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize(("position", "rows"), [(60, 10), (64, 1), (-1, 1)])
def test_rows_outside_their_sessions_pages_are_refused_and_the_others_run(
    tiny: Path, paged: bool, position: int, rows: int
) -> None:
    [shard] = shards(tiny, [(2, 4, 6)], paged=paged)
    policy = Policy.resolve(LOOK_EVERYWHERE, shard.config.exits)
    one, bad, other = [
        open_session(shard, policy, SamplingParams(), prompt_length=1, max_positions=PAGE_SIZE) for _ in range(3)
    ]
    found = []
    for session in (one, other):
        session.token_ids.extend([5, 6, 7])
        works = [Pass(session, 0, session.embed([5, 6, 7]), (2,))]
        if session is other:
            before = shard.memory.clone()
            bad.token_ids.extend([9] * PAGE_SIZE)
            bad.positions[0] = position
            works.insert(0, Pass(bad, 0, bad.embed([9] * rows), ()))
        shard.run([(work, work.rows) for work in works])
        found.append(works[-1].found)
    assert isinstance(works[0].error, NodeFault) and "outside the session's KV cache pages" in str(works[0].error)
    [[(token, sure)], [(same, as_sure)]] = found  # type: ignore[misc]
    assert same == token and as_sure == pytest.approx(sure)
    changed = shard.memory.view(torch.int32) != before.view(torch.int32)  # the memory may contain NaN
    written = changed.any(-1).any(0).any(0).any(0).nonzero()[:, 0].tolist()
    mine = other.lease.pages.positions
    assert all(
        mine.start <= position < mine.stop or position >= shard.capacity.pool.num_positions for position in written
    )
    for session in (one, bad, other):
        session.close()
    shard.capacity.check_integrity()


@pytest.mark.parametrize("cut", [(2, 4), (2, 4, 6)], ids=str)
@pytest.mark.parametrize("first", [0, 2, 3, 5, 8, 12])
def test_the_caches_and_the_log_of_a_session_move_to_other_pages(
    tmp_path: Path, cut: tuple[int, ...], first: int
) -> None:
    [shard] = shards(tiny_family(tmp_path / "f"), [cut], 1024)
    session = Pipeline([shard], 64).sessions[0]
    old, positions = PageRun(0, 4, 4), 3 * PAGE_SIZE + 7
    memory, log = shard.memory.uniform_().clone(), shard.log.uniform_().clone()
    assert len(log) == (1024 if cut == (2, 4) else 0), "nothing is sent from the deepest stage"
    session.positions, session.lease.pages = [positions, 9, 0][: len(cut)], PageRun(0, first, 4)
    session.use_pages(old)
    start, was = first * PAGE_SIZE, old.positions.start
    there, here = slice(start, start + positions), slice(was, was + positions)
    assert torch.equal(shard.memory[:, :, :, there], memory[:, :, :, here])
    assert torch.equal(shard.log[there], log[here])
    assert torch.equal(session.states(0, positions), log[here])
    others = [p for p in range(1024) if not start <= p < start + positions]
    assert torch.equal(shard.memory[:, :, :, others], memory[:, :, :, others]), "nobody else's pages change"
    assert not len(log) or torch.equal(shard.log[others], log[others])


def test_a_session_that_moved_writes_to_its_new_pages_only(tmp_path: Path) -> None:
    [shard] = shards(tiny_family(tmp_path / "f"), [(2, 4, 6)], 1024)
    pipeline = Pipeline([shard], 64)
    session, ids = pipeline.sessions[0], [5, 6, 7, 8]
    pipeline.feed(ids, [3])
    before = pipeline.logits(0).copy()
    session.lease.park(4, lambda lease: None)
    shard.capacity.lease(64)
    old = session.lease.resume(100)
    assert old is not None
    session.use_pages(old)
    shard.memory[:, :, :, old.positions] = torch.nan
    for keep in (0, 3):  # the block before it may have begun at the same position
        session.rewind(keep)
        pipeline.feed(ids[keep:], [3])
        assert torch.allclose(pipeline.logits(0)[3], before[3], atol=1e-5)
    assert shard.memory[:, :, :, old.positions].isnan().all()
