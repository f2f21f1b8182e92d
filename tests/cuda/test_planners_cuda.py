"""Planners with hooks, torch's classes with ours and ours with torch's, and loads by an installed dcp_fast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import (
    Entry,
    assert_same_load,
    fast_reader,
    image,
    torch_load,
    torch_planner,
    torch_reader,
    write_checkpoint,
)
from hooked_planners import (
    Doubling,
    Elsewhere,
    OtherDtype,
    Recording,
    Scratch,
    assert_one_at_a_time,
    mixed_state,
    write_mixed,
)
from torch.distributed.checkpoint.planner import ReadItem

import dcp_fast

BASES = [torch_planner, dcp_fast.DefaultLoadPlanner]


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    # Numbers: what becomes of the payload of a NaN in a conversion is up to the device.
    return write_mixed(tmp_path / "stored", torch.randn(6, 2).half())


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("synchronize", [True, False])
def test_calls_come_in_torchs_order(cuda: torch.device, stored: Path, base: Any, synchronize: bool) -> None:
    cls = type("Planner", (Recording, base), {})
    planners, states = [cls(), cls()], [mixed_state(cuda), mixed_state(cuda)]
    torch_load(states[0], storage_reader=torch_reader(stored), planner=planners[0])
    dcp_fast.load(states[1], storage_reader=fast_reader(stored, synchronize=synchronize), planner=planners[1])
    assert planners[1].calls == planners[0].calls
    assert image(states[1]) == image(states[0])
    assert_one_at_a_time(planners[0].calls)


@pytest.mark.parametrize("planner", [Doubling, Scratch, OtherDtype, Elsewhere])
@pytest.mark.parametrize("synchronize", [True, False])
def test_planners_with_ideas(cuda: torch.device, stored: Path, planner: Any, synchronize: bool) -> None:
    options = {"synchronize": synchronize, "device_staging_bytes": 1 << 20}
    assert_same_load(stored, lambda: mixed_state(cuda), planner=planner, options=options, fallback=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_temporaries_do_not_pile_up(cuda: torch.device, tmp_path: Path, dtype: torch.dtype) -> None:
    """Not even in a load that returns before they were written."""
    names = [f"t{i}" for i in range(10)]
    write_checkpoint(tmp_path, {name: Entry.of(torch.ones(1000, 50)) for name in names})
    state = {name: torch.zeros(1000, 50, dtype=dtype, device=cuda) for name in names}
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    dcp_fast.load(state, storage_reader=fast_reader(tmp_path, synchronize=False), planner=Doubling())
    assert all((tensor == 2).all() for tensor in state.values())
    # The temporary, twice its value, and what a conversion passes through.
    assert torch.cuda.max_memory_allocated() - before < 5 * 1000 * 50 * dtype.itemsize


class Failing(dcp_fast.DefaultLoadPlanner):
    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        raise KeyError("of the planner")


def test_hook_that_raises(cuda: torch.device, stored: Path) -> None:
    assert_same_load(stored, lambda: mixed_state(cuda), planner=Failing, raises=KeyError)


@pytest.mark.parametrize("planner", BASES)
@pytest.mark.parametrize("reader", [torch_reader, fast_reader])
@pytest.mark.parametrize("load", [torch_load, dcp_fast.load])
def test_parts_of_torch_and_of_ours(cuda: torch.device, stored: Path, load: Any, reader: Any, planner: Any) -> None:
    states = [mixed_state(cuda), mixed_state(cuda)]
    torch_load(states[0], storage_reader=torch_reader(stored), planner=torch_planner())
    load(states[1], storage_reader=reader(stored), planner=planner())
    assert image(states[1]) == image(states[0])


@pytest.mark.filterwarnings("ignore:.*reduce_op.* is deprecated:FutureWarning")
def test_installed(cuda: torch.device, stored: Path) -> None:
    states = [mixed_state(cuda), mixed_state(cuda)]
    torch_load(states[0], storage_reader=torch_reader(stored), planner=torch_planner())
    with dcp_fast.install():
        dcp.load(states[1], checkpoint_id=stored)
    report = dcp_fast.last_report()
    assert report is not None
    assert report.path == str(stored)
    assert report.bytes_to_device > 0
    assert image(states[1]) == image(states[0])


@pytest.mark.usefixtures("gloo")
def test_no_dist(cuda: torch.device, stored: Path) -> None:
    assert_same_load(stored, lambda: mixed_state(cuda), fallback=1)
    assert_same_load(stored, lambda: mixed_state(cuda), fallback=1, no_dist=True)
