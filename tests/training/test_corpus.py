"""Files of chats: what is a prompt, what is an answer, and nothing of them gets lost without a word."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ruyi_flow.calibration.trace import Scorer
from ruyi_flow.errors import ConfigError
from ruyi_flow.evaluation.quality import measure_quality
from ruyi_flow.evaluation.scorers import read_questions
from ruyi_flow.family.checkpoint import Checkpoint
from ruyi_flow.family.tokenizer import load_tokenizer
from ruyi_flow.training.corpus import Document, chat_prompt, read_documents, read_prompts
from ruyi_flow.training.distill import distill
from ruyi_flow.training.recipe import Recipe, SelfDistill, Source
from ruyi_flow.training.train import train

TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
PLAIN = TURNS + "{% if add_generation_prompt %}[assistant]{% endif %}"
OPENS_A_THOUGHT = TURNS + "{% if add_generation_prompt %}[assistant]<think>\n{% endif %}"
EMPTY_THOUGHT = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
STRIPS_THOUGHTS = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1] | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]<think>\n{% endif %}"
)
SYSTEM_IN_LAST_TURN = (
    "{% for m in messages %}{% if loop.last and m.role == 'user' %}[system]Be brief.{% endif %}"
    "[{{ m.role }}]{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
KEEPS_LAST_THOUGHT = (
    "{% for m in messages %}[{{ m.role }}]"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


LONG = "Forty-two, since six sevens are 42."
CHATS = {
    "long": [user("What is six times seven?"), assistant(LONG)],
    "short": [user("Hi"), assistant("Hello."), user("2+2?"), assistant("Four.")],
    "like a thought": [user("Make it bold."), assistant("<b>bold</b>")],
    "thought earlier": [user("Hi"), assistant("<think>hm</think>Hello."), user("2+2?"), assistant("Four.")],
    "ends with a thought": [user("Hi"), assistant("<think>hm</think>Hello."), user("2+2?"), assistant("")],
    "empty": [user("Hi"), assistant("")],
    "blank at its start": [user("Hi"), assistant(" Hello.")],
}


@pytest.fixture
def tokenizer(spoken: Path) -> Any:
    return load_tokenizer(Checkpoint(spoken))


def write(path: Path, *items: Any) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def learned(document: Document, tokenizer: Any) -> str:
    return str(tokenizer.decode(list(document.token_ids[document.answer :])))


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize(
    "template",
    [PLAIN, OPENS_A_THOUGHT, EMPTY_THOUGHT, STRIPS_THOUGHTS, SYSTEM_IN_LAST_TURN, KEEPS_LAST_THOUGHT],
    ids=["plain", "opens-a-thought", "empty-thought", "strips-thoughts", "system-in-last-turn", "keeps-last-thought"],
)
def test_all_of_an_answer_is_learned_whatever_the_template(
    tmp_path: Path, tokenizer: Any, template: str, chat: str
) -> None:
    tokenizer.chat_template = template
    (document,) = read_documents(write(tmp_path / "a.jsonl", {"messages": CHATS[chat]}), tokenizer, length=4096)
    answer = CHATS[chat][-1]["content"]
    if template == STRIPS_THOUGHTS:
        answer = answer.strip()
    if template == EMPTY_THOUGHT:
        answer = "<think></think>" + answer  # the model itself has to write it: the prompt ends before it
    assert learned(document, tokenizer) == answer + "</s>"
    whole = tokenizer.apply_chat_template(CHATS[chat], tokenize=False)
    assert tokenizer.decode(list(document.token_ids)) == whole


def test_a_token_with_parts_of_both_belongs_to_the_answer(tmp_path: Path) -> None:
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĊ"]
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, [("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    template = "{% for m in messages %}{{ m.role }}\n{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}assistant\n{% endif %}"
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template)
    file = write(tmp_path / "a.jsonl", {"prompt": "Hi", "answer": "\nHello."}, {"prompt": "Hi", "answer": "Hello."})
    joined, apart = read_documents(file, fast, length=4096)
    assert learned(joined, fast) == "\n\nHello." and learned(apart, fast) == "Hello."


def test_the_question_at_the_end_of_a_chat_is_the_prompt(tmp_path: Path, spoken: Path, tokenizer: Any) -> None:
    asked = [{"role": "system", "content": "You are terse."}, user("What is the capital of France?")]
    expected = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    file = write(
        tmp_path / "a.jsonl",
        {"messages": asked},
        {"messages": [*asked, assistant("Paris.")]},
        {"messages": asked, "answer": "Paris."},
    )
    assert [tokenizer.decode(ids) for ids in read_prompts(file, tokenizer)] == [expected] * 3
    questions = list(read_questions(file, tokenizer, Scorer.AGREEMENT))
    assert [tokenizer.decode(list(q.prompt)) for q in questions] == [expected] * 3
    assert [q.reference for q in questions] == ["", "Paris.", "Paris."]
    one = tokenizer.apply_chat_template([user("hi")], tokenize=False, add_generation_prompt=True)
    repeated = {"prompt": "hi", "messages": [user("hi"), assistant("yo")]}
    for item in ({"messages": [user("hi")]}, {"prompt": "hi"}, {"question": "hi", "answer": "yo"}, repeated):
        assert tokenizer.decode(chat_prompt(item, tokenizer)[0]) == one
    found = [measure_quality(Checkpoint(spoken), [], prompts=write(tmp_path / n, {"messages": m}))[0].tokens
             for n, m in (("b", asked), ("c", [*asked, assistant("Paris.")]))]  # fmt: skip
    assert found[0] == found[1] > 0
    run = Recipe(
        family="x", out=tmp_path / "out", steps=1, length=256, precision="no",
        self_distill=SelfDistill(prompts=(Source(path=file),), max_new_tokens=2),
    )  # fmt: skip
    answers = distill(run, Checkpoint(spoken), tokenizer, ())
    prompts = [json.loads(line)["prompt"] for line in answers.read_text().splitlines()]
    assert [tokenizer.decode(ids) for ids in prompts] == [expected] * 3


def test_a_chat_without_an_answer_teaches_no_answer(tmp_path: Path, tokenizer: Any) -> None:
    asked = [user("Hi"), assistant("Hello."), user("Bye")]
    file = write(tmp_path / "a.jsonl", {"messages": asked}, {"prompt": "Hi"}, {"question": "Hi"})
    for document, turns in zip(
        read_documents(file, tokenizer, length=4096), (asked, asked[:1], asked[:1]), strict=True
    ):
        assert not document.has_answer and document.answer == len(document.token_ids)
        assert tokenizer.decode(list(document.token_ids)) == tokenizer.apply_chat_template(turns, tokenize=False)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"question": "a", "prompt": "b"}, 'it has both "question" and "prompt"; keep the one that is meant'),
        ({"question": "2+2?", "answer": 4}, r'expected .*; there is {"question": "2\+2\?", "answer": 4}'),
        ({"prompt": ["a"]}, r'expected .*; there is {"prompt": \["a"\]}'),
        ({"messages": [user("a"), {"role": "assistant", "content": None}]}, "expected {.messages"),
        ({"messages": [{"role": 1, "content": "a"}]}, "expected {.messages"),
        ({"messages": [user("a"), {"role": "gpt", "content": "b"}]}, "its last message has the role 'gpt'; expected"),
        ({"messages": [assistant("a")]}, "it has an answer, but no prompt before it"),
        ({"messages": [user(" \n"), assistant("a")]}, "its prompt is blank"),
        ({"prompt": ""}, "its prompt is blank"),
        ({"messages": [{"content": "a"}]}, "expected {.messages"),
        ({"messages": []}, "expected {.messages"),
        ({"promt": "a"}, "expected {.messages"),
        (["a"], "expected {.messages"),
    ],
)
def test_a_line_that_is_no_chat_is_refused_with_its_reason(
    tmp_path: Path, tokenizer: Any, item: Any, message: str
) -> None:
    file = write(tmp_path / "a.jsonl", {"prompt": "hello"}, item)
    with pytest.raises(ConfigError, match=f"a.jsonl, line 2: {message}"):
        list(read_prompts(file, tokenizer))


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no such role') }}", "{{ messages[0].content.nope() }}", None]
)
def test_a_template_that_cannot_be_used_is_named(tmp_path: Path, tokenizer: Any, template: str | None) -> None:
    tokenizer.chat_template = template
    file = write(tmp_path / "a.jsonl", {"prompt": "hello", "answer": "x"})
    for read in (lambda: read_prompts(file, tokenizer), lambda: read_documents(file, tokenizer, length=64)):
        with pytest.raises(ConfigError, match="line 1: the family's chat template rejects it: "):
            list(read())


@pytest.mark.parametrize("ids", [[3, 4.0], [3, True], [3, "4"]])
def test_token_ids_are_whole_numbers(tmp_path: Path, tokenizer: Any, ids: list[Any]) -> None:
    for item in ({"prompt": ids, "answer": [5]}, {"prompt": [5], "answer": ids}):
        with pytest.raises(ConfigError, match="line 1: expected"):
            list(read_documents(write(tmp_path / "a.jsonl", item), tokenizer, length=64))


def test_training_says_what_of_its_data_it_does_not_use(tmp_path: Path, spoken: Path, tokenizer: Any) -> None:
    fits = [{"prompt": "hi", "answer": f"yes{i}"} for i in range(8)]
    cut, lost = {"prompt": "hi", "answer": "y" * 90}, {"prompt": "h" * 90, "answer": "yes"}
    write(tmp_path / "a.jsonl", *fits, cut, lost, {"messages": [user("hi"), assistant("yes"), user("bye")]})
    run = Recipe(
        family="x", out=tmp_path / "out", data=(Source(path=tmp_path / "a.jsonl"),), steps=1, batch=1, length=48,
        precision="no",
    )  # fmt: skip
    said: list[str] = []
    train(run, Checkpoint(spoken), tokenizer, say=said.append)
    assert f"{tmp_path}/a.jsonl: 2 chats are longer than 48 tokens; 1 were left out, since nothing" in said[0]
    assert f"{tmp_path}/a.jsonl: 1 chats have no answer" in said[1]
    write(tmp_path / "b.jsonl", lost)
    changed = run.model_copy(update={"data": (*run.data, Source(path=tmp_path / "b.jsonl"))})
    with pytest.raises(ConfigError, match=r"b.jsonl contains nothing to train on; remove it, or raise length"):
        train(changed, Checkpoint(spoken), tokenizer)


def test_self_distillation_says_which_prompts_it_does_not_answer(tmp_path: Path, spoken: Path, tokenizer: Any) -> None:
    file = write(tmp_path / "a.jsonl", {"prompt": "hi"}, {"prompt": "h" * 90}, {"prompt": "ho"})
    plan = SelfDistill(prompts=(Source(path=file),), max_new_tokens=2)
    run = Recipe(family="x", out=tmp_path / "out", steps=1, length=48, precision="no", self_distill=plan)
    said: list[str] = []
    told: list[tuple[int, int]] = []
    distill(run, Checkpoint(spoken), tokenizer, (), say=said.append, report=lambda done, of, _: told.append((done, of)))
    assert said == ["1 of 3 prompts have 48 tokens or more (length); they are not answered"]
    assert told[-1] == (2, 2)
