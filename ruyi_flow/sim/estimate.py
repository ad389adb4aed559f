"""Estimates of a deployment's metrics by equations, without simulating it; `sim/plan.py` ranks its candidates by them.

R requests are drawn from the load, with what the branches predict along their N tokens. A token is decided at the
shallowest exit whose confidence reaches its threshold. An answer is decoded in rounds. A token that the first branch is
confident of is a round of its own. Otherwise `draft` tokens are drafted after it, and the deeper stages are asked, down
to the deepest one that any settled token needs; a round settles 1 token, and as many more as the first branch had right
in a row before it. The stages i = 0 … m-1 are those of the exits; node k exists count_k times, replicas
included. With sums over a node's stages,

    asked_i   = steps of stage i over all rounds; reach_i = asked_i / N
    rows_i    = positions in such a step: rejected drafts, and once every position up to the last one asked
    opened_ri = whether request r ever asks stage i; if not, the stage never sees r
    prompt_ri = seconds of r's prompt in stage i, in steps of at most limits.max_step_positions; 0 unless opened
    step_i(b) = seconds of a step of b reach_i / reach_(node's first) sessions, rows_i each (`sim/profile.py`)

With `rate` requests a second of T = N / R tokens each, a node k has

    U_k = rate / count_k * mean over r of sum(prompt_ri)               utilisation by prompts
    b_k = max(1, rate / count_k * T * sum(reach_i step_i(b_k)) / (1 - U_k))
                                                                       sessions in a step: arrivals during the last one
    V_k = U_k + rate / count_k * T * sum(reach_i step_i(b_k) / b_k)    utilisation, at most 1
    w_i = (U_k chunk_k + (V_k - U_k) step_i(b_k)) / 2                  wait for the end of the step under way
    q_k = step_s + rate / count_k * mean over r of sum(prompt_ri)^2 / (2 (1 - U_k))
                                                                       a prompt's wait for other prompts: M/G/1
                                                                       (Pollaczek and Khinchine)

where chunk_k is the mean time of a prompt's step. The load is too high if U_k reaches 1, if b_k exceeds
limits.max_sessions, if more sessions or positions are open at once than the limits allow (Little's law), or if the
utilisation u of a link reaches 1. A question of s bytes (rows_i states of the next stage and headers) and its answer of
d bytes take

    h = round trip + 2 jitter sqrt(2 / pi) + exchange_s + exchange_byte_s s + s / up / (1 - u) + d / down
        + the probability that a segment is lost, times the retransmission timeout

on a link. So a round takes round_s + (its drafts + 1) (step_0 + w_0) + the sum of step_i + w_i over the deeper stages
asked and of h over the links crossed. For a request of n tokens,

    first token    = request_s + client_ms + its first round, where each stage asked takes prompt_ri + q_k instead of
                     step_i, and each link crossed also takes the prompt's bytes / up
    time per token = (the other rounds + the prompt's time in the stages that these open) / (n - 1)

and percentiles are over requests. A session may wait for admission when it opens: with c = limits.max_sessions, and a
mean of a open sessions of S seconds each, longer than t with probability C(c, a) exp(-(c - a) t / S) (M/M/c, Erlang).
Each request stands at a random quantile of that distribution; waits beyond limits.max_wait_s fail. All of this
describes a steady load; a short simulation also has a start with fewer sessions, and an end that is paid for.

Not modelled: drafts whose length a policy file varies, drafting while an answer is awaited, long prompts that are sent
in parts, states that are sent ahead of a question, rounds that are not brief, shared cores, bursts, outages, and parked
sessions: the prompts of later turns are computed whole.
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
from ruyi_flow.sim.behaviour import Scripts
from ruyi_flow.sim.costs import power_and_price
from ruyi_flow.sim.link import LEAST_RTO_S, SEGMENT
from ruyi_flow.sim.load import Conversation, TokenCounts, conversations, draw_turns
from ruyi_flow.sim.profile import Profile, StepCost
from ruyi_flow.sim.scenario import Scenario

__all__ = ["Estimate", "Samples"]

_REQUESTS, _TOKENS = 300, 12_000
"""Sampling stops at so many requests or so many tokens."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Samples:
    """R requests of a load, and what the branches predict along their N tokens."""

    exits: tuple[int, ...]
    prompts: NDArray[np.int64]
    """(R,) lengths of the prompts in tokens."""
    answers: NDArray[np.int64]
    """(R,) lengths of the answers in tokens."""
    confidences: Mapping[int, Floats]
    """(N,) confidences of each early exit."""
    agrees: Mapping[int, NDArray[np.bool_]]
    """(N,) for each early exit, whether its token agrees with the last exit's."""
    rate: float
    """Requests per second; 0 for a closed load, whose rate depends on how fast it is answered."""

    @classmethod
    def draw(cls, scenario: Scenario, scripts: Scripts, where: str) -> Samples:
        """Draw samples from a scenario's load.

        Raises:
            ConfigError: the load has no request, or the file to replay is malformed.
        """
        load, source = scenario.workload, random.Random(f"{scenario.seed}/plan")
        prompts, answers = TokenCounts(load.prompts), TokenCounts(load.answers)
        closed = load.arrivals.kind == "closed"
        users = (Conversation(0.0, 0, 0) for _ in itertools.count())
        asked: list[tuple[int, int]] = []
        tokens, last = 0, 0.0
        for one in users if closed else conversations(load, scenario.nodes[0].count, source, where):
            history, last = 0, one.at_s
            for _ in range(one.turns or draw_turns(load, source)):
                recorded = scripts.lengths(len(asked))
                question = one.prompt_tokens or prompts.draw(recorded[0], source)
                answer = one.answer_tokens or answers.draw(recorded[1], source)
                asked.append((history + question, answer))
                history, tokens = history + question + answer, tokens + answer
            if len(asked) >= _REQUESTS or tokens >= _TOKENS:
                break
        if not asked:
            raise ConfigError(f"{where}: load: it has no request; set a longer load.duration_s or a higher rate")
        exits = scenario.all_exits
        tokens_at: dict[int, list[NDArray[np.int64]]] = {p: [] for p in exits}
        confidences_at: dict[int, list[Floats]] = {p: [] for p in exits}
        for number, (_, answer) in enumerate(asked):
            looks = scripts.script(number, answer).looks
            for p in exits:
                predicted, confidences = zip(*looks[p], strict=True)
                tokens_at[p].append(np.resize(np.array(predicted), answer))
                confidences_at[p].append(np.resize(np.array(confidences, float), answer))
        words = {p: np.concatenate(found) for p, found in tokens_at.items()}
        rate = load.arrivals.rate * load.turns.mean
        if load.arrivals.kind == "replay":
            rate = len(asked) / max(last, 1e-9)
        return cls(
            exits,
            np.array([prompt for prompt, _ in asked]),
            np.array([answer for _, answer in asked]),
            {p: np.concatenate(confidences_at[p]) for p in exits[:-1]},
            {p: words[p] == words[exits[-1]] for p in exits[:-1]},
            0.0 if closed else rate,
        )


@dataclass(frozen=True, slots=True)
class _Rounds:
    """The J rounds, in order, that settle the N tokens of R requests over m stages."""

    first: NDArray[np.int64]
    """(R,) index of each request's first round."""
    depth: NDArray[np.int64]
    """(J,) index of the deepest stage that is asked."""
    drafted: NDArray[np.int64]
    """(J,) number of steps of the first stage."""
    asked: Floats
    """(m,) number of steps of each stage."""
    rows: Floats
    """(m,) mean positions in a step, without prompts."""
    wants: Floats
    """(m,) mean positions in a step that the branch reads."""
    last: NDArray[np.int64]
    """(m, R) positions of each answer that a stage has seen in the end; 0 if it is never asked."""

    @classmethod
    def follow(
        cls,
        at: NDArray[np.int64],
        right: NDArray[np.bool_],
        *,
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        draft: int,
        stages: int,
    ) -> _Rounds:
        """Follow the answers round by round.

        Args:
            at: (N,) index of the stage that decides each token.
            right: (N,) whether the first branch predicts the decided token.
            starts, lengths: (R,) index of the first token and number of tokens of each answer.
            draft: most drafted tokens in a round.
            stages: number of stages.
        """
        n, every = len(at), np.arange(len(at))
        ends = np.repeat(starts + lengths, lengths)
        width = np.where(at == 0, 1, np.minimum(1 + draft, ends - every))
        wrong = np.append(np.flatnonzero(~right), n)
        until = wrong[np.searchsorted(wrong, every)]  # for each token, the next one that the first branch has wrong
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
            # Drafts after a contradiction that a shallower stage is confident of are not asked about.
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
    """Estimates the metrics of a scenario for any thresholds.

    Args:
        scenario: the deployment, with the cut to estimate.
        profiles: its nodes' profiles.
        samples: samples of its load.
    """

    def __init__(self, scenario: Scenario, profiles: Sequence[Profile], samples: Samples) -> None:
        self._scenario, self._profiles, self._samples = scenario, profiles, samples
        self._node = [k for k, node in enumerate(scenario.nodes) for _ in node.exits]
        """Index of each stage's node."""
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
        """(K, R) quantile of each request in each node's distribution of waiting times."""
        self._prompt_s: dict[tuple[int, bool], Floats] = {}

    def thresholds(self, prices: int) -> list[dict[int, float]]:
        """Return thresholds from strict to loose.

        Each of them minimizes the time without load plus a price per token that disagrees, for `prices` prices.
        """
        samples, exits = self._samples, self._samples.exits
        early = exits[:-1]
        if not early:
            return [{}]
        delay, steps, x = 0.0, [], self._context
        for i in range(len(exits)):
            if i and self._node[i] != self._node[i - 1]:
                delay += self._hop(self._node[i - 1], 1.0, 0.0)
            delay += self._costs[i].seconds(1, x, x, taken=1, read=1, read_attended=x, read_context=x)
            steps.append(delay)
        header = Header("", "", exits, 1, {}, "", 1, (), ())
        prompt = np.repeat(np.arange(len(samples.answers)), samples.answers)
        trace = Trace(header, prompt, dict(samples.agrees), {}, ())
        replay = Replay(trace, samples.confidences, dict(zip(exits, steps, strict=True)))
        found = replay.candidates(prices)
        rounded = [{p: round(t, 4) for p, t in thresholds.items()} for thresholds in found]
        ends = [dict.fromkeys(early, 1.1), dict.fromkeys(early, 0.0)]
        return [*{tuple(t.values()): t for t in [ends[0], *rounded, ends[1]]}.values()]

    def metrics(self, thresholds: Mapping[int, float], draft: int) -> dict[str, Any]:
        """Return those of a simulation's metrics that can be estimated; infinite if the load is too high.

        Args:
            thresholds: the threshold of every early exit.
            draft: number of tokens drafted after one that the first branch is not confident of.
        """
        samples = self._samples
        at, agreed = np.full(len(self._index), len(samples.exits) - 1), np.ones(len(self._index), bool)
        for i, p in reversed([*enumerate(samples.exits[:-1])]):
            chosen = (samples.confidences[p] >= thresholds[p]) | (i >= self._deepest)
            at[chosen], agreed[chosen] = i, samples.agrees[p][chosen]
        first = samples.agrees.get(samples.exits[0], agreed)
        looks = [i == self._deepest or thresholds.get(p, 0.0) <= 1.0 for i, p in enumerate(samples.exits)]
        looks[0] = looks[0] or draft > 0
        answers = {"starts": self._starts, "lengths": samples.answers}
        rounds = _Rounds.follow(at, first == agreed, **answers, draft=draft, stages=len(samples.exits))
        rate = samples.rate or self._closed_rate(rounds, looks)
        return self._at(rate, rounds, looks) | {"agreement": float(agreed.mean())}

    def _closed_rate(self, rounds: _Rounds, looks: Sequence[bool]) -> float:
        """Return the requests per second of a closed load: users / (time of an answer + thinking time)."""
        load = self._scenario.workload
        users, think_s = load.arrivals.users, load.turns.think_s
        low, high = 0.0, users / (self._at(1e-9, rounds, looks)["total_s"]["mean"] + think_s)
        for _ in range(30):  # the time of an answer grows with the rate
            middle = (low + high) / 2
            there = middle * (self._at(middle, rounds, looks)["total_s"]["mean"] + think_s)
            low, high = (middle, high) if there < users else (low, middle)
        return low

    def _at(self, rate: float, rounds: _Rounds, looks: Sequence[bool]) -> dict[str, Any]:
        """Return the metrics at a rate of requests per second; the module's docstring has the equations."""
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
        """(m,) seconds of a round at a deeper stage and on the way to it."""
        opening_s = prompt_s + queue
        """(m, R) seconds of a request's prompt at a stage."""
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
            sharing = before.machines / nodes[k].count if link.shared else 1.0
            load = rate / before.machines * sharing * mean_tokens * _seconds(up, link.up_mbit)
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
        first -= np.concatenate([[0.0], np.cumsum(step[1:])])[where]  # a prompt's last step includes its last position
        others = np.add.reduceat(took, began) - took[began] + np.where(at_once, 0.0, opening_s).sum(0)
        alone, failed = first + others, 0.0
        for k, node in enumerate(nodes):
            i = self._node.index(k)
            there = rate / node.machines * np.where(opened[i], alone, 0.0)  # Little's law
            sessions, most = float(there.mean()), node.limits.max_sessions
            positions = float((there * (samples.prompts + samples.answers)).mean())
            if sessions >= most or positions >= node.limits.max_positions:
                return _overloaded()
            queued, each_s = _erlang_c(sessions, most), float(alone[opened[i]].mean()) if opened[i].any() else 0.0
            waits = np.maximum(0.0, np.log(max(1e-300, queued) / self._chance[k])) * each_s / (most - sessions)
            waits = np.where(opened[i], np.minimum(waits, node.limits.max_wait_s), 0.0)
            failed = max(failed, queued * math.exp(-(most - sessions) * node.limits.max_wait_s / max(1e-9, each_s)))
            first, others = first + np.where(at_once[i], waits, 0.0), others + np.where(at_once[i], 0.0, waits)
        several = samples.answers > 1
        return {
            "first_token_s": _summary(first),
            "token_s": _summary(others[several] / (samples.answers[several] - 1)),
            "total_s": _summary(first + others),
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
        """Return (m,) step times, (m,) waits for a step, (m, R) waits of prompts, and joules and dollars per token.

        Returns None if the load is too high for a node.
        """
        samples, nodes, stages = self._samples, self._scenario.nodes, range(len(self._node))
        requests, tokens, opened = len(samples.answers), len(self._index), rounds.last > 0
        mean_tokens = tokens / requests
        step, wait = np.zeros(len(stages)), np.zeros(len(stages))
        queue = np.zeros((len(stages), requests))
        joules = dollars = 0.0
        for k, node in enumerate(nodes):
            mine = [i for i in stages if self._node[i] == k]
            prompts, here = prompt_s[mine].sum(0), rate / node.machines
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
            seconds, alive = a_token + float(prompts.mean()) / mean_tokens, node.machines / (rate * mean_tokens)
            idle_w, busy_w, price = power_and_price(node)
            joules += seconds * busy_w + max(0.0, alive - seconds) * idle_w
            dollars += alive / 3600 * price
        return step, wait, queue, joules, dollars

    def _step(self, stage: int, rounds: _Rounds, sessions: float, looks: bool) -> float:
        """Return the seconds of a step of so many sessions."""
        count, x = max(1, round(sessions)), self._context
        rows = max(count, round(float(rounds.rows[stage]) * sessions))
        read = min(rows, max(1, round(float(rounds.wants[stage]) * sessions))) if looks else 0
        branch = {"taken": rows if looks else 0, "read": read}
        return self._costs[stage].seconds(
            rows, rows * x, count * x, sessions=count, read_attended=read * x, read_context=count * x, **branch
        )

    def _prompts(self, stage: int, looks: bool) -> Floats:
        """Return (R,) seconds of each prompt in a stage."""
        if (stage, looks) not in self._prompt_s:
            most = self._scenario.nodes[self._node[stage]].limits.max_step_positions
            cost = self._costs[stage]

            def seconds(length: int) -> float:
                total = 0.0
                for start in range(0, length, most):
                    rows = min(most, length - start)
                    stop, taken = start + rows, rows if looks else 0
                    read = int(looks and stop == length)
                    attended, context = rows * (start + rows / 2), read * stop
                    total += cost.seconds(
                        rows, attended, stop, taken=taken, read=read, read_attended=context, read_context=context
                    )
                return total

            known = {length: seconds(length) for length in set(self._samples.prompts.tolist())}
            self._prompt_s[stage, looks] = np.array([known[length] for length in self._samples.prompts.tolist()])
        return self._prompt_s[stage, looks]

    def _hop(self, node: int, rows: float, load: float) -> float:
        """Return the seconds of a question of so many rows and its answer on a node's link of that utilisation."""
        link, profile = self._scenario.link_after(node), self._profiles[node]
        assert link is not None
        each = link.encoding.row_bytes(profile.hidden_size) + profile.position_bytes
        size, trip = profile.up_bytes + rows * each, link.round_trip_ms / 1000
        back = profile.down_bytes + profile.decision_bytes
        segments = math.ceil(size / SEGMENT) + math.ceil(back / SEGMENT)
        lost = (1 - (1 - link.loss) ** segments) * max(LEAST_RTO_S, 2 * trip)
        moving = _seconds(size, link.up_mbit) / (1 - load) + _seconds(back, link.down_mbit)
        jitter = 2 * link.jitter_ms / 1000 * math.sqrt(2 / math.pi)
        return trip + jitter + profile.exchange_s + profile.exchange_byte_s * size + moving + lost


def _erlang_c(offered: float, servers: int) -> float:
    """Return the probability that an arrival finds all servers busy (M/M/c)."""
    blocked = 1.0
    for n in range(1, servers + 1):
        blocked = offered * blocked / (n + offered * blocked)
    return blocked / (1 - offered / servers * (1 - blocked))


def _seconds(count: float, mbit: float | None) -> float:
    return 0.0 if mbit is None else count / (mbit * 125_000)


def _summary(values: Floats) -> dict[str, float]:
    if not len(values):
        return dict.fromkeys(("mean", "p50", "p90", "p95", "p99"), 0.0)
    return {"mean": float(values.mean())} | {f"p{q}": float(np.percentile(values, q)) for q in (50, 90, 95, 99)}


def _overloaded() -> dict[str, Any]:
    """Return the metrics under a load that is too high, where times grow without end."""
    times = dict.fromkeys(("mean", "p50", "p90", "p95", "p99"), math.inf)
    costs = dict.fromkeys(("bytes_up_per_token", "joules_per_token", "usd_per_million_tokens"), math.inf)
    spans = {name: times for name in ("first_token_s", "token_s", "total_s")}
    return {**spans, **costs, "tokens_per_s": 0.0, "requests": 1, "failed": 1}
