"""The checkpoints that the workloads load: written once by real gloo ranks, then kept in the data directory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.multiprocessing.spawn import spawn

from benchmarks import huggingface, optimizer_state, quantized_files, state_dicts

Shapes = dict[str, tuple[int, ...]]

LAYERS = 12
HIDDEN = 1536
OPTIMIZER_LAYERS = 100
OPTIMIZER_HIDDEN = 1376
VOCABULARY = 88_064
SMALL_TENSORS = 20_000
# Every dimension stays a multiple of this, so that eight ranks get equal shards at any scale.
GRANULE = 16
# Raise this when what the writer writes changes, so that old cached checkpoints are not used.
FORMAT = 1


@dataclass(frozen=True)
class CheckpointSpec:
    """All that determines the bytes of a checkpoint."""

    kind: Literal[
        "transformer",
        "small",
        "optimizer",
        "quantized",
        "quantized_large",
        "nested",
        "values",
        "huggingface",
        "huggingface_many",
        "huggingface_fp8",
        "huggingface_mxfp4",
    ]
    ranks: int
    scale: float = 1.0

    def shapes(self) -> Shapes:
        """Of what is stored; of the parameters, where that is their optimizer state."""
        if self.kind in quantized_files.KINDS:
            return quantized_files.shapes(self.kind, self.scale)
        made_by = {"transformer": transformer_shapes, "small": small_shapes, "optimizer": linear_shapes}
        made_by |= {huggingface.KIND: transformer_shapes, huggingface.MANY: huggingface.many_shapes}
        return (made_by | state_dicts.SHAPES)[self.kind](self.scale)

    def payload_bytes(self) -> int:
        if self.kind == "optimizer":
            return optimizer_state.payload_bytes(self.shapes())
        if self.kind in state_dicts.SHAPES:
            return state_dicts.payload_bytes(self.kind, self.shapes())
        if self.kind in quantized_files.KINDS:
            return quantized_files.payload_bytes(self.shapes())
        if self.kind == huggingface.MANY:
            return 0  # nobody reads any
        return sum(math.prod(shape) for shape in self.shapes().values()) * torch.float32.itemsize

    def directory_name(self) -> str:
        parameters = {**dataclasses.asdict(self), "shapes": self.shapes(), "format": FORMAT, "torch": torch.__version__}
        digest = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()
        return f"{self.kind}-{self.ranks}ranks-{digest[:12]}"


def transformer_shapes(scale: float) -> Shapes:
    """73 tensors of a decoder-only transformer; at scale 1 they are 1.9 GB of fp32."""
    hidden = _scaled(HIDDEN, scale)
    shapes: Shapes = {"embedding.weight": (_scaled(VOCABULARY, scale), hidden)}
    for layer in range(LAYERS):
        shapes |= {
            f"layers.{layer}.attention_norm.weight": (hidden,),
            f"layers.{layer}.attention.qkv.weight": (3 * hidden, hidden),
            f"layers.{layer}.attention.out.weight": (hidden, hidden),
            f"layers.{layer}.mlp_norm.weight": (hidden,),
            f"layers.{layer}.mlp.up.weight": (4 * hidden, hidden),
            f"layers.{layer}.mlp.down.weight": (hidden, 4 * hidden),
        }
    return shapes


def small_shapes(scale: float) -> Shapes:
    """Many 4 KB tensors, as a mixture of experts with per-expert scales or an optimizer's small state has."""
    count = max(1, round(SMALL_TENSORS * scale))
    return {f"experts.{index}.scale": (32, 32) for index in range(count)}


def linear_shapes(scale: float) -> Shapes:
    """The parameters of 100 linear layers; at scale 1 their Adam state is 1.5 GB of fp32."""
    hidden = _scaled(OPTIMIZER_HIDDEN, scale)
    shapes: Shapes = {}
    for layer in range(OPTIMIZER_LAYERS):
        shapes |= {f"layers.{layer}.weight": (hidden, hidden), f"layers.{layer}.bias": (hidden,)}
    return shapes


def _scaled(dimension: int, scale: float) -> int:
    return max(1, round(dimension * math.sqrt(scale) / GRANULE)) * GRANULE


def is_there(spec: CheckpointSpec, data: Path) -> bool:
    return (data / spec.directory_name()).is_dir()


def ensure(spec: CheckpointSpec, data: Path) -> Path:
    """Return the directory of the checkpoint, writing it first if this data directory does not have it.

    It is written beside its final place and renamed, so that an interrupted run leaves nothing that looks whole.
    """
    directory = data / spec.directory_name()
    if is_there(spec, data):
        return directory
    data.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=data))
    try:
        checkpoint = scratch / "checkpoint"
        if spec.kind in huggingface.FILES:
            huggingface.write(checkpoint, spec.kind, spec.shapes(), torch.Generator().manual_seed(1))
            checkpoint.rename(directory)
            return directory
        if spec.kind in quantized_files.KINDS:
            quantized_files.write(checkpoint, spec.shapes(), torch.Generator().manual_seed(1))
            checkpoint.rename(directory)
            return directory
        arguments = (spec, str(checkpoint), str(scratch / "rendezvous"))
        spawn(_write_as_rank, args=arguments, nprocs=spec.ranks)  # type: ignore[no-untyped-call]
        checkpoint.rename(directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return directory


def files_of(directory: Path) -> list[Path]:
    """Every file of the checkpoint, its metadata included."""
    return sorted(path for path in directory.iterdir() if path.is_file())


def _write_as_rank(rank: int, spec: CheckpointSpec, directory: str, rendezvous: str) -> None:
    # All ranks share this machine's cores.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // spec.ranks))
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=spec.ranks)
    try:
        generator = torch.Generator().manual_seed(1 + rank)
        if spec.kind == "optimizer":
            warnings.simplefilter("ignore")  # ShardedTensors are deprecated, and say so often
            state = optimizer_state.adam_state(spec.shapes(), generator)
        elif spec.kind in state_dicts.SHAPES:
            warnings.simplefilter("ignore")  # quantized tensors are deprecated
            state = state_dicts.saved(spec.kind, spec.shapes(), spec.ranks, generator)
        else:
            state = _tensors_by_rows(spec, generator)
        save(state, storage_writer=FileSystemWriter(directory))
    finally:
        dist.destroy_process_group()


def _tensors_by_rows(spec: CheckpointSpec, generator: torch.Generator) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (spec.ranks,))
    state: dict[str, Any] = {}
    for name, (rows, *rest) in spec.shapes().items():
        assert rows % spec.ranks == 0, f"{name}: {rows} rows do not divide over {spec.ranks} ranks"
        local = torch.randn((rows // spec.ranks, *rest), generator=generator)
        state[name] = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
    return state
