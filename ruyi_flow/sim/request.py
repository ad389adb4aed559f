"""Requests of simulated users, asked as the SDK asks: an answer whose entry node is lost is taken up again."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from ruyi_flow.errors import CapacityError, NodeError, NodeUnavailable, loss_cause
from ruyi_flow.loop.chain import decode
from ruyi_flow.requests import SamplingParams
from ruyi_flow.routing.policy import Policy
from ruyi_flow.sim.behaviour import Script
from ruyi_flow.sim.clock import VirtualTime
from ruyi_flow.sim.cluster import Cluster
from ruyi_flow.sim.profile import Profile
from ruyi_flow.sim.replicas import Call, VirtualReplicas
from ruyi_flow.sim.results import Recorder, RequestOutcome
from ruyi_flow.sim.scenario import Scenario
from ruyi_flow.types import Recovery

__all__ = ["Request", "Users"]

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 0.5
"""Seconds between attempts to take up an answer, as in the SDK."""


@dataclass(slots=True)
class Request:
    """A user's request, and what has arrived of its answer."""

    outcome: RequestOutcome
    """What is recorded of it."""
    script: Script
    """What the branches predict."""
    params: SamplingParams
    """Length of the answer, and the request's number as the seed."""
    prompt: array[int]
    """Token ids of the prompt."""
    conversation: bytes
    """What the turns of the conversation have in common, by which the client chooses a replica of the entry node."""
    resumed: list[tuple[int, int]] = field(default_factory=list)
    """The tokens that have arrived and the exits that decided them, if somebody may need them."""
    lost: tuple[str, float] | None = None
    """Why the entry node was lost, and when, until another token arrives."""
    is_resumed: bool = False
    """Whether the entry node was ever lost."""
    pause_s: float = 0.0
    """Seconds until the next attempt to take the answer up."""

    def recover(self, now: float) -> None:
        """Note that the first token after a loss has arrived."""
        assert self.lost is not None
        cause, since = self.lost
        self.outcome.recoveries.append(Recovery(cause, now - since, self.outcome.new_tokens))
        self.lost, self.pause_s = None, 0.0

    @property
    def token_ids(self) -> list[int]:
        """The tokens that have arrived, if somebody may need them."""
        return [token for token, _ in self.resumed]


class Users:
    """Ask the entry nodes.

    Args:
        scenario: the deployment.
        profile: the entry nodes' profile.
        policy: the policy of all requests.
        time: the simulation's virtual time.
        cluster: the nodes and links.
        recorder: takes the tokens and times.
    """

    def __init__(
        self,
        scenario: Scenario,
        profile: Profile,
        policy: Policy,
        time: VirtualTime,
        cluster: Cluster,
        recorder: Recorder,
    ) -> None:
        self._policy, self._time, self._cluster, self._recorder = policy, time, cluster, recorder
        self._before_s = profile.request_s + scenario.client_ms / 1000
        self._keeps_tokens = scenario.parks

    async def ask(self, request: Request) -> None:
        """Get a request's answer, on another replica of the entry node or on the same one if it is lost meanwhile.

        Raises:
            NodeError: it cannot be answered, or not to its end.
            RequestError: the entry node refuses it.
        """
        client, one = self._cluster.client(request.outcome.device), request.outcome
        while True:
            call = Call(self._time, client, request.conversation, moves_at_once=True)
            call.connect()
            try:
                await call.run(self._answer(request, call, client))
                return
            except NodeError as error:
                has_begun = request.is_resumed or one.new_tokens > 0
                is_final = not isinstance(error, (NodeUnavailable, CapacityError)) or client.heard_at is None
                if is_final or (isinstance(error, CapacityError) and not has_begun):
                    raise
                now = self._time.now()
                waited_s = 0.0 if request.lost is None else now - request.lost[1]
                left_s = client.left_s(error, began=has_begun, waited_s=waited_s)
                if left_s <= 0:
                    raise
                client.lost(client.name, loss_cause(error))
                request.is_resumed, request.lost = True, request.lost or (loss_cause(error), now)
            finally:
                call.close()
            await self._time.sleep(min(request.pause_s, left_s))
            request.pause_s = min(_LONGEST_PAUSE_S, 2 * request.pause_s or _FIRST_PAUSE_S)

    async def _answer(self, request: Request, call: Call, client: VirtualReplicas) -> None:
        """Get the answer, or the rest of it, from one process of the entry node."""
        one, began, resumed = request.outcome, request.outcome.at_s, request.resumed
        last, exits, timeline = request.script.last, one.exits, self._recorder.timeline
        tokens, now_s = timeline.series("tokens"), self._time.now
        if self._before_s:
            await self._time.sleep(self._before_s)
        assert call.life is not None
        prompt = request.prompt
        chain = await self._cluster.open(call.life, self._policy, request.params, prompt)
        try:
            reused = len(chain.session.token_ids)
            if not one.new_tokens:
                one.reused_tokens = reused
            rest = prompt[reused:]
            rounds = decode(chain, rest, request.params.max_new_tokens, tuple(resumed))
            async for round_ in rounds:
                decisions, hops, drafted, accepted, _ = round_
                client.heard_at = now = now_s()
                if request.lost is not None:
                    request.recover(now)
                    client.recovered(client.name, one.recoveries[-1])
                after = now - began
                if one.new_tokens:
                    one.longest_gap_s = max(one.longest_gap_s, after - one.total_s)
                one.total_s = after
                one.first_token_s = one.first_token_s or after
                one.drafted += drafted
                one.accepted += accepted
                one.escalations += len(hops) > 1
                for hop in hops:
                    one.add(hop)
                    if hop.queue_s:
                        # When exactly it waited is not known; the last moments are the best guess.
                        lately = min(after, hop.queue_s)
                        timeline.series(f"queue {hop.node}").add((now - lately, hop.queue_s, lately))
                for token, exit, *_ in decisions:
                    exits[exit] += 1
                    one.agreed += last[one.new_tokens % len(last)][0] == token
                    one.new_tokens += 1
                if self._keeps_tokens:
                    resumed += [(token, exit) for token, exit, *_ in decisions]
                tokens.add((now, len(decisions), 0.0))
        except GeneratorExit:  # the simulation has ended, and nobody runs this any more
            raise
        except BaseException:
            await chain.close()
            raise
        await chain.close()
