"""Calibration of mode cascade: it follows answers as the running system does, and its bound holds on new prompts."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ruyi_flow.calibration.cascade import Segment, answer_flops, calibrate_cascade, segment_answer
from ruyi_flow.calibration.curves import Floats
from ruyi_flow.calibration.trace import ExitRecord, Header, OwnAnswer, Record, Scorer, Trace
from ruyi_flow.config.policy_file import PolicyFile
from ruyi_flow.errors import ConfigError
from ruyi_flow.routing.confidence import Score
from ruyi_flow.routing.policy import Judge, Policy, Routing
from ruyi_flow.routing.start import Reading, Start
from ruyi_flow.types import Mode

HEADER = Header(
    family="f" * 64,
    name="made",
    exits=(2, 4, 6),
    hidden_size=8,
    dtype="float32",
    max_new_tokens=40,
    boundary_bytes={"bf16": 16},
    scores=(Score.MAX_PROBABILITY, Score.MARGIN),
    temperatures=(1.0,),
    branch_layers=(1, 2, 1),
    layer_flops=100.0,
    attention_flops=1.0,
    head_flops=50.0,
)


def made(prompts: int, seed: int, *, scored: bool = False) -> Trace:
    """Make easy prompts, which every exit predicts and answers well, and hard ones."""
    generator = np.random.default_rng(seed)
    records = []
    for number in range(prompts):
        n, easy = int(generator.integers(10, 41)), generator.random() < 0.5
        exits = {}
        for p, skill in zip(HEADER.exits, (0.0, 0.6, 1.0), strict=True):
            good = 0.995 if easy or p == 6 else 0.4 + 0.5 * skill
            tokens = np.where(generator.random(n) < (1.0 if p == 6 else good), 0, 1).astype(np.int32)
            said = np.clip(good + generator.normal(0, 0.05, n), 0, 1).astype(np.float32)
            scores = np.repeat(said[:, None, None], len(HEADER.scores), 1)
            own = (
                OwnAnswer(scores, float(generator.random() < (0.95 if easy else 0.1 + 0.5 * skill))) if scored else None
            )
            loss = float((1.0 if easy else 2.0) + generator.normal(0, 0.2))
            exits[p] = ExitRecord(tokens, scores, loss, 2 * loss, own)
        records.append(Record(number, f"{seed}/{number}", int(generator.integers(5, 30)), np.zeros(n, np.int32), exits))
    header = replace(HEADER, scorer=Scorer.NUMBER) if scored else HEADER
    return Trace.from_records(header, records)


@pytest.mark.parametrize("seed", range(20))
def test_a_trace_is_followed_as_the_running_system_decides(seed: int) -> None:
    generator = np.random.default_rng(seed)
    sure: dict[int, Floats] = {p: generator.random(30) for p in HEADER.exits}
    window, bound = int(generator.integers(1, 6)), float(generator.random())
    policy = Policy.resolve(Routing(Mode.CASCADE, threshold=bound, window=window), HEADER.exits)
    first = HEADER.exits[int(generator.integers(0, 3))]
    judges = [Judge(policy.starting_at(first), p) for p in HEADER.exits]
    expected = [next(j.exit for j in judges if j.decide(i, float(sure[j.exit][i]))) for i in range(30)]
    parts = segment_answer(HEADER, sure, bound=bound, window=window, first=first)
    assert [part.exit for part in parts for _ in range(part.start, part.stop)] == expected


def test_compute_is_what_has_to_run() -> None:
    layer = 100.0 + (10 + 4) / 2
    whole = answer_flops(HEADER, 10, [Segment(6, 0, 4)], reads=False)
    assert whole == pytest.approx(13 * 6 * layer + 13 * layer + 4 * 50)
    shallow = answer_flops(HEADER, 10, [Segment(2, 0, 4)], reads=False)
    assert shallow == pytest.approx(13 * 2 * layer + 13 * layer + 4 * 50)
    # The first exit left the answer at its third token, which both computed; the deeper exit caught up with all of it.
    moved = answer_flops(HEADER, 10, [Segment(2, 0, 2), Segment(4, 2, 4)], reads=False)
    assert moved == pytest.approx(13 * 4 * layer + (12 + 13 * 2) * layer + (3 + 2) * 50)
    # The first branch read nine tokens and predicted the next one, though it decides none.
    began = answer_flops(HEADER, 10, [Segment(6, 0, 4)], reads=True)
    assert began == pytest.approx(whole + 10 * layer + 10 * 50)


@pytest.mark.parametrize("scored", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_cascade_saves_compute_and_keeps_its_bound_on_new_prompts(scored: bool) -> None:
    lost, saved = [], []
    bound = 0.15 if scored else 0.05
    world = made(1500, 77, scored=scored)
    told: list[tuple[int, int]] = []
    for seed in range(6):
        trace = made(600, seed, scored=scored)
        found = calibrate_cascade(trace, max_loss=bound, report=lambda done, total: told.append((done, total)))
        assert told[-1][0] == told[-1][1] and found.prompts == 420
        lost.append(1 - replayed(world, found.policy)[0])
        saved.append(1 - found.tested.compute)
        assert sum(share for p, share in found.tested.decided.items() if p != 6) > 0.2
    assert sum(loss > bound for loss in lost) <= 1
    assert np.mean(saved) > 0.1 and np.mean(lost) > 0.005, "the bound is used"


def replayed(trace: Trace, policy: PolicyFile) -> tuple[float, float]:
    """Return the relative quality of a policy's answers, by the policy's own objects, and the share decided early."""
    routing = Routing().updated(policy.options({}))
    resolved, scale = Policy.resolve(routing, trace.header.exits), routing.scale
    assert scale is not None
    mine = last = early = tokens = 0.0
    for record in trace.records:
        first = record.exits[2]
        sure = {p: [scale.curves[p](float(x)) for x in e.scores[:, 0, 0]] for p, e in record.exits.items() if p != 6}
        reading = Reading(record.prompt_tokens, first.prompt_loss, first.prompt_entropy, sure[2][0])
        start = 2 if resolved.routing.start is None else resolved.routing.start.exit(reading, 6)
        judges = [Judge(resolved.starting_at(start), p) for p in trace.header.exits]
        at = [
            next(j.exit for j in judges if j.decide(i, sure.get(j.exit, [1.0] * 99)[i]))
            for i in range(len(record.answer))
        ]
        agrees = [record.exits[p].tokens[i] == record.answer[i] for i, p in enumerate(at)]
        own, ends = record.exits[6].own, record.exits[at[-1]].own
        mine += float(np.mean(agrees)) if ends is None else ends.right
        last += 1.0 if own is None else own.right
        early += sum(p != 6 for p in at)
        tokens += len(at)
    return mine / last, early / tokens


def test_too_few_prompts_and_numbers_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="10 prompts cannot show that at most 1.0% .* more of the same kind"):
        calibrate_cascade(made(10, 1), max_loss=0.01)
    for number in (0.0, 1.0, -1.0):
        with pytest.raises(ConfigError, match="between 0 and 1"):
            calibrate_cascade(made(10, 1), max_loss=number)


def test_a_policy_file_carries_a_cascade(tmp_path: Path) -> None:
    found = calibrate_cascade(made(600, 3), max_loss=0.1)
    found.policy.save(tmp_path / "p.yaml")
    read = PolicyFile.load(tmp_path / "p.yaml")
    assert read == found.policy and read.mode is Mode.CASCADE
    routing = Routing().updated(read.options({}))
    assert routing.mode is Mode.CASCADE and routing.window == 8 and dict(routing.thresholds or {}) == read.thresholds
    assert read.start is None or isinstance(routing.start, Start)
    assert found.tested in found.frontier


def test_an_oracle_is_never_beaten_at_its_price_of_compute() -> None:
    found = calibrate_cascade(made(600, 4, scored=True), max_loss=0.2)
    others = [*found.frontier, *found.baselines["always"], *found.baselines["random"]]
    for oracle in found.baselines["oracle"]:
        price = oracle.setting.chance
        most = max(worth.score - price * worth.compute for worth in others)
        assert oracle.score - price * oracle.compute >= most - 1e-9
    cheap = [oracle.compute for oracle in found.baselines["oracle"]]
    assert cheap == sorted(cheap, reverse=True) and cheap[-1] < 0.6, "the higher the price, the less compute"


def test_a_random_choice_of_exits_counts_tokens_and_not_prompts() -> None:
    trace = made(400, 5, scored=True)

    def own_answer(record: Record, exit: int) -> OwnAnswer:
        own = record.exits[exit].own
        assert own is not None
        return own

    def shorter(record: Record) -> Record:
        """Let the first exit give answers of a fifth of the last one's length."""
        own = own_answer(record, 2)
        short = replace(own, scores=own.scores[: len(own.scores) // 5])
        return replace(record, exits={**record.exits, 2: replace(record.exits[2], own=short)})

    found = calibrate_cascade(Trace.from_records(trace.header, [shorter(r) for r in trace.records]), max_loss=0.3)
    records = found.unseen[0].records
    tokens = {p: sum(len(own_answer(r, p).scores) for r in records) for p in (2, 6)}
    sent = sum((16 + 16) * (r.prompt_tokens + len(r.answer) - 1) for r in records)
    half = found.baselines["random"][5]
    assert half.decided[2] == pytest.approx(tokens[2] / (tokens[2] + tokens[6]))
    assert half.bytes_per_token == pytest.approx(sent / (tokens[2] + tokens[6]))
    first, last = found.baselines["always"][0], found.baselines["always"][-1]
    assert half.compute == pytest.approx((first.compute + last.compute) / 2)
    assert half.score == pytest.approx((first.score + last.score) / 2)
    ends = [found.baselines["random"][i] for i in (0, 10)]
    for end, always in zip(ends, (first, last), strict=True):
        assert end.decided == pytest.approx(always.decided) and end.compute == pytest.approx(always.compute)
