"""Evaluation of a family: every task at every exit, as one table."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml

from ruyi_flow.errors import ConfigError, did_you_mean
from ruyi_flow.evaluation.harness import ExitLM, Report, ResultCache, cache_key
from ruyi_flow.evaluation.local_data import LOCAL, overrides
from ruyi_flow.evaluation.sandbox import HUMANEVAL, check_limits
from ruyi_flow.family.every_exit import Tree, exit_logits
from ruyi_flow.family.tokenizer import end_tokens
from ruyi_flow.local import Family
from ruyi_flow.training.corpus import Document, read_documents, read_prompts
from ruyi_flow.training.distill import answers

__all__ = ["AGREEMENT", "Column", "Evaluation", "Row", "evaluate"]

AGREEMENT = ("agreement", "text_agreement")
"""Tasks without the harness: agreement with the last exit on its own answers to chats, and on the chats' answers."""

_MAIN_METRIC = {"wikitext": "word_perplexity", "arc_challenge": "acc_norm", "agreement": "agreement"}
_ALIASES = {"wikitext2": "wikitext"}
_LOCAL_GROUP = "ruyi_flow_local"

_Pair = tuple[list[int], list[int]]
"""Token ids of a prompt and of its answer."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the table."""

    task: str
    metric: str
    higher_is_better: bool
    samples: int
    """Number of questions, texts or tokens behind each value."""
    skipped: int = 0
    """Number of chats that were left out, since they do not fit the family's context, or have no answer to read."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the table: an exit."""

    exit: int
    layers: int
    """Layers of the trunk and the branch together."""
    parameters: int
    values: dict[str, float]
    """Value of each column's metric, by task."""
    errors: dict[str, float]
    """Standard errors of these values, for the tasks that have one."""
    all_values: dict[str, dict[str, float]]
    """All measured values, by task and metric."""


@dataclass(frozen=True, slots=True)
class Metrics:
    """Results of one task at one exit, by metric."""

    values: dict[str, float]
    errors: dict[str, float]
    higher_is_better: dict[str, bool]
    samples: int
    skipped: int = 0


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The table of a family."""

    family: str
    fingerprint: str
    dtype: str
    limit: int | None
    fewshot: int
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the table as JSON values."""
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

    Results are cached in `out` for each question, so an interrupted run resumes. All exits are scored in one pass
    through the trunk; answers are generated for one exit after another.

    Args:
        family: a family with a tokenizer.
        out: folder for the cache.
        tasks: tasks of lm-evaluation-harness and of `AGREEMENT`.
        exits: exits to measure. Default: all.
        data: folder with `TASK/test.jsonl` for tasks in `LOCAL`. Default: the harness downloads its data.
        chats: file of chats for `AGREEMENT`.
        limit: most questions of each task, or of each task in a group. Default: all.
        fewshot: number of examples before a question, from `TASK/train.jsonl`.
        batch_tokens: most tokens in one pass.
        run_code: whether generated code may run, in processes with limits.
        report: called with the progress.

    Raises:
        ConfigError: a task or a file is missing.
    """
    if family.tokenizer is None:
        raise ConfigError(f"{family.checkpoint.folder} has no tokenizer.json, which this command needs")
    chosen = sorted(exits or family.exits)
    names = list(dict.fromkeys(_ALIASES.get(task, task) for task in tasks))
    of_agreement = [name for name in names if name in AGREEMENT]
    if of_agreement and chats is None:
        raise ConfigError(f"task {of_agreement[0]} needs a file of chats: --chats FILE.jsonl")
    out.mkdir(parents=True, exist_ok=True)
    dtype = str(family.model.dtype).removeprefix("torch.")
    measured: dict[str, dict[int, Metrics]] = {}  # by task and exit
    with ResultCache(out / f"known-{family.checkpoint.fingerprint[:12]}-{dtype}.jsonl") as cache:
        if of_harness := [name for name in names if name not in AGREEMENT]:
            loaded = _load_tasks(of_harness, data, out, fewshot=fewshot, run_code=run_code)
            for p in reversed(chosen):
                model = ExitLM(family, p, chosen, cache, batch_tokens=batch_tokens, report=report)
                for name, metrics in _run_harness(model, loaded, of_harness, limit).items():
                    measured.setdefault(name, {})[p] = metrics
        agreement = _Agreement(family, cache, batch_tokens, report)
        for name in of_agreement:
            assert chats is not None
            pairs, skipped = (agreement.generated if name == "agreement" else agreement.given)(chats, limit)
            if not pairs:
                raise ConfigError(
                    f"{chats}: contains no chat that {name} can be measured on"
                    + (f"; {skipped} do not fit the family's context, or have no answer to read" if skipped else "")
                )
            found = agreement.measure(chosen, pairs)
            measured[name] = {p: replace(metrics, skipped=skipped) for p, metrics in found.items()}
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
    is_better = metrics.higher_is_better.get(metric.split(",")[0], True)
    return Column(task, metric, is_better, metrics.samples, metrics.skipped)


def _load_tasks(names: Sequence[str], data: Path | None, out: Path, *, fewshot: int, run_code: bool) -> dict[str, Any]:
    """Load the harness's tasks, with local data for those that have some."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

    if "humaneval" in names and not run_code:
        raise ConfigError("humaneval runs code that the model wrote; allow it with --run-code, best in a container")
    if "humaneval" in names:
        check_limits()
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
            # The harness passes the task list of a group given as a dict on to nested groups, so the group is a file.
            (Path(scratch) / "local.yaml").write_text(
                yaml.safe_dump({"group": _LOCAL_GROUP, "task": members}), encoding="utf-8"
            )
            manager = TaskManager(include_path=scratch, include_defaults=False)
            manager.task_index.update(_task_index())
            for name in names:
                if name not in manager.task_index:
                    known = [*AGREEMENT, *LOCAL, *_ALIASES]
                    raise ConfigError(
                        f"no task {name!r}{did_you_mean(name, known) or f'; there are for instance {sorted(known)}'}"
                    )
            loaded = manager.load([*([_LOCAL_GROUP] if members else []), *(n for n in names if n not in local)])
        except (OSError, ValueError, KeyError, ConnectionError) as error:
            raise ConfigError(f"the data of {', '.join(names)} cannot be read: {error}") from error
    groups = {name: group for name, group in loaded.get("groups", {}).items() if name != _LOCAL_GROUP}
    return {"tasks": {**tasks, **loaded["tasks"]}, "groups": groups}


@cache
def _task_index() -> dict[str, Any]:
    """Return the harness's own tasks. It reads thousands of files to list them, so that is done once a process."""
    from lm_eval.tasks import TaskManager

    index: dict[str, Any] = TaskManager().task_index
    return index


def _run_harness(model: ExitLM, loaded: dict[str, Any], names: Sequence[str], limit: int | None) -> dict[str, Metrics]:
    """Run loaded tasks with one exit, and collect its metrics."""
    from lm_eval.evaluator import evaluate as run

    results = run(model, loaded, limit=limit, bootstrap_iters=100, log_samples=False, confirm_run_unsafe_code=True)
    out = {}
    for name in names:
        raw = results["results"].get(name) or results["groups"][name]
        numbers = {k.removesuffix(",none"): v for k, v in raw.items() if isinstance(v, float | int) and "," in k}
        errors = {k: v for k, v in numbers.items() if "_stderr" in k}
        members = results["group_subtasks"].get(name) or [name]
        out[name] = Metrics(
            values={k: float(v) for k, v in numbers.items() if k not in errors},
            errors={k.replace("_stderr", ""): float(v) for k, v in errors.items()},
            higher_is_better={k: bool(v) for k, v in (results["higher_is_better"].get(name) or {}).items()},
            samples=sum(results["n-samples"][m]["effective"] for m in members if m in results["n-samples"]),
        )
    return out


@dataclass(frozen=True, slots=True)
class _Agreement:
    """Measures agreement with the last exit along answers of chats."""

    family: Family
    cache: ResultCache
    batch_tokens: int
    report: Report

    def generated(self, chats: Path, limit: int | None) -> tuple[list[_Pair], int]:
        """Return the prompts of chats with the last exit's greedy answers of at most 128 tokens.

        The number says how many more chats there are, whose prompts leave no room for such an answer.
        """
        family, most = self.family, 128
        last, longest_prompt = family.exits[-1], family.config.max_positions - most
        read = list(islice(read_prompts(chats, family.tokenizer), limit))
        prompts = [prompt for prompt in read if len(prompt) <= longest_prompt]
        asked = [p for p in prompts if cache_key(last, "answer", p, most) not in self.cache]
        if asked:
            longest = max(map(len, asked)) + most
            given = answers(
                family.model,
                asked,
                max_new_tokens=most,
                max_positions=longest,
                batch=max(1, min(64, len(asked), 8 * self.batch_tokens // longest)),
                eos_token_ids=end_tokens(family.checkpoint, family.tokenizer),
            )
            for done, answer in enumerate(given, 1):
                self.cache[cache_key(last, "answer", list(answer.prompt), most)] = answer.token_ids
                self.cache.flush()
                self.report("the last exit answering", done, len(asked))
        pairs = [(p, list(self.cache[cache_key(last, "answer", p, most)])) for p in prompts]
        return pairs, len(read) - len(prompts)

    def given(self, chats: Path, limit: int | None) -> tuple[list[_Pair], int]:
        """Return the file's own prompts and answers; of plain text all but the first token is the answer.

        The number says how many more chats there are, which have no answer, or one that begins after the end of the
        context. Of other long chats, the part that fits is measured.
        """
        length, long = self.family.config.max_positions, list[Document]()
        read = read_documents(chats, self.family.tokenizer, length=length, too_long=long.append)
        documents = list(islice(read, limit))
        cuts = [(list(d.token_ids), max(1, d.answer)) for d in documents if d.has_answer]
        skipped = len(documents) - len(cuts) + sum(d.has_answer and d.answer >= length for d in long)
        return [(ids[:cut], ids[cut:]) for ids, cut in cuts if cut < len(ids)], skipped

    def measure(self, exits: Sequence[int], pairs: Sequence[_Pair]) -> dict[int, Metrics]:
        """Feed answers to the exits (teacher forcing), and measure agreement with the last exit and perplexity."""
        last, asked = self.family.exits[-1], sorted({*exits, self.family.exits[-1]})
        waiting = [pair for pair in pairs if any(cache_key(p, "agreement", *pair) not in self.cache for p in asked)]
        waiting.sort(key=lambda pair: -len(pair[0]) - len(pair[1]))
        total, done = len(waiting), 0
        while waiting:
            count = max(1, self.batch_tokens // (len(waiting[0][0]) + len(waiting[0][1])))
            batch, waiting = waiting[:count], waiting[count:]
            trees = [Tree((*prompt, *answer[:-1]), ()) for prompt, answer in batch]
            rows = [torch.arange(len(prompt) - 1, len(tree)) for (prompt, _), tree in zip(batch, trees, strict=True)]
            target = torch.tensor([t for _, answer in batch for t in answer], device=self.family.model.device)
            predicted, likely = {}, {}
            for p, logits, _ in exit_logits(self.family.model, asked, trees, rows):
                predicted[p] = logits.argmax(-1)
                likely[p] = logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(-1)
            start = 0
            for pair in batch:
                stop = start + len(pair[1])
                for p in asked:
                    hits = int((predicted[p] == predicted[last])[start:stop].sum())
                    self.cache[cache_key(p, "agreement", *pair)] = hits, float(likely[p][start:stop].sum())
                start = stop
            self.cache.flush()
            done += len(batch)
            self.report("reading answers", done, total)
        tokens = sum(len(answer) for _, answer in pairs)
        out = {}
        for p in exits:
            known = [self.cache[cache_key(p, "agreement", *pair)] for pair in pairs]
            share = sum(hits for hits, _ in known) / tokens
            # Tokens of one answer are not independent, so the standard error is over answers.
            spread = [(hits - share * len(answer)) ** 2 for (hits, _), (_, answer) in zip(known, pairs, strict=True)]
            out[p] = Metrics(
                values={"agreement": share, "perplexity": math.exp(-sum(likely for _, likely in known) / tokens)},
                errors={"agreement": math.sqrt(sum(spread)) / tokens},
                higher_is_better={"agreement": True, "perplexity": False},
                samples=tokens,
            )
        return out
