"""The fields of a request, one by one: what each may be, and the error that names one that is not."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any, NoReturn

from ruyi_flow.http.errors import HttpError
from ruyi_flow.requests import MAX_STOPS, PromptInput
from ruyi_flow.types import is_text, to_token_id

__all__ = [
    "MAX_CHOICES",
    "Body",
    "Harmless",
    "any_value",
    "empty",
    "read_flag",
    "read_messages",
    "never",
    "read_number",
    "one_of",
    "parse_json",
    "plain_text",
    "read_prompts",
    "refuse",
    "told",
    "read_stop",
    "read_whole",
]

MAX_CHOICES = 128
"""Largest number of answers that one request may ask for: `n` for each of its prompts."""


Body = Mapping[str, Any]
"""A request: a JSON object."""

_SHOWN = 120
"""Largest number of characters of a value that an error message shows."""

Harmless = Callable[[Any], bool]
"""Tells whether the value of a field that is not supported changes nothing."""


def told(value: Any) -> str:
    """Return a value as an error message shows it: as JSON, and short."""
    given = value[: _SHOWN + 1] if isinstance(value, str) else value
    text = "".join(islice(_encoder.iterencode(given), _SHOWN))  # without making a text of all that is in it
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


_encoder = json.JSONEncoder(ensure_ascii=False)


def one_of(*values: Any) -> Harmless:
    """Let a field have these values."""
    return lambda given: any(given == value and type(given) is type(value) for value in values)


def empty(given: Any) -> bool:
    """Let a field be empty or false."""
    return given in ("", [], {}) or given is False


def never(given: Any) -> bool:
    """Let a field have no value but null."""
    return False


def any_value(given: Any) -> bool:
    """Let a field have any value: it cannot change an answer."""
    return True


def plain_text(given: Any) -> bool:
    """Let a field ask for plain text, which answers are."""
    return given in ({"type": "text"}, {"format": {"type": "text"}}, {})


_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""The roles of messages, and those that families know for them."""

_IN_MESSAGES: dict[str, Harmless] = {
    "name": empty,
    "tool_calls": empty,
    "function_call": empty,
    "refusal": empty,
    "audio": empty,
}
"""The fields of a message that OpenAI defines and families do not read."""


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
        refuse(f"the body must be a JSON object; it is {told(body)}", None)
    return body


def read_stop(given: Any) -> tuple[str, ...]:
    """Return the stop strings of a request.

    Raises:
        HttpError: it cannot be.
    """
    texts = [given] if isinstance(given, str) else given or []
    if not isinstance(texts, list) or len(texts) > MAX_STOPS or not all(is_text(text) and text for text in texts):
        refuse(f"stop is {told(given)}; it must be a text, or a list of at most {MAX_STOPS} texts, not empty", "stop")
    return tuple(texts)


def read_messages(given: Any, where: str) -> list[dict[str, Any]]:
    """Return messages as the SDK takes them; `where` names the field that they are in.

    Raises:
        HttpError: it cannot be.
    """
    if not isinstance(given, list) or not given:
        refuse(f"{where} is {told(given)}; it must be a list of messages, not empty", where)
    return [_message(message, f"{where}[{i}]") for i, message in enumerate(given)]


def _message(given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        refuse(f"{where} is {told(given)}; it must be an object with role and content", where)
    kind = given.get("type", "message")
    if kind != "message":
        refuse(f"{where} is of type {told(kind)}, which this server does not support", f"{where}.type")
    role, content = given.get("role"), given.get("content")
    if not isinstance(role, str) or role not in _ROLES:
        refuse(f"{where} has the role {told(role)}; supported are {', '.join(_ROLES)}", f"{where}.role")
    for name, is_harmless in _IN_MESSAGES.items():
        if given.get(name) is not None and not is_harmless(given[name]):
            refuse(
                f"{where}.{name} is not supported by this server; remove it", f"{where}.{name}", "unsupported_parameter"
            )
    if isinstance(content, list):
        return {"role": _ROLES[role], "content": [_part(p, f"{where}.content[{i}]") for i, p in enumerate(content)]}
    if not is_text(content):
        refuse(f"{where}.content is {told(content)}; it must be a text or a list of text parts", f"{where}.content")
    return {"role": _ROLES[role], "content": content}


def _part(given: Any, where: str) -> dict[str, str]:
    kind = given.get("type") if isinstance(given, dict) else None
    if kind not in ("text", "input_text", "output_text"):
        refuse(f"{where} is a part of type {told(kind)}; this server reads only text", f"{where}.type")
    if not is_text(given.get("text")):
        refuse(f"{where}.text is {told(given.get('text'))}; it must be a text", f"{where}.text")
    return {"type": "text", "text": given["text"]}


def read_prompts(given: Any) -> list[PromptInput]:
    """Return the prompts of a request for completions: texts or lists of token ids, one or several.

    Raises:
        HttpError: they cannot be.
    """
    if isinstance(given, str) or (isinstance(given, list) and given and to_token_id(given[0]) is not None):
        given = [given]
    if not isinstance(given, list) or not given:
        refuse(f"prompt is {told(given)}; it must be a text, token ids, or a list of these", "prompt")
    if len(given) > MAX_CHOICES:
        refuse(f"prompt has {len(given)} prompts; at most {MAX_CHOICES} can be asked at once", "prompt")
    for i, prompt in enumerate(given):
        if is_text(prompt):
            continue
        if not isinstance(prompt, list) or not prompt or any(to_token_id(token) is None for token in prompt):
            refuse(f"prompt[{i}] is {told(prompt)}; it must be a text, or token ids from 0", "prompt")
    return given


def read_number(body: Body, name: str, low: float, high: float) -> float | None:
    """Return a number of a request, or None if it has none.

    Raises:
        HttpError: it cannot be.
    """
    given = body.get(name)
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not low <= given <= high:
        refuse(f"{name} is {told(given)}; it must be a number from {low:g} to {high:g}", name)
    return float(given)


def read_whole(body: Body, name: str, low: int, high: int) -> int | None:
    """Return a whole number of a request, or None if it has none.

    Raises:
        HttpError: it cannot be.
    """
    given = body.get(name)
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, int) or not low <= given <= high:
        refuse(f"{name} is {told(given)}; it must be a whole number from {low} to {high}", name)
    return given


def read_flag(body: Body, name: str, param: str | None = None) -> bool:
    """Return whether a field is true; `param` names it if it is not one of the body itself.

    Raises:
        HttpError: it cannot be.
    """
    given = body.get(name)
    if given is not None and not isinstance(given, bool):
        refuse(f"{param or name} is {told(given)}; it must be true or false", param or name)
    return bool(given)
