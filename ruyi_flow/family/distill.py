"""Answers of a family's own exit to many prompts at once: what its other branches learn from (self-distillation).

Sequences of any length run side by side, each in a row of one padded cache; a row whose answer ended takes the next
prompt at once, so that short answers do not wait for long ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ruyi_flow.family.config import FamilyConfig
from ruyi_flow.family.transformer import FamilySlice, Rope

__all__ = ["Answer", "answers"]


@dataclass(frozen=True, slots=True)
class Answer:
    """A prompt and what the family said to it, as token ids."""

    index: int
    """Of the prompt among those that were given."""
    prompt: tuple[int, ...]
    token_ids: tuple[int, ...]
    """The end of sequence included, if it came."""


@torch.inference_mode()
def answers(
    model: FamilySlice,
    prompts: Iterable[Sequence[int]],
    *,
    exit: int | None = None,
    max_new_tokens: int = 256,
    max_positions: int = 1024,
    batch: int = 64,
    temperature: float = 0.0,
    eos_token_ids: Sequence[int] = (),
    seed: int = 0,
) -> Iterator[Answer]:
    """Answer prompts in any order, greedily or sampled.

    Args:
        model: the whole family.
        prompts: token ids; one that leaves no room for an answer in `max_positions` is skipped.
        exit: whose branch answers; the last one's when left out.
        max_new_tokens: of an answer, at most.
        max_positions: of prompt and answer together, at most.
        batch: sequences at once.
        temperature: 0 is greedy.
        eos_token_ids: tokens that end an answer.
        seed: of the sampling.

    Yields:
        Answers as they end.
    """
    exit = model.exits[-1] if exit is None else exit
    weight = model.trunk[0].input_layernorm.weight
    rope = Rope(model.config, weight.dtype, weight.device)
    generator = torch.Generator(weight.device).manual_seed(seed)
    cache = _RowCache(model.config, batch, max_positions, weight)
    waiting = ((i, p) for i, p in enumerate(prompts) if 0 < len(p) < max_positions)
    running: dict[int, tuple[int, tuple[int, ...], list[int]]] = {}  # row -> index, prompt, answer
    ends = frozenset(eos_token_ids)

    def pick(logits: Tensor) -> list[int]:
        if temperature == 0:
            return [int(t) for t in logits.argmax(-1)]
        chances = (logits.float() / temperature).softmax(-1)
        return [int(t) for t in torch.multinomial(chances, 1, generator=generator)[:, 0]]

    def ended(row: int) -> Answer | None:
        """What a row's last token means for it."""
        index, prompt, said = running[row]
        if said[-1] not in ends and len(said) < max_new_tokens and len(prompt) + len(said) < max_positions:
            return None
        del running[row]
        return Answer(index, prompt, tuple(said))

    while True:
        for row in range(batch):
            while row not in running and (following := next(waiting, None)) is not None:
                index, prompt = following[0], tuple(following[1])
                cache.start(row, len(prompt))
                states = model.embed(torch.tensor(prompt, device=weight.device))
                states = model.run(states, 0, exit, rope.at(0, len(prompt)), cache)
                logits = model.branch(exit, states, rope.at(0, len(prompt)), cache, cache.last)
                assert logits is not None
                running[row] = index, prompt, pick(logits)
                if (answer := ended(row)) is not None:
                    yield answer
        if not running:
            return
        rows = sorted(running)
        positions = [len(running[row][1]) + len(running[row][2]) - 1 for row in rows]
        cos, sin = rope.at(0, max(positions) + 1)
        where = torch.tensor(positions, device=weight.device)
        turned = cos[where], sin[where]
        cache.go_on(rows, positions)
        states = model.embed(torch.tensor([running[row][2][-1] for row in rows], device=weight.device))
        logits = model.branch(exit, model.run(states, 0, exit, turned, cache), turned, cache)
        assert logits is not None
        for row, token in zip(rows, pick(logits), strict=True):
            running[row][2].append(token)
            if (answer := ended(row)) is not None:
                yield answer


class _RowCache:
    """Keys and values of many sequences, a row each: an `Attention` for one whole prompt, or one token of each row."""

    def __init__(self, config: FamilyConfig, batch: int, length: int, like: Tensor) -> None:
        self._shape = (2, batch, config.num_kv_heads, length, config.head_dim)
        self._group = config.num_heads // config.num_kv_heads
        self._like = like
        self._memory: dict[int, Tensor] = {}  # made for the slots that are used
        self._prompt_row: int | None = None
        self.last = torch.zeros(1, dtype=torch.int64, device=like.device)
        """The last row of the prompt that runs, as an index."""

    def start(self, row: int, count: int) -> None:
        """What follows is a prompt of so many tokens, in this row."""
        self._prompt_row, self._count = row, count
        self.last = torch.tensor([count - 1], device=self._like.device)

    def go_on(self, rows: Sequence[int], positions: Sequence[int]) -> None:
        """What follows is one token at a position of each of these rows."""
        device = self._like.device
        self._prompt_row, self._stop = None, max(positions) + 1
        self._rows = torch.tensor(rows, device=device)
        self._positions = torch.tensor(positions, device=device)
        self._whole = len(rows) == self._shape[1]
        seen = torch.arange(self._stop, device=device) <= self._positions[:, None]
        self._mask = torch.zeros(seen.shape, dtype=self._like.dtype, device=device)
        self._mask.masked_fill_(~seen, float("-inf"))
        self._mask = self._mask[:, None, None].expand(-1, 1, self._group, -1)

    def __call__(self, slot: int, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None) -> Tensor:
        """See `transformer.Attention`."""
        memory = self._memory.get(slot)
        if memory is None:
            memory = self._memory[slot] = self._like.new_zeros(self._shape)
        keys, values = memory
        if self._prompt_row is not None:
            k, v = k.transpose(0, 1), v.transpose(0, 1)
            keys[self._prompt_row, :, : self._count] = k
            values[self._prompt_row, :, : self._count] = v
            # Of a branch only the last row is asked, which sees everything; all rows see what is before them.
            out = F.scaled_dot_product_attention(
                q.transpose(0, 1)[None], k[None], v[None], is_causal=rows is None, enable_gqa=True
            )
            return out[0].transpose(0, 1).flatten(1)
        keys[self._rows, :, self._positions] = k
        values[self._rows, :, self._positions] = v
        keys, values = keys[:, :, : self._stop], values[:, :, : self._stop]
        if not self._whole:
            keys, values = keys[self._rows], values[self._rows]
        count, heads, d = q.shape
        grouped = q.view(count, heads // self._group, self._group, d)  # heads that share a key head: its rows
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=self._mask)
        return out.reshape(count, heads * d)
