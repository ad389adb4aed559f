"""Commands that make policies: `trace` and `calibrate`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Table

from ruyi_flow.calibration.bounds import check_fractions
from ruyi_flow.calibration.trace import Scorer, Trace
from ruyi_flow.cli.app import Panel, app
from ruyi_flow.cli.display import counting_bar, err, out, print_json, progress_bar
from ruyi_flow.cli.options import JsonOption, MaxOption, check_target
from ruyi_flow.config.policy_file import PolicyFile
from ruyi_flow.errors import CheckpointError, ConfigError
from ruyi_flow.routing.confidence import Score
from ruyi_flow.routing.policy import WINDOW
from ruyi_flow.types import Weights

if TYPE_CHECKING:
    from ruyi_flow.calibration.budget import Budget, Deployment

__all__ = ["calibrate", "trace"]


@app.command(rich_help_panel=Panel.CALIBRATE)
def trace(
    prompts: Annotated[
        Path, typer.Argument(metavar="PROMPTS", help='JSON lines of {"messages": …}, {"prompt": …} or {"question": …}.')
    ],
    family: Annotated[str, typer.Option(help="Family: a folder, or a name in the store.")],
    out_file: Annotated[
        Path, typer.Option("--out", "-o", help="Trace file to write; an interrupted trace resumes.")
    ] = Path("trace.msgpack"),
    scorer: Annotated[
        Scorer,
        typer.Option(
            help="Measure of an answer's quality, for mode cascade. agreement: share of tokens that equal the last "
            "exit's; number: its last number equals that of the file's answer; choice: the most probable of "
            '{"choices": …} is the "answerKey".'
        ),
    ] = Scorer.AGREEMENT,
    limit: Annotated[int | None, typer.Option(min=1, help="Most prompts to trace. Default: all.")] = None,
    max_new_tokens: MaxOption = 128,
    dtype: Annotated[str, typer.Option(help="Number format: bfloat16, float32 or float16.")] = "bfloat16",
    weights: Annotated[
        Weights | None, typer.Option(help="Weight format, as on the nodes. Default: that of the checkpoint.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Torch threads. Default: one per core.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Record every exit's tokens and confidences along the last exit's answers, for calibration.

    Use hundreds to thousands of prompts of the kind you expect, and the number
    format and weights of your nodes. Each prompt is written when its answer
    ends; the same command resumes an interrupted trace.

    Example: ruyi-flow trace prompts.jsonl --family smollm2 --limit 2000
    --out trace.msgpack
    """
    check_target(out_file, "--out")
    import torch

    from ruyi_flow.evaluation.scorers import read_questions
    from ruyi_flow.evaluation.tracing import record_trace
    from ruyi_flow.local import load_family

    if threads is not None:
        torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with counting_bar(quiet=as_json) as progress:
        progress("loading the family", 0, 0)
        loaded = load_family(family, dtype=dtype, device=device, weights=weights)
        if loaded.tokenizer is None:
            raise ConfigError(f"family {family!r} has no tokenizer.json, which this command needs")
        asked = list(islice(read_questions(prompts, loaded.tokenizer, scorer), limit))
        if not asked:
            raise ConfigError(f"{prompts}: the file contains no prompts")
        skipped = record_trace(
            loaded,
            asked,
            out_file,
            scorer=scorer,
            max_new_tokens=max_new_tokens,
            report=lambda done, total: progress("answered prompts", done, total),
        )
    if skipped:
        err.print(
            f"skipped {skipped} of {len(asked)} prompts: they leave no room for an answer in the family's context of "
            f"{loaded.config.max_positions:,} tokens",
            soft_wrap=True,
        )
    made = Trace.load(out_file)
    agreement, right = {p: float(agrees.mean()) for p, agrees in made.agrees.items()}, made.right
    if as_json:
        facts = {"file": str(out_file), "prompts": len(made.records), "tokens": len(made.prompt)}
        print_json(facts | {"agreement": agreement, "right": right})
        return
    out.print(f"{len(made.records)} prompts, {len(made.prompt):,} tokens: {escape(str(out_file))}", soft_wrap=True)
    shares = {"agreement with the last exit": agreement} | ({"right answers": right} if right else {})
    for name, by_exit in shares.items():
        out.print(f"{name}: " + ", ".join(f"exit {p} {share:.3f}" for p, share in by_exit.items()))


@app.command(rich_help_panel=Panel.CALIBRATE)
def calibrate(
    trace_files: Annotated[
        list[Path], typer.Argument(metavar="TRACE", help="Files of ruyi-flow trace; several are combined.")
    ],
    mode: Annotated[Literal["token", "cascade"], typer.Option(help="Mode that the policy is for.")] = "token",
    max_disagreement: Annotated[
        float | None,
        typer.Option(
            help="Mode token: largest share of the tokens decided early that may differ from the last exit's. "
            "Default: 0.05, or no bound if another limit is given."
        ),
    ] = None,
    max_loss: Annotated[
        float | None,
        typer.Option(help="Mode cascade: largest share of the last exit's quality that may be lost. Default: 0.03."),
    ] = None,
    confidence_level: Annotated[
        float, typer.Option("--confidence", help="Probability that the bound holds on new prompts of the same kind.")
    ] = 0.95,
    max_escalation: Annotated[
        float | None,
        typer.Option(help="Mode token: largest share of the tokens for which the first node may ask the next one."),
    ] = None,
    max_bytes_per_token: Annotated[
        float | None, typer.Option(help="Mode token: most bytes sent upward on all links of --topology, per token.")
    ] = None,
    max_latency: Annotated[
        float | None,
        typer.Option(
            help="Mode token: most seconds that a token may take, computed from times measured on --topology's running "
            "nodes."
        ),
    ] = None,
    topology: Annotated[
        Path | None,
        typer.Option(
            "--topology",
            "-t",
            help="Mode token: topology that cuts the family. Default: one node with the first exit, one with the rest.",
        ),
    ] = None,
    score: Annotated[
        Score | None, typer.Option(help="Score that confidence is computed from. Default: the best one for the bound.")
    ] = None,
    window: Annotated[
        int | None, typer.Option(min=1, help="Mode cascade: tokens over which confidence is averaged. Default: 8.")
    ] = None,
    out_file: Annotated[Path, typer.Option("--out", "-o", help="Policy file to write.")] = Path("policy.yaml"),
    report: Annotated[
        Path | None, typer.Option(help="Folder for a CSV table and plots of cost and calibration. Default: none.")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the split into prompts that choose and prompts that test.")
    ] = 0,
    as_json: JsonOption = False,
) -> None:
    """Choose thresholds that keep a bound on new prompts, and write them as a policy.

    Mode token bounds the share of tokens that differ, or their cost; mode
    cascade bounds the quality that answers lose. Use the policy in a topology
    (policy: {file: policy.yaml}) or in a request (--policy).

    Three tenths of the prompts choose thresholds. The others test them, from
    cautious to bold, until one fails (Learn then Test). The test takes hundreds
    to thousands of prompts, more for a smaller bound; with too few prompts it
    reports roughly how many more are needed and writes nothing.
    docs/guides/modes-and-calibration.md tells what is guaranteed.

    Example: ruyi-flow calibrate trace.msgpack --max-disagreement 0.05
    --out policy.yaml
    """
    limits = {
        "--max-escalation": max_escalation,
        "--max-bytes-per-token": max_bytes_per_token,
        "--max-latency": max_latency,
    }
    other = "token" if mode == "cascade" else "cascade"
    of_token = {"--max-disagreement": max_disagreement, "--topology": topology, **limits}
    for option, value in (of_token if other == "token" else {"--max-loss": max_loss, "--window": window}).items():
        if value is not None:
            raise ConfigError(f"{option} is only valid with mode {other}, not with {mode}")
    check_fractions({"--max-disagreement": max_disagreement, "--max-loss": max_loss, "--confidence": confidence_level})
    for option, most in limits.items():
        if most is not None and not most > 0:
            raise ConfigError(f"{option} is {most:g}; it must be above 0")
    if max_escalation is not None and max_escalation > 1:
        raise ConfigError(f"--max-escalation is {max_escalation:g}; it is a share, at most 1")
    _check_targets(out_file, report)

    from ruyi_flow.calibration.budget import Budget

    loaded = Trace.load(*trace_files)
    if score is not None and score not in loaded.header.scores:
        raise ConfigError(f"--score: the trace has no {score}; it has {', '.join(loaded.header.scores)}")
    job = _Job(loaded, confidence_level, score, seed, out_file, report, as_json)
    if mode == "cascade":
        _calibrate_cascade(job, 0.03 if max_loss is None else max_loss, window or WINDOW)
        return
    budget = Budget(*limits.values()) if any(value is not None for value in limits.values()) else None
    if budget is None and max_disagreement is None:
        max_disagreement = 0.05
    deployment = _deployment(topology, loaded, measured=max_latency is not None, quiet=as_json)
    _calibrate_token(job, max_disagreement, budget, deployment)


@dataclass(frozen=True, slots=True)
class _Job:
    """Inputs and outputs that both modes share."""

    trace: Trace
    confidence_level: float
    score: Score | None
    seed: int
    out_file: Path
    report: Path | None
    as_json: bool

    def print_written(self, files: Sequence[Path]) -> None:
        if files:
            out.print("written: " + ", ".join(escape(str(file)) for file in files), soft_wrap=True)


_FEW_PROMPTS = 100
"""Fewer prompts than this are said to be few where no bound is tested."""


def _calibrate_token(
    job: _Job, max_disagreement: float | None, budget: Budget | None, deployment: Deployment | None
) -> None:
    from ruyi_flow.calibration.thresholds import calibrate_token
    from ruyi_flow.evaluation.calibration_report import write_token_report

    with progress_bar("choosing thresholds", quiet=job.as_json):
        found = calibrate_token(
            job.trace,
            max_disagreement=max_disagreement,
            confidence_level=job.confidence_level,
            scores=None if job.score is None else (job.score,),
            budget=budget,
            deployment=deployment,
            seed=job.seed,
        )
    written = [] if job.report is None else write_token_report(job.report, found)
    found.policy.save(job.out_file)
    if job.as_json:
        facts = {**found.policy.model_dump(mode="json"), "errors": found.errors, "spent": asdict(found.cost)}
        print_json({"file": str(job.out_file), **facts})
        return
    table = Table("exit", "threshold", "decides", "calibration error before", "after", "temperature")
    for p, share in found.choice.expected.decided.items():
        if (threshold := found.choice.thresholds.get(p)) is None:  # the last exit
            table.add_row(str(p), "", f"{share:.1%}", "", "", "")
            continue
        cells = (*(f"{error:.3f}" for error in found.errors[p]), f"{found.policy.curves[p].temperature:g}")
        table.add_row(str(p), "never" if threshold > 1 else f"{threshold:.3f}", f"{share:.1%}", *cells)
    out.print(table)
    tested, cost = found.choice.tested, found.cost
    bound = "no bound was requested"
    if found.choice.prompts < _FEW_PROMPTS:
        bound += ", and so few prompts say little about new ones: trace several hundred"
    if max_disagreement is not None:
        bound = f"at most {max_disagreement:.1%} will on new prompts, with a confidence of {job.confidence_level:.0%}"
    out.print(
        f"score {found.policy.score}: {tested.disagreement:.1%} of the tokens decided early differ from the last "
        f"exit's on the {found.choice.prompts} prompts of the test; {bound}",
        soft_wrap=True,
    )
    times = "" if cost.latency_s is None else f", {1000 * cost.latency_s:.1f} ms per token without drafts"
    out.print(
        f"on these prompts the first node asks the next one for {cost.escalation:.1%} of the tokens; "
        f"{cost.bytes_per_token:,.0f} bytes per token go up{times}",
        soft_wrap=True,
    )
    job.print_written([job.out_file, *written])


def _calibrate_cascade(job: _Job, max_loss: float, window: int) -> None:
    from ruyi_flow.calibration.cascade import calibrate_cascade
    from ruyi_flow.evaluation.calibration_report import write_cascade_report

    header = job.trace.header
    options = header.scorer == Scorer.CHOICE
    with counting_bar(quiet=job.as_json) as progress:
        found = calibrate_cascade(
            job.trace,
            max_loss=max_loss,
            confidence_level=job.confidence_level,
            score=job.score,
            window=window,
            seed=job.seed,
            report=lambda done, total: progress("tried settings", done, total),
        )
    written = [] if job.report is None else write_cascade_report(job.report, found)
    if not options:
        found.policy.save(job.out_file)
        written.insert(0, job.out_file)
    if job.as_json:
        facts: dict[str, Any] = {"file": None if options else str(job.out_file), **found.policy.model_dump(mode="json")}
        print_json({**facts, "errors": found.errors, "frontier": [asdict(outcome) for outcome in found.frontier]})
        return
    table = Table("start at probability", "continue at confidence", "quality", "compute", *map(str, header.exits))
    for outcome in found.frontier:
        setting = outcome.setting
        start = f"(exit {setting.first})" if setting.chance == 0 else f"{setting.chance:.2f}"
        start = "(the last exit)" if setting.chance > 1 else start
        shares = (outcome.score / max(1e-9, outcome.last), outcome.compute, *outcome.decided.values())
        cells = (f"{setting.bound:.2f}", *(f"{share:.1%}" for share in shares))
        table.add_row(start, *cells, style="bold" if outcome == found.tested else None)
    out.print(table)
    tested = found.tested
    out.print(
        f"scorer {header.scorer}: on the {found.prompts} prompts of the test the last exit's answers score "
        f"{tested.last:.3f}, the policy's {tested.score:.3f} at {tested.compute:.1%} of its compute. On new prompts at "
        f"most {max_loss:.1%} of the quality is lost, with a confidence of {job.confidence_level:.0%}",
        soft_wrap=True,
    )
    if options:
        out.print("no policy is written: nodes decide tokens, and this trace compares options", soft_wrap=True)
    job.print_written(written)


def _check_targets(out_file: Path, report: Path | None) -> None:
    """Check that a policy and a report can be written there, and that the policy replaces nothing but a policy."""
    check_target(out_file, "--out")
    if out_file.exists():
        try:
            PolicyFile.load(out_file)
        except ConfigError:
            raise ConfigError(
                f"--out {out_file}: exists and is not a policy file; name another file or remove it"
            ) from None
    if report is not None:
        check_target(report, "--report", folder=True)


def _deployment(topology: Path | None, trace: Trace, *, measured: bool, quiet: bool) -> Deployment | None:
    """Read where a topology cuts the family; measure its running nodes when the budget limits time."""
    if topology is None:
        if measured:
            raise ConfigError("--max-latency needs --topology, to measure its running nodes")
        return None
    from ruyi_flow.config.topology import Topology
    from ruyi_flow.evaluation.deployment import deployment_of, measure_deployment
    from ruyi_flow.family import store
    from ruyi_flow.family.checkpoint import Checkpoint

    loaded = Topology.load(topology)
    if loaded.all_exits != trace.header.exits:
        raise ConfigError(f"{topology} has exits {list(loaded.all_exits)}, the trace {list(trace.header.exits)}")
    with suppress(CheckpointError):  # the family need not be on this machine
        fingerprint = Checkpoint(store.locate(loaded.family), loaded.exits).fingerprint
        if fingerprint != trace.header.family:
            raise ConfigError(f"{topology} has family {fingerprint[:12]}, the trace {trace.header.family[:12]}")
    if not measured:
        return deployment_of(loaded, trace.header.hidden_size)
    with progress_bar("measuring the nodes", quiet=quiet):
        return asyncio.run(measure_deployment(loaded, trace.header.hidden_size))
