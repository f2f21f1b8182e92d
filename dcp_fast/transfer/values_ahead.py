"""Plain values of bytes entries, read natively before hooks let the entries have their turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from dcp_fast import _native
from dcp_fast.collector import paused_collection
from dcp_fast.observe.report import LoadReport

# What is read at once. Values take a small multiple of their records.
_MOST_RECORDS = 1024
_MOST_BYTES = 4 << 20


class ValuesAhead:
    """Values that a planner cannot tell from those that its ``load_bytes`` would make, which must be torch's.

    Args:
        layouts: of all records.
        options: how they are read.
        records: of bytes entries that were stored without a transform, as they have their turns.
        length_of: bytes of a record.
        report: counts what is read.
    """

    def __init__(
        self,
        layouts: _native.Layouts,
        options: _native.Options,
        records: Iterable[int],
        length_of: Callable[[int], int],
        report: LoadReport,
    ) -> None:
        self._layouts = layouts
        self._options = options
        self._records = list(dict.fromkeys(records))
        self._turns = {record: turn for turn, record in enumerate(self._records)}
        self._length_of = length_of
        self._report = report
        self._values: dict[int, Any] = {}
        self._read = 0  # turns whose records were read, or skipped

    def take(self, record: int) -> Any:
        """The value of a record, once; Ellipsis if it is not plain, or cannot be read, which tells the next attempt."""
        if record not in self._values and self._turns.get(record, -1) >= self._read:
            self._read_from(self._turns[record])
        return self._values.pop(record, ...)

    def _read_from(self, turn: int) -> None:
        end, size = turn, 0
        while end < len(self._records) and end - turn < _MOST_RECORDS:
            size += self._length_of(self._records[end])
            if size > _MOST_BYTES and end > turn:
                break
            end += 1
        batch, self._read = self._records[turn:end], end
        try:
            with paused_collection():
                values, requests, bytes_read = _native.read_plain_values(self._layouts, batch, self._options)
        except Exception:  # it is raised again where the record that cannot be read has its turn
            return
        self._report.requests += requests
        self._report.bytes_read += bytes_read
        self._values = {record: value for record, value in zip(batch, values, strict=True) if value is not ...}
