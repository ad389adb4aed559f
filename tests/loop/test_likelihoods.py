"""Log-probabilities: those of the branch that decided, and of the prompt by the deepest exit, however it is cut."""

import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from ruyi_flow.client import AsyncClient, Client
from ruyi_flow.errors import NodeUnavailable, RequestError, WireError
from ruyi_flow.local import Family, load_family
from ruyi_flow.loop.chain import decode
from ruyi_flow.requests import SamplingParams
from ruyi_flow.routing.policy import Policy, Routing
from ruyi_flow.testing import cluster, cut_topology, open_session
from ruyi_flow.types import Block, Decision, Likelihood, Mode, Reason, Verdict
from tests.loop.test_chain import CUTS, EXITS, World, chained

ROUTINGS = [
    Routing(Mode.EXACT, draft=4),
    Routing(Mode.EXACT, draft=0),
    Routing(Mode.FIXED, exit=4, draft=2),
    Routing(Mode.FIXED, exit=1),
    Routing(Mode.TOKEN, thresholds={1: 0.12, 3: 0.12, 6: 0.1}, draft=3),
    Routing(Mode.CASCADE, threshold=0.1, window=3, back=0.12, draft=2),
]


@pytest.fixture(scope="module")
def world(five: Path) -> World:
    return World(five)


@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
async def test_a_decided_token_has_the_likelihood_of_the_branch_that_decided_it(world: World, routing: Routing) -> None:
    prompt = [5, 17, 8, 30, 9]
    params = SamplingParams(logprobs=3, eos_token_ids=(), repetition_penalty=1.3, temperature=0.7, seed=3)
    expected: list[tuple[int, int]] = []
    for cut, ahead in itertools.product(range(len(CUTS)), (0, 100)):
        decisions, _ = await world.run(cut, routing, params, prompt, 12, ahead)
        expected = expected or [(d.token, d.exit) for d in decisions]
        assert [(d.token, d.exit) for d in decisions] == expected
        text = list(prompt)
        for decision in decisions:
            assert decision.likelihood is not None
            check(world.oracle.family, text, decision.exit, decision.token, decision.likelihood, top=3)
            text.append(decision.token)


async def test_a_session_that_does_not_ask_gets_no_likelihoods(world: World) -> None:
    chain, sessions = world.open(2, Policy.resolve(Routing(), EXITS), SamplingParams(eos_token_ids=()), 3, 12)
    async with world.closing(2, chain, sessions):
        rounds = [settled async for settled in decode(chain, [5, 6, 7], 8)]
        assert all(d.likelihood is None for settled in rounds for d in settled.decisions)
        assert not any(settled.prompt for settled in rounds)
        assert not any(session.likelihoods or session.prompt_likelihoods for session in sessions)


@pytest.mark.parametrize("length", [1, 2, 40, 300])
@pytest.mark.parametrize("routing", ROUTINGS[:4], ids=str)
async def test_the_prompt_is_rated_by_the_deepest_exit(world: World, routing: Routing, length: int) -> None:
    rng = random.Random(length)
    prompt = [rng.randrange(3, 61) for _ in range(length)]
    params = SamplingParams(prompt_logprobs=2, logprobs=1, eos_token_ids=())
    deepest = Policy.resolve(routing, EXITS).deepest
    for cut in range(len(CUTS)):
        policy = Policy.resolve(routing, EXITS)
        chain, sessions = world.open(cut, policy, params, length, length + 3)
        async with world.closing(cut, chain, sessions):
            rounds = [settled async for settled in decode(chain, prompt, 3)]
        assert len(rounds[0].prompt) == length - 1
        assert not any(settled.prompt for settled in rounds[1:])
        logits = world.oracle.family.logits(torch.tensor([prompt]), deepest)[0]
        for i, likelihood in enumerate(rounds[0].prompt):
            compare(logits[i], prompt[i + 1], likelihood, top=2)


@pytest.mark.parametrize(
    "verdict",
    [
        Verdict((Decision(5, 7, 1.0, Reason.DEEPEST, Likelihood(-1.0, ((1, -1.0), (2, -2.0)))),)),
        Verdict((Decision(5, 7, 1.0, Reason.DEEPEST, Likelihood(-1.0, ((61, -1.0),))),)),
        Verdict((Decision(5, 7, 1.0, Reason.DEEPEST),), (), (Likelihood(-1.0, ()),) * 3),
        Verdict((Decision(5, 7, 1.0, Reason.DEEPEST),), (), (Likelihood(-1.0, ((61, -1.0),)),)),
    ],
    ids=["too many", "no token", "too long a prompt", "no token in the prompt"],
)
async def test_likelihoods_that_cannot_be_are_refused(world: World, verdict: Verdict) -> None:
    class Wrong:
        async def advance(self, block: Block) -> Verdict:
            return verdict

        async def close(self) -> None: ...

    params = SamplingParams(logprobs=1, prompt_logprobs=1)
    policy = Policy.resolve(Routing(Mode.EXACT, draft=0), EXITS)
    session = open_session(world.cuts[2][0], policy, params, prompt_length=3, max_positions=20)
    chain = chained(session, "n0", lambda policy, position: Wrong())  # type: ignore[arg-type, return-value]
    with pytest.raises(WireError):
        await anext(decode(chain, [5, 6, 7], 4))
    await chain.close()


async def test_log_probabilities_travel_over_nodes_with_their_texts(spoken: Path) -> None:
    family = load_family(spoken, dtype="float32")
    text = "<user>naïve 日本|"
    async with cluster(cut_topology(spoken, [[2], [4], [6]])) as nodes, AsyncClient(nodes.topology) as client:
        options: dict[str, object] = {"max_new_tokens": 12, "eos_token_ids": (), "logprobs": 4, "prompt_logprobs": 2}
        for routing in ({"mode": "exact"}, {"exit": 4}, {"exit": 2}):
            stream = client.stream(text, raw=True, **options, **routing)  # type: ignore[arg-type]
            async with stream:
                first = await anext(stream)
                assert stream.prompt is not None and first.logprobs is not None
                async for _ in stream:
                    pass
            reply = stream.reply
            assert reply.prompt is not None and reply.prompt.text == text
            ids = [token.id for token in reply.prompt.tokens]
            assert reply.prompt.tokens[0].logprobs is None
            deepest = routing.get("exit", 6)
            for i, token in enumerate(reply.prompt.tokens[1:], 1):
                assert token.logprobs is not None and token.logprobs.text == token.text
                found = Likelihood(token.logprobs.logprob, tuple((t.id, t.logprob) for t in token.logprobs.top))
                check(family, ids[:i], int(deepest), token.id, found, top=2)
            for answered in reply.tokens:
                assert answered.logprobs is not None
                found = Likelihood(answered.logprobs.logprob, tuple((t.id, t.logprob) for t in answered.logprobs.top))
                check(family, ids, answered.exit, answered.id, found, top=4)
                assert all(len(t.text) == 1 or not t.text for t in answered.logprobs.top), "each token is one byte"
                ids.append(answered.id)
        tokenized = await client.tokenize(text, raw=True)
        assert tokenized == await client.tokenize("naïve 日本")
        assert list(tokenized.token_ids) == ids[: len(tokenized.token_ids)] and tokenized.context == 512
        assert tokenized.texts[:6] == tuple("<user>")
        with pytest.raises(RequestError, match="mode is 'token'"):
            await client.generate("hi", threshold=0.5, prompt_logprobs=0)
        with pytest.raises(RequestError, match="must be a whole number from 0 to 20"):
            await client.generate("hi", logprobs=21)


async def test_the_prompts_log_probabilities_are_missing_where_the_last_exit_is(spoken: Path) -> None:
    async with (
        cluster(cut_topology(spoken, [[2, 4], [6]], recover_s=0.5)) as nodes,
        AsyncClient(nodes.topology) as client,
    ):
        nodes.engines["n1"].front_door.draining = True  # it takes no new sessions
        options: dict[str, object] = {"fallback": True, "max_new_tokens": 3, "eos_token_ids": ()}
        assert len((await client.generate("hi", **options)).tokens) == 3  # type: ignore[arg-type]
        with pytest.raises(NodeUnavailable, match="the log-probabilities of the prompt are not known"):
            await client.generate("hi", prompt_logprobs=0, **options)  # type: ignore[arg-type]


def test_a_prompt_is_tokenized_in_process_too(whole: Client) -> None:
    tokenized = whole.tokenize([{"role": "user", "content": "hi"}])
    assert tokenized.texts == tuple("<user>hi|")
    with pytest.raises(RequestError, match="prompt is empty"):
        whole.tokenize("")


def check(family: Family, before: Sequence[int], exit: int, token: int, likelihood: Likelihood, *, top: int) -> None:
    """Compare a likelihood with what the uncached family computes after some tokens."""
    compare(family.logits(torch.tensor([list(before)]), exit)[0, -1], token, likelihood, top=top)


def compare(logits: torch.Tensor, token: int, likelihood: Likelihood, *, top: int) -> None:
    logprobs = logits.log_softmax(-1)
    assert likelihood.logprob == pytest.approx(float(logprobs[token]), abs=1e-4)
    assert [value for _, value in likelihood.top] == pytest.approx(logprobs.topk(top).values.tolist(), abs=1e-4)
    assert all(value == pytest.approx(float(logprobs[t]), abs=1e-4) for t, value in likelihood.top)
    assert dict(likelihood.top).get(token, likelihood.logprob) == likelihood.logprob, "clients compare them exactly"
