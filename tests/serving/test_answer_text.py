"""Decided tokens become the text that transformers decodes, and nothing of a stop string is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ruyi_flow import AsyncClient
from ruyi_flow.errors import RequestError
from ruyi_flow.requests import SamplingParams
from ruyi_flow.serving.answer_text import AnswerText
from ruyi_flow.testing import cluster, cut_topology, tiny_family
from ruyi_flow.types import Decision, Reason

NODE_OF = {6: "n0"}


def byte_fallback() -> Any:
    """A vocabulary of pieces and of single bytes, as Llama 2, TinyLlama and Mistral have it."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{b:02X}>": 3 + b for b in range(256)}
    for piece in ("▁", *"abcdefghijklmnopqrstuvwxyz.,é", "▁hi", "▁there", "界"):
        vocab[piece] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


def byte_level() -> Any:
    """A vocabulary of single bytes, and of some tokens that end inside a character, as GPT-2 and Qwen have it."""
    alphabet = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    encoded = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("世界")[0][0]
    vocab = alphabet | {encoded[:2]: 256, encoded[:4]: 257}
    tokenizer = Tokenizer(models.BPE(vocab, [(encoded[0], encoded[1])], unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


TOKENIZERS = {"byte fallback": byte_fallback(), "byte level": byte_level()}


def answer(tokenizer: Any, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[str, list[str]]:
    """Return the answer's text, and the texts of its tokens."""
    text, pieces = AnswerText(tokenizer, stop), []
    for token in ids:
        text.push(Decision(token, 6, 1.0, Reason.DEEPEST), 0.0, 0)
        pieces += [t.text for t in text.release(NODE_OF)]
        if text.stopped:
            break
    pieces += [t.text for t in text.finish(NODE_OF)]
    return text.text, pieces


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
def test_no_sequence_of_tokens_ends_an_answer(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) + 3), max_size=40))
    text, pieces = answer(tokenizer, ids)
    assert "".join(pieces) == text and len(pieces) == len(ids)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=st.text(st.sampled_from("abc é界世😀👩‍🚀.,  "), min_size=1, max_size=30))
def test_the_text_of_tokens_is_the_text_of_the_answer(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert answer(tokenizer, ids)[0] == tokenizer.decode(ids, skip_special_tokens=True)


def test_bytes_that_are_no_character_become_replacement_characters() -> None:
    tokenizer = TOKENIZERS["byte fallback"]
    vocab = tokenizer.get_vocab()
    ids = [vocab[t] for t in ("<0x41>", "<0xE6>", "▁hi", "▁there")]
    assert answer(tokenizer, ids)[0] in ("A� hi there", "A�� hi there", "�� hi there")
    apostrophe = [vocab[f"<0x{b:02X}>"] for b in "’".encode()]
    assert answer(tokenizer, [*apostrophe, vocab["<0xE2>"], vocab["a"]])[0].endswith("�a")


def test_an_answer_that_is_cut_inside_a_character_keeps_what_comes_before_it() -> None:
    tokenizer = TOKENIZERS["byte level"]
    text, pieces = answer(tokenizer, [257])  # one character and the first byte of the next
    assert text == tokenizer.decode([257]) == "世�" and pieces == ["世�"]


def test_special_tokens_have_no_text_and_no_space_is_lost_after_them() -> None:
    tokenizer = TOKENIZERS["byte fallback"]
    vocab = tokenizer.get_vocab()
    ids = [vocab["▁hi"], *[1] * 10, vocab["▁there"], 2]
    assert answer(tokenizer, ids) == ("hi there", ["hi", *[""] * 10, " there", ""])


@given(
    pieces=st.lists(st.text("ab", max_size=3), max_size=12),
    stop=st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3),
)
def test_an_answer_ends_where_the_first_stop_string_begins(pieces: list[str], stop: list[str]) -> None:
    tokenizer = TOKENIZERS["byte level"]
    letters = {char: tokenizer.get_vocab()[char] for char in "ab"}
    ids = [letters[char] for char in "".join(pieces)]
    expected = "".join(pieces)
    for end in range(len(expected) + 1):
        if starts := [at for s in stop if (at := expected[:end].find(s)) >= 0]:
            expected = expected[: min(starts)]
            break
    text, shown = answer(tokenizer, ids, tuple(stop))
    assert text == expected and "".join(shown) == expected


def test_text_that_may_begin_a_stop_string_is_held_back_until_it_is_certain() -> None:
    tokenizer = TOKENIZERS["byte level"]
    vocab = tokenizer.get_vocab()
    text, shown = AnswerText(tokenizer, ("aab",)), []
    for char in "aaac":
        text.push(Decision(vocab[char], 6, 1.0, Reason.DEEPEST), 0.0, 0)
        shown.append("".join(t.text for t in text.release(NODE_OF)))
    assert shown == ["", "", "a", "aac"]


@pytest.mark.parametrize("stop", [["x"] * 17, ["x" * 1001], ["x" * 1_000_000]])
def test_stop_strings_are_few_and_short(stop: list[str]) -> None:
    with pytest.raises(RequestError, match="there may be 16 of 1000 characters"):
        SamplingParams(stop=tuple(stop))
    SamplingParams(stop=tuple("x" * 1000 for _ in range(16)))


async def test_answers_of_a_byte_fallback_vocabulary_reach_their_end(tmp_path: Path) -> None:
    folder = tmp_path / "family"
    tokenizer = TOKENIZERS["byte fallback"]
    tiny_family(folder, vocab_size=len(tokenizer) + 8, eos_token_id=2)
    tokenizer.save_pretrained(folder)
    topology = cut_topology(folder, [[2, 4, 6]])
    async with cluster(topology) as nodes, AsyncClient(nodes.topology) as client:
        for seed in range(3):
            reply = await client.generate(
                "hello", raw=True, temperature=2.0, seed=seed, max_new_tokens=200, eos_token_ids=(), draft=0
            )
            assert len(reply.tokens) == 200 and "".join(t.text for t in reply.tokens) == reply.text
        await nodes.settle()
