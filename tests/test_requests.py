"""Requests as users give them: numbers of other libraries, messages of other APIs, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ruyi_flow.client import make_request
from ruyi_flow.config.topology import Topology
from ruyi_flow.errors import RequestError
from ruyi_flow.requests import MAX_EOS_TOKENS, MAX_NGRAM, SamplingParams, parse_request
from ruyi_flow.routing.confidence import Curve, Scale, Score
from ruyi_flow.routing.policy import Routing
from ruyi_flow.transport import codec
from ruyi_flow.types import Mode


@pytest.mark.parametrize(
    "prompt",
    [
        (5, 6, 7),
        iter([5, 6, 7]),
        np.array([5, 6, 7]),
        np.array([5, 6, 7], dtype=np.uint8),
        torch.tensor([5, 6, 7]),
        torch.tensor([5, 6, 7], dtype=torch.int16),
        list(np.array([5, 6, 7])),
        list(torch.tensor([5, 6, 7])),
    ],
)
def test_token_ids_may_be_integers_of_any_library(prompt: Any) -> None:
    ids = parse_request(prompt, {}).prompt
    assert ids == (5, 6, 7) and all(type(i) is int for i in ids)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (b"hi", "this is bytes"),
        (bytearray(b"hi"), "this is bytearray"),
        (memoryview(b"hi"), "this is memoryview"),
        ({5, 6}, "this is set"),
        ({"role": "user", "content": "hi"}, "this is dict"),
        (5, "this is int"),
        ([5, True], "this list contains True"),
        ([5, 6.0], "this list contains 6.0"),
        ([5, "hi"], "this list contains 'hi'"),
        (["hi"], "this list contains 'hi'"),
        ([5, 2**31], "this list contains 2147483648"),
        ([5, -(10**5000)], "this list contains a value of type int"),
        (np.array([5.0]), "this list contains 5.0"),
        (np.array([True]), "this list contains True"),
        ([np.bool_(True)], "this list contains np.True_"),
        ([torch.tensor(True)], r"this list contains tensor\(True\)"),
        ([torch.tensor(5.0)], r"this list contains tensor\(5.\)"),
        (torch.tensor([[5, 6]]), r"of shape \(n,\); these have shape \(1, 2\)"),
        (torch.tensor(5), r"these have shape \(\)"),
        ([{"role": "user", "content": "hi"}, 5], "this message is 5"),
        ([{"role": "user"}], "this message is {'role': 'user'}"),
        ([{"role": 1, "content": "hi"}], "role must be a text"),
        ([{"role": "assistant", "content": "", "tool_calls": [{}]}], "has the key 'tool_calls'"),
        ([{"role": "user", "content": None}], "its content a text or a list of text parts"),
        ([{"role": "user", "content": ["hi"]}], "there is 'hi'"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "a text part of a message has the text 5"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "a part of type 'image_url'"),
    ],
)
def test_other_prompts_are_refused(prompt: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        parse_request(prompt, {})


def test_text_parts_are_one_text() -> None:
    parts = [{"type": "text", "text": "Why is"}, {"type": "text", "text": "the sky blue?"}]
    assert parse_request([{"role": "user", "content": parts}], {}).prompt == (("user", "Why is\nthe sky blue?"),)
    assert parse_request([{"role": "user", "content": parts[:1]}], {}).prompt == (("user", "Why is"),)


NUMBERS = {
    "temperature": 0.5,
    "top_k": 3,
    "top_p": 0.5,
    "repetition_penalty": 1.5,
    "no_repeat_ngram_size": 3,
    "min_new_tokens": 2,
    "max_new_tokens": 9,
    "seed": 7,
    "exit": 4,
    "draft": 2,
    "window": 5,
    "threshold": 0.5,
    "back": 0.5,
}


def test_numbers_of_other_libraries_are_pythons_on_the_wire() -> None:
    routing = Routing.names()
    for name, value in NUMBERS.items():
        kind: Any = type(value)
        given: list[Any] = [np.array(value)[()], torch.tensor(value)]
        given += [np.float32(value), np.float64(value)] if kind is float else [np.int8(value), np.uint64(value)]
        for number in given:
            request = parse_request([5], {name: number})
            got = request.routing[name] if name in routing else getattr(request.sampling, name)
            assert got == value and type(got) is kind, (name, number)
            sent = codec.generate_from_bytes(codec.generate_to_pb(request).SerializeToString())
            assert (sent.routing, sent.sampling) == (request.routing, request.sampling)
    request = parse_request(
        [5], {"thresholds": {np.int64(2): np.float32(0.5)}, "eos_token_ids": torch.tensor([3, 3, 4])}
    )
    assert request.routing == {"thresholds": {2: 0.5}} and request.sampling.eos_token_ids == (3, 4)
    codec.generate_to_pb(request)


STRANGE: list[Any] = [
    np.bool_(True),
    torch.tensor(True),
    b"5",
    {},
    object(),
    1j,
    float("nan"),
    -float("inf"),
    -1,
    -(2**64),
]
STRANGE += [10**400, 10**5000, torch.tensor([[1, 2]]), np.array([0.5, 0.5]), [0.5], "\ud800"]


@pytest.mark.parametrize(
    "name", [*NUMBERS, "eos_token_ids", "thresholds", "raw", "fallback", "mode", "family", "scale", "start", "policy"]
)
def test_an_option_with_a_value_that_cannot_be_is_a_request_error(name: str) -> None:
    strange = STRANGE if name in ("raw", "fallback") else [*STRANGE, True]
    for value in strange if name != "policy" else STRANGE[:-1]:
        try:
            request = make_request([5], {name: value})
        except RequestError as error:
            assert name in str(error) or "threshold" in str(error)
        else:
            pytest.fail(f"{name} is {request}")


def test_options_that_slow_every_step_are_bounded() -> None:
    eos = tuple(range(MAX_EOS_TOKENS))
    assert SamplingParams(eos_token_ids=eos + eos[:0], no_repeat_ngram_size=MAX_NGRAM).eos_token_ids == eos
    with pytest.raises(RequestError, match=f"eos_token_ids has 700000 tokens; at most {MAX_EOS_TOKENS}"):
        SamplingParams(eos_token_ids=tuple(range(700_000)))
    with pytest.raises(
        RequestError, match=f"no_repeat_ngram_size is 1900; it must be a whole number from 0 .off. to {MAX_NGRAM}"
    ):
        SamplingParams(no_repeat_ngram_size=1900)
    message = codec.generate_to_pb(parse_request([5], {}))
    message.sampling.no_repeat_ngram_size = 1900  # a node does not rely on its callers' checks
    with pytest.raises(RequestError, match="no_repeat_ngram_size is 1900"):
        codec.generate_from_bytes(message.SerializeToString())
    message = codec.generate_to_pb(parse_request([5], {}))
    message.sampling.eos_token_ids.ids.extend(range(700_000))
    with pytest.raises(RequestError, match="eos_token_ids has 700000 tokens"):
        codec.generate_from_bytes(message.SerializeToString())


def test_a_scale_of_exits_that_cannot_be_is_refused() -> None:
    scale = Scale(Score.MARGIN, {-1: Curve(1.0, (0.5,), (0.5,))})
    with pytest.raises(RequestError, match=r"scale is for exits \[-1\]"):
        parse_request([5], {"scale": scale})


def test_a_policy_is_the_path_of_a_file() -> None:
    with pytest.raises(RequestError, match="policy is 5; it must be the path of a policy file"):
        make_request([5], {"policy": 5})


def test_every_interface_merges_a_requests_options_in_the_same_way(tmp_path: Path) -> None:
    """The topology's draft and fallback stay, whatever mode a request names, and so over the wire."""
    file = tmp_path / "topology.yaml"
    file.write_text(
        "family: x\nnodes: [{name: a, exits: [2, 4, 6]}]\n"
        "policy: {mode: cascade, threshold: 0.5, window: 3, back: 0.75, draft: 0, fallback: true}\n"
    )
    own = Topology.load(file).routing()
    for options, expected in (
        ({}, own),
        ({"mode": "cascade"}, own),
        ({"mode": "exact"}, Routing(mode=Mode.EXACT, draft=0, fallback=True)),
        ({"exit": 4}, Routing(mode=Mode.FIXED, exit=4, draft=0, fallback=True)),
        ({"threshold": 0.9}, Routing(mode=Mode.TOKEN, threshold=0.9, draft=0, fallback=True)),
        ({"mode": "cascade", "threshold": 0.9}, Routing(mode=Mode.CASCADE, threshold=0.9, draft=0, fallback=True)),
        ({"mode": "exact", "draft": 2}, Routing(mode=Mode.EXACT, draft=2, fallback=True)),
        ({"fallback": False}, Routing(Mode.CASCADE, threshold=0.5, window=3, back=0.75, draft=0, fallback=False)),
    ):
        request = make_request("hi", options)
        sent = codec.generate_from_bytes(codec.generate_to_pb(request).SerializeToString())
        assert own.updated(request.routing) == own.updated(sent.routing) == expected, options
