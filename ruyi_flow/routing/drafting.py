"""Whether an entry node drafts, and how far, from what rounds have cost. Pure: durations are passed in."""

from __future__ import annotations

from threading import Lock

__all__ = ["DraftCosts", "DraftLength", "ahead_pays", "draft_pays"]


class DraftCosts:
    """Running means of what drafting and asking cost on an entry node, over all its sessions.

    Whether to draft at all is decided by what rounds with and without drafts have cost per token, since that counts
    everything: the vocabulary logits that only a drafter needs, and the additional rows that deeper stages verify.

    The compute thread and the event loop both report durations, so every change is made under a lock.
    """

    _TRIES = 6
    """Rounds of each kind before they are compared."""
    _RETRY = 16
    """The worse kind is tried again once in this many rounds."""
    _DECAY = 0.98
    """Weight of a round after the next one: a round settles few tokens, so fewer than some fifty say little."""

    def __init__(self) -> None:
        self.step_s = self.ask_s = 0.0
        """Mean seconds of drafting one token, and of a round beyond its drafting; 0 before the first one."""
        self._spent_s = {False: 0.0, True: 0.0}
        self._tokens = {False: 0.0, True: 0.0}
        self._tried = {False: 0, True: 0}
        self._rounds = 0
        self._lock = Lock()

    def add_step(self, seconds: float) -> None:
        """Report the duration of drafting one token."""
        with self._lock:
            self.step_s = seconds if self.step_s == 0 else 0.8 * self.step_s + 0.2 * seconds

    def add_question(self, seconds: float) -> None:
        """Report what a round took beyond its drafting."""
        with self._lock:
            self.ask_s = seconds if self.ask_s == 0 else 0.7 * self.ask_s + 0.3 * seconds

    def add_round(self, drafted: bool, seconds: float, tokens: int) -> None:
        """Report a finished round: whether it drafted, how long it took, and how many tokens it settled."""
        with self._lock:
            self._spent_s[drafted] = self._DECAY * self._spent_s[drafted] + seconds
            self._tokens[drafted] = self._DECAY * self._tokens[drafted] + tokens
            self._tried[drafted] += 1

    def next_round_drafts(self) -> bool:
        """Return whether the next round should draft."""
        with self._lock:
            for kind in (True, False):
                if self._tried[kind] < self._TRIES:
                    return kind
            self._rounds += 1
            better = self._spent_s[True] * self._tokens[False] <= self._spent_s[False] * self._tokens[True]
            return better if self._rounds % self._RETRY else not better


class DraftLength:
    """The draft length of one round, given the node's costs and the probability that each draft is accepted.

    Args:
        costs: the entry node's running means; this round reports its steps to them.
    """

    def __init__(self, costs: DraftCosts) -> None:
        self._costs = costs
        self.drafting_s = 0.0
        """Seconds that this round has drafted."""
        self._steps = 0
        self._kept = self._expected = 1.0

    def add_step(self, seconds: float) -> None:
        """Report that the drafter has run one position."""
        self.drafting_s += seconds
        self._steps += 1
        if self._steps > 1:  # the first step may include a prompt
            self._costs.add_step(seconds)

    def continues(self, confidence: float) -> bool:
        """Return whether to draft one more token after one that is accepted with this probability."""
        costs = self._costs
        if costs.ask_s == 0 or costs.step_s == 0:
            return True  # nothing is known yet
        spent_s = costs.ask_s + self.drafting_s
        pays = draft_pays(self._kept, self._expected, spent_s, likely=confidence, step_s=costs.step_s)
        self._kept *= confidence
        self._expected += self._kept
        return pays


def draft_pays(kept: float, expected: float, spent_s: float, *, likely: float, step_s: float) -> bool:
    """Return whether drafting one more token is expected to settle more tokens per second than asking now.

    A round with k drafts settles `1 + c1 + c1 c2 + …` tokens, where c is the probability that a draft is accepted. One
    more pays while that sum, divided by the time it all takes, grows (Leviathan, Kalman and Matias 2023, section 3.5,
    but with the probability of each token instead of their mean).

    Args:
        kept: probability that all drafts so far are accepted.
        expected: expected number of tokens that the round settles with them.
        spent_s: seconds that the round takes with them.
        likely: probability that the next draft is accepted, given that those before it are.
        step_s: seconds of drafting it.
    """
    return kept * likely * spent_s > expected * step_s


def ahead_pays(kept: float) -> bool:
    """Return whether drafting one more token while an answer is awaited should save time.

    If all drafts before it are accepted (probability `kept`), the next round need not draft it. Otherwise the answer
    waits for half of its step on average, since it arrives at any moment of the step.
    """
    return kept > (1 - kept) / 2
