"""Requests: what a user asks of an entry node, and what a node asks of the next one when it opens a session."""

from __future__ import annotations

import ast
import inspect
import secrets
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar, get_type_hints

from ruyi_flow.errors import RequestError, did_you_mean, shown
from ruyi_flow.routing.policy import Policy, Routing
from ruyi_flow.types import MAX_COUNT, Encoding, Mode, check_number, is_text, to_float, to_int, to_token_id

__all__ = [
    "MAX_EOS_TOKENS",
    "MAX_LOGPROBS",
    "MAX_NGRAM",
    "GenerateRequest",
    "Options",
    "Prompt",
    "PromptInput",
    "SamplingParams",
    "SessionOpen",
    "check_option_names",
    "check_request_options",
    "field_docs",
    "option_names",
    "own_name",
    "parse_request",
    "takes_options",
]

MAX_LOGPROBS = 20
"""Largest number of most probable tokens that a request may ask for in each place."""

MAX_STOPS, MAX_STOP_CHARS = 16, 1000
"""Largest number of stop strings in a request, and of characters in one of them."""

PromptInput = str | Sequence[Mapping[str, Any]] | Sequence[int]
"""A prompt as users give it: a text (one user turn), {"role": …, "content": …} messages, or token ids.

A content may also be a list of text parts, as in OpenAI's API: [{"type": "text", "text": …}]. Token ids may be a
1-dimensional array of numpy or torch.
"""

MAX_EOS_TOKENS = 256
"""Largest number of tokens that can end an answer; every step compares with each of them."""

MAX_NGRAM = 64
"""Largest `no_repeat_ngram_size`; every step compares all n-grams of the sequence."""

Prompt = str | tuple[tuple[str, str], ...] | tuple[int, ...]
"""A checked prompt: a text, (role, content) messages, or token ids."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling options: how a token is picked from a branch's logits, and when the answer ends.

    A token is `argmax(processed logits / temperature + gumbel(seed, position, token))`; see `runtime/sampling.py`.
    The command line shows the field docstrings as the help of its options.
    """

    temperature: float = 0.0
    """Sampling temperature; 0 decodes greedily."""
    top_k: int = 0
    """Sample from the k most probable tokens only; 0 keeps all tokens."""
    top_p: float = 1.0
    """Sample from the most probable tokens that together have this probability."""
    repetition_penalty: float = 1.0
    """Divide the logits of tokens that the prompt or the answer already contains (multiply negative ones); 1 is off."""
    no_repeat_ngram_size: int = 0
    """Never repeat an n-gram of this size (at most 64), the prompt included; 0 is off."""
    min_new_tokens: int = 0
    """Forbid the end of sequence before this many new tokens."""
    presence_penalty: float = 0.0
    """Subtract this from the logits of tokens that the answer already contains (-2 to 2); 0 is off."""
    frequency_penalty: float = 0.0
    """Subtract this from a token's logit for each time that the answer already contains it (-2 to 2); 0 is off."""
    max_new_tokens: int = 256
    """End the answer after at most this many new tokens."""
    stop: tuple[str, ...] = ()
    """End the answer before the first occurrence of one of these strings."""
    eos_token_ids: tuple[int, ...] | None = None
    """Token ids that end the answer, at most 256. Default: the family's own. In Python, an empty tuple means none."""
    seed: int | None = None
    """Sampling seed. Default: random, returned in the statistics."""
    logprobs: int | None = None
    """Return each token's log-probability, and this many of the most probable tokens (0 to 20). Default: neither."""
    prompt_logprobs: int | None = None
    """Return the same of the prompt's tokens, by the last exit. It requires mode exact or fixed. Default: neither."""

    def __post_init__(self) -> None:
        for name, parse, low, high, meaning in (
            ("temperature", to_float, 0.0, 100.0, "a number from 0 (greedy) to 100"),
            ("top_k", to_int, 0, MAX_COUNT, "a whole number of 0 (off) or more"),
            ("top_p", to_float, 1e-9, 1.0, "a number above 0 and at most 1"),
            ("repetition_penalty", to_float, 1e-9, 1e9, "a number above 0 and at most 1e9 (1 is off)"),
            ("no_repeat_ngram_size", to_int, 0, MAX_NGRAM, f"a whole number from 0 (off) to {MAX_NGRAM}"),
            ("min_new_tokens", to_int, 0, MAX_COUNT, "a whole number of 0 or more"),
            ("max_new_tokens", to_int, 1, MAX_COUNT, "a whole number of 1 or more"),
            ("presence_penalty", to_float, -2.0, 2.0, "a number from -2 to 2 (0 is off)"),
            ("frequency_penalty", to_float, -2.0, 2.0, "a number from -2 to 2 (0 is off)"),
            ("seed", to_int, 0, 2**63 - 1, "a whole number of 0 or more, below 2**63"),
            ("logprobs", to_int, 0, MAX_LOGPROBS, f"a whole number from 0 to {MAX_LOGPROBS}"),
            ("prompt_logprobs", to_int, 0, MAX_LOGPROBS, f"a whole number from 0 to {MAX_LOGPROBS}"),
        ):
            value = getattr(self, name)
            if value is None and name in ("seed", "logprobs", "prompt_logprobs"):
                continue
            number = check_number(name, value, parse(value), low=low, high=high, meaning=meaning)
            object.__setattr__(self, name, number)
        if 0 < self.temperature < 1e-4:  # logits over it would not be finite any more
            raise RequestError(f"temperature is {self.temperature!r}; it must be 0 (greedy), or 0.0001 or more")
        if self.min_new_tokens > self.max_new_tokens:
            raise RequestError(
                f"min_new_tokens ({self.min_new_tokens}) is more than max_new_tokens ({self.max_new_tokens})"
            )
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, (tuple, list)) or not all(_is_valid_text(text) for text in stop):
            raise RequestError(f"stop is {shown(self.stop)}; it must be non-empty texts")
        if len(stop) > MAX_STOPS or max(map(len, stop), default=0) > MAX_STOP_CHARS:
            raise RequestError(
                f"stop has {len(stop)} strings, the longest of {max(map(len, stop))} characters; there may be "
                f"{MAX_STOPS} of {MAX_STOP_CHARS} characters"
            )
        stop = tuple(stop)
        object.__setattr__(self, "stop", stop)
        if self.eos_token_ids is not None:
            object.__setattr__(self, "eos_token_ids", _parse_eos(self.eos_token_ids))

    def completed(self, *, eos_token_ids: tuple[int, ...], room: int) -> SamplingParams:
        """Return these options with the seed and the end tokens filled in, and lengths that fit into the context.

        Args:
            eos_token_ids: the family's own tokens that end an answer.
            room: number of positions that the prompt leaves in the family's context.
        """
        seed = self.seed
        if seed is None:
            seed = secrets.randbits(63) if self.temperature else 0
        return replace(
            self,
            seed=seed,
            eos_token_ids=eos_token_ids if self.eos_token_ids is None else self.eos_token_ids,
            max_new_tokens=min(self.max_new_tokens, room),
            min_new_tokens=min(self.min_new_tokens, room),
        )


class Options(TypedDict, total=False):
    """The options of a request, which `generate`, `stream` and `events` take as keywords.

    An option that is not given, or None, has the default value.
    """

    max_new_tokens: int
    """End the answer after at most this many new tokens."""
    temperature: float
    """Sampling temperature; 0 decodes greedily."""
    top_k: int
    """Sample from the k most probable tokens only; 0 keeps all tokens."""
    top_p: float
    """Sample from the most probable tokens that together have this probability."""
    repetition_penalty: float
    """Divide the logits of tokens that the prompt or the answer already contains (multiply negative ones); 1 is off."""
    no_repeat_ngram_size: int
    """Never repeat an n-gram of this size (at most 64), the prompt included; 0 is off."""
    min_new_tokens: int
    """Forbid the end of sequence before this many new tokens."""
    presence_penalty: float
    """Subtract this from the logits of tokens that the answer already contains (-2 to 2); 0 is off."""
    frequency_penalty: float
    """Subtract this from a token's logit for each time that the answer already contains it (-2 to 2); 0 is off."""
    stop: Sequence[str]
    """End the answer before the first occurrence of one of these strings."""
    eos_token_ids: Sequence[int] | None
    """Token ids that end the answer, at most 256. Default: the family's own. In Python, an empty tuple means none."""
    seed: int | None
    """Sampling seed. Default: random, returned in the statistics."""
    logprobs: int | None
    """Return each token's log-probability, and this many of the most probable tokens (0 to 20). Default: neither."""
    prompt_logprobs: int | None
    """Return the same of the prompt's tokens, by the last exit. It requires mode exact or fixed. Default: neither."""
    mode: Mode | Literal["fixed", "token", "exact", "cascade"]
    """Mode that decides a token: fixed, token, cascade or exact."""
    exit: int | None
    """Mode fixed, which this implies: the exit that decides every token. Default: the last one."""
    threshold: float | None
    """Modes token and cascade: the confidence (0 … 1) that an early exit needs to decide; above 1 is never reached."""
    thresholds: Mapping[int, float] | None
    """Modes token and cascade: the threshold of each early exit; an exit that is not named never decides."""
    window: int
    """Mode cascade: number of tokens over which confidence is averaged; missing ones count as 1. Default: 8."""
    back: float | None
    """Mode cascade: return to a shallower exit once its mean confidence reaches this. Default: never return."""
    fallback: bool
    """Let the last reachable exit decide when the next node is lost, full or answers garbage, instead of failing."""
    draft: int
    """Draft at most this many tokens past an undecided position before asking the next stage; 0 asks at once."""
    policy: str | Path | None
    """Policy file of `ruyi-flow calibrate`, which sets the mode and its thresholds. Default: the topology's policy."""
    raw: bool
    """Whether a text is encoded as it is, instead of as one user turn of the chat template."""
    timeout_s: float | None
    """Seconds that the answer may take, retries included. Default: the client's."""


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One request of a user to the entry node."""

    prompt: Prompt
    """The prompt: a text, (role, content) messages, or token ids."""
    raw: bool = False
    """Whether a text is encoded as it is, instead of as one user turn of the chat template."""
    sampling: SamplingParams = SamplingParams()
    """Sampling options."""
    routing: Mapping[str, Any] = field(default_factory=dict)
    """The fields of `Routing` that the request sets; `Routing.updated` merges them with the topology's policy."""
    resumed: tuple[tuple[int, int], ...] = ()
    """The first tokens of the answer and the exits that decided them, if it goes on after its entry node was lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOpen:
    """The handshake that opens a session on a node: what the sender has, and what it expects of the receiver.

    The entry node opens its own session without the first six fields, which describe a hop.
    """

    family: str = ""
    """Fingerprint of the sender's family; the receiver must have the same."""
    first_layer: int = 0
    """The first trunk layer that the receiver must run."""
    node: str = ""
    """The receiver's name in the sender's topology."""
    exits: tuple[int, ...] = ()
    """The receiver's exits in the sender's topology."""
    hidden_size: int = 0
    """Width of a boundary state."""
    encoding: Encoding = Encoding.F32
    """Encoding of every boundary state of the session."""
    key: bytes = b""
    """Random bytes that name the session on every node; only who knows them can take it back when it is parked."""
    position: int = 0
    """The receiver takes back the session that is parked under the key, up to this position; 0: it starts a new one."""
    max_positions: int
    """Largest number of positions that the session will use; the KV cache is reserved for them."""
    prompt_length: int
    """Number of positions of the prompt."""
    sampling: SamplingParams = SamplingParams()
    """Sampling options, with `seed` and `eos_token_ids` set."""
    policy: Policy
    """The thresholds of every exit."""


_SAMPLING = frozenset(f.name for f in fields(SamplingParams))


_FROM_FILES = frozenset({"policy", "timeout_s"})
"""Options of a call that are no field of a request."""

F = TypeVar("F", bound=Callable[..., Any])


def option_names() -> frozenset[str]:
    """Return the names of a request's options, without those that only policy files set."""
    return Options.__optional_keys__ - _FROM_FILES


def field_docs(kind: type) -> dict[str, str]:
    """Return the docstrings below the fields of a class, by field name."""
    [body] = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(body, ast.ClassDef)
    return {
        field.target.id: inspect.cleandoc(text.value.value).replace("\n", " ")
        for field, text in zip(body.body, body.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def takes_options(method: F) -> F:
    """Show the fields of `Options` in the signature and the docstring of a method that takes them as keywords.

    Editors read the type of `**options`; `help`, notebooks and the completion of a running interpreter read this.
    """
    sampling = {f.name: f.default for f in fields(SamplingParams) if f.default is not MISSING}
    given = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=sampling.get(name), annotation=kind)
        for name, kind in get_type_hints(Options).items()
    ]
    own = inspect.signature(method)
    kept = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    method.__signature__ = own.replace(parameters=[*kept, *given])  # type: ignore[attr-defined]
    listed = "\n".join(f"    {name}: {doc}" for name, doc in _OPTION_DOCS.items())
    method.__doc__ = f"{inspect.cleandoc(method.__doc__ or '')}\n\nOptions:\n{listed}\n"
    return method


_OPTION_DOCS = field_docs(Options)


_NAMES_ELSEWHERE = {
    "max_completion_tokens": "max_new_tokens",
    "max_length": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "n_predict": "max_new_tokens",
    "num_predict": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "repeat_penalty": "repetition_penalty",
    "temp": "temperature",
}
"""Names that other tools give to options of an answer, and those that they have here."""


def own_name(option: str) -> str:
    """Return the name that an option of another tool has here, or else the same name."""
    return _NAMES_ELSEWHERE.get(option, option)


def check_option_names(given: Iterable[str], known: Iterable[str]) -> None:
    """Check that every option has a known name.

    Raises:
        RequestError: an option is unknown; the message suggests a similar name.
    """
    known = sorted(known)
    for name in given:
        if name not in known:
            hint = did_you_mean(own_name(name), known) or f"; known: {', '.join(known)}"
            raise RequestError(f"unknown option {name!r}{hint}")


def check_request_options(given: Iterable[str], *others: str) -> None:
    """Check that every option is one of a request, or one of `others`.

    The options that only policy files set are accepted. The message does not show them.

    Raises:
        RequestError: an option is unknown.
    """
    internal = Routing.names() - option_names()
    check_option_names((name for name in given if name not in internal), option_names().union(others))


def parse_request(prompt: PromptInput, options: Mapping[str, Any]) -> GenerateRequest:
    """Build a request from the keyword arguments of a call. Every front end uses this one function.

    Args:
        prompt: the prompt as a user gives it.
        options: fields of `SamplingParams` and of `Routing`, and `raw`; None stands for an option that is not given.

    Raises:
        RequestError: an unknown option, or a value that an option or the prompt cannot have.
    """
    check_request_options(options)
    given = {name: value for name, value in options.items() if value is not None}
    raw = given.pop("raw", False)
    if not isinstance(raw, bool):
        raise RequestError(f"raw is {shown(raw)}; it must be True or False")
    sampling = SamplingParams(**{name: given.pop(name) for name in _SAMPLING & given.keys()})
    routing = Routing().updated(given)  # raises where a value cannot be, and converts the numbers of other libraries
    return GenerateRequest(_parse_prompt(prompt), raw, sampling, {name: getattr(routing, name) for name in given})


def _parse_eos(given: Any) -> tuple[int, ...]:
    if (number := to_token_id(given)) is not None:
        return (number,)
    ids = given if isinstance(given, (tuple, list)) or len(getattr(given, "shape", ())) == 1 else (None,)
    if len(ids) > MAX_EOS_TOKENS:
        raise RequestError(f"eos_token_ids has {len(ids)} tokens; at most {MAX_EOS_TOKENS} can end an answer")
    eos = [to_token_id(token) for token in ids]
    if None in eos:
        raise RequestError(f"eos_token_ids is {shown(given)}; it must be token ids")
    return tuple(dict.fromkeys(token for token in eos if token is not None))


def _parse_prompt(prompt: Any) -> Prompt:
    if isinstance(prompt, str):
        return _parse_text(prompt)
    if isinstance(prompt, (bytes, bytearray, memoryview, Mapping, Set)) or not isinstance(prompt, Iterable):
        raise RequestError(f"{_PROMPT}; this is {type(prompt).__name__}")
    if (shape := getattr(prompt, "shape", None)) is not None and len(shape) != 1:
        raise RequestError(f"token ids must be one sequence, of shape (n,); these have shape {tuple(shape)}")
    items: list[Any] = prompt.tolist() if hasattr(prompt, "tolist") else list(prompt)
    if not items or isinstance(items[0], Mapping):
        return tuple(_parse_message(item) for item in items)
    ids = [to_token_id(item) for item in items]
    if None in ids:
        raise RequestError(f"{_PROMPT}; this list contains {shown(items[ids.index(None)])}")
    return tuple(i for i in ids if i is not None)


_PROMPT = 'a prompt is a text, a list of messages, {"role": …, "content": …}, or token ids, whole numbers from 0'


def _parse_message(message: object) -> tuple[str, str]:
    """Return a message's role and text."""
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise RequestError(f"{_PROMPT}; this message is {shown(message)}")
    for key, value in message.items():
        if key not in ("role", "content") and value is not None:
            raise RequestError(f"a message has the key {shown(key)}; families read only role and content")
    role, content = message["role"], message["content"]
    if isinstance(content, (list, tuple)):
        # The texts of several parts are lines, as in vLLM and llama.cpp.
        content = "\n".join(_parse_part(part) for part in content)
    if not isinstance(role, str) or not isinstance(content, str):
        raise RequestError("a message's role must be a text, and its content a text or a list of text parts")
    return _parse_text(role), _parse_text(content)


def _parse_part(part: object) -> str:
    """Return the text of one part of a message's content."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping) or not isinstance(kind, str):
        raise RequestError(f'a part of a message\'s content is {{"type": "text", "text": …}}; there is {shown(part)}')
    if kind != "text":
        raise RequestError(
            f"a message's content has a part of type {shown(kind)}; families read only parts of type 'text'"
        )
    if not isinstance(part.get("text"), str):
        raise RequestError(f"a text part of a message has the text {shown(part.get('text'))}; it must be a text")
    return str(part["text"])


def _parse_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the prompt is not valid Unicode: {error}") from None
    return text


def _is_valid_text(value: object) -> bool:
    return is_text(value) and value != ""
