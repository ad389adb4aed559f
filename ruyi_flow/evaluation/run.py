"""The evaluation of a family: every task at every exit, as one table."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml

from ruyi_flow.errors import ConfigError, did_you_mean
from ruyi_flow.evaluation.harness import ExitLM, Found, Report, key
from ruyi_flow.evaluation.local_data import LOCAL, overrides
from ruyi_flow.evaluation.sandbox import HUMANEVAL
from ruyi_flow.family.every_exit import Tree, exit_logits
from ruyi_flow.family.tokenizer import end_tokens
from ruyi_flow.local import Family
from ruyi_flow.training.corpus import read_documents, read_prompts
from ruyi_flow.training.distill import answers

__all__ = ["AGREEMENT", "Column", "Evaluation", "Row", "evaluate"]

AGREEMENT = ("agreement", "text_agreement")
"""Tasks of our own: agreement with the last exit on its answers to the prompts of chats, and on the chats' answers."""

_MAIN_METRIC = {"wikitext": "word_perplexity", "arc_challenge": "acc_norm", "agreement": "agreement"}
_ALIASES = {"wikitext2": "wikitext"}
_LOCAL_GROUP = "ruyi_flow_local"


@dataclass(frozen=True, slots=True)
class Column:
    """What one column of the table shows."""

    task: str
    metric: str
    higher_is_better: bool
    samples: int
    """Questions, texts, or tokens behind each value."""


@dataclass(frozen=True, slots=True)
class Row:
    """One exit."""

    exit: int
    layers: int
    """Of the trunk and the branch together."""
    parameters: int
    values: dict[str, float]
    """By task, of its column's metric."""
    errors: dict[str, float]
    """Standard errors of these, where the task gives one."""
    all_values: dict[str, dict[str, float]]
    """By task and metric: all that was measured."""


@dataclass(frozen=True, slots=True)
class Metrics:
    """What a task measured at an exit, by metric."""

    values: dict[str, float]
    errors: dict[str, float]
    higher_is_better: dict[str, bool]
    samples: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A family's table."""

    family: str
    fingerprint: str
    dtype: str
    limit: int | None
    fewshot: int
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def evaluate(
    family: Family,
    out: Path,
    *,
    tasks: Sequence[str],
    exits: Sequence[int] | None = None,
    data: Path | None = None,
    chats: Path | None = None,
    limit: int | None = None,
    fewshot: int = 0,
    batch_tokens: int = 2048,
    run_code: bool = False,
    report: Report = lambda what, done, total: None,
) -> Evaluation:
    """Measure exits of a family.

    What is known is kept in `out` question by question, so an interrupted run goes on where it was. All exits are
    scored in one pass through the trunk; answers are generated exit by exit.

    Args:
        family: with a tokenizer.
        out: folder.
        tasks: names of lm-evaluation-harness, and `AGREEMENT`.
        exits: all when left out.
        data: folder with `TASK/test.jsonl` for tasks in `LOCAL`; without it the harness fetches data from its hub.
        chats: file of chats for `AGREEMENT`.
        limit: questions of each task, at most; of a group, of each of its tasks.
        fewshot: examples before a question, out of `TASK/train.jsonl`.
        batch_tokens: tokens in one pass.
        run_code: let completions of code run, in processes with limits.
        report: told what is done, how much of it, and of how much.

    Raises:
        ConfigError: a task or a file that is missing.
    """
    if family.tokenizer is None:
        raise ConfigError(f"{family.checkpoint.folder} has no tokenizer.json, so there is no asking it anything")
    chosen = sorted(exits or family.exits)
    names = list(dict.fromkeys(_ALIASES.get(task, task) for task in tasks))
    own = [name for name in names if name in AGREEMENT]
    if own and chats is None:
        raise ConfigError(f"task {own[0]} needs a file of chats: --chats FILE.jsonl")
    out.mkdir(parents=True, exist_ok=True)
    dtype = str(family.model.dtype).removeprefix("torch.")
    measured: dict[str, dict[int, Metrics]] = {}  # by task and exit
    with Found(out / f"known-{family.checkpoint.fingerprint[:12]}-{dtype}.jsonl") as found:
        if theirs := [name for name in names if name not in AGREEMENT]:
            questions = _questions(theirs, data, out, fewshot, run_code)
            for p in reversed(chosen):
                model = ExitLM(family, p, chosen, found, batch_tokens=batch_tokens, report=report)
                for name, metrics in _ask(model, questions, theirs, limit).items():
                    measured.setdefault(name, {})[p] = metrics
        for name in own:
            assert chats is not None
            read = _own_answers if name == "agreement" else _texts
            pairs = read(family, chats, limit, found, batch_tokens, report)
            measured[name] = _agreement(family, chosen, pairs, found, batch_tokens, report)
    columns = [_column(name, measured[name][chosen[-1]]) for name in names]
    rows = []
    for p in chosen:
        here = {name: measured[name][p] for name in names}
        rows.append(
            Row(
                exit=p,
                layers=p + family.config.branch_layers[family.exits.index(p)],
                parameters=family.config.num_parameters(p),
                values={c.task: here[c.task].values[c.metric] for c in columns},
                errors={c.task: e for c in columns if (e := here[c.task].errors.get(c.metric)) is not None},
                all_values={name: m.values for name, m in here.items()},
            )
        )
    checkpoint = family.checkpoint
    return Evaluation(
        checkpoint.folder.name, checkpoint.fingerprint, dtype, limit, fewshot, tuple(columns), tuple(rows)
    )


def _column(task: str, metrics: Metrics) -> Column:
    metric = _MAIN_METRIC.get(task) or next(iter(metrics.values))
    return Column(task, metric, metrics.higher_is_better.get(metric.split(",")[0], True), metrics.samples)


def _questions(names: Sequence[str], data: Path | None, out: Path, fewshot: int, run_code: bool) -> dict[str, Any]:
    """The harness's tasks, with local data where there is some."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

    if "humaneval" in names and not run_code:
        raise ConfigError("humaneval runs code that the model wrote: allow it with --run-code, best in a container")
    local = [name for name in names if name in LOCAL and data is not None]
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        tasks, members = {}, []
        try:
            for name in local:
                assert data is not None
                changes = overrides(name, data, Path(scratch), fewshot=fewshot)
                if name == "humaneval":
                    tasks[name] = ConfigurableTask(config=HUMANEVAL | changes)
                else:
                    members.append(changes)
            # A file, since a group that is given as a dict passes its own list of tasks on to its members' members.
            (Path(scratch) / "local.yaml").write_text(yaml.safe_dump({"group": _LOCAL_GROUP, "task": members}))
            manager = TaskManager(include_path=scratch)
            for name in names:
                if name not in manager.all_tasks:
                    known = [*AGREEMENT, *LOCAL, *_ALIASES]
                    raise ConfigError(
                        f"no task {name!r}{did_you_mean(name, known) or f'; for instance {sorted(known)}'}"
                    )
            loaded = manager.load([*([_LOCAL_GROUP] if members else []), *(n for n in names if n not in local)])
        except (OSError, ValueError, KeyError, ConnectionError) as error:
            raise ConfigError(f"the data of {', '.join(names)} cannot be read: {error}") from error
    groups = {name: group for name, group in loaded.get("groups", {}).items() if name != _LOCAL_GROUP}
    return {"tasks": {**tasks, **loaded["tasks"]}, "groups": groups}


def _ask(model: ExitLM, questions: dict[str, Any], names: Sequence[str], limit: int | None) -> dict[str, Metrics]:
    """What one exit scores."""
    from lm_eval.evaluator import evaluate as harness

    told = harness(model, questions, limit=limit, bootstrap_iters=100, log_samples=False, confirm_run_unsafe_code=True)
    out = {}
    for name in names:
        raw = told["results"].get(name) or told["groups"][name]
        numbers = {k.removesuffix(",none"): v for k, v in raw.items() if isinstance(v, float | int) and "," in k}
        errors = {k: v for k, v in numbers.items() if "_stderr" in k}
        members = told["group_subtasks"].get(name) or [name]
        out[name] = Metrics(
            values={k: float(v) for k, v in numbers.items() if k not in errors},
            errors={k.replace("_stderr", ""): float(v) for k, v in errors.items()},
            higher_is_better={k: bool(v) for k, v in (told["higher_is_better"].get(name) or {}).items()},
            samples=sum(told["n-samples"][m]["effective"] for m in members if m in told["n-samples"]),
        )
    return out


def _own_answers(
    family: Family, chats: Path, limit: int | None, found: Found, batch_tokens: int, report: Report
) -> list[tuple[list[int], list[int]]]:
    """Prompts of chats and the last exit's greedy answers to them, of 128 tokens at most."""
    prompts = list(islice(read_prompts(chats, family.tokenizer), limit))
    last, most = family.exits[-1], 128
    room = family.config.max_positions - most
    asked = [p for p in prompts if len(p) <= room and key(last, "answer", p, most) not in found]
    if asked:
        longest = max(map(len, asked)) + most
        given = answers(
            family.model,
            asked,
            max_new_tokens=most,
            max_positions=longest,
            batch=max(1, min(64, len(asked), 8 * batch_tokens // longest)),
            eos_token_ids=end_tokens(family.checkpoint, family.tokenizer),
        )
        for done, answer in enumerate(given, 1):
            found[key(last, "answer", list(answer.prompt), most)] = answer.token_ids
            found.flush()
            report("the last exit answering", done, len(asked))
    return [(p, list(found[key(last, "answer", p, most)])) for p in prompts if len(p) <= room]


def _texts(
    family: Family, chats: Path, limit: int | None, found: Found, batch_tokens: int, report: Report
) -> list[tuple[list[int], list[int]]]:
    """Prompts and answers as the file has them; of plain text all but the first token is the answer."""
    read = islice(read_documents(chats, family.tokenizer, length=family.config.max_positions), limit)
    cuts = [(list(d.token_ids), max(1, d.answer)) for d in read]
    return [(ids[:cut], ids[cut:]) for ids, cut in cuts if cut < len(ids)]


def _agreement(
    family: Family,
    exits: Sequence[int],
    pairs: Sequence[tuple[list[int], list[int]]],
    found: Found,
    batch_tokens: int,
    report: Report,
) -> dict[int, Metrics]:
    """Teacher-forced, over the tokens of answers: how often an exit's likeliest token is the last's, and perplexity."""
    last, asked = family.exits[-1], sorted({*exits, family.exits[-1]})
    waiting = [pair for pair in pairs if any(key(p, "agreement", *pair) not in found for p in asked)]
    waiting.sort(key=lambda pair: -len(pair[0]) - len(pair[1]))
    total, done = len(waiting), 0
    while waiting:
        count = max(1, batch_tokens // (len(waiting[0][0]) + len(waiting[0][1])))
        batch, waiting = waiting[:count], waiting[count:]
        trees = [Tree((*prompt, *answer[:-1]), ()) for prompt, answer in batch]
        rows = [torch.arange(len(prompt) - 1, len(tree)) for (prompt, _), tree in zip(batch, trees, strict=True)]
        target = torch.tensor([t for _, answer in batch for t in answer], device=family.model.device)
        said, likely = {}, {}
        for p, logits, _ in exit_logits(family.model, asked, trees, rows):
            said[p] = logits.argmax(-1)
            likely[p] = logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(-1)
        start = 0
        for pair in batch:
            stop = start + len(pair[1])
            for p in asked:
                hits = int((said[p] == said[last])[start:stop].sum())
                found[key(p, "agreement", *pair)] = hits, float(likely[p][start:stop].sum())
            start = stop
        found.flush()
        done += len(batch)
        report("reading answers", done, total)
    tokens = sum(len(answer) for _, answer in pairs)
    out = {}
    for p in exits:
        known = [found[key(p, "agreement", *pair)] for pair in pairs]
        share = sum(hits for hits, _ in known) / tokens
        # Tokens of one answer hang together, so the error comes from the answers.
        spread = [(hits - share * len(answer)) ** 2 for (hits, _), (_, answer) in zip(known, pairs, strict=True)]
        out[p] = Metrics(
            values={"agreement": share, "perplexity": math.exp(-sum(likely for _, likely in known) / tokens)},
            errors={"agreement": math.sqrt(sum(spread)) / tokens},
            higher_is_better={"agreement": True, "perplexity": False},
            samples=tokens,
        )
    return out
