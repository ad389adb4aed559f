"""lm-evaluation-harness's models for OpenAI's API score the server as `ruyi-flow eval` scores the same exit."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ["TQDM_DISABLE"] = "1"
pytest.importorskip("lm_eval")

from lm_eval.evaluator import evaluate
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

from ruyi_flow.evaluation import run
from ruyi_flow.evaluation.harness import ExitLM, ResultCache
from ruyi_flow.local import Family, load_family
from ruyi_flow.testing import cut_topology, tiny_family
from tests.evaluation.conftest import data  # noqa: F401 (a fixture: small benchmarks on the disk)
from tests.families import MIN_VOCAB, add_tokenizer
from tests.http.clients.served import Served, serve_topology

pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("default")]  # the harness's warnings are its own

TASKS = ["arc_easy", "wikitext", "gsm8k"]
"""Choices (log-likelihoods), whole texts (rolling log-likelihoods), and answers that are generated."""

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
def scored(family: Family, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Scored:  # noqa: F811
    """Scores of the tasks, which are loaded once."""
    out = tmp_path_factory.mktemp("scored")
    loaded = run._load_tasks(TASKS, data, out, fewshot=0, run_code=False)["tasks"]
    return Scored(family, loaded, out)


class Scored:
    """What models answer to each request of the tasks.

    Args:
        family: the family whose exits answer.
        loaded: the tasks, by name.
        out: a folder for caches.
    """

    def __init__(self, family: Family, loaded: dict[str, Any], out: Path) -> None:
        self.family, self.loaded, self.out = family, loaded, out

    def by(self, model: Any, tasks: Sequence[str] = TASKS, **options: Any) -> dict[str, list[Any]]:
        """Return what a model answers, by task, in the order of the documents."""
        chosen = {"tasks": {name: self.loaded[name] for name in tasks}, "groups": {}}
        found = evaluate(model, chosen, limit=3, bootstrap_iters=0, log_samples=True, **options)
        ordered = {name: sorted(rows, key=lambda row: row["doc_id"]) for name, rows in found["samples"].items()}
        assert all(len(rows) >= 2 for rows in ordered.values()) and ordered.keys() == set(tasks)
        return {name: [row["resps"] for row in rows] for name, rows in ordered.items()}

    def by_us(self, exit: int, tasks: Sequence[str] = TASKS, **options: Any) -> dict[str, list[Any]]:
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
    assert any(text for [[text]] in theirs["gsm8k"]), "every answer is empty"


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
    theirs = scored.by(api, ["gsm8k"], apply_chat_template=True)
    same("gsm8k", scored.by_us(4, ["gsm8k"], apply_chat_template=True)["gsm8k"], theirs["gsm8k"])
    assert any(text for [[text]] in theirs["gsm8k"]), "every answer is empty"


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
