"""What the entry node does for a user's request: prompt to tokens, the loop until it ends, tokens to text."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from tokenizers.decoders import DecodeStream

from ruyi_flow.errors import CheckpointError, ContextLengthError, RequestError
from ruyi_flow.family.checkpoint import Checkpoint
from ruyi_flow.loop.chain import decode
from ruyi_flow.requests import GenerateRequest
from ruyi_flow.routing.policy import Policy
from ruyi_flow.serving.engine import Engine
from ruyi_flow.types import Decision, Final, FinishReason, Hop, Stats, Token

__all__ = ["Entry", "end_tokens", "load_tokenizer", "prompt_ids"]

_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")
"""Tokens that end a turn in chat templates; many checkpoints' generation_config names only the end of the text."""


class Entry:
    """The entry node: answers users' requests with an engine's stages.

    Args:
        engine: of the topology's first node.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        checkpoint, topology = engine.checkpoint, engine.topology
        self.tokenizer = load_tokenizer(checkpoint)
        self.eos_token_ids = end_tokens(checkpoint, self.tokenizer)
        self._exits = checkpoint.config.exits
        self._routing = topology.policy.routing("topology")
        self._node_of = {p: node.name for node in topology.nodes for p in node.exits}

    async def generate(self, request: GenerateRequest, timeout_s: float | None) -> AsyncGenerator[Token | Final, None]:
        """Answer a request: tokens as they are decided, then one `Final`.

        Raises:
            RequestError: a parameter, an empty prompt, or a prompt past the context.
            NodeError: a node that cannot serve it.
        """
        began = time.perf_counter()
        routing = request.routing or self._routing
        if request.draft is not None:
            routing = replace(routing, draft=request.draft)
        if request.fallback is not None:
            routing = replace(routing, fallback=request.fallback)
        if routing.family not in (None, self.engine.checkpoint.fingerprint):
            raise RequestError(
                f"the policy was calibrated for family {str(routing.family)[:12]}, this is "
                f"{self.engine.checkpoint.fingerprint[:12]}; calibrate one for it: ruyi-flow trace, ruyi-flow calibrate"
            )
        policy = Policy.resolve(routing, self._exits)
        policy = replace(policy, draft=min(policy.draft, self.engine.max_draft))
        config = self.engine.checkpoint.config
        prompt = prompt_ids(request, self.tokenizer, config.vocab_size, self.engine.topology.family)
        context = config.max_positions
        if len(prompt) >= context:
            raise ContextLengthError(
                f"the prompt has {len(prompt)} tokens, which leaves no room in the family's context of {context}; "
                "shorten it"
            )
        given = request.sampling
        params = replace(
            given,
            seed=(secrets.randbits(63) if given.temperature else 0) if given.seed is None else given.seed,
            eos_token_ids=self.eos_token_ids if given.eos_token_ids is None else given.eos_token_ids,
            max_new_tokens=min(given.max_new_tokens, context - len(prompt)),
            min_new_tokens=min(given.min_new_tokens, context - len(prompt)),
        )
        if params.stop and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer, and this family has none")

        text = _Text(self.tokenizer, params.stop)
        chain = await self.engine.open_entry(
            policy, params, len(prompt), len(prompt) + params.max_new_tokens, timeout_s
        )
        count, first_token_s, drafted, accepted, escalations = 0, 0.0, 0, 0, 0
        hops: dict[str, Hop] = {}
        finish = FinishReason.LENGTH
        try:
            async with aclosing(decode(chain, prompt, params.max_new_tokens)) as rounds:
                async for round_ in rounds:
                    drafted += round_.drafted
                    accepted += round_.accepted
                    escalations += len(round_.hops) > 1
                    for hop in round_.hops:
                        hops.setdefault(hop.node, Hop(hop.node)).add(hop)
                    after_s, bytes_up = time.perf_counter() - began, sum(hop.bytes_up for hop in round_.hops)
                    first_token_s = first_token_s or after_s
                    for decision in round_.decisions:
                        count += 1
                        text.push(decision, after_s, bytes_up)
                        bytes_up = 0
                        if decision.token in (params.eos_token_ids or ()):
                            finish = FinishReason.EOS
                        elif text.stopped:
                            finish = FinishReason.STOP
                            break
                    released = text.release(self._node_of)
                    for token in released:
                        yield token
                    if not released:  # without a message to write, brief steps would keep the event loop to themselves
                        await asyncio.sleep(0)
                    if finish is not FinishReason.LENGTH:
                        break
        finally:
            await chain.close()
        for token in text.release(self._node_of, everything=True):
            yield token
        yield Final(
            finish,
            text.text,
            Stats(
                prompt_tokens=len(prompt),
                new_tokens=count,
                first_token_s=first_token_s,
                total_s=time.perf_counter() - began,
                seed=params.seed or 0,
                drafted=drafted,
                accepted=accepted,
                escalations=escalations,
                hops=tuple(hops.values()),
            ),
        )


def prompt_ids(request: GenerateRequest, tokenizer: Any, vocab: int, family: str) -> list[int]:
    """A request's prompt as token ids.

    Args:
        tokenizer: the family's, or None.
        vocab: size of its vocabulary.
        family: its name, for messages.

    Raises:
        RequestError: an empty prompt, or one that the tokenizer or the chat template refuses.
    """
    prompt = request.prompt
    if not prompt:
        raise RequestError("the prompt is empty; give it some text")
    if not isinstance(prompt, str) and isinstance(prompt[0], int):
        ids = [i for i in prompt if isinstance(i, int)]
        if len(ids) != len(prompt) or min(ids) < 0 or max(ids) >= vocab:
            raise RequestError(f"token ids must be 0 … {vocab - 1}")
        return ids
    if tokenizer is None:
        raise RequestError(f"family {family!r} has no tokenizer.json; give token ids as the prompt")
    if isinstance(prompt, str) and request.raw:
        return _tokens(tokenizer, vocab, prompt)
    turns = [("user", prompt)] if isinstance(prompt, str) else [t for t in prompt if isinstance(t, tuple)]
    if not any(content.strip() for _, content in turns):
        raise RequestError("the prompt is empty; give it some text")
    if tokenizer.chat_template is None:
        raise RequestError("this family has no chat template; send the prompt with raw=True (--raw)")
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program of the family's; it may raise anything
        raise RequestError(f"the family's chat template refuses these messages: {error}") from None
    return _tokens(tokenizer, vocab, text, add_special_tokens=False)


def _tokens(tokenizer: Any, vocab: int, text: str, **options: bool) -> list[int]:
    try:
        ids = list(tokenizer(text, **options)["input_ids"])
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise RequestError(f"the family's tokenizer refuses this text: {error}") from None
    if not ids:
        raise RequestError("the prompt is empty; give it some text")
    if max(ids) >= vocab:
        raise RequestError(f"the family's tokenizer gives token {max(ids)}, but its vocabulary has {vocab}")
    return ids


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The family's tokenizer (transformers), or None when it has no tokenizer.json."""
    if not (checkpoint.folder / "tokenizer.json").exists():
        return None
    from transformers import PreTrainedTokenizerFast

    try:
        return PreTrainedTokenizerFast.from_pretrained(checkpoint.folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint.folder}: its tokenizer files cannot be read: {error}") from None


def end_tokens(checkpoint: Checkpoint, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end an answer: the configs', the tokenizer's, and the one that ends a turn in the template."""
    ids = list(checkpoint.eos_token_ids)
    if tokenizer is not None:
        if tokenizer.eos_token_id is not None:
            ids.append(int(tokenizer.eos_token_id))
        ids += [
            int(tokenizer.convert_tokens_to_ids(end))
            for end in _TURN_ENDS
            if end in (tokenizer.chat_template or "") and end in tokenizer.get_vocab()
        ]
    return tuple(dict.fromkeys(ids))


class _Text:
    """Tokens to text; holds back what may be the start of a stop string."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._tokenizer = None if tokenizer is None else tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = stop
        self._pending: list[tuple[Decision, str, float, int]] = []
        self._released = 0
        self.text = ""
        self.stopped = False

    def push(self, decision: Decision, after_s: float, bytes_up: int) -> None:
        """Take a decided token, with when that was and what it cost."""
        piece = "" if self._tokenizer is None else self._stream.step(self._tokenizer, decision.token) or ""
        # A stop string may begin before this piece, but not wholly so.
        start = max(0, len(self.text) - max(map(len, self._stop), default=0) + 1)
        self.text += piece
        found = [i for i in (self.text.find(s, start) for s in self._stop) if i >= 0]
        if found:
            self.stopped = True
            self.text = self.text[: min(found)]
        self._pending.append((decision, piece, after_s, bytes_up))

    def release(self, node_of: dict[int, str], everything: bool = False) -> list[Token]:
        """Tokens whose text is certain."""
        certain = len(self.text)
        if not everything and not self.stopped:
            certain -= max((n for s in self._stop for n in range(1, len(s)) if self.text.endswith(s[:n])), default=0)
        tokens = []
        while self._pending:
            d, piece, after_s, bytes_up = self._pending[0]
            end = self._released + len(piece)
            if end > certain and not everything and not self.stopped:
                break
            shown = piece[: max(0, certain - self._released)]
            tokens.append(Token(d.token, shown, d.exit, node_of[d.exit], d.confidence, d.reason, after_s, bytes_up))
            self._released = end
            del self._pending[0]
        return tokens
