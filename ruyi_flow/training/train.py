"""Multi-branch training: trunk and branches together, the branches alone on a frozen trunk, or their probes.

Scope `joint` is the multi-branch pre-training of Ruyi: `sum_k lambda_k(t) CE_k` over the exits, where lambda_k decays
for early exits (Ruyi2), or is 1 / G for G exits (the familial scaling law). Scope `branches` distils the last branch
into the early ones; the trunk and the last branch do not change by a bit. The trunk's states are computed once a
position and cached on disk, since on a CPU they are most of the cost.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ruyi_flow.atomic_file import atomic_file
from ruyi_flow.errors import ConfigError, TrainingError
from ruyi_flow.family.checkpoint import Checkpoint, save_weights
from ruyi_flow.family.config import FamilyConfig
from ruyi_flow.training.corpus import Document, Packed, pack_documents, read_documents
from ruyi_flow.training.recipe import Recipe, Source
from ruyi_flow.training.trainees import Branches, Joint, Probes

__all__ = ["Step", "train"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Losses and throughput of one step."""

    step: int
    """Number of the step, from 1."""
    steps: int
    """Number of steps of the run."""
    losses: dict[str, float]
    """`loss`, the weighted sum that is minimized, and its parts by exit, such as `kl/11`."""
    tokens_per_s: float
    """Mean throughput since the run was started or resumed."""
    validation: dict[str, float] = field(default_factory=dict)
    """Results by exit if this step was followed by a validation, such as `loss/11`, or `agreement/11` with the last
    exit in answers."""


def train(
    recipe: Recipe,
    family: Checkpoint | FamilyConfig,
    tokenizer: Any,
    *,
    report: Callable[[Step], None] = lambda step: None,
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """Run a recipe, or resume its run if that was interrupted.

    Args:
        recipe: describes the run.
        family: the family to start from. A geometry without weights starts from random ones, in scope `joint`.
        tokenizer: the family's tokenizer.
        report: called after every step.
        say: called with messages about the run.

    Returns:
        The file of the trained tensors by their published names, in bf16: the branches or the probes, or in scope
        `joint` the whole family.

    Raises:
        ConfigError, CheckpointError: the recipe, the data or the family cannot be used.
        TrainingError: the loss is not finite.
    """
    accelerator = Accelerator(
        mixed_precision=recipe.precision,
        gradient_accumulation_steps=recipe.accumulate,
        cpu=not torch.cuda.is_available(),
    )
    checkpoint = family if isinstance(family, Checkpoint) else None
    config = _trained(family if isinstance(family, FamilyConfig) else family.config, recipe)
    packed = _read(recipe, tokenizer, say)
    held_out = max(1, round(len(packed) * recipe.validation))
    if len(packed) - held_out < recipe.batch * accelerator.num_processes:
        raise ConfigError(
            f"data: it fills only {len(packed)} sequences of {recipe.length} tokens, {held_out} of them for "
            f"validation, and a batch needs {recipe.batch * accelerator.num_processes}; give more data, or a smaller "
            "batch"
        )
    say(f"{len(packed)} sequences of {recipe.length} tokens, {int((packed.documents >= 0).sum()):,} tokens in all")
    validation = torch.arange(held_out)
    torch.manual_seed(recipe.seed)
    trainee: Joint | Branches | Probes
    if recipe.scope == "joint":
        trainee = Joint(checkpoint, config, recipe, packed)
    elif checkpoint is None:
        raise ConfigError(f"scope: {recipe.scope} needs a family with weights, whose last branch is the teacher")
    else:
        kind = Branches if recipe.scope == "branches" else Probes
        trainee = kind(checkpoint, config=config, recipe=recipe, packed=packed, device=accelerator.device)
    optimizer = torch.optim.AdamW(
        [p for p in trainee.parameters() if p.requires_grad], lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    # Not prepared by accelerate, which would step the schedule once for each process.
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_rate, recipe))
    model, optimizer = accelerator.prepare(trainee, optimizer)
    accelerator.register_for_checkpointing(schedule)

    identity = _identity(recipe, config, packed)
    metrics, state, done = recipe.out / "metrics.jsonl", recipe.out / "state", 0
    new = state.with_name("state.new")
    if accelerator.is_main_process and not state.exists() and (new / "step.json").exists():
        os.replace(new, state)  # killed between the two renames of a save
    accelerator.wait_for_everyone()
    if state.exists():
        done, whose = json.loads((state / "step.json").read_text(encoding="utf-8"))
        if whose != identity:
            raise ConfigError(
                f"{state} is the state of a run with another recipe, family or data; remove {recipe.out}, or set "
                "another 'out'"
            )
        accelerator.load_state(str(state))
        say(f"resuming after step {done}")
    if accelerator.is_main_process:
        recipe.out.mkdir(parents=True, exist_ok=True)
        lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True) if metrics.exists() else []
        with atomic_file(metrics) as file:
            file.write_text("".join(lines[:done]), encoding="utf-8")  # one line a step; later steps are run again
    board = _board(recipe.out) if accelerator.is_main_process else None
    batches = _batches(recipe, torch.arange(held_out, len(packed)), accelerator.num_processes, done)
    began, tokens = time.perf_counter(), 0
    for step in range(done, recipe.steps):
        sums: dict[str, Tensor] = {}
        groups = [next(batches) for _ in range(recipe.accumulate)]
        whole = torch.cat(groups)
        for group in groups:
            indices = group[accelerator.process_index :: accelerator.num_processes]
            with accelerator.accumulate(model):
                parts: dict[str, Tensor] = model(indices, step, whole)
                loss = parts["loss"]
                if not torch.isfinite(loss):
                    raise TrainingError(
                        f"the loss is {loss.item()} at step {step}, on sequences {indices.tolist()}, the first of "
                        f"which begins {tokenizer.decode(packed.token_ids[indices[0], :40].tolist())!r}; check the "
                        "data, or lower learning_rate"
                    )
                # Parts are shares of the step's mean, so they are added; accelerate would average them.
                accelerator.backward(loss * recipe.accumulate * accelerator.num_processes)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), recipe.clip)
                optimizer.step()
                optimizer.zero_grad()
            for name, part in parts.items():
                sums[name] = sums[name] + part.detach() if name in sums else part.detach()
        tokens += int((packed.documents[whole] >= 0).sum())
        added = accelerator.reduce(torch.stack([*sums.values()]), "sum").tolist()
        losses = dict(zip(sums, added, strict=True))
        schedule.step()
        last = step + 1 == recipe.steps
        found = {}
        if last or (step + 1) % recipe.validate_every == 0:
            with torch.no_grad():  # through accelerate's wrapper, which may have to gather the weights
                found = model(validation, None, validation)
        tokens_per_s = tokens / (time.perf_counter() - began)
        report(Step(step=step + 1, steps=recipe.steps, losses=losses, tokens_per_s=tokens_per_s, validation=found))
        if accelerator.is_main_process:
            values = {"step": step + 1, "tokens_per_s": tokens_per_s, **losses}
            values |= {f"validation/{name}": value for name, value in found.items()}
            with metrics.open("a", encoding="utf-8") as log:
                log.write(json.dumps(values) + "\n")
            if board is not None:
                for name, value in values.items():
                    board.add_scalar(name, value, step + 1)
        if last or (step + 1) % recipe.save_every == 0:
            _save(accelerator, state, (step + 1, identity))
    weights = accelerator.get_state_dict(model)  # each process may have a part of them only
    out = recipe.out / ("model.safetensors" if recipe.scope == "joint" else f"{recipe.scope}.safetensors")
    if accelerator.is_main_process:
        described = recipe.described() | {"fingerprint": checkpoint and checkpoint.fingerprint}
        metadata = {"format": "pt", "ruyi_flow.recipe": json.dumps(described, sort_keys=True)}
        metadata["ruyi_flow.branch_exits"] = json.dumps(config.exits)
        if recipe.scope == "probes":
            metadata["ruyi_flow.probe_size"] = json.dumps(config.probe_size)
        else:  # probes of other branches would be wrong
            metadata |= {"ruyi_flow.branch_layers": json.dumps(config.branch_layers), "ruyi_flow.probe_size": "0"}
        tensors = {name: t.to(torch.bfloat16).contiguous() for name, t in trainee.published(weights).items()}
        with atomic_file(out) as file:
            save_weights(tensors, file, metadata)
    accelerator.wait_for_everyone()
    return out


def _trained(config: FamilyConfig, recipe: Recipe) -> FamilyConfig:
    """Return the geometry of the family that a recipe makes of one.

    Raises:
        ConfigError: branch_layers names another than an early exit, or is set in scope `probes`.
    """
    for exit in recipe.branch_layers:
        if exit not in config.exits[:-1]:
            raise ConfigError(f"branch_layers: {exit} is not one of the early exits {list(config.exits[:-1])}")
    if recipe.branch_layers and recipe.scope == "probes":
        raise ConfigError("branch_layers: cannot be combined with scope: probes, which leaves branches as they are")
    depths = [recipe.branch_layers.get(p, n) for p, n in zip(config.exits, config.branch_layers, strict=True)]
    probe_size = recipe.probe_size if recipe.scope == "probes" else 0
    new = {"early_exit_branch_layers": depths, "early_exit_probe_size": probe_size}
    return FamilyConfig.parse({**config.to_dict(), **new})


def _read(recipe: Recipe, tokenizer: Any, say: Callable[[str], None]) -> Packed:
    """Read and pack the recipe's data and the family's own answers, and say what is not trained on as it is."""
    documents: list[Document] = []
    own = (Source(path=recipe.answers),) if recipe.answers.exists() else ()
    for source in (*recipe.data, *own):
        long: list[Document] = []
        read = read_documents(source.path, tokenizer, length=recipe.length, too_long=long.append)
        found = [d for d in islice(read, source.documents) if len(d.token_ids) > 1]
        if long:
            lost = sum(d.has_answer and d.answer >= recipe.length for d in long)
            say(
                f"{source.path}: {len(long)} chats are longer than {recipe.length} tokens; {lost} were left out, since "
                "nothing of their answers fits, and the others were cut"
            )
        if unanswered := sum(not d.has_answer for d in found):
            say(f"{source.path}: {unanswered} chats have no answer; all of their tokens count as outside of answers")
        if not found and source not in own:
            raise ConfigError(f"data: {source.path} contains nothing to train on; remove it, or raise length")
        documents += found
    if not documents:
        raise ConfigError("data: these files contain nothing to train on; name other files, or use --self-distill")
    return pack_documents(documents, length=recipe.length, seed=recipe.seed)


def _batches(recipe: Recipe, rows: Tensor, processes: int, done: int) -> Iterator[Tensor]:
    """Yield row numbers batch by batch, shuffled anew in every epoch, after skipping the steps that are done."""
    size, skipped = recipe.batch * processes, done * recipe.accumulate
    for epoch in count():
        order = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(recipe.seed * 10_007 + epoch))]
        batches = order[: len(order) // size * size].split(size)
        yield from batches[skipped:]
        skipped = max(0, skipped - len(batches))


def _rate(recipe: Recipe, step: int) -> float:
    """Return the factor on the learning rate: rising in the warm-up, then falling along a cosine to a tenth."""
    warm = max(1, round(recipe.warmup * recipe.steps))
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, recipe.steps - warm)))


def _identity(recipe: Recipe, config: FamilyConfig, packed: Packed) -> str:
    """Hash all that must not change when a run is resumed: the family, the data, most of the recipe."""
    same = recipe.model_dump(mode="json", exclude={"steps", "save_every", "cache_gb", "self_distill", "data", "out"})
    digest = hashlib.sha256(json.dumps([same, dict(config.to_dict())], sort_keys=True).encode())
    digest.update(packed.token_ids.numpy().tobytes() + packed.documents.numpy().tobytes())
    return digest.hexdigest()


def _save(accelerator: Accelerator, state: Path, step: tuple[int, str]) -> None:
    """Replace the state to resume from, so that a kill at any time leaves a complete one."""
    new, old = state.with_name("state.new"), state.with_name("state.old")
    try:
        accelerator.save_state(str(new))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (new / "step.json").write_text(json.dumps(step), encoding="utf-8")
            mode = (new / "step.json").stat().st_mode  # that of any new file; safetensors' own is for the owner alone
            for file in new.iterdir():
                file.chmod(mode)
            shutil.rmtree(old, ignore_errors=True)
            if state.exists():
                os.replace(state, old)
            os.replace(new, state)
            shutil.rmtree(old, ignore_errors=True)
    except KeyboardInterrupt:
        if accelerator.is_main_process:
            if not state.exists() and (new / "step.json").exists():
                os.replace(new, state)
            for rest in (new, old):
                shutil.rmtree(rest, ignore_errors=True)
        raise
    accelerator.wait_for_everyone()


def _board(folder: Path) -> Any:
    """Return a TensorBoard writer, or None if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder))
