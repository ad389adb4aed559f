"""What a deployment does, from sums and without simulating: the search of `sim/plan.py` asks this of every candidate.

R requests are drawn from the load, with what the branches say along their N tokens. Thresholds decide token t of a
request r at exit at[t], the shallowest that is sure. Stages i = 0 … m-1 are those of the exits, cut over nodes k that
there are count_k of. Then

    asked_i   = tokens with at >= i;  reach_i = asked_i / N
    rows_i    = positions that stage i takes in a step: those up to the last one asked in each answer, over asked_i
    opened_ri = whether any token of r is decided at i or deeper: only then stage i sees r at all
    prompt_ri = seconds of r's prompt in stage i, in steps of at most limits.max_step_positions; 0 unless opened
    step_i(b) = seconds of a step of b sessions with rows_i each (`sim/profile.py`), times reach_i / reach of the
                node's first stage as to b

With `rate` requests a second of T = N / R tokens each, and sums over its stages, each of the nodes k has

    U_k = rate / count_k * mean over r of sum(prompt_ri)               busy with prompts
    b_k = max(1, rate / count_k * T * sum(reach_i step_i(b_k)) / (1 - U_k))
                                                                       sessions of a step: what came during the last one
    V_k = U_k + rate / count_k * T * sum(reach_i step_i(b_k) / b_k)    busy, at most 1
    w_i = (U_k chunk_k + (V_k - U_k) step_i(b_k)) / 2                  wait for the rest of the step under way
    q_k = rate / count_k * mean over r of sum(prompt_ri)^2 / (2 (1 - U_k))
                                                                       a prompt's wait for prompts: M/G/1 (Pollaczek
                                                                       and Khinchine)

where chunk_k is a prompt step's mean time. Too much is: U_k of 1; a b_k above limits.max_sessions; more sessions or
positions open at once than the limits allow (Little's law); a link's load of 1. A link takes, for a question of s bytes
(rows_i states of the next stage, headers) and an answer of d bytes,

    h = round trip + 2 jitter sqrt(2 / pi) + exchange_s + exchange_byte_s s + s / up / (1 - its load) + d / down
        + the chance that a segment is lost, times the retransmission timer

so a token that is decided at i takes delay_i, the sum of step_j + w_j over stages j <= i and of h over links crossed.
Of a request of n tokens,

    first = request_s + client_ms + sum over what it takes to decide the first one: prompt_ri + w_i, q_k, h and the
            prompt's bytes / up
    token = (sum of delay over the other tokens + the prompt's share of what they open) / (n - 1)

and percentiles are over requests. Left out are drafts (where the way is long, a policy that drafts is faster than this,
and sends a little more), cores that nodes share, bursts and outages.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ruyi_flow.errors import ConfigError
from ruyi_flow.routing.calibration import path
from ruyi_flow.routing.trace import Header, Trace
from ruyi_flow.sim.behaviour import Recorded, Scripts
from ruyi_flow.sim.load import Conversation, Lengthy, conversations, turns
from ruyi_flow.sim.profile import Profile, StepCost
from ruyi_flow.sim.scenario import Scenario

__all__ = ["Estimate", "Samples"]

_REQUESTS, _TOKENS = 300, 12_000
"""Drawn, at the most."""

_SEGMENT, _LEAST_RTO_S = 1448, 0.2
"""As in `sim/link.py`."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Samples:
    """R requests of a load, and what the branches say along their N tokens."""

    exits: tuple[int, ...]
    prompts: NDArray[np.int64]
    """(R,)"""
    answers: NDArray[np.int64]
    """(R,)"""
    sure: Mapping[int, Floats]
    """By early exit: (N,)"""
    agrees: Mapping[int, NDArray[np.bool_]]
    """By early exit: (N,) whether its token is the last exit's."""
    rate: float
    """Requests a second; 0 for users who each ask again as soon as they have an answer."""

    @classmethod
    def draw(cls, scenario: Scenario, scripts: Scripts, where: str) -> Samples:
        """From a scenario's load.

        Raises:
            ConfigError: nobody asks anything, or the file to replay is not one.
        """
        load, source = scenario.workload, random.Random(f"{scenario.seed}/plan")
        prompts, answers = Lengthy(load.prompts, source), Lengthy(load.answers, source)
        recorded = scripts if isinstance(scripts, Recorded) else None
        closed = load.arrivals.kind == "closed"
        users = (Conversation(0.0, 0, turns(load, source)) for _ in itertools.count())
        asked: list[tuple[int, int]] = []
        tokens, last = 0, 0.0
        for one in users if closed else conversations(load, scenario.nodes[0].count, source, where):
            said, last = 0, one.at_s
            for _ in range(one.turns):
                number = len(asked)
                question = one.prompt_tokens or prompts.draw(recorded.prompt(number) if recorded else 0)
                answer = one.answer_tokens or answers.draw(recorded.answer(number) if recorded else 0)
                asked.append((said + question, answer))
                said, tokens = said + question + answer, tokens + answer
            if len(asked) >= _REQUESTS or tokens >= _TOKENS:
                break
        if not asked:
            raise ConfigError(f"{where}: load: nobody asks anything; let it go on for longer")
        exits = scenario.all_exits
        said_at: dict[int, list[NDArray[np.int64]]] = {p: [] for p in exits}
        sure_at: dict[int, list[Floats]] = {p: [] for p in exits}
        for number, (_, answer) in enumerate(asked):
            looks = scripts.script(number, answer).looks
            for p in exits:
                tokens_there, sure_there = zip(*looks[p], strict=True)
                said_at[p].append(np.resize(np.array(tokens_there), answer))
                sure_at[p].append(np.resize(np.array(sure_there, float), answer))
        words = {p: np.concatenate(found) for p, found in said_at.items()}
        rate = load.arrivals.rate * load.turns.mean
        if load.arrivals.kind == "replay":
            rate = len(asked) / max(last, 1e-9)
        return cls(
            exits,
            np.array([prompt for prompt, _ in asked]),
            np.array([answer for _, answer in asked]),
            {p: np.concatenate(sure_at[p]) for p in exits[:-1]},
            {p: words[p] == words[exits[-1]] for p in exits[:-1]},
            0.0 if closed else rate,
        )


class Estimate:
    """A scenario's nodes and links, for any thresholds.

    Args:
        scenario: with the cut in question.
        profiles: of its nodes.
        samples: of its load.
    """

    def __init__(self, scenario: Scenario, profiles: Sequence[Profile], samples: Samples) -> None:
        self._scenario, self._profiles, self._samples = scenario, profiles, samples
        self._node = [k for k, node in enumerate(scenario.nodes) for _ in node.exits]
        """By stage."""
        self._costs = [
            StepCost(profile.stage(p), profile.step_s, 1 / node.speed)
            for node, profile in zip(scenario.nodes, profiles, strict=True)
            for p in node.exits
        ]
        ends = np.cumsum(samples.answers)
        self._starts = ends - samples.answers
        self._index = np.arange(len(ends) and int(ends[-1])) - np.repeat(self._starts, samples.answers)
        self._context = float((np.repeat(samples.prompts, samples.answers) + self._index).mean())
        self._deepest = min(
            (samples.exits.index(d) for node in scenario.nodes if (d := node.limits.deepest) is not None),
            default=len(samples.exits) - 1,
        )
        self._prompt_s: dict[tuple[int, bool], Floats] = {}

    def thresholds(self, prices: int) -> list[dict[int, float]]:
        """Thresholds from timid to bold, that decide as cheaply as can be (in time, without load) at so many prices of
        a differing token.
        """
        samples, exits = self._samples, self._samples.exits
        early = exits[:-1]
        if not early:
            return [{}]
        delay, steps = 0.0, []
        for i in range(len(exits)):
            if i and self._node[i] != self._node[i - 1]:
                delay += self._hop(self._node[i - 1], 1.0, 0.0)
            delay += self._step(i, 1.0, 1.0, True)
            steps.append(delay)
        header = Header("", "", exits, 1, "", 1, "", (), ())
        prompt = np.repeat(np.arange(len(samples.answers)), samples.answers)
        trace = Trace(header, prompt, dict(samples.agrees), {}, ())
        found = path(trace, samples.sure, dict(zip(exits, steps, strict=True)), prices=prices)
        rounded = [{p: round(t, 4) for p, t in thresholds.items()} for thresholds in found]
        ends = [dict.fromkeys(early, 1.1), dict.fromkeys(early, 0.0)]
        return [*{tuple(t.values()): t for t in [ends[0], *rounded, ends[1]]}.values()]

    def metrics(self, thresholds: Mapping[int, float]) -> dict[str, Any]:
        """Figures as a simulation's, those of them that can be told; infinite where the load is too much.

        Args:
            thresholds: of every early exit.
        """
        samples = self._samples
        at = np.full(len(self._index), len(samples.exits) - 1)
        for i, p in reversed([*enumerate(samples.exits[:-1])]):
            at[samples.sure[p] >= thresholds[p]] = i
        at = np.minimum(at, self._deepest)
        looks = [i == self._deepest or thresholds.get(p, 0.0) <= 1.0 for i, p in enumerate(samples.exits)]
        if samples.rate:
            return self._at(samples.rate, at, looks)
        load = self._scenario.workload
        users, think_s = load.arrivals.users, load.turns.think_s
        low, high = 0.0, users / (self._at(1e-9, at, looks)["total_s"]["mean"] + think_s)
        for _ in range(30):  # users = rate * (time of an answer + thought), which grows with the rate
            middle = (low + high) / 2
            there = middle * (self._at(middle, at, looks)["total_s"]["mean"] + think_s)
            low, high = (middle, high) if there < users else (low, middle)
        return self._at(low, at, looks)

    def _at(self, rate: float, at: NDArray[np.int64], looks: Sequence[bool]) -> dict[str, Any]:
        """At a load of so many requests a second; see the module."""
        samples, nodes, stages = self._samples, self._scenario.nodes, range(len(self._node))
        lengths, requests, tokens = samples.answers, len(samples.answers), len(at)
        mean_tokens, first_at = tokens / requests, at[self._starts]
        asked = [float((at >= i).sum()) for i in stages]
        last = [np.maximum.reduceat(np.where(at >= i, self._index + 1, 0), self._starts) for i in stages]
        rows = [float(last[i].sum()) / max(1.0, asked[i]) for i in stages]
        prompt_s = [np.where(last[i] > 0, self._prompts(i, looks[i]), 0.0) for i in stages]
        step, wait, queue = [0.0] * len(stages), [0.0] * len(stages), [0.0] * len(nodes)
        joules = dollars = sent = 0.0
        for k, node in enumerate(nodes):
            mine = [i for i in stages if self._node[i] == k]
            prompts = sum((prompt_s[i] for i in mine), np.zeros(requests))
            here, reached = rate / node.count, max(1e-12, asked[mine[0]])
            by_prompts = here * float(prompts.mean())
            if by_prompts >= 1:
                return _overloaded()
            batch, most = 1.0, float(node.limits.max_sessions)
            for _ in range(60):
                step = [
                    self._step(i, rows[i], max(1.0, batch * asked[i] / reached), looks[i]) if i in mine else step[i]
                    for i in stages
                ]
                wanted = here * mean_tokens * sum(asked[i] / tokens * step[i] for i in mine) / (1 - by_prompts)
                if wanted > most and batch == most:
                    return _overloaded()
                batch = min(most, max(1.0, (batch + wanted) / 2 if wanted > 1 else 1.0))
            a_token = sum(asked[i] / tokens * step[i] / max(1.0, batch * asked[i] / reached) for i in mine)
            busy = min(1.0, by_prompts + here * mean_tokens * a_token)
            chunks = np.ceil(samples.prompts / node.limits.max_step_positions) * len(mine)
            chunk = float(prompts.sum()) / float(chunks.sum())
            for i in mine:
                wait[i] = (by_prompts * chunk + (busy - by_prompts) * step[i]) / 2
            queue[k] = here * float((prompts**2).mean()) / (2 * (1 - by_prompts))
            seconds = a_token + float(prompts.mean()) / mean_tokens
            alive = node.count / (rate * mean_tokens)
            joules += seconds * (node.busy_w or 0.0) + max(0.0, alive - seconds) * (node.idle_w or 0.0)
            dollars += alive / 3600 * (node.price_per_hour or 0.0)
        delay, delays, first = 0.0, [], np.full(requests, self._profiles[0].request_s + self._scenario.client_ms / 1000)
        later = np.zeros(requests)
        for i in stages:
            opens, at_once = last[i] > 0, first_at >= i
            extra = np.where(opens, prompt_s[i], 0.0)
            k = self._node[i]
            if i == 0 or k != self._node[i - 1]:
                extra = extra + np.where(opens, queue[k], 0.0)
            if i and k != self._node[i - 1]:
                link, profile = self._scenario.link_after(k - 1), self._profiles[k - 1]
                assert link is not None
                each = link.encoding.row_bytes(profile.hidden_size) + profile.position_bytes
                opening = np.where(opens, profile.open_bytes + samples.prompts * each, 0)
                up = (profile.up_bytes * asked[i] + each * float(last[i].sum()) + float(opening.sum())) / tokens
                down = (profile.down_bytes + profile.decision_bytes) * asked[i] / tokens
                sharing = nodes[k - 1].count / nodes[k].count if link.shared else 1.0
                carried = 0.0 if link.up_mbit is None else up / (link.up_mbit * 125_000)
                load = rate / nodes[k - 1].count * sharing * mean_tokens * carried
                if load >= 1:
                    return _overloaded()
                hop = self._hop(k - 1, rows[i], load)
                delay += hop
                extra = extra + opening * (profile.exchange_byte_s + _seconds(1, link.up_mbit) / (1 - load))
                first = first + np.where(at_once, hop, 0.0)
                sent += up
                joules += link.joules_per_mb * (up + down) / 1e6
                dollars += link.price_per_gb * (up + down) / 1e9
            delay += step[i] + wait[i]
            delays.append(delay)
            first = first + np.where(at_once, extra + wait[i], 0.0)
            later = later + np.where(at_once, 0.0, extra)
        each_token = np.array(delays)[at]
        others = np.add.reduceat(each_token, self._starts) - each_token[self._starts] + later
        token = (others / np.maximum(1, lengths - 1))[lengths > 1]
        total = first + np.where(lengths > 1, others, 0.0)
        for k, node in enumerate(nodes):
            opens = last[self._node.index(k)] > 0
            there = rate / node.count * np.where(opens, total, 0.0)  # Little's law
            positions = there * (samples.prompts + lengths)
            if there.mean() > node.limits.max_sessions or positions.mean() > node.limits.max_positions:
                return _overloaded()
        agreed = np.ones(tokens, bool)
        for i, p in enumerate(samples.exits[:-1]):
            agreed = np.where(at == i, samples.agrees[p], agreed)
        return {
            "first_token_s": _figures(first),
            "token_s": _figures(token),
            "total_s": _figures(total),
            "tokens_per_s": rate * mean_tokens,
            "agreement": float(agreed.mean()),
            "bytes_up_per_token": sent,
            "joules_per_token": joules,
            "usd_per_million_tokens": 1e6 * dollars,
            "requests": 1,
            "failed": 0,
        }

    def _step(self, stage: int, rows: float, sessions: float, looks: bool) -> float:
        """Seconds of a step of so many sessions, with so many rows each."""
        read = max(1, round(sessions))
        count = max(read, round(rows * sessions))
        attended = count * self._context
        return self._costs[stage].of(count, attended, read, count if looks else 0, attended, read)

    def _prompts(self, stage: int, looks: bool) -> Floats:
        """(R,) seconds of each prompt."""
        if (stage, looks) not in self._prompt_s:
            most = self._scenario.nodes[self._node[stage]].limits.max_step_positions
            cost = self._costs[stage]

            def of(length: int) -> float:
                total = 0.0
                for start in range(0, length, most):
                    rows = min(most, length - start)
                    attended = rows * (start + rows / 2)
                    total += cost.of(rows, attended, 1, rows if looks else 0, attended, 1)
                return total

            known = {length: of(length) for length in set(self._samples.prompts.tolist())}
            self._prompt_s[stage, looks] = np.array([known[length] for length in self._samples.prompts.tolist()])
        return self._prompt_s[stage, looks]

    def _hop(self, node: int, rows: float, load: float) -> float:
        """Seconds that a question with so many rows and its answer take on a node's link, at that load of the link."""
        link, profile = self._scenario.link_after(node), self._profiles[node]
        assert link is not None
        each = link.encoding.row_bytes(profile.hidden_size) + profile.position_bytes
        size, trip = profile.up_bytes + rows * each, link.round_trip_ms / 1000
        back = profile.down_bytes + profile.decision_bytes
        segments = math.ceil(size / _SEGMENT) + math.ceil(back / _SEGMENT)
        lost = (1 - (1 - link.loss) ** segments) * max(_LEAST_RTO_S, 2 * trip)
        moving = _seconds(size, link.up_mbit) / (1 - load) + _seconds(back, link.down_mbit)
        jitter = 2 * link.jitter_ms / 1000 * math.sqrt(2 / math.pi)
        return trip + jitter + profile.exchange_s + profile.exchange_byte_s * size + moving + lost


def _seconds(count: float, mbit: float | None) -> float:
    return 0.0 if mbit is None else count / (mbit * 125_000)


def _figures(values: Floats) -> dict[str, float]:
    if not len(values):
        return dict.fromkeys(("mean", "p50", "p90", "p95", "p99"), 0.0)
    return {"mean": float(values.mean())} | {f"p{q}": float(np.percentile(values, q)) for q in (50, 90, 95, 99)}


def _overloaded() -> dict[str, Any]:
    """More comes than is answered, so that times grow without end."""
    times = dict.fromkeys(("mean", "p50", "p90", "p95", "p99"), math.inf)
    costs = dict.fromkeys(("bytes_up_per_token", "joules_per_token", "usd_per_million_tokens"), math.inf)
    spans = {name: times for name in ("first_token_s", "token_s", "total_s")}
    return {**spans, **costs, "tokens_per_s": 0.0, "agreement": 0.0, "requests": 1, "failed": 1}
