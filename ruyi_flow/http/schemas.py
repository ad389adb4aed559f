"""OpenAI's requests: which fields are honoured, which are refused by name, and which are ignored.

A field that OpenAI's API defines and this server does not support is refused, unless it has a value that changes
nothing, such as `n: 1`. Fields that cannot change an answer are accepted. Unknown fields are ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ruyi_flow.errors import did_you_mean
from ruyi_flow.http.fields import (
    MAX_CHOICES,
    Body,
    Harmless,
    any_value,
    empty,
    never,
    one_of,
    plain_text,
    read_flag,
    read_messages,
    read_number,
    read_prompts,
    read_stop,
    read_whole,
    refuse,
    told,
)
from ruyi_flow.requests import MAX_LOGPROBS, PromptInput, own_name
from ruyi_flow.types import MAX_COUNT, is_text

__all__ = [
    "HARMLESS",
    "Asked",
    "ToTokenize",
    "chat_request",
    "completion_request",
    "responses_request",
    "tokenize_request",
]

_MAX_N = 16
"""Largest number of answers to one prompt."""

_SEEDS = 2**63
"""Number of seeds that the nodes have; a negative one stands for one of them."""

_COMMON: dict[str, Harmless] = {
    "logit_bias": empty,
    "service_tier": one_of("auto", "default"),
    "user": any_value,
    "metadata": any_value,
    "safety_identifier": any_value,
    "prompt_cache_key": any_value,
    "prompt_cache_retention": any_value,
    # Fields of other servers that would change the answer.
    "guided_choice": empty,
    "guided_grammar": empty,
    "guided_json": empty,
    "guided_regex": empty,
    "structured_outputs": empty,
    "use_beam_search": empty,
    "min_p": one_of(0, 0.0),
    "stop_token_ids": empty,
}

_TOOLS: dict[str, Harmless] = {
    "tools": empty,
    "tool_choice": one_of("none", "auto"),
    "parallel_tool_calls": any_value,  # without tools it changes nothing
}

HARMLESS: dict[str, dict[str, Harmless]] = {
    "chat": _COMMON
    | _TOOLS
    | {
        "functions": empty,
        "function_call": one_of("none", "auto"),
        "response_format": plain_text,
        "modalities": one_of(["text"]),
        "audio": empty,
        "prediction": empty,
        "web_search_options": never,  # an empty object switches the search on
        "moderation": empty,
        "reasoning_effort": one_of("none"),
        "verbosity": one_of("medium"),
        "store": empty,
        "best_of": one_of(1),
        "echo": empty,
        "continue_final_message": empty,
        "add_generation_prompt": one_of(True),
    },
    "completions": _COMMON | {"suffix": empty, "response_format": plain_text},
    "responses": _COMMON
    | _TOOLS
    | {
        "background": empty,
        "context_management": empty,
        "conversation": empty,
        "include": empty,
        "max_tool_calls": any_value,  # without tools it changes nothing
        "moderation": empty,
        "previous_response_id": empty,
        "prompt": empty,
        "reasoning": lambda given: isinstance(given, dict) and given.get("effort") in (None, "none"),
        "store": empty,
        "text": lambda given: plain_text(given) or given == {"format": {"type": "text"}, "verbosity": "medium"},
        "top_logprobs": one_of(0),
        "truncation": one_of("disabled"),
    },
}
"""The fields, by endpoint, that have no effect here: the values of each that change nothing. Others are refused."""

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


def chat_request(body: Body, max_new_tokens: int) -> Asked:
    """Check a request for a chat completion.

    Args:
        body: the request.
        max_new_tokens: largest number of new tokens if the request sets none.

    Raises:
        HttpError: a field is not supported, or has a value that it cannot have.
    """
    _check_harmless(body, "chat")
    limits = {name: read_whole(body, name, 1, MAX_COUNT) for name in ("max_completion_tokens", "max_tokens")}
    given = [limit for limit in limits.values() if limit is not None]
    if len(set(given)) > 1:
        refuse("max_tokens and max_completion_tokens differ; give one of them", "max_tokens")
    options = _sampling(body) | {"max_new_tokens": given[0] if given else max_new_tokens}
    top = read_whole(body, "top_logprobs", 0, MAX_LOGPROBS)
    if read_flag(body, "logprobs"):
        options["logprobs"] = top or 0
    elif top:
        refuse("top_logprobs requires logprobs: true", "top_logprobs")
    return _asked(body, [read_messages(body.get("messages"), "messages")], options)


def completion_request(body: Body, max_new_tokens: int) -> Asked:
    """Check a request for completions of prompts; see `chat_request`."""
    _check_harmless(body, "completions")
    echo = read_flag(body, "echo")
    limit = read_whole(body, "max_tokens", 0 if echo else 1, MAX_COUNT)
    options = _sampling(body) | {"max_new_tokens": max_new_tokens if limit is None else max(1, limit), "raw": True}
    logprobs = read_whole(body, "logprobs", 0, MAX_LOGPROBS)
    if logprobs is not None:
        options["logprobs"] = logprobs
    prompts = read_prompts(body.get("prompt"))
    if echo and (logprobs is not None or not all(isinstance(prompt, str) for prompt in prompts)):
        options["prompt_logprobs"] = logprobs or 0  # the entry node tells the text of token ids with them
    asked = _asked(body, prompts, options, echo=echo, drops_token=limit == 0)
    if (best := read_whole(body, "best_of", 1, _MAX_N)) is not None and best != asked.n:
        refuse(f"best_of is {best}; it must be the same as n ({asked.n}), since answers are not ranked", "best_of")
    return asked


def responses_request(body: Body, max_new_tokens: int) -> Asked:
    """Check a request for a response; see `chat_request`."""
    _check_harmless(body, "responses")
    limit = read_whole(body, "max_output_tokens", 1, MAX_COUNT)
    options = _sampling(body) | {"max_new_tokens": max_new_tokens if limit is None else limit}
    given = body.get("input")
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else read_messages(given, "input")
    instructions = body.get("instructions")
    if instructions is not None:
        if not isinstance(instructions, str):
            refuse(f"instructions is {told(instructions)}; it must be a text", "instructions")
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
        return ToTokenize(model, read_messages(messages, "messages"), False)
    if not isinstance(prompt, str) or not is_text(prompt):
        refuse(f"prompt is {told(prompt)}; it must be a text", "prompt")
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
    n = read_whole(body, "n", 1, _MAX_N) or 1
    if n * len(prompts) > MAX_CHOICES:
        refuse(
            f"the request asks for {n * len(prompts)} answers; at most {MAX_CHOICES} can be asked for at once",
            "n" if n > 1 else "prompt",
        )
    stream, streaming = read_flag(body, "stream"), body.get("stream_options")
    if streaming is not None and not stream:
        refuse("stream_options requires stream: true", "stream_options")
    if streaming is not None and not isinstance(streaming, dict):
        refuse(f"stream_options is {told(streaming)}; it must be an object", "stream_options")
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
        include_usage=read_flag(streaming or {}, "include_usage", "stream_options.include_usage"),
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
                f"{name} is {told(given)}, which this server does not support; remove it",
                name,
                "unsupported_parameter",
            )


def _sampling(body: Body) -> dict[str, Any]:
    """Return the sampling options that a request sets. A temperature or top_p that is absent is 1, as OpenAI has it."""
    temperature = read_number(body, "temperature", 0, 2)
    top_p = read_number(body, "top_p", 0, 1)
    options: dict[str, Any] = {
        # So small a temperature is greedy; the SDK refuses what would overflow.
        "temperature": 1.0 if temperature is None else temperature if temperature >= 1e-4 else 0.0,
        "top_p": 1.0 if top_p is None else max(top_p, 1e-9),
        "presence_penalty": read_number(body, "presence_penalty", -2, 2),
        "frequency_penalty": read_number(body, "frequency_penalty", -2, 2),
        "repetition_penalty": read_number(body, "repetition_penalty", 1e-9, 1e9),
        "top_k": read_whole(body, "top_k", -1, MAX_COUNT),
        "min_new_tokens": read_whole(body, "min_tokens", 0, MAX_COUNT),
        "stop": read_stop(body.get("stop")),
    }
    if options["top_k"] == -1:  # how vLLM writes that it is off
        options["top_k"] = 0
    if read_flag(body, "ignore_eos"):
        options["eos_token_ids"] = ()
    seed = read_whole(body, "seed", -_SEEDS, _SEEDS - 1)
    if seed is not None:
        options["seed"] = seed % _SEEDS
    return {name: value for name, value in options.items() if value is not None}


def _ruyi(given: Any) -> dict[str, Any]:
    """Return the options of the object `ruyi`."""
    if given is None:
        return {}
    if not isinstance(given, dict):
        refuse(f"ruyi is {told(given)}; it must be an object with keys of {', '.join(_RUYI)}", "ruyi")
    for name in given:
        if name not in _RUYI:
            hint = did_you_mean(own_name(name[:100]), _RUYI) or f"; known: {', '.join(_RUYI)}"
            refuse(f"ruyi has the unknown key {told(name)}{hint}", f"ruyi.{name[:100]}")
    options = {name: value for name, value in given.items() if value is not None}
    read_flag(options, "details", "ruyi.details")
    thresholds = options.get("thresholds")
    if thresholds is not None:
        if not isinstance(thresholds, dict) or not all(
            p.isascii() and p.isdecimal() and len(p) < 10 for p in thresholds
        ):
            refuse(
                f'ruyi.thresholds is {told(thresholds)}; it must map exits to numbers, as in {{"5": 0.9}}',
                "ruyi.thresholds",
            )
        options["thresholds"] = {int(p): value for p, value in thresholds.items()}
    return options
