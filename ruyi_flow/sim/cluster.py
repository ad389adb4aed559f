"""A scenario's nodes and links in virtual time, each made when it is first needed."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from ruyi_flow.loop.capacity import Capacity
from ruyi_flow.loop.chain import Chain
from ruyi_flow.loop.front_door import FrontDoor
from ruyi_flow.requests import SamplingParams, SessionOpen
from ruyi_flow.routing.policy import Policy
from ruyi_flow.sim.behaviour import Script
from ruyi_flow.sim.clock import SharedCapacity, VirtualTime
from ruyi_flow.sim.instance import Instance, Life, Outage, merged
from ruyi_flow.sim.link import Direction, Outages, Pipe
from ruyi_flow.sim.node import VirtualStages, VirtualWorker
from ruyi_flow.sim.profile import Profile, StepCost
from ruyi_flow.sim.remote import VirtualRemote, Wire
from ruyi_flow.sim.replicas import VirtualReplicas
from ruyi_flow.sim.results import AddSlice, Recorder
from ruyi_flow.sim.scenario import Scenario, SimNode
from ruyi_flow.types import Encoding, Stage

__all__ = ["Cluster"]


@dataclass(frozen=True, slots=True)
class _Tier:
    """The identical nodes of one depth."""

    node: SimNode
    profile: Profile
    costs: tuple[StepCost, ...]
    first_layer: int
    row_bytes: int
    """Bytes of one position's state on the link to the next tier; 0 on the last tier."""


class Cluster:
    """The nodes and links of a scenario.

    Args:
        scenario: the deployment.
        profiles: the profile of each entry of `scenario.nodes`.
        time: the simulation's virtual time.
        scripts: what the branches predict in each request under way, by the request's number.
        recorder: takes the nodes' and links' activity.
    """

    def __init__(
        self,
        scenario: Scenario,
        profiles: tuple[Profile, ...],
        *,
        time: VirtualTime,
        scripts: Mapping[int, Script],
        recorder: Recorder,
    ) -> None:
        self._scenario, self._time, self._scripts, self._recorder = scenario, time, scripts, recorder
        self._random = random.Random(f"{scenario.seed}/links")
        self._tiers: list[_Tier] = []
        for i, (node, profile) in enumerate(zip(scenario.nodes, profiles, strict=True)):
            costs = tuple(StepCost(profile.stage(p), 1 / node.speed) for p in node.exits)
            link = scenario.link_after(i)
            row = 0 if link is None else link.encoding.row_bytes(profile.hidden_size)
            self._tiers.append(_Tier(node, profile, costs, profile.stage(node.exits[0]).first_layer, row))
        self._links = [scenario.link_after(i) for i in range(len(scenario.nodes))]
        self.instances: list[dict[int, Instance]] = [{} for _ in self._tiers]
        self._pipes: dict[tuple[int, int], Pipe] = {}
        self._clients: dict[int, VirtualReplicas] = {}
        self._choices = random.Random(f"{scenario.seed}/replicas")
        self._keys = random.Random(f"{scenario.seed}/keys")
        self._parks = scenario.parks
        self.losses: Counter[str] = Counter()
        """Number of sessions and answers that lost their node, by cause."""
        self.admission_s: dict[int, dict[str, float]] = {}
        """Seconds that each request under way has waited for admission: by the request's number, then by node."""
        self._cores: dict[str, SharedCapacity] = {}
        self._message_s: dict[str, float] = {}
        for machine in scenario.hosts.values():
            shared = SharedCapacity(time, machine.cores, 1.0)
            self._cores |= dict.fromkeys(machine.nodes, shared)
            self._message_s |= dict.fromkeys(machine.nodes, machine.message_ms / 1000)

    def client(self, device: int) -> VirtualReplicas:
        """Return what the client on a device knows of its entry nodes."""
        if device not in self._clients:
            self._clients[device] = self._replicas(0, device, self._scenario.client_recover_s, 0.0)
        return self._clients[device]

    async def open(self, life: Life, policy: Policy, params: SamplingParams, prompt: Sequence[int]) -> Chain:
        """Open a session on an entry node; see `FrontDoor.open`. The sampling seed is the request's number."""
        profile = self._tiers[0].profile
        opening = SessionOpen(
            key=self._keys.randbytes(16) if self._parks else b"",
            family=profile.family,
            first_layer=0,
            hidden_size=profile.hidden_size,
            encoding=Encoding.F32,  # each link sets its own
            max_positions=len(prompt) + params.max_new_tokens,
            prompt_length=len(prompt),
            sampling=params,
            policy=policy,
        )
        return await self._enter(0, life, opening, prompt)

    async def _enter(self, tier: int, life: Life, opening: SessionOpen, prompt: Sequence[int] = ()) -> Chain:
        """Open a session in a node's process, and record how long it waited for admission."""
        began = self._time.now()
        try:
            return await life.front_door.open(opening, None, prompt)
        finally:
            waited, number = self._time.now() - began, opening.sampling.seed or 0
            if waited and number in self._scripts:
                name = self._tiers[tier].node.name
                admission_s = self.admission_s.setdefault(number, {})
                admission_s[name] = admission_s.get(name, 0.0) + waited
                self._recorder.timeline.series(f"room {name}").add((began, waited, waited))

    def reset_counters(self) -> None:
        """Restart the counters of the nodes' times and the links' bytes at 0."""
        for there in self.instances:
            for instance in there.values():
                instance.worker.busy_s = instance.worker.waited_s = 0.0
                instance.outages = 0
        for pipe in self._pipes.values():
            pipe.up.carried = pipe.down.carried = 0
        self.losses.clear()

    def instance(self, tier: int, number: int) -> Instance:
        """Return one of a tier's nodes, by its number from 0."""
        found = self.instances[tier].get(number)
        if found is None:
            found = self.instances[tier][number] = self._make(tier, number)
        return found

    def _make(self, tier: int, number: int) -> Instance:
        node = self._tiers[tier].node
        pipe = None if self._links[tier] is None else self._pipe(tier, number)
        return Instance(
            self._time,
            f"{node.name} {number}",
            partial(self._start, tier, number, pipe),
            pipe=pipe,
            outages=self._outages(node, number),
            grace_s=node.limits.grace_s,
            add_slice=self._slices(node.name, f"{node.name} {number}"),
        )

    def _start(self, tier: int, number: int, pipe: Pipe | None) -> Life:
        """Start a process of a node."""
        this, time = self._tiers[tier], self._time
        node, limits = this.node, this.node.limits
        capacity = Capacity(limits.max_positions, limits.max_sessions, this.profile.context)
        stages = VirtualStages(node.exits, first=tier == 0, costs=this.costs, scripts=self._scripts, capacity=capacity)
        costs, entry = this.profile, tier == 0
        worker = VirtualWorker(
            time,
            stages,
            budget=limits.max_step_positions,
            step_s=costs.step_s,
            round_s=costs.round_s if entry else 0.0,
            round_cpu_s=costs.round_cpu_s if entry else 0.0,
            cores=self._cores.get(node.name),
            cold=costs.cold if costs.pauses_s else None,
            add_busy=self._recorder.timeline.series(f"busy {node.name}").add,
            add_slice=self._slices(node.name, f"{node.name} {number}"),
        )
        link = self._links[tier]
        if link is None or pipe is None:
            return Life(time, worker, FrontDoor(node.name, limits, stages, worker, clock=time), capacity)
        row = link.row_bytes(this.profile.hidden_size)
        replicas = self._replicas(tier + 1, self._target(tier, number), link.recover_s, link.timeout_s)
        front_door = FrontDoor(
            node.name,
            limits,
            stages,
            worker,
            connect=self._way(tier, number, pipe, replicas),
            recoveries=replicas,
            row_bytes=row,
            ahead=self._scenario.ahead_of(node.name, row),
            clock=time,
        )
        return Life(time, worker, front_door, capacity)

    def _way(
        self, tier: int, number: int, pipe: Pipe, replicas: VirtualReplicas
    ) -> Callable[[SessionOpen, float | None], Callable[[Policy, int], Stage]]:
        """Return how a node's sessions reach the next tier; see `front_door.Connect`."""
        link, this = self._links[tier], self._tiers[tier]
        assert link is not None
        wire = Wire(
            pipe,
            flow=number,
            row_bytes=this.row_bytes,
            profile=this.profile,
            timeout_s=link.timeout_s,
            cores=self._cores.get(this.node.name),
            message_s=self._message_s.get(this.node.name, 0.0),
        )
        first_layer = self._tiers[tier + 1].first_layer

        async def open(life: Life, asked: SessionOpen) -> Chain:
            return await self._enter(tier + 1, life, asked)

        def way(opening: SessionOpen, timeout_s: float | None) -> Callable[[Policy, int], Stage]:
            onward = replace(opening, first_layer=first_layer, encoding=link.encoding)

            def make(policy: Policy, position: int) -> Stage:
                asked = replace(onward, policy=policy, position=position)
                return VirtualRemote(self._time, wire, replicas, asked, open)

            return make

        return way

    def _replicas(self, tier: int, group: int, recover_s: float, timeout_s: float) -> VirtualReplicas:
        """Return what a caller knows of one of a tier's `count` nodes, which has several replicas or one."""
        node = self._tiers[tier].node
        return VirtualReplicas(
            self._time,
            node.name,
            [self.instance(tier, group * node.replicas + i) for i in range(node.replicas)],
            recover_s=recover_s,
            timeout_s=timeout_s,
            source=self._choices,
            count_loss=self._count_loss,
        )

    def _count_loss(self, cause: str) -> None:
        self.losses[cause] += 1

    def _target(self, tier: int, number: int) -> int:
        """Return which of the next tier's `count` nodes a node talks to."""
        here, there = self._tiers[tier].node, self._tiers[tier + 1].node
        return number // here.replicas * there.count // here.count

    def _pipe(self, tier: int, number: int) -> Pipe:
        link = self._links[tier]
        assert link is not None
        key = (tier, self._target(tier, number) if link.shared else number)
        name = f"{link.source}-{link.target}"
        if key not in self._pipes:
            outages = Outages((span.at_s, span.at_s + span.for_s) for span in link.down)

            def direction(way: str, mbit: float | None) -> Direction:
                return Direction(
                    self._time,
                    latency_s=link.round_trip_ms / 2000,
                    jitter_s=link.jitter_ms / 1000,
                    bytes_per_s=None if mbit is None else mbit * 125_000,
                    shared=link.shared,
                    loss=link.loss,
                    outages=outages,
                    random=self._random,
                    add_bytes=self._recorder.timeline.series(f"{way} {name}").add,
                    add_slice=self._slices(f"link {name}", f"{way} {key[1]}"),
                )

            up, down = direction("up", link.up_mbit), direction("down", link.down_mbit)
            self._pipes[key] = Pipe(self._time, up, down, outages)
        return self._pipes[key]

    def _outages(self, node: SimNode, number: int) -> Iterator[Outage]:
        replica = number % node.replicas + 1
        mine = (span for span in node.down if span.replicas is None or replica in span.replicas)
        planned = sorted(Outage(span.at_s, span.at_s + span.for_s, span.kind) for span in mine)
        outages: Iterator[Outage] = iter(planned)
        if node.mtbf_s is not None:
            source = random.Random(f"{self._scenario.seed}/faults/{node.name}/{number}")
            outages = heapq.merge(planned, _random_outages(node.mtbf_s, node.mttr_s, source))
        return merged(outages)

    def _slices(self, process: str, thread: str) -> AddSlice | None:
        """Return what adds slices to a thread of the Chrome trace; None if no trace is written."""
        events = self._recorder.events
        return None if events is None else partial(events.slice, process, thread)


def _random_outages(mtbf_s: float, mttr_s: float, source: random.Random) -> Iterator[Outage]:
    """Yield the random outages of a node without end."""
    now = 0.0
    while True:
        now += source.expovariate(1 / mtbf_s)
        yield Outage(now, now + mttr_s)
        now += mttr_s
