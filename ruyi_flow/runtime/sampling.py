"""From logits to tokens: history-dependent processors, temperature, top-k, top-p, and noise that no topology changes.

A token is `argmax(processed logits / T + gumbel(seed, position, token))` (the Gumbel-max trick), with the noise from a
counter-based hash, so the same seed gives the same token on every node and for every draft length. Drafter and verifier
share the noise, so verifying a draft is comparing two tokens. The processors are transformers' own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ruyi_flow.errors import NodeFault, RequestError
from ruyi_flow.requests import SamplingParams
from ruyi_flow.runtime.scores import PLAIN, Confidence, likeliest

__all__ = ["Sampler", "gumbel"]


class Sampler:
    """Picks tokens for one session.

    Args:
        params: with `seed` and `eos_token_ids` filled in.
        prompt_length: where `min_new_tokens` counts from.
    """

    def __init__(self, params: SamplingParams, prompt_length: int) -> None:
        self.params = params
        self.processors = LogitsProcessorList()
        if params.repetition_penalty != 1.0:
            self.processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
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
        confidence: Confidence = PLAIN,
        read: Tensor | None = None,
        known: tuple[list[int], list[float]] | None = None,
    ) -> tuple[list[int], list[float]]:
        """The token after each of some positions, and how sure the branch is of its likeliest one.

        Args:
            logits: (m, vocab) of a branch, any number format.
            positions: m positions; the token after `positions[i]` sees `history[:positions[i] + 1]`.
            history: token ids of the session, drafts included.
            confidence: reads the branch's confidence off the processed logits.
            read: (m, hidden) that the branch's head read, where the confidence is a probe's.
            known: what `likeliest` says of these logits, where somebody has looked already.

        Returns:
            m tokens and m confidences.

        Raises:
            RequestError: the processors leave no token.
            NodeFault: the logits are not numbers.
        """
        if self.processors:
            logits = logits.float().cpu()
            ids = torch.tensor(history[: positions[-1] + 1], dtype=torch.int64)
            logits = torch.cat(
                [self.processors(ids[None, : p + 1], logits[i : i + 1].clone()) for i, p in enumerate(positions)]
            )
        tokens, plain = known if known is not None and not self.processors else likeliest(logits)
        sure = plain if confidence.plain else confidence(logits, read)
        if not all(0 <= c <= 1.001 for c in sure):  # false for what is not a number
            if self.processors and (logits == -math.inf).all(-1).any():
                raise RequestError("no token is left to pick: no_repeat_ngram_size and min_new_tokens rule out all")
            raise NodeFault(
                "the branch's logits are not numbers: float16 may be too narrow for this family (use bfloat16), or its "
                "weights are broken"
            )
        if self.params.temperature > 0:
            return [self._draw(logits[i].float(), p) for i, p in enumerate(positions)], sure
        return tokens, sure

    def _draw(self, logits: Tensor, position: int) -> int:
        params = self.params
        scores = (
            TemperatureLogitsWarper(params.temperature)(None, logits[None])
            if params.temperature != 1.0
            else logits[None]
        )
        if 0 < params.top_k < scores.shape[-1]:
            scores = TopKLogitsWarper(params.top_k)(None, scores)
        survivors = torch.isfinite(scores[0]).nonzero()[:, 0]
        scores = scores[:, survivors]
        if params.top_p < 1.0:
            scores = TopPLogitsWarper(params.top_p)(None, scores)
        noisy = scores[0].double() + gumbel(params.seed or 0, position + 1, survivors)
        return int(survivors[noisy.argmax()])


def gumbel(seed: int, position: int, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise as a function of (seed, position, token) alone.

    Args:
        seed: of the request.
        position: of the token that is picked.
        tokens: (k,) int64 token ids.

    Returns:
        (k,) float64
    """
    key = _mix(torch.tensor([seed], dtype=torch.int64)) ^ position
    bits = _mix(_mix(key).to(tokens.device) ^ tokens)
    uniform = ((bits >> 11) & (2**53 - 1)).double().add_(0.5).mul_(2.0**-53)
    return -torch.log(-torch.log(uniform))


def _mix(x: Tensor) -> Tensor:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014) on int64, whose products wrap like uint64's."""
    x = x + (0x9E3779B97F4A7C15 - 2**64)
    x = (x ^ ((x >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    return x ^ ((x >> 31) & (2**33 - 1))
