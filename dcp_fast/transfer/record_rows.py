"""Where records lie, as columns for the engine."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

from torch.distributed.checkpoint.planner import LoadItemType, ReadItem
from typing_extensions import Buffer

_BYTE_IO = LoadItemType.BYTE_IO  # an enum's attributes are slow to get


class Place(NamedTuple):
    """Where a record lies.

    Attributes:
        file: its name, as :meth:`Records.path` takes it.
        offset, length: the byte range in the file.
        is_transformed: whether a transform was applied to it.
        payload: dtype code and sizes, if the record is a mere payload; None if it is an archive.
    """

    file: str
    offset: int
    length: int
    is_transformed: bool = False
    payload: tuple[int, Sequence[int]] | None = None


class RecordRows:
    """Where the records of a plan lie, for ``_native.open_files``.

    Attributes:
        files: names of the files that hold a record, in the order in which the plan first needs them.
        rows: four numbers for each record: the index of its file, offset and length in bytes, and 1 if torch must read
            it, else 0.
        payloads: of each record its dtype, number of dimensions and sizes; None if records are archives.
        fqns: of each record.
        transformed: the records that a transform was applied to.
    """

    def __init__(
        self,
        files: Sequence[str] = (),
        rows: Sequence[int] = (),
        fqns: Iterable[str] = (),
        payloads: Buffer | None = None,
    ) -> None:
        self._numbers = {name: number for number, name in enumerate(files)}
        self.rows = array("q", rows)
        self.fqns = list(fqns)
        self.payloads = payloads
        self.transformed: set[int] = set()

    @property
    def files(self) -> list[str]:
        return list(self._numbers)

    def place_of(self, record: int) -> tuple[int, int]:
        """File and offset."""
        return self.rows[4 * record], self.rows[4 * record + 1]

    def length_of(self, record: int) -> int:
        """In bytes."""
        return self.rows[4 * record + 2]

    def add(self, item: ReadItem, place: Place, all_fallback: bool) -> None:
        file = self._numbers.setdefault(place.file, len(self._numbers))
        if place.is_transformed:
            self.transformed.add(len(self.fqns))
        fallback = False
        if place.payload is None:
            fallback = all_fallback or item.type is _BYTE_IO or place.is_transformed
        else:
            code, sizes = place.payload
            self.payloads = self.payloads or array("q")
            cast("array[int]", self.payloads).extend((code, len(sizes), *sizes))
        self.rows.extend((file, place.offset, place.length, fallback))
        self.fqns.append(item.storage_index.fqn)
