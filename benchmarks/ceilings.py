"""What the machine itself can do: plain reads of the same bytes, with no checkpoint logic at all.

``pread``: several threads read exactly the payload bytes straight into the destination tensors.
``direct``: several threads read whole files past the page cache into aligned buffers that they reuse.
"""

from __future__ import annotations

import io
import mmap
import os
import struct
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import _create_chunk_list

from benchmarks.contenders import Contender, Sample
from benchmarks.destinations import Destinations, bytes_of
from benchmarks.workloads import MIB

ALIGNMENT = 4096
LOCAL_HEADER_BYTES = 30


@dataclass(frozen=True)
class Setting:
    threads: int
    block_bytes: int

    def __str__(self) -> str:
        return f"{self.threads} {'thread' if self.threads == 1 else 'threads'} x {self.block_bytes // MIB} MiB"


@dataclass(frozen=True)
class Ceiling:
    """Plain reads, with the setting that was best here, and what the other settings took."""

    name: str
    best: Setting
    tried: dict[str, float]

    def __str__(self) -> str:
        return f"{self.name}: {self.best} (best of {len(self.tried)} settings)"


@dataclass(frozen=True)
class TunedCeiling(Ceiling):
    """A ceiling that can take part in the rounds of this process."""

    contender: Contender


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


# The memory that a segment is read into, by the thread of this number.
MemoryOf = Callable[[Segment, int], memoryview]


def candidate_settings() -> list[Setting]:
    cores = len(os.sched_getaffinity(0))
    threads = sorted({2, 4, 8, min(cores, 32)})
    return [Setting(count, block) for count in threads for block in (4 * MIB, 16 * MIB)]


def pread_ceiling(checkpoint: Path, destinations: Destinations) -> TunedCeiling | None:
    """None where what is wanted is not contiguous in the files, or stored as a dtype of another size."""
    segments = payload_segments(checkpoint, destinations)
    if segments is None or sum(segment.length for segment in segments) != destinations.nbytes:
        return None
    memory_of = into_tensors(destinations.local)
    return tuned(
        "pread",
        lambda setting: read_segments(segments, setting, memory_of),
        candidate_settings(),
        fills_destinations=True,
    )


def direct_ceiling(paths: list[Path], prepare: Callable[[], None]) -> TunedCeiling | None:
    """None where the file system refuses O_DIRECT. ``prepare`` evicts the files before each reading."""
    try:
        with _opened(paths, os.O_DIRECT):
            pass
    except OSError:
        return None
    settings = candidate_settings()
    buffers = [mmap.mmap(-1, max(s.block_bytes for s in settings)) for _ in range(max(s.threads for s in settings))]
    for buffer in buffers:
        buffer.write(bytes(len(buffer)))  # touch every page

    def run(setting: Setting) -> float:
        prepare()
        return _read_direct(paths, setting, buffers)

    return tuned("direct", run, settings, fills_destinations=False)


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
    return lambda segment, _: memory[segment.tensor][segment.start : segment.start + segment.length]


def read_segments(segments: list[Segment], setting: Setting, memory_of: MemoryOf) -> float:
    """Read all segments, and return how many seconds that took."""
    pieces = deque(piece for segment in segments for piece in segment.split(setting.block_bytes))
    paths = sorted({segment.path for segment in segments})

    start = time.perf_counter()
    with _opened(paths, 0) as fds:

        def worker(index: int) -> None:
            while True:
                try:
                    piece = pieces.popleft()
                except IndexError:
                    return
                _read_fully(fds[piece.path], piece.offset, memory_of(piece, index))

        _on_threads(setting.threads, worker)
    return time.perf_counter() - start


def _read_direct(paths: list[Path], setting: Setting, buffers: list[mmap.mmap]) -> float:
    block = setting.block_bytes
    pieces = deque((path, offset) for path in paths for offset in range(0, path.stat().st_size, block))

    start = time.perf_counter()
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

        _on_threads(setting.threads, worker)
    return time.perf_counter() - start


def tuned(
    name: str, run: Callable[[Setting], float], settings: Sequence[Setting], *, fills_destinations: bool
) -> TunedCeiling:
    """Try every setting twice, and keep the one with the best time."""
    tried = {setting: min(run(setting) for _ in range(2)) for setting in settings}
    best = min(tried, key=lambda setting: tried[setting])
    contender = Contender(name, lambda: Sample(run(best)), fills_destinations)
    return TunedCeiling(name, best, {str(setting): seconds for setting, seconds in tried.items()}, contender)


def _read_fully(fd: int, offset: int, memory: memoryview) -> None:
    done = 0
    while done < len(memory):
        count = os.preadv(fd, [memory[done:]], offset + done)
        if count == 0:
            raise EOFError(f"the file ends at {offset + done}, before {offset + len(memory)}")
        done += count


def _on_threads(count: int, worker: Callable[[int], None]) -> None:
    with ThreadPoolExecutor(count) as pool:
        for _ in pool.map(worker, range(count)):
            pass  # raises what a worker raised


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
