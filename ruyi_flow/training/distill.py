"""Self-distillation: batched answers of one exit, usually the last, from which the other branches learn.

Sequences run in one batch with a padded KV cache, a row each. When answers end, the next prompts take their rows, so
short answers do not wait for long ones.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jinja2 import TemplateError
from torch import Tensor

from ruyi_flow.atomic_file import atomic_file
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
    """A family's answer to a prompt."""

    index: int
    """Index of the prompt among those that were given."""
    prompt: tuple[int, ...]
    """Token ids of the prompt."""
    token_ids: tuple[int, ...]
    """Token ids of the answer, including the token that ended it."""


_GROUPS = 8
"""Prompts wait until 1 / `_GROUPS` of the rows is free: prefilling many takes little more time than prefilling one."""

_PADDED_TOKENS = 8192
"""Most tokens of prompts that are prefilled together, padding included; a longer prompt is prefilled alone."""


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
    """Answer many prompts.

    Args:
        model: the whole family.
        prompts: token ids of each prompt; prompts of `max_positions` or more tokens are skipped.
        exit: the exit whose branch answers. Default: the last one.
        max_new_tokens: most tokens of an answer.
        max_positions: most tokens of a prompt and its answer together.
        batch: most sequences that run at the same time.
        temperature: sampling temperature; 0 is greedy.
        eos_token_ids: tokens that end an answer.
        ended: called with an answer's token ids so far; True ends the answer.
        seed: sampling seed.

    Yields:
        Answers in the order in which they end.
    """
    exit = model.exits[-1] if exit is None else exit
    weight = model.trunk[0].input_layernorm.weight
    rope = Rope(model.config, weight.dtype, weight.device)
    generator = torch.Generator(weight.device).manual_seed(seed)
    cache = _RowCache(model.config, batch, max_positions, weight)
    waiting = deque((i, tuple(p)) for i, p in enumerate(prompts) if 0 < len(p) < max_positions)
    running: list[tuple[int, tuple[int, ...], list[int]]] = []  # (index, prompt, answer) of each row in use
    ends = frozenset(eos_token_ids)

    def pick(logits: Tensor) -> list[int]:
        if temperature == 0:
            return list(logits.argmax(-1).tolist())
        chances = (logits.float() / temperature).softmax(-1)
        return list(torch.multinomial(chances, 1, generator=generator)[:, 0].tolist())

    def finished(prompt: tuple[int, ...], answer: list[int]) -> bool:
        is_full = len(answer) >= max_new_tokens or len(prompt) + len(answer) >= max_positions
        return is_full or answer[-1] in ends or ended(answer)

    def prefill(prompts: Sequence[tuple[int, ...]]) -> list[int]:
        """Run prompts in the next free rows; returns the first token of each answer."""
        longest = max(map(len, prompts))
        token_ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            token_ids[row, : len(prompt)] = torch.tensor(prompt)
        cache.start_prefill(len(running), [len(prompt) for prompt in prompts])
        cos, sin = (t.repeat(len(prompts), 1, 1) for t in rope.at(0, longest))
        states = model.embed(token_ids.flatten().to(weight.device))
        states = model.run(states, 0, exit, rope=(cos, sin), attention=cache)
        logits = model.branch_logits(exit, states, rope=(cos, sin), attention=cache, rows=cache.last)
        assert logits is not None
        return pick(logits)

    def take_finished() -> Iterator[Answer]:
        """Yield finished answers; the last rows move into theirs, so that the rows in use stay contiguous."""
        rows = [row for row, (_, prompt, answer) in enumerate(running) if finished(prompt, answer)]
        for index, prompt, answer in sorted(running[row] for row in rows):
            yield Answer(index, prompt, tuple(answer))
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
            first = prefill([prompt for _, prompt in group])
            running += [(index, prompt, [token]) for (index, prompt), token in zip(group, first, strict=True)]
            yield from take_finished()
            free = batch - len(running)
        if not running:
            return
        positions = [len(prompt) + len(answer) - 1 for _, prompt, answer in running]
        cos, sin = rope.at(0, max(positions) + 1)
        where = torch.tensor(positions, device=weight.device)
        turned = cos[where], sin[where]
        cache.start_decode(positions)
        states = model.embed(torch.tensor([answer[-1] for _, _, answer in running], device=weight.device))
        states = model.run(states, 0, exit, rope=turned, attention=cache)
        logits = model.branch_logits(exit, states, rope=turned, attention=cache)
        assert logits is not None
        for (_, _, answer), token in zip(running, pick(logits), strict=True):
            answer.append(token)
        yield from take_finished()


def distill(
    recipe: Recipe,
    checkpoint: Checkpoint,
    tokenizer: Any,
    eos_token_ids: tuple[int, ...],
    *,
    report: Callable[[int, int, float], None] = lambda done, prompts, tokens_per_s: None,
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """Answer the recipe's prompts with the family's last branch. A later call continues an interrupted one.

    Args:
        recipe: its `self_distill` names the prompts.
        checkpoint: the whole family.
        tokenizer: the family's tokenizer.
        eos_token_ids: tokens that end an answer.
        report: called after every answer with the number of answers, the number of prompts, and the tokens a second.
        say: called with messages about the run.

    Returns:
        The file of answers, which `train` reads with the recipe's data.

    Raises:
        ConfigError: the recipe has no prompts, they cannot be read, or the family cannot write its own.
    """
    plan = recipe.self_distill
    if plan is None:
        raise ConfigError("self_distill is missing in the recipe; set self_distill: {prompts: [{path: chats.jsonl}]}")
    prompts: list[list[int]] = []
    for source in plan.prompts:
        prompts += islice(read_prompts(source.path, tokenizer), source.documents)
    opening = _opening(tokenizer) if plan.own_prompts else []
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_slice(checkpoint, checkpoint.config.exits, dtype=dtype, device=device)
    ask = partial(answers, model, max_new_tokens=plan.max_new_tokens, batch=plan.batch, eos_token_ids=eos_token_ids)
    if plan.own_prompts:
        file = recipe.out / "prompts.jsonl"
        if not file.exists():
            length = len(opening) + plan.max_new_tokens
            given = ask([opening] * plan.own_prompts, max_positions=length, temperature=1.0, seed=recipe.seed)
            own = _own_prompts(given, plan, tokenizer, eos_token_ids, report=report)
            with atomic_file(file) as new:
                new.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in own), encoding="utf-8")
        prompts += read_prompts(file, tokenizer)
    fitting = [i for i, prompt in enumerate(prompts) if len(prompt) < recipe.length]
    if skipped := len(prompts) - len(fitting):
        say(f"{skipped} of {len(prompts)} prompts have {recipe.length} tokens or more (length); they are not answered")
    file = recipe.answers
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    done = [json.loads(line) for line in lines if line.endswith("}")]  # a kill may have cut the last line off
    with atomic_file(file) as new:
        new.write_text("".join(json.dumps(item) + "\n" for item in done), encoding="utf-8")
    answered = {(item["prompt_number"], item["temperature"]) for item in done}
    began, tokens, total = time.perf_counter(), 0, len(fitting) * len(plan.temperatures)
    with file.open("a", encoding="utf-8") as out:
        for temperature in plan.temperatures:
            numbers = [i for i in fitting if (i, temperature) not in answered]
            asked, seed = [prompts[i] for i in numbers], recipe.seed + len(answered)
            for answer in ask(asked, max_positions=recipe.length, temperature=temperature, seed=seed):
                item = {"prompt_number": numbers[answer.index], "temperature": temperature}
                out.write(json.dumps(item | {"prompt": answer.prompt, "answer": answer.token_ids}) + "\n")
                out.flush()
                answered.add((numbers[answer.index], temperature))
                tokens += len(answer.token_ids)
                report(len(answered), total, tokens / (time.perf_counter() - began))
    return file


def _opening(tokenizer: Any) -> list[int]:
    """Return the token ids with which the chat template begins a user's turn.

    Raises:
        ConfigError: there is no template, or it puts nothing before the user's text.
    """
    mark = "\N{OBJECT REPLACEMENT CHARACTER}"
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False)
    except (ValueError, TemplateError) as error:
        raise ConfigError(f"own_prompts: the family's chat template cannot be used: {error}") from None
    opening, found, _ = text.partition(mark)
    token_ids = list(tokenizer(opening, add_special_tokens=False)["input_ids"])
    if not found or not token_ids:
        raise ConfigError("own_prompts: the family's chat template puts nothing before a user's text; remove the key")
    return token_ids


def _own_prompts(
    given: Iterator[Answer],
    plan: SelfDistill,
    tokenizer: Any,
    eos_token_ids: tuple[int, ...],
    *,
    report: Callable[[int, int, float], None],
) -> list[str]:
    """Decode the user turns that the family sampled, and drop duplicates and those that did not end.

    Raises:
        ConfigError: no turn ended.
    """
    found: dict[str, None] = {}  # a set in the order in which the turns ended
    began, tokens = time.perf_counter(), 0
    for done, answer in enumerate(given, 1):
        if answer.token_ids[-1] in eos_token_ids:
            found[tokenizer.decode(answer.token_ids, skip_special_tokens=True).strip()] = None
        tokens += len(answer.token_ids)
        report(done, plan.own_prompts, tokens / (time.perf_counter() - began))
    found.pop("", None)
    if not found:
        raise ConfigError(
            f"own_prompts: none of {plan.own_prompts} prompts ended within max_new_tokens ({plan.max_new_tokens}); "
            "raise max_new_tokens"
        )
    return list(found)


class _RowCache:
    """A KV cache with a row for each sequence: an `Attention` for whole prompts, or for one token of each row."""

    def __init__(self, config: FamilyConfig, batch: int, length: int, like: Tensor) -> None:
        self._shape = (2, batch, config.num_kv_heads, length, config.head_dim)
        self._group = config.num_heads // config.num_kv_heads
        self._like = like
        self._memory: dict[int, Tensor] = {}  # by slot, allocated on first use
        self.last = torch.zeros(1, dtype=torch.int64, device=like.device)
        """Indices of the prompts' last tokens in the flat states of a prefill."""

    def start_prefill(self, row: int, counts: Sequence[int]) -> None:
        """Expect prompts of `counts` tokens, padded to the longest, in the rows from `row` on."""
        ends = torch.tensor(counts, device=self._like.device) - 1
        self._select(slice(row, row + len(counts)), max(counts), ends)
        self._is_prefill, self.last = True, ends + self._numbers * self._stop

    def start_decode(self, positions: Sequence[int]) -> None:
        """Expect one token of each of the first rows, at these positions."""
        self._positions = torch.tensor(positions, device=self._like.device)
        self._select(slice(0, len(positions)), max(positions) + 1, self._positions)
        self._is_prefill = False

    def _select(self, rows: slice, stop: int, last: Tensor) -> None:
        """Select rows, and mask a query of each row to the positions up to its `last`."""
        self._rows, self._stop = rows, stop
        self._numbers = torch.arange(len(last), device=last.device)
        seen = torch.arange(stop, device=last.device) <= last[:, None]
        mask = torch.zeros(seen.shape, dtype=self._like.dtype, device=last.device)
        mask.masked_fill_(~seen, float("-inf"))
        self._mask = mask[:, None, None].expand(-1, 1, self._group, -1)

    def move(self, row: int, to: int, count: int) -> None:
        """Move a sequence of `count` positions to another row."""
        for memory in self._memory.values():
            memory[:, to, :, :count] = memory[:, row, :, :count]

    def __call__(self, slot: int, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None) -> Tensor:
        """See `transformer.Attention`."""
        memory = self._memory.get(slot)
        if memory is None:
            memory = self._memory[slot] = self._like.new_zeros(self._shape)
        keys, values = memory[:, self._rows, :, : self._stop]
        if self._is_prefill:
            q, k, v = (t if t is q and rows is not None else self._by_prompt(t) for t in (q, k, v))
            keys.copy_(k)
            values.copy_(v)
            if rows is None:  # padding comes last, so no token attends to it
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                return out.transpose(1, 2).flatten(0, 1).flatten(1)
        else:
            keys[self._numbers, :, self._positions] = k
            values[self._numbers, :, self._positions] = v
        count, heads, d = q.shape
        grouped = q.view(count, heads // self._group, self._group, d)  # heads of a group as rows of their key head
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=self._mask)
        return out.reshape(count, heads * d)

    def _by_prompt(self, t: Tensor) -> Tensor:
        """(prompts * longest, heads, d) -> (prompts, heads, longest, d)"""
        parts: Tensor = t.unflatten(0, (-1, self._stop))
        return parts.transpose(1, 2)
