"""How an answer is printed as it arrives: coloured and broken between words in a terminal, and as it is elsewhere."""

from __future__ import annotations

import sys
import threading
import unicodedata
from collections.abc import Iterable
from itertools import groupby
from operator import itemgetter
from typing import Generic, TypeVar

import wcwidth
from rich.console import Console
from rich.text import Text

from ruyi_flow.cli.display import err, node_colour, node_legend, out, print_text, printable, stdout_is_terminal
from ruyi_flow.config.topology import Topology
from ruyi_flow.types import Token

__all__ = ["AnswerPrinter", "Spinner", "WordWrap"]

S = TypeVar("S")

_LINE_START = 80
"""Characters at the start of a line in which a fence is looked for."""

_OPENING, _CLOSING = ("Ps", "Pi"), ("Pe", "Pf", "Po")
"""Categories of the punctuation that begins, and that ends, what it stands beside."""


class WordWrap(Generic[S]):
    """Breaks a text that arrives in pieces into lines, between words and between wide characters such as Chinese ones.

    A word is held back until it is complete, or too long for any line: then it is printed at once, without breaks.
    Lines of a code block between two fences (```) are never broken. Each returned piece is (text, style), and an
    inserted line break has the style None. The other pieces together are the text.

    Args:
        width: cells of a line. Words end before the last one, so that a space fits behind them.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._rest: list[tuple[str, S]] = []
        """Characters whose grapheme may still grow."""
        self._word: list[tuple[str, S]] = []
        self._word_cells = self._column = 0
        self._too_long = False
        """Whether the word has been printed as far as it came, because it fits into no line."""
        self._last = ""
        """The grapheme before the next one, empty at the start of a line or word."""
        self._line, self._in_code = "", False

    def push(self, text: str, style: S) -> list[tuple[str, S | None]]:
        """Add a piece of text, and return what can be printed now."""
        self._rest += [(character, style) for character in text]
        return self._advance(hold=1)

    def flush(self) -> list[tuple[str, S | None]]:
        """Return the rest: the text has ended."""
        return [*self._advance(hold=0), *self._place_word()]

    def _advance(self, hold: int) -> list[tuple[str, S | None]]:
        graphemes = list(wcwidth.iter_graphemes("".join(character for character, _ in self._rest)))
        printed: list[tuple[str, S | None]] = []
        for grapheme in graphemes[: len(graphemes) - hold]:
            characters, self._rest = self._rest[: len(grapheme)], self._rest[len(grapheme) :]
            printed += self._add(grapheme, characters)
        return printed

    def _add(self, grapheme: str, characters: list[tuple[str, S]]) -> list[tuple[str, S | None]]:
        if grapheme.endswith("\n"):
            printed = [*self._place_word(), *characters]
            self._in_code ^= self._line.lstrip().startswith("```")
            self._column, self._line = 0, ""
            return printed
        cells = max(0, wcwidth.wcswidth(grapheme))
        self._line += grapheme if len(self._line) < _LINE_START else ""
        if self._in_code:
            self._column += cells
            return [*characters]
        if grapheme == " ":
            printed = self._place_word()
            if self._column >= self._width:
                printed.append(("\n", None))
                self._column = 0
            self._column += 1
            return [*printed, *characters]
        printed = self._place_word() if _may_break(self._last, grapheme) else []
        self._last = grapheme
        if self._too_long:
            self._column += cells
            return [*characters]
        self._word += characters
        self._word_cells += cells
        if self._word_cells >= self._width:
            printed += self._place_word()
            self._last, self._too_long = grapheme, True
        return printed

    def _place_word(self) -> list[tuple[str, S | None]]:
        """Return the word, on a new line if it does not fit into this one."""
        word, cells = self._word, self._word_cells
        self._word, self._word_cells, self._last, self._too_long = [], 0, "", False
        printed: list[tuple[str, S | None]] = []
        if word and self._column and self._column + cells >= self._width:
            printed.append(("\n", None))
            self._column = 0
        self._column += cells
        return [*printed, *word]


def _may_break(before: str, after: str) -> bool:
    """Return whether a line may end between two graphemes that have no space between them."""
    if not before or max(wcwidth.wcswidth(before), wcwidth.wcswidth(after)) < 2:
        return False
    return unicodedata.category(before[0]) not in _OPENING and unicodedata.category(after[0]) not in _CLOSING


class AnswerPrinter:
    """Prints an answer to standard output as it arrives, for use in a `with` block.

    In a terminal each token has the colour of its node, below a line that names the nodes; a spinner turns until the
    first token. Elsewhere, and when quiet, there is nothing but the text, and one line end after it.

    Args:
        topology: the topology of the nodes.
        quiet: print nothing but the text also in a terminal.
        legend: begin with the line that names the nodes.
    """

    def __init__(self, topology: Topology, *, quiet: bool = False, legend: bool = True) -> None:
        self._topology, self._quiet, self._legend = topology, quiet, legend and not quiet
        self._wrap = WordWrap[str](out.width) if stdout_is_terminal() else None
        self._spinner = Spinner("waiting for the first token")
        self._begun = self._ended = False
        self._line_ends = ""

    def __enter__(self) -> AnswerPrinter:
        if not self._quiet:
            self._spinner.begin()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def push(self, token: Token) -> None:
        """Print a token, or hold it back until its word is complete."""
        self._spinner.end()
        if self._wrap is not None and self._legend and not self._begun:
            out.print(node_legend(self._topology))
        self._begun = True
        # Line ends are printed with the text after them, so that the answer ends with exactly one.
        text = self._line_ends + token.text
        body = text.rstrip("\n")
        self._line_ends = text[len(body) :]
        if self._wrap is None:
            sys.stdout.write(body)
            sys.stdout.flush()
        else:
            colour = "" if self._quiet else node_colour(self._topology, token.node)
            _print(self._wrap.push(printable(body), colour))

    def end(self, note: str = "") -> None:
        """Print the rest and the end of the line, once; `note` is a line after it in a terminal."""
        self._spinner.end()
        if self._ended:
            return
        self._ended = True
        if self._begun and self._wrap is not None:
            _print(self._wrap.flush())
        if self._begun:
            sys.stdout.write("\n")
            sys.stdout.flush()
        if note and self._wrap is not None:
            print_text(out, note, "dim")


def _print(pieces: Iterable[tuple[str, str | None]]) -> None:
    text = Text()
    for style, same in groupby(pieces, itemgetter(1)):  # one colour sequence a run of characters, not one each
        text.append("".join(piece for piece, _ in same), style or "")
    if text:
        out.print(text, end="", soft_wrap=True)


class Spinner:
    """A spinner on standard error while something takes long, if standard error is a terminal.

    Args:
        what: what the user waits for.
        after_s: seconds without a spinner at the beginning.
        console: the console, which is standard error's.
    """

    def __init__(self, what: str, *, after_s: float = 1.0, console: Console = err) -> None:
        self._status = console.status(f"[dim]{what}[/dim]")
        self._ended, self._lock = False, threading.Lock()
        self._timer = threading.Timer(after_s, self._start)
        self._timer.daemon = True
        self._shown = console.is_interactive

    def begin(self) -> None:
        """Let the time begin after which the spinner is shown."""
        if self._shown:
            self._timer.start()

    def end(self) -> None:
        """Remove the spinner; it does not come back."""
        self._timer.cancel()
        with self._lock:
            if not self._ended:
                self._ended = True
                self._status.stop()

    def _start(self) -> None:
        with self._lock:
            if not self._ended:
                self._status.start()
