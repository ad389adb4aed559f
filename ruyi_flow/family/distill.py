"""Answers of a family's own exit to many prompts at once: what its other branches learn from (self-distillation).

Sequences of any length run side by side, each in a row of one padded cache; where an answer ended the next prompt
begins at once, so that short answers do not wait for long ones.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ruyi_flow.errors import ConfigError
from ruyi_flow.family.checkpoint import Checkpoint
from ruyi_flow.family.config import FamilyConfig
from ruyi_flow.family.corpus import read_prompts
from ruyi_flow.family.loading import load_slice
from ruyi_flow.family.recipe import Recipe
from ruyi_flow.family.transformer import FamilySlice, Rope

__all__ = ["Answer", "answers", "distill"]


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
    ended: Callable[[Sequence[int]], bool] = lambda token_ids: False,
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
        ended: whether an answer so far is over for another reason.
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
    running: list[tuple[int, tuple[int, ...], list[int]]] = []  # by row: index, prompt, answer
    ends = frozenset(eos_token_ids)

    def pick(logits: Tensor) -> list[int]:
        if temperature == 0:
            return [int(t) for t in logits.argmax(-1)]
        chances = (logits.float() / temperature).softmax(-1)
        return [int(t) for t in torch.multinomial(chances, 1, generator=generator)[:, 0]]

    def finished(prompt: tuple[int, ...], said: list[int]) -> bool:
        room = len(said) < max_new_tokens and len(prompt) + len(said) < max_positions
        return not room or said[-1] in ends or ended(said)

    while True:
        while len(running) < batch and (following := next(waiting, None)) is not None:
            index, prompt = following[0], tuple(following[1])
            cache.start(len(running), len(prompt))
            states = model.embed(torch.tensor(prompt, device=weight.device))
            states = model.run(states, 0, exit, rope.at(0, len(prompt)), cache)
            logits = model.branch(exit, states, rope.at(0, len(prompt)), cache, cache.last)
            assert logits is not None
            said = pick(logits)
            if finished(prompt, said):
                yield Answer(index, prompt, tuple(said))
            else:
                running.append((index, prompt, said))
        if not running:
            return
        positions = [len(prompt) + len(said) - 1 for _, prompt, said in running]
        cos, sin = rope.at(0, max(positions) + 1)
        where = torch.tensor(positions, device=weight.device)
        turned = cos[where], sin[where]
        cache.go_on(positions)
        states = model.embed(torch.tensor([said[-1] for _, _, said in running], device=weight.device))
        logits = model.branch(exit, model.run(states, 0, exit, turned, cache), turned, cache)
        assert logits is not None
        for (_, _, said), token in zip(running, pick(logits), strict=True):
            said.append(token)
        over = [row for row, (_, prompt, said) in enumerate(running) if finished(prompt, said)]
        for index, prompt, said in sorted(running[row] for row in over):
            yield Answer(index, prompt, tuple(said))
        for row in reversed(over):
            last = running.pop()
            if row < len(running):  # rows stay side by side, so that attention reads them in place
                running[row] = last
                cache.move(len(running), row)


def distill(
    recipe: Recipe,
    checkpoint: Checkpoint,
    tokenizer: Any,
    eos_token_ids: tuple[int, ...],
    *,
    report: Callable[[int, int, float], None] = lambda done, prompts, tokens_per_s: None,
) -> Path:
    """Let the family's last branch answer the recipe's prompts; what is answered already is not asked again.

    Args:
        eos_token_ids: what ends an answer.
        report: called after every answer with how many are there, of how many, and the tokens a second.

    Returns:
        The file of answers, which `train` reads with the recipe's data.

    Raises:
        ConfigError: the recipe has no prompts, or they cannot be read.
    """
    plan = recipe.self_distill
    if plan is None:
        raise ConfigError("the recipe has no self_distill: name the chats whose prompts are to be answered there")
    prompts: list[list[int]] = []
    for source in plan.prompts:
        prompts += [
            p for _, p in zip(range(source.documents or 2**62), read_prompts(source.path, tokenizer), strict=False)
        ]
    file = recipe.answers
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = file.read_text().splitlines() if file.exists() else []
    there = [json.loads(line) for line in lines if line.endswith("}")]  # the last one may be cut off
    file.write_text("".join(json.dumps(item) + "\n" for item in there))
    answered = {(item["prompt_number"], item["temperature"]) for item in there}
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_slice(checkpoint, checkpoint.config.exits, dtype=dtype, device=device)
    began, tokens, total = time.perf_counter(), 0, len(prompts) * len(plan.temperatures)
    with file.open("a") as out:
        for temperature in plan.temperatures:
            numbers = [i for i in range(len(prompts)) if (i, temperature) not in answered]
            for answer in answers(
                model,
                [prompts[i] for i in numbers],
                max_new_tokens=plan.max_new_tokens,
                max_positions=recipe.length,
                batch=plan.batch,
                temperature=temperature,
                eos_token_ids=eos_token_ids,
                seed=recipe.seed + len(answered),
            ):
                item = {"prompt_number": numbers[answer.index], "temperature": temperature}
                out.write(json.dumps(item | {"prompt": answer.prompt, "answer": answer.token_ids}) + "\n")
                out.flush()
                answered.add((numbers[answer.index], temperature))
                tokens += len(answer.token_ids)
                report(len(answered), total, tokens / (time.perf_counter() - began))
    return file


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

    def go_on(self, positions: Sequence[int]) -> None:
        """What follows is one token at a position of each of the first rows."""
        device = self._like.device
        self._prompt_row, self._stop = None, max(positions) + 1
        self._rows = torch.arange(len(positions), device=device)
        self._positions = torch.tensor(positions, device=device)
        seen = torch.arange(self._stop, device=device) <= self._positions[:, None]
        self._mask = torch.zeros(seen.shape, dtype=self._like.dtype, device=device)
        self._mask.masked_fill_(~seen, float("-inf"))
        self._mask = self._mask[:, None, None].expand(-1, 1, self._group, -1)

    def move(self, row: int, to: int) -> None:
        """Give a sequence another row."""
        for memory in self._memory.values():
            memory[:, to, :, : self._stop] = memory[:, row, :, : self._stop]

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
        count, heads, d = q.shape
        keys, values = keys[:count, :, : self._stop], values[:count, :, : self._stop]
        grouped = q.view(count, heads // self._group, self._group, d)  # heads that share a key head: its rows
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=self._mask)
        return out.reshape(count, heads * d)
