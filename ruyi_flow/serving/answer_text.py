"""The text of an answer: decided tokens become text as they come, until a stop string ends it. No torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from ruyi_flow.types import Decision, Likelihood, Logprobs, PromptToken, PromptTokens, Token, TopToken

__all__ = ["AnswerText", "Detokenizer", "TokenTexts"]

_REPLACEMENT = "\ufffd"
"""What a decoder writes for bytes that are not UTF-8, or not yet."""

_MAX_WAITING = 4
"""Tokens that may wait for the rest of a character. UTF-8 needs at most four bytes, so more can only be broken text."""


class Detokenizer:
    """Turns token ids into text one by one.

    Each step decodes the new tokens together with those of the step before, and returns what they add to the text of
    the latter (the method of Hugging Face's text-generation-inference). So spaces and characters between tokens come
    out as in the whole text, and bytes that are not UTF-8 become replacement characters. `tokenizers.DecodeStream`
    raises an exception there.

    Args:
        tokenizer: the family's transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._backend = tokenizer.backend_tokenizer
        added = self._backend.get_added_tokens_decoder()
        self._special = frozenset(token for token, about in added.items() if about.special)
        self._ids: list[int] = []
        """The tokens of the last step that gave text, then those that wait."""
        self._shown = ""
        """The text of the former."""
        self._waiting = 0

    @property
    def incomplete(self) -> bool:
        """Whether the last tokens wait for the rest of a character."""
        return self._waiting > 0

    def push(self, token: int) -> str:
        """Add a token and return the text that is complete with it; special tokens have none."""
        if token in self._special or self._backend.id_to_token(token) is None:
            return ""
        self._ids.append(token)
        self._waiting += 1
        text = self._decode()
        if self._waiting <= _MAX_WAITING and (text.endswith(_REPLACEMENT) or len(text) <= len(self._shown)):
            return ""
        return self._advance(text)

    def flush(self) -> str:
        """Return the text of the tokens that wait, in which a character that was cut is a replacement character."""
        return self._advance(self._decode()) if self._waiting else ""

    def _advance(self, text: str) -> str:
        piece = text[len(self._shown) :]
        self._ids, self._waiting = self._ids[-self._waiting :], 0
        self._shown = self._decode()
        return piece

    def _decode(self) -> str:
        text: str = self._backend.decode(self._ids, skip_special_tokens=False)
        return text


class TokenTexts:
    """The texts of single tokens, and log-probabilities with them.

    Args:
        tokenizer: the family's transformers tokenizer, or None: then all texts are empty.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._backend = None if tokenizer is None else tokenizer.backend_tokenizer
        self._texts: dict[int, str] = {}
        self._before: list[int] = []
        """A token before the one that is decoded, since decoders leave out the space in front of a text."""
        self._skipped = 0
        if self._backend is not None:
            self._before = self._backend.encode("a", add_special_tokens=False).ids[-1:]
            self._skipped = len(self._decode(self._before))

    def __getitem__(self, token: int) -> str:
        """Return the text of a token alone; of a part of a character, U+FFFD."""
        text = self._texts.get(token)
        if text is None:
            known = self._backend is not None and self._backend.id_to_token(token) is not None
            text = self._decode([*self._before, token])[self._skipped :] if known else ""
            self._texts[token] = text
        return text

    def logprobs(self, token: int, likelihood: Likelihood | None) -> Logprobs | None:
        """Return a token's likelihood with texts."""
        if likelihood is None:
            return None
        top = tuple(TopToken(one, self[one], logprob) for one, logprob in likelihood.top)
        return Logprobs(self[token], likelihood.logprob, top)

    def prompt(self, ids: Sequence[int], likelihoods: Sequence[Likelihood]) -> PromptTokens:
        """Return a prompt's tokens, given the likelihoods of all but the first."""
        tokens = (
            PromptToken(token, self[token], self.logprobs(token, found))
            for token, found in zip(ids, (None, *likelihoods), strict=True)
        )
        return PromptTokens(tuple(tokens), "" if self._backend is None else self._decode(ids))

    def _decode(self, ids: Sequence[int]) -> str:
        assert self._backend is not None
        text: str = self._backend.decode(list(ids), skip_special_tokens=False)
        return text


class _StopString:
    """Finds one string in a text that arrives in pieces, in time linear in both (Knuth, Morris and Pratt 1977)."""

    def __init__(self, string: str) -> None:
        self._string = string
        self._borders = [0]
        """The length of the longest shorter prefix that ends each prefix of the string."""
        self.begun = 0
        """Length of the longest prefix of the string that ends the text so far."""
        for char in string[1:]:
            self._borders.append(self._next(self._borders[-1], char))

    def end_in(self, piece: str) -> int | None:
        """Read the next piece of the text; return where the string's first occurrence ends in it, if it does."""
        for i, char in enumerate(piece, 1):
            self.begun = self._next(self.begun, char)
            if self.begun == len(self._string):
                return i
        return None

    def _next(self, begun: int, char: str) -> int:
        while begun and char != self._string[begun]:
            begun = self._borders[begun - 1]
        return begun + (char == self._string[begun])


class AnswerText:
    """The text of an answer. It holds back what may be the start of a stop string, or is half of a character.

    Args:
        tokenizer: the family's transformers tokenizer, or None for an answer without text.
        stop: the stop strings.
        texts: the texts of single tokens, for log-probabilities.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], texts: TokenTexts | None = None) -> None:
        self._texts = texts or TokenTexts(None)
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
        self._stop = {string: _StopString(string) for string in stop}
        self._pending: deque[tuple[Decision, str, float, int]] = deque()
        self._released = 0
        self.text = ""
        """The answer so far, without a stop string and what follows it."""
        self.stopped = False
        """Whether a stop string has occurred."""

    def push(self, decision: Decision, after_s: float, bytes_up: int) -> None:
        """Add a decided token, with its time and its bytes upward."""
        piece = "" if self._detokenizer is None else self._detokenizer.push(decision.token)
        self._append(piece)
        self._pending.append((decision, piece, after_s, bytes_up))

    def release(self, node_of: Mapping[int, str]) -> list[Token]:
        """Return the tokens whose text is certain."""
        if self.stopped:
            return self._take(node_of, len(self._pending), len(self.text))
        begun = max((stop.begun for stop in self._stop.values()), default=0)
        # The newest token gets the replacement character if the answer ends in the middle of a character.
        held = self._detokenizer is not None and self._detokenizer.incomplete
        return self._take(node_of, len(self._pending) - held, len(self.text) - begun)

    def finish(self, node_of: Mapping[int, str]) -> list[Token]:
        """Return the other tokens: the answer has ended."""
        if self._detokenizer is not None and self._pending and not self.stopped:
            rest = self._detokenizer.flush()
            self._append(rest)
            decision, piece, after_s, bytes_up = self._pending.pop()
            self._pending.append((decision, piece + rest, after_s, bytes_up))
        return self._take(node_of, len(self._pending), len(self.text), everything=True)

    def _append(self, piece: str) -> None:
        """Add text, and cut it at the stop string that begins first."""
        start = len(self.text)
        self.text += piece
        ends = {string: end for string, stop in self._stop.items() if (end := stop.end_in(piece)) is not None}
        if ends:
            self.stopped = True
            self.text = self.text[: min(start + end - len(string) for string, end in ends.items())]

    def _take(self, node_of: Mapping[int, str], most: int, certain: int, everything: bool = False) -> list[Token]:
        """Return the next tokens, at most so many, whose text ends in the first `certain` characters, or all."""
        tokens: list[Token] = []
        while len(tokens) < most:
            d, piece, after_s, bytes_up = self._pending[0]
            end = self._released + len(piece)
            if end > certain and not everything and not self.stopped:
                break
            shown = piece[: max(0, certain - self._released)]
            logprobs = self._texts.logprobs(d.token, d.likelihood)
            node = node_of[d.exit]
            tokens.append(Token(d.token, shown, d.exit, node, d.confidence, d.reason, after_s, bytes_up, logprobs))
            self._released = end
            self._pending.popleft()
        return tokens
