"""Arrivals, conversations and numbers of tokens of a load, and replays."""

from __future__ import annotations

import math
import random
import statistics
from itertools import islice
from pathlib import Path

import pytest

from ruyi_flow.errors import ConfigError
from ruyi_flow.sim.load import Conversation, TokenCounts, conversations, draw_turns
from ruyi_flow.sim.scenario import Arrivals, Lengths, Load, Turns

SIGMAS = 4
"""Largest allowed distance of a statistic from its expectation, in standard deviations."""


def times(seconds: float, **arrivals: object) -> list[float]:
    load = Load(arrivals=Arrivals.model_validate(arrivals), duration_s=seconds)
    found = [one.at_s for one in conversations(load, 7, random.Random(5), "x.yaml")]
    assert found == sorted(found) and 0 < found[0] and found[-1] <= seconds
    return found


def dispersion(found: list[float], window: float, seconds: float) -> float:
    """Return variance / mean of the number of arrivals per window; 1 for a Poisson process."""
    counts = [0] * int(seconds / window)
    for at in found:
        counts[min(len(counts) - 1, int(at / window))] += 1
    return statistics.variance(counts) / statistics.fmean(counts)


def test_even_arrivals_are_even() -> None:
    assert times(10, kind="even", rate=4) == pytest.approx([i / 4 for i in range(1, 41)])


def test_poisson_arrivals_have_their_rate_and_no_memory() -> None:
    found = times(20_000, kind="poisson", rate=2)
    assert abs(len(found) - 40_000) < SIGMAS * math.sqrt(40_000)
    windows = 20_000 / 20
    assert abs(dispersion(found, 20, 20_000) - 1) < SIGMAS * math.sqrt(2 / windows)
    gaps = [b - a for a, b in zip(found, found[1:], strict=False)]
    assert statistics.stdev(gaps) / statistics.fmean(gaps) == pytest.approx(1, abs=0.03)


def test_bursty_arrivals_have_their_rate_and_come_in_bursts() -> None:
    seconds, rate, factor, burst, calm = 50_000.0, 2.0, 8.0, 10.0, 40.0
    found = times(seconds, kind="bursty", rate=rate, busy_factor=factor, burst_s=burst, calm_s=calm)
    share = burst / (burst + calm)
    low = rate / (1 - share + share * factor)
    # The index of dispersion of a two-state process over a long time (Fischer and Meier-Hellstern 1993).
    leave_calm, leave_burst = 1 / calm, 1 / burst
    spread = 1 + 2 * (low * factor - low) ** 2 * leave_calm * leave_burst / (
        (leave_calm + leave_burst) ** 2 * (low * leave_burst + low * factor * leave_calm)
    )
    assert abs(len(found) - rate * seconds) < SIGMAS * math.sqrt(spread * rate * seconds)
    assert spread > 10
    windows = seconds / 500
    assert abs(dispersion(found, 500, seconds) / spread - 1) < SIGMAS * math.sqrt(2 / windows)
    assert dispersion(found, 5, seconds) > 2


def test_a_burst_that_is_no_faster_is_poisson() -> None:
    found = times(20_000, kind="bursty", rate=2, busy_factor=1)
    assert abs(len(found) - 40_000) < SIGMAS * math.sqrt(40_000)
    assert abs(dispersion(found, 20, 20_000) - 1) < SIGMAS * math.sqrt(2 / 1000)


@pytest.mark.parametrize("peak", [1.0, 1.5, 2.0])
def test_a_days_arrivals_have_their_rate_and_peak_at_noon(peak: float) -> None:
    day, days, rate = 1000.0, 20, 2.0
    found = times(day * days, kind="diurnal", rate=rate, peak_factor=peak, period_s=day)
    expected = rate * day * days
    assert abs(len(found) - expected) < SIGMAS * math.sqrt(expected)
    around_noon = sum(0.25 <= at % day / day < 0.75 for at in found)
    share = 0.5 + (peak - 1) / math.pi  # the integral of the sine over that half
    assert abs(around_noon - share * len(found)) < SIGMAS * math.sqrt(len(found) * share * (1 - share))


def test_conversations_are_on_all_devices_alike_and_the_same_for_a_seed() -> None:
    load = Load(arrivals=Arrivals(rate=1), turns=Turns(mean=3), requests=1)
    first = list(islice(conversations(load, 4, random.Random(1), "x.yaml"), 8000))
    assert first == list(islice(conversations(load, 4, random.Random(1), "x.yaml"), 8000))
    assert first != list(islice(conversations(load, 4, random.Random(2), "x.yaml"), 8000))
    for device in range(4):
        assert abs(sum(c.device == device for c in first) - 2000) < SIGMAS * math.sqrt(8000 * 0.25 * 0.75)


@pytest.mark.parametrize("mean", [1.0, 1.3, 5.0])
def test_turns_are_geometric(mean: float) -> None:
    load, source = Load(turns=Turns(mean=mean), requests=1), random.Random(0)
    drawn = [draw_turns(load, source) for _ in range(20_000)]
    assert min(drawn) == 1
    spread = math.sqrt(mean * (mean - 1))
    assert abs(statistics.fmean(drawn) - mean) <= SIGMAS * spread / math.sqrt(20_000)
    assert abs(statistics.pstdev(drawn) - spread) <= 0.05 * spread


def test_lengths_are_of_their_distribution() -> None:
    def draw(**lengths: object) -> list[int]:
        counts, source = TokenCounts(Lengths.model_validate(lengths)), random.Random(3)
        return [counts.draw(77, source) for _ in range(5000)]

    assert set(draw(kind="constant", tokens=9)) == {9}
    assert set(draw(kind="uniform", low=3, high=6)) == {3, 4, 5, 6}
    assert set(draw(kind="trace")) == {77} and set(draw(kind="trace", most=50)) == {50}
    drawn = draw(kind="lognormal", median=64, sigma=0.7, most=300)
    assert min(drawn) >= 1 and max(drawn) == 300
    logs = statistics.fmean(math.log(n) < math.log(64) for n in drawn)
    assert abs(logs - 0.5) < SIGMAS * 0.5 / math.sqrt(5000) + 0.01  # whole tokens
    inside = statistics.fmean(abs(math.log(n / 64)) < 0.7 for n in drawn)
    assert abs(inside - 0.683) < SIGMAS * 0.465 / math.sqrt(5000) + 0.01
    assert set(draw(kind="lognormal", median=1, sigma=0)) == {1}


def replay(file: Path, devices: int = 3, duration_s: float | None = None) -> list[Conversation]:
    load = Load(arrivals=Arrivals(kind="replay", file=file), duration_s=duration_s)
    return list(conversations(load, devices, random.Random(0), "x.yaml"))


def test_a_replay_is_what_its_file_says(tmp_path: Path) -> None:
    file = tmp_path / "log.csv"
    file.write_text("user,at_s,prompt_tokens,answer_tokens,device\nann,0.5,12,30,1\nbob,0.5,,,\nann,2,7,0,1\n")
    assert replay(file) == [
        Conversation(0.5, 1, 1, 12, 30),
        Conversation(0.5, 1, 1, 0, 0),
        Conversation(2.0, 1, 1, 7, 0),
    ]
    file.write_text("at_s\n1\n2\n3\n4\n")
    assert [(c.at_s, c.device) for c in replay(file)] == [(1, 0), (2, 1), (3, 2), (4, 0)]
    assert [c.at_s for c in replay(file, duration_s=2.5)] == [1, 2]
    file.write_text("at_s\n7\n", encoding="utf-8-sig")  # as spreadsheets write it
    assert replay(file) == [Conversation(7.0, 0, 1)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column at_s"),
        ("time\n1\n", "no column at_s, only ['time']"),
        ("at_s\nsoon\n", "line 2: could not convert"),
        ("at_s,prompt_tokens\n1,3\n2,many\n", "line 3: invalid literal"),
        ("at_s\n3\n2\n", "line 3: at_s must ascend"),
        ("at_s\n-1\n", "line 2: at_s must ascend"),
        ("at_s\ninf\n", "line 2: at_s must ascend"),
        ("at_s\nnan\n", "line 2: at_s must ascend"),
        ("at_s,device\n1,0\n1,2\n2,3\n", "line 4: device 3 does not exist: nodes.0.count is 3"),
        ("at_s,device\n1,-1\n", "line 2: device -1 does not exist"),
        ("at_s\n", "has no row to replay"),
        ("at_s,answer_tokens\n1,-4\n", "line 2: at_s must ascend from 0, and numbers of tokens must be 0 or more"),
    ],
)
def test_a_file_that_cannot_be_replayed_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "log.csv"
    file.write_text(text)
    with pytest.raises(ConfigError) as refused:
        replay(file)
    assert message in str(refused.value) and str(refused.value).startswith(f"x.yaml: load.arrivals.file: {file}")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"x\.yaml: load\.arrivals\.file: .*none\.csv cannot be read: No such file"):
        replay(tmp_path / "none.csv")
    for content in (b"at_s\n\xff\xfe\n", b"at_s\n" + 200_000 * b"1"):
        (tmp_path / "bytes.csv").write_bytes(content)
        with pytest.raises(ConfigError, match=r"x\.yaml: load\.arrivals\.file: .*bytes\.csv cannot be read as CSV: "):
            replay(tmp_path / "bytes.csv")
