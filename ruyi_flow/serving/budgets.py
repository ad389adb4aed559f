"""What users have used up of their limits: requests, tokens, and answers at the same time. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ruyi_flow.errors import OverLimit

if TYPE_CHECKING:
    from ruyi_flow.config.users import Caller

__all__ = ["Budgets", "Spent"]

_MINUTE_S = 60.0
_MOST_KEPT = 4096
"""Users whose buckets are kept; those that are full again are forgotten first."""


class Spent:
    """What one answer has cost."""

    def __init__(self) -> None:
        self.tokens = 0
        """Tokens of the prompt and of the answer."""


class _Bucket:
    """A token bucket: it fills at a rate up to a minute's worth, and may be overdrawn by what was not known before."""

    def __init__(self, now: float) -> None:
        self._since, self._used = now, 0.0

    def used(self, per_minute: int, now: float) -> float:
        """Return what is used up of a minute's worth at a time."""
        self._used = max(0.0, self._used - (now - self._since) * per_minute / _MINUTE_S)
        self._since = now
        return self._used

    def take(self, amount: float) -> None:
        """Use up some of it."""
        self._used += amount

    def wait_s(self, per_minute: int, now: float) -> float:
        """Return the seconds until one more fits."""
        return max(0.0, (self.used(per_minute, now) + 1 - per_minute) * _MINUTE_S / per_minute)


class _Account:
    def __init__(self, now: float) -> None:
        self.requests, self.tokens, self.running = _Bucket(now), _Bucket(now), 0


class Budgets:
    """The accounts of the users of one node.

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._accounts: dict[str, _Account] = {}

    @contextmanager
    def answer(self, caller: Caller) -> Iterator[Spent]:
        """Count an answer as one of a caller's while the block lasts, and then what it has cost.

        Raises:
            OverLimit: the caller has used up a limit.
        """
        account, limits, now = self._account(caller.name), caller.limits, self._clock()
        if limits.sessions is not None and account.running >= limits.sessions:
            raise OverLimit(f"{caller.name} has {account.running} answers running, as many as are allowed", 1.0)
        for what, bucket, rate in (
            ("requests", account.requests, limits.requests_per_minute),
            ("tokens", account.tokens, limits.tokens_per_minute),
        ):
            wait_s = 0.0 if rate is None else bucket.wait_s(rate, now)
            if wait_s > 0:
                raise OverLimit(
                    f"{caller.name} has used up {rate} {what} a minute; ask again in {math.ceil(wait_s)} s", wait_s
                )
        if limits.requests_per_minute is not None:
            account.requests.take(1)
        account.running += 1
        spent = Spent()
        try:
            yield spent
        finally:
            account.running -= 1
            if limits.tokens_per_minute is not None:
                account.tokens.used(limits.tokens_per_minute, self._clock())
                account.tokens.take(spent.tokens)

    def _account(self, name: str) -> _Account:
        account = self._accounts.pop(name, None) or _Account(self._clock())
        self._accounts[name] = account  # the one used last is the last one
        while len(self._accounts) > _MOST_KEPT:
            idle = next((other for other, one in self._accounts.items() if not one.running), None)
            if idle is None or idle == name:
                break
            del self._accounts[idle]
        return account
