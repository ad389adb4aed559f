"""Engines that are compared with one another behind the same two calls: Ruyi Flow, transformers, llama.cpp."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ruyi_flow import __version__
from ruyi_flow.bench import Against
from ruyi_flow.errors import ConfigError
from ruyi_flow.family import store
from ruyi_flow.family.checkpoint import Checkpoint
from ruyi_flow.local import Family

__all__ = ["RUYI_FLOW", "Engine", "as_transformers", "llama_cpp", "ruyi_flow", "transformers"]

RUYI_FLOW = "ruyi-flow"


@dataclass(frozen=True, slots=True)
class Engine:
    """A model that runs in this process."""

    name: str
    """Name of the engine in tables and JSON."""
    description: str
    """Version of the engine, and the file or draft layers that it uses."""
    generate: Callable[[Sequence[int], int], int]
    """Continues token ids greedily by a number of tokens, ignoring end tokens; returns how many it generated."""
    prefill: Callable[[Sequence[int]], object]
    """Processes a prompt of token ids up to the logits of the first new token."""


def ruyi_flow(family: Family) -> Engine:
    """Make an engine of the whole family, which decides every token at the last exit."""

    def generate(ids: Sequence[int], tokens: int) -> int:
        answer = family.generate(torch.tensor([ids]), max_new_tokens=tokens, min_new_tokens=0, eos_token_ids=())
        return answer.shape[1]

    return Engine(RUYI_FLOW, f"ruyi-flow {__version__}", generate, lambda ids: generate(ids, 1))


def transformers(model: Any, draft_layers: int | None = None, *, rows: int = 1) -> Engine:
    """Make an engine of a model of `as_transformers`.

    Args:
        model: the model.
        draft_layers: number of first layers that draft (LayerSkip). Default: no drafts.
        rows: number of copies of each prompt that are continued together, as one batch.
    """
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    drafting = {} if draft_layers is None else {"assistant_early_exit": draft_layers}

    def generate(ids: Sequence[int], tokens: int) -> int:
        prompt = torch.tensor([ids] * rows, device=model.device)
        options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": tokens, "do_sample": False}
        return int(model.generate(prompt, **options, **drafting).shape[1]) - len(ids)

    name = Against.TRANSFORMERS if draft_layers is None else Against.EARLY_EXIT
    drafts = "" if draft_layers is None else f", layers 1-{draft_layers} draft"
    return Engine(str(name), f"transformers {version('transformers')}{drafts}", generate, lambda ids: generate(ids, 1))


def llama_cpp(gguf: Path | None, *, threads: int, positions: int) -> Engine:
    """Make an engine of llama.cpp.

    Args:
        gguf: the GGUF file. Default: the demo family's, fetched when missing.
        threads: CPU threads.
        positions: largest number of tokens of a prompt and its answer together.

    Raises:
        ConfigError: llama.cpp cannot run the file.
    """
    from llama_cpp import Llama

    gguf = gguf or store.demo_gguf()
    if not gguf.is_file():
        raise ConfigError(f"--gguf {gguf}: no such file")
    model, reason = None, ""
    try:
        model = Llama(str(gguf), n_ctx=positions, n_threads=threads, n_threads_batch=threads, verbose=False)
    except ValueError as error:
        reason = str(error)
    if model is None:  # raised outside the handler: the traceback would keep a half-made model, which fails at exit
        raise ConfigError(f"--gguf {gguf}: llama.cpp cannot run this file: {reason}")
    atexit.register(model.close)  # for the same reason, when a benchmark is interrupted

    def begin(ids: Sequence[int]) -> list[int]:
        if max(ids) >= model.n_vocab():
            raise ConfigError(f"--gguf {gguf}: the family's vocabulary is larger; name a file of the same model")
        model.reset()  # forgets the previous prompt, which would make this one free
        return list(ids)

    def generate(ids: Sequence[int], tokens: int) -> int:
        answer = model.generate(begin(ids), temp=0.0, top_k=1, repeat_penalty=1.0)
        return sum(1 for _, _ in zip(range(tokens), answer, strict=False))

    description = f"llama-cpp-python {version('llama-cpp-python')}, {gguf.name}"
    return Engine(str(Against.LLAMA_CPP), description, generate, lambda ids: model.eval(begin(ids)))


def as_transformers(checkpoint: Checkpoint, *, dtype: torch.dtype = torch.float32, exit: int | None = None) -> Any:
    """Load the trunk up to an exit (default: the last) and that exit's branch as an ordinary transformers model.

    Raises:
        ConfigError: the checkpoint is a shard with quantized weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if checkpoint.weights is not None:
        raise ConfigError(
            f"{checkpoint.folder}: its weights are {checkpoint.weights}; transformers needs the original family"
        )
    config, exits = checkpoint.config, checkpoint.config.exits
    exit = exits[-1] if exit is None else exit
    raw = {k: v for k, v in config.raw.items() if k not in ("early_exit_points", "architectures", "auto_map")}
    branch = config.branch_prefixes(exit)
    ordinary = AutoConfig.for_model(**raw | {"model_type": config.base, "num_hidden_layers": exit + len(branch)})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(ordinary, dtype=dtype)
    state: dict[str, torch.Tensor] = {}
    for name in model.state_dict():
        source = name
        for i, prefix in enumerate(branch):
            source = source.replace(f"model.layers.{exit + i}.", f"{prefix}.")
        source = source.replace("model.norm.", f"model.norms.{exits.index(exit)}.")
        if name == "lm_head.weight":
            head = "lm_head.weight" if config.shared_heads else f"lm_head.{exits.index(exit)}.weight"
            source = "model.embed_tokens.weight" if config.tied_head else head
        state[name] = checkpoint.tensor(source).to(dtype)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(ordinary)  # its buffer is computed, not loaded
    return model.eval()
