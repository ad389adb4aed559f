"""YAML files that people write: how they are read, and error messages for what is wrong in one."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from ruyi_flow.errors import ConfigError, did_you_mean, shown

__all__ = ["Model", "explain", "parse_value", "read_yaml"]

_MOST_CHARACTERS = 2**20
"""Largest YAML file."""

_MOST_VALUES = 20_000
"""Most keys and values of a YAML file, with what anchors repeat; far above all that people write."""

_MOST_LINES = 20
"""Most mistakes that one error message tells."""


class Model(BaseModel):
    """A part of a file: it is frozen, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def read_yaml(path: Path, what: str) -> object:
    """Read a YAML file.

    Args:
        path: the file.
        what: the kind of file, for error messages.

    Raises:
        ConfigError: the file is missing, unreadable, not YAML, or a file of another kind.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_MOST_CHARACTERS + 1)
        if len(text) > _MOST_CHARACTERS:
            raise ConfigError(f"{path}: is larger than {_MOST_CHARACTERS} characters, so it is no {what} file")
        data = yaml.load(text, _Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such {what} file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # the latter: a date that is none
        raise ConfigError(f"{path}: {_syntax_error(error, text)}") from None
    kind = _kind_of(data)
    if kind not in (None, what):
        raise ConfigError(f"{path}: this is a {kind} file, not a {what} file")
    return data


def _syntax_error(error: Exception, text: str) -> str:
    """Return in one line what is wrong in the text of a YAML file, and where."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        begun = "" if error.context_mark is None else f" from {_place(error.context_mark)} on"
        context = f" ({error.context}{begun})" if error.context else ""
        return f"{_place(error.problem_mark)}: not valid YAML: {error.problem}{context}"
    if isinstance(error, yaml.reader.ReaderError):
        at = error.position
        line, column, code = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at), ord(text[at])
        return f"line {line}, column {column}: not valid YAML: the character U+{code:04X} is not allowed"
    if isinstance(error, RecursionError):
        return "not valid YAML: lists or mappings are nested too deeply"
    return f"not valid YAML: {error}"


def _place(mark: yaml.Mark) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"


def _kind_of(data: object) -> str | None:
    """Return the kind of file that has these top-level keys; None if it is not clear."""
    keys = set(data) if isinstance(data, dict) else set()
    return next((kind for kind, own in _KINDS_OF_FILES.items() if own <= keys), None)


_KINDS_OF_FILES = {
    "scenario": {"nodes", "load"},
    "topology": {"nodes", "family"},
    "policy": {"thresholds", "curves"},
    "recipe": {"family", "out", "steps"},
}
"""Top-level keys by which a file of each kind is recognized. A topology is what lacks the load of a scenario."""


def parse_value(text: str, where: str) -> Any:
    """Parse a YAML value of a command line.

    Args:
        text: the value.
        where: the option, for error messages.

    Raises:
        ConfigError: the text is not YAML.
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise ConfigError(f"{where}: {text!r} is not valid YAML: {problem}") from None


class _Loader(yaml.SafeLoader):
    """A YAML loader that refuses duplicate keys, of which the last would win silently, and numbers in base 60.

    It also refuses files with too many values. An alias counts as all that it repeats: of a few lines, ten nested
    anchors of ten aliases each would make 10¹⁰ values.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._open: list[int] = [0]
        """Values so far of the file and of each value that is being read, from the outermost on."""
        self._sizes: dict[str, int] = {}
        """Values of each anchor."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        is_alias = isinstance(event, yaml.AliasEvent)
        if is_alias and event.anchor in self.anchors and event.anchor not in self._sizes:
            raise _wrong(event, "an anchor contains itself")
        self._open.append(self._sizes.get(event.anchor, 0) if is_alias else 1)
        node = super().compose_node(parent, index)
        size = self._open.pop()
        self._open[-1] += size
        if sum(self._open) > _MOST_VALUES:
            raise _wrong(event, f"the file has more than {_MOST_VALUES} values, with what aliases repeat")
        if event.anchor and not is_alias:
            self._sizes[event.anchor] = size
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _wrong(key, "a key must be a text or a number, not a list or a mapping")
            if key.value in seen:
                raise _wrong(key, f"the key {key.value!r} occurs twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        if node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float") and ":" in node.value:
            raise _wrong(node, f"YAML takes {node.value} for a number in base 60; put a text in quotes")
        return super().construct_scalar(node)


def _wrong(at: Any, problem: str) -> yaml.constructor.ConstructorError:
    """Make the error of a node or an event, with its place."""
    return yaml.constructor.ConstructorError(None, None, problem, at.start_mark)


def explain(error: ValidationError, root: type[BaseModel], where: str) -> str:
    """Explain a validation error, one line per mistake with the key's path, the value and the fix.

    Args:
        error: the error of pydantic.
        root: the model of the whole file.
        where: the file's name.
    """
    lines = []
    items = error.errors()
    for item in items:
        loc, kind = item["loc"], item["type"]
        if kind == "too_short" and any(other["loc"][: len(loc)] == loc for other in items if other is not item):
            continue  # its items exist and are wrong
        path = ".".join(str(part)[:80] for part in loc)
        value, context = item["input"], item.get("ctx", {})
        message = item["msg"].removeprefix("Value error, ")
        if kind == "extra_forbidden":
            known = _known_keys(root, loc)
            value = None if isinstance(value, (dict, list)) else value  # long, and not what is wrong
            message = f"unknown key; the keys here are {', '.join(known)}{did_you_mean(str(loc[-1]), known)}"
        elif kind == "missing":
            value, message = None, "this key is required; add it"
        elif kind in ("enum", "literal_error"):
            known = re.findall(r"'([^']+)'", str(context["expected"]))
            message = f"must be one of {', '.join(known)}{did_you_mean(str(value), known)}"
        elif kind in _KINDS:
            message = _KINDS[kind].format(**context)
        is_none = value is None or (isinstance(value, float) and math.isnan(value))
        lines.append(f"{where}: {path}:{'' if is_none else f' {shown(value)}:'} {message}")
        if len(lines) == _MOST_LINES and len(items) > _MOST_LINES:
            lines.append(f"{where}: … and {len(items) - _MOST_LINES} more mistakes")
            break
    return "\n".join(lines)


_KINDS = {
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be a text; put it in quotes if it looks like a number",
    "path_type": "must be a text",
    "tuple_type": "must be a list, as in [5, 11]",
    "list_type": "must be a list, as in [5, 11]",
    "too_long": "must have at most {max_length} items",
    "dict_type": "must be a mapping",
    "invalid_key": "a key must be a text; put it in quotes if it looks like a number",
    "model_type": "must be a mapping of keys to values",
    "model_attributes_type": "must be a mapping of keys to values",
    "too_short": "must name at least one",
    "string_pattern_mismatch": "must be letters, digits, '.', '_' and '-', the first one a letter or a digit",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be {ge} or more",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
}
"""Messages for the kinds of errors of pydantic."""


def _known_keys(root: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Return the keys of the model in which an unknown key was found."""
    model: Any = root
    for part in loc[:-1]:
        if isinstance(part, int):
            continue
        fields = {f.alias or name: f for name, f in model.model_fields.items()}
        inner = fields[part].annotation
        model = next(
            (m for m in (inner, *getattr(inner, "__args__", ())) if isinstance(m, type) and issubclass(m, BaseModel)),
            model,
        )
    return [f.alias or name for name, f in model.model_fields.items()]
