"""Traces: their contents, resumption after a kill, and refusal of other files."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch

from ruyi_flow import cli
from ruyi_flow.calibration.trace import Scorer, Trace, Writer, read_trace
from ruyi_flow.errors import ConfigError
from ruyi_flow.evaluation import tracing
from ruyi_flow.evaluation.scorers import Question, read_questions, score_number
from ruyi_flow.evaluation.tracing import TEMPERATURES, record_trace
from ruyi_flow.local import Family, load_family
from ruyi_flow.routing.confidence import Curve, Scale, Score
from ruyi_flow.routing.policy import Policy, Routing
from ruyi_flow.training.distill import answers
from tests.conftest import Command, confidence


@pytest.fixture(scope="module")
def family(spoken: Path) -> Family:
    return load_family(spoken, dtype="float32")


@pytest.fixture(scope="module")
def prompts(family: Family, chats: Path) -> list[Question]:
    return [*read_questions(chats, family.tokenizer, Scorer.AGREEMENT), Question((7, 8, 9, 10)), Question((11,))]


def test_a_trace_equals_the_logits_of_whole_sequences(family: Family, prompts: list[Question], tmp_path: Path) -> None:
    record_trace(family, prompts, tmp_path / "t.msgpack", max_new_tokens=20, batch=2)
    header, records = read_trace(tmp_path / "t.msgpack")
    assert header.exits == (2, 4, 6) and header.family == family.checkpoint.fingerprint
    assert sorted(r.number for r in records) == list(range(len(prompts)))
    for made in records:
        prompt = list(prompts[made.number].prompt)
        expected = family.generate(torch.tensor([prompt]), max_new_tokens=20, min_new_tokens=0)[0].tolist()
        assert made.answer.tolist() == expected and made.prompt_tokens == len(prompt)
        whole = torch.tensor([[*prompt, *expected]])
        for p, found in made.exits.items():
            logits = family.logits(whole, p)[0]
            asked = logits[len(prompt) - 1 : -1]
            assert found.tokens.tolist() == asked.argmax(-1).tolist()
            for t, temperature in enumerate(TEMPERATURES):
                chances = (asked / temperature).softmax(-1)
                two = chances.topk(2, -1).values
                entropy = torch.distributions.Categorical(chances).entropy()
                scores = {"max_probability": two[:, 0], "margin": two[:, 0] - two[:, 1], "negative_entropy": -entropy}
                for s, name in enumerate(header.scores):
                    assert torch.tensor(found.scores[:, s, t]).allclose(scores[name], atol=2e-5)
            before = logits[: len(prompt) - 1].log_softmax(-1)[-64:]
            loss = (
                -before.gather(1, torch.tensor(prompt[1:][-64:])[:, None]).mean()
                if len(prompt) > 1
                else torch.zeros(())
            )
            assert found.prompt_loss == pytest.approx(float(loss), abs=1e-4)
    trace = Trace.load(tmp_path / "t.msgpack")
    assert len(trace.prompt) == len(trace.agrees[2]) == sum(len(r.answer) for r in records)
    some = trace.select([1, 3])
    assert np.array_equal(some.scores[4], trace.scores[4][np.isin(trace.prompt, [1, 3])])


def test_a_trace_has_the_probes_scores(five: Path, tmp_path: Path) -> None:
    family = load_family(five, dtype="float32")
    record_trace(family, [Question((7, 8, 9, 10)), Question((11,))], tmp_path / "t", max_new_tokens=6)
    header, records = read_trace(tmp_path / "t")
    assert header.scores == tuple(Score)
    probe = header.scores.index("probe")
    for made in records:
        prompt = [[7, 8, 9, 10], [11]][made.number]
        for p in family.exits[:-1]:
            for t, temperature in enumerate(TEMPERATURES):
                policy = Policy.resolve(
                    Routing(scale=Scale(Score.PROBE, {p: Curve(temperature, (0.0, 1.0), (0.0, 1.0))})), family.exits
                )
                for i, found in enumerate(made.exits[p].scores[:, probe, t].tolist()):
                    ids = [*prompt, *made.answer[:i].tolist()]
                    logits = family.logits(torch.tensor([ids]), p)[0, -1]
                    assert found == pytest.approx(confidence(family, policy, p, ids, logits), abs=2e-5)


def test_a_scored_trace_has_every_exits_own_answer(family: Family, tmp_path: Path) -> None:
    prompt = (7, 8, 9, 10)
    own = {
        p: family.generate(torch.tensor([prompt]), exit=p, max_new_tokens=12, min_new_tokens=0)[0].tolist()
        for p in (2, 4, 6)
    }
    text = family.tokenizer.decode(own[4], skip_special_tokens=True)
    asked = [Question(prompt, f"{text} 7")]
    record_trace(family, asked, tmp_path / "t", scorer=Scorer.NUMBER, max_new_tokens=12)
    header, (made,) = read_trace(tmp_path / "t")
    assert header.scorer == "number" and header.layer_flops == family.config.layer_flops(0)
    for p, found in made.exits.items():
        assert found.own is not None and len(found.own.scores) == len(own[p])
        logits = family.logits(torch.tensor([[*prompt, *own[p]]]), p)[0, len(prompt) - 1 : -1]
        said = torch.tensor(found.own.scores[:, 0, TEMPERATURES.index(1.0)].copy())
        assert said.allclose(logits.softmax(-1).amax(-1), atol=2e-5)
        assert found.own.right == score_number(family.tokenizer.decode(own[p], skip_special_tokens=True), f"{text} 7")


def test_a_choice_is_the_most_probable_option(family: Family, tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    item = {
        "question": "Which?",
        "choices": {"text": ["this one", "that", "neither of them"], "label": ["A", "B", "C"]},
    }
    file.write_text(json.dumps(item | {"answerKey": "B"}) + "\n")
    (asked,) = read_questions(file, family.tokenizer, Scorer.CHOICE)
    assert family.tokenizer.decode(asked.options[2]) == " neither of them" and asked.right == 1
    record_trace(family, [asked], tmp_path / "t", scorer=Scorer.CHOICE)
    header, (made,) = read_trace(tmp_path / "t")
    for p, found in made.exits.items():
        likely = []
        for option in asked.options:
            whole = family.logits(torch.tensor([[*asked.prompt, *option]]), p)[0].log_softmax(-1)
            likely.append(sum(float(whole[len(asked.prompt) + i - 1, t]) for i, t in enumerate(option)))
        assert found.tokens.tolist() == [int(np.argmax(likely))]
        assert found.own is not None and found.own.right == float(np.argmax(likely) == 1)
        chances = torch.tensor(likely).softmax(-1)
        assert found.scores[0, 0, TEMPERATURES.index(1.0)] == pytest.approx(float(chances.max()), abs=1e-4)
    assert Trace.load(tmp_path / "t").right == {p: e.own.right for p, e in made.exits.items() if e.own}


@pytest.mark.parametrize("scorer", [Scorer.AGREEMENT, Scorer.NUMBER])
def test_a_record_is_written_when_its_answers_end(
    family: Family, prompts: list[Question], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scorer: Scorer
) -> None:
    ended = 0

    def counted(*given: Any, **options: Any) -> Iterator[Any]:
        nonlocal ended
        for answer in answers(*given, **options):
            ended += 1
            yield answer

    def report(done: int, total: int) -> None:
        told.append((done, ended))
        if done:
            assert len(read_trace(tmp_path / "t")[1]) == done

    told: list[tuple[int, int]] = []
    monkeypatch.setattr(tracing, "answers", counted)
    record_trace(family, prompts, tmp_path / "t", scorer=scorer, max_new_tokens=12, report=report)
    exits = 3 if scorer is Scorer.NUMBER else 1
    assert [done for done, _ in told] == list(range(len(prompts) + 1))
    assert told[1][1] < exits * len(prompts) and told[-1][1] == exits * len(prompts)


def test_nothing_is_written_before_the_first_answer(family: Family, prompts: list[Question], tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record_trace(family, prompts, tmp_path / "t", max_new_tokens=12, report=interrupt)
    assert not (tmp_path / "t").exists()
    record_trace(family, prompts, tmp_path / "t", max_new_tokens=4)
    assert len(read_trace(tmp_path / "t")[1]) == len(prompts)


def test_a_trace_names_its_weight_format(even: Path, prompts: list[Question], tmp_path: Path) -> None:
    record_trace(load_family(even, dtype="float32"), prompts, tmp_path / "wide", max_new_tokens=4)
    record_trace(load_family(even, dtype="float32", weights="int8"), prompts, tmp_path / "few", max_new_tokens=4)
    assert [read_trace(tmp_path / name)[0].dtype for name in ("wide", "few")] == ["float32", "float32, int8 weights"]
    with pytest.raises(ConfigError, match="they cannot be combined"):
        Trace.load(tmp_path / "wide", tmp_path / "few")


@pytest.mark.parametrize(
    ("said", "reference", "right"),
    [("so 1,200.", "#### 1200", 1.0), ("12 and 13", "12", 0.0), ("-3.5", "-3.50", 1.0), ("none", "3", 0.0)],
)
def test_a_number_is_compared_by_value(said: str, reference: str, right: float) -> None:
    assert score_number(said, reference) == right


def test_a_reference_without_a_number_is_refused(family: Family, tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text('{"question": "How many?", "answer": "few"}\n')
    with pytest.raises(ConfigError, match="line 1: .*no number to compare with"):
        list(read_questions(file, family.tokenizer, Scorer.NUMBER))


def test_an_empty_choice_is_refused(tmp_path: Path) -> None:
    class Stripping:
        """A byte tokenizer that ignores spaces at the end."""

        def encode(self, text: str) -> list[int]:
            return list(text.rstrip().encode())

    file = tmp_path / "q.jsonl"
    choices = {"text": ["this", ""], "label": ["A", "B"]}
    file.write_text(json.dumps({"question": "Which?", "choices": choices, "answerKey": "A"}) + "\n")
    with pytest.raises(ConfigError, match="one of its choices is empty"):
        list(read_questions(file, Stripping(), Scorer.CHOICE))


@pytest.mark.parametrize(
    ("scorer", "line", "message"),
    [
        (Scorer.AGREEMENT, "hello", 'expected {"messages": .* there is hello'),
        (Scorer.AGREEMENT, "", "there is an empty line"),
        (Scorer.AGREEMENT, '{"promt": "x"}', 'expected .*{"prompt": …} or .* there is {"promt": "x"}'),
        (Scorer.AGREEMENT, '["x"]', 'there is ."x".$'),
        (Scorer.AGREEMENT, '{"prompt": 5}', 'there is {"prompt": 5}'),
        (Scorer.AGREEMENT, '{"promt": "%s"}' % ("x" * 200), "there is .{79}…$"),
        (Scorer.CHOICE, '{"prompt": "x"}', 'expected {"question": …, "choices": '),
        (
            Scorer.CHOICE,
            '{"question": "?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "C"}',
            "its \"answerKey\" is 'C'; it must be one of its labels .'A', 'B'., one for each choice .2.",
        ),
    ],
)
def test_an_invalid_line_is_reported_with_the_expected_format(
    family: Family, tmp_path: Path, scorer: Scorer, line: str, message: str
) -> None:
    file = tmp_path / "q.jsonl"
    good = '{"question": "?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}'
    file.write_text(f"{good}\n{line}\n")
    with pytest.raises(ConfigError, match=f"q.jsonl, line 2: .*{message}"):
        list(read_questions(file, family.tokenizer, scorer))


def test_a_trace_that_was_cut_off_is_resumed(family: Family, prompts: list[Question], tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    record_trace(family, prompts, whole, max_new_tokens=12, batch=1)
    broken.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * 0.6)])
    told: list[int] = []
    record_trace(family, prompts, broken, max_new_tokens=12, batch=1, report=lambda done, total: told.append(done))
    assert 0 < told[0] < len(prompts) and told[-1] == len(prompts)
    assert broken.read_bytes() == whole.read_bytes()
    with pytest.raises(ConfigError, match="was recorded with another max_new_tokens; remove it"):
        record_trace(family, prompts, whole, max_new_tokens=13)
    broken.write_bytes(b"")
    record_trace(family, prompts, broken, max_new_tokens=12, batch=1)
    assert broken.read_bytes() == whole.read_bytes()


def test_a_trace_can_have_more_prompts_later_and_none_twice(
    family: Family, prompts: list[Question], tmp_path: Path
) -> None:
    whole, grown = tmp_path / "whole", tmp_path / "grown"
    record_trace(family, prompts, whole, max_new_tokens=12, batch=1)
    record_trace(family, [prompts[0], prompts[1], prompts[0]], grown, max_new_tokens=12, batch=1)
    assert len(read_trace(grown)[1]) == 2
    record_trace(family, prompts, grown, max_new_tokens=12, batch=1)
    assert grown.read_bytes() == whole.read_bytes()
    record_trace(family, prompts[1:], tmp_path / "again", max_new_tokens=12)
    both = Trace.load(tmp_path / "again", whole)
    assert len(both.records) == len({r.prompt for r in both.records}) == len(prompts)


def test_a_trace_is_resumed_by_the_same_family_with_another_name(
    family: Family, prompts: list[Question], tmp_path: Path
) -> None:
    path = tmp_path / "t"
    record_trace(family, prompts[:2], path, max_new_tokens=8)
    header, _ = read_trace(path)
    with Writer(path, replace(header, name="renamed")) as writer:
        assert len(writer.done) == 2
    with pytest.raises(ConfigError, match="another family;"):
        Writer(path, replace(header, name="renamed", family="other"))


def test_a_record_whose_parts_differ_in_length_is_damaged(
    family: Family, prompts: list[Question], tmp_path: Path
) -> None:
    record_trace(family, prompts[:1], tmp_path / "a", max_new_tokens=8)
    header, (record,) = read_trace(tmp_path / "a")
    for change in ("tokens", "scores"):
        short = replace(record.exits[2], **{change: getattr(record.exits[2], change)[:-1]})
        with Writer(tmp_path / change, header) as writer:
            writer.add(replace(record, exits={**record.exits, 2: short}))
        with pytest.raises(ConfigError, match="damaged after"):
            read_trace(tmp_path / change)


def test_traces_of_one_kind_are_combined(family: Family, prompts: list[Question], tmp_path: Path) -> None:
    record_trace(family, prompts[:3], tmp_path / "a", max_new_tokens=8)
    record_trace(family, prompts[3:], tmp_path / "b", max_new_tokens=12)
    record_trace(family, prompts, tmp_path / "c", scorer=Scorer.NUMBER, max_new_tokens=8)
    both = Trace.load(tmp_path / "a", tmp_path / "b")
    assert len(both.records) == len(prompts) and both.header.max_new_tokens == 12
    assert both.prompt.max() == len(prompts) - 1
    with pytest.raises(ConfigError, match="they cannot be combined"):
        Trace.load(tmp_path / "a", tmp_path / "c")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a trace"),
        (b"hello", "not a trace"),
        (msgpack.packb({"format": "ruyi-flow trace", "version": 9}), "version 9, expected 3; update ruyi-flow"),
        (msgpack.packb({"format": "ruyi-flow trace", "version": 1}), "version 1, expected 3; record it again"),
        (msgpack.packb([1, 2]), "not a trace"),
    ],
)
def test_files_that_are_not_traces_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "t"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        Trace.load(path)


@pytest.mark.parametrize(
    "change",
    [{"exits": "246"}, {"exits": [4, 2]}, {"exits": []}, {"exits": [0, 2]}, {"hidden_size": "big"}]
    + [{"temperatures": ["x"]}, {"boundary_bytes": [1]}, {"family": 5}],
)
def test_a_header_of_other_types_is_no_traces(family: Family, tmp_path: Path, change: dict[str, Any]) -> None:
    whole = tmp_path / "whole"
    record_trace(family, [Question((1, 2, 3))], whole, max_new_tokens=4)
    unpacker = msgpack.Unpacker(strict_map_key=False)
    unpacker.feed(whole.read_bytes())
    header, record = unpacker
    path = tmp_path / "t"
    path.write_bytes(msgpack.packb(header | change) + msgpack.packb(record))
    with pytest.raises(ConfigError, match="not a trace"):
        Trace.load(path)
    path.write_bytes(msgpack.packb(header) + msgpack.packb(record | {"number": [1]}))
    with pytest.raises(ConfigError, match="damaged after"):
        Trace.load(path)


def test_the_command(
    spoken: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "t.msgpack"
    command = ["ruyi-flow", "trace", str(chats), "--family", str(spoken), "--out", str(out), "--max-new-tokens", "9"]
    monkeypatch.setattr(sys, "argv", [*command, "--json"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    facts = json.loads(capsys.readouterr().out)
    assert facts["prompts"] == 3 and set(facts["agreement"]) == {"2", "4"} and out.exists()
    monkeypatch.setattr(sys, "argv", [*command, "--dtype", "float32"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and "was recorded with another" in capsys.readouterr().err


def test_the_command_reports_skipped_prompts_and_mistakes(
    run: Command, even: Path, family: Family, tmp_path: Path
) -> None:
    file, out = tmp_path / "prompts.jsonl", tmp_path / "t.msgpack"
    file.write_text("".join(json.dumps({"prompt": "x" * n}) + "\n" for n in (3, family.config.max_positions, 5)))
    command = ["trace", str(file), "--family", str(even), "--out", str(out), "--max-new-tokens"]
    code, said, error = run(*command, "4", "--weights", "int8", "--json")
    assert code == 0 and json.loads(said)["prompts"] == 2 and read_trace(out)[0].dtype == "bfloat16, int8 weights"
    assert error.startswith("skipped 1 of 3 prompts: they leave no room for an answer in the family's context of ")
    out.unlink()
    code, _, error = run(*command, "-5")
    assert code == 2 and "greater than or equal" in error and not out.exists()
    file.write_text("")
    code, _, error = run(*command, "4")
    assert code == 2 and error == f"error: {file}: the file contains no prompts\n"
    code, _, error = run(*command, "4", "--out", str(file / "t"))
    assert code == 2 and error.startswith("error: --out ") and "is a file; name a file in a folder" in error
