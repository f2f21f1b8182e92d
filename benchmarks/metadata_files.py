"""Metadata of checkpoints that thousands of ranks wrote, made opcode by opcode: objects of torch would take gigabytes.

The bytes are those that pickle writes for what torch's planner and writer gather from the ranks: each rank sends its
part pickled, so that strings are shared within the part of a rank and not across ranks.
"""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from typing import BinaryIO

from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

__all__ = ["COLUMNS", "ROWS", "add_plans", "fqns", "write_metadata"]

COLUMNS = 1024
ROWS = 4  # of each chunk
_FRAME_BYTES = 64 << 10  # a frame ends with the object at hand once it has as many: CPython's Modules/_pickle.c
_CHECKPOINT = "torch.distributed.checkpoint.metadata"


class _Pickle:
    """Opcodes of protocol 4, memoized and put into frames as pickle does."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._file.write(b"\x80\x04")
        self._frame: list[bytes] = []
        self._frame_bytes = 0
        self._memo = 0

    def put(self, opcodes: bytes) -> None:
        self._frame.append(opcodes)
        self._frame_bytes += len(opcodes)
        if self._frame_bytes >= _FRAME_BYTES:
            self.end_frame()

    def memoized(self, opcodes: bytes) -> int:
        self.put(opcodes + b"\x94")
        self._memo += 1
        return self._memo - 1

    def skip(self, count: int) -> None:
        """Count objects whose MEMOIZE opcodes were part of ``put``."""
        self._memo += count

    def text(self, text: str) -> int:
        data = text.encode()
        return self.memoized(b"\x8c" + bytes([len(data)]) + data)

    def type(self, module: str, name: str) -> int:
        self.text(module)
        self.text(name)
        return self.memoized(b"\x93")

    def end_frame(self) -> None:
        self._file.write(b"\x95" + struct.pack("<Q", self._frame_bytes) + b"".join(self._frame))
        self._frame.clear()
        self._frame_bytes = 0


def _get(index: int) -> bytes:
    return bytes([0x68, index]) if index < 256 else b"j" + struct.pack("<I", index)


def _number(value: int) -> bytes:
    if value < 1 << 8:
        return b"K" + bytes([value])
    return b"M" + struct.pack("<H", value) if value < 1 << 16 else b"J" + struct.pack("<i", value)


def fqns(tensors: int) -> list[str]:
    return [f"model.layers.{i // 10}.block.{i % 10}.weight" for i in range(tensors)]


def write_metadata(file: BinaryIO, tensors: int, ranks: int) -> None:
    """Write the ``.metadata`` of float32 tensors, each sharded by rows over all ranks."""
    out = _Pickle(file)
    names = fqns(tensors)
    metadata = out.type(_CHECKPOINT, "Metadata")
    del metadata
    out.memoized(b")\x81")
    out.memoized(b"}")
    out.put(b"(")
    out.text("state_dict_metadata")
    out.memoized(b"}")
    entry_type = properties_type = size_type = chunk_type = dtype = layout = memory_format = -1
    fields: dict[str, int] = {}

    def field(name: str) -> None:
        if name in fields:
            out.put(_get(fields[name]))
        else:
            fields[name] = out.text(name)

    def size(*numbers: int) -> bytes:
        """Three objects for the memo."""
        tuple_opcode = {1: b"\x85", 2: b"\x86"}[len(numbers)]
        return _get(size_type) + b"".join(map(_number, numbers)) + tuple_opcode + b"\x94\x85\x94R\x94"

    # The types are named where pickle would first name them; all later uses recall them.
    for begin in range(0, tensors, 1000):
        out.put(b"(")
        for name in names[begin : begin + 1000]:
            out.text(name)
            if entry_type < 0:
                entry_type = out.type(_CHECKPOINT, "TensorStorageMetadata")
            else:
                out.put(_get(entry_type))
            out.memoized(b")\x81")
            out.memoized(b"}")
            out.put(b"(")
            field("properties")
            if properties_type < 0:
                properties_type = out.type(_CHECKPOINT, "TensorProperties")
            else:
                out.put(_get(properties_type))
            out.memoized(b")\x81")
            out.put(b"(")
            if dtype < 0:
                dtype = out.type("torch", "float32")
                out.type("torch.serialization", "_get_layout")
                out.text("torch.strided")
                out.memoized(b"\x85")
                layout = out.memoized(b"R")
                out.put(b"\x89")
                out.type(_CHECKPOINT, "_MEM_FORMAT_ENCODING")
                out.put(b"K\0")
                out.memoized(b"\x85")
                memory_format = out.memoized(b"R")
            else:
                out.put(_get(dtype) + _get(layout) + b"\x89" + _get(memory_format))
            out.put(b"\x89")
            out.memoized(b"t")
            out.put(b"b")
            field("size")
            if size_type < 0:
                size_type = out.type("torch", "Size")
                out.put(b"0")
            out.put(size(ROWS * ranks, COLUMNS))
            out.skip(3)
            field("chunks")
            out.memoized(b"]")
            for first in range(0, ranks, 1000):
                out.put(b"(")
                for rank in range(first, min(first + 1000, ranks)):
                    if chunk_type < 0:
                        chunk_type = out.type(_CHECKPOINT, "ChunkStorageMetadata")
                    else:
                        out.put(_get(chunk_type))
                    out.put(b")\x81\x94}\x94(")
                    out.skip(2)
                    field("offsets")
                    offsets = size(ROWS * rank, 0)
                    out.put(offsets)
                    out.skip(3)
                    field("sizes")
                    out.put(size(ROWS, COLUMNS) + b"ub")
                    out.skip(3)
                out.put(b"e")
            out.put(b"ub")
        out.put(b"u")

    out.text("planner_data")
    out.memoized(b"}")
    for name in names:
        out.put(b"(")
        out.text(name)
        out.text(name)
        out.put(b"\x85")
        out.put(b"\x94")
        out.skip(1)
        out.put(b"u")
    out.text("storage_data")
    out.memoized(b"}")
    index_type = info_type = -1
    for rank in range(ranks):
        path = -1
        offset = 0
        for begin in range(0, tensors, 1000):
            out.put(b"(")
            for name in names[begin : begin + 1000]:
                if index_type < 0:
                    index_type = out.type(_CHECKPOINT, "MetadataIndex")
                else:
                    out.put(_get(index_type))
                out.put(b")\x81\x94}\x94(")
                out.skip(2)
                field("fqn")
                out.text(name)
                field("index")
                out.put(_number(rank))
                field("offset")
                out.put(size(ROWS * rank, 0) + b"ub")
                out.skip(3)
                if info_type < 0:
                    info_type = out.type("torch.distributed.checkpoint.filesystem", "_StorageInfo")
                else:
                    out.put(_get(info_type))
                out.put(b")\x81\x94}\x94(")
                out.skip(2)
                field("relative_path")
                if path < 0:
                    path = out.text(f"__{rank}_0.distcp")
                else:
                    out.put(_get(path))
                length = 4 * ROWS * COLUMNS + 1400
                field("offset")
                out.put(_number(offset))
                field("length")
                out.put(_number(length) + b"ub")
                offset += length
            out.put(b"u")
    out.text("storage_meta")
    out.put(b"N")
    out.text("version")
    out.text("1.0.0")
    out.put(b"ub.")
    out.end_frame()


def add_plans(path: Path) -> None:
    """Put into a ``.metadata`` what Megatron-Core 0.16 adds to it: the plans of all ranks, and a dict."""
    metadata = pickle.loads(path.read_bytes())  # which is ours
    tensors = metadata.state_dict_metadata
    metadata.all_local_plans = [
        SavePlan(
            [
                WriteItem(
                    MetadataIndex(fqn, entry.chunks[rank].offsets, rank),
                    WriteItemType.SHARD,
                    tensor_data=TensorWriteData(entry.chunks[rank], entry.properties, entry.size),
                )
                for fqn, entry in tensors.items()
            ]
        )
        for rank in range(len(next(iter(tensors.values())).chunks))
    ]
    metadata.mcore_data = {
        fqn: {"nd_reformulated_orig_global_shape": tuple(entry.size)} for fqn, entry in tensors.items()
    }
    path.write_bytes(pickle.dumps(metadata))
