"""Where the bytes that a workload wants lie in the files of a checkpoint: found from each record's zip directory."""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import _create_chunk_list

from benchmarks import huggingface
from benchmarks.destinations import Destinations

LOCAL_HEADER_BYTES = 30


@dataclass(frozen=True)
class Box:
    """Rows of a stored chunk that a destination wants. All but the path and the offset is in elements.

    Where the rows follow each other without gaps, on both sides, they are one.
    """

    path: Path
    # Of the first element, in bytes.
    offset: int
    dtype: torch.dtype
    rows: int
    width: int
    # From row to row in the file.
    stride: int
    tensor: str
    # Of the first element in the destination, and from row to row there.
    start: int
    step: int


@dataclass(frozen=True)
class Segment:
    """A contiguous byte range of a file, and the tensor in whose bytes it belongs at ``start``."""

    path: Path
    offset: int
    length: int
    tensor: str
    start: int

    def split(self, block_bytes: int) -> Iterator[Segment]:
        for start in range(0, self.length, block_bytes):
            length = min(block_bytes, self.length - start)
            yield Segment(self.path, self.offset + start, length, self.tensor, self.start + start)


def payload_segments(checkpoint: Path, destinations: Destinations) -> list[Segment] | None:
    """The wanted bytes in their stored dtype. None where what is wanted is not contiguous in the files."""
    boxes = payload_boxes(checkpoint, destinations)
    if any(box.rows > 1 for box in boxes):
        return None
    return [
        Segment(box.path, box.offset, box.width * size, box.tensor, box.start * size)
        for box, size in ((box, box.dtype.itemsize) for box in boxes)
    ]


def payload_boxes(checkpoint: Path, destinations: Destinations) -> list[Box]:
    """The boxes of all stored chunks that the destinations want. Tensors are vectors or matrices."""
    metadata = huggingface.reader_of_torch(checkpoint).read_metadata()
    from_headers = huggingface.is_huggingface(checkpoint)
    boxes: list[Box] = []
    with ExitStack() as stack:
        files: dict[str, io.BufferedReader] = {}
        for name in destinations.local:
            stored = metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata)
            (wanted,) = _create_chunk_list(destinations.state[name])
            for chunk in stored.chunks:
                begin = [max(pair) for pair in zip(chunk.offsets, wanted.offsets, strict=True)]
                lengths = [
                    min(c + c_size, w + w_size) - b
                    for c, c_size, w, w_size, b in zip(
                        chunk.offsets, chunk.sizes, wanted.offsets, wanted.sizes, begin, strict=True
                    )
                ]
                if min(lengths) <= 0:
                    continue
                info = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
                path = Path(info.relative_path) if from_headers else checkpoint / info.relative_path
                if from_headers:
                    payload = huggingface.payload_offset(path, name)
                else:
                    if info.relative_path not in files:
                        files[info.relative_path] = stack.enter_context(path.open("rb"))
                    payload = _payload_offset(files[info.relative_path], info.offset, info.length)
                # A vector is a matrix of one row.
                *_, rows, width = 1, *lengths
                *_, stride = chunk.sizes
                *_, step = wanted.sizes
                first = _position(begin, chunk.offsets, stride)
                start = _position(begin, wanted.offsets, step)
                if width == stride == step:
                    rows, width = 1, rows * width
                dtype = stored.properties.dtype
                offset = payload + first * dtype.itemsize
                boxes.append(Box(path, offset, dtype, rows, width, stride, name, start, step))
    return boxes


def _position(of: list[int], origin: torch.Size, row: int) -> int:
    """Where an element lies in a vector or matrix that begins at the origin, whose rows have so many elements."""
    *above, column = (place - first for place, first in zip(of, origin, strict=True))
    return sum(above) * row + column


class _Record(io.RawIOBase):
    """The part of a file that holds one record, as a file of its own.

    torch has such a view, but its seeks from the end go the wrong way, and ``zipfile`` needs them.
    """

    def __init__(self, file: io.BufferedReader, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._position = file, offset, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = origin + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._length - self._position)
        self._file.seek(self._offset + self._position)
        data = self._file.read(left if size is None or size < 0 else min(size, left))
        self._position += len(data)
        return data


def _payload_offset(file: io.BufferedReader, offset: int, length: int) -> int:
    """The file offset of the tensor's bytes in the ``torch.save`` archive at [offset, offset + length)."""
    with zipfile.ZipFile(_Record(file, offset, length)) as archive:
        (entry,) = [info for info in archive.infolist() if info.filename.endswith("/data/0")]
    assert entry.compress_type == zipfile.ZIP_STORED
    file.seek(offset + entry.header_offset)
    name_bytes, extra_bytes = struct.unpack_from("<HH", file.read(LOCAL_HEADER_BYTES), 26)
    return offset + entry.header_offset + LOCAL_HEADER_BYTES + int(name_bytes) + int(extra_bytes)
