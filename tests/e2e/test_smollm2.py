"""The real model: SmolLM2-135M in float32, over nodes, against transformers' own."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ruyi_flow.bench.engines import as_transformers
from ruyi_flow.client import AsyncClient
from ruyi_flow.config.policy_file import PolicyFile
from ruyi_flow.family.checkpoint import Checkpoint
from ruyi_flow.local import Family, load_family
from ruyi_flow.routing.confidence import Score
from ruyi_flow.testing import cluster, cut_topology
from ruyi_flow.types import Reason

pytestmark = [pytest.mark.model, pytest.mark.timeout(300)]

POLICY = Path(__file__).parents[2] / "configs/policies/smollm2-5-percent.yaml"
PROMPTS = ["Why is the sky blue?", "Write a haiku about the sea.", "List three prime numbers above 20."]


@pytest.fixture(scope="module")
def family(smollm2: Path) -> Family:
    return load_family(smollm2, dtype="float32")


@pytest.fixture(scope="module")
def theirs(smollm2: Path) -> Any:
    return as_transformers(Checkpoint(smollm2))


def prompt_ids(family: Family, prompt: str) -> torch.Tensor:
    messages = [{"role": "user", "content": prompt}]
    text = family.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return torch.tensor([family.tokenizer(text)["input_ids"]])


@pytest.mark.parametrize("exit", [5, 11, 17, 23, 29])
def test_every_exit_is_transformers_model_of_that_depth(family: Family, smollm2: Path, exit: int) -> None:
    ids = prompt_ids(family, PROMPTS[0])
    with torch.no_grad():
        expected = as_transformers(Checkpoint(smollm2), exit=exit)(ids).logits
    ours = family.logits(ids, exit)
    assert (ours - expected).abs().max() < 2e-5 * expected.abs().max()
    assert torch.equal(ours.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("cuts", [[[5, 11], [17, 23], [29]], [[5, 11, 17], [23, 29]], [[5], [11], [17], [23], [29]]])
async def test_exact_over_nodes_is_transformers_greedy(
    family: Family, theirs: Any, smollm2: Path, cuts: list[list[int]]
) -> None:
    prompts, drafts = (PROMPTS, (0, 4)) if len(cuts) == 3 else (PROMPTS[:1], (1, 8))
    async with cluster(cut_topology(smollm2, cuts)) as nodes, AsyncClient(nodes.topology) as client:
        for prompt in prompts:
            ids = prompt_ids(family, prompt)
            greedy = theirs.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :].tolist()
            for draft in drafts:
                reply = await client.generate(prompt, mode="exact", draft=draft, max_new_tokens=16)
                assert reply.token_ids == greedy
            assert reply.text == family.tokenizer.decode(greedy, skip_special_tokens=True)
        await nodes.settle()


@pytest.mark.parametrize("exit", [5, 17])
async def test_fixed_over_nodes_is_the_family_in_one_process(family: Family, smollm2: Path, exit: int) -> None:
    ids = prompt_ids(family, PROMPTS[1])
    expected = family.generate(ids, exit=exit, max_new_tokens=16)[0].tolist()
    async with (
        cluster(cut_topology(smollm2, [[5, 11], [17, 23], [29]])) as nodes,
        AsyncClient(nodes.topology) as client,
    ):
        for draft in (0, 4):
            reply = await client.generate(PROMPTS[1], mode="fixed", exit=exit, draft=draft, max_new_tokens=16)
            assert reply.token_ids == expected
            assert nodes.engines["n2"].shard.capacity.pool.used == 0, "nothing goes deeper than the exit"
        await nodes.settle()


async def test_the_packages_policy_is_the_demo_familys(smollm2: Path) -> None:
    policy = PolicyFile.load(POLICY)
    assert policy.family == Checkpoint(smollm2).fingerprint and policy.score is Score.PROBE
    cuts = [[5, 11], [17, 23], [29]]
    async with cluster(cut_topology(smollm2, cuts)) as nodes, AsyncClient(nodes.topology) as client:
        asked: dict[str, Any] = {"max_new_tokens": 32, "policy": POLICY}
        exact = await client.generate(PROMPTS[0], mode="exact", draft=8, **asked)
        assert exact.token_ids == (await client.generate(PROMPTS[0], mode="exact", draft=0, **asked)).token_ids
        reply = await client.generate(PROMPTS[0], **asked)
        assert {t.reason for t in reply.tokens} <= {Reason.CONFIDENT, Reason.DEEPEST}
        for token in reply.tokens:
            assert token.exit == 29 or token.confidence >= policy.thresholds[token.exit]
        assert any(token.exit < 29 for token in reply.tokens)
        await nodes.settle()


async def test_bfloat16_links_carry_bfloat16_nodes_without_loss(smollm2: Path) -> None:
    family = load_family(smollm2, dtype="bfloat16")
    ids = prompt_ids(family, PROMPTS[0])
    expected = family.generate(ids, max_new_tokens=12)[0].tolist()
    topology = cut_topology(smollm2, [[5, 11], [17, 23], [29]], dtype="bfloat16", encoding="bf16")
    async with cluster(topology) as nodes, AsyncClient(nodes.topology) as client:
        reply = await client.generate(PROMPTS[0], mode="exact", draft=0, max_new_tokens=12)
        assert reply.token_ids == expected
        for hop in reply.stats.hops[1:]:
            assert hop.bytes_up <= hop.positions * (2 * 576 + 64)
        await nodes.settle()
