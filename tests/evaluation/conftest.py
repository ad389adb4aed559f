"""Small benchmarks in the layout that `--data` expects."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

WORDS = "water light stone river bird seed iron cloud salt grass wolf lamp".split()


def _lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _arc(generator: random.Random, choices: int) -> dict[str, Any]:
    # A line separator within a string, which JSON allows: a reader must not take it for the end of a row.
    question = "Which\u2028of these " + " ".join(generator.choices(WORDS, k=generator.randrange(2, 12))) + "?"
    texts = [" ".join(generator.choices(WORDS, k=generator.randrange(1, 4))) for _ in range(choices)]
    labels = list("ABCDE"[:choices])
    return {"question": question, "choices": {"text": texts, "label": labels}, "answerKey": generator.choice(labels)}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions with three to five choices, two articles, sums, and programs to complete."""
    folder, generator = tmp_path_factory.mktemp("data"), random.Random(7)
    _lines(folder / "arc_easy/test.jsonl", [_arc(generator, generator.randrange(3, 6)) for _ in range(9)])
    _lines(folder / "arc_challenge/test.jsonl", [_arc(generator, 4) for _ in range(3)])
    (folder / "arc_easy/train.jsonl").write_text((folder / "arc_challenge/test.jsonl").read_text())
    sums = [{"question": f"{a} and {a + 1}?", "answer": f"It is <<{a}>>\n#### {2 * a + 1}"} for a in range(3)]
    _lines(folder / "gsm8k/test.jsonl", sums)
    (folder / "wikitext2").mkdir()
    texts = [" ".join(generator.choices(WORDS, k=count)) for count in (30, 150)]
    articles = "".join(f" = Title {i} = \n \n {text} \n\n = = Part = = \n {text} \n" for i, text in enumerate(texts))
    (folder / "wikitext2/test.txt").write_text(articles)
    program = {"task_id": "x/0", "prompt": "def f():\n", "test": "def check(f):\n    f()\n", "entry_point": "f"}
    _lines(folder / "humaneval/test.jsonl", [program])
    return folder


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chats of every kind that can be read."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    turns = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "two"}]
    rows = [{"messages": turns}, {"prompt": "Say three."}, {"question": "four?", "answer": "five or six"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
