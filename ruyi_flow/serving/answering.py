"""Answers to users' requests: the prompt as tokens, the loop until it ends, tokens as text, statistics. No torch.

Every front end (gRPC, the SDK in process, HTTP) answers through `Answering`.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace

from ruyi_flow.errors import NodeUnavailable, RequestError
from ruyi_flow.family.tokenizer import PromptEncoder
from ruyi_flow.loop.chain import Chain, decode
from ruyi_flow.requests import GenerateRequest, SamplingParams, SessionOpen
from ruyi_flow.routing.policy import Policy, Routing
from ruyi_flow.serving.answer_text import AnswerText, TokenTexts
from ruyi_flow.serving.attributes import about_answer, about_request, model_name
from ruyi_flow.serving.totals import Totals
from ruyi_flow.telemetry.counters import NodeCounters
from ruyi_flow.telemetry.spans import current_span
from ruyi_flow.types import (
    Decision,
    Event,
    Final,
    FinishReason,
    Likelihood,
    Mode,
    PromptTokens,
    Reason,
    Tokenized,
)

__all__ = ["Answering"]


class Answering:
    """Answers users' requests on the entry node.

    Args:
        open: opens a session on the entry node's stages, given the handshake, the deadline in seconds and the prompt.
        prompts: turns prompts into the family's tokens.
        fingerprint: the family's fingerprint, which a calibrated policy must have.
        eos_token_ids: the tokens that end an answer.
        routing: the routing of requests that set none.
        node_of: the node of every exit.
        max_draft: largest number of drafts that fit into one message on every link.
        tier_of: the tier of every node. Default: nodes have none.
        counters: where answers are counted. Default: nowhere that anyone reads.
        family: the family as the topology names it.
    """

    def __init__(
        self,
        open: Callable[[SessionOpen, float | None, Sequence[int]], Awaitable[Chain]],
        prompts: PromptEncoder,
        *,
        fingerprint: str,
        eos_token_ids: tuple[int, ...],
        routing: Routing,
        node_of: Mapping[int, str],
        max_draft: int,
        tier_of: Mapping[str, str] | None = None,
        counters: NodeCounters | None = None,
        family: str,
    ) -> None:
        self._counters = counters or NodeCounters()
        self._place_of = {p: (node, (tier_of or {}).get(node, "")) for p, node in node_of.items()}
        for exit, place in self._place_of.items():
            for reason in Reason:
                self._counters.tokens.add(exit, *place, reason, amount=0)  # Prometheus then sees the first one, too
        self._open, self._prompts, self._routing = open, prompts, routing
        self._fingerprint, self._eos_token_ids = fingerprint, eos_token_ids
        self._node_of, self._max_draft, self._model = node_of, max_draft, model_name(family)
        self._texts = TokenTexts(prompts.tokenizer)

    async def tokenize(self, request: GenerateRequest) -> Tokenized:
        """Return the tokens of a request's prompt; its other options are ignored.

        Raises:
            RequestError: the prompt is empty or too long, or the tokenizer or the chat template refuses it.
        """

        def work() -> Tokenized:
            ids = self._prompts.encode(request.prompt, raw=request.raw)
            return Tokenized(tuple(ids), tuple(self._texts[i] for i in ids), self._prompts.context)

        return await asyncio.to_thread(work)

    async def generate(self, request: GenerateRequest, timeout_s: float | None) -> AsyncGenerator[Event, None]:
        """Answer a request: yield the prompt's tokens if they are asked for, tokens as they are decided, one `Final`.

        Args:
            request: the request.
            timeout_s: seconds until the sessions on deeper nodes end, or None.

        Raises:
            RequestError: a parameter or the prompt cannot be served.
            NodeError: a node cannot serve the request.
        """
        began = time.perf_counter()
        with Totals(self._counters, self._place_of) as totals:
            policy = self._policy(request)
            span = current_span.get()
            with span.child("tokenize"):
                prompt = await asyncio.to_thread(self._prompts.encode, request.prompt, raw=request.raw)
            totals.prompt_tokens = len(prompt)
            params = self._sampling(request.sampling, self._prompts.context - len(prompt))
            if span:
                span.set(**about_request(request, params, self._model))
            text = AnswerText(self._prompts.tokenizer, params.stop, self._texts)
            resumed = self._resumed(request, policy, params)
            totals.new_tokens = len(resumed)
            opening = SessionOpen(
                key=secrets.token_bytes(16),
                max_positions=len(prompt) + params.max_new_tokens,
                prompt_length=len(prompt),
                sampling=replace(params, prompt_logprobs=None) if resumed else params,
                policy=policy,
            )
            left = None if timeout_s is None else max(0.001, timeout_s - (time.perf_counter() - began))
            chain = await self._open(opening, left, prompt)
            totals.reused = len(chain.session.token_ids)
            finish = FinishReason.LENGTH
            try:
                for number, exit in resumed:  # the caller has them, and the text goes on after theirs
                    text.push(Decision(number, exit, 0.0, Reason.DEEPEST), 0.0, 0)
                if resumed and resumed[-1][0] in (params.eos_token_ids or ()):
                    finish = FinishReason.EOS
                known = len(resumed) - len(text.release(self._node_of))
                """Number of tokens to come that the caller has."""
                most = len(resumed) if text.stopped else params.max_new_tokens
                async with aclosing(decode(chain, prompt[totals.reused :], most, resumed)) as rounds:
                    async for settled in rounds:
                        after_s = time.perf_counter() - began
                        bytes_up = totals.add(settled, after_s)
                        if params.prompt_logprobs is not None and not totals.new_tokens and not resumed:
                            yield await self._prompt_tokens(prompt, settled.prompt)
                        for decision in settled.decisions:
                            totals.add_token(decision)
                            text.push(decision, after_s, bytes_up)
                            bytes_up = 0
                            if decision.token in (params.eos_token_ids or ()):
                                finish = FinishReason.EOS
                            elif text.stopped:
                                finish = FinishReason.STOP
                                break
                        released = text.release(self._node_of)
                        for token in released[known:]:
                            yield token
                        known = max(0, known - len(released))
                        if not released:  # nothing is written, so brief steps would keep the event loop to themselves
                            await asyncio.sleep(0)
                        if finish is not FinishReason.LENGTH:
                            break
            finally:
                await chain.close()
            for token in text.finish(self._node_of)[known:]:
                yield token
            if text.stopped and finish is FinishReason.LENGTH:
                finish = FinishReason.STOP
            total_s = time.perf_counter() - began
            seed = params.seed if params.temperature else None
            final = Final(finish, text.text, totals.end(finish, total_s, seed))
            if span:
                span.set(**about_answer(final))
            yield final

    async def _prompt_tokens(self, prompt: Sequence[int], likelihoods: Sequence[Likelihood]) -> PromptTokens:
        if len(likelihoods) != len(prompt) - 1:
            raise NodeUnavailable(
                "the log-probabilities of the prompt are not known: the last exit was not asked, since its node cannot "
                "be reached or a limit of bytes is used up"
            )
        return await asyncio.to_thread(self._texts.prompt, prompt, likelihoods)

    def _resumed(self, request: GenerateRequest, policy: Policy, params: SamplingParams) -> tuple[tuple[int, int], ...]:
        """Return the tokens with which an answer goes on after its entry node was lost.

        Raises:
            RequestError: no answer to this request can begin with them.
        """
        resumed, eos = request.resumed, params.eos_token_ids or ()
        if len(resumed) > params.max_new_tokens:
            raise RequestError(f"the answer is resumed after {len(resumed)} tokens of {params.max_new_tokens}")
        if resumed and params.temperature and request.sampling.seed is None:
            raise RequestError("a sampled answer can only be resumed with its seed")
        for i, (token, exit) in enumerate(resumed):
            if token >= self._prompts.vocab_size:
                raise RequestError(
                    f"the answer is resumed with token {token}; the family has {self._prompts.vocab_size} tokens"
                )
            if exit not in self._node_of or exit > policy.deepest:
                raise RequestError(f"the answer is resumed with a token of exit {exit}, which cannot have decided it")
            if token in eos and i + 1 < len(resumed):
                raise RequestError("the answer is resumed with tokens after the one that ends it")
        return resumed

    def _policy(self, request: GenerateRequest) -> Policy:
        """Resolve a request's routing over the topology's."""
        routing = self._routing.updated(request.routing)
        routing.check_family(self._fingerprint)
        routing = replace(routing, draft=min(routing.draft, self._max_draft))
        if request.sampling.prompt_logprobs is not None and routing.mode not in (Mode.EXACT, Mode.FIXED):
            raise RequestError(
                "prompt_logprobs requires mode 'exact' or 'fixed', in which the last exit reads the whole prompt; the "
                f"mode is '{routing.mode}'"
            )
        return Policy.resolve(routing, sorted(self._node_of))

    def _sampling(self, given: SamplingParams, room: int) -> SamplingParams:
        """Fill in the seed and the end tokens, and cut the answer's length to the positions that are left."""
        if given.stop and self._prompts.tokenizer is None:
            raise RequestError("stop strings need a tokenizer; this family has none")
        return given.completed(eos_token_ids=self._eos_token_ids, room=room)
