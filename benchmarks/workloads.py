"""What is measured, and what each measurement has to reach."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from benchmarks.checkpoints import CheckpointSpec
from benchmarks.destinations import Wanted

MIB = 1 << 20


class Temperature(enum.Enum):
    """Whether the checkpoint is in the page cache when a load begins."""

    WARM = "warm"
    COLD = "cold"


class Place(enum.Enum):
    """Where the destinations of the workloads lie."""

    HOST = "host"
    GPU = "gpu"


class Metric(enum.Enum):
    """A figure that a target bounds; the value is how a target on it reads."""

    SPEEDUP = ">={:g}x torch"
    OF_CEILING = ">={:.2f} of ceiling"
    OF_MEMORY = ">={:.2f} of memory"
    READ_DATA_SPEEDUP = ">={:g}x torch's read_data"
    AMPLIFICATION = "<={:.2f} read/needed"
    READS_PER_RECORD = "<=1 read per {:g} records"
    METADATA_READS = "<={:g} metadata read"
    COPIED = "<={:.2f} copied/needed"

    def holds(self, value: float, bound: float) -> bool:
        if self is Metric.COPIED:
            return round(value, 2) <= bound  # descriptors of boxes are copied as well
        if self in (Metric.AMPLIFICATION, Metric.METADATA_READS):
            return value <= bound
        if self is Metric.READS_PER_RECORD:
            return value <= 1 / bound
        return value >= bound


@dataclass(frozen=True)
class Target:
    metric: Metric
    bound: float

    def __str__(self) -> str:
        return self.metric.value.format(self.bound)


@dataclass(frozen=True)
class Workload:
    """One checkpoint, what one rank wants of it, and the targets for each temperature that it is loaded at."""

    name: str
    title: str
    checkpoint: CheckpointSpec
    wanted: Wanted
    targets: dict[Temperature, tuple[Target, ...]]
    rounds: int = 5
    # How many fresh processes load it as their first; 0 leaves that out.
    fresh_rounds: int = 3
    peers: bool = False
    # Of a planner of the user's own that both loaders get: "commit", or "both" for resolve_tensor too.
    hooks: str = ""

    def bytes_needed(self) -> int:
        """Payload bytes that the rank cannot do without, in the stored dtype."""
        return self.checkpoint.payload_bytes() // self.wanted.ranks


def workloads_of(place: Place, scale: float, gpus: Sequence[str]) -> dict[str, Workload]:
    """All workloads for a place. With several GPUs there is one that loads to all of them."""
    return _for_host(scale) if place is Place.HOST else _for_gpus(scale, gpus)


def _for_gpus(scale: float, gpus: Sequence[str]) -> dict[str, Workload]:
    """The workloads for the host, but for those with several real ranks, with targets of their own."""
    warm, cold = Temperature.WARM, Temperature.COLD
    whole, sliced = Target(Metric.COPIED, 1.00), Target(Metric.COPIED, 1.05)
    limit = Target(Metric.OF_CEILING, 0.90)
    targets: dict[str, dict[Temperature, tuple[Target, ...]]] = {
        "same": {warm: (whole, limit), cold: (whole,)},
        "rows8": {warm: (whole, limit, Target(Metric.AMPLIFICATION, 1.02))},
        "cols8": {warm: (sliced,)},
        "rows8_to_cols2": {warm: (sliced,)},
        "whole8": {warm: (whole, limit)},
        "small": {warm: ()},
        "convert": {warm: ()},
        "hf": {warm: (whole, limit)},
        "hf_fp8": {warm: (sliced, Target(Metric.SPEEDUP, 10))},
        "hf_mxfp4": {warm: (sliced,)},
    }
    on_host = _for_host(scale)
    first = tuple(gpus[:1])
    workloads = {
        name: replace(
            on_host[name],
            targets=bounds,
            wanted=replace(on_host[name].wanted, devices=first),
            peers=name == "same",  # with safetensors files, load_file takes part anyway
        )
        for name, bounds in targets.items()
    }
    if len(gpus) > 1:
        same = workloads["same"]
        workloads["spread"] = replace(
            same,
            name="spread",
            title=f"written by 1 rank, its tensors spread over {len(gpus)} GPUs",
            targets={warm: (whole,)},
            wanted=replace(same.wanted, devices=tuple(gpus)),
            peers=False,  # safetensors fills one GPU
        )
    return workloads


def _for_host(scale: float) -> dict[str, Workload]:
    by_one = CheckpointSpec("transformer", ranks=1, scale=scale)
    by_eight = CheckpointSpec("transformer", ranks=8, scale=scale)
    small = CheckpointSpec("small", ranks=2, scale=scale)
    warm, cold = Temperature.WARM, Temperature.COLD
    workloads = [
        Workload(
            "same",
            "written by 1 rank, loaded with the same sharding",
            by_one,
            Wanted(),
            {
                warm: (Target(Metric.SPEEDUP, 10), Target(Metric.OF_MEMORY, 0.90)),
                cold: (Target(Metric.SPEEDUP, 2), Target(Metric.OF_CEILING, 0.95)),
            },
            peers=True,
        ),
        Workload(
            "rows8",
            "written by 1 rank, this rank wants 1/8 of the rows",
            by_one,
            Wanted(dim=0, ranks=8),
            {warm: (Target(Metric.SPEEDUP, 50), Target(Metric.AMPLIFICATION, 1.02))},
        ),
        Workload(
            "cols8",
            "written by 1 rank, this rank wants 1/8 of the columns",
            by_one,
            Wanted(dim=1, ranks=8),
            {warm: (Target(Metric.SPEEDUP, 10),)},
        ),
        Workload(
            "rows8_to_cols2",
            "written by 8 ranks by rows, this rank of 2 wants columns",
            by_eight,
            Wanted(dim=1, ranks=2),
            {warm: (Target(Metric.SPEEDUP, 11),)},
        ),
        Workload(
            "whole8",
            "written by 8 ranks by rows, read whole",
            by_eight,
            Wanted(),
            {warm: (Target(Metric.SPEEDUP, 10),)},
        ),
        Workload(
            "small",
            "20,000 tensors of 4 KB in two chunks each, read whole",
            small,
            Wanted(),
            {
                warm: (
                    Target(Metric.SPEEDUP, 35),
                    Target(Metric.READ_DATA_SPEEDUP, 40),
                    Target(Metric.READS_PER_RECORD, 64),
                )
            },
            rounds=3,
            fresh_rounds=0,  # these tensors reuse their memory from the first one on
        ),
        Workload(
            "convert",
            "fp32 written by 1 rank, loaded into bf16 tensors",
            by_one,
            Wanted(dtype=torch.bfloat16),
            {warm: (Target(Metric.SPEEDUP, 5), Target(Metric.OF_MEMORY, 0.85))},
        ),
        Workload(
            "optimizer",
            "Adam state of 100 layers written by 4 ranks, loaded by 2",
            CheckpointSpec("optimizer", ranks=4, scale=scale),
            Wanted(dim=0, ranks=2),
            {warm: (Target(Metric.SPEEDUP, 5), Target(Metric.METADATA_READS, 1))},
            fresh_rounds=1,  # a round is 14 processes, and it is their peaks that count, which hardly vary
        ),
    ]
    workloads += _of_other_states(scale, small, by_eight)
    workloads += _of_huggingface(scale)
    return {workload.name: workload for workload in workloads}


_TEN_TIMES = (Target(Metric.SPEEDUP, 10),)
_Quantized = tuple[str, str, Literal["huggingface_fp8", "huggingface_mxfp4"], torch.dtype, tuple[Target, ...]]
_QUANTIZED: tuple[_Quantized, ...] = (
    ("fp8", "1 GB of FP8 with block scales, to bf16", "huggingface_fp8", torch.bfloat16, _TEN_TIMES),
    ("fp8_fp32", "1 GB of FP8 with block scales, to fp32", "huggingface_fp8", torch.float32, _TEN_TIMES),
    ("mxfp4", "1 GB of MXFP4, to bf16", "huggingface_mxfp4", torch.bfloat16, ()),
)


def _of_huggingface(scale: float) -> list[Workload]:
    """Directories of safetensors files. torch maps these, and copies with its own threads."""
    warm, cold = Temperature.WARM, Temperature.COLD
    files = CheckpointSpec("huggingface", ranks=1, scale=scale)
    many = CheckpointSpec("huggingface_many", ranks=1, scale=scale)
    limit = Target(Metric.OF_MEMORY, 0.90)
    loads = [
        Workload(
            "hf",
            "4 safetensors files, read whole",
            files,
            Wanted(),
            {
                warm: (Target(Metric.SPEEDUP, 1.4), limit),
                cold: (Target(Metric.SPEEDUP, 1), Target(Metric.OF_CEILING, 0.95)),
            },
            peers=True,
        ),
        Workload(
            "hf_rows8",
            "4 safetensors files, this rank wants 1/8 of the rows",
            files,
            Wanted(dim=0, ranks=8),
            {warm: (Target(Metric.SPEEDUP, 1.4), limit, Target(Metric.AMPLIFICATION, 1.02))},
            fresh_rounds=0,
        ),
        Workload(
            "hf_cols8",
            "4 safetensors files, this rank wants 1/8 of the columns",
            files,
            Wanted(dim=1, ranks=8),
            {warm: (Target(Metric.SPEEDUP, 1.4), limit)},
            fresh_rounds=0,
        ),
        Workload(
            "hf_bf16",
            "4 safetensors files of fp32, loaded into bf16 tensors",
            files,
            Wanted(dtype=torch.bfloat16),
            {warm: (Target(Metric.SPEEDUP, 2), limit)},
            fresh_rounds=0,
        ),
    ]
    rank = Wanted(dim=0, ranks=64)
    headers = [
        Workload(name, title, many, rank, {warm: (Target(Metric.SPEEDUP, bound),)}, rounds=3, fresh_rounds=0)
        for name, title, bound in (
            ("hf_headers", "headers of 163 safetensors files with 91,000 tensors", 10),
            ("hf_plan", "the plan of one rank of 64 for these", 20),
        )
    ]
    limit = Target(Metric.OF_CEILING, 0.60)
    quantized = [
        Workload(
            f"hf_{name}",
            title,
            CheckpointSpec(kind, ranks=1, scale=scale),
            Wanted(dtype=dtype),
            {warm: (*speedup, limit)},
            rounds=3,
            fresh_rounds=0,
        )
        for name, title, kind, dtype, speedup in _QUANTIZED
    ]
    return loads + headers + quantized


def _of_other_states(scale: float, small: CheckpointSpec, by_eight: CheckpointSpec) -> list[Workload]:
    """What costs time beside the bytes: many entries, containers, hooks, and records that torch must unpickle."""

    def workload(
        name: str, title: str, checkpoint: CheckpointSpec, speedup: float, wanted: Wanted | None = None, **more: Any
    ) -> Workload:
        targets: dict[Temperature, tuple[Target, ...]] = {Temperature.WARM: (Target(Metric.SPEEDUP, speedup),)}
        more = {"rounds": 3, "fresh_rounds": 0} | more
        return Workload(name, title, checkpoint, wanted or Wanted(), targets, **more)

    def spec(kind: Literal["quantized", "quantized_large", "nested", "values"], ranks: int = 1) -> CheckpointSpec:
        return CheckpointSpec(kind, ranks, scale)

    half, columns = Wanted(dim=0, ranks=2), Wanted(dim=1, ranks=2)
    return [
        workload("dtensors", "20,000 tensors of 4 KB, read whole into DTensors", small, 40, Wanted(dim=0)),
        workload("nested", "model and Adam state of 4,000 DTensors, 4 ranks -> 2", spec("nested", 4), 45, half),
        workload("hooked", "20,000 tensors of 4 KB, by a planner with a hook", small, 20, hooks="commit"),
        workload("hooked_both", "the same, resolve_tensor and commit_tensor", small, 20, hooks="both"),
        workload("hooked_cols2", "rows8_to_cols2, by a planner with a hook", by_eight, 2, columns, hooks="commit"),
        workload("values", "18,000 entries of plain values", spec("values"), 10),
        workload("fallback", "20,000 quantized tensors of 1 KB, which torch unpickles", spec("quantized"), 1.5),
        workload("fallback_large", "64 quantized tensors of 16 MiB", spec("quantized_large"), 1.5),
    ]
