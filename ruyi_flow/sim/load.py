"""Conversations drawn from a scenario's load: when they begin, on which device, with how many tokens."""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ruyi_flow.errors import ConfigError
from ruyi_flow.sim.scenario import Arrivals, Lengths, Load

__all__ = ["Conversation", "TokenCounts", "conversations", "draw_turns"]


@dataclass(frozen=True, slots=True)
class Conversation:
    """The beginning of a user's conversation. Numbers that are 0 are drawn later."""

    at_s: float
    """Second of the first question."""
    device: int
    turns: int
    prompt_tokens: int = 0
    answer_tokens: int = 0


class TokenCounts:
    """A distribution from which numbers of tokens are drawn."""

    def __init__(self, lengths: Lengths) -> None:
        self._lengths = lengths

    def draw(self, recorded: int, source: random.Random) -> int:
        """Draw a number of tokens; `recorded` is the trace's number."""
        lengths = self._lengths
        if lengths.kind == "constant":
            return lengths.tokens
        if lengths.kind == "uniform":
            return source.randint(lengths.low, lengths.high)
        if lengths.kind == "lognormal":
            drawn = source.lognormvariate(math.log(lengths.median), lengths.sigma)
            return max(1, min(lengths.most, round(drawn)))
        return max(1, min(lengths.most, recorded))

    def least(self, recorded: int) -> int:
        """Return the fewest tokens that can be drawn; `recorded` is the trace's fewest."""
        lengths = self._lengths
        fewest = {"constant": lengths.tokens, "uniform": lengths.low, "lognormal": 1}
        return fewest.get(lengths.kind, max(1, min(lengths.most, recorded)))


def conversations(load: Load, devices: int, source: random.Random, where: str) -> Iterable[Conversation]:
    """Return conversations in order of their beginning: a list for a replay, otherwise endless or up to `duration_s`.

    Args:
        load: the scenario's load.
        devices: number of devices; each conversation is on one of them, drawn uniformly.
        source: source of random numbers.
        where: name of the scenario's file, for error messages.

    Raises:
        ConfigError: the file to replay cannot be read, is malformed, or has nothing to replay.
    """
    return _replayed(load, devices, where) if load.arrivals.kind == "replay" else _drawn(load, devices, source)


def _drawn(load: Load, devices: int, source: random.Random) -> Iterator[Conversation]:
    now = 0.0
    for gap in _gaps(load.arrivals, source):
        now += gap
        if load.duration_s is not None and now > load.duration_s:
            return
        yield Conversation(now, source.randrange(devices), 0)


def draw_turns(load: Load, source: random.Random) -> int:
    """Draw the number of questions of a conversation, from a geometric distribution."""
    mean = load.turns.mean
    if mean <= 1:
        return 1
    return 1 + int(math.log(1 - source.random()) / math.log(1 - 1 / mean))


def _gaps(arrivals: Arrivals, source: random.Random) -> Iterator[float]:
    """Yield the seconds between arrivals."""
    rate = arrivals.rate
    if arrivals.kind == "even":
        while True:
            yield 1 / rate
    if arrivals.kind == "poisson":
        while True:
            yield source.expovariate(rate)
    if arrivals.kind == "diurnal":
        # Thinning (Lewis and Shedler 1979): draw arrivals at the highest rate, keep the present rate's share of them.
        highest, swing = rate * arrivals.peak_factor, arrivals.peak_factor - 1
        now = last = 0.0
        while True:
            now += source.expovariate(highest)
            here = rate * (1 - swing * math.cos(2 * math.pi * now / arrivals.period_s))
            if source.random() * highest < here:
                yield now - last
                last = now
    share = arrivals.burst_s / (arrivals.burst_s + arrivals.calm_s)
    calm = rate / (1 - share + share * arrivals.busy_factor)
    rates, stays, state = (calm, calm * arrivals.busy_factor), (arrivals.calm_s, arrivals.burst_s), 0
    left, gap = source.expovariate(1 / stays[0]), 0.0
    while True:  # memoryless: when the state changes, the rest of the gap is drawn anew
        step = source.expovariate(rates[state])
        if step < left:
            left -= step
            yield gap + step
            gap = 0.0
        else:
            gap += left
            state = 1 - state
            left = source.expovariate(1 / stays[state])


def _replayed(load: Load, devices: int, where: str) -> list[Conversation]:
    file, found = load.arrivals.file, list[Conversation]()
    assert file is not None
    key = f"{where}: load.arrivals.file"
    most_s = math.inf if load.duration_s is None else load.duration_s
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            rows = csv.DictReader(lines)
            if "at_s" not in (rows.fieldnames or ()):
                raise ConfigError(f"{key}: {file} has no column at_s, only {rows.fieldnames}; add it")
            last = 0.0
            for number, row in enumerate(rows):
                here = f"{key}: {file}, line {rows.line_num}"
                try:
                    at = float(row["at_s"])
                    prompt, answer = int(row.get("prompt_tokens") or 0), int(row.get("answer_tokens") or 0)
                    device = int(row.get("device") or number % devices)
                except (TypeError, ValueError) as error:
                    raise ConfigError(f"{here}: {error}") from None
                if not last <= at < math.inf or prompt < 0 or answer < 0:
                    raise ConfigError(f"{here}: at_s must ascend from 0, and numbers of tokens must be 0 or more")
                if not 0 <= device < devices:
                    raise ConfigError(
                        f"{here}: device {device} does not exist: nodes.0.count is {devices}, counted from 0"
                    )
                last = at
                if at <= most_s:
                    found.append(Conversation(at, device, 1, prompt, answer))
    except OSError as error:
        raise ConfigError(f"{key}: {file} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{key}: {file} cannot be read as CSV: {error}") from None
    if not found:
        raise ConfigError(
            f"{key}: {file} has no row to replay{'' if most_s == math.inf else ' within load.duration_s'}"
        )
    return found
