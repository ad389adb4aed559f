"""The tokens of a GGUF file are llama.cpp's, for each kind of tokenizer that is accepted; others are refused by name.

`data/gguf/tokens.json` has what llama.cpp gives for two small vocabularies. Its own whole vocabularies, with the
tokens that it is tested with, come from PyPI and are kept in the local store.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from gguf import GGUFWriter
from transformers import PreTrainedTokenizerFast

from ruyi_flow.errors import CheckpointError
from ruyi_flow.family import store
from ruyi_flow.family.gguf import convert_gguf
from ruyi_flow.family.gguf_file import GGUFFile
from ruyi_flow.family.gguf_tokenizer import PRE_TOKENIZERS, GGUFTokenizer
from ruyi_flow.local import load_family
from tests.family.gguf_kit import BYTES, add, tiny_model, vocabulary, write_gguf

SDIST = (
    "https://files.pythonhosted.org/packages/ec/e9/e7de2b0463ea3ffbf0ede6cb21b58c1258a8f6521aae45ca773a59fe7cf3/"
    "llama_cpp_python-0.3.36.tar.gz"
)
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
WHOLE = ["llama-bpe", "llama-spm", "qwen2", "qwen35", "deepseek-llm", "deepseek-coder", "gpt-2", "mpt"]
WHOLE += ["starcoder", "refact", "falcon", "phi-3"]

SPECIAL = {"<s>": 3, "<end>": 3, "<｜User｜>": 3, "<｜Assistant｜>": 3, "<think>": 4, "</think>": 4}
R1_DISTILL = {
    151643: "<｜end▁of▁sentence｜>",
    151644: "<｜User｜>",
    151645: "<｜Assistant｜>",
    151646: "<｜begin▁of▁sentence｜>",
    151648: "<think>",
    151649: "</think>",
}


@pytest.fixture(scope="module")
def expected() -> Any:
    return json.loads((Path(__file__).parents[1] / "data/gguf/tokens.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def vocabularies() -> Path:
    """Folder of llama.cpp's vocabularies, fetched once into the local store."""
    folder = store.home() / "llama.cpp-vocabularies"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if folder.exists():
            return folder
        archive, partial = folder.with_suffix(".tar.gz"), folder.with_suffix(".partial")
        try:
            with urllib.request.urlopen(SDIST, timeout=60) as source, archive.open("wb") as target:
                shutil.copyfileobj(source, target)
        except OSError as error:
            pytest.skip(f"llama.cpp's vocabularies are not in the store and cannot be fetched from PyPI: {error}")
        assert hashlib.sha256(archive.read_bytes()).hexdigest() == SHA256
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        wanted = {f"ggml-vocab-{name}.gguf{end}" for name in WHOLE for end in ("", ".inp", ".out")}
        with tarfile.open(archive) as files:
            for member in files:
                if (name := Path(member.name).name) in wanted and (content := files.extractfile(member)):
                    (partial / name).write_bytes(content.read())
        archive.unlink()
        partial.rename(folder)
    return folder


def tokenizer_of(path: Path, metadata: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Write a file with this metadata and no tensors, and return its tokenizer."""
    writer = GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if value is not None:
            add(writer, key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return GGUFTokenizer(GGUFFile(path)).to_transformers()


def bytes_and_merges(expected: Any, pre: str | None) -> dict[str, Any]:
    merged = dict.fromkeys(merge.replace(" ", "") for merge in expected["merges"])
    tokens = [*BYTES, *merged, "Ġunreachable", *SPECIAL]
    ids = {"tokenizer.ggml.bos_token_id": tokens.index("<s>"), "tokenizer.ggml.eos_token_id": tokens.index("<end>")}
    return vocabulary(tokens, expected["merges"], SPECIAL, pre) | ids


def test_each_rule_for_words_gives_llama_cpps_tokens(tmp_path: Path, expected: Any) -> None:
    seen = set()
    for group in expected["byte_level"]:
        for pre in group["pre"]:
            tokenizer = tokenizer_of(tmp_path / "t.gguf", bytes_and_merges(expected, pre))
            for text, ids in zip(expected["texts"], group["ids"], strict=True):
                assert tokenizer(text)["input_ids"] == ids, (pre, text)
                assert tokenizer.decode(ids) in (text, f"<s>{text}")
            seen.add(pre or "default")
    assert seen == set(PRE_TOKENIZERS)


def test_scores_give_llama_cpps_tokens(tmp_path: Path, expected: Any) -> None:
    words, characters = expected["words"], list(expected["characters"])
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        *words,
        *characters,
        "<｜User｜>",
        "<think>",
    ]
    ranks = [*(-float(i) for i in range(len(words))), *(-1000.0 - i for i in range(len(characters)))]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(ranks), 3, 4],
        "tokenizer.ggml.scores": [*[0.0] * 259, *ranks, -1000.0, -1000.0],
    }
    for group in expected["sentencepiece"]:
        given = {**metadata, "tokenizer.ggml.add_space_prefix": group["add_space_prefix"]}
        tokenizer = tokenizer_of(tmp_path / "t.gguf", given)
        for text, ids in zip(expected["texts"], group["ids"], strict=True):
            assert tokenizer(text)["input_ids"] == ids, text
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)


def test_qwen2_composes_a_text_first(tmp_path: Path, expected: Any) -> None:
    for pre, composes in (("qwen2", True), ("deepseek-r1-qwen", False), ("llama-bpe", False)):
        tokenizer = tokenizer_of(tmp_path / "t.gguf", bytes_and_merges(expected, pre))
        assert (tokenizer("e\u0301")["input_ids"] == tokenizer("é")["input_ids"]) == composes


def test_a_family_has_the_files_tokens_template_and_ends(tmp_path: Path, expected: Any) -> None:
    metadata = bytes_and_merges(expected, "smollm")
    tokens = metadata["tokenizer.ggml.tokens"]
    template = "{% for m in messages %}<｜User｜>{{ m['content'] }}{% endfor %}<｜Assistant｜>"
    metadata |= {"tokenizer.chat_template": template, "tokenizer.ggml.add_bos_token": True}
    metadata |= {"tokenizer.ggml.add_eos_token": True, "tokenizer.ggml.padding_token_id": tokens.index("<end>")}
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama", vocab_size=len(tokens) + 5), metadata=metadata)
    tokenizer = load_family(path, exits=[1]).tokenizer
    begin, user, assistant, end = (tokens.index(t) for t in ("<s>", "<｜User｜>", "<｜Assistant｜>", "<end>"))
    assert tokenizer("<think>")["input_ids"] == [begin, tokens.index("<think>"), end]
    told = tokenizer.apply_chat_template([{"role": "user", "content": "A"}], tokenize=False)
    assert tokenizer(told, add_special_tokens=False)["input_ids"] == [user, tokens.index("A"), assistant]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "<end>", "<end>")
    assert (
        len(tokenizer) == len(tokens)
        and tokenizer.decode([user, tokens.index("A"), end], skip_special_tokens=True) == "A"
    )


@pytest.mark.parametrize(
    ("named", "unknown", "ends"),
    [
        (["<|eot_id|>", "<|end_of_text|>", "<|eom_id|>", "<|start|>"], None, [0, 1, 2]),
        (["<|im_end|>", "<|endoftext|>"], None, [0, 1]),
        (["<|im_end|>", "<|endoftext|>"], "<|endoftext|>", [0]),  # SmolLM2's, whose answers end with one token
    ],
)
def test_special_tokens_that_end_answers_are_ends(
    tmp_path: Path, named: list[str], unknown: str | None, ends: list[int]
) -> None:
    metadata = vocabulary([*BYTES, *named, "ab"], ["a b"], dict.fromkeys(named, 3))
    metadata |= {"tokenizer.ggml.eos_token_id": 256, "tokenizer.ggml.bos_token_id": 256}
    if unknown:
        metadata["tokenizer.ggml.unknown_token_id"] = 256 + named.index(unknown)
    tokenizer_of(tmp_path / "t.gguf", metadata)
    assert GGUFTokenizer(GGUFFile(tmp_path / "t.gguf")).ends == tuple(256 + end for end in ends)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("pre", "tekken", "tokenizer.ggml.pre is not supported; known: llama-bpe, .*: 'tekken'"),
        ("model", "t5", "tokenizer.ggml.model is not supported; known: gpt2 and llama: 't5'"),
        ("model", None, "tokenizer.ggml.model is missing"),
        ("tokens", None, "tokenizer.ggml.tokens is missing"),
        ("merges", None, "tokenizer.ggml.merges is missing"),
        ("merges", ["a q1"], "its merges do not fit its tokens"),
        ("merges", ["ab"], "its merges do not fit its tokens"),
        ("merges", [1, 2], "tokenizer.ggml.merges cannot be used"),
        ("tokens", ["a", "a"], "its 2 tokens are not distinct"),
        ("token_type", [1, 1], "are not distinct, or lack types"),
        ("eos_token_id", 9999, "tokenizer.ggml.eos_token_id is no token; the vocabulary has 259: 9999"),
        ("add_space_prefix", True, "tokenizer.ggml.add_space_prefix is not supported with a byte-level"),
        ("add_sep_token", True, "tokenizer.ggml.add_sep_token is not supported: True"),
        ("remove_extra_whitespaces", True, "tokenizer.ggml.remove_extra_whitespaces is not supported"),
        ("precompiled_charsmap", [1, 2], "tokenizer.ggml.precompiled_charsmap is not supported"),
        ("suppress_tokens", [3], "tokenizer.ggml.suppress_tokens is not supported"),
        ("normalizer.lowercase", True, "tokenizer.ggml.normalizer.lowercase is not supported"),
        ("something_new", 1, "tokenizer.ggml.something_new is not supported: 1"),
    ],
)
def test_a_tokenizer_of_another_kind_is_refused_by_name(tmp_path: Path, key: str, value: Any, told: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), metadata={f"tokenizer.ggml.{key}": value})
    with pytest.raises(CheckpointError, match=told):
        convert_gguf(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_must_fit_the_embedding(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama", vocab_size=200))
    with pytest.raises(CheckpointError, match="its tokenizer has 259 tokens, but its embedding has 200"):
        load_family(path)
    needs_begin = {"tokenizer.ggml.bos_token_id": None, "tokenizer.ggml.add_bos_token": True}
    path = write_gguf(tmp_path / "b.gguf", tiny_model("llama"), metadata=needs_begin)
    with pytest.raises(CheckpointError, match="tokenizer.ggml.bos_token_id is missing, but texts need it"):
        load_family(path)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", WHOLE)
def test_whole_vocabularies_give_the_tokens_of_llama_cpps_own_tests(vocabularies: Path, name: str) -> None:
    path = vocabularies / f"ggml-vocab-{name}.gguf"
    tokenizer = GGUFTokenizer(GGUFFile(path)).to_transformers()
    with open(f"{path}.inp", encoding="utf-8", newline="") as file:
        *texts, rest = file.read().split("\n__ggml_vocab_test__\n")
    lines = Path(f"{path}.out").read_text().splitlines()
    assert len(lines) > 40 and rest == ""
    for text, line in zip(texts, lines, strict=True):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == [int(token) for token in line.split()], text
    if name == "llama-bpe":
        assert tokenizer("hi")["input_ids"] == [128000, 6151]
        assert tokenizer("Cửa Việt", add_special_tokens=False)["input_ids"] == [34, 91163, 101798]


@pytest.mark.timeout(300)
def test_control_tokens_that_are_not_ascii_keep_their_ids(vocabularies: Path, tmp_path: Path) -> None:
    """As DeepSeek-R1's distillations of Qwen have them."""
    metadata = {
        key: value
        for key, value in GGUFFile(vocabularies / "ggml-vocab-qwen2.gguf").metadata.items()
        if key.startswith("tokenizer.ggml.")
    }
    for token, text in R1_DISTILL.items():
        metadata["tokenizer.ggml.tokens"][token] = text
        metadata["tokenizer.ggml.token_type"][token] = 3 if "｜" in text else 4
    changes = {"pre": "deepseek-r1-qwen", "bos_token_id": 151646, "eos_token_id": 151643, "add_bos_token": True}
    tokenizer = tokenizer_of(tmp_path / "t.gguf", metadata | {f"tokenizer.ggml.{k}": v for k, v in changes.items()})
    assert tokenizer("Who are you?")["input_ids"] == [151646, 15191, 525, 498, 30]
    chat = "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜><think>\n"
    assert tokenizer(chat, add_special_tokens=False)["input_ids"] == [151646, 151644, 13048, 151645, 151648, 198]
    assert len(tokenizer) == 151936 and np.unique([tokenizer.bos_token_id, tokenizer.eos_token_id]).size == 2
