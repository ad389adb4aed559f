"""OpenAI's requests: which fields are honoured, which are refused by name, and which are ignored.

A field that OpenAI's API defines and this server does not support is refused, unless it has a value that changes
nothing, such as `n: 1`. Fields that cannot change an answer are accepted. Unknown fields are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from ruyi_flow.errors import did_you_mean, shown
from ruyi_flow.http.errors import HttpError
from ruyi_flow.requests import MAX_LOGPROBS, MAX_STOPS, PromptInput, own_name
from ruyi_flow.types import MAX_COUNT, is_text, to_token_id

__all__ = [
    "HARMLESS",
    "MAX_CHOICES",
    "Asked",
    "ToTokenize",
    "chat_request",
    "completion_request",
    "parse_json",
    "refuse",
    "responses_request",
    "tokenize_request",
]

MAX_CHOICES = 128
"""Largest number of answers that one request may ask for: `n` for each of its prompts."""

_MAX_N = 16

_SEEDS = 2**63

Body = Mapping[str, Any]
Harmless = Callable[[Any], bool]


def _one_of(*values: Any) -> Harmless:
    return lambda given: any(given == value and type(given) is type(value) for value in values)


def _empty(given: Any) -> bool:
    return given in ("", [], {}) or given is False


def _any(given: Any) -> bool:
    return True


def _plain_text(given: Any) -> bool:
    return given in ({"type": "text"}, {"format": {"type": "text"}}, {})


_COMMON: dict[str, Harmless] = {
    "logit_bias": _empty,
    "service_tier": _one_of("auto", "default"),
    "user": _any,
    "metadata": _any,
    "safety_identifier": _any,
    "prompt_cache_key": _any,
    "prompt_cache_retention": _any,
    # Fields of other servers that would change the answer.
    "guided_choice": _empty,
    "guided_grammar": _empty,
    "guided_json": _empty,
    "guided_regex": _empty,
    "structured_outputs": _empty,
    "use_beam_search": _empty,
    "min_p": _one_of(0, 0.0),
    "stop_token_ids": _empty,
}

_TOOLS: dict[str, Harmless] = {
    "tools": _empty,
    "tool_choice": _one_of("none", "auto"),
    "parallel_tool_calls": _any,  # without tools it changes nothing
}

HARMLESS: dict[str, dict[str, Harmless]] = {
    "chat": _COMMON
    | _TOOLS
    | {
        "functions": _empty,
        "function_call": _one_of("none", "auto"),
        "response_format": _plain_text,
        "modalities": _one_of(["text"]),
        "audio": _empty,
        "prediction": _empty,
        "web_search_options": _empty,
        "moderation": _empty,
        "reasoning_effort": _one_of("none"),
        "verbosity": _one_of("medium"),
        "store": _empty,
        "best_of": _one_of(1),
        "echo": _empty,
        "continue_final_message": _empty,
        "add_generation_prompt": _one_of(True),
    },
    "completions": _COMMON | {"suffix": _empty, "response_format": _plain_text},
    "responses": _COMMON
    | _TOOLS
    | {
        "background": _empty,
        "context_management": _empty,
        "conversation": _empty,
        "include": _empty,
        "max_tool_calls": _any,  # without tools it changes nothing
        "moderation": _empty,
        "previous_response_id": _empty,
        "prompt": _empty,
        "reasoning": lambda given: isinstance(given, dict) and given.get("effort") in (None, "none"),
        "store": _empty,
        "text": lambda given: _plain_text(given) or given == {"format": {"type": "text"}, "verbosity": "medium"},
        "top_logprobs": _one_of(0),
        "truncation": _one_of("disabled"),
    },
}
"""The fields, by endpoint, that have no effect here: the values of each that change nothing. Others are refused."""

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""The roles of messages, and those that families know for them."""

_IN_MESSAGES: dict[str, Harmless] = {
    "name": _empty,
    "tool_calls": _empty,
    "function_call": _empty,
    "refusal": _empty,
    "audio": _empty,
}
"""The fields of a message that OpenAI defines and families do not read."""

_RUYI = ("mode", "exit", "threshold", "thresholds", "window", "back", "draft", "fallback", "details")
"""The keys of the object `ruyi`."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A checked request."""

    model: str
    """The model's name."""
    prompts: Sequence[PromptInput]
    """The prompts, one unless it is a request for completions."""
    options: dict[str, Any]
    """Sampling options of the SDK."""
    routing: dict[str, Any] = field(default_factory=dict)
    """Routing options of the object `ruyi`."""
    n: int = 1
    """Number of answers to each prompt."""
    stream: bool = False
    """Whether the answer is streamed."""
    include_usage: bool = False
    """Whether a stream ends with the usage."""
    details: bool = False
    """Whether each token comes with who decided it, and why."""
    echo: bool = False
    """Whether the prompt's text comes first."""
    drops_token: bool = False
    """Whether nothing was to be generated: the one token that is asked for must not be shown."""
    user: str = ""
    """The end user, if the request names one."""
    body: Body = field(default_factory=dict)
    """The request itself."""


@dataclass(frozen=True, slots=True)
class ToTokenize:
    """A checked request for the tokens of a prompt."""

    model: str | None
    """The model's name, if the request has one; all names of a family have one tokenizer."""
    prompt: PromptInput
    """The prompt."""
    raw: bool
    """Whether it is encoded as it is, without the chat template."""


def refuse(message: str, param: str | None, code: str | None = None) -> NoReturn:
    """Refuse a request for one of its fields.

    Raises:
        HttpError: always.
    """
    raise HttpError(400, message, param=param, code=code)


def parse_json(data: bytes) -> Body:
    """Read the body of a request, whatever its content type says.

    Raises:
        HttpError: it is not one JSON object in UTF-8.
    """

    def no_number(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON number")

    try:
        body = json.loads(data, parse_constant=no_number)
    except RecursionError:
        refuse("the body is nested too deeply", None)
    except ValueError as error:  # UnicodeDecodeError too
        refuse(f"the body is not JSON: {str(error)[:200]}", None)
    if not isinstance(body, dict):
        refuse(f"the body must be a JSON object; it is {shown(body)}", None)
    return body


def chat_request(body: Body, max_new_tokens: int) -> Asked:
    """Check a request for a chat completion.

    Args:
        body: the request.
        max_new_tokens: largest number of new tokens if the request sets none.

    Raises:
        HttpError: a field is not supported, or has a value that it cannot have.
    """
    _check_harmless(body, "chat")
    limits = {name: _whole(body, name, 1, MAX_COUNT) for name in ("max_completion_tokens", "max_tokens")}
    given = [limit for limit in limits.values() if limit is not None]
    if len(set(given)) > 1:
        refuse("max_tokens and max_completion_tokens differ; give one of them", "max_tokens")
    options = _sampling(body) | {"max_new_tokens": given[0] if given else max_new_tokens}
    top = _whole(body, "top_logprobs", 0, MAX_LOGPROBS)
    if _flag(body, "logprobs"):
        options["logprobs"] = top or 0
    elif top is not None:
        refuse("top_logprobs requires logprobs: true", "top_logprobs")
    return _asked(body, [_messages(body.get("messages"), "messages")], options)


def completion_request(body: Body, max_new_tokens: int) -> Asked:
    """Check a request for completions of prompts; see `chat_request`."""
    _check_harmless(body, "completions")
    echo = _flag(body, "echo")
    limit = _whole(body, "max_tokens", 0 if echo else 1, MAX_COUNT)
    options = _sampling(body) | {"max_new_tokens": max_new_tokens if limit is None else max(1, limit), "raw": True}
    logprobs = _whole(body, "logprobs", 0, MAX_LOGPROBS)
    if logprobs is not None:
        options["logprobs"] = logprobs
    prompts = _prompts(body.get("prompt"))
    if echo and (logprobs is not None or not all(isinstance(prompt, str) for prompt in prompts)):
        options["prompt_logprobs"] = logprobs or 0  # the entry node tells the text of token ids with them
    asked = _asked(body, prompts, options, echo=echo, drops_token=limit == 0)
    if (best := _whole(body, "best_of", 1, _MAX_N)) is not None and best != asked.n:
        refuse(f"best_of is {best}; it must be the same as n ({asked.n}), since answers are not ranked", "best_of")
    return asked


def responses_request(body: Body, max_new_tokens: int) -> Asked:
    """Check a request for a response; see `chat_request`."""
    _check_harmless(body, "responses")
    limit = _whole(body, "max_output_tokens", 1, MAX_COUNT)
    options = _sampling(body) | {"max_new_tokens": max_new_tokens if limit is None else limit}
    given = body.get("input")
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else _messages(given, "input")
    instructions = body.get("instructions")
    if instructions is not None:
        if not isinstance(instructions, str):
            refuse(f"instructions is {shown(instructions)}; it must be a text", "instructions")
        messages = [{"role": "system", "content": instructions}, *messages]
    return _asked(body, [messages], options)


def tokenize_request(body: Body) -> ToTokenize:
    """Check a request for the tokens of a prompt.

    Raises:
        HttpError: it has no prompt, or one that cannot be.
    """
    model, messages, prompt = body.get("model"), body.get("messages"), body.get("prompt")
    if model is not None:
        model = _model_name(body)
    if (messages is None) == (prompt is None):
        refuse("the request must have either prompt or messages", "prompt")
    if body.get("add_special_tokens") not in (None, True):
        refuse(
            "add_special_tokens: false is not supported: a prompt is encoded as /v1/completions does",
            "add_special_tokens",
        )
    if messages is not None:
        return ToTokenize(model, _messages(messages, "messages"), False)
    if not isinstance(prompt, str) or not is_text(prompt):
        refuse(f"prompt is {shown(prompt)}; it must be a text", "prompt")
    return ToTokenize(model, prompt, True)


def _model_name(body: Body) -> str:
    """Return the name of the model that a request asks for.

    Raises:
        HttpError: it names none.
    """
    name = body.get("model")
    if not isinstance(name, str) or not name:
        refuse("the request must name a model; GET /v1/models lists them", "model")
    return name


def _asked(
    body: Body,
    prompts: Sequence[PromptInput],
    options: dict[str, Any],
    *,
    echo: bool = False,
    drops_token: bool = False,
) -> Asked:
    n = _whole(body, "n", 1, _MAX_N) or 1
    if n * len(prompts) > MAX_CHOICES:
        refuse(
            f"the request asks for {n * len(prompts)} answers; at most {MAX_CHOICES} can be asked for at once",
            "n" if n > 1 else "prompt",
        )
    stream, streaming = _flag(body, "stream"), body.get("stream_options")
    if streaming is not None and not stream:
        refuse("stream_options requires stream: true", "stream_options")
    if streaming is not None and not isinstance(streaming, dict):
        refuse(f"stream_options is {shown(streaming)}; it must be an object", "stream_options")
    routing = _ruyi(body.get("ruyi"))
    details = routing.pop("details", False)
    user = body.get("safety_identifier") or body.get("user")
    return Asked(
        model=_model_name(body),
        prompts=prompts,
        options=options,
        routing=routing,
        n=n,
        stream=stream,
        include_usage=_flag(streaming or {}, "include_usage", "stream_options.include_usage"),
        details=details,
        echo=echo,
        drops_token=drops_token,
        user=user if isinstance(user, str) else "",
        body=body,
    )


def _check_harmless(body: Body, endpoint: str) -> None:
    for name, is_harmless in HARMLESS[endpoint].items():
        given = body.get(name)
        if given is not None and not is_harmless(given):
            refuse(
                f"{name} is {shown(given)}, which this server does not support; remove it",
                name,
                "unsupported_parameter",
            )


def _sampling(body: Body) -> dict[str, Any]:
    """Return the sampling options that a request sets. A temperature or top_p that is absent is 1, as OpenAI has it."""
    temperature = _number(body, "temperature", 0, 2)
    top_p = _number(body, "top_p", 0, 1)
    options: dict[str, Any] = {
        # So small a temperature is greedy; the SDK refuses what would overflow.
        "temperature": 1.0 if temperature is None else temperature if temperature >= 1e-4 else 0.0,
        "top_p": 1.0 if top_p is None else max(top_p, 1e-9),
        "presence_penalty": _number(body, "presence_penalty", -2, 2),
        "frequency_penalty": _number(body, "frequency_penalty", -2, 2),
        "repetition_penalty": _number(body, "repetition_penalty", 1e-9, 1e9),
        "top_k": _whole(body, "top_k", -1, MAX_COUNT),
        "min_new_tokens": _whole(body, "min_tokens", 0, MAX_COUNT),
        "stop": _stop(body.get("stop")),
    }
    if options["top_k"] == -1:  # how vLLM writes that it is off
        options["top_k"] = 0
    if _flag(body, "ignore_eos"):
        options["eos_token_ids"] = ()
    seed = _whole(body, "seed", -_SEEDS, _SEEDS - 1)
    if seed is not None:
        options["seed"] = seed % _SEEDS
    return {name: value for name, value in options.items() if value is not None}


def _stop(given: Any) -> tuple[str, ...]:
    texts = [given] if isinstance(given, str) else given or []
    if not isinstance(texts, list) or len(texts) > MAX_STOPS or not all(is_text(text) and text for text in texts):
        refuse(f"stop is {shown(given)}; it must be a text, or a list of at most {MAX_STOPS} texts, not empty", "stop")
    return tuple(texts)


def _ruyi(given: Any) -> dict[str, Any]:
    """Return the options of the object `ruyi`."""
    if given is None:
        return {}
    if not isinstance(given, dict):
        refuse(f"ruyi is {shown(given)}; it must be an object with keys of {', '.join(_RUYI)}", "ruyi")
    for name in given:
        if name not in _RUYI:
            hint = did_you_mean(own_name(name[:100]), _RUYI) or f"; known: {', '.join(_RUYI)}"
            refuse(f"ruyi has the unknown key {shown(name)}{hint}", f"ruyi.{name[:100]}")
    options = {name: value for name, value in given.items() if value is not None}
    _flag(options, "details", "ruyi.details")
    thresholds = options.get("thresholds")
    if thresholds is not None:
        if not isinstance(thresholds, dict) or not all(
            p.isascii() and p.isdecimal() and len(p) < 10 for p in thresholds
        ):
            refuse(
                f'ruyi.thresholds is {shown(thresholds)}; it must map exits to numbers, as in {{"5": 0.9}}',
                "ruyi.thresholds",
            )
        options["thresholds"] = {int(p): value for p, value in thresholds.items()}
    return options


def _messages(given: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(given, list) or not given:
        refuse(f"{where} is {shown(given)}; it must be a list of messages, not empty", where)
    return [_message(message, f"{where}[{i}]") for i, message in enumerate(given)]


def _message(given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        refuse(f"{where} is {shown(given)}; it must be an object with role and content", where)
    kind = given.get("type", "message")
    if kind != "message":
        refuse(f"{where} is of type {shown(kind)}, which this server does not support", f"{where}.type")
    role, content = given.get("role"), given.get("content")
    if not isinstance(role, str) or role not in _ROLES:
        refuse(f"{where} has the role {shown(role)}; supported are {', '.join(_ROLES)}", f"{where}.role")
    for name, is_harmless in _IN_MESSAGES.items():
        if given.get(name) is not None and not is_harmless(given[name]):
            refuse(
                f"{where}.{name} is not supported by this server; remove it", f"{where}.{name}", "unsupported_parameter"
            )
    if isinstance(content, list):
        return {"role": _ROLES[role], "content": [_part(p, f"{where}.content[{i}]") for i, p in enumerate(content)]}
    if not is_text(content):
        refuse(f"{where}.content is {shown(content)}; it must be a text or a list of text parts", f"{where}.content")
    return {"role": _ROLES[role], "content": content}


def _part(given: Any, where: str) -> dict[str, str]:
    kind = given.get("type") if isinstance(given, dict) else None
    if kind not in ("text", "input_text", "output_text"):
        refuse(f"{where} is a part of type {shown(kind)}; this server reads only text", f"{where}.type")
    if not is_text(given.get("text")):
        refuse(f"{where}.text is {shown(given.get('text'))}; it must be a text", f"{where}.text")
    return {"type": "text", "text": given["text"]}


def _prompts(given: Any) -> list[PromptInput]:
    """Return the prompts of a request for completions: texts or lists of token ids, one or several."""
    if isinstance(given, str) or (isinstance(given, list) and given and to_token_id(given[0]) is not None):
        given = [given]
    if not isinstance(given, list) or not given:
        refuse(f"prompt is {shown(given)}; it must be a text, token ids, or a list of these", "prompt")
    if len(given) > MAX_CHOICES:
        refuse(f"prompt has {len(given)} prompts; at most {MAX_CHOICES} can be asked at once", "prompt")
    for i, prompt in enumerate(given):
        if is_text(prompt):
            continue
        if not isinstance(prompt, list) or not prompt or any(to_token_id(token) is None for token in prompt):
            refuse(f"prompt[{i}] is {shown(prompt)}; it must be a text, or token ids from 0", "prompt")
    return given


def _number(body: Body, name: str, low: float, high: float) -> float | None:
    given = body.get(name)
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not low <= given <= high:
        refuse(f"{name} is {shown(given)}; it must be a number from {low:g} to {high:g}", name)
    return float(given)


def _whole(body: Body, name: str, low: int, high: int) -> int | None:
    given = body.get(name)
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, int) or not low <= given <= high:
        refuse(f"{name} is {shown(given)}; it must be a whole number from {low} to {high}", name)
    return given


def _flag(body: Body, name: str, param: str | None = None) -> bool:
    given = body.get(name)
    if given is not None and not isinstance(given, bool):
        refuse(f"{param or name} is {shown(given)}; it must be true or false", param or name)
    return bool(given)
