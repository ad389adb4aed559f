"""What a family's stages take in this process, by rows and by what their branches do."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch

from ruyi_flow.bench.report import Report
from ruyi_flow.loop.session import Pass, Session
from ruyi_flow.requests import SamplingParams
from ruyi_flow.routing.confidence import Curve, Scale, Score
from ruyi_flow.routing.policy import Policy, Routing
from ruyi_flow.runtime.stage import Shard
from ruyi_flow.sim.profile import StageCost
from ruyi_flow.testing import open_session
from ruyi_flow.types import Mode

__all__ = ["NEAR", "ROWS", "SESSIONS", "ascending", "filled", "measure_stages", "sweep"]

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Of a step, that are measured."""
NEAR = 64
"""The context that the cost of attention is taken from, beside a far one."""
SESSIONS = 8
"""In a step, for what each further one costs."""
_MANY = 128
"""Rows that show what each of them attends to, beside what reading the context takes."""


def measure_stages(shard: Shard, far: int, rounds: int, report: Report) -> tuple[StageCost, ...]:
    """Times of every stage, by rows and by what its branch does."""
    took: dict[tuple[str, int, int], list[list[float]]] = defaultdict(lambda: [[] for _ in shard.exits])
    with torch.inference_mode():
        one, scaled = filled(shard, far), filled(shard, NEAR, _scale(shard))
        kinds = [("trunk", n, NEAR) for n in ROWS] + [("branch", n, NEAR) for n in ROWS]
        kinds += [("head", n, NEAR) for n in ROWS if n <= 64]
        kinds += [("scaled", 1, NEAR), ("head", 1, NEAR)] * 3  # a small difference, seen more often
        kinds += [("trunk", n, far) for n in (1, _MANY)] + [("head", n, far) for n in (1, 16)]
        total = (rounds + 1) * len(kinds)
        for done in range(total):
            kind = kinds[done % len(kinds)]
            what, rows, context = kind
            session = scaled if what == "scaled" else one
            session.rewind(context)
            for stage, seconds in enumerate(sweep([session], rows, "head" if what == "scaled" else what)):
                if done >= len(kinds):  # the first round warms up
                    took[kind][stage].append(seconds)
            if done % 16 == 0:
                report("stages", done, total)
        report("stages", total, total)
        several = [filled(shard, NEAR) for _ in range(SESSIONS)]
        for i in range(rounds + 1):
            for session in several:
                session.rewind(NEAR)
            for stage, seconds in enumerate(sweep(several, 1, "trunk")):
                if i:
                    took["sessions", SESSIONS, NEAR][stage].append(seconds)
        for session in (one, scaled, *several):
            session.close()
    middle = {kind: [statistics.median(times) for times in by_stage] for kind, by_stage in took.items()}
    return tuple(_cost(shard, stage, middle, far) for stage in range(len(shard.exits)))


def _cost(shard: Shard, stage: int, middle: Mapping[tuple[str, int, int], Sequence[float]], far: int) -> StageCost:
    """One stage's cost from medians."""

    def at(what: str, rows: int, context: int = NEAR) -> float:
        return middle[what, rows, context][stage]

    def slopes(what: str, many: int) -> tuple[float, float]:
        """What a row's attending to a position takes, and what reading that position's keys and values does."""
        one, all = ((at(what, n, far) - at(what, n)) / (far - NEAR) for n in (1, many))
        attending = max(0.0, (all - one) / (many - 1))
        return attending, max(0.0, one - attending)

    attended, context = slopes("trunk", _MANY)
    both = slopes("head", 16)
    reading = max(0.0, both[0] - attended), max(0.0, both[1] - context)
    trunk = [max(0.0, at("trunk", n) - attended * n * (NEAR + n / 2) - context * (NEAR + n)) for n in ROWS]
    branch = [max(0.0, at("branch", n) - at("trunk", n)) for n in ROWS]
    head = [
        max(0.0, at("head", n) - at("branch", n) - (reading[0] * n + reading[1]) * (NEAR + n)) for n in ROWS if n <= 64
    ]
    while len(head) < len(ROWS):  # nobody reads more rows than a draft has, or a prompt's end
        head.append(2 * head[-1])
    first, exit = shard.model.stages[stage]
    config = shard.config
    slot = 2 * config.num_kv_heads * config.head_dim * shard.memory.element_size()
    layers = exit - first + config.branch_layers[config.exits.index(exit)]
    return StageCost(
        exit=exit,
        first_layer=first,
        rows=ROWS,
        trunk_s=ascending(trunk),
        branch_s=ascending(branch),
        head_s=ascending(head),
        attended_s=attended,
        context_s=context,
        branch_attended_s=reading[0],
        branch_context_s=reading[1],
        session_s=max(0.0, (at("sessions", SESSIONS) - at("trunk", SESSIONS)) / (SESSIONS - 1)),
        scale_s=max(0.0, at("scaled", 1) - at("head", 1)),
        weight_bytes=2 * layers * config.layer_parameters,
        kv_bytes=layers * slot,
    )


def ascending(times: Sequence[float]) -> tuple[float, ...]:
    """More rows never take less; noise says so now and then."""
    out: list[float] = []
    for seconds in times:
        out.append(max(seconds, out[-1] if out else 0.0))
    return tuple(out)


def _scale(shard: Shard) -> Scale:
    """Calibrated confidence of the dearest kind that the family has."""
    score = Score.PROBE if shard.config.probe_size else Score.NEGATIVE_ENTROPY
    curve = Curve(1.2, tuple(i / 20 for i in range(20)), tuple(i / 20 for i in range(20)))
    return Scale(score, {p: curve for p in shard.config.exits[:-1]})


def filled(shard: Shard, positions: int, scale: Scale | None = None) -> Session:
    """A session whose branches all look, with so many positions."""
    policy = Policy.resolve(Routing(mode=Mode.TOKEN, threshold=1.0, draft=0, scale=scale), shard.exits)
    params = SamplingParams(eos_token_ids=())
    session = open_session(shard, policy, params, 1, min(shard.config.max_positions, positions + ROWS[-1]))
    while len(session.token_ids) < positions:
        list(sweep([session], min(256, positions - len(session.token_ids)), "branch"))
    return session


def sweep(sessions: Sequence[Session], rows: int, what: str) -> Iterator[float]:
    """Run every stage on so many rows of each session; gives what each took.

    Args:
        what: trunk: its branch does nothing; branch: takes rows in; head: and reads them all.
    """
    like = sessions[0].embed((0,))
    for session in sessions:
        session.token_ids.extend([1] * rows)
    for stage in range(len(sessions[0].exits)):
        states = torch.randn(rows, like.shape[1]).to(like.dtype)
        parts = []
        began = time.perf_counter()
        for session in sessions:
            start = session.positions[stage]
            entering = states if stage else session.embed([1] * rows)
            work = Pass(session, stage, entering, range(start, start + rows) if what == "head" else ())
            work.looks = what != "trunk"
            parts.append((work, rows))
        sessions[0].stages.run(parts)
        yield time.perf_counter() - began
        for work, _ in parts:
            if work.error is not None:
                raise work.error
