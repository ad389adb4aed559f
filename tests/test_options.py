"""Options of a request: one list of names and types for editors, for a running interpreter, and for error messages."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from ruyi_flow import AsyncClient, Client, Options
from ruyi_flow.client import make_request
from ruyi_flow.config.topology import Topology
from ruyi_flow.errors import ConfigError, RequestError
from ruyi_flow.requests import SamplingParams, field_docs, option_names
from ruyi_flow.routing.policy import Routing
from ruyi_flow.types import Mode

INTERNAL = {"family", "scale", "start"}
OF_A_CALL = {"raw", "policy", "timeout_s"}
METHODS = [getattr(kind, name) for kind in (Client, AsyncClient) for name in ("generate", "stream", "events")]


def widened(kind: Any) -> Any:
    """The type that a caller may give for a field: a mode's name for a mode, and any sequence for a tuple."""
    if kind is Mode:
        return Mode | Literal[tuple(str(mode) for mode in Mode)]
    if get_origin(kind) is tuple:
        return Sequence[get_args(kind)[0]]  # type: ignore[misc]
    if type(None) in get_args(kind):
        [inner] = [k for k in get_args(kind) if k is not type(None)]
        return widened(inner) | None
    return kind


def test_the_options_are_those_of_sampling_and_routing() -> None:
    hints = get_type_hints(Options)
    expected: dict[str, Any] = {}
    for source in (SamplingParams, Routing):
        types = get_type_hints(source)
        expected |= {f.name: widened(types[f.name]) for f in fields(source) if f.name not in INTERNAL}
    assert hints.keys() == expected.keys() | OF_A_CALL
    for name, kind in expected.items():
        assert set(get_args(hints[name]) or [hints[name]]) == set(get_args(kind) or [kind]), name


def test_the_options_have_the_docs_of_their_fields() -> None:
    docs = field_docs(Options)
    for name, text in {**field_docs(SamplingParams), **field_docs(Routing)}.items():
        assert name in INTERNAL or docs[name] == text
    assert all(docs[name] for name in get_type_hints(Options))


@pytest.mark.parametrize("method", METHODS)
def test_signatures_and_help_name_every_option(method: Callable[..., Any]) -> None:
    parameters = inspect.signature(method).parameters
    assert list(parameters)[:2] == ["self", "prompt"] and set(parameters) - {"self", "prompt"} == set(
        Options.__optional_keys__
    )
    assert parameters["max_new_tokens"].annotation is int and parameters["max_new_tokens"].default == 256
    assert all(p.kind is p.KEYWORD_ONLY for name, p in parameters.items() if name not in ("self", "prompt"))
    for name, text in field_docs(Options).items():
        assert f"    {name}: {text}\n" in (method.__doc__ or "")


def test_the_sync_generate_is_documented_in_full() -> None:
    doc = Client.generate.__doc__ or ""
    for part in ("client.generate(", "Args:", "Returns:", "Raises:", "RequestError:", "NodeError:", "Options:"):
        assert part in doc


def test_an_error_names_the_options_that_users_set(whole: Client, tmp_path: Path) -> None:
    assert option_names() & INTERNAL == set() and {"policy", "timeout_s"} & option_names() == set()
    wrong: dict[str, Any] = {"zzz": 1}
    with pytest.raises(RequestError, match="unknown option 'zzz'; known: back, draft, ") as caught:
        whole.generate("hi", **wrong)
    known = set(str(caught.value).partition("known: ")[2].split(", "))
    assert known == Options.__optional_keys__
    assert make_request("hi", {"family": "abc"}).routing == {"family": "abc"}, "code may set what policy files set"
    file = tmp_path / "topology.yaml"
    file.write_text("family: x\nnodes: [{name: a, exits: [2]}]\npolicy: {zzz: 1}\n")
    with pytest.raises((ConfigError, RequestError), match="unknown option 'zzz'; known: back, draft, ") as told:
        Topology.load(file)
    assert not INTERNAL & set(str(told.value).partition("known: ")[2].split(", "))
