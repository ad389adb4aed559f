"""Evaluation: the scores of the harness's own Hugging Face model, agreement, resumption, and the report."""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ["TQDM_DISABLE"] = "1"
pytest.importorskip("lm_eval")

from ruyi_flow.bench.engines import as_transformers
from ruyi_flow.errors import ConfigError
from ruyi_flow.evaluation import harness, report, run
from ruyi_flow.evaluation.harness import ExitLM, ResultCache, cache_key
from ruyi_flow.evaluation.run import Evaluation, evaluate
from ruyi_flow.family.every_exit import exit_logits
from ruyi_flow.local import Family, load_family
from ruyi_flow.training.corpus import read_prompts

pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("default")]  # the harness's warnings are its own

TASKS = ["arc_easy", "arc_challenge", "wikitext", "gsm8k"]


@pytest.fixture(scope="module")
def family(spoken: Path) -> Family:
    return load_family(spoken, dtype="float32")


def theirs(family: Family, exit: int, data: Path, out: Path, tasks: list[str] = TASKS, limit: int | None = None) -> Any:
    """Score the harness's own Hugging Face model, with transformers' model of that depth."""
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=as_transformers(family.checkpoint, exit=exit), tokenizer=family.tokenizer, batch_size=3)
    loaded = run._load_tasks(tasks, data, out, fewshot=0, run_code=False)
    return run._run_harness(model, loaded, tasks, limit)


def same(ours: Evaluation, exit: int, expected: Any) -> None:
    row = next(row for row in ours.rows if row.exit == exit)
    for task, metrics in expected.items():
        for metric, value in metrics.values.items():
            found = row.all_values[task][metric]
            if "perplexity" in metric:  # the exponential of a sum of floats in another order
                found, value = math.log(found), math.log(value)
            assert found == value if "acc" in metric or "match" in metric else found == pytest.approx(value, rel=1e-5)


def test_every_exit_scores_as_the_harness_scores_transformers(family: Family, data: Path, tmp_path: Path) -> None:
    ours = evaluate(family, tmp_path / "out", tasks=TASKS, data=data)
    assert [row.exit for row in ours.rows] == [2, 4, 6]
    for exit in family.exits:
        same(ours, exit, theirs(family, exit, data, tmp_path))
    assert {row.all_values["arc_easy"]["acc"] for row in ours.rows} != {0.0}
    assert ours.columns[2].metric == "word_perplexity" and not ours.columns[2].higher_is_better
    assert ours.columns[0].samples == 9


@pytest.mark.slow
@pytest.mark.model
def test_smollm2_scores_as_the_harness_scores_it(smollm2: Path, data: Path, tmp_path: Path) -> None:
    family = load_family(smollm2, dtype="float32")
    ours = evaluate(family, tmp_path / "out", tasks=TASKS[:3], exits=[29], data=data)
    same(ours, 29, theirs(family, 29, data, tmp_path, TASKS[:3]))


def test_contexts_that_do_not_fit_are_cut_as_the_harness_cuts_them(family: Family, tmp_path: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    hf = HFLM(pretrained=as_transformers(family.checkpoint), tokenizer=family.tokenizer, batch_size=1)
    generator = torch.Generator().manual_seed(1)
    long = torch.randint(0, 250, (600,), generator=generator).tolist()
    requests = [
        (("", ""), long[:count], long[a:b]) for count, a, b in [(600, 0, 3), (600, 5, 45), (510, 2, 5), (5, 0, 8)]
    ]
    with ResultCache(tmp_path / "known.jsonl") as found:
        ours = ExitLM(family, 6, [6], found, batch_tokens=600, report=lambda *a: None)
        scored = ours._loglikelihood_tokens(requests)
    for one, other in zip(scored, hf._loglikelihood_tokens(requests, disable_tqdm=True), strict=True):
        assert one[0] == pytest.approx(other[0], rel=1e-5) and bool(one[1]) == other[1]


@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
def test_continuations_of_one_context_are_cut_into_passes(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_tokens: int
) -> None:
    generator = torch.Generator().manual_seed(2)
    context = (5, 6, 7)
    texts = [tuple(torch.randint(0, 250, (n,), generator=generator).tolist()) for n in (1, 40, 1, 25, 60, 2, 40)]
    sizes: list[int] = []
    with ResultCache(tmp_path / "known.jsonl") as found:
        ours = ExitLM(family, 6, [4, 6], found, batch_tokens=batch_tokens, report=lambda *a: None)
        score = ours._score_batch

        def noted(batch: Any) -> None:
            sizes.append(sum(len(t) for t, _ in batch))
            score(batch)

        monkeypatch.setattr(ours, "_score_batch", noted)
        ours._score([(context, text) for text in texts])
        for text in texts:
            for exit in (4, 6):
                logits = family.logits(torch.tensor([[*context, *text]]), exit)[0, len(context) - 1 : -1]
                expected = logits.log_softmax(-1).gather(1, torch.tensor(text)[:, None]).sum()
                assert found[cache_key(exit, "score", context, text)][0] == pytest.approx(float(expected), rel=1e-4)
    assert max(sizes) <= max(batch_tokens, len(context) + 59)


def test_agreement_equals_the_logits_of_whole_sequences(family: Family, chats: Path, tmp_path: Path) -> None:
    ours = evaluate(family, tmp_path, tasks=["agreement", "text_agreement"], chats=chats)
    assert ours.rows[-1].values["agreement"] == 1.0 and ours.rows[-1].values["text_agreement"] == 1.0
    prompts = list(read_prompts(chats, family.tokenizer))
    hits, tokens, likely = 0, 0, 0.0
    for prompt in prompts:
        answer = family.generate(torch.tensor([prompt]), max_new_tokens=128, min_new_tokens=0)[0].tolist()
        whole = torch.tensor([[*prompt, *answer]])
        early, last = (family.logits(whole, exit)[0, len(prompt) - 1 : -1] for exit in (2, 6))
        hits += int((early.argmax(-1) == last.argmax(-1)).sum())
        likely += float(early.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum())
        tokens += len(answer)
    assert ours.rows[0].values["agreement"] == hits / tokens
    perplexity = torch.tensor(-likely / tokens).exp().item()
    assert ours.rows[0].all_values["agreement"]["perplexity"] == pytest.approx(perplexity, rel=1e-4)
    assert ours.columns[0].samples == tokens
    with pytest.raises(ConfigError, match="--chats"):
        evaluate(family, tmp_path, tasks=["agreement"])


def test_chats_that_cannot_be_measured_are_counted(family: Family, chats: Path, tmp_path: Path) -> None:
    long = {"question": "h" * 600, "answer": "yes"}
    file = tmp_path / "chats.jsonl"
    file.write_text(chats.read_text() + json.dumps(long) + "\n")
    ours = evaluate(family, tmp_path, tasks=list(run.AGREEMENT), chats=file)
    assert [column.skipped for column in ours.columns] == [1, 2]  # one of the given chats has no answer to read
    alone = evaluate(family, tmp_path, tasks=list(run.AGREEMENT), chats=chats)
    assert [row.values for row in alone.rows] == [row.values for row in ours.rows]
    assert "text_agreement: 2 chats were left out" in report.write(ours, tmp_path)[0].read_text()
    file.write_text(json.dumps(long) + "\n")
    for task in run.AGREEMENT:
        with pytest.raises(ConfigError, match=f"contains no chat that {task} can be measured on; 1 do not fit"):
            evaluate(family, tmp_path, tasks=[task], chats=file)


def test_cached_results_are_not_computed_again(
    family: Family, data: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = ["arc_easy", "gsm8k", "agreement"]
    first = evaluate(family, tmp_path, tasks=tasks, data=data, chats=chats)
    (known,) = tmp_path.glob("known-*.jsonl")
    lines = known.read_text().splitlines()
    half = lines[: len(lines) // 2] + [lines[len(lines) // 2][:20]]  # like after a kill
    known.write_text("\n".join(half))
    asked: list[int] = []

    def counted(*args: Any) -> Any:
        asked.append(len(args[2]))
        return exit_logits(*args)

    monkeypatch.setattr(harness, "exit_logits", counted)
    monkeypatch.setattr(run, "exit_logits", counted)
    again = evaluate(family, tmp_path, tasks=tasks, data=data, chats=chats)
    for one, other in zip(first.rows, again.rows, strict=True):
        for task, values in one.all_values.items():
            assert other.all_values[task] == pytest.approx(values, rel=1e-6)
    asked.clear()
    answers: list[Any] = []

    def counted_answers(*given: Any, **options: Any) -> Any:
        answers.append(given)
        return ()

    monkeypatch.setattr(harness, "answers", counted_answers)
    evaluate(family, tmp_path, tasks=tasks, data=data, chats=chats)
    assert not asked and not answers


def test_answers_end_at_a_tasks_stop_text(family: Family, tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance

    def request(settings: dict[str, Any]) -> Instance:
        return Instance("generate_until", {}, ("What is it?", settings), 0)

    with ResultCache(tmp_path / "known.jsonl") as found:
        model = ExitLM(family, 4, [4], found, batch_tokens=256, report=lambda *a: None)
        (whole,) = model.generate_until([request({"until": [], "max_gen_toks": 60})])
        assert len(whole) > 20
        stop = whole[7:9]
        (short,) = model.generate_until([request({"until": [stop], "max_gen_toks": 60})])
        assert short == whole.split(stop)[0]
        assert cache_key(4, "text", "What is it?", {"until": [stop], "max_gen_toks": 60}) in found


def test_fewshot_examples_come_from_the_train_file(family: Family, data: Path, tmp_path: Path) -> None:
    none = evaluate(family, tmp_path, tasks=["arc_easy"], data=data, exits=[6])
    some = evaluate(family, tmp_path, tasks=["arc_easy"], data=data, exits=[6], fewshot=2)
    assert len((next(tmp_path.glob("known-*"))).read_text().splitlines()) == 2 * sum(
        len(json.loads(line)["choices"]["text"])
        for line in (data / "arc_easy/test.jsonl").read_text("utf-8").strip().split("\n")
    )
    assert none.fewshot == 0 and some.fewshot == 2
    with pytest.raises(ConfigError, match=r"gsm8k.train.jsonl: cannot be read"):
        evaluate(family, tmp_path, tasks=["gsm8k"], data=data, fewshot=1)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["arc_esy"], "no task 'arc_esy'; did you mean 'arc_easy'"),
        (["mmlu"], "mmlu/test.jsonl: cannot be read"),
        (["humaneval"], "--run-code"),
    ],
)
def test_mistakes_are_reported(family: Family, data: Path, tmp_path: Path, tasks: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate(family, tmp_path, tasks=tasks, data=data)


def test_humaneval_counts_what_passes(
    family: Family, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        ExitLM, "generate_until", lambda self, requests: ["    return 1\n" if self.exit == 6 else "    x("]
    )
    ours = evaluate(family, tmp_path, tasks=["humaneval"], data=data, run_code=True)
    assert [row.values["humaneval"] for row in ours.rows] == [0.0, 0.0, 1.0]


def test_the_report_has_a_table_json_and_a_plot(family: Family, data: Path, tmp_path: Path) -> None:
    ours = evaluate(family, tmp_path, tasks=["arc_easy", "wikitext2"], data=data, limit=4)
    table, plain, plot = report.write(ours, tmp_path)
    lines = table.read_text().splitlines()
    assert lines[0].startswith("spoken (") and "4 questions of each task" in lines[0]
    assert lines[2] == "| exit | layers | parameters | arc_easy acc ↑ | wikitext word perplexity ↓ |"
    assert len(lines) == 4 + 3 and lines[4].startswith("| 2 | 3 | 0M | ")
    assert json.loads(plain.read_text()) == json.loads(json.dumps(dataclasses.asdict(ours)))
    assert plot.read_bytes().startswith(b"\x89PNG")
