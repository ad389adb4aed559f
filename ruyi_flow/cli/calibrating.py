"""Commands that make policies: traces, calibration."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape
from rich.table import Table

from ruyi_flow.calibration.trace import Scorer
from ruyi_flow.cli.app import app
from ruyi_flow.cli.display import counting_bar, err, out, print_json, progress_bar
from ruyi_flow.cli.options import JsonOption, MaxOption, check_target
from ruyi_flow.config.policy_file import PolicyFile
from ruyi_flow.errors import CheckpointError, ConfigError
from ruyi_flow.routing.confidence import Score
from ruyi_flow.routing.policy import WINDOW
from ruyi_flow.types import Weights

if TYPE_CHECKING:
    from ruyi_flow.calibration.budget import Deployment
    from ruyi_flow.calibration.trace import Trace

__all__ = ["calibrate", "trace"]


@app.command()
def trace(
    prompts: Annotated[
        Path,
        typer.Argument(metavar="PROMPTS", help='JSON lines of {"messages": …}, {"prompt": …} or {"question": …}.'),
    ],
    family: Annotated[str, typer.Option(help="A folder, or a name in the store.")],
    out_file: Annotated[Path, typer.Option("--out", "-o", help="The trace; an interrupted one goes on.")] = Path(
        "trace.msgpack"
    ),
    scorer: Annotated[
        Scorer,
        typer.Option(
            help="What answers are worth, for mode cascade: agreement with the last exit's; number: the last number is "
            'that of the file\'s answer; choice: the likeliest of {"choices": …} is "answerKey".'
        ),
    ] = Scorer.AGREEMENT,
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts, at most.")] = None,
    max_new_tokens: MaxOption = 128,
    dtype: Annotated[str, typer.Option(help="bfloat16, float32 or float16.")] = "bfloat16",
    weights: Annotated[
        Weights | None, typer.Option(help="How products hold their weights, as the nodes do; left out: as they are.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch; left out, all cores.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Record what every exit says, and how sure it is, along the last exit's answers: for calibration.

    Take prompts of the kind that is to come, hundreds to thousands of them, and
    the number format and weights that the nodes have. Each prompt is written as
    its answer ends; the same command goes on where it was broken off.

    Example: ruyi-flow trace prompts.jsonl --family smollm2 --limit 2000
    --out trace.msgpack
    """
    check_target(out_file, "--out")
    import torch

    from ruyi_flow.calibration.trace import Trace
    from ruyi_flow.evaluation.scorers import read_asked
    from ruyi_flow.evaluation.tracing import record
    from ruyi_flow.local import load_family

    if threads is not None:
        torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = load_family(family, dtype=dtype, device=device, weights=weights)
    if loaded.tokenizer is None:
        raise ConfigError(f"family {family!r} has no tokenizer.json, so there is no asking it anything")
    asked = list(islice(read_asked(prompts, loaded.tokenizer, scorer), limit))
    if not asked:
        raise ConfigError(f"{prompts}: there are no prompts in it")
    with counting_bar(quiet=as_json) as progress:
        left_out = record(
            loaded,
            asked,
            out_file,
            scorer=scorer,
            max_new_tokens=max_new_tokens,
            report=lambda done, total: progress("tracing", done, total),
        )
    if left_out:
        err.print(
            f"{left_out} of {len(asked)} prompts leave no room for an answer in the family's context of "
            f"{loaded.config.max_positions:,} tokens: left out",
            soft_wrap=True,
        )
    made = Trace.load(out_file)
    agreement = {p: float(agrees.mean()) for p, agrees in made.agrees.items()}
    right = made.right
    if as_json:
        facts = {"file": str(out_file), "prompts": len(made.records), "tokens": len(made.prompt)}
        print_json(facts | {"agreement": agreement, "right": right})
        return
    out.print(f"{len(made.records)} prompts, {len(made.prompt):,} tokens: {escape(str(out_file))}", soft_wrap=True)
    shares = {"agreement with the last exit": agreement} | ({"right": right} if right else {})
    for what, by_exit in shares.items():
        out.print(f"{what}: " + ", ".join(f"{p}: {share:.3f}" for p, share in by_exit.items()))


@app.command()
def calibrate(
    trace_files: Annotated[
        list[Path],
        typer.Argument(metavar="TRACE", help="What ruyi-flow trace wrote; the prompts of several together."),
    ],
    mode: Annotated[Literal["token", "cascade"], typer.Option(help="What the policy is for.")] = "token",
    max_disagreement: Annotated[
        float | None,
        typer.Option(
            help="Mode token: of the tokens decided early, at most this share differs from the last exit's; 0.05 when "
            "nothing else is bounded."
        ),
    ] = None,
    max_loss: Annotated[
        float | None,
        typer.Option(
            help="Mode cascade: at most this share of what the last exit's answers are worth is lost; 0.03 when left "
            "out."
        ),
    ] = None,
    sureness: Annotated[
        float, typer.Option("--confidence", help="How sure either must be on new prompts of the same kind.")
    ] = 0.95,
    max_escalation: Annotated[
        float | None, typer.Option(help="Mode token: share of tokens that are asked beyond the first node, on average.")
    ] = None,
    max_bytes_per_token: Annotated[
        float | None, typer.Option(help="Mode token: bytes upwards on all links of --topology, on average.")
    ] = None,
    max_latency: Annotated[
        float | None,
        typer.Option(help="Mode token: seconds a token, on average, by the times of --topology's running nodes."),
    ] = None,
    topology: Annotated[
        Path | None,
        typer.Option(
            "--topology", "-t", help="Mode token: where the family is cut; left out: one node has the first exit alone."
        ),
    ] = None,
    score: Annotated[
        Score | None, typer.Option(help="What confidence is made of; left out: what serves the bound best.")
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(min=1, help="Mode cascade: tokens over which confidence is averaged; 8 when left out."),
    ] = None,
    out_file: Annotated[Path, typer.Option("--out", "-o", help="The policy file.")] = Path("policy.yaml"),
    report: Annotated[
        Path | None, typer.Option(help="Folder for a CSV and plots: what agreement costs, what confidence means.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the split into prompts that choose and prompts that test.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Choose thresholds that keep a bound on new prompts, and write them as a policy.

    Mode token bounds the tokens that differ, or what they cost; mode cascade
    what the answers lose in worth. A topology names the file (policy: {file:
    policy.yaml}), or a request does (--policy).

    Three tenths of the prompts choose thresholds; the others test them, from
    timid to bold, until one fails (Learn then Test), by bets against a rate
    above the bound. That takes hundreds to thousands of prompts, the more the
    smaller the bound: where they are too few, it is said about how many are
    missing, and nothing is written. docs/calibration.md has what is promised.

    Example: ruyi-flow calibrate trace.msgpack --max-disagreement 0.05
    --out policy.yaml
    """
    budgeted = {
        "--max-escalation": max_escalation,
        "--max-bytes-per-token": max_bytes_per_token,
        "--max-latency": max_latency,
    }
    of_cascade = {"--max-loss": max_loss, "--window": window}
    of_token = {"--max-disagreement": max_disagreement, "--topology": topology, **budgeted}
    for option, value in (of_token if mode == "cascade" else of_cascade).items():
        if value is not None:
            raise ConfigError(f"{option} goes with mode {'token' if mode == 'cascade' else 'cascade'}, not with {mode}")
    shares = {"--max-disagreement": max_disagreement, "--max-loss": max_loss, "--confidence": sureness}
    for option, share in shares.items():
        if share is not None and not 0 < share < 1:
            raise ConfigError(f"{option} is {share:g}; it must lie between 0 and 1")
    for option, most in budgeted.items():
        if most is not None and not most > 0:
            raise ConfigError(f"{option} is {most:g}; it must be above 0")
    if max_escalation is not None and max_escalation > 1:
        raise ConfigError(f"--max-escalation is {max_escalation:g}; it is a share, at most 1")
    _check_targets(out_file, report)

    from ruyi_flow.calibration.trace import Trace

    read = Trace.load(*trace_files)
    if score is not None and score not in read.header.scores:
        raise ConfigError(f"--score: the trace has no {score}; it has {', '.join(read.header.scores)}")
    if mode == "cascade":
        loss = 0.03 if max_loss is None else max_loss
        _cascade(read, loss, sureness, score, window or WINDOW, seed, out_file, report, as_json)
        return
    from ruyi_flow.calibration import thresholds as calibration
    from ruyi_flow.calibration.budget import Budget

    spends = tuple(budgeted.values())
    budget = Budget(*spends) if any(value is not None for value in spends) else None
    if budget is None and max_disagreement is None:
        max_disagreement = 0.05
    deployment = _deployment(topology, read, measured=max_latency is not None)
    with progress_bar("choosing thresholds", quiet=as_json):
        found = calibration.calibrate(
            read,
            max_disagreement=max_disagreement,
            sureness=sureness,
            scores=None if score is None else (score,),
            budget=budget,
            deployment=deployment,
            seed=seed,
        )
    written = [out_file]
    if report is not None:
        from ruyi_flow.evaluation import frontier

        written += frontier.write(report, found.frontier, *found.unseen)
    found.policy.save(out_file)
    if as_json:
        facts = {**found.policy.model_dump(mode="json"), "errors": found.errors, "spent": asdict(found.spent)}
        print_json({"file": str(out_file), **facts})
        return
    table = Table("exit", "threshold", "decides", "calibration error before", "after", "temperature")
    for p, threshold in found.choice.thresholds.items():
        before, after = found.errors[p]
        cells = (f"{before:.3f}", f"{after:.3f}", f"{found.policy.curves[p].temperature:g}")
        shown = "never" if threshold > 1 else f"{threshold:.3f}"
        table.add_row(str(p), shown, f"{found.choice.expected.decided[p]:.1%}", *cells)
    last = read.header.exits[-1]
    table.add_row(str(last), "", f"{found.choice.expected.decided[last]:.1%}", "", "", "")
    out.print(table)
    tested, costing = found.choice.tested, found.spent
    bound = (
        "; no bound was asked for"
        if max_disagreement is None
        else f"; on new ones at most {max_disagreement:.1%} will, with a sureness of {sureness:.0%}"
    )
    out.print(
        f"{found.policy.score}: of the tokens decided early {tested.disagreement:.1%} differed, on the "
        f"{found.choice.prompts} prompts of the test{bound}",
        soft_wrap=True,
    )
    times = "" if costing.latency_s is None else f", {1000 * costing.latency_s:.1f} ms a token without drafts"
    out.print(
        f"on these prompts {costing.escalation:.1%} of the tokens are asked beyond the first node, "
        f"{costing.bytes_per_token:,.0f} bytes a token go up{times}",
        soft_wrap=True,
    )
    out.print("written: " + ", ".join(escape(str(file)) for file in written), soft_wrap=True)


def _check_targets(out_file: Path, report: Path | None) -> None:
    """Check that a policy and a report can be written there, and that the policy replaces nothing but a policy."""
    check_target(out_file, "--out")
    if out_file.exists():
        try:
            PolicyFile.load(out_file)
        except ConfigError:
            raise ConfigError(
                f"--out {out_file}: is there and is not a policy file; name another one, or remove it"
            ) from None
    if report is not None:
        check_target(report, "--report", folder=True)


def _deployment(topology: Path | None, trace: Trace, *, measured: bool) -> Deployment | None:
    """A topology as the budgets need it, measured where they are of time."""
    if topology is None:
        if measured:
            raise ConfigError("--max-latency needs --topology: the running nodes whose times count")
        return None
    from ruyi_flow.config.topology import Topology
    from ruyi_flow.evaluation.deployment import deployment_of, measure
    from ruyi_flow.family import store
    from ruyi_flow.family.checkpoint import Checkpoint

    loaded = Topology.load(topology)
    if loaded.all_exits != trace.header.exits:
        raise ConfigError(f"{topology} has exits {list(loaded.all_exits)}, the trace {list(trace.header.exits)}")
    with suppress(CheckpointError):  # the family need not be on this machine
        held = Checkpoint(store.locate(loaded.family), loaded.exits).fingerprint
        if held != trace.header.family:
            raise ConfigError(f"{topology} is of family {held[:12]}, the trace of {trace.header.family[:12]}")
    if not measured:
        return deployment_of(loaded, trace.header.hidden_size)
    with progress_bar("measuring the nodes"):
        return asyncio.run(measure(loaded, trace.header.hidden_size))


def _cascade(
    trace: Trace,
    max_loss: float,
    sureness: float,
    score: Score | None,
    window: int,
    seed: int,
    out_file: Path,
    report: Path | None,
    as_json: bool,
) -> None:
    from ruyi_flow.calibration.cascade import calibrate_cascade
    from ruyi_flow.calibration.trace import Scorer

    options = trace.header.scorer == Scorer.CHOICE
    with counting_bar(quiet=as_json) as progress:
        found = calibrate_cascade(
            trace,
            max_loss=max_loss,
            sureness=sureness,
            score=score,
            window=window,
            seed=seed,
            report=lambda done, total: progress("trying settings", done, total),
        )
    written: list[Path] = []
    if report is not None:
        from ruyi_flow.evaluation import frontier

        written += frontier.write_cascade(report, found)
    if not options:
        found.policy.save(out_file)
        written.insert(0, out_file)
    if as_json:
        facts = {"file": None if options else str(out_file), **found.policy.model_dump(mode="json")}
        print_json({**facts, "errors": found.errors, "frontier": [asdict(worth) for worth in found.frontier]})
        return
    table = Table(
        "begins where as good with", "stays while as sure as", "worth", "compute", *map(str, trace.header.exits)
    )
    for worth in found.frontier:
        chosen = "bold" if worth == found.tested else None
        chance = f"(exit {worth.setting.first})" if worth.setting.chance == 0 else f"{worth.setting.chance:.2f}"
        chance = "(the last exit)" if worth.setting.chance > 1 else chance
        shares = [f"{share:.1%}" for share in worth.decided.values()]
        worths = (f"{worth.score / max(1e-9, worth.last):.1%}", f"{worth.compute:.1%}")
        table.add_row(chance, f"{worth.setting.bound:.2f}", *worths, *shares, style=chosen)
    out.print(table)
    tested = found.tested
    out.print(
        f"scorer {trace.header.scorer}: the last exit's answers are worth {tested.last:.3f} each; these "
        f"{tested.score:.3f}, at {tested.compute:.1%} of its compute, on the {found.prompts} prompts of the test. "
        f"On new ones at most {max_loss:.1%} of it will be lost, with a sureness of {sureness:.0%}",
        soft_wrap=True,
    )
    if options:
        out.print("no policy is written: a node decides by tokens, and this trace compares options", soft_wrap=True)
    if written:
        out.print("written: " + ", ".join(escape(str(file)) for file in written), soft_wrap=True)
