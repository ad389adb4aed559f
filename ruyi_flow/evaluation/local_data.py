"""Tasks of lm-evaluation-harness that read their data from a local folder.

The folder contains `TASK/test.jsonl` (or `test.txt`) and, for few-shot examples, `TASK/train.jsonl`. Prompts and
scoring stay the harness's; only the source of the rows changes.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ruyi_flow.errors import ConfigError

__all__ = ["LOCAL", "overrides"]

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Source:
    """The conversion of local files to the data set that the harness's task expects."""

    folder: str
    config: str | Callable[[Row], str]
    """Name of the data set's configuration, or a function that returns a row's."""
    row: Callable[[Row], Row] = lambda row: row
    """Converts a local row to one of the data set."""
    group: bool = False
    """Whether the task is a group, with one task for each configuration."""


def _cmmlu(row: Row) -> Row:
    return {
        "Question": row["question"],
        **dict(zip("ABCD", row["choices"], strict=True)),
        "Answer": "ABCD"[row["answer"]],
    }


LOCAL = {
    "arc_easy": _Source("arc_easy", "ARC-Easy"),
    "arc_challenge": _Source("arc_challenge", "ARC-Challenge"),
    "mmlu": _Source("mmlu", lambda row: str(row["subject"]), group=True),
    "cmmlu": _Source("cmmlu", lambda row: str(row["subject"]), _cmmlu, group=True),
    "bbh": _Source("bbh", lambda row: str(row["task"]), group=True),
    "bbh_zeroshot": _Source("bbh", lambda row: str(row["task"]), group=True),
    "gsm8k": _Source("gsm8k", "main"),
    "humaneval": _Source("humaneval", "openai_humaneval"),
    "wikitext": _Source("wikitext2", "wikitext-2-raw-v1"),
}
"""Tasks of the harness that can be read from a local folder."""


def overrides(task: str, data: Path, scratch: Path, *, fewshot: int) -> Row:
    """Return the settings that make one of the harness's tasks, or groups, read local rows.

    Args:
        task: one of `LOCAL`.
        data: the folder with `TASK/test.jsonl`.
        scratch: folder to write the rows to, as the harness expects them.
        fewshot: number of examples before each question.

    Raises:
        ConfigError: a file is missing or has an invalid line.
    """
    source = LOCAL[task]
    splits = {"test": _rows(data / source.folder, "test")}
    if fewshot:
        splits["train"] = _rows(data / source.folder, "train")
    folder = scratch / task
    configs: dict[str, list[dict[str, str]]] = defaultdict(list)
    for split, rows in splits.items():
        parted: dict[str, list[Row]] = defaultdict(list)
        for row in rows:
            parted[source.config if isinstance(source.config, str) else source.config(row)].append(source.row(row))
        for name, part in parted.items():
            file = folder / name / f"{split}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
            configs[name].append({"split": split, "path": f"{name}/{split}.jsonl"})
    card = yaml.safe_dump({"configs": [{"config_name": n, "data_files": files} for n, files in configs.items()]})
    (folder / "README.md").write_text(f"---\n{card}---\n", encoding="utf-8")
    changes: Row = {
        "group" if source.group else "task": task,
        "dataset_path": str(folder),
        "dataset_kwargs": {"cache_dir": str(scratch / "cache")},
        "training_split": "train" if fewshot else None,
        "validation_split": None,
        "fewshot_split": "train" if fewshot else "test",  # the harness reads it even without examples
    }
    if not task.startswith("bbh"):  # its examples are part of the task
        changes["num_fewshot"] = fewshot
    return changes


def _rows(folder: Path, split: str) -> list[Row]:
    text = folder / f"{split}.txt"
    if text.exists():
        return [{"page": page} for page in _articles(text.read_text(encoding="utf-8"))]
    file = folder / f"{split}.jsonl"
    try:
        lines = file.read_text(encoding="utf-8").rstrip("\n").split("\n")  # splitlines would split JSON strings
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ConfigError(f"{file}, line {number}: not JSON: {error}") from None
    if not rows:
        raise ConfigError(f"{file}: the file contains no rows")
    return rows


def _articles(text: str) -> Iterator[str]:
    """Split WikiText into articles; each begins with a heading of the first level, ` = Title = `."""
    starts = [m.start() for m in re.finditer(r"^ = [^=\n].*[^=\n] = $", text, re.MULTILINE)]
    if not starts:
        yield text
    for start, stop in zip(starts, [*starts[1:], len(text)], strict=True):
        yield text[start:stop]
