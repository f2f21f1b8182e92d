"""Directories of safetensors files: how they are written, and how others than dcp_fast read them."""

from __future__ import annotations

import ctypes
import importlib
import json
import math
import os
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.storage import StorageReader

from benchmarks import gpus
from benchmarks.contenders import Contender, Sample

Shapes = Mapping[str, tuple[int, ...]]

KIND = "huggingface"
# Nothing but headers: the payloads are holes in their files.
MANY = "huggingface_many"
FILES = {KIND: 4, MANY: 163}
LOAD_FILE = "load_file"
# The shape of the experts of a large model of today, with a scale for each block of each weight.
LAYERS, EXPERTS, BLOCK = 61, 248, 128
HIDDEN, INNER = 7168, 2048
MOST_TENSORS = 91_000
DTYPES = {torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3"}


def many_shapes(scale: float) -> dict[str, tuple[int, ...]]:
    """91,000 tensors at scale 1."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            for name, (rows, columns) in (
                ("gate", (INNER, HIDDEN)),
                ("up", (INNER, HIDDEN)),
                ("down", (HIDDEN, INNER)),
            ):
                fqn = f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight"
                shapes[fqn] = (rows, columns)
                shapes[f"{fqn}_scale_inv"] = (rows // BLOCK, columns // BLOCK)
    count = max(1, round(MOST_TENSORS * scale))
    return dict(list(shapes.items())[:count])


def dtype_of(kind: str, fqn: str) -> torch.dtype:
    return torch.float8_e4m3fn if kind == MANY and not fqn.endswith("_scale_inv") else torch.float32


def write(directory: Path, kind: str, shapes: Shapes, generator: torch.Generator) -> None:
    """Files of about the same size, and their index."""
    directory.mkdir()
    files = min(FILES[kind], len(shapes))
    sizes = {name: math.prod(shape) * dtype_of(kind, name).itemsize for name, shape in shapes.items()}
    share = sum(sizes.values()) / files
    parts: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if filled >= share * len(parts) and len(parts) < files:
            parts.append([])
        parts[-1].append(name)
        filled += size
    weight_map: dict[str, str] = {}
    for number, names in enumerate(parts):
        file_name = f"model-{number + 1:05}-of-{len(parts):05}.safetensors"
        weight_map |= dict.fromkeys(names, file_name)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            place = [end, end := end + sizes[name]]
            header[name] = {"dtype": DTYPES[dtype_of(kind, name)], "shape": shapes[name], "data_offsets": place}
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        with (directory / file_name).open("wb") as file:
            file.write(struct.pack("<Q", len(encoded)) + encoded)
            if kind == MANY:
                file.truncate(file.tell() + end)
            else:
                for name in names:
                    tensor = torch.randn(shapes[name], generator=generator)
                    file.write(ctypes.string_at(tensor.data_ptr(), tensor.nbytes))
            file.flush()
            os.fsync(file.fileno())
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def is_huggingface(checkpoint: Path) -> bool:
    return not (checkpoint / ".metadata").exists() and any(checkpoint.glob("*.safetensors"))


def reader_of_torch(checkpoint: Path, threads: int = 1) -> StorageReader:
    """The one that fits the checkpoint."""
    if is_huggingface(checkpoint):
        return HuggingFaceStorageReader(str(checkpoint), thread_count=threads)
    return FileSystemReader(checkpoint)


def payload_offset(path: Path, name: str) -> int:
    """Where in its file a tensor's bytes begin."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        begin: int = json.loads(file.read(size))[name]["data_offsets"][0]
    return 8 + int(size) + begin


def why_missing() -> str | None:
    """None where torch's reader can be used, which needs the safetensors package; else the reason why not."""
    try:
        importlib.import_module("safetensors.torch")
    except ImportError as error:
        return str(error)
    return None


def load_file_contender(checkpoint: Path, tensors: Mapping[str, torch.Tensor]) -> Contender:
    """safetensors' own loader, which hands out tensors of its own on the same device, copied into ours."""
    load_file: Callable[..., dict[str, torch.Tensor]] = importlib.import_module("safetensors.torch").load_file
    devices = gpus.of(tensors.values())
    device = str(next(iter(devices), "cpu"))

    def run() -> Sample:
        start = time.perf_counter()
        for path in sorted(checkpoint.glob("*.safetensors")):
            for name, tensor in load_file(path, device=device).items():
                tensors[name].copy_(tensor)
        gpus.wait_for(devices)
        return Sample(time.perf_counter() - start)

    return Contender(LOAD_FILE, run)
