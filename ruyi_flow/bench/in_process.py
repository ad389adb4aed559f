"""Benchmarks of the whole family in one process, alone or against other engines: decode and prefill."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from ruyi_flow.bench import Against, engines
from ruyi_flow.bench.engines import Engine
from ruyi_flow.bench.measurement import Measurement, Report, Setup, interleaved, no_report, ratios
from ruyi_flow.bench.nodes import PROMPT, check_token_count, tokenize_prompts
from ruyi_flow.errors import ConfigError
from ruyi_flow.family import store
from ruyi_flow.family.checkpoint import parse_dtype
from ruyi_flow.local import Family, load_family

__all__ = ["decode", "prefill", "seconds_per_token"]


def decode(
    setup: Setup,
    *,
    against: Sequence[Against] = (),
    early_exit: int | None = None,
    gguf: Path | None = None,
    report: Report = no_report,
) -> Measurement:
    """Measure the time per output token at batch 1, greedy, at the last exit; prefill time is subtracted.

    Args:
        setup: settings of the benchmark.
        against: engines to compare with.
        early_exit: number of layers that draft in transformers-early-exit. Default: up to the family's second exit.
        gguf: file for llama.cpp. Default: the demo family's, fetched when missing.
        report: called with the progress.

    Raises:
        ConfigError: an engine is not installed or cannot run this family, or an option belongs to an engine that
            `against` does not name.
    """
    return _compare(setup, against, gguf=gguf, early_exit=early_exit, report=report)


def prefill(
    setup: Setup,
    *,
    prompt_tokens: int,
    against: Sequence[Against] = (),
    gguf: Path | None = None,
    report: Report = no_report,
) -> Measurement:
    """Measure the time to first token of a prompt of this many tokens; see `decode` for the other arguments.

    Raises:
        ConfigError: an engine is not installed or cannot run this family.
    """
    if Against.EARLY_EXIT in against:
        raise ConfigError(f"--against {Against.EARLY_EXIT}: this engine drafts, so it is valid for decode only")
    return _compare(setup, against, prompt_tokens=prompt_tokens, gguf=gguf, report=report)


def seconds_per_token(engine: Engine, ids: Sequence[int], tokens: int) -> float:
    """Return the seconds per token after the first: an answer of one token is subtracted.

    Raises:
        RuyiFlowError: the engine ended its answer early.
    """
    seconds = []
    for count in (1, tokens):
        began = time.perf_counter()
        generated = engine.generate(ids, count)
        seconds.append(time.perf_counter() - began)
        check_token_count(engine.name, generated, count)
    return (seconds[1] - seconds[0]) / (tokens - 1)


def _compare(
    setup: Setup,
    against: Sequence[Against],
    *,
    prompt_tokens: int | None = None,
    gguf: Path | None,
    early_exit: int | None = None,
    report: Report,
) -> Measurement:
    """Load the engines and time them in interleaved rounds; `prompt_tokens` selects prefill, None decode."""
    torch.set_num_threads(setup.threads)
    family = load_family(setup.family, dtype=setup.dtype, weights=setup.weights, device=setup.device)
    ids = tokenize_prompts(family.checkpoint, [PROMPT])[0]
    if prompt_tokens is not None:
        ids = (ids * (prompt_tokens // len(ids) + 1))[:prompt_tokens]
    positions = len(ids) + setup.tokens
    compared = _engines(setup, family, against, positions=positions, gguf=gguf, early_exit=early_exit, report=report)
    times: dict[str, list[float]] = {name: [] for name in compared}
    for name, is_measured in interleaved([*compared], setup.rounds, report):
        began = time.perf_counter()
        if prompt_tokens is None:
            seconds = seconds_per_token(compared[name], ids, setup.tokens)
        else:
            compared[name].prefill(ids)
            seconds = time.perf_counter() - began
        if is_measured:
            times[name].append(seconds)
    bench, unit = ("decode", "token") if prompt_tokens is None else ("prefill", "prompt")
    results = {}
    for name in times:
        median = statistics.median(times[name])
        results[name] = {f"ms_per_{unit}": 1e3 * median, "tokens_per_s": (prompt_tokens or 1) / median}
        if name != engines.RUYI_FLOW:
            results[name] |= ratios("ratio", times[name], times[engines.RUYI_FLOW])
    others = {name: engine.description for name, engine in compared.items() if name != engines.RUYI_FLOW}
    settings = asdict(setup) | {"against": others} | ({"prompt_tokens": prompt_tokens} if prompt_tokens else {})
    samples = {f"ms per {unit}": {name: [1e3 * s for s in times[name]] for name in times}}
    return Measurement(bench, settings, results, samples)


def _engines(
    setup: Setup,
    family: Family,
    against: Sequence[Against],
    *,
    positions: int,
    gguf: Path | None,
    early_exit: int | None,
    report: Report,
) -> dict[str, Engine]:
    """Load the engines, by name: Ruyi Flow first, then those it is compared with."""
    for option, value, kind in (("--gguf", gguf, Against.LLAMA_CPP), ("--early-exit", early_exit, Against.EARLY_EXIT)):
        if value is not None and kind not in against:
            raise ConfigError(f"{option} requires --against {kind}; add that, or remove {option}")
    loaded, model = [engines.ruyi_flow(family)], None
    for kind in dict.fromkeys(against):
        report(f"loading {kind}", 0, 0)
        if kind is Against.LLAMA_CPP:
            if gguf is None and setup.family != store.DEMO:
                raise ConfigError(f"--against {kind} needs --gguf FILE, of the same model as {setup.family!r}")
            loaded.append(engines.llama_cpp(gguf, threads=setup.threads, positions=positions))
        else:
            model = model or engines.as_transformers(family.checkpoint, dtype=parse_dtype(setup.dtype)).to(setup.device)
            layers = _draft_layers(family, early_exit) if kind is Against.EARLY_EXIT else None
            loaded.append(engines.transformers(model, layers))
    return {engine.name: engine for engine in loaded}


def _draft_layers(family: Family, early_exit: int | None) -> int:
    """Return how many layers draft: the chosen number, or up to the family's second exit."""
    layers, exits = family.config.num_layers, family.exits
    chosen = exits[min(1, len(exits) - 2)] if early_exit is None else early_exit
    if not 0 < chosen < layers:
        raise ConfigError(f"--early-exit is {chosen}; it must be one of the model's layers 1 … {layers - 1}")
    return chosen
