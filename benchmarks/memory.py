"""What limits a warm load: the best raw way to bring the wanted bytes from the page cache into their destinations.

``memory.cpp`` does it, by ``pread`` or from a mapping. It is compiled here, by the compiler of the system, and kept in
the data directory. A dtype that differs is converted on the way, from float32 to bfloat16, which is all that workloads
ask for.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.budget import Budget
from benchmarks.ceilings import Setting, TunedCeiling, cores, opened, tuned
from benchmarks.destinations import Destinations
from benchmarks.payloads import Box, payload_boxes
from benchmarks.workloads import MIB

NAME = "memory"
PREAD, MAPPED = "pread", "mapped"
BLOCKS = tuple(size * MIB for size in (4, 1, 16))
SOURCE = Path(__file__).with_name("memory.cpp")
OPTIONS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-pthread")


class MissingError(Exception):
    """This machine cannot build the program; the text says why."""


class _Box(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int64) for name in ("file", "offset", "rows", "row_bytes", "stride", "destination", "step")
    )


class _Setting(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in ("mapped", "block_bytes", "threads", "to_bfloat16"))


def settings(threads: Sequence[int]) -> list[Setting]:
    return [Setting(n, block, way=way) for way, block, n in itertools.product((MAPPED, PREAD), BLOCKS, threads)]


def memory_ceiling(checkpoint: Path, destinations: Destinations, folder: Path, budget: Budget) -> TunedCeiling:
    """Raises MissingError where there is no compiler."""
    copies = Copies(payload_boxes(checkpoint, destinations), destinations.local, folder)
    return tuned(NAME, copies.run, settings((cores(), 2 * cores())), budget, fills_destinations=True)


class Copies:
    """Boxes on their way into tensors on the host, which must be contiguous. Raises MissingError."""

    def __init__(self, boxes: Sequence[Box], tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
        self._library = library(folder)
        self._paths = sorted({box.path for box in boxes})
        self._tensors = tensors  # kept alive
        (self._converts,) = {box.dtype != tensors[box.tensor].dtype for box in boxes}
        numbers = {path: number for number, path in enumerate(self._paths)}
        self._boxes = (_Box * len(boxes))()
        for box, row in zip(boxes, self._boxes, strict=True):
            tensor = tensors[box.tensor]
            assert tensor.is_contiguous()
            assert not self._converts or (box.dtype, tensor.dtype) == (torch.float32, torch.bfloat16)
            row.file, row.offset, row.rows = numbers[box.path], box.offset, box.rows
            row.row_bytes, row.stride = box.width * box.dtype.itemsize, box.stride * box.dtype.itemsize
            row.destination = tensor.data_ptr() + box.start * tensor.itemsize
            row.step = box.step * tensor.itemsize

    def run(self, setting: Setting) -> float:
        """Copy all of them, and return how many seconds that took."""
        wanted = _Setting(setting.way == MAPPED, setting.block_bytes, setting.threads, self._converts)
        with opened(self._paths, 0) as fds:
            numbers = (ctypes.c_int32 * len(fds))(*(fds[path] for path in self._paths))
            seconds: float = self._library.copy_boxes(numbers, self._boxes, len(self._boxes), ctypes.byref(wanted))
        if seconds < 0:
            raise OSError(-int(seconds), os.strerror(-int(seconds)))
        return seconds


@functools.cache
def library(folder: Path) -> ctypes.CDLL:
    """The program, built once for each version of its source and compiler. Raises MissingError."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise MissingError("there is no C++ compiler here")
    digest = hashlib.sha256(SOURCE.read_bytes() + f"{compiler} {OPTIONS}".encode()).hexdigest()
    path = folder.resolve() / f"memory-{digest[:12]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        try:
            subprocess.run(
                [*compiler.split(), *OPTIONS, "-o", str(unfinished), str(SOURCE)],
                check=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        except (OSError, subprocess.CalledProcessError) as error:
            output = getattr(error, "output", None) or b""
            first = output.decode(errors="replace").strip().partition("\n")[0]
            raise MissingError(f"{compiler} cannot build {SOURCE.name}: {first or error}") from error
        unfinished.replace(path)
    loaded = ctypes.CDLL(str(path))
    loaded.copy_boxes.restype = ctypes.c_double
    return loaded
