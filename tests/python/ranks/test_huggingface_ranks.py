"""Safetensors files with real ranks: DTensors that each rank saved for itself, loaded by other ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers import fill, load_with, torch_load, torch_planner
from quantized_files import (
    dequantized_blocks,
    fast_quantized_reader,
    finite,
    make_mxfp4,
    torch_quantized_reader,
    write_quantized,
)
from ranks import Ranks
from safetensors_files import assert_same_headers, assert_same_hf_load, save_hf
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor import zeros as zeros_on

import dcp_fast

STORED = {
    "rows": ((10, 7), torch.float32, 1),
    "columns": ((6, 12), torch.bfloat16, 2),
    "few": ((3, 4), torch.float32, 3),  # fewer rows than ranks: some hold nothing
    "whole": ((5,), torch.float64, 4),
}


def save_distributed(path: Path) -> None:
    mesh = init_device_mesh("cpu", (4,))
    placements = {"rows": Shard(0), "columns": Shard(1), "few": Shard(0), "whole": Replicate()}
    state: dict[str, Any] = {
        name: distribute_tensor(fill(*facts), mesh, [placements[name]]) for name, facts in STORED.items()
    }
    save_hf(path, state, save_distributed=True)


def load_distributed(path: Path) -> int:
    if dist.get_rank() == 0:
        assert_same_headers(path)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for placement in (Shard(0), Shard(1), Replicate()):
        for dtype in (None, torch.float64):

            def make(placement: Any = placement, dtype: Any = dtype) -> dict[str, Any]:
                return {
                    name: zeros_on(
                        *size,
                        dtype=dtype or stored,
                        device_mesh=mesh,
                        placements=[
                            placement if placement.is_replicate() or placement.dim < len(size) else Replicate()
                        ],
                    )
                    for name, (size, stored, _) in STORED.items()
                }

            outcome = assert_same_hf_load(path, make, no_dist=False)
            if dtype is None:
                full = outcome.state["rows"].full_tensor()
                assert torch.equal(full.view(torch.int32), fill(*STORED["rows"]).view(torch.int32))
    state = make()
    dcp_fast.load(state, checkpoint_id=path)  # which finds out by itself
    report = dcp_fast.last_report()
    assert report is not None
    assert report.is_fast
    return report.bytes_read


def load_quantized(path: Path) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for placement in (Shard(0), Shard(1), Replicate()):

        def make(placement: Any = placement) -> dict[str, Any]:
            return {"x.weight": zeros_on(300, 200, device_mesh=mesh, placements=[placement])}

        expected, actual = make(), make()
        torch_load(expected, storage_reader=torch_quantized_reader(str(path)), planner=torch_planner())
        dcp_fast.load(actual, storage_reader=fast_quantized_reader(path))
        assert expected["x.weight"].to_local().any()
        assert torch.equal(actual["x.weight"].to_local(), expected["x.weight"].to_local())
        report = dcp_fast.last_report()
        assert report is not None
        assert report.is_fast
        blocks, scales = make_mxfp4((2, 40, 6), 2)
        state = {"y_blocks": zeros_on(2, 40, 192, device_mesh=mesh, placements=[placement])}
        dcp_fast.load(state, storage_reader=fast_quantized_reader(path))
        assert torch.equal(state["y_blocks"].full_tensor(), dequantized_blocks(blocks, scales).float())


def load_damaged(path: Path) -> list[str]:
    outcome = load_with(dcp_fast.load, {"whole": torch.zeros(5, dtype=torch.float64)}, checkpoint_id=path)
    assert outcome.errors is not None
    return [
        f"{rank}: {type(error).__name__} {Path(getattr(error, 'path', '')).name}"
        for rank, error in outcome.errors.items()
    ]


def test_dtensors(ranks: Ranks, tmp_path: Path) -> None:
    path = tmp_path / "model"
    ranks.run(4, save_distributed, path)
    assert len(list(path.glob("*.safetensors"))) == 4
    for world_size in (2, 3):
        assert all(count > 0 for count in ranks.run(world_size, load_distributed, path))


def test_quantized_tensors(ranks: Ranks, tmp_path: Path) -> None:
    blocks, scales = make_mxfp4((2, 40, 6), 2)
    tensors = {"x.weight": finite((300, 200), torch.float8_e4m3fn, 1), "x.weight_scale_inv": torch.rand(3, 2)}
    path = write_quantized(tmp_path / "model", {**tensors, "y_blocks": blocks, "y_scales": scales})
    ranks.run(3, load_quantized, path)


def test_damaged_file_is_an_error_on_every_rank(ranks: Ranks, tmp_path: Path) -> None:
    path = tmp_path / "model"
    ranks.run(4, save_distributed, path)
    file = min(path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    expected = [f"{rank}: CorruptHeaderError {file.name}" for rank in range(2)]
    assert ranks.run(2, load_damaged, path) == [expected, expected]
