"""The commands pull, train and eval, which add, train and evaluate families."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from ruyi_flow.cli.app import Panel, app
from ruyi_flow.cli.display import counting_bar, err, out, print_json, progress_bar, step_printer, training_bar
from ruyi_flow.cli.options import JsonOption, integers
from ruyi_flow.errors import ConfigError
from ruyi_flow.extras import require

__all__ = ["evaluate", "pull", "train"]


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
    as_json: JsonOption = False,
) -> None:
    """Add a family to the local store (RUYI_FLOW_HOME, or the user's cache folder).

    --exits makes a family of an ordinary checkpoint: each branch becomes a
    copy of the trunk layer at its exit, which runs but predicts poorly until
    it is trained (ruyi-flow train). 'smollm2' is the demo family:
    SmolLM2-135M-Instruct with trained branches.
    """
    from ruyi_flow.family import store
    from ruyi_flow.family.checkpoint import Checkpoint

    began = time.monotonic()
    given_exits, steps, show = integers(exits, "--exits"), list[str](), step_printer(as_json)

    def count(step: str) -> None:
        steps.append(step)
        show(step)

    bars = err.is_terminal and not as_json
    folder = store.pull(
        source, name=name, exits=given_exits, dtype=dtype, branches=branches or (), say=count, bars=bars
    )
    config = Checkpoint(folder).config
    facts = {
        "family": folder.name,
        "folder": str(folder),
        "new": bool(steps),
        "seconds": round(time.monotonic() - began, 1),
        "exits": list(config.exits),
        "parameters": {p: config.num_parameters(p) for p in config.exits},
    }
    if as_json:
        print_json(facts)
        return
    sizes = ", ".join(f"{p}: {n / 1e6:,.0f}M" for p, n in facts["parameters"].items())  # type: ignore[attr-defined]
    state = "pulled to" if facts["new"] else "is in the store already:"
    out.print(
        f"{folder.name} {state} {escape(str(folder))} ({facts['seconds']} s; parameters at each exit: {sizes})",
        soft_wrap=True,
    )


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
