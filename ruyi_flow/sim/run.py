"""Running a simulation: a scenario's load on its cluster in virtual time. The same seed gives the same results."""

from __future__ import annotations

import gc
import json
import math
import random
import tempfile
from array import array
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import simpy

from ruyi_flow.errors import ConfigError, RuyiFlowError
from ruyi_flow.loop.pages import PagePool
from ruyi_flow.requests import SamplingParams
from ruyi_flow.routing.policy import Policy
from ruyi_flow.sim.behaviour import Script, scripts_for
from ruyi_flow.sim.clock import VirtualTime
from ruyi_flow.sim.cluster import Cluster
from ruyi_flow.sim.costs import check_stages, power_and_price, profiles_of
from ruyi_flow.sim.load import Conversation, TokenCounts, conversations, draw_turns
from ruyi_flow.sim.profile import Profile
from ruyi_flow.sim.report import write_report
from ruyi_flow.sim.request import Request, Users
from ruyi_flow.sim.results import Recorder, RequestOutcome, Result
from ruyi_flow.sim.scenario import Scenario

__all__ = ["Progress", "Result", "Simulation", "metrics_text", "simulate"]

_TURN = 1_000_003
"""Distance between the script numbers of consecutive turns of a conversation."""

_FIRST_ID = 2**30
"""The lowest token id in questions. All tokens of a conversation's questions are alike and those of two differ, so that
only the turns of one conversation have a prefix in common. Predicted tokens have lower ids."""

_RETRY_S = 1.0
"""Seconds after which a user without thinking time asks again, when a request was refused at once."""

_EVENTS = 4_000
"""Events between two reports of progress."""

_COLLECTED = 20_000
"""New objects after which Python looks for cycles. A simulation hardly makes any, and looking took 5 % of its time."""

Progress = Callable[[int, int], None]
"""Called now and then with how much is done, and of how much in all."""


class _Over(Exception):
    """Nothing is left to simulate."""


class Simulation:
    """A simulation of one scenario, which can be run once.

    Args:
        scenario: the deployment and its load.
        where: name of the scenario's file, for error messages.
        folder: where requests.csv and trace.json are written. Default: nothing is written.
        profiles: the nodes' profiles. Default: read from the files, or computed for the hardware, that the scenario
            names.

    Raises:
        ConfigError: a profile, a trace or a file to replay cannot be read; profiles or trace are of another family;
            or not even the shortest request fits the entry node.
    """

    def __init__(
        self,
        scenario: Scenario,
        *,
        where: str = "scenario",
        folder: Path | None = None,
        profiles: Sequence[Profile] | None = None,
    ) -> None:
        self.scenario, self._where = scenario, where
        self.profiles = tuple(profiles or profiles_of(scenario, where))
        check_stages(scenario, self.profiles, where)
        scenario.check_bytes(self.profiles[0].hidden_size, where=where)
        self._routing = scenario.policy.routing()
        self._policy = Policy.resolve(self._routing, scenario.all_exits)
        self._source = random.Random(f"{scenario.seed}/load")
        self.scripts = scripts_for(scenario, self.profiles, self._routing.scale, where)
        load = scenario.workload
        self._conversations = conversations(load, scenario.nodes[0].count, self._source, where)
        self._prompts, self._answers = TokenCounts(load.prompts), TokenCounts(load.answers)
        self._check_lengths()
        names = [node.name for node in scenario.nodes]
        self._recorder = Recorder(folder, exits=scenario.all_exits, nodes=names, skip=math.inf)
        self._time = VirtualTime()
        self._live: dict[int, Script] = {}
        self._cluster = Cluster(scenario, self.profiles, time=self._time, scripts=self._live, recorder=self._recorder)
        self._arriving: simpy.Process | None = None
        self._users = Users(scenario, self.profiles[0], self._policy, self._time, self._cluster, self._recorder)
        self._begun = self._asked = self._under_way = 0
        self._began_s = self._counts_from_s = 0.0
        known = [len(self._conversations)] if isinstance(self._conversations, list) else []
        known += [] if load.requests is None else [load.requests]
        self._expected = load.before + min(known) if known else None
        """Number of requests in all; None if only `load.duration_s` ends the load."""
        self._uncounted = load.before + int(load.warmup * min(known)) if known else None
        """Number of requests before counting begins; None if the warm-up is a share of `duration_s`."""

    def run(self, progress: Progress = lambda done, total: None) -> Result:
        """Simulate until the load and all requests have ended.

        Args:
            progress: called with requests or, if their number is not known, with seconds of `load.duration_s`.
        """
        load = self.scenario.workload
        step, recorder = self._time.env.step, self._recorder
        arriving = self._arriving = self._time.process(self._arrive())
        arriving.callbacks.append(self._check_over)
        most = load.requests + load.before if load.requests else math.inf
        total = self._expected or max(1, math.ceil(load.duration_s or 0))
        usual = gc.get_threshold()
        gc.set_threshold(_COLLECTED, *usual[1:])
        try:
            while recorder.done < most and (not arriving.triggered or self._under_way):
                try:
                    for _ in range(_EVENTS):
                        step()
                        if recorder.done >= most:
                            break
                except (simpy.core.EmptySchedule, _Over):
                    break
                recorder.timeline.fold()
                done = recorder.done if self._expected else max(0, int(self._time.now() - self._began_s))
                progress(min(done, total), total)
        finally:
            gc.set_threshold(*usual)
            self._arriving = None
        if arriving.triggered and isinstance(arriving.value, BaseException):
            raise arriving.value
        recorder.close()
        progress(total, total)
        return Result(self.scenario, self._metrics(), recorder, Path(self._where).stem)

    # ---- the load ----

    async def _arrive(self) -> None:
        """Start the load's conversations, each at its time."""
        load = self.scenario.workload
        devices = self.scenario.nodes[0].count
        for i in range(load.before):
            await self._talk(Conversation(self._time.now(), i % devices, 1))
        self._began_s = began = self._time.now()
        if not load.warmup:
            self._count_from_now()
        elif load.duration_s is not None and load.arrivals.kind != "replay":
            self._time.process(self._count_after(load.warmup * load.duration_s))
        if load.arrivals.kind == "closed":
            for user in range(load.arrivals.users):
                self._start(self._converse(user % devices))
            return
        for one in self._conversations:
            if self._full:
                return
            wait = began + one.at_s - self._time.now()
            if wait > 0:
                await self._time.sleep(wait)
            self._start(self._talk(one))

    def _start(self, conversation: Coroutine[Any, Any, None]) -> None:
        self._under_way += 1
        self._time.process(conversation).callbacks.append(self._ended)

    def _ended(self, event: simpy.Event) -> None:
        self._under_way -= 1
        self._check_over(event)

    def _check_over(self, _: simpy.Event) -> None:
        """Stop when all conversations have ended: outages may go on without end."""
        if not self._under_way and self._arriving is not None and self._arriving.triggered:
            raise _Over

    async def _count_after(self, seconds: float) -> None:
        await self._time.sleep(seconds)
        self._count_from_now()

    def _count_from_now(self) -> None:
        """Count new requests, and the nodes' and links' activity, from this moment on."""
        if math.isinf(self._recorder.skip):
            self._recorder.skip, self._counts_from_s = self._asked, self._time.now()
            self._cluster.reset_counters()

    @property
    def _full(self) -> bool:
        """Whether the load has no more requests."""
        load = self.scenario.workload
        return load.requests is not None and self._asked >= load.requests + load.before

    async def _converse(self, device: int) -> None:
        """Play a user of a closed load: one conversation after the other."""
        load = self.scenario.workload
        while not self._full and (load.duration_s is None or self._time.now() - self._began_s < load.duration_s):
            asked_s = self._time.now()
            await self._talk(Conversation(asked_s, device, 0))
            if load.turns.think_s:
                await self._time.sleep(self._source.expovariate(1 / load.turns.think_s))
            elif self._time.now() == asked_s:
                await self._time.sleep(_RETRY_S)

    async def _talk(self, one: Conversation) -> None:
        """Play a conversation: the prompt of each turn is the history so far and a new question.

        Each conversation has its own random source, so that scenarios that differ in policy or nodes get the same load.
        """
        load, history = self.scenario.workload, array("I")
        begun, self._begun = self._begun, self._begun + 1
        source = random.Random(f"{self.scenario.seed}/{begun}")
        for turn in range(one.turns or draw_turns(load, source)):
            if turn and load.turns.think_s:
                await self._time.sleep(source.expovariate(1 / load.turns.think_s))
            if self._full:
                return
            if self._asked == self._uncounted:
                self._count_from_now()
            number, self._asked = self._asked, self._asked + 1
            script = begun + _TURN * turn
            recorded = self.scripts.lengths(script)
            question = one.prompt_tokens or self._prompts.draw(recorded[0], source)
            answer = one.answer_tokens or self._answers.draw(recorded[1], source)
            prompt = history + array("I", (_FIRST_ID + begun % _FIRST_ID,)) * question
            answered = await self._ask(
                number,
                script,
                device=one.device,
                conversation=b"%d" % begun,
                prompt=prompt,
                answer=answer,
            )
            # An answer that was broken off stays in the conversation with the length that it should have had.
            history = prompt + array("I", answered) + array("I", (0,)) * (answer - len(answered))

    async def _ask(
        self, number: int, which: int, *, device: int, conversation: bytes, prompt: array[int], answer: int
    ) -> Sequence[int]:
        """Play a request, from its arrival at the device to its last token, with the script number `which`.

        Returns:
            The answer's tokens, if the next turn needs them.
        """
        one = RequestOutcome(number, device, self._time.now(), len(prompt))
        script = self._live[number] = self.scripts.script(which, answer)
        params = SamplingParams(seed=number, max_new_tokens=answer, eos_token_ids=())
        request = Request(one, script, params, prompt, conversation)
        try:
            await self._users.ask(request)
        except RuyiFlowError as error:
            one.error = type(error).__name__
            one.total_s = self._time.now() - one.at_s
        one.admission_s = self._cluster.admission_s.pop(number, {})
        del self._live[number]
        self._recorder.add(one)
        return request.token_ids

    # ---- checks and results ----

    def _check_lengths(self) -> None:
        """Refuse a load whose shortest request does not fit the entry node."""
        recorded = self.scripts.least()
        prompt, answer = self._prompts.least(recorded[0]), self._answers.least(recorded[1])
        least = prompt + answer
        if isinstance(self._conversations, list):
            least = min((one.prompt_tokens or prompt) + (one.answer_tokens or answer) for one in self._conversations)
        context, capacity = self.profiles[0].context, self.scenario.nodes[0].limits.max_positions
        if least > min(context, PagePool(capacity).num_positions):
            small = capacity < context
            limit = "nodes.0.limits.max_positions" if small else "the family's context"
            raise ConfigError(
                f"{self._where}: load: no request fits: the shortest prompt with its answer has {least} tokens, but "
                f"{limit} is {min(context, capacity)}: set shorter prompts or answers{', or raise it' if small else ''}"
            )

    def _metrics(self) -> dict[str, Any]:
        """Return the content of metrics.json, which covers the time since counting began."""
        found, recorder = self._recorder.statistics(), self._recorder
        end = recorder.ended_s if recorder.counted else self._time.now()
        span = max(1e-9, end - self._counts_from_s)
        nodes, links = {}, {}
        energy = cost = 0.0
        for tier, (node, profile) in enumerate(zip(self.scenario.nodes, self.profiles, strict=True)):
            there = self._cluster.instances[tier].values()
            busy, waited = sum(i.worker.busy_s for i in there), sum(i.worker.waited_s for i in there)
            idle_w, busy_w, price = power_and_price(node)
            machines = node.machines
            joules = busy * busy_w + max(0.0, machines * span - busy) * idle_w
            dollars = machines * span / 3600 * price
            capacities = [i.life.capacity for i in there if i.life.ended is None]
            pages = sum(capacity.pool.num_pages for capacity in capacities)
            nodes[node.name] = {
                "count": node.count,
                "replicas": node.replicas,
                "outages": sum(i.outages for i in there),
                "parked": sum(len(capacity.parked) for capacity in capacities),
                "parked_share": sum(capacity.pool.parked for capacity in capacities) / max(1, pages),
                "used": len(there),
                "busy_s": busy,
                "utilisation": busy / (machines * span),
                "highest_utilisation": max((i.worker.busy_s / span for i in there), default=0.0),
                "queue": waited / span,
                "busy_j": busy * busy_w,
                "energy_j": joules,
                "cost_usd": dollars,
                "profile": f"{profile.kind}: {profile.source}",
            }
            energy, cost = energy + joules, cost + dollars
            link = self.scenario.link_after(tier)
            if link is not None:
                pipes = [*{id(i.pipe): (i.pipe.up, i.pipe.down) for i in there if i.pipe is not None}.values()]
                up, down = sum(u.carried for u, _ in pipes), sum(d.carried for _, d in pipes)
                there_are = self.scenario.nodes[tier + 1].count if link.shared else machines
                most = [8e-6 / (mbit * span) if mbit else 0.0 for mbit in (link.up_mbit, link.down_mbit)]
                full = [(u.carried * most[0], d.carried * most[1]) for u, d in pipes]
                radio, carried = link.joules_per_mb * (up + down) / 1e6, link.price_per_gb * (up + down) / 1e9
                links[f"{link.source}-{link.target}"] = {
                    "bytes_up": up,
                    "bytes_down": down,
                    "up_mbit": 8e-6 * up / span,
                    "down_mbit": 8e-6 * down / span,
                    "utilisation": max(up * most[0], down * most[1]) / there_are,
                    "highest_utilisation": max((max(one) for one in full), default=0.0),
                    "energy_j": radio,
                    "cost_usd": carried,
                }
                energy, cost = energy + radio, cost + carried
        tokens = max(1, found["tokens"])
        found |= {"energy_j": energy, "joules_per_token": energy / tokens}
        found |= {"cost_usd": cost, "usd_per_million_tokens": 1e6 * cost / tokens}
        found["losses"] = dict(sorted(self._cluster.losses.items()))
        simulated = {"simulated_s": end, "seed": self.scenario.seed}
        return {**found, "nodes": nodes, "links": links, **simulated}


def simulate(
    scenario: Scenario, folder: Path, *, where: str = "scenario", progress: Progress = lambda done, total: None
) -> Result:
    """Simulate a scenario and write its run folder: scenario.yaml, requests.csv, trace.json, metrics.json, report.html.

    Args:
        folder: the run folder. Its files are replaced together at the end.
        where: name of the scenario's file, for error messages.
        progress: see `Simulation.run`.

    Raises:
        ConfigError: see `Simulation`; nothing is written.
    """
    Simulation(scenario, where=where)  # raises its errors before a folder is made
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=folder) as made:  # an interrupted run leaves the last one
        new = Path(made)
        (new / "scenario.yaml").write_text(scenario.text(), encoding="utf-8")
        result = Simulation(scenario, where=where, folder=new).run(progress)
        (new / "metrics.json").write_text(metrics_text(result.metrics), encoding="utf-8")
        write_report(new, result)
        for file in [*new.iterdir()]:
            file.replace(folder / file.name)
    return result


def metrics_text(metrics: dict[str, Any]) -> str:
    """Return the text of metrics.json."""
    return json.dumps(metrics, indent=2, sort_keys=True) + "\n"
