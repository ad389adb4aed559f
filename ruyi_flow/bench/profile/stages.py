"""Measurement of a family's stages in this process, by the rows of a step and by the work of their branches."""

from __future__ import annotations

import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch

from ruyi_flow.bench.measurement import Report
from ruyi_flow.loop.session import Pass, Session
from ruyi_flow.requests import SamplingParams
from ruyi_flow.routing.confidence import Curve, Scale, Score
from ruyi_flow.routing.policy import Policy, Routing
from ruyi_flow.runtime.stage import Shard
from ruyi_flow.sim.profile import StageCost
from ruyi_flow.testing import open_session
from ruyi_flow.types import Mode

__all__ = ["NEAR_CONTEXT", "ROWS", "SESSIONS", "filled_session", "measure_stages", "non_decreasing", "time_stages"]

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Measured numbers of rows in a step."""
NEAR_CONTEXT = 64
"""Shorter of the two contexts whose difference gives the cost of attention, in positions."""
SESSIONS = 8
"""Sessions in the step that shows what each further session costs."""
_MANY_ROWS = 128
"""Rows of the step that separates a row's attention from reading the KV cache once."""
_MOST_HEAD_ROWS = 64
"""Most rows with LM head that are measured: only drafts and the ends of prompts need logits."""


def measure_stages(shard: Shard, far: int, rounds: int, report: Report) -> tuple[StageCost, ...]:
    """Measure the cost of every stage by medians over the rounds; `far` is the longer of two contexts, in positions."""
    seconds: dict[tuple[str, int, int], list[list[float]]] = defaultdict(lambda: [[] for _ in shard.exits])
    with torch.inference_mode():
        plain, scaled = filled_session(shard, far), filled_session(shard, NEAR_CONTEXT, _scale(shard))
        kinds = [("trunk", n, NEAR_CONTEXT) for n in ROWS] + [("branch", n, NEAR_CONTEXT) for n in ROWS]
        kinds += [("head", n, NEAR_CONTEXT) for n in ROWS if n <= _MOST_HEAD_ROWS]
        kinds += [("scaled", 1, NEAR_CONTEXT), ("head", 1, NEAR_CONTEXT)] * 3  # more samples of a small difference
        kinds += [("trunk", n, far) for n in (1, _MANY_ROWS)] + [("head", n, far) for n in (1, 16)]
        total = (rounds + 1) * len(kinds)
        for done in range(total):
            kind = kinds[done % len(kinds)]
            what, rows, context = kind
            session = scaled if what == "scaled" else plain
            session.rewind(context)
            for stage, stage_s in enumerate(time_stages([session], rows, "head" if what == "scaled" else what)):
                if done >= len(kinds):  # the first round warms up
                    seconds[kind][stage].append(stage_s)
            if done % 16 == 0:
                report("stages", done, total)
        report("stages", total, total)
        several = [filled_session(shard, NEAR_CONTEXT) for _ in range(SESSIONS)]
        for i in range(rounds + 1):
            for session in several:
                session.rewind(NEAR_CONTEXT)
            for stage, stage_s in enumerate(time_stages(several, 1, "trunk")):
                if i:
                    seconds["sessions", SESSIONS, NEAR_CONTEXT][stage].append(stage_s)
        for session in (plain, scaled, *several):
            session.close()
    medians = {kind: [statistics.median(times) for times in by_stage] for kind, by_stage in seconds.items()}
    return tuple(_cost(shard, stage, medians, far) for stage in range(len(shard.exits)))


def _cost(shard: Shard, stage: int, medians: Mapping[tuple[str, int, int], Sequence[float]], far: int) -> StageCost:
    """Derive one stage's cost from the medians of all measurements, by (work, rows, context) and stage."""

    def at(what: str, rows: int, context: int = NEAR_CONTEXT) -> float:
        return medians[what, rows, context][stage]

    def slopes(what: str, many: int) -> tuple[float, float]:
        """Seconds per context position: of one row's attention to it, and of reading its KV cache once."""
        one_row, many_rows = ((at(what, n, far) - at(what, n)) / (far - NEAR_CONTEXT) for n in (1, many))
        attention = max(0.0, (many_rows - one_row) / (many - 1))
        return attention, max(0.0, one_row - attention)

    attended, context = slopes("trunk", _MANY_ROWS)
    with_branch = slopes("head", 16)
    branch_attended, branch_context = max(0.0, with_branch[0] - attended), max(0.0, with_branch[1] - context)
    trunk = [
        max(0.0, at("trunk", n) - attended * n * (NEAR_CONTEXT + n / 2) - context * (NEAR_CONTEXT + n)) for n in ROWS
    ]
    branch = [max(0.0, at("branch", n) - at("trunk", n)) for n in ROWS]
    head = [
        max(0.0, at("head", n) - at("branch", n) - (branch_attended * n + branch_context) * (NEAR_CONTEXT + n))
        for n in ROWS
        if n <= _MOST_HEAD_ROWS
    ]
    while len(head) < len(ROWS):  # extrapolated: no step needs logits of so many rows
        head.append(2 * head[-1])
    first, exit = shard.model.stages[stage]
    config = shard.config
    layer_kv_bytes = 2 * config.num_kv_heads * config.head_dim * shard.memory.element_size()
    layers = exit - first + config.branch_layers[config.exits.index(exit)]
    return StageCost(
        exit=exit,
        first_layer=first,
        rows=ROWS,
        trunk_s=non_decreasing(trunk),
        branch_s=non_decreasing(branch),
        head_s=non_decreasing(head),
        attended_s=attended,
        context_s=context,
        branch_attended_s=branch_attended,
        branch_context_s=branch_context,
        session_s=max(0.0, (at("sessions", SESSIONS) - at("trunk", SESSIONS)) / (SESSIONS - 1)),
        scale_s=max(0.0, at("scaled", 1) - at("head", 1)),
        weight_bytes=2 * layers * config.layer_parameters,
        kv_bytes=layers * layer_kv_bytes,
    )


def non_decreasing(times: Sequence[float]) -> tuple[float, ...]:
    """Raise every time to the largest before it: more rows never take less time, except by noise."""
    return tuple(itertools.accumulate((max(0.0, seconds) for seconds in times), max))


def _scale(shard: Shard) -> Scale:
    """Make a calibrated confidence with the most expensive score that the family supports."""
    score = Score.PROBE if shard.config.probe_size else Score.NEGATIVE_ENTROPY
    curve = Curve(1.2, tuple(i / 20 for i in range(20)), tuple(i / 20 for i in range(20)))
    return Scale(score, {p: curve for p in shard.config.exits[:-1]})


def filled_session(shard: Shard, positions: int, scale: Scale | None = None) -> Session:
    """Open a session with this many positions in the KV caches of all stages and branches."""
    policy = Policy.resolve(Routing(mode=Mode.TOKEN, threshold=1.0, draft=0, scale=scale), shard.exits)
    params = SamplingParams(eos_token_ids=())
    session = open_session(
        shard, policy, params, prompt_length=1, max_positions=min(shard.config.max_positions, positions + ROWS[-1])
    )
    while len(session.token_ids) < positions:
        list(time_stages([session], min(256, positions - len(session.token_ids)), "branch"))
    return session


def time_stages(sessions: Sequence[Session], rows: int, what: str) -> Iterator[float]:
    """Run every stage on new rows of each session; yield the seconds of each stage.

    `what` is trunk (no branch), branch (also fill the branch's KV cache) or head (also pick a token for each row).
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
