"""Engines that are compared, each behind the same two calls: ours, transformers, llama.cpp."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ruyi_flow.bench import Against
from ruyi_flow.errors import ConfigError
from ruyi_flow.family import store
from ruyi_flow.family.checkpoint import Checkpoint
from ruyi_flow.local import Family

__all__ = ["OURS", "Engine", "as_transformers", "llama_cpp", "ours", "transformers"]

OURS = "ruyi-flow"


@dataclass(frozen=True, slots=True)
class Engine:
    """A model that runs in this process."""

    name: str
    about: str
    """Its version, and what it runs."""
    generate: Callable[[Sequence[int], int], int]
    """Continues token ids greedily by so many tokens, whatever they are; gives how many came."""
    prefill: Callable[[Sequence[int]], object]
    """Takes in token ids, and says what comes next."""


def ours(family: Family) -> Engine:
    """The whole family, at its last exit."""

    def generate(ids: Sequence[int], tokens: int) -> int:
        made = family.generate(torch.tensor([ids]), max_new_tokens=tokens, min_new_tokens=0, eos_token_ids=())
        return made.shape[1]

    return Engine(OURS, f"ruyi-flow {version('ruyi-flow')}", generate, lambda ids: generate(ids, 1))


def transformers(model: Any, early_exit: int | None = None) -> Engine:
    """A model of `as_transformers`.

    Args:
        early_exit: how many of its first layers draft; None drafts nothing.
    """
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    drafting = {} if early_exit is None else {"assistant_early_exit": early_exit}

    def generate(ids: Sequence[int], tokens: int) -> int:
        prompt = torch.tensor([ids], device=model.device)
        asked = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": tokens, "do_sample": False}
        return int(model.generate(prompt, **asked, **drafting).shape[1]) - len(ids)

    name = Against.TRANSFORMERS if early_exit is None else Against.EARLY_EXIT
    about = f"transformers {version('transformers')}" + ("" if early_exit is None else f", layers 1-{early_exit} draft")
    return Engine(str(name), about, generate, lambda ids: generate(ids, 1))


def llama_cpp(gguf: Path | None, *, threads: int, positions: int) -> Engine:
    """llama.cpp on a GGUF file.

    Args:
        gguf: the file; None fetches the demo family's.
        positions: prompt and answer together have at most this many.

    Raises:
        ConfigError: llama-cpp-python is not installed, or the file is none that it can run.
    """
    try:
        from llama_cpp import Llama
    except ImportError:
        raise ConfigError("--against llama.cpp needs the extra: pip install 'ruyi-flow[bench]'") from None
    gguf = gguf or store.demo_gguf()
    if not gguf.is_file():
        raise ConfigError(f"--gguf: {gguf}: no such file")
    model, why = None, ""
    try:
        model = Llama(str(gguf), n_ctx=positions, n_threads=threads, n_threads_batch=threads, verbose=False)
    except ValueError as error:
        why = str(error)
    if model is None:  # raised here, or the error would keep half a model until Python ends, which then complains
        raise ConfigError(f"--gguf: llama.cpp cannot run it: {why}")
    atexit.register(model.close)  # for the same reason, when a bench is interrupted

    def begin(ids: Sequence[int]) -> list[int]:
        if max(ids) >= model.n_vocab():
            raise ConfigError(f"--gguf: {gguf}: its vocabulary has {model.n_vocab()} tokens, the family's has more")
        model.reset()  # or it would know the prompt from the last time
        return list(ids)

    def generate(ids: Sequence[int], tokens: int) -> int:
        answer = model.generate(begin(ids), temp=0.0, top_k=1, repeat_penalty=1.0)
        return sum(1 for _, _ in zip(range(tokens), answer, strict=False))

    about = f"llama-cpp-python {version('llama-cpp-python')}, {gguf.name}"
    return Engine(str(Against.LLAMA_CPP), about, generate, lambda ids: model.eval(begin(ids)))


def as_transformers(checkpoint: Checkpoint, *, dtype: torch.dtype = torch.float32, exit: int | None = None) -> Any:
    """transformers' own model with a family's weights: the trunk up to an exit (by default the last) and its branch,
    as the ordinary model of that depth.

    Raises:
        ConfigError: a shard whose weights are in few bits.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if checkpoint.weights is not None:
        raise ConfigError(
            f"{checkpoint.folder}: its weights are {checkpoint.weights}; transformers needs the family's own"
        )
    config, exits = checkpoint.config, checkpoint.config.exits
    exit = exits[-1] if exit is None else exit
    raw = {k: v for k, v in config.raw.items() if k not in ("early_exit_points", "architectures", "auto_map")}
    branch = config.branch_prefixes(exit)
    theirs = AutoConfig.for_model(**raw | {"model_type": config.base, "num_hidden_layers": exit + len(branch)})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(theirs, dtype=dtype)
    state: dict[str, torch.Tensor] = {}
    for name in model.state_dict():
        source = name
        for i, prefix in enumerate(branch):
            source = source.replace(f"model.layers.{exit + i}.", f"{prefix}.")
        source = source.replace("model.norm.", f"model.norms.{exits.index(exit)}.")
        if name == "lm_head.weight":
            own = "lm_head.weight" if config.shared_heads else f"lm_head.{exits.index(exit)}.weight"
            source = "model.embed_tokens.weight" if config.tied_head else own
        state[name] = checkpoint.tensor(source).to(dtype)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(theirs)  # its buffer is computed, not loaded
    return model.eval()
