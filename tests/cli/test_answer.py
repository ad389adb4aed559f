"""How an answer is printed: lines that end between words, colours, control characters, and the spinner."""

import io
import re
import threading
from pathlib import Path

import pytest
import wcwidth
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ruyi_flow.cli import answer
from ruyi_flow.cli.answer import AnswerPrinter, Spinner, WordWrap
from ruyi_flow.cli.display import printable
from ruyi_flow.testing import cut_topology
from ruyi_flow.types import Reason, Token

WORDS = st.sampled_from(["a", "river", "flows", " ", "  ", "\n", "-", "extraordinarily-long", "(so)", "don't", "."])
WIDE = st.sampled_from(["日", "本語", "、", "「", "」", "。", "👍🏽", "👨‍👩‍👧", "🇨🇳", "❤️", "é", "한국"])


def wrapped(text: str, cuts: list[int], width: int) -> list[tuple[str, int | None]]:
    """Feed a text in pieces, with the number of a piece as its style."""
    wrap = WordWrap[int](width)
    ends = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    printed: list[tuple[str, int | None]] = []
    for i, (start, end) in enumerate(zip(ends, ends[1:], strict=False)):
        printed += wrap.push(text[start:end], i)
    return printed + wrap.flush()


def cells(text: str) -> int:
    return max(0, wcwidth.wcswidth(text))


@given(st.lists(WORDS | WIDE, max_size=60).map("".join), st.lists(st.integers(0, 300), max_size=40), st.integers(4, 40))
def test_lines_end_between_words_and_the_text_is_the_answer(text: str, cuts: list[int], width: int) -> None:
    printed = wrapped(text, cuts, width)
    assert "".join(piece for piece, style in printed if style is not None) == text
    assert {piece for piece, style in printed if style is None} <= {"\n"}
    styles = [style for piece, style in printed if style is not None for _ in piece]
    ends = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    assert styles == [i for i, (a, b) in enumerate(zip(ends, ends[1:], strict=False)) for _ in range(b - a)]
    lines = "".join(piece for piece, _ in printed).split("\n")
    for line in lines:
        assert cells(line) <= width or len(line.split()) == 1
    whole = re.sub(r"[^\x00-\x7f]+", " ", text).split()
    shown = re.sub(r"[^\x00-\x7f]+", " ", "".join(piece for piece, _ in printed)).split()
    assert shown == whole, "no word is cut"
    before = ""
    for piece, style in printed:  # a character of several code points is not cut, and no comma begins a line
        if style is None:
            rest = text[len(before) :]
            assert wcwidth.grapheme_boundary_before(before + rest, len(before) + 1) == len(before)
            assert before.endswith(" ") or not rest.startswith(("、", "」", "。")) and not before.endswith("「")
        else:
            before += piece


def test_a_text_in_chinese_fills_its_lines() -> None:
    lines = "".join(piece for piece, _ in wrapped("天空是蓝色的，因为空气散射阳光。" * 3, [], 20)).split("\n")
    assert len(lines) == 6 and all(14 <= cells(line) <= 20 for line in lines[:-1])


def test_a_word_is_printed_when_it_is_complete_or_too_long_for_a_line() -> None:
    wrap = WordWrap[str](12)
    assert wrap.push("under", "a") == []
    assert "".join(text for text, _ in wrap.push("stood it", "b")) == "understood "
    printed = "".join(text for text, _ in wrap.push("/a/very/long/path/that/goes/on", "c"))
    assert printed.startswith("\nit/a/very/long/path") and printed.count("\n") == 1


def test_code_between_fences_is_as_it_is() -> None:
    code = "```python\nfor character in the_whole_alphabet: print(character, end=' ')\n    x = 1\n```\n"
    text = f"This is code:\n{code}and here are more words than fit"
    assert "".join(piece for piece, _ in wrapped(text, [3, 20, 40], 20)) == (
        f"This is code:\n{code}and here are more \nwords than fit"
    )


def test_control_characters_are_shown_and_not_obeyed() -> None:
    assert printable("a\x1b[2Jb\x07\x7f\x9b\tc\r\nd") == "a␛[2Jb␇␡\ufffd    c\nd"


def token(text: str, node: str) -> Token:
    return Token(id=1, text=text, exit=2, node=node, confidence=0.9, reason=Reason.CONFIDENT)


def test_tokens_keep_their_colours_across_line_breaks(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=18)
    monkeypatch.setattr(answer, "out", console)
    monkeypatch.setattr(answer, "stdout_is_terminal", lambda: True)
    monkeypatch.setattr("sys.stdout", console.file)
    with AnswerPrinter(cut_topology(tiny, [[2], [4, 6]]), legend=False) as printer:
        for text, node in ((" The", "n0"), (" under", "n0"), ("stood\x1b[2J", "n1"), (" x\n", "unknown"), ("\n", "n0")):
            printer.push(token(text, node))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.sub(r"\x1b\[[0-9;]*m", "", shown) == " The \nunderstood␛[2J x\n"
    assert "\x1b[32munder" in shown and "\x1b[33mstood␛" in shown and "\x1b[2J" not in shown


def test_the_spinner_comes_after_its_time_and_goes_when_it_is_over() -> None:
    file, shown = io.StringIO(), threading.Event()

    class Console2(Console):
        def show_cursor(self, show: bool = True) -> bool:
            if not show:
                shown.set()
            return super().show_cursor(show)

    spinner = Spinner("waiting", after_s=0.001, console=Console2(file=file, force_terminal=True, width=60))
    spinner.begin()
    shown.wait()
    spinner.end()
    assert "waiting" in file.getvalue() and file.getvalue().endswith("\x1b[1A\x1b[2K")
    file = io.StringIO()
    spinner = Spinner("waiting", after_s=3600, console=Console(file=file, force_terminal=True))
    spinner.begin()
    spinner.end()
    assert file.getvalue() == ""
    for console in (Console(file=file), Console(file=file, force_terminal=True, _environ={"TERM": "dumb"})):
        spinner = Spinner("waiting", after_s=0, console=console)
        spinner.begin()
        spinner.end()
        assert file.getvalue() == ""
