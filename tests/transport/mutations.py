"""Mutations of messages: fields and bytes that change, messages that are lost, doubled and reordered."""

from __future__ import annotations

import math
import random
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from ruyi_flow.transport._pb import node_pb2 as pb

__all__ = ["LARGE", "changed"]

_Type = FieldDescriptor
INTEGERS = (0, 1, 2, 3, 4, 6, 63, 64, 65, 255, 512, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
NUMBERS = (math.nan, math.inf, -math.inf, -1.0, 0.0, 1e-30, 0.3, 1.0, 1.5, 1e30, 1e300)
TEXTS = ("", "x", "a" * 3000, "界" * 1500, "😀\0\n%", "ruyi")
LARGE = (
    pb.Batch(items=[pb.Item()] * 1_000_000).SerializeToString(),
    b"\x12\x00" * 500_000,
    pb.SessionRequest(block=pb.Block(token_ids=[5] * 500_000)).SerializeToString(),
    pb.SessionRequest(open=pb.Open(sampling=pb.SamplingParams(stop=[""] * 400_000))).SerializeToString(),
)


def value_of(rng: random.Random, f: FieldDescriptor) -> Any:
    """A value that a field of this type can have on the wire."""
    if f.cpp_type == _Type.CPPTYPE_STRING:
        return rng.randbytes(rng.choice((0, 1, 30, 4000))) if f.type == _Type.TYPE_BYTES else rng.choice(TEXTS)
    if f.cpp_type in (_Type.CPPTYPE_DOUBLE, _Type.CPPTYPE_FLOAT):
        return rng.choice(NUMBERS)
    if f.cpp_type == _Type.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if f.cpp_type == _Type.CPPTYPE_ENUM:
        return rng.choice((*range(8), 99, -1))
    bits = 64 if f.cpp_type == _Type.CPPTYPE_UINT64 else 32
    return rng.choice([i for i in INTEGERS if i < 2**bits])


def change_field(rng: random.Random, message: Message) -> None:
    """Change one field of a message, or of a message in it."""
    assert isinstance(message.DESCRIPTOR, Descriptor)
    fields = message.DESCRIPTOR.fields
    set_fields = [f for f, _ in message.ListFields()]
    f = rng.choice(set_fields if set_fields and rng.random() < 0.7 else fields)
    value = getattr(message, f.name)
    if f.message_type is not None and f.message_type.GetOptions().map_entry:
        key, of = rng.choice((0, 2, 4, 6, 5, 2**32 - 1)), f.message_type.fields_by_name["value"]
        if of.message_type is None:
            value[key] = value_of(rng, of)
        else:
            change_field(rng, value[key])
    elif f.is_repeated:
        if rng.random() < 0.3:
            del value[rng.randrange(len(value) + 1) :]
        elif f.message_type is None:
            value.extend([value_of(rng, f)] * rng.choice((1, 2, 100)))
        else:
            change_field(rng, value.add())
    elif f.message_type is not None:
        value.SetInParent()
        if rng.random() < 0.9:
            change_field(rng, value)
    elif rng.random() < 0.1:
        message.ClearField(f.name)
    else:
        setattr(message, f.name, value_of(rng, f))


def change_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flip, cut, double or insert bytes."""
    at, to = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return rng.choice(
        (
            lambda: data[:at] + rng.randbytes(1) + data[at + 1 :],
            lambda: data[:at],
            lambda: data[:to] + data[at:to] + data[to:],
            lambda: data[:at] + rng.randbytes(rng.choice((1, 8, 100))) + data[at:],
            lambda: rng.choice(LARGE) if rng.random() < 0.05 else b"",
        )
    )()


def changed(rng: random.Random, messages: list[Message], chance: float = 0.5) -> list[bytes]:
    """Change a conversation in some places, or in none."""
    while rng.random() < chance:
        i = rng.randrange(len(messages))
        if rng.random() < 0.7:
            change_field(rng, messages[i])
        elif rng.random() < 0.3:
            rng.shuffle(messages)
        elif rng.random() < 0.5:
            messages.insert(rng.randrange(len(messages) + 1), messages[i])
        elif len(messages) > 1:
            del messages[i]
    sent = [m.SerializeToString() for m in messages]
    while rng.random() < chance / 2:
        i = rng.randrange(len(sent))
        sent[i] = change_bytes(rng, sent[i])
    return sent
