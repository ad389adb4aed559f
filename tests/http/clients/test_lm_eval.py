"""lm-evaluation-harness's models for OpenAI's API score the server as `ruyi-flow eval` scores the same exit."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ["TQDM_DISABLE"] = "1"
pytest.importorskip("lm_eval")

from lm_eval._cli.harness import HarnessCLI
from lm_eval.api.registry import get_model
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

from ruyi_flow.evaluation.harness import ExitLM, ResultCache
from ruyi_flow.local import Family, load_family
from ruyi_flow.testing import cut_topology, tiny_family
from tests.families import MIN_VOCAB, add_tokenizer
from tests.http.clients.guide import ADDRESS, sections
from tests.http.clients.served import Served, serve_topology

pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("default")]  # the harness's warnings are its own

WORDS = "water light stone river bird seed iron cloud salt grass wolf lamp".split()

TASKS: dict[str, dict[str, Any]] = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}],
    },
    "answers": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["??", "zz"], "max_gen_toks": 48, "temperature": 0},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}
"""Log-likelihoods of choices, those of whole texts, and answers that are generated."""

CONTEXT = 4096


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family with room for a whole article, whose only end token is the tokenizer's, as the harness assumes."""
    folder = tmp_path_factory.mktemp("talker") / "talker"
    return add_tokenizer(
        tiny_family(folder, vocab_size=MIN_VOCAB, eos_token_id=256, max_position_embeddings=CONTEXT, seed=5)
    )


@pytest.fixture(scope="module")
def family(talker: Path) -> Family:
    return load_family(talker, dtype="float32")


@pytest.fixture(scope="module")
def served(talker: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    limits = {"max_positions": 65536, "grace_s": 1}
    topology = cut_topology(talker, [[2], [4], [6]], limits=limits)
    with serve_topology(topology, tmp_path_factory.mktemp("served")) as running:
        yield running


@pytest.fixture(scope="module")
def scored(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Scored:
    """The tasks, over documents on the disk."""
    folder, generator = tmp_path_factory.mktemp("scored"), random.Random(7)
    rows = [
        {
            "question": f"Which of {' '.join(generator.choices(WORDS, k=4))}?",
            "choices": [" ".join(generator.choices(WORDS, k=generator.randrange(1, 4))) for _ in range(3)],
            "text": " ".join(generator.choices(WORDS, k=100)),
        }
        for _ in range(3)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    where = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder)},
        "test_split": "test",
    }
    loaded = {name: ConfigurableTask(config={"task": name, **where, **config}) for name, config in TASKS.items()}
    return Scored(family, loaded, folder)


class Scored:
    """What models answer to each request of the tasks.

    Args:
        family: the family whose exits answer.
        loaded: the tasks, by name.
        out: a folder for caches.
    """

    def __init__(self, family: Family, loaded: dict[str, Any], out: Path) -> None:
        self.family, self.loaded, self.out = family, loaded, out

    def by(self, model: Any, tasks: Sequence[str] = tuple(TASKS), **options: Any) -> dict[str, list[Any]]:
        """Return what a model answers, by task, in the order of the documents."""
        chosen = {"tasks": {name: self.loaded[name] for name in tasks}, "groups": {}}
        found = evaluate(model, chosen, bootstrap_iters=0, log_samples=True, **options)
        ordered = {name: sorted(rows, key=lambda row: row["doc_id"]) for name, rows in found["samples"].items()}
        assert all(len(rows) >= 2 for rows in ordered.values()) and ordered.keys() == set(tasks)
        return {name: [row["resps"] for row in rows] for name, rows in ordered.items()}

    def by_us(self, exit: int, tasks: Sequence[str] = tuple(TASKS), **options: Any) -> dict[str, list[Any]]:
        """Return what `ruyi-flow eval` finds for an exit."""
        with ResultCache(self.out / f"known-{exit}.jsonl") as cache:
            return self.by(exit_model(self.family, exit, cache), tasks, **options)


def exit_model(family: Family, exit: int, cache: ResultCache) -> ExitLM:
    """Return the model of `ruyi-flow eval` for an exit."""
    return ExitLM(family, exit, [exit], cache, batch_tokens=4000, report=lambda *a: None)


def same(name: str, ours: Any, theirs: Any) -> None:
    """One task's answers: equal texts and greedy flags, and log-likelihoods within rounding."""
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        while isinstance(one, list | tuple) and len(one) == 1:
            [one], [other] = one, other
        if isinstance(one, str):
            assert one == other
        elif isinstance(one, float):
            assert other == pytest.approx(one, abs=1e-3, rel=1e-6)
        elif isinstance(one[0], list | tuple):
            same(name, one, other)
        else:
            likelihood, is_greedy = one
            assert (other[0], bool(other[1])) == (pytest.approx(likelihood, abs=1e-3), bool(is_greedy)), name


@pytest.mark.parametrize(("exit", "batch", "concurrent"), [(2, 1, 1), (4, 1, 4), (6, 8, 1)])
def test_completions_score_as_the_exit_does(
    scored: Scored, served: Served, exit: int, batch: int, concurrent: int
) -> None:
    theirs = scored.by(completions(served, exit, batch_size=batch, num_concurrent=concurrent))
    ours = scored.by_us(exit)
    for name in TASKS:
        same(name, ours[name], theirs[name])
    assert any(text for [[text]] in theirs["answers"]), "every answer is empty"


def test_tokens_that_are_greedy_are_known_as_such(family: Family, served: Served, tmp_path: Path) -> None:
    """What a model would say itself is the one continuation that must be greedy."""
    context = tuple(b"What is this?")
    answer = family.generate(torch.tensor([context]), exit=4, max_new_tokens=6, min_new_tokens=6)[0].tolist()
    wrong = [*answer[:3], (answer[3] + 1) % 200, *answer[4:]]
    requests = [(("", ""), list(context), answer), (("", ""), list(context), wrong)]
    theirs = completions(served, 4)._loglikelihood_tokens(requests)
    with ResultCache(tmp_path / "known.jsonl") as cache:
        ours = exit_model(family, 4, cache)._loglikelihood_tokens(requests)
    assert [bool(greedy) for _, greedy in theirs] == [bool(greedy) for _, greedy in ours] == [True, False]
    assert [likely for likely, _ in theirs] == pytest.approx([likely for likely, _ in ours], abs=1e-3)


@pytest.mark.parametrize("concurrent", [1, 3])
def test_chats_are_answered_as_the_exit_answers(scored: Scored, served: Served, concurrent: int) -> None:
    api = LocalChatCompletion(
        model="talker@exit-4",
        base_url=f"{served.base_url}/chat/completions",
        num_concurrent=concurrent,
        max_retries=1,
        eos_string="<|im_end|>",
    )
    theirs = scored.by(api, ["answers"], apply_chat_template=True)
    same("answers", scored.by_us(4, ["answers"], apply_chat_template=True)["answers"], theirs["answers"])
    assert any(text for [[text]] in theirs["answers"]), "every answer is empty"


@pytest.mark.parametrize("number", [0, 1])
def test_the_commands_of_the_guide(
    scored: Scored, served: Served, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The harness reads the guide's command, but for the tasks: those of the guide are on the hub."""
    command = sections("bash")["lm-evaluation-harness"][number].replace("\\\n", " ")
    for ours, here in (
        (ADDRESS, served.url),
        ("smollm2@exit-11", "talker@exit-4"),
        ("FOLDER", str(served.cluster.topology.family)),
    ):
        command = command.replace(ours, here)
    program, *words = shlex.split(command)
    assert program == "lm_eval" and re.search(r"--tasks (arc_easy|gsm8k) --limit 20", command)
    monkeypatch.setattr(sys, "argv", ["lm-eval", *words])
    given = HarnessCLI().parse_args()
    model = get_model(given.model).create_from_arg_obj(dict(given.model_args))
    tasks = ["choices", "answers"] if number == 0 else ["answers"]
    chat = {"apply_chat_template": True} if getattr(given, "apply_chat_template", False) else {}
    assert bool(chat) == (number == 1)
    theirs, ours_ = scored.by(model, tasks, **chat), scored.by_us(4, tasks, **chat)
    for name in tasks:
        same(name, ours_[name], theirs[name])


def completions(served: Served, exit: int, **options: int) -> LocalCompletionsAPI:
    """Return the harness's model of an exit behind the server."""
    return LocalCompletionsAPI(
        model=f"talker@exit-{exit}",
        base_url=f"{served.base_url}/completions",
        tokenizer_backend="huggingface",
        tokenizer=str(served.cluster.topology.family),
        max_length=CONTEXT,
        max_retries=1,
        **options,
    )
