"""Prompts become tokens beside the event loop, and what can never fit is refused before any work."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, pre_tokenizers

from ruyi_flow.errors import ContextLengthError, NodeUnavailable, RequestError
from ruyi_flow.family.checkpoint import Checkpoint
from ruyi_flow.family.tokenizer import PromptEncoder, load_tokenizer
from ruyi_flow.requests import GenerateRequest, SessionOpen
from ruyi_flow.routing.policy import Routing
from ruyi_flow.serving.answering import Answering


@pytest.fixture
def spoken_encoder(spoken: Path) -> PromptEncoder:
    checkpoint = Checkpoint(spoken)
    return PromptEncoder(load_tokenizer(checkpoint), checkpoint.config, family="tiny")


def test_a_prompt_has_the_tokens_that_transformers_gives_it(spoken_encoder: PromptEncoder) -> None:
    tokenizer, text = spoken_encoder.tokenizer, "hello, 世界"
    assert spoken_encoder.encode(text, raw=True) == tokenizer(text)["input_ids"]
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert spoken_encoder.encode(tuple((m["role"], m["content"]) for m in messages)) == rendered


def test_what_can_never_fit_is_refused_before_it_is_encoded(spoken_encoder: PromptEncoder) -> None:
    context = spoken_encoder.context
    assert isinstance(spoken_encoder.encode("x" * (context - 1), raw=True), list)
    for prompt, what in (
        ("x" * 4_000_000, "4000004 characters"),
        ((("user", "x" * 4_000_000),), "4000004 characters"),
        ((("user", "x"),) * 100_000, "100000 messages"),
        ((5,) * 1_000_000, "1000000 tokens"),
        ("x" * context, f"{context} tokens"),
    ):
        with pytest.raises(ContextLengthError, match=what):
            spoken_encoder.encode(prompt, raw=True)


def test_a_panic_of_the_tokenizer_is_a_refusal(spoken: Path) -> None:
    checkpoint = Checkpoint(spoken)
    tokenizer = load_tokenizer(checkpoint)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    prompts = PromptEncoder(tokenizer, checkpoint.config, family="tiny")
    with pytest.raises(RequestError, match="tokenizer refuses this text"):
        prompts.encode("a" * 60 + "!", raw=True)


async def test_prompts_are_encoded_beside_the_event_loop() -> None:
    class Prompts:
        tokenizer, context = None, 100
        thread: threading.Thread | None = None

        def encode(self, prompt: Any, *, raw: bool) -> list[int]:
            self.thread = threading.current_thread()
            return [1, 2, 3]

    async def open(opening: SessionOpen, timeout_s: float | None, prompt: Sequence[int]) -> Any:
        raise NodeUnavailable("no node here")

    prompts = Prompts()
    answering = Answering(
        open,
        prompts,  # type: ignore[arg-type]
        fingerprint="",
        eos_token_ids=(),
        routing=Routing(),
        node_of={6: "n0"},
        family="tiny",
        max_draft=4,
    )
    with pytest.raises(NodeUnavailable):
        async for _ in answering.generate(GenerateRequest("hello"), None):
            pass
    assert prompts.thread not in (None, threading.current_thread())
