"""Sampling: the processors of transformers, and noise that depends on seed, position and token only."""

import math
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ruyi_flow.errors import NodeFault, RequestError
from ruyi_flow.requests import SamplingParams
from ruyi_flow.runtime.sampling import Sampler, gumbel

DEMO = SamplingParams(
    temperature=0.6, top_k=30, top_p=0.95, repetition_penalty=1.2, no_repeat_ngram_size=3, eos_token_ids=(), seed=7
)


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3


def test_draws_follow_transformers_distribution() -> None:
    history = [5, 6, 7, 8, 5, 6]
    scores = logits(1, 50)
    processors = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.2),
            NoRepeatNGramLogitsProcessor(3),
            TemperatureLogitsWarper(0.6),
            TopKLogitsWarper(30),
            TopPLogitsWarper(0.95),
        ]
    )
    expected = processors(torch.tensor([history]), scores.clone()).softmax(-1)[0]
    counts = torch.zeros(50)
    draws = 4000
    for seed in range(draws):
        params = SamplingParams(**{**{f: getattr(DEMO, f) for f in DEMO.__slots__}, "seed": seed})
        token = Sampler(params, 6).pick(scores, [5], history)[0][0]
        counts[token] += 1
    assert counts[expected == 0].sum() == 0
    # Pearson's chi-squared; 58 is the 0.999 quantile for 29 degrees of freedom. The seeds are fixed.
    kept = expected * draws > 5
    chi2 = ((counts - expected * draws)[kept] ** 2 / (expected * draws)[kept]).sum()
    assert chi2 < 58


def test_the_same_seed_draws_the_same_token_in_any_batch() -> None:
    scores, history = logits(4, 50), [1, 2, 3, 4, 5, 6, 7, 8]
    sampler = Sampler(DEMO, 2)
    together = sampler.pick(scores, [3, 4, 5, 6], history)
    apart = [sampler.pick(scores[i : i + 1], [p], history[: p + 1]) for i, p in enumerate((3, 4, 5, 6))]
    assert together[0] == [tokens[0] for tokens, _ in apart]
    assert together[1] == pytest.approx([confidence[0] for _, confidence in apart])


def test_noise_is_a_function_of_seed_position_and_token() -> None:
    tokens = torch.arange(1000)
    noise = gumbel(1, 5, tokens)
    assert torch.equal(noise[700:800], gumbel(1, 5, tokens[700:800]))
    assert not torch.equal(noise, gumbel(2, 5, tokens))
    assert not torch.equal(noise, gumbel(1, 6, tokens))


def test_noise_is_standard_gumbel_and_uncorrelated() -> None:
    a, b = gumbel(1, 5, torch.arange(200_000)), gumbel(1, 6, torch.arange(200_000))
    assert a.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert a.std().item() == pytest.approx(math.pi / math.sqrt(6), abs=0.01)
    for x, y in ((a, b), (a[1:], a[:-1])):
        assert abs(torch.corrcoef(torch.stack((x, y)))[0, 1].item()) < 0.01


def test_noise_is_pinned() -> None:
    """Other values would change the wire protocol: nodes of two versions would draw different tokens."""
    assert gumbel(42, 7, torch.tensor([0, 1, 49151])).tolist() == pytest.approx(PINNED, abs=1e-12)


PINNED = [-0.08966534352075368, -0.41578935768565184, -0.11060498976555987]


def test_greedy_confidence_is_the_largest_probability() -> None:
    scores = logits(3, 50)
    tokens, confidence = Sampler(SamplingParams(), 1).pick(scores, [0, 1, 2], [1, 2, 3])
    assert tokens == scores.argmax(-1).tolist()
    assert confidence == pytest.approx(scores.softmax(-1).amax(-1).tolist(), abs=1e-6)


def test_min_new_tokens_excludes_the_end_token() -> None:
    scores = torch.zeros(1, 10)
    scores[0, 2] = 9.0
    sampler = Sampler(SamplingParams(min_new_tokens=2, eos_token_ids=(2,)), prompt_length=3)
    history = [4, 4, 4, 4, 4]
    assert sampler.pick(scores, [2], history)[0] != [2]
    assert sampler.pick(scores, [3], history)[0] != [2]
    assert sampler.pick(scores, [4], history)[0] == [2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"min_new_tokens": 5, "max_new_tokens": 4}, "is more than max_new_tokens"),
        ({"stop": ("",)}, "non-empty texts"),
        ({"stop": (5,)}, "non-empty texts"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"eos_token_ids": (-1,)}, "must be token ids"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_invalid_parameters_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**options)


def test_logits_without_a_valid_token_are_an_error() -> None:
    params = SamplingParams(no_repeat_ngram_size=1, eos_token_ids=(), seed=0)
    with pytest.raises(RequestError, match="no token is left"):
        Sampler(params, 2).pick(logits(1, 4), [3], [0, 1, 2, 3])
    for bad in (math.nan, math.inf):
        for given in (SamplingParams(seed=0), SamplingParams(temperature=1.0, seed=0), params):
            with pytest.raises(NodeFault, match="not numbers"):
                Sampler(given, 1).pick(torch.full((1, 9), bad), [0], [0])


def test_integers_are_accepted_for_float_parameters() -> None:
    params = SamplingParams(temperature=2, top_p=1, seed=3)
    assert isinstance(params.temperature, float) and isinstance(params.top_p, float)
    assert Sampler(params, 1).pick(logits(1, 50), [0], [0])[0][0] < 50
    with pytest.raises(RequestError, match="from 0 .greedy. to 100"):
        SamplingParams(temperature=10**400)


def test_the_penalties_of_the_answer_are_openais_and_leave_the_prompt_alone() -> None:
    prompt, answer = [5, 5, 6, 7], [5, 8, 8, 8, 9]
    scores = logits(1, 50)
    params = SamplingParams(presence_penalty=0.75, frequency_penalty=0.5, eos_token_ids=())
    expected = scores.clone()
    for token, count in ((5, 1), (8, 3), (9, 1)):
        expected[0, token] -= 0.75 + 0.5 * count
    for position in (8, 3):  # after the answer's last token, and after the prompt
        wanted = expected if position == 8 else scores
        tokens, confidences = Sampler(params, len(prompt)).pick(scores.clone(), [position], prompt + answer)
        assert tokens == [int(wanted.argmax())]
        assert confidences == pytest.approx([float(wanted.softmax(-1).max())])
    raised = SamplingParams(presence_penalty=-2, eos_token_ids=())
    low = torch.zeros(1, 50)
    assert Sampler(raised, 4).pick(low, [4], prompt + [9])[0] == [9], "a negative penalty asks for repetition"
