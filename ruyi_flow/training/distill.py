"""Answers of a family's own exit to many prompts at once: what its other branches learn from (self-distillation).

Sequences of any length run side by side, each in a row of one padded cache; where answers ended the next prompts
begin, so that short answers do not wait for long ones.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jinja2 import TemplateError
from torch import Tensor

from ruyi_flow.errors import ConfigError
from ruyi_flow.family.checkpoint import Checkpoint
from ruyi_flow.family.config import FamilyConfig
from ruyi_flow.family.loading import load_slice
from ruyi_flow.family.transformer import FamilySlice, Rope
from ruyi_flow.training.corpus import read_prompts
from ruyi_flow.training.recipe import Recipe, SelfDistill

__all__ = ["Answer", "answers", "distill"]


@dataclass(frozen=True, slots=True)
class Answer:
    """A prompt and what the family said to it, as token ids."""

    index: int
    """Of the prompt among those that were given."""
    prompt: tuple[int, ...]
    token_ids: tuple[int, ...]
    """The end of sequence included, if it came."""


_GROUPS = 8
"""Prompts wait until so large a part of the rows is free: many are read in little more time than one."""

_PADDED_TOKENS = 8192
"""Of prompts that are read together, at most, but for one that is longer."""


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
    waiting = deque((i, tuple(p)) for i, p in enumerate(prompts) if 0 < len(p) < max_positions)
    running: list[tuple[int, tuple[int, ...], list[int]]] = []  # by row: index, prompt, answer
    ends = frozenset(eos_token_ids)

    def pick(logits: Tensor) -> list[int]:
        if temperature == 0:
            return list(logits.argmax(-1).tolist())
        chances = (logits.float() / temperature).softmax(-1)
        return list(torch.multinomial(chances, 1, generator=generator)[:, 0].tolist())

    def finished(prompt: tuple[int, ...], said: list[int]) -> bool:
        room = len(said) < max_new_tokens and len(prompt) + len(said) < max_positions
        return not room or said[-1] in ends or ended(said)

    def read(begun: Sequence[tuple[int, ...]]) -> list[int]:
        """The first tokens of the answers to these prompts, side by side in the next rows."""
        longest = max(map(len, begun))
        token_ids = torch.zeros(len(begun), longest, dtype=torch.int64)
        for row, prompt in enumerate(begun):
            token_ids[row, : len(prompt)] = torch.tensor(prompt)
        cache.start(len(running), [len(prompt) for prompt in begun])
        cos, sin = (t.repeat(len(begun), 1, 1) for t in rope.at(0, longest))
        states = model.run(model.embed(token_ids.flatten().to(weight.device)), 0, exit, (cos, sin), cache)
        logits = model.branch(exit, states, (cos, sin), cache, cache.last)
        assert logits is not None
        return pick(logits)

    def over() -> Iterator[Answer]:
        """Takes those out that have ended; the others stay side by side, so that attention reads them in place."""
        rows = [row for row, (_, prompt, said) in enumerate(running) if finished(prompt, said)]
        for index, prompt, said in sorted(running[row] for row in rows):
            yield Answer(index, prompt, tuple(said))
        for row in reversed(rows):
            last = running.pop()
            if row < len(running):
                running[row] = last
                cache.move(len(running), row, len(last[1]) + len(last[2]))

    while True:
        free = batch - len(running)
        while waiting and free >= (max(1, batch // _GROUPS) if running else 1):
            group = [waiting.popleft()]
            longest = len(group[0][1])
            while waiting and len(group) < free:
                longest = max(longest, len(waiting[0][1]))
                if longest * (len(group) + 1) > _PADDED_TOKENS:
                    break
                group.append(waiting.popleft())
            said = read([prompt for _, prompt in group])
            running += [(index, prompt, [token]) for (index, prompt), token in zip(group, said, strict=True)]
            yield from over()
            free = batch - len(running)
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
        for (_, _, answer), token in zip(running, pick(logits), strict=True):
            answer.append(token)
        yield from over()


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
        ConfigError: the recipe has no prompts, they cannot be read, or the family cannot write any.
    """
    plan = recipe.self_distill
    if plan is None:
        raise ConfigError("the recipe has no self_distill: name the chats whose prompts are to be answered there")
    prompts: list[list[int]] = []
    for source in plan.prompts:
        prompts += [
            p for _, p in zip(range(source.documents or 2**62), read_prompts(source.path, tokenizer), strict=False)
        ]
    opening = _opening(tokenizer) if plan.own_prompts else []
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_slice(checkpoint, checkpoint.config.exits, dtype=dtype, device=device)
    if plan.own_prompts:
        file = recipe.out / "prompts.jsonl"
        if not file.exists():
            own = _own_prompts(model, plan, opening, recipe.seed, tokenizer, eos_token_ids, report)
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(".part")
            part.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in own))
            os.replace(part, file)
        prompts += read_prompts(file, tokenizer)
    file = recipe.answers
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = file.read_text().splitlines() if file.exists() else []
    there = [json.loads(line) for line in lines if line.endswith("}")]  # the last one may be cut off
    file.write_text("".join(json.dumps(item) + "\n" for item in there))
    answered = {(item["prompt_number"], item["temperature"]) for item in there}
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


def _opening(tokenizer: Any) -> list[int]:
    """What a user's turn begins with, in the family's chat template, as token ids.

    Raises:
        ConfigError: there is no template, or none that shows what users say.
    """
    mark = "\N{OBJECT REPLACEMENT CHARACTER}"
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False)
    except (ValueError, TemplateError) as error:
        raise ConfigError(f"own_prompts: the family's chat template cannot be used: {error}") from None
    opening, found, _ = text.partition(mark)
    token_ids = list(tokenizer(opening, add_special_tokens=False)["input_ids"])
    if not found or not token_ids:
        raise ConfigError("own_prompts: the family's chat template puts nothing before what a user says; leave it out")
    return token_ids


def _own_prompts(
    model: FamilySlice,
    plan: SelfDistill,
    opening: list[int],
    seed: int,
    tokenizer: Any,
    eos_token_ids: tuple[int, ...],
    report: Callable[[int, int, float], None],
) -> list[str]:
    """What the family says where its chat template opens a user's turn; see `SelfDistill.own_prompts`.

    Raises:
        ConfigError: none of it ended.
    """
    found: dict[str, None] = {}  # each once, in the order in which they ended
    began, tokens = time.perf_counter(), 0
    for done, answer in enumerate(
        answers(
            model,
            [opening] * plan.own_prompts,
            max_new_tokens=plan.max_new_tokens,
            max_positions=len(opening) + plan.max_new_tokens,
            batch=plan.batch,
            temperature=1.0,
            eos_token_ids=eos_token_ids,
            seed=seed,
        ),
        1,
    ):
        if answer.token_ids[-1] in eos_token_ids:
            found[tokenizer.decode(answer.token_ids, skip_special_tokens=True).strip()] = None
        tokens += len(answer.token_ids)
        report(done, plan.own_prompts, tokens / (time.perf_counter() - began))
    found.pop("", None)
    if not found:
        raise ConfigError(
            f"own_prompts: none of {plan.own_prompts} ended within max_new_tokens, {plan.max_new_tokens}; allow more"
        )
    return list(found)


class _RowCache:
    """Keys and values of many sequences, a row each: an `Attention` for whole prompts, or one token of each row."""

    def __init__(self, config: FamilyConfig, batch: int, length: int, like: Tensor) -> None:
        self._shape = (2, batch, config.num_kv_heads, length, config.head_dim)
        self._group = config.num_heads // config.num_kv_heads
        self._like = like
        self._memory: dict[int, Tensor] = {}  # made for the slots that are used
        self.last = torch.zeros(1, dtype=torch.int64, device=like.device)
        """The last rows of the prompts that run, as indices."""

    def start(self, row: int, counts: Sequence[int]) -> None:
        """What follows are prompts of so many tokens, padded to the longest, in the rows from this one on."""
        ends = torch.tensor(counts, device=self._like.device) - 1
        self._see(slice(row, row + len(counts)), max(counts), ends)
        self._reads, self.last = True, ends + self._numbers * self._stop

    def go_on(self, positions: Sequence[int]) -> None:
        """What follows is one token at a position of each of the first rows."""
        self._positions = torch.tensor(positions, device=self._like.device)
        self._see(slice(0, len(positions)), max(positions) + 1, self._positions)
        self._reads = False

    def _see(self, rows: slice, stop: int, last: Tensor) -> None:
        """Let one query of each of these rows see what is up to a position of its own."""
        self._rows, self._stop = rows, stop
        self._numbers = torch.arange(len(last), device=last.device)
        seen = torch.arange(stop, device=last.device) <= last[:, None]
        mask = torch.zeros(seen.shape, dtype=self._like.dtype, device=last.device)
        mask.masked_fill_(~seen, float("-inf"))
        self._mask = mask[:, None, None].expand(-1, 1, self._group, -1)

    def move(self, row: int, to: int, count: int) -> None:
        """Give a sequence of so many positions another row."""
        for memory in self._memory.values():
            memory[:, to, :, :count] = memory[:, row, :, :count]

    def __call__(self, slot: int, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None) -> Tensor:
        """See `transformer.Attention`."""
        memory = self._memory.get(slot)
        if memory is None:
            memory = self._memory[slot] = self._like.new_zeros(self._shape)
        keys, values = memory[:, self._rows, :, : self._stop]
        if self._reads:
            q, k, v = (t if t is q and rows is not None else self._apart(t) for t in (q, k, v))
            keys.copy_(k)
            values.copy_(v)
            if rows is None:  # padding is behind what it pads, so nothing sees it
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                return out.transpose(1, 2).flatten(0, 1).flatten(1)
        else:
            keys[self._numbers, :, self._positions] = k
            values[self._numbers, :, self._positions] = v
        count, heads, d = q.shape
        grouped = q.view(count, heads // self._group, self._group, d)  # heads that share a key head: its rows
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=self._mask)
        return out.reshape(count, heads * d)

    def _apart(self, t: Tensor) -> Tensor:
        """(prompts * longest, heads, d) -> (prompts, heads, longest, d)"""
        apart: Tensor = t.unflatten(0, (-1, self._stop))
        return apart.transpose(1, 2)
