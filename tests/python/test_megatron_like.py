"""A job like those of Megatron-Core, whose framework is imported before dcp_fast is installed or after that."""

from __future__ import annotations

import argparse
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import megatron_job
import numpy
import torch
from damage import Call
from helpers import Entry, fill, image, write_checkpoint
from megatron_job import ORDERS
from megatron_like import SHAPES
from metadata_cases import with_plans
from torch.distributed.checkpoint.metadata import Metadata

ARGS = argparse.Namespace(
    num_layers=2, lr=1e-4, betas=(0.9, 0.95), params_dtype=torch.bfloat16, data_path=["a", Path("b")], run=None
)


def write(path: Path, **attributes: Any) -> Metadata:
    """A checkpoint as three ranks write it, with the plans of all of them and more attributes in its metadata."""
    entries: dict[str, Any] = {}
    for number, (name, (size, dtype)) in enumerate(SHAPES.items()):
        # Columns, so that the parts of a shard that is loaded are not contiguous.
        dim = int(dtype is torch.float8_e4m3fn)
        parts = fill(size, dtype, number).tensor_split(3, dim)
        begins = [sum(part.size(dim) for part in parts[:before]) for before in range(3)]
        offsets = [tuple(begin if at == dim else 0 for at in range(len(size))) for begin in begins]
        chunks = [(offset, part.contiguous().clone()) for offset, part in zip(offsets, parts, strict=True)]
        entries[name] = Entry(size, dtype, chunks, file="__%d_0.distcp")
    entries["args"] = ARGS
    for rank in range(2):
        states = {
            "random_rng_state": random.Random(rank).getstate(),
            "np_rng_state": numpy.random.RandomState(rank).get_state(),
            "torch_rng_state": torch.Generator().manual_seed(rank).get_state(),
            "rng_tracker_states": {"model-parallel-rng": fill((16,), torch.uint8, rank)},
        }
        entries[f"rng_state/shard_{rank}_2"] = Entry(value=[states], file=f"__{rank}_0.distcp")
    write_checkpoint(path, entries)
    metadata = with_plans(pickle.loads((path / ".metadata").read_bytes()))
    vars(metadata).update(attributes)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    return metadata


def test_a_job_in_each_order_of_imports(tmp_path: Path) -> None:
    written: Any = write(tmp_path / "checkpoint")
    write(tmp_path / "hostile", more=Call(os.mkdir, "made"))
    for order in ORDERS:
        (tmp_path / order).mkdir()
    job: list[str | Path] = [sys.executable, megatron_job.__file__]
    job += [tmp_path / "checkpoint", tmp_path / "hostile", tmp_path]
    environment = {**os.environ, "PYTHONPATH": str(Path(megatron_job.__file__).parent), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(job, env=environment, stderr=subprocess.PIPE, check=False, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    by_order = {order: torch.load(tmp_path / order / "found", weights_only=False) for order in ORDERS}

    expected = by_order.pop("torch")["first"]
    # The ways to load differ in nothing, but two ranks do, and states with and without float8 tensors.
    assert len({pickle.dumps(image(values)) for values, _ in expected["loads"].values()}) == 4
    assert all(values["args"] == ARGS for values, _ in expected["loads"].values())
    for order, found in by_order.items():
        for stage in ("first", "metadata that was kept", "uninstalled"):
            assert found[stage]["mcore_data"] == written.mcore_data
            assert found[stage]["all_local_plans"] == written.all_local_plans
            assert found[stage]["loads"].keys() == expected["loads"].keys()
            for name, (values, report) in found[stage]["loads"].items():
                about = (order, stage, name)
                assert image(values) == image(expected["loads"][name][0]), about
                assert (report is not None) == (stage == "first"), about
        for name, (_, report) in found["first"]["loads"].items():
            assert report["metadata_fallback_reason"] == report["reader_fallback_reason"] == "", (order, name)
            assert report["planner"] == "megatron_like.Planner"
            assert report["fallback_records"] == 0
            assert report["is_fast"], (order, name, report["planner_fallback_reason"])
        assert found["made directories"] == [False, True], "torch does what the metadata says"
