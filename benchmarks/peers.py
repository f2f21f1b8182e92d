"""Other loaders on the same tensors, written as one .safetensors file. Each runs only where it is installed.

They hand out tensors of their own, so each tensor is copied into the destination as a state dict load would do.
"""

from __future__ import annotations

import importlib
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.contenders import Contender, Sample
from benchmarks.destinations import bytes_of

Tensors = dict[str, torch.Tensor]


def write_safetensors(path: Path, tensors: Tensors) -> None:
    """Write fp32 tensors in the safetensors format: header length, JSON header, data back to back."""
    header: dict[str, object] = {}
    end = 0
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
        unfinished = Path(scratch) / path.name
        with unfinished.open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little"))
            file.write(encoded)
            for tensor in tensors.values():
                file.write(bytes_of(tensor))
        unfinished.replace(path)


def load_with_safetensors(path: Path, tensors: Tensors) -> None:
    safetensors = importlib.import_module("safetensors")
    with safetensors.safe_open(path, framework="pt", device="cpu") as file:
        for name in file.keys():  # noqa: SIM118 - the handle is no mapping
            tensors[name].copy_(file.get_tensor(name))


def load_with_runai_streamer(path: Path, tensors: Tensors) -> None:
    streaming = importlib.import_module("runai_model_streamer")
    with streaming.SafetensorsStreamer() as streamer:
        streamer.stream_file(str(path))
        for name, tensor in streamer.get_tensors():
            tensors[name].copy_(tensor)


def load_with_fastsafetensors(path: Path, tensors: Tensors) -> None:
    fastsafetensors = importlib.import_module("fastsafetensors")
    with fastsafetensors.fastsafe_open(filenames=[str(path)], nogds=True, device="cpu") as file:
        for name in file.keys():  # noqa: SIM118 - the handle is no mapping
            tensors[name].copy_(file.get_tensor(name))


PEERS: dict[str, Callable[[Path, Tensors], None]] = {
    "safetensors": load_with_safetensors,
    "runai_model_streamer": load_with_runai_streamer,
    "fastsafetensors": load_with_fastsafetensors,
}


def importable() -> tuple[list[str], list[str]]:
    """The peers that can be used here, and a line for each one that cannot."""
    found: list[str] = []
    skipped: list[str] = []
    for name in PEERS:
        try:
            importlib.import_module(name)
        except ImportError as error:
            skipped.append(f"{name} skipped: {error}")
        else:
            found.append(name)
    return found, skipped


def peer_contender(name: str, path: Path, tensors: Tensors) -> Contender:
    load = PEERS[name]

    def run() -> Sample:
        start = time.perf_counter()
        load(path, tensors)
        return Sample(time.perf_counter() - start)

    return Contender(name, run)
