"""Benches of the whole family in one process, alone or against other engines: decoding, taking in a prompt."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ruyi_flow.bench import Against
from ruyi_flow.bench.engines import OURS, Engine, as_transformers, llama_cpp, ours, transformers
from ruyi_flow.bench.nodes import PROMPT, check_whole, prompts
from ruyi_flow.bench.report import Measured, Report, Setup, ratio, settings, turns, unseen
from ruyi_flow.errors import ConfigError
from ruyi_flow.family import store
from ruyi_flow.family.checkpoint import parse_dtype
from ruyi_flow.local import Family, load_family

__all__ = ["decode", "per_token", "prefill"]


def decode(
    setup: Setup,
    *,
    against: Sequence[Against] = (),
    early_exit: int | None = None,
    gguf: Path | None = None,
    report: Report = unseen,
) -> Measured:
    """Time a token, batch 1, greedy, at the last exit; the prompt's own time is subtracted.

    Args:
        early_exit: the layer after which transformers drafts; the family's second exit when left out.
        gguf: the file for llama.cpp; the demo family's is fetched when left out.

    Raises:
        ConfigError: an engine that is not installed, or cannot run this, or an option of one that is not asked for.
    """
    family = _load(setup, report)
    ids = prompts(family.checkpoint, [PROMPT])[0]
    engines = _engines(setup, family, against, len(ids) + setup.tokens, gguf, early_exit, report)
    spent: dict[str, list[float]] = {name: [] for name in engines}
    for name, counts in turns([*engines], setup.rounds, report):
        took = per_token(engines[name], ids, setup.tokens)
        if counts:
            spent[name].append(took)
    return _compared("decode", setup, engines, spent, 1, "ms a token")


def prefill(
    setup: Setup,
    *,
    prompt_tokens: int,
    against: Sequence[Against] = (),
    gguf: Path | None = None,
    report: Report = unseen,
) -> Measured:
    """Time to take in a prompt of so many tokens, up to the first new one; see `decode`.

    Raises:
        ConfigError: an engine that is not installed, or that cannot run this.
    """
    if Against.EARLY_EXIT in against:
        raise ConfigError(f"--against {Against.EARLY_EXIT}: it drafts, which is for decode only")
    family = _load(setup, report)
    text = prompts(family.checkpoint, [PROMPT])[0]
    ids = (text * (prompt_tokens // len(text) + 1))[:prompt_tokens]
    engines = _engines(setup, family, against, prompt_tokens + 1, gguf, None, report)
    spent: dict[str, list[float]] = {name: [] for name in engines}
    for name, counts in turns([*engines], setup.rounds, report):
        began = time.perf_counter()
        engines[name].prefill(ids)
        if counts:
            spent[name].append(time.perf_counter() - began)
    return _compared("prefill", setup, engines, spent, prompt_tokens, "ms a prompt")


def per_token(engine: Engine, ids: Sequence[int], tokens: int) -> float:
    """Seconds a token after the first.

    Raises:
        RuyiFlowError: the engine ended its answer early.
    """
    took = []
    for n in (1, tokens):
        began = time.perf_counter()
        made = engine.generate(ids, n)
        took.append(time.perf_counter() - began)
        check_whole(engine.name, made, n)
    return (took[1] - took[0]) / (tokens - 1)


def _load(setup: Setup, report: Report) -> Family:
    torch.set_num_threads(setup.threads)
    report("loading", 0, 1)
    family = load_family(setup.family, dtype=setup.dtype, weights=setup.weights, device=setup.device)
    report("loading", 1, 1)
    return family


def _engines(
    setup: Setup,
    family: Family,
    against: Sequence[Against],
    positions: int,
    gguf: Path | None,
    early_exit: int | None,
    report: Report,
) -> dict[str, Engine]:
    """Ours and those it is compared with, by name."""
    for option, given, kind in (("--gguf", gguf, Against.LLAMA_CPP), ("--early-exit", early_exit, Against.EARLY_EXIT)):
        if given is not None and kind not in against:
            raise ConfigError(
                f"{option} is for --against {kind}, which is not asked for; add it, or leave {option} out"
            )
    engines, model = [ours(family)], None
    for kind in dict.fromkeys(against):
        report(f"loading {kind}", 0, 1)
        if kind is Against.LLAMA_CPP:
            if gguf is None and setup.family != store.DEMO:
                raise ConfigError(f"--against {kind} needs --gguf FILE, of the same model as {setup.family!r}")
            engines.append(llama_cpp(gguf, threads=setup.threads, positions=positions))
        else:
            model = model or as_transformers(family.checkpoint, dtype=parse_dtype(setup.dtype)).to(setup.device)
            engines.append(transformers(model, _drafting(family, early_exit) if kind is Against.EARLY_EXIT else None))
        report(f"loading {kind}", 1, 1)
    return {engine.name: engine for engine in engines}


def _drafting(family: Family, early_exit: int | None) -> int:
    """How many layers draft: as asked, or up to the family's second exit."""
    layers, exits = family.config.num_layers, family.exits
    chosen = exits[min(1, len(exits) - 2)] if early_exit is None else early_exit
    if not 0 < chosen < layers:
        raise ConfigError(f"--early-exit is {chosen}; it must be one of the model's layers 1 … {layers - 1}")
    return chosen


def _compared(
    bench: str, setup: Setup, engines: dict[str, Engine], spent: dict[str, list[float]], tokens: int, unit: str
) -> Measured:
    results = {}
    for name, times in spent.items():
        took = statistics.median(times)
        results[name] = {unit.replace(" a ", "_per_"): 1e3 * took, "tokens_per_s": tokens / took}
        if name != OURS:
            results[name] |= ratio("ratio", times, spent[OURS])
    others = {name: engine.about for name, engine in engines.items() if name != OURS}
    more = {"prompt_tokens": tokens} if bench == "prefill" else {}
    samples = {unit: {name: [1e3 * t for t in times] for name, times in spent.items()}}
    return Measured(bench, settings(setup, against=others, **more), results, samples)
