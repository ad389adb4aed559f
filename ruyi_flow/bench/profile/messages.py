"""How large the messages between nodes are, beyond their states."""

from __future__ import annotations

from typing import Any

import torch

from ruyi_flow.requests import SamplingParams, SessionOpen
from ruyi_flow.routing.policy import Policy
from ruyi_flow.transport import codec
from ruyi_flow.transport.blocks import BlockCodec
from ruyi_flow.types import Block, Decision, Encoding, Hop, Reason, Verdict

__all__ = ["message_sizes"]


def message_sizes(hidden: int, vocab: int, policy: Policy) -> dict[str, Any]:
    """Bytes of messages beyond their states; of a token id, those of one in the middle of the vocabulary."""
    encoding = Encoding.BF16
    opening = SessionOpen(
        family="0" * 16,
        hidden_size=hidden,
        encoding=encoding,
        max_positions=512,
        prompt_length=64,
        sampling=SamplingParams(eos_token_ids=(0, 2)),
        policy=policy,
    )
    blocks = BlockCodec(hidden, encoding)

    def question(rows: int) -> int:
        block = Block(300, torch.zeros(rows, hidden, dtype=torch.bfloat16), (vocab // 2,) * rows, (300 + rows - 1,))
        return len(blocks.to_bytes(block)) - rows * encoding.row_bytes(hidden)

    def answer(count: int) -> int:
        decisions = (Decision(vocab // 2, 9, 0.7, Reason.DEEPEST),) * count
        return int(codec.verdict_to_pb(Verdict(decisions, (Hop("edge", 0.01, 0.001),)), 0.01).ByteSize())

    return {
        "open_bytes": int(codec.open_to_pb(opening).ByteSize()),
        "position_bytes": round((question(101) - question(1)) / 100),
        "up_bytes": question(1) - round((question(101) - question(1)) / 100),
        "decision_bytes": answer(2) - answer(1),
        "down_bytes": 2 * answer(1) - answer(2),
    }
