"""When a rank fails in a load whose ranks share reads, and when the others leave: in rounds, and in seconds.

What a rank may take until it raises: the round that is under way, one more, in which it learns of the fault, and a
second. Rounds are counted, so that no load of the machine makes a difference. Seconds are taken on the clock that all
processes of a machine have in common.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from shared_reads import failure_of

from dcp_fast.ranks import steps
from dcp_fast.ranks.exchange import Exchange, OtherRankError
from dcp_fast.transfer.sharing import Phase

__all__ = ["ATTEMPTS", "MOST_SECONDS", "Seen", "assert_told_in_time", "note_fault", "see"]

MOST_SECONDS = 1.0  # beyond a round
ATTEMPTS = 3


@dataclass
class Seen:
    """What a rank saw of a load.

    Attributes:
        failure: with what the load failed, as ``failure_of`` tells.
        begun: when it began rounds.
        failed_at: when something failed on this rank itself; None: nothing did.
        begun_then: how many rounds it had begun by then.
        raised_at: when the load was over.
    """

    failure: dict[int, str] | str = "nothing"
    begun: list[float] = field(default_factory=list)
    failed_at: float | None = None
    begun_then: int = 0
    raised_at: float = 0.0

    @property
    def longest_round(self) -> float:
        return max((after - before for before, after in itertools.pairwise(self.begun)), default=0.0)


_current: Seen | None = None  # of the load that goes on


def note_fault() -> None:
    """Something fails on this rank now. What fails after it does not count."""
    if _current is not None and _current.failed_at is None:
        _current.failed_at = time.monotonic()
        _current.begun_then = len(_current.begun)


def see(load: Callable[[], Any]) -> Seen:
    """Load, and see what happens. Whatever this rank raises itself counts as a fault, if nobody noted one before."""
    global _current
    seen = _current = Seen()
    try:
        with _watched(seen):
            seen.failure = failure_of(load)
            seen.raised_at = time.monotonic()
    finally:
        _current = None
    return seen


@contextmanager
def _watched(seen: Seen) -> Iterator[None]:
    begin_round, share, leave = Exchange._begin_round, Exchange.share, Exchange.leave
    all_flags = steps._all_flags

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            try:
                return function(*args)
            except BaseException:
                note_fault()
                raise

        return call

    def watched_begin(self: Exchange, *args: Any) -> Any:
        seen.begun.append(time.monotonic())
        return begin_round(self, *args)

    def watched_share(self: Exchange, phase: Phase, find: Callable[[], tuple[Any, Any]]) -> bool:
        def found() -> tuple[Any, Any]:
            need, step = noting(find)()
            return need, noting(step)

        return share(self, phase, found)

    def watched_leave(self: Exchange, error: BaseException | None) -> None:
        if error is not None and not isinstance(error, OtherRankError):
            note_fault()
        leave(self, error)

    def watched_flags(ranks: Any, step: str, outcome: Any, *args: Any) -> Any:
        if outcome.error is not None and not isinstance(outcome.error, OtherRankError):
            note_fault()  # of a step before the exchange, or after it
        return all_flags(ranks, step, outcome, *args)

    with (
        mock.patch.object(Exchange, "_begin_round", watched_begin),
        mock.patch.object(Exchange, "share", watched_share),
        mock.patch.object(Exchange, "leave", watched_leave),
        mock.patch.object(steps, "_all_flags", watched_flags),
    ):
        yield


def assert_told_in_time(of_ranks: Sequence[Seen], again: Callable[[], Sequence[Seen]]) -> None:
    """After a fault on one rank all of them leave within the next round, and raise within a second of that.

    Args:
        of_ranks: what each rank saw.
        again: the same load once more. A machine that others use may take longer once, but not each time.
    """
    for _ in range(ATTEMPTS):
        failing = [seen for seen in of_ranks if seen.failed_at is not None]
        assert failing, "nothing failed"
        begun_then = min(seen.begun_then for seen in failing)
        for rank, seen in enumerate(of_ranks):
            assert len(seen.begun) <= begun_then + 1, f"rank {rank} goes on: {of_ranks}"
        if _told_in_seconds(of_ranks):
            return
        of_ranks = again()
    raise AssertionError(f"ranks raise too late: {of_ranks}")


def _told_in_seconds(of_ranks: Sequence[Seen]) -> bool:
    """Whether all ranks raise within a second and a round, as long as one took in this load."""
    failed_at = min(seen.failed_at for seen in of_ranks if seen.failed_at is not None)
    longest = max(seen.longest_round for seen in of_ranks)
    return max(seen.raised_at for seen in of_ranks) - failed_at <= MOST_SECONDS + longest
