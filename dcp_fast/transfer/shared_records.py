"""Whole records that ranks share: bytes entries, and records that only torch can read.

They arrive one batch after another, and are in memory until the next batch is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence


def batches_of_records(records: Iterable[int], length: Callable[[int], int], most_bytes: int) -> Iterator[list[int]]:
    """Cut records into batches. Torch reads a record as a whole, so one that is larger than a batch has its own.

    Args:
        records: by number, in the order in which they are read. Of those that are there twice the first one counts.
        length: of a record, in bytes.
        most_bytes: memory for a batch.
    """
    batch: list[int] = []
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

    Args:
        batches: the numbers of records of each.
        fetch: has a batch arrive. Returns what lets go of its memory; None if it is read alone.
    """

    def __init__(
        self, batches: Sequence[Sequence[int]], fetch: Callable[[Sequence[int]], Callable[[], None] | None]
    ) -> None:
        self._batches = batches
        self._fetch = fetch
        self._batch_of = {record: number for number, batch in enumerate(batches) for record in batch}
        self._here = -1  # number of the batch that is in memory
        self._drop: Callable[[], None] | None = None
        self._error: BaseException | None = None

    def __len__(self) -> int:
        return len(self._batches)

    def runs(self, records: Iterable[int]) -> Iterator[list[int]]:
        """Cut records where a batch has to arrive, which it does when the run behind is asked for.

        A record that is gone already is read from its file again.

        Raises:
            MemoryError: there is no memory for a batch.
            Exception: an exchange failed. It is raised again in further calls, as there is nothing to try again.
        """
        run: list[int] = []
        for record in records:
            if self._batch_of.get(record, -1) > self._here:
                if run:
                    yield run
                run = []
                self._go_to(self._batch_of[record])
            run.append(record)
        if run:
            yield run

    def reach(self, record: int) -> None:
        """Have a record arrive, if it is yet to come. Raises as :meth:`runs`."""
        for _ in self.runs([record]):
            pass

    def close(self) -> None:
        """Let go of what is in memory."""
        drop, self._drop = self._drop, None
        if drop is not None:
            drop()

    def _go_to(self, number: int) -> None:
        if self._error is not None:
            raise self._error
        while self._here < number:
            self.close()
            try:
                self._drop = self._fetch(self._batches[self._here + 1])
            except BaseException as error:
                self._error = error
                raise
            self._here += 1
