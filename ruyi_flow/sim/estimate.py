"""What a deployment does, from sums and without simulating: the search of `sim/plan.py` asks this of every candidate.

R requests are drawn from the load, with what the branches say along their N tokens. Thresholds decide a token at the
shallowest exit that is sure. An answer goes in rounds: a sure token of the first branch is one; else `draft` tokens are
drafted past the unsure one, the deeper stages are asked down to the deepest that any settled token needs, and what is
settled is 1 token and as many more as the first branch had right in a row before. Stages i = 0 … m-1 are those of the
exits, cut over nodes k that there are count_k of. With sums over a node's stages,

    asked_i   = steps of stage i over all rounds; reach_i = asked_i / N
    rows_i    = positions in such a step: what is drafted in vain, and every position up to the last one asked, once
    opened_ri = whether request r ever asks stage i: only then it sees r at all
    prompt_ri = seconds of r's prompt in stage i, in steps of at most limits.max_step_positions; 0 unless opened
    step_i(b) = seconds of a step of b reach_i / reach_(node's first) sessions, rows_i each (`sim/profile.py`)

With `rate` requests a second of T = N / R tokens each, a node k has

    U_k = rate / count_k * mean over r of sum(prompt_ri)               busy with prompts
    b_k = max(1, rate / count_k * T * sum(reach_i step_i(b_k)) / (1 - U_k))
                                                                       sessions of a step: what came during the last one
    V_k = U_k + rate / count_k * T * sum(reach_i step_i(b_k) / b_k)    busy, at most 1
    w_i = (U_k chunk_k + (V_k - U_k) step_i(b_k)) / 2                  wait for the rest of the step under way
    q_k = step_s + rate / count_k * mean over r of sum(prompt_ri)^2 / (2 (1 - U_k))
                                                                       a prompt's wait for prompts: M/G/1 (Pollaczek
                                                                       and Khinchine)

where chunk_k is a prompt step's mean time. Too much is: U_k of 1; a b_k above limits.max_sessions; more sessions or
positions open at once than the limits allow (Little's law); a link's load of 1. A link takes, for a question of s bytes
(rows_i states of the next stage, headers) and an answer of d bytes,

    h = round trip + 2 jitter sqrt(2 / pi) + exchange_s + exchange_byte_s s + s / up / (1 - its load) + d / down
        + the chance that a segment is lost, times the retransmission timer

so a round takes round_s + (its drafts + 1) (step_0 + w_0) + the sum of step_i + w_i over the deeper stages asked and of
h over the links crossed. Of a request of n tokens,

    first = request_s + client_ms + its first round, where each stage that is asked takes prompt_ri + q_k for step_i,
            and each link crossed prompt's bytes / up more
    token = (the other rounds + the prompt's part in what they open) / (n - 1)

and percentiles are over requests. Where a session opens it may wait for room: with c = limits.max_sessions, and a mean
of a sessions there for S seconds each, for longer than t with the chance C(c, a) exp(-(c - a) t / S) (M/M/c, Erlang).
Requests stand at random places in that distribution; those past limits.max_wait_s fail. All of it is a load that
goes on for good: a short simulation has a beginning with fewer sessions, and an end that is paid for as well.

Left out are: a draft's length where a policy file lets it vary, drafting while an answer is awaited, long prompts that
go in parts, states that go up ahead of a question, rounds that are not brief, cores that nodes share, bursts and
outages.
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

from ruyi_flow.calibration.thresholds import Replay
from ruyi_flow.calibration.trace import Header, Trace
from ruyi_flow.errors import ConfigError
from ruyi_flow.sim.behaviour import Recorded, Scripts
from ruyi_flow.sim.costs import rates
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
        prompts, answers = Lengthy(load.prompts), Lengthy(load.answers)
        recorded = scripts if isinstance(scripts, Recorded) else None
        closed = load.arrivals.kind == "closed"
        users = (Conversation(0.0, 0, 0) for _ in itertools.count())
        asked: list[tuple[int, int]] = []
        tokens, last = 0, 0.0
        for one in users if closed else conversations(load, scenario.nodes[0].count, source, where):
            said, last = 0, one.at_s
            for _ in range(one.turns or turns(load, source)):
                number = len(asked)
                question = one.prompt_tokens or prompts.draw(recorded.prompt(number) if recorded else 0, source)
                answer = one.answer_tokens or answers.draw(recorded.answer(number) if recorded else 0, source)
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


@dataclass(frozen=True, slots=True)
class _Rounds:
    """J rounds that settle the N tokens of R requests over m stages, in order."""

    first: NDArray[np.int64]
    """(R,) each request's first one."""
    depth: NDArray[np.int64]
    """(J,) the deepest stage that is asked."""
    drafted: NDArray[np.int64]
    """(J,) steps of the first stage."""
    asked: Floats
    """(m,) steps of each stage."""
    rows: Floats
    """(m,) positions in each of them, prompts left out."""
    wants: Floats
    """(m,) those of them that its branch reads."""
    last: NDArray[np.int64]
    """(m, R) positions of each answer that a stage has seen in the end; 0 where it is never asked."""

    @classmethod
    def of(
        cls,
        at: NDArray[np.int64],
        right: NDArray[np.bool_],
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        draft: int,
        stages: int,
    ) -> _Rounds:
        """Follow the answers.

        Args:
            at: (N,) the stage that decides each token.
            right: (N,) whether the first branch's token is the one that is decided.
            starts, lengths: (R,) of the answers.
        """
        n, every = len(at), np.arange(len(at))
        ends = np.repeat(starts + lengths, lengths)
        width = np.where(at == 0, 1, np.minimum(1 + draft, ends - every))
        wrong = np.append(np.flatnonzero(~right), n)
        until = wrong[np.searchsorted(wrong, every)]  # of each token, the next one that the first branch has wrong
        settled = np.minimum(width, until - every + 1)
        begins, here = np.zeros(n, bool), starts
        while len(here):
            begins[here] = True
            after = here + settled[here]
            here = after[after < ends[here]]
        rounds = np.flatnonzero(begins)
        depth = np.maximum.reduceat(at, rounds)
        first = np.searchsorted(rounds, starts)
        start, end = np.repeat(starts, lengths)[rounds], rounds + settled[rounds] - 1
        asked, rows, wants, last = np.zeros(stages), np.ones(stages), np.ones(stages), [lengths]
        asked[0] = float(width[rounds].sum())
        for i in range(1, stages):
            deep = depth >= i
            # A contradiction that a shallower stage is sure of leaves what was drafted after it unasked.
            until_here = np.where(~right[end] & (at[end] < i), end, rounds + width[rounds] - 1)
            unsure = at >= i
            final = np.maximum.accumulate(np.where(unsure, every, -1))[until_here]
            seen = np.maximum.reduceat(np.where(deep, np.minimum(final, end) - start + 1, 0), first)
            last.append(seen)
            asked[i] = float(deep.sum())
            if asked[i]:
                rows[i] = float(seen.sum() + np.maximum(0, final - end)[deep].sum()) / asked[i]
                counted = np.concatenate([[0], np.cumsum(unsure)])
                wants[i] = float((counted[until_here + 1] - counted[rounds])[deep].sum()) / asked[i]
        return cls(first, depth, width[rounds], asked, rows, wants, np.array(last))


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
            StepCost(profile.stage(p), 1 / node.speed)
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
        chances = np.random.default_rng(scenario.seed).random((len(scenario.nodes), len(ends)))
        self._chance = 1 - chances  # 0 < chance <= 1
        """(K, R) where a request stands in a node's waiting times."""
        self._prompt_s: dict[tuple[int, bool], Floats] = {}

    def thresholds(self, prices: int) -> list[dict[int, float]]:
        """Thresholds from timid to bold, that decide as cheaply as can be (in time, without load) at so many prices of
        a differing token.
        """
        samples, exits = self._samples, self._samples.exits
        early = exits[:-1]
        if not early:
            return [{}]
        delay, steps, held = 0.0, [], self._context
        for i in range(len(exits)):
            if i and self._node[i] != self._node[i - 1]:
                delay += self._hop(self._node[i - 1], 1.0, 0.0)
            delay += self._costs[i].of(1, held, held, 1, 1, 1, held, held)
            steps.append(delay)
        header = Header("", "", exits, 1, {}, "", 1, (), ())
        prompt = np.repeat(np.arange(len(samples.answers)), samples.answers)
        trace = Trace(header, prompt, dict(samples.agrees), {}, ())
        found = Replay(trace, samples.sure, dict(zip(exits, steps, strict=True))).candidates(prices)
        rounded = [{p: round(t, 4) for p, t in thresholds.items()} for thresholds in found]
        ends = [dict.fromkeys(early, 1.1), dict.fromkeys(early, 0.0)]
        return [*{tuple(t.values()): t for t in [ends[0], *rounded, ends[1]]}.values()]

    def metrics(self, thresholds: Mapping[int, float], draft: int) -> dict[str, Any]:
        """Figures as a simulation's, those of them that can be told; infinite where the load is too much.

        Args:
            thresholds: of every early exit.
            draft: tokens that are drafted past an unsure one.
        """
        samples = self._samples
        at, agreed = np.full(len(self._index), len(samples.exits) - 1), np.ones(len(self._index), bool)
        for i, p in reversed([*enumerate(samples.exits[:-1])]):
            chosen = (samples.sure[p] >= thresholds[p]) | (i >= self._deepest)
            at[chosen], agreed[chosen] = i, samples.agrees[p][chosen]
        first = samples.agrees.get(samples.exits[0], agreed)
        looks = [i == self._deepest or thresholds.get(p, 0.0) <= 1.0 for i, p in enumerate(samples.exits)]
        looks[0] = looks[0] or draft > 0
        rounds = _Rounds.of(at, first == agreed, self._starts, samples.answers, draft, len(samples.exits))
        rate = samples.rate or self._closed_rate(rounds, looks)
        return self._at(rate, rounds, looks) | {"agreement": float(agreed.mean())}

    def _closed_rate(self, rounds: _Rounds, looks: Sequence[bool]) -> float:
        """Of users who ask again as soon as they have an answer and have thought: users over what that takes."""
        load = self._scenario.workload
        users, think_s = load.arrivals.users, load.turns.think_s
        low, high = 0.0, users / (self._at(1e-9, rounds, looks)["total_s"]["mean"] + think_s)
        for _ in range(30):  # what it takes grows with the rate
            middle = (low + high) / 2
            there = middle * (self._at(middle, rounds, looks)["total_s"]["mean"] + think_s)
            low, high = (middle, high) if there < users else (low, middle)
        return low

    def _at(self, rate: float, rounds: _Rounds, looks: Sequence[bool]) -> dict[str, Any]:
        """At a load of so many requests a second; see the module."""
        samples, nodes, stages = self._samples, self._scenario.nodes, range(len(self._node))
        requests, tokens = len(samples.answers), len(self._index)
        mean_tokens, opened = tokens / requests, rounds.last > 0
        prompt_s = np.array([np.where(opened[i], self._prompts(i, looks[i]), 0.0) for i in stages])
        work = self._work(rate, rounds, looks, prompt_s)
        if work is None:
            return _overloaded()
        step, wait, queue, joules, dollars = work
        sent = 0.0
        deeper = np.zeros(len(stages))
        """What a round takes at a stage but the first, and on the way to it."""
        opening_s = prompt_s + queue
        """What a request's prompt takes there, once."""
        for i in stages[1:]:
            k, deeper[i] = self._node[i], step[i] + wait[i]
            if k == self._node[i - 1]:
                continue
            link, profile, before = self._scenario.link_after(k - 1), self._profiles[k - 1], nodes[k - 1]
            assert link is not None
            each = link.encoding.row_bytes(profile.hidden_size) + profile.position_bytes
            opening = np.where(opened[i], profile.open_bytes + samples.prompts * each, 0)
            positions = float(rounds.rows[i] * rounds.asked[i])
            up = (profile.up_bytes * float(rounds.asked[i]) + each * positions + float(opening.sum())) / tokens
            down = (profile.down_bytes + profile.decision_bytes) * float(rounds.asked[i]) / tokens
            sharing = before.count / nodes[k].count if link.shared else 1.0
            load = rate / before.count * sharing * mean_tokens * _seconds(up, link.up_mbit)
            if load >= 1:
                return _overloaded()
            deeper[i] += self._hop(k - 1, float(rounds.rows[i]), load)
            opening_s[i] += opening * (profile.exchange_byte_s + _seconds(1, link.up_mbit) / (1 - load))
            sent += up
            joules += link.joules_per_mb * (up + down) / 1e6
            dollars += link.price_per_gb * (up + down) / 1e9
        took = self._profiles[0].round_s + rounds.drafted * (step[0] + wait[0]) + np.cumsum(deeper)[rounds.depth]
        began, where = rounds.first, rounds.depth[rounds.first]
        at_once = np.arange(len(stages))[:, None] <= where
        before_s = self._profiles[0].request_s + self._scenario.client_ms / 1000
        first = before_s + took[began] - step[0] + np.where(at_once, opening_s, 0.0).sum(0)
        first -= np.concatenate([[0.0], np.cumsum(step[1:])])[where]  # the prompt's step is that of its last position
        others = np.add.reduceat(took, began) - took[began] + np.where(at_once, 0.0, opening_s).sum(0)
        alone, failed = first + others, 0.0
        for k, node in enumerate(nodes):
            i = self._node.index(k)
            there = rate / node.count * np.where(opened[i], alone, 0.0)  # Little's law
            held, most = float(there.mean()), node.limits.max_sessions
            if held >= most or float((there * (samples.prompts + samples.answers)).mean()) >= node.limits.max_positions:
                return _overloaded()
            queued, each_s = _erlang_c(held, most), float(alone[opened[i]].mean()) if opened[i].any() else 0.0
            waits = np.maximum(0.0, np.log(max(1e-300, queued) / self._chance[k])) * each_s / (most - held)
            waits = np.where(opened[i], np.minimum(waits, node.limits.max_wait_s), 0.0)
            failed = max(failed, queued * math.exp(-(most - held) * node.limits.max_wait_s / max(1e-9, each_s)))
            first, others = first + np.where(at_once[i], waits, 0.0), others + np.where(at_once[i], 0.0, waits)
        several = samples.answers > 1
        return {
            "first_token_s": _figures(first),
            "token_s": _figures(others[several] / (samples.answers[several] - 1)),
            "total_s": _figures(first + others),
            "tokens_per_s": rate * mean_tokens,
            "bytes_up_per_token": sent,
            "joules_per_token": joules,
            "usd_per_million_tokens": 1e6 * dollars,
            "requests": 1,
            "failed": round(failed, 6),
        }

    def _work(
        self, rate: float, rounds: _Rounds, looks: Sequence[bool], prompt_s: Floats
    ) -> tuple[Floats, Floats, Floats, float, float] | None:
        """What nodes do: (m,) a step's time and its wait, (m, R) a prompt's wait, joules and dollars a token.

        None where it is too much for one.
        """
        samples, nodes, stages = self._samples, self._scenario.nodes, range(len(self._node))
        requests, tokens, opened = len(samples.answers), len(self._index), rounds.last > 0
        mean_tokens = tokens / requests
        step, wait = np.zeros(len(stages)), np.zeros(len(stages))
        queue = np.zeros((len(stages), requests))
        joules = dollars = 0.0
        for k, node in enumerate(nodes):
            mine = [i for i in stages if self._node[i] == k]
            prompts, here = prompt_s[mine].sum(0), rate / node.count
            by_prompts = here * float(prompts.mean())
            reach = rounds.asked[mine] / tokens
            batch, most = 1.0, float(node.limits.max_sessions)
            for _ in range(60):
                sessions = np.maximum(1.0, batch * reach / max(1e-12, reach[0]))
                step[mine] = [self._step(i, rounds, n, looks[i]) for i, n in zip(mine, sessions, strict=True)]
                wanted = here * mean_tokens * float(reach @ step[mine]) / max(1e-12, 1 - by_prompts)
                if by_prompts >= 1 or (wanted > most and batch == most):
                    return None
                batch = min(most, (batch + wanted) / 2 if wanted > 1 else 1.0)
            a_token = float(reach @ (step[mine] / sessions))
            busy = min(1.0, by_prompts + here * mean_tokens * a_token)
            chunks = np.ceil(samples.prompts / node.limits.max_step_positions) * opened[mine]
            chunk = float(prompts.sum()) / max(1.0, float(chunks.sum()))
            wait[mine] = (by_prompts * chunk + (busy - by_prompts) * step[mine]) / 2
            others = here * float((prompts**2).mean()) / 2 / (1 - by_prompts)
            queue[mine[0]] = np.where(opened[mine[0]], others + self._profiles[k].step_s, 0.0)
            seconds, alive = a_token + float(prompts.mean()) / mean_tokens, node.count / (rate * mean_tokens)
            idle_w, busy_w, price = rates(node)
            joules += seconds * busy_w + max(0.0, alive - seconds) * idle_w
            dollars += alive / 3600 * price
        return step, wait, queue, joules, dollars

    def _step(self, stage: int, rounds: _Rounds, sessions: float, looks: bool) -> float:
        """Seconds of a step of so many sessions."""
        alike = max(1, round(sessions))
        rows = max(alike, round(float(rounds.rows[stage]) * sessions))
        read = min(rows, max(1, round(float(rounds.wants[stage]) * sessions))) if looks else 0
        held, taken = self._context, rows if looks else 0
        return self._costs[stage].of(rows, rows * held, alike * held, alike, taken, read, read * held, alike * held)

    def _prompts(self, stage: int, looks: bool) -> Floats:
        """(R,) seconds of each prompt."""
        if (stage, looks) not in self._prompt_s:
            most = self._scenario.nodes[self._node[stage]].limits.max_step_positions
            cost = self._costs[stage]

            def of(length: int) -> float:
                total = 0.0
                for start in range(0, length, most):
                    rows = min(most, length - start)
                    held, read = start + rows, int(looks and start + rows == length)
                    attended, taken = rows * (start + rows / 2), rows if looks else 0
                    total += cost.of(rows, attended, held, 1, taken, read, read * held, read * held)
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


def _erlang_c(offered: float, servers: int) -> float:
    """The chance that who comes finds all servers taken (M/M/c)."""
    blocked = 1.0
    for n in range(1, servers + 1):
        blocked = offered * blocked / (n + offered * blocked)
    return blocked / (1 - offered / servers * (1 - blocked))


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
    return {**spans, **costs, "tokens_per_s": 0.0, "requests": 1, "failed": 1}
