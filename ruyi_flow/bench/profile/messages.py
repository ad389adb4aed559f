"""Sizes of the messages between nodes, without the hidden states in them."""

from __future__ import annotations

from typing import Any

import torch

from ruyi_flow.requests import SamplingParams, SessionOpen
from ruyi_flow.routing.policy import Policy
from ruyi_flow.transport import codec
from ruyi_flow.transport.blocks import BlockCodec
from ruyi_flow.transport.checksum import seal
from ruyi_flow.types import Block, Decision, Encoding, Hop, Reason, Verdict

__all__ = ["message_sizes"]


def message_sizes(hidden_size: int, vocab_size: int, policy: Policy) -> dict[str, Any]:
    """Return the bytes of messages without hidden states, as fields of `Profile`; token ids of medium size."""
    encoding = Encoding.BF16
    opening = SessionOpen(
        family="0" * 16,
        node="cloud",
        exits=(29,),
        key=bytes(16),
        hidden_size=hidden_size,
        encoding=encoding,
        max_positions=512,
        prompt_length=64,
        sampling=SamplingParams(eos_token_ids=(0, 2)),
        policy=policy,
    )
    blocks = BlockCodec(hidden_size, encoding)

    def question(rows: int) -> int:
        states = torch.zeros(rows, hidden_size, dtype=torch.bfloat16)
        block = Block(300, states, (vocab_size // 2,) * rows, (300 + rows - 1,))
        return len(seal(blocks.to_bytes(block))) - rows * encoding.row_bytes(hidden_size)

    def answer(count: int) -> int:
        decisions = (Decision(vocab_size // 2, 9, 0.7, Reason.DEEPEST),) * count
        reply = codec.verdict_to_pb(Verdict(decisions, (Hop("edge", 0.01, 0.001),)), 0.01, 301)
        return len(seal(reply.SerializeToString()))

    position_bytes = round((question(101) - question(1)) / 100)
    return {
        "open_bytes": len(seal(codec.open_to_pb(opening).SerializeToString())),
        "position_bytes": position_bytes,
        "up_bytes": question(1) - position_bytes,
        "decision_bytes": answer(2) - answer(1),
        "down_bytes": 2 * answer(1) - answer(2),
    }
