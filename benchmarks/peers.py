"""Other loaders on the same tensors, in .safetensors files. Each runs only where it is installed.

They hand out tensors of their own. On the host each of those is copied into the destination, as a state dict load would
do. On a GPU the peer is safetensors' ``load_file``, and its own tensors are what it is asked for.
"""

from __future__ import annotations

import importlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import gpus
from benchmarks.contenders import Contender, Sample
from benchmarks.destinations import Destinations, bytes_of
from benchmarks.verify import Expected
from benchmarks.workloads import Place

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
                file.write(bytes_of(tensor.cpu()))
            # Or the kernel would write it out while others are timed.
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)


def load_with_safetensors(paths: Sequence[Path], tensors: Tensors) -> None:
    safetensors = importlib.import_module("safetensors")
    for path in paths:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118 - the handle is no mapping
                tensors[name].copy_(file.get_tensor(name))


def load_with_runai_streamer(paths: Sequence[Path], tensors: Tensors) -> None:
    streaming = importlib.import_module("runai_model_streamer")
    with streaming.SafetensorsStreamer() as streamer:
        streamer.stream_files([str(path) for path in paths])
        for name, tensor in streamer.get_tensors():
            tensors[name].copy_(tensor)


def load_with_fastsafetensors(paths: Sequence[Path], tensors: Tensors) -> None:
    fastsafetensors = importlib.import_module("fastsafetensors")
    filenames = [str(path) for path in paths]
    with fastsafetensors.fastsafe_open(filenames=filenames, nogds=True, device="cpu") as file:
        for name in file.keys():  # noqa: SIM118 - the handle is no mapping
            tensors[name].copy_(file.get_tensor(name))


PEERS: dict[str, Callable[[Sequence[Path], Tensors], None]] = {
    "safetensors": load_with_safetensors,
    "runai_model_streamer": load_with_runai_streamer,
    "fastsafetensors": load_with_fastsafetensors,
}
ON_GPU = "safetensors"


def load_file(paths: Sequence[Path], device: str) -> Tensors:
    """As safetensors loads to a GPU, waiting until all is there."""
    loaded: Tensors = {}
    for path in paths:
        loaded |= importlib.import_module("safetensors.torch").load_file(path, device=device)
    gpus.wait_for(gpus.of(loaded.values()))
    return loaded


@dataclass(frozen=True)
class Peer:
    contender: Contender
    # Loads once and compares with what torch loads; it raises as the peer does, or VerificationError.
    verify: Callable[[Expected], object]


def names_for(place: Place) -> tuple[str, ...]:
    return tuple(PEERS) if place is Place.HOST else (ON_GPU,)


def importable(place: Place) -> tuple[list[str], list[str]]:
    """The peers that can be used here, and a line for each one that cannot."""
    found: list[str] = []
    skipped: list[str] = []
    for name in names_for(place):
        try:
            importlib.import_module(name)
        except ImportError as error:
            skipped.append(f"{name} skipped: {error}")
        else:
            found.append(name)
    return found, skipped


def peer(name: str, paths: Sequence[Path], wanted: Destinations) -> Peer:
    """For tensors on the host, or all on one GPU."""
    if wanted.gpus:
        (device,) = wanted.gpus
        run = _timed(lambda: load_file(paths, str(device)))
        contender = Contender(name, run, fills_destinations=False)
        return Peer(contender, lambda expected: expected.compare(name, load_file(paths, str(device))))
    contender = Contender(name, _timed(lambda: PEERS[name](paths, wanted.local)))
    return Peer(contender, lambda expected: expected.run(contender))


def _timed(load: Callable[[], object]) -> Callable[[], Sample]:
    def run() -> Sample:
        start = time.perf_counter()
        loaded = load()
        seconds = time.perf_counter() - start
        del loaded  # to give tensors back is no part of the load
        return Sample(seconds)

    return run
