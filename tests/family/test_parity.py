"""Hugging Face folders against the transformers that is installed: what it runs is run alike, or refused.

`data/configs.json` has config.json and generation_config.json files as published, with the context that the model
has; the sizes are shrunk here, and the weights are random. `data/templates.json` has published chat templates,
without tools.
"""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.convert_slow_tokenizer import import_protobuf

from ruyi_flow.errors import CheckpointError, ContextLengthError
from ruyi_flow.family.checkpoint import Checkpoint, cut
from ruyi_flow.family.config import FamilyConfig
from ruyi_flow.family.store import pull
from ruyi_flow.family.tokenizer import PromptEncoder, end_tokens, load_tokenizer
from ruyi_flow.family.transformer import Rope
from ruyi_flow.local import load_family
from ruyi_flow.requests import Prompt

DATA = Path(__file__).parent / "data"
CONFIGS: dict[str, dict[str, Any]] = json.loads((DATA / "configs.json").read_text())
TEMPLATES: dict[str, str] = json.loads((DATA / "templates.json").read_text(encoding="utf-8"))
VOCABULARY = 96
IDS = torch.randint(3, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(1))


def prompt_ids(prompt: Prompt, tokenizer: Any, *, raw: bool = False) -> list[int]:
    """The token ids of a prompt, for a family with room for all tokens of the tokenizer."""
    config = replace(
        FamilyConfig.parse(CONFIGS["SmolLM2-135M-Instruct"]["config"]), vocab_size=1000, max_positions=4096
    )
    return PromptEncoder(tokenizer, config, family="f").encode(prompt, raw=raw)


def folded(values: dict[str, Any]) -> dict[str, Any]:
    """The same file with its token ids folded into the small vocabulary."""

    def fold(ids: Any) -> Any:
        return [i % VOCABULARY for i in ids] if isinstance(ids, list) else None if ids is None else ids % VOCABULARY

    return {k: fold(v) if k.endswith("_token_id") else copy.deepcopy(v) for k, v in values.items()}


def shrunk(config: dict[str, Any]) -> dict[str, Any]:
    """The same config with small sizes, and every other key as published."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": VOCABULARY, "head_dim": 16}
    if config.get("num_key_value_heads"):
        sizes["num_key_value_heads"] = 4 if config["num_key_value_heads"] == config["num_attention_heads"] else 2
    return folded(config) | {k: v for k, v in sizes.items() if k in config}


def write(folder: Path, config: dict[str, Any], generation: dict[str, Any] | None = None, **options: Any) -> Any:
    """Write a folder with random weights and these files; returns the model that transformers reads from it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**copy.deepcopy(config)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.3) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder, **options)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return theirs(folder)


def theirs(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def check_logits(folder: Path, model: Any) -> None:
    """Our logits at every position are transformers' within 1e-4."""
    expected = model(IDS).logits
    found = load_family(folder, dtype="float32").logits(IDS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_published_config_is_run_as_transformers_runs_it(tmp_path: Path, name: str) -> None:
    row = CONFIGS[name]
    raw = shrunk(row["config"])
    model = write(tmp_path, raw, folded(row["generation"]) if "generation" in row else None)
    check_logits(tmp_path, model)
    checkpoint = Checkpoint(tmp_path)
    config = checkpoint.config
    assert config.max_positions == row["context"] and config.max_positions >= model.config.max_position_embeddings
    ends, told = set(end_tokens(checkpoint, None)), {"config": raw, "generation": row.get("generation", {})}
    asked = model.generation_config.eos_token_id
    assert set(asked if isinstance(asked, list) else [asked]) <= ends, told
    rope, rotary = Rope(config, torch.float32, torch.device("cpu")), model.model.rotary_emb
    torch.testing.assert_close(rope.inv_freq, rotary.inv_freq, rtol=1e-6, atol=0)
    assert rope.scale == pytest.approx(rotary.attention_scaling)
    # The same file as this transformers writes it, which nests and renames keys.
    model.config.save_pretrained(tmp_path / "saved")
    assert FamilyConfig.parse(json.loads((tmp_path / "saved" / "config.json").read_text())) == config


def test_positions_far_out_in_a_grown_context_are_those_of_transformers(tmp_path: Path) -> None:
    raw = shrunk(CONFIGS["Qwen2.5-7B-Instruct, long texts"]["config"])
    model = write(
        tmp_path,
        raw
        | {"max_position_embeddings": 8, "rope_scaling": raw["rope_scaling"] | {"original_max_position_embeddings": 8}},
    )
    assert Checkpoint(tmp_path).config.max_positions == 32 > IDS.shape[1] > 8
    check_logits(tmp_path, model)


def test_dynamic_positions_end_with_the_context_that_they_do_not_change(tmp_path: Path) -> None:
    raw = shrunk(CONFIGS["Llama-2-7B"]["config"]) | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
    model = write(tmp_path, raw | {"max_position_embeddings": IDS.shape[1]})
    check_logits(tmp_path, model)
    with pytest.raises(ContextLengthError, match="dynamic is supported up to 24 positions, not for 25"):
        load_family(tmp_path, dtype="float32").logits(torch.cat([IDS, IDS[:, :1]], 1))


@pytest.mark.parametrize(
    "model_type", ["mistral", "mixtral", "gemma2", "phi3", "qwen2_moe", "qwen3_moe", "gpt2", "smollm3", "deepseek_v3"]
)
def test_another_architecture_is_refused_by_name(model_type: str) -> None:
    with pytest.raises(CheckpointError, match=f"model_type is '{model_type}', an architecture that is not supported"):
        FamilyConfig.parse(json.loads(AutoConfig.for_model(model_type).to_json_string(use_diff=False)))


def test_weights_that_slide_or_are_quantized_are_refused(tmp_path: Path) -> None:
    qwen, longrope = CONFIGS["Qwen2.5-7B-Instruct"]["config"], {"type": "longrope"}
    for change, message in (
        ({"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 4}, "sliding-window"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized weights"),
        ({"rope_scaling": longrope | {"short_factor": [1.0], "long_factor": [1.0]}}, "short_factor has 1 numbers"),
        ({"rope_scaling": longrope | {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}}, "the same long_factor"),
    ):
        with pytest.raises(CheckpointError, match=message):
            FamilyConfig.parse(shrunk(qwen) | change)


# Files of weights


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    write(tmp_path / "qwen", shrunk(CONFIGS["Qwen2.5-7B-Instruct"]["config"]))
    return tmp_path / "qwen"


def test_a_base_models_names_are_read(qwen: Path) -> None:
    tensors = load_file(qwen / "model.safetensors")
    save_file({k.removeprefix("model."): v for k, v in tensors.items()}, qwen / "model.safetensors", {"format": "pt"})
    check_logits(qwen, theirs(qwen))
    assert Checkpoint(cut(Checkpoint(qwen), (1,), qwen.parent / "family")).fingerprint == Checkpoint(qwen).fingerprint


def test_a_missing_head_is_refused(qwen: Path) -> None:
    tensors = load_file(qwen / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, qwen / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        load_family(qwen, dtype="float32")


def test_a_single_file_comes_before_an_index(qwen: Path) -> None:
    (qwen / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": "none"}}))
    check_logits(qwen, theirs(qwen))


def test_parts_are_read_as_the_index_says(tmp_path: Path) -> None:
    raw = shrunk(CONFIGS["Llama-3.1-8B-Instruct"]["config"])
    model = write(tmp_path, raw, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    check_logits(tmp_path, model)
    # A stale copy of a tensor in a part that the index does not name for it is not read.
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    name, last = "model.embed_tokens.weight", sorted(set(index["weight_map"].values()))[-1]
    assert index["weight_map"][name] != last
    stale = load_file(tmp_path / last) | {name: torch.zeros(VOCABULARY, 32)}
    save_file(stale, tmp_path / last, {"format": "pt"})
    check_logits(tmp_path, model)


@pytest.mark.parametrize("stored", ["both alike", "both, different", "the head"])
def test_a_tied_head_is_what_transformers_makes_of_it(tmp_path: Path, stored: str) -> None:
    write(tmp_path, shrunk(CONFIGS["Qwen3-0.6B"]["config"]))
    tensors = load_file(tmp_path / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = table.flip(0).contiguous() if stored == "both, different" else table.clone()
    if stored == "the head":
        del tensors["model.embed_tokens.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    check_logits(tmp_path, theirs(tmp_path))
    family = cut(Checkpoint(tmp_path), (1,), tmp_path / "family")
    check_logits(family, theirs(tmp_path))


# Ends


@pytest.mark.parametrize("form", ["config", "config list", "generation", "generation list", "tokenizer"])
def test_an_answer_ends_at_an_end_token_in_any_form(tmp_path: Path, form: str) -> None:
    raw = shrunk(CONFIGS["Llama-3-8B-Instruct"]["config"]) | {"eos_token_id": None}
    model = write(tmp_path, raw)
    asked: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
    free = model.generate(IDS, max_new_tokens=12, **asked)[0, IDS.shape[1] :]
    assert load_family(tmp_path, dtype="float32").generate(IDS, max_new_tokens=12)[0].tolist() == free.tolist()
    end = int(free[4])
    ids: Any = [end, VOCABULARY - 1] if form.endswith("list") else end
    (tmp_path / "config.json").write_text(json.dumps(raw | ({"eos_token_id": ids} if "config" in form else {})))
    if "generation" in form:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    if form == "tokenizer":
        words = {f"w{i}": i for i in range(VOCABULARY)}
        Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": f"w{end}"}))
        asked["eos_token_id"] = end  # transformers' generate does not ask the tokenizer
    expected = theirs(tmp_path).generate(IDS, max_new_tokens=12, **asked)[0, IDS.shape[1] :]
    assert expected[-1] == end and len(expected) <= 5
    found = load_family(tmp_path, dtype="float32").generate(IDS, max_new_tokens=12, min_new_tokens=0)[0]
    assert found.tolist() == expected.tolist()


def test_end_tokens_beyond_the_vocabulary_are_left_out(tmp_path: Path) -> None:
    raw = shrunk(CONFIGS["Llama-3-8B-Instruct"]["config"])
    write(tmp_path, raw | {"eos_token_id": [128009, 7]}, {"eos_token_id": [VOCABULARY, 9]})
    assert end_tokens(Checkpoint(tmp_path), None) == (7, 9)


# Tokens

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
    "Hello world, this is a test of 123 numbers and 4567 more. 4 ½ months! I'm fine; you'll see. 4 12 and 4 1",
    "user\nWho are you?\nassistant\nYou are Qwen, a helpful assistant.\n\nCửa Việt 你好 世界 🙂 \t def f(x):",
] * 5
TEXTS = [
    *("Hello world", " 4 ½ months 12345", "Who are you?<|im_end|>\nx", "  two  spaces", "I'm you'll", "Cửa Việt 你好"),
    *("<s>[INST] hi [/INST]", "a</s>b </s> c", "\n\n x", "🙂🙂 é e\u0301", "<|begin_of_text|>hi"),
]


def byte_level(*before: Any, normalizer: Any = None, begin: str | None = None) -> Tokenizer:
    """A byte-level BPE vocabulary, trained without the rules that split words first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([word for text in CORPUS for word in text.split(" ", 3)], trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before])
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if begin is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, tokenizer.token_to_id(begin))]
        )
    return tokenizer


def by_regex(pattern: str) -> tuple[Any, Any]:
    return (
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    )


def llama_2() -> Tokenizer:
    """A vocabulary with byte fallback, as converted from a sentencepiece model."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def qwen_words() -> Tokenizer:
    return byte_level(*by_regex(WORDS.replace("{1,3}", "")), normalizer=normalizers.NFC())


def llama_3() -> Tokenizer:
    return byte_level(*by_regex(WORDS), begin="<|begin_of_text|>")


def smollm2() -> Tokenizer:
    return byte_level(
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    )


TOKENIZERS: dict[str, tuple[Callable[[], Tokenizer], str, dict[str, Any]]] = {
    "Qwen2.5": (
        qwen_words,
        "qwen2",
        {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "bos_token": None},
    ),
    "Qwen3": (qwen_words, "qwen3", {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "bos_token": None}),
    "Llama-3": (
        llama_3,
        "llama",
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|eot_id|>", "bos_token": "<|begin_of_text|>"},
    ),
    "DeepSeek-R1-Distill-Llama": (
        llama_3,
        "llama",
        {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
        | {"add_bos_token": True, "add_eos_token": False, "legacy": True},
    ),
    "without a class": (qwen_words, "llama", {"eos_token": "<|im_end|>"}),
    "SmolLM2": (
        smollm2,
        "llama",
        {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
    ),
    "Llama-2": (
        llama_2,
        "llama",
        {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        | {"add_bos_token": True, "add_eos_token": False, "legacy": False},
    ),
}
REWRITTEN = ("SmolLM2", "Llama-2")
"""Tokenizers whose tokenizer.json AutoTokenizer replaces with its class's own rules."""


@pytest.fixture(scope="module")
def models_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with weights for each kind of decoder layer; vocabulary of 1000."""
    folders = {}
    for name in ("Llama-2-7B", "Qwen2.5-7B-Instruct", "Qwen3-8B"):
        raw = shrunk(CONFIGS[name]["config"]) | {"vocab_size": 1000}
        folders[raw["model_type"]] = folder = tmp_path_factory.mktemp(raw["model_type"])
        write(folder, raw)
    return folders


def with_tokenizer(models_of: dict[str, Path], folder: Path, name: str, **settings: Any) -> Path:
    make, model_type, given = TOKENIZERS[name]
    shutil.copytree(models_of[model_type], folder)
    make().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(given | settings))
    return folder


@pytest.mark.parametrize("name", TOKENIZERS)
def test_texts_become_the_tokens_of_tokenizer_json(models_of: dict[str, Path], tmp_path: Path, name: str) -> None:
    folder = with_tokenizer(models_of, tmp_path / "folder", name)
    stored = Checkpoint(cut(Checkpoint(folder), (1,), tmp_path / "family"))
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    auto, alike = AutoTokenizer.from_pretrained(folder), True
    for text in TEXTS:
        expected = plain.encode(text).ids
        for checkpoint in (Checkpoint(folder), stored):
            tokenizer = load_tokenizer(checkpoint)
            found = prompt_ids(text, tokenizer, raw=True)
            assert found == expected, text
            assert tokenizer.decode(found) == plain.decode(expected, skip_special_tokens=False)
            assert end_tokens(checkpoint, tokenizer)[-1] == auto.eos_token_id
        alike = alike and auto(text)["input_ids"] == expected
    assert alike == (name not in REWRITTEN), "AutoTokenizer has changed for this family"


@pytest.mark.parametrize(
    ("model_type", "kind"), [("qwen2", None), ("qwen3", "Qwen2Tokenizer"), ("llama", "GPT2Tokenizer")]
)
def test_vocab_and_merges_are_read_as_auto_tokenizer_reads_them(
    models_of: dict[str, Path], tmp_path: Path, model_type: str, kind: str | None
) -> None:
    folder = Path(shutil.copytree(models_of[model_type], tmp_path / "folder"))
    qwen_words().model.save(str(folder))
    added = {"<|im_end|>": 700, "<|extra|>": 701}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    if kind is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind, "eos_token": "<|im_end|>"}))
    auto = AutoTokenizer.from_pretrained(folder)
    stored = Checkpoint(cut(Checkpoint(folder), (1,), tmp_path / "family"))
    for checkpoint in (Checkpoint(folder), stored):
        tokenizer = load_tokenizer(checkpoint)
        for text in (*TEXTS, "a<|extra|>b"):
            expected = auto(text)["input_ids"]
            assert prompt_ids(text, tokenizer, raw=True) == expected
            assert tokenizer.decode(expected) == auto.decode(expected)
        assert tokenizer.eos_token_id == auto.eos_token_id


@pytest.mark.parametrize(
    "settings", [{}, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False}]
)
def test_a_sentencepiece_model_is_read_as_auto_tokenizer_reads_it(
    models_of: dict[str, Path], tmp_path: Path, settings: dict[str, Any]
) -> None:
    pytest.importorskip("sentencepiece", reason="transformers reads tokenizer.model with it")
    proto = import_protobuf().ModelProto()
    proto.trainer_spec.model_type, proto.trainer_spec.byte_fallback = 2, True  # BPE
    proto.normalizer_spec.name = "identity"
    control = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{i:02X}>", 6) for i in range(256))]
    words = ["▁t", "he", "▁the", "in", "▁h", "▁he", "ll", "llo", "▁hello", *"▁thelinowrd0123"]
    for i, (piece, kind) in enumerate([*control, *((word, 1) for word in words)]):
        proto.pieces.add(piece=piece, score=-float(i), type=kind)
    folder = Path(shutil.copytree(models_of["llama"], tmp_path / "folder"))
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    auto = AutoTokenizer.from_pretrained(folder)
    stored = Checkpoint(cut(Checkpoint(folder), (1,), tmp_path / "family"))
    for checkpoint in (Checkpoint(folder), stored):
        tokenizer = load_tokenizer(checkpoint)
        for text in ("hello  there", " the 12</s>Việt"):
            expected = auto(text)["input_ids"]
            assert prompt_ids(text, tokenizer, raw=True) == expected
            assert tokenizer.decode(expected) == auto.decode(expected)
        assert tokenizer.eos_token_id == auto.eos_token_id == 2


def test_tokenizer_files_that_cannot_be_read_are_refused(
    models_of: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    folder = Path(shutil.copytree(models_of["llama"], tmp_path / "folder"))
    assert load_tokenizer(Checkpoint(folder)) is None
    llama_2().model.save(str(folder))  # transformers needs to be told the class of a Llama's vocab.json
    with pytest.raises(CheckpointError, match="tokenizer files cannot be read: Couldn't instantiate"):
        pull(str(folder))
    (folder / "vocab.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\x0a\x0b")
    monkeypatch.setattr("ruyi_flow.family.tokenizer.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="tokenizer.model needs a package: pip install sentencepiece"):
        pull(str(folder))
    for text in ("{", '{"model": {"type": "BPE", "vocab": 5}}', '{"version": "1.0", "model": {}}', "[" * 100_000):
        (folder / "tokenizer.json").write_text(text)
        with pytest.raises(CheckpointError, match="tokenizer files cannot be read") as caught:
            pull(str(folder))
        assert "\n" not in str(caught.value)


# Templates

CHATS: list[tuple[tuple[str, str], ...]] = [
    (("user", "Hello world"),),
    (("system", "You are terse."), ("user", "Who are you?"), ("assistant", "Qwen"), ("user", " 4 ½ months ")),
]


def template_ids(tokenizer: Any, chat: tuple[tuple[str, str], ...], **options: Any) -> list[int]:
    """The tokens that transformers makes of a chat."""
    messages = [{"role": role, "content": content} for role, content in chat]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **options)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_published_template_makes_the_tokens_of_transformers(
    models_of: dict[str, Path], tmp_path: Path, name: str
) -> None:
    folder = with_tokenizer(models_of, tmp_path / "folder", "Llama-3", chat_template=TEMPLATES[name])
    tokenizer, auto = load_tokenizer(Checkpoint(folder)), AutoTokenizer.from_pretrained(folder)
    for chat in CHATS:
        assert prompt_ids(chat, tokenizer) == template_ids(auto, chat)


@pytest.mark.parametrize("form", ["jinja", "config", "list", "folder", "json", "jinja over config"])
def test_a_template_is_found_in_any_form(models_of: dict[str, Path], tmp_path: Path, form: str) -> None:
    template, other = TEMPLATES["SmolLM2"], "{{ messages[0]['content'] }}<|eot_id|>"
    named = [{"name": "tool_use", "template": other}, {"name": "default", "template": template}]
    inline: dict[str, Any] = {"config": template, "list": named, "jinja over config": other}
    settings = {"chat_template": inline[form]} if form in inline else {}
    folder = with_tokenizer(models_of, tmp_path / "folder", "Llama-3", **settings)
    if form in ("jinja", "folder", "jinja over config"):
        (folder / "chat_template.jinja").write_text(template)
    if form == "folder":
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(other)
    if form == "json":  # which AutoTokenizer leaves to processors
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    given = {"chat_template": template} if form == "json" else {}
    stored = Checkpoint(cut(Checkpoint(folder), (1,), tmp_path / "family"))
    for checkpoint in (Checkpoint(folder), stored):
        tokenizer, auto = load_tokenizer(checkpoint), AutoTokenizer.from_pretrained(folder)
        for chat in CHATS:
            assert prompt_ids(chat, tokenizer) == template_ids(auto, chat, **given)
        im_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert im_end in end_tokens(checkpoint, tokenizer)  # the end of a turn, which no config names


def test_named_templates_without_a_default_are_as_good_as_none(models_of: dict[str, Path], tmp_path: Path) -> None:
    folder = with_tokenizer(
        models_of, tmp_path / "folder", "Llama-3", chat_template=[{"name": "rag", "template": "{{ messages }}"}]
    )
    assert load_tokenizer(Checkpoint(folder)).chat_template is None
    with pytest.raises(ValueError, match="no default specified"):
        template_ids(AutoTokenizer.from_pretrained(folder), CHATS[0])
