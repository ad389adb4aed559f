"""Sampling of tokens from logits: repetition rules, temperature, top-k, top-p, and reproducible noise.

A token is `argmax(processed logits / temperature + gumbel(seed, position, token))` (the Gumbel-max trick). The noise is
a hash of its arguments, so the same seed gives the same token on every node and for every draft length. Drafter and
verifier share the noise, so a draft is verified by comparing two tokens. The processors are those of transformers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ruyi_flow.errors import NodeFault, RequestError
from ruyi_flow.family.devices import has_float64
from ruyi_flow.requests import SamplingParams
from ruyi_flow.runtime.scores import PLAIN, Confidence, most_probable

__all__ = ["Sampler", "gumbel"]


class Sampler:
    """Picks the tokens of one session.

    Args:
        params: sampling parameters, with `seed` and `eos_token_ids` set.
        prompt_length: tokens of the prompt, after which `min_new_tokens` and the answer's penalties count.
    """

    def __init__(self, params: SamplingParams, prompt_length: int) -> None:
        self.params = params
        self.processors = LogitsProcessorList()
        if params.repetition_penalty != 1.0:
            self.processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
        if params.presence_penalty or params.frequency_penalty:
            self.processors.append(_AnswerPenalties(params, prompt_length))
        if params.no_repeat_ngram_size:
            self.processors.append(NoRepeatNGramLogitsProcessor(params.no_repeat_ngram_size))
        if params.min_new_tokens and params.eos_token_ids:
            eos = list(params.eos_token_ids)
            self.processors.append(
                MinNewTokensLengthLogitsProcessor(prompt_length, params.min_new_tokens, eos, device="cpu")
            )

    def pick(
        self,
        logits: Tensor,
        positions: Sequence[int],
        history: Sequence[int],
        *,
        confidence: Confidence = PLAIN,
        head_input: Tensor | None = None,
        known: tuple[list[int], list[float]] | None = None,
    ) -> tuple[list[int], list[float]]:
        """Pick the token that follows each of m positions, and compute the branch's confidence in it.

        Args:
            logits: (m, vocab) of a branch, in any number format.
            positions: m positions; the token after `positions[i]` depends on `history[:positions[i] + 1]`.
            history: token ids of the session, drafts included.
            confidence: computes the confidence from the processed logits.
            head_input: (m, hidden) input of the branch's LM head; a probe's confidence needs it.
            known: `most_probable(logits)`, if it has been computed already.

        Returns:
            m tokens and m confidences in the most probable token of each row.

        Raises:
            RequestError: the processors exclude every token.
            NodeFault: the logits are not numbers.
        """
        if self.processors:
            logits = logits.float().cpu()
            ids = torch.tensor(history[: positions[-1] + 1], dtype=torch.int64)
            logits = torch.cat(
                [self.processors(ids[None, : p + 1], logits[i : i + 1].clone()) for i, p in enumerate(positions)]
            )
        tokens, plain = known if known is not None and not self.processors else most_probable(logits)
        confidences = plain if confidence.plain else confidence(logits, head_input)
        if not all(0 <= c <= 1.001 for c in confidences):  # also true for NaN
            if self.processors and (logits == -math.inf).all(-1).any():
                raise RequestError(
                    "no token is left: no_repeat_ngram_size and min_new_tokens exclude all; lower one of them"
                )
            raise NodeFault(
                "the branch's logits are not numbers: float16 may be too narrow for this family (use bfloat16), or its "
                "weights are broken"
            )
        if self.params.temperature > 0:
            return [self._draw(logits[i].float(), p) for i, p in enumerate(positions)], confidences
        return tokens, confidences

    def _draw(self, logits: Tensor, position: int) -> int:
        params = self.params
        scores = (logits if has_float64(logits.device) else logits.cpu())[None]  # the noise needs float64
        if params.temperature != 1.0:
            scores = TemperatureLogitsWarper(params.temperature)(None, scores)
        if 0 < params.top_k < scores.shape[-1]:
            scores = TopKLogitsWarper(params.top_k)(None, scores)
        survivors = torch.isfinite(scores[0]).nonzero()[:, 0]
        scores = scores[:, survivors]
        if params.top_p < 1.0:
            scores = TopPLogitsWarper(params.top_p)(None, scores)
        noisy = scores[0].double() + gumbel(params.seed or 0, position + 1, survivors)
        return int(survivors[noisy.argmax()])


class _AnswerPenalties(LogitsProcessor):  # type: ignore[misc]
    """Lowers the logits of tokens that the answer contains, by OpenAI's formula: presence + frequency x count.

    Args:
        params: sampling parameters with the two penalties.
        prompt_length: number of tokens of the prompt, which are not counted.
    """

    def __init__(self, params: SamplingParams, prompt_length: int) -> None:
        self._presence, self._frequency, self._start = params.presence_penalty, params.frequency_penalty, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens, counts = input_ids[0, self._start :].unique(return_counts=True)
        scores[0, tokens] -= self._presence + self._frequency * counts
        return scores


def gumbel(seed: int, position: int, tokens: Tensor) -> Tensor:
    """Compute standard Gumbel noise that depends on nothing but (seed, position, token).

    Args:
        seed: sampling seed of the request.
        position: position of the token that is picked.
        tokens: (k,) int64 token ids.

    Returns:
        (k,) noise in float64.
    """
    key = _mix(torch.tensor([seed], dtype=torch.int64)) ^ position
    bits = _mix(_mix(key).to(tokens.device) ^ tokens)
    uniform = ((bits >> 11) & (2**53 - 1)).double().add_(0.5).mul_(2.0**-53)
    return -torch.log(-torch.log(uniform))


def _mix(x: Tensor) -> Tensor:
    """Apply the finalizer of splitmix64 (Steele, Lea, Flood 2014); int64 products wrap like those of uint64."""
    x = x + (0x9E3779B97F4A7C15 - 2**64)
    x = (x ^ ((x >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    return x ^ ((x >> 31) & (2**33 - 1))
