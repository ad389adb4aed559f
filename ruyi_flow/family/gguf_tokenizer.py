"""The tokenizer that a GGUF file describes, as a tokenizer of transformers that gives llama.cpp's tokens.

A GGUF file has the vocabulary, but no rules for splitting a text into words before its characters are merged: it only
names them (`tokenizer.ggml.pre`). Names whose rules are not known here are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ruyi_flow.errors import CheckpointError
from ruyi_flow.family.gguf_file import GGUFFile, Keys

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["PRE_TOKENIZERS", "GGUFTokenizer", "pre_tokenizer"]


class _Type(IntEnum):
    """Values of `tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class _Rules:
    """How a text becomes words, which are then merged from bytes."""

    splits: tuple[str, ...]
    """Regular expressions, each applied to the pieces that the one before it left."""
    begins: bool = False
    """Whether a text begins with the begin token if the file does not say."""
    whole_words: bool = False
    """Whether a word that is in the vocabulary is one token, whatever the merges say."""
    composes: bool = False
    """Whether the text is put into Unicode's composed form first, as Qwen2's published tokenizer does."""


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35 = _QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"?[^\s\p{L}\p{N}]", r"?[^\s\p{L}\p{M}\p{N}]")
_CASED_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώ"
    "ᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏"
    "𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_CJK = "[一-龥ࠀ-一가-퟿]+"
_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|`]+"

_PLAIN, _DIGITS = (_GPT2,), (r"\p{N}", _GPT2)
_LLAMA3_RULES = _Rules((_LLAMA3,), begins=True, whole_words=True)

PRE_TOKENIZERS: dict[str, _Rules] = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), _LLAMA3_RULES),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _Rules((_LLAMA3,))),
    "qwen2": _Rules((_QWEN2,), composes=True),
    **dict.fromkeys(("deepseek-r1-qwen", "megrez"), _Rules((_QWEN2,))),
    "qwen35": _Rules((_QWEN35,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "minerva-7b"), _Rules(_DIGITS)),
    **dict.fromkeys(("gpt-2", "mpt"), _Rules(_PLAIN)),
    "deepseek-llm": _Rules(
        (
            r"[\r\n]",
            rf"\s?[{_CASED_LETTERS}]+",
            r"\s?[!-/:-~！-／：-～‘-‟\u3000-。]+",
            r"\s+$",
            _CJK,
            r"\p{N}+",
        )
    ),
    "deepseek-coder": _Rules((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")),
    "falcon": _Rules((_PUNCTUATION, _GPT2, r"[0-9][0-9][0-9]")),
    "default": _Rules((_PUNCTUATION.replace("`", ""), _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
}
"""Values of `tokenizer.ggml.pre` for byte-level vocabularies; a file without one has "default", as for llama.cpp."""

_ENDS = frozenset(
    "<|eot_id|> <|eom_id|> <|im_end|> <|end|> <|endoftext|> <|end_of_text|> <end_of_turn> <EOT> </s> "
    "<｜end▁of▁sentence｜>".split()
)
"""Special tokens that end an answer in any family that has them, unless one is its unknown token."""

_HARMLESS: dict[str, tuple[Any, ...] | None] = {
    **dict.fromkeys(("seperator_token_id", "separator_token_id", "cls_token_id", "mask_token_id"), None),
    **dict.fromkeys((f"fim_{part}_token_id" for part in ("pre", "suf", "mid", "pad", "rep", "sep")), None),
    **dict.fromkeys((f"{part}_token_id" for part in ("prefix", "suffix", "middle")), None),
    "token_type_count": (0, 1),
    "add_sep_token": (False,),
    "remove_extra_whitespaces": (False,),
    "precompiled_charsmap": ([],),
    "normalizer.lowercase": (False,),
    "normalizer.strip_accents": (False,),
    "suppress_tokens": ([],),
}
"""Keys of `tokenizer.ggml` that do not change the tokens of a text, with the values for which that is so; None: any."""


class GGUFTokenizer:
    """The tokenizer of a GGUF file.

    Raises:
        CheckpointError: the file describes a tokenizer of a kind that is not known here, or describes it wrongly.
    """

    def __init__(self, file: GGUFFile) -> None:
        self._keys = keys = Keys(file, "tokenizer.ggml.")
        self.kind = keys.take("model", str)
        if self.kind not in ("gpt2", "llama"):
            raise keys.refusal("model", self.kind, "is not supported; known: gpt2 and llama")
        self.tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(keys.take("tokens", _strings))]
        """The vocabulary by token id."""
        self._types = keys.take("token_type", list, [_Type.NORMAL] * len(self.tokens))
        if len(self._types) != len(self.tokens) or len(set(self.tokens)) != len(self.tokens):
            raise CheckpointError(f"{file.path}: its {len(self.tokens)} tokens are not distinct, or lack types")
        backend, begins = self._byte_level() if self.kind == "gpt2" else self._sentencepiece()
        backend.add_tokens(
            [
                AddedToken(token, normalized=False, special=kind != _Type.USER_DEFINED)
                for token, kind in zip(self.tokens, self._types, strict=True)
                if kind in (_Type.UNKNOWN, _Type.CONTROL, _Type.USER_DEFINED)
            ]
        )
        defaults = (1, 2, 0) if self.kind == "llama" else (-1, -1, -1)
        special = {
            name: self._id(f"{key}_token_id", default)
            for (name, key), default in zip(
                (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")), (*defaults, -1), strict=True
            )
        }
        self.special = {name: token for name, token in special.items() if token is not None}
        """Ids of the begin, end, unknown and padding tokens: `bos`, `eos`, `unk` and `pad`."""
        more = [self._id("eot_token_id"), self._id("eom_token_id")]
        named = [i for i, token in enumerate(self.tokens) if token in _ENDS and self._types[i] != _Type.NORMAL]
        ends = [self.special.get("eos"), *more, *(i for i in named if i != self.special.get("unk"))]
        self.ends = tuple(dict.fromkeys(token for token in ends if token is not None))
        """Tokens that end an answer."""
        backend.post_processor = self._adds(
            keys.take("add_bos_token", bool, begins), keys.take("add_eos_token", bool, False)
        )
        keys.refuse_rest(_HARMLESS)
        self._backend = backend
        self._template = file.metadata.get("tokenizer.chat_template")

    def to_transformers(self) -> PreTrainedTokenizerFast:
        """Return the tokenizer, with its special tokens and chat template."""
        from transformers import PreTrainedTokenizerFast

        named = {f"{name}_token": self.tokens[token] for name, token in self.special.items()}
        return PreTrainedTokenizerFast(
            tokenizer_object=self._backend,
            chat_template=self._template,
            clean_up_tokenization_spaces=False,
            **named,
        )

    def _id(self, key: str, default: int = -1) -> int | None:
        token = self._keys.take(key, int, default)
        if token >= len(self.tokens):
            raise self._keys.refusal(key, token, f"is no token; the vocabulary has {len(self.tokens)}")
        return token if token >= 0 else None

    def _byte_level(self) -> tuple[Tokenizer, bool]:
        """Return the tokenizer for bytes that are merged in the order of a list, as GPT-2's."""
        pre = self._keys.take("pre", str, "default")
        if pre not in PRE_TOKENIZERS:
            raise self._keys.refusal("pre", pre, f"is not supported; known: {', '.join(PRE_TOKENIZERS)}")
        if self._keys.take("add_space_prefix", bool, False):
            raise self._keys.refusal("add_space_prefix", True, "is not supported with a byte-level vocabulary")
        self._keys.take("scores", list, [])  # older converters write zeros
        rules = PRE_TOKENIZERS[pre]
        pairs = (merge.partition(" ") for merge in self._keys.take("merges", _strings))
        merges = dict.fromkeys((left, right) for left, _, right in pairs)
        backend = self._build([*merges], ignore_merges=rules.whole_words)
        if rules.composes:
            backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizer(pre)
        backend.decoder = decoders.ByteLevel()
        return backend, rules.begins

    def _sentencepiece(self) -> tuple[Tokenizer, bool]:
        """Return the tokenizer for characters that are merged in the order of the tokens' scores, as Llama 2's."""
        self._keys.take("pre", str, "default")  # has no effect, as in llama.cpp
        self._keys.take("merges", list, [])
        scores = self._keys.take("scores", list)
        if len(scores) != len(self.tokens):
            raise CheckpointError(f"{self._keys.file.path}: it has {len(self.tokens)} tokens and {len(scores)} scores")
        usable = {
            token: score
            for token, score, kind in zip(self.tokens, scores, self._types, strict=True)
            if kind in (_Type.NORMAL, _Type.USER_DEFINED, _Type.UNUSED)
        }
        merges = [
            (token[:i], token[i:])
            for token in sorted(usable, key=lambda token: -usable[token])
            for i in range(1, len(token))
            if token[:i] in usable and token[i:] in usable
        ]
        unknown = next((t for t, kind in zip(self.tokens, self._types, strict=True) if kind == _Type.UNKNOWN), None)
        backend = self._build(merges, byte_fallback=True, fuse_unk=True, unk_token=unknown)
        spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
        words: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        if self._keys.take("add_space_prefix", bool, True):
            spaces, words = [normalizers.Prepend("▁"), *spaces], [*words, decoders.Strip(" ", 1, 0)]
        backend.normalizer = normalizers.Sequence(spaces)
        backend.decoder = decoders.Sequence(words)
        return backend, True

    def _build(self, merges: Sequence[tuple[str, str]], **options: Any) -> Tokenizer:
        vocabulary = {token: i for i, token in enumerate(self.tokens)}
        try:
            return Tokenizer(models.BPE(vocabulary, merges, **options))
        except Exception as error:  # the tokenizers library raises bare Exceptions
            raise CheckpointError(f"{self._keys.file.path}: its merges do not fit its tokens: {error}") from None

    def _adds(self, bos: bool, eos: bool) -> processors.PostProcessor:
        """Return what puts the begin and end tokens around a text."""
        around = []
        for name, added in (("bos", bos), ("eos", eos)):
            if added and name not in self.special:
                raise CheckpointError(
                    f"{self._keys.file.path}: metadata tokenizer.ggml.{name}_token_id is missing, but texts need it"
                )
            around.append([name] if added else [])
        return processors.TemplateProcessing(
            single=[*around[0], "$A", *around[1]],
            pair=[*around[0], "$A", *around[1], *around[0], "$B:1", *around[1]],
            special_tokens=[
                {"id": name, "ids": [self.special[name]], "tokens": [self.tokens[self.special[name]]]}
                for [name] in filter(None, around)
            ],
        )


def pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    """Return what splits a text into words, by its name in `PRE_TOKENIZERS`."""
    return pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(split), behavior="isolated") for split in PRE_TOKENIZERS[name].splits),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _strings(values: Any) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError
    return values
