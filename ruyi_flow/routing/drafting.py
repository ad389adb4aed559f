"""Whether an entry node drafts, and how far: from what rounds have cost. Pure: durations are told, not taken."""

from __future__ import annotations

from ruyi_flow.routing.policy import pays

__all__ = ["Length", "Pace", "gains"]


class Pace:
    """What drafting and asking take on an entry node, over all its sessions: running means of what it saw.

    Whether to draft at all is decided by what rounds with drafts and rounds without them have cost a token, since that
    counts everything: the product with the vocabulary that only a drafter needs, and checking more rows deeper.
    """

    _TRIES, _AGAIN, _FADES = 6, 16, 0.98
    """Rounds of each kind before they are compared, how often the worse one is tried again, and what is left of a round
    after the next: how many tokens a round settles varies, so that fewer than some fifty say little."""

    def __init__(self) -> None:
        self.step_s = self.ask_s = 0.0
        self._spent = {False: 0.0, True: 0.0}
        self._tokens = {False: 0.0, True: 0.0}
        self._tried = {False: 0, True: 0}
        self._rounds = 0

    def stepped(self, took: float) -> None:
        """The drafter has run one position more."""
        self.step_s = took if self.step_s == 0 else 0.8 * self.step_s + 0.2 * took

    def asked(self, took: float) -> None:
        """What a round took beyond its drafting."""
        self.ask_s = took if self.ask_s == 0 else 0.7 * self.ask_s + 0.3 * took

    def settled(self, drafted: bool, took: float, tokens: int) -> None:
        """A round has ended."""
        self._spent[drafted] = self._FADES * self._spent[drafted] + took
        self._tokens[drafted] = self._FADES * self._tokens[drafted] + tokens
        self._tried[drafted] += 1

    def drafts(self) -> bool:
        """Whether the next round should draft."""
        for kind in (True, False):
            if self._tried[kind] < self._TRIES:
                return kind
        self._rounds += 1
        better = self._spent[True] * self._tokens[False] <= self._spent[False] * self._tokens[True]
        return better if self._rounds % self._AGAIN else not better


class Length:
    """How far one round drafts, by the pace and each draft's chance to hold."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self.drafting_s = 0.0
        self._steps = 0
        self._kept = self._expected = 1.0

    def stepped(self, took: float) -> None:
        """The drafter has run one position."""
        self.drafting_s += took
        self._steps += 1
        if self._steps > 1:  # the first one may be a prompt
            self._pace.stepped(took)

    def goes_on(self, confidence: float) -> bool:
        """Whether the token that was just drafted, with this chance to hold, should be followed by another."""
        pace = self._pace
        if pace.ask_s == 0 or pace.step_s == 0:
            return True  # nothing is known yet
        going = pays(self._kept, self._expected, pace.ask_s + self.drafting_s, confidence, pace.step_s)
        self._kept *= confidence
        self._expected += self._kept
        return going


def gains(kept: float) -> bool:
    """Whether drafting one token more while an answer is awaited should gain time.

    If what it rests on holds, which has this chance, the next round need not draft it. If not, the answer has waited
    for half of its step on average, since it comes at any moment of it.
    """
    return kept > (1 - kept) / 2
