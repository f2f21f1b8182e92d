"""What the machine itself can do: plain reads of the same bytes, with no checkpoint logic at all.

``pread``: several threads read exactly the payload bytes straight into the destination tensors.
``direct``: several threads read whole files past the page cache into aligned buffers that they reuse.

A ceiling is the best of a grid of threads and block sizes, tried in the same run.
"""

from __future__ import annotations

import io
import mmap
import os
import struct
import threading
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import _create_chunk_list

from benchmarks.budget import Budget
from benchmarks.contenders import Contender, Sample
from benchmarks.destinations import Destinations, bytes_of
from benchmarks.workloads import MIB

ALIGNMENT = 4096
LOCAL_HEADER_BYTES = 30


@dataclass(frozen=True)
class Setting:
    threads: int
    # Of one request.
    block_bytes: int
    # What a request reads into, over and over; None: memory as large as the request.
    buffer_bytes: int | None = None

    def __str__(self) -> str:
        text = f"{self.threads} {'thread' if self.threads == 1 else 'threads'} x {self.block_bytes // MIB} MiB"
        return text if self.buffer_bytes is None else f"{text} into {self.buffer_bytes // MIB} MiB"


@dataclass(frozen=True)
class Ceiling:
    """Plain reads, with the setting that was best here, and what the other settings took."""

    name: str
    best: Setting
    tried: dict[str, float]
    # Settings that there was no time for.
    untried: int = 0

    def __str__(self) -> str:
        text = f"best of {len(self.tried)}"
        if self.untried:
            text += f", no time for {self.untried} more"
        return f"{self.name}: {self.best} ({text})"


@dataclass(frozen=True)
class TunedCeiling(Ceiling):
    """A ceiling that can take part in the rounds of this process."""

    contender: Contender = field(kw_only=True)


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


# The memory that a segment is read into, by the thread of this number: one piece after the other.
MemoryOf = Callable[[Segment, int], list[memoryview]]


def cores() -> int:
    return len(os.sched_getaffinity(0))


def candidate_settings(blocks: Sequence[int] = (4 * MIB, 16 * MIB)) -> list[Setting]:
    threads = sorted({2, 4, 8, min(cores(), 32)})
    return [Setting(count, block) for block in blocks for count in threads]


def pread_ceiling(checkpoint: Path, destinations: Destinations, budget: Budget) -> TunedCeiling | None:
    """None where what is wanted is not contiguous in the files, or stored as a dtype of another size."""
    segments = payload_segments(checkpoint, destinations)
    if segments is None or sum(segment.length for segment in segments) != destinations.nbytes:
        return None
    memory_of = into_tensors(destinations.local)
    return tuned(
        "pread",
        lambda setting: read_segments(segments, setting, memory_of),
        candidate_settings(),
        budget,
        fills_destinations=True,
    )


def direct_ceiling(paths: list[Path], prepare: Callable[[], None], budget: Budget) -> TunedCeiling | None:
    """None where the file system refuses O_DIRECT. ``prepare`` evicts the files before each reading."""
    try:
        with _opened(paths, os.O_DIRECT):
            pass
    except OSError:
        return None
    # Disks want larger requests than the page cache does: those come first, in case that there is no time for all.
    settings = candidate_settings((16 * MIB, 32 * MIB, 4 * MIB))
    buffers = [mmap.mmap(-1, max(s.block_bytes for s in settings)) for _ in range(max(s.threads for s in settings))]
    for buffer in buffers:
        buffer.write(bytes(len(buffer)))  # touch every page

    def run(setting: Setting) -> float:
        prepare()
        return _read_direct(paths, setting, buffers)

    return tuned("direct", run, settings, budget, fills_destinations=False)


def payload_segments(checkpoint: Path, destinations: Destinations) -> list[Segment] | None:
    """Where the wanted rows of every stored chunk lie, from each record's zip directory; in their stored dtype.

    None where what is wanted is not contiguous in the files.
    """
    metadata = FileSystemReader(checkpoint).read_metadata()
    segments: list[Segment] = []
    with ExitStack() as stack:
        files: dict[str, io.BufferedReader] = {}
        for name, local in destinations.local.items():
            stored = metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata)
            (wanted,) = _create_chunk_list(destinations.state[name])
            row = local.numel() // local.shape[0] * stored.properties.dtype.itemsize
            for chunk in stored.chunks:
                if chunk.sizes[1:] != wanted.sizes[1:] or chunk.offsets[1:] != wanted.offsets[1:]:
                    return None
                first = max(chunk.offsets[0], wanted.offsets[0])
                last = min(chunk.offsets[0] + chunk.sizes[0], wanted.offsets[0] + wanted.sizes[0])
                if first >= last:
                    continue
                info = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
                if info.relative_path not in files:
                    files[info.relative_path] = stack.enter_context((checkpoint / info.relative_path).open("rb"))
                payload = _payload_offset(files[info.relative_path], info.offset, info.length)
                offset = payload + (first - chunk.offsets[0]) * row
                start, length = (first - wanted.offsets[0]) * row, (last - first) * row
                segments.append(Segment(checkpoint / info.relative_path, offset, length, name, start))
    return segments


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


def into_tensors(tensors: dict[str, torch.Tensor]) -> MemoryOf:
    """Straight into the tensors that want the segments."""
    memory = {name: bytes_of(tensor) for name, tensor in tensors.items()}
    return lambda segment, _: [memory[segment.tensor][segment.start : segment.start + segment.length]]


def read_segments(segments: list[Segment], setting: Setting, memory_of: MemoryOf) -> float:
    """Read all segments, and return how many seconds that took."""
    pieces = deque(piece for segment in segments for piece in segment.split(setting.block_bytes))
    paths = sorted({segment.path for segment in segments})

    with _opened(paths, 0) as fds:

        def worker(index: int) -> None:
            while True:
                try:
                    piece = pieces.popleft()
                except IndexError:
                    return
                _read_fully(fds[piece.path], piece.offset, memory_of(piece, index))

        return _timed_on_threads(setting.threads, worker)


def _read_direct(paths: list[Path], setting: Setting, buffers: list[mmap.mmap]) -> float:
    block = setting.block_bytes
    pieces = deque((path, offset) for path in paths for offset in range(0, path.stat().st_size, block))

    with _opened(paths, os.O_DIRECT) as fds:

        def worker(index: int) -> None:
            with memoryview(buffers[index]) as buffer:
                while True:
                    try:
                        path, offset = pieces.popleft()
                    except IndexError:
                        return
                    # The length stays aligned at the end of the file, where the read is simply shorter.
                    done = 0
                    while done < block and (count := os.preadv(fds[path], [buffer[done:block]], offset + done)):
                        done += count
                        if done % ALIGNMENT:
                            break

        return _timed_on_threads(setting.threads, worker)


def tuned(
    name: str,
    run: Callable[[Setting], float],
    settings: Sequence[Setting],
    budget: Budget,
    *,
    fills_destinations: bool,
) -> TunedCeiling:
    """Try every setting twice, as far as the budget goes, and keep the one with the best time."""
    tried: dict[Setting, float] = {}
    for setting in settings:
        if tried and not budget.allows(2 * max(tried.values())):
            break
        tried[setting] = min(run(setting) for _ in range(2))
    best = min(tried, key=lambda setting: tried[setting])
    return TunedCeiling(
        name,
        best,
        {str(setting): seconds for setting, seconds in tried.items()},
        len(settings) - len(tried),
        contender=Contender(name, lambda: Sample(run(best)), fills_destinations),
    )


def _read_fully(fd: int, offset: int, memory: list[memoryview]) -> None:
    left = list(memory)
    while left:
        count = os.preadv(fd, left, offset)
        if count == 0:
            raise EOFError(f"the file ends at {offset}, {sum(map(len, left))} bytes too early")
        offset += count
        while left and count >= len(left[0]):
            count -= len(left.pop(0))
        if left:
            left[0] = left[0][count:]


def _timed_on_threads(count: int, worker: Callable[[int], None]) -> float:
    """How many seconds the workers took. The clock starts when all threads are there: they are no part of the limit."""
    ready = threading.Barrier(count + 1)

    def start(index: int) -> None:
        ready.wait()
        worker(index)

    with ThreadPoolExecutor(count) as pool:
        workers = [pool.submit(start, index) for index in range(count)]
        ready.wait()
        started = time.perf_counter()
        for future in workers:
            future.result()  # raises what a worker raised
        return time.perf_counter() - started


@contextmanager
def _opened(paths: list[Path], flags: int) -> Iterator[dict[Path, int]]:
    fds: dict[Path, int] = {}
    try:
        for path in paths:
            fds[path] = os.open(path, os.O_RDONLY | flags)
        yield fds
    finally:
        for fd in fds.values():
            os.close(fd)
