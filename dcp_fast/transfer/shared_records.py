"""Whole records that ranks share: bytes entries, and records that only torch can read.

They arrive one batch after another, and are in memory until they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

# Batches that are in memory at the same time: what is read in a window of items need not be in their order.
_MOST_HERE = 2


def batches_of_records(records: Iterable[int], length: Callable[[int], int], most_bytes: int) -> Iterator[list[int]]:
    """Cut records into batches, of which several have room at once.

    Torch reads a record as a whole, so one that is larger than a batch has its own.

    Args:
        records: by number, in the order in which they are read. Of those that are there twice the first one counts.
        length: of a record, in bytes.
        most_bytes: memory for batches.
    """
    batch: list[int] = []
    most_bytes //= _MOST_HERE
    room = most_bytes
    for record in dict.fromkeys(records):
        if batch and length(record) > room:
            yield batch
            batch, room = [], most_bytes
        batch.append(record)
        room -= length(record)
    if batch:
        yield batch


class SharedRecords:
    """Batches of records that arrive one after another, when one of their records is read.

    A batch is in memory until all of its records are read, or until there must be room for another one.

    Args:
        batches: the numbers of records of each.
        fetch: has a batch arrive. Returns what lets go of its memory; None if it is read alone.
        note_gone: called when a record is read that has been in memory, and is no more.
    """

    def __init__(
        self,
        batches: Sequence[Sequence[int]],
        fetch: Callable[[Sequence[int]], Callable[[], None] | None],
        note_gone: Callable[[], None],
    ) -> None:
        self._batches = batches
        self._fetch = fetch
        self._note_gone = note_gone
        self._batch_of = {record: number for number, batch in enumerate(batches) for record in batch}
        self._come = 0  # how many have had their turn
        self._fetched: set[int] = set()  # those of them that did not have to be read alone
        self._unread: dict[int, set[int]] = {}  # records of the batches that are in memory, by their number
        self._drops: dict[int, Callable[[], None]] = {}  # of each what lets go of it

    def __len__(self) -> int:
        return len(self._batches)

    def runs(self, records: Iterable[int]) -> Iterator[list[int]]:
        """Cut records where a batch has to arrive, which it does when the run behind is asked for.

        A record that is in memory no more is read from its file again.

        Raises:
            MemoryError: there is no memory for a batch.
            Exception: an exchange failed. It is raised again in further calls, as there is nothing to try again.
        """
        if not self._batches:  # so that tens of thousands of records need not be looked at
            yield list(records)
            return
        run: list[int] = []
        for record in records:
            number = self._batch_of.get(record, -1)
            if number >= self._come:
                if run:
                    yield run
                self._have_read(run)
                run = []
                while number >= self._come:
                    self._go_on()
            elif number in self._fetched and number not in self._unread:
                self._note_gone()
            run.append(record)
        if run:
            yield run
        self._have_read(run)

    @contextmanager
    def reach(self, record: int) -> Iterator[None]:
        """Have a record arrive, if it is yet to come, and be in memory within. Raises as :meth:`runs`."""
        for _ in self.runs([record]):
            yield

    def close(self) -> None:
        """Let go of what is in memory."""
        for number in list(self._unread):
            self._drop(number)

    def _go_on(self) -> None:
        if len(self._unread) == _MOST_HERE:
            self._drop(min(self._unread))
        batch = self._batches[self._come]
        drop = self._fetch(batch)
        if drop is not None:
            self._fetched.add(self._come)
            self._unread[self._come] = set(batch)
            self._drops[self._come] = drop
        self._come += 1

    def _have_read(self, records: Iterable[int]) -> None:
        for record in records:
            number = self._batch_of.get(record, -1)
            if number in self._unread:
                self._unread[number].discard(record)
                if not self._unread[number]:
                    self._drop(number)

    def _drop(self, number: int) -> None:
        del self._unread[number]
        self._drops.pop(number)()
