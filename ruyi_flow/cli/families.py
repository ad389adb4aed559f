"""The commands pull, list, rm, train and eval: families are added, listed, removed, trained and evaluated."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from ruyi_flow.cli.app import Panel, app
from ruyi_flow.cli.display import (
    comma_list,
    counting_bar,
    err,
    out,
    print_json,
    progress_bar,
    step_printer,
    training_bar,
)
from ruyi_flow.cli.options import JsonOption, integers
from ruyi_flow.errors import ConfigError
from ruyi_flow.extras import require

if TYPE_CHECKING:
    from ruyi_flow.family.description import Description

__all__ = ["evaluate", "list_families", "pull", "remove_families", "train"]


@app.command(rich_help_panel=Panel.RUN)
def pull(
    source: Annotated[str, typer.Argument(help="smollm2, a Hugging Face id, modelscope:ID, a folder or a .gguf file.")],
    name: Annotated[str | None, typer.Option(help="Name in the store. Default: the last part of the source.")] = None,
    exits: Annotated[str | None, typer.Option(help="Exits to give to an ordinary checkpoint, such as 5,11,17.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Convert to float32, bfloat16 or float16. Default: as it is.")
    ] = None,
    branches: Annotated[
        list[Path] | None, typer.Option(help="File of trained branches or probes (ruyi-flow train); may be repeated.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the family of this name, once the new one is complete.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Add a family to the local store (RUYI_FLOW_HOME, or the user's cache folder).

    --exits makes a family of an ordinary checkpoint: each branch becomes a
    copy of the trunk layer at its exit, which runs but predicts poorly until
    it is trained (ruyi-flow train). 'smollm2' is the demo family:
    SmolLM2-135M-Instruct with trained branches.
    """
    require("torch")  # before a long download
    from ruyi_flow.family import store

    began = time.monotonic()
    given_exits, steps, show = integers(exits, "--exits"), list[str](), step_printer(as_json)

    def count(step: str) -> None:
        steps.append(step)
        show(step)

    folder = store.pull(
        source,
        name=name,
        exits=given_exits,
        dtype=dtype,
        branches=branches or (),
        force=force,
        say=count,
        note=_print_note,
        bars=None if as_json or not err.is_terminal else counting_bar,
    )
    seconds, family = round(time.monotonic() - began, 1), store.stored(folder.name)
    if as_json:
        print_json({"family": folder.name, "new": bool(steps), "seconds": seconds, **asdict(family)})
        return
    state = "pulled to" if steps else "is in the store already:"
    out.print(
        f"{folder.name} {state} {escape(str(folder))} ({seconds} s; parameters at each exit: {_parameters(family)})",
        soft_wrap=True,
    )


@app.command("list", rich_help_panel=Panel.RUN)
def list_families(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", help="Families to show in full. Default: a line for each."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the families in the local store (RUYI_FLOW_HOME, or the user's cache folder).

    With names, all facts of these families are shown: also the parameters at
    each exit, the untrained exits, and the source. An exit that was added to an ordinary checkpoint is untrained until
    ruyi-flow train has trained it: it serves for mode exact only, in which it
    drafts.
    """
    from ruyi_flow.family import store

    store.check_names(names or ())
    found = [store.stored(name) for name in dict.fromkeys(names)] if names else store.families()
    if as_json:
        print_json({"store": str(store.home()), "families": [asdict(family) for family in found]})
        return
    if not found:
        out.print(
            f"the store at {escape(str(store.home()))} has no families yet; fetch the demo family: "
            f"ruyi-flow pull {store.DEMO}",
            soft_wrap=True,
        )
        return
    if names:
        for family in found:
            out.print(_all_facts(family))
        return
    out.print(_overview(found))
    for family in found:
        if family.problem is not None:
            out.print(_cell(family.problem, "red"), soft_wrap=True)
    out.print(f"in {escape(str(store.home()))}; all facts of a family: ruyi-flow list NAME", soft_wrap=True)


def _overview(families: Sequence[Description]) -> Table:
    """Return a table with one line for each family, which fits into 80 columns."""
    table = Table(Column("family", overflow="fold"), "exits")
    for heading in ("trained", "parameters", "format", "size, MB"):
        table.add_column(heading, no_wrap=True)
    for family in families:
        size = f"{family.size_bytes / 1e6:,.1f}"
        if family.problem is not None:
            table.add_row(_cell(family.name), Text("damaged", style="red"), "", "", "", size)
            continue
        branches = family.exits[:-1]
        trained = "yes" if not family.untrained else "partly" if len(family.untrained) < len(branches) else "no"
        whole = f"{(family.parameters or {})[family.exits[-1]] / 1e6:,.0f}M"
        table.add_row(_cell(family.name), comma_list(family.exits), trained, whole, _cell(str(family.dtype)), size)
    return table


def _all_facts(family: Description) -> Table:
    """Return a table of all facts of a family."""
    table = Table("family", Column(_cell(family.name), overflow="fold"))
    if family.problem is not None:
        table.add_row("damaged", _cell(family.problem, "red"))
    else:
        table.add_row("exits", comma_list(family.exits))
        table.add_row("untrained exits", comma_list(family.untrained) or "none")
        table.add_row("layers", str(family.layers))
        table.add_row("parameters at each exit", _parameters(family))
        table.add_row("format", _cell(str(family.dtype)))
        table.add_row("tokenizer", "yes" if family.has_tokenizer else "none: prompts must be token ids")
    table.add_row("size, MB", f"{family.size_bytes / 1e6:,.1f}")
    table.add_row("source", _cell(family.source or "not known"))
    table.add_row("folder", _cell(family.folder))
    return table


@app.command("rm", rich_help_panel=Panel.RUN)
def remove_families(
    names: Annotated[list[str], typer.Argument(metavar="NAME", help="Names of families in the store.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove families from the local store.

    Nothing else is removed: no checkpoint that a family was made from, and
    nothing that a link leads to. A node that serves a removed family goes on
    until it ends, but cannot be started again. The space is free once such
    nodes have ended.
    """
    from ruyi_flow.family import store

    names = list(dict.fromkeys(names))
    store.check_names(names)
    if not yes:
        size = sum(store.stored(name).size_bytes for name in names)
        if not sys.stdin.isatty():
            raise ConfigError(f"rm asks before it removes {comma_list(names)}; add --yes, since this is no terminal")
        try:
            agreed = typer.confirm(f"Remove {comma_list(names)} ({size / 1e6:,.1f} MB) from {store.home()}?", err=True)
        except typer.Abort:  # Ctrl-C
            raise typer.Exit(130) from None
        if not agreed:
            err.print("nothing was removed")
            raise typer.Exit(1)
    freed = {name: store.remove(name, note=_print_note) for name in names}
    if as_json:
        print_json({"removed": list(freed), "freed_bytes": sum(freed.values())})
        return
    out.print(f"removed {escape(comma_list(freed))}: {sum(freed.values()) / 1e6:,.1f} MB", soft_wrap=True)


def _print_note(text: str) -> None:
    """Print on standard error what the user should know about a family."""
    err.print(f"[yellow]note:[/yellow] {escape(text)}", soft_wrap=True, highlight=False)


def _parameters(family: Description) -> str:
    return ", ".join(f"{exit}: {count / 1e6:,.0f}M" for exit, count in (family.parameters or {}).items())


def _cell(text: str, style: str = "") -> Text:
    """Return a text from a file for a table. Control characters, which could change the terminal, are replaced."""
    return Text("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text), style=style)


@app.command(rich_help_panel=Panel.TRAIN)
def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML); see docs/guides/training.md.")],
    self_distill: Annotated[
        bool,
        typer.Option("--self-distill", help="First make training data: the last branch answers the recipe's prompts."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train the branches of a family, or trunk and branches together; an interrupted run resumes.

    To train on several GPUs or machines, run
    'accelerate launch -m ruyi_flow.cli train RECIPE'; on several CPUs, use
    'torchrun' instead of 'accelerate launch'.
    """
    from ruyi_flow.family import store
    from ruyi_flow.family.checkpoint import Checkpoint
    from ruyi_flow.family.tokenizer import end_tokens, load_tokenizer
    from ruyi_flow.training.distill import distill
    from ruyi_flow.training.recipe import Recipe
    from ruyi_flow.training.train import Step
    from ruyi_flow.training.train import train as run

    is_first = os.environ.get("RANK", "0") == "0"  # only the first of several processes prints
    plan = Recipe.load(recipe)
    checkpoint = Checkpoint(store.locate(plan.family), plan.exits)
    tokenizer = load_tokenizer(checkpoint)
    if tokenizer is None:
        raise ConfigError(
            f"family {plan.family!r} has no tokenizer.json, which this command needs; add one to its folder"
        )
    quiet = as_json or not is_first
    show = step_printer(quiet)
    if self_distill:
        with training_bar("answering", quiet=quiet) as progress:
            ends = end_tokens(checkpoint, tokenizer)
            file = distill(plan, checkpoint, tokenizer, ends, report=progress, say=show)
        show(f"answers written to {file}")
    last: list[Step] = []
    with training_bar("training", quiet=quiet) as progress:

        def report(step: Step) -> None:
            progress(step.step, step.steps, step.tokens_per_s, f"loss {step.losses['loss']:.3f}")
            last[:] = [step]
            if step.validation:
                show(f"step {step.step}: " + ", ".join(f"{k} {v:.3f}" for k, v in step.validation.items()))

        file = run(plan, checkpoint, tokenizer, report=report, say=show)
    if not is_first:
        return
    if as_json:
        print_json({"file": str(file), "validation": last[0].validation if last else {}})
        return
    out.print(f"trained: {escape(str(file))}", soft_wrap=True)
    if plan.scope != "joint":
        name = f"{plan.family.rstrip('/').split('/')[-1]}-trained"
        exits = f" --exits {','.join(map(str, plan.exits))}" if plan.exits else ""
        out.print(
            f"add it to the store: ruyi-flow pull {store.locate(plan.family)}{exits} --branches {file} --name {name}",
            soft_wrap=True,
        )


@app.command("eval", rich_help_panel=Panel.TRAIN)
def evaluate(
    family: Annotated[str, typer.Option(help="Family to evaluate: a folder, or a name in the store.")],
    tasks: Annotated[
        str,
        typer.Option(
            help="Tasks of lm-evaluation-harness, such as arc_easy,mmlu,wikitext2; 'agreement' with the last exit, on "
            "its answers to --chats; 'text_agreement', on the answers in --chats."
        ),
    ] = "agreement",
    exits: Annotated[str, typer.Option(help="Exits to evaluate: all, or a list such as 5,29.")] = "all",
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with TASK/test.jsonl. Default: the harness fetches its data."),
    ] = None,
    chats: Annotated[
        Path | None,
        typer.Option(help='Chats, JSON lines of {"messages": …}, {"prompt": …} or {"question": …, "answer": …}.'),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Most questions of each task. Default: all.")] = None,
    fewshot: Annotated[
        int, typer.Option(min=0, help="Solved examples before each question, from TASK/train.jsonl.")
    ] = 0,
    dtype: Annotated[str, typer.Option(help="Number format: bfloat16, float32 or float16.")] = "bfloat16",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: all cores.")] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a batch.")] = 2048,
    run_code: Annotated[
        bool, typer.Option("--run-code", help="Run the code that the model writes (humaneval) in restricted processes.")
    ] = False,
    out_folder: Annotated[
        Path | None,
        typer.Option("--out", help="Results folder; an interrupted run resumes from it. Default: runs/eval-FAMILY."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Evaluate the exits of a family: benchmarks, perplexity, and agreement with the last exit."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # hide the harness's bars; there is one below
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    require("lm_eval")
    import torch

    from ruyi_flow.evaluation import report
    from ruyi_flow.evaluation.run import evaluate as run
    from ruyi_flow.local import load_family

    if threads is not None:
        torch.set_num_threads(threads)
    with progress_bar("loading the family", quiet=as_json):
        loaded = load_family(family, dtype=dtype, device="cuda" if torch.cuda.is_available() else "cpu")
    chosen = None if exits == "all" else integers(exits, "--exits")
    for exit in chosen or ():
        if exit not in loaded.exits:
            raise ConfigError(f"--exits: {exit} is not one of the family's exits, {list(loaded.exits)}")
    folder = out_folder or Path("runs") / f"eval-{loaded.checkpoint.folder.name}"
    with counting_bar(quiet=as_json) as progress:
        found = run(
            loaded,
            folder,
            tasks=[task.strip() for task in tasks.split(",") if task.strip()],
            exits=chosen,
            data=data,
            chats=chats,
            limit=limit,
            fewshot=fewshot,
            batch_tokens=batch_tokens,
            run_code=run_code,
            report=progress,
        )
    written = report.write(found, folder)
    if as_json:
        print_json(found.to_dict())
        return
    table = Table("exit", "layers", "parameters", *map(report.heading, found.columns))
    for row in found.rows:
        cells = (report.cell(row, column) for column in found.columns)
        table.add_row(str(row.exit), str(row.layers), f"{row.parameters / 1e6:,.0f}M", *cells)
    out.print(table)
    for note in report.notes(found):
        err.print(note, soft_wrap=True)
    out.print("written: " + ", ".join(escape(str(file)) for file in written), soft_wrap=True)
