"""Planners with hooks, torch's classes with ours and ours with torch's, and loads by an installed dcp_fast."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import (
    Entry,
    ShardedBuffer,
    assert_same_load,
    fast_reader,
    fill,
    image,
    torch_load,
    torch_planner,
    torch_reader,
    write_checkpoint,
)
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import ReadItem

import dcp_fast

WHOLE = fill((12, 9), torch.int32)
BASES = [torch_planner, dcp_fast.DefaultLoadPlanner]


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """Tensors of several chunks whose records lie in several files, out of order, between values."""
    chunks = [((i, j), WHOLE[i : i + 5, j : j + 4].clone()) for j in (0, 4, 8) for i in (5, 0, 10)]
    return write_checkpoint(
        tmp_path / "stored",
        {
            "z": Entry((12, 9), torch.int32, chunks, file="__%d_0.distcp"),
            "value": Entry(value=5, file="__2_0.distcp"),
            "half": Entry.of(torch.randn(6, 2).half(), file="__0_0.distcp"),
            "old": Entry.of(fill((3,), torch.float32), file="__4_0.distcp", legacy=True),
            "a": Entry.of(fill((4,), torch.float64), file="__2_0.distcp"),
        },
    )


def state_on(cuda: torch.device) -> dict[str, Any]:
    parts = [((0, 2), (7, 5)), ((7, 0), (5, 9)), ((0, 7), (7, 2))]
    shards = [torch.zeros(sizes, dtype=torch.int32, device=cuda) for _, sizes in parts]
    return {
        "a": torch.zeros(4, dtype=torch.float64, device=cuda),
        "half": torch.zeros(6, 2, device=cuda),
        "old": torch.zeros(3, device=cuda),
        "value": 0,
        "z": ShardedBuffer.make((12, 9), [at for at, _ in parts], shards),
    }


def recording(base: Any) -> Any:
    """Notes which hooks are called, and what a tensor holds when it is committed."""

    class Recording(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.calls: list[Any] = []

        def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
            self.calls.append(("resolve", item.dest_index, item.storage_offsets))
            return super().resolve_tensor(item)

        def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
            self.calls.append(("lookup", index))
            return super().lookup_tensor(index)

        def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
            self.calls.append(("commit", item.dest_index, image(tensor)))
            super().commit_tensor(item, tensor)

        def load_bytes(self, item: ReadItem, value: Any) -> None:
            self.calls.append(("bytes", item.dest_index, value.getvalue()))
            super().load_bytes(item, value)

    return Recording()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("synchronize", [True, False])
def test_calls_come_in_torchs_order(cuda: torch.device, stored: Path, base: Any, synchronize: bool) -> None:
    planners, states = [recording(base), recording(base)], [state_on(cuda), state_on(cuda)]
    torch_load(states[0], storage_reader=torch_reader(stored), planner=planners[0])
    dcp_fast.load(states[1], storage_reader=fast_reader(stored, synchronize=synchronize), planner=planners[1])
    assert planners[1].calls == planners[0].calls
    assert image(states[1]) == image(states[0])
    names = [call[0] for call in planners[0].calls if call[0] != "lookup"]
    for before, after in itertools.pairwise(names):
        assert (before == "resolve") == (after == "commit")


class Doubling(dcp.DefaultLoadPlanner):
    """Loads into temporaries on the device, and copies twice the values to where they belong."""

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        self.target = super().resolve_tensor(item)
        return torch.empty_like(self.target)

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        self.target.copy_(tensor * 2)


class Scratch(dcp_fast.DefaultLoadPlanner):
    """One scratch buffer for all items: each must be committed before the next one is resolved."""

    def __init__(self) -> None:
        super().__init__()
        self.scratch = torch.empty(1 << 14, dtype=torch.uint8, device="cuda")

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        self.target = super().resolve_tensor(item)
        size = self.target.numel() * self.target.itemsize
        return self.scratch[:size].view(self.target.dtype).view(self.target.shape)

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        assert tensor.data_ptr() == self.scratch.data_ptr()
        self.target.copy_(tensor)
        self.scratch.fill_(255)


class ThroughTheHost(dcp.DefaultLoadPlanner):
    """Loads into host memory in double precision."""

    def transform_tensor(self, item: ReadItem, tensor: torch.Tensor) -> torch.Tensor:
        self.target = super().transform_tensor(item, tensor)
        return torch.zeros(self.target.shape, dtype=torch.float64)

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        self.target.copy_(tensor.flip(list(range(tensor.dim()))))


class Elsewhere(dcp_fast.DefaultLoadPlanner):
    """Puts everything into tensors that the state dict does not hold."""

    def set_up_planner(self, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super().set_up_planner(state_dict, *args, **kwargs)
        self.loaded: dict[str, torch.Tensor] = {}
        state_dict["elsewhere"] = self.loaded

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        key = f"{index.fqn} {index.offset}"
        return self.loaded.setdefault(key, torch.zeros_like(super().lookup_tensor(index)))


@pytest.mark.parametrize("planner", [Doubling, Scratch, ThroughTheHost, Elsewhere])
@pytest.mark.parametrize("synchronize", [True, False])
def test_planners_with_ideas(cuda: torch.device, stored: Path, planner: Any, synchronize: bool) -> None:
    options = {"synchronize": synchronize, "device_staging_bytes": 1 << 20}
    assert_same_load(stored, lambda: state_on(cuda), planner=planner, options=options, fallback=None)


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
    assert_same_load(stored, lambda: state_on(cuda), planner=Failing, raises=KeyError)


@pytest.mark.parametrize("planner", BASES)
@pytest.mark.parametrize("reader", [torch_reader, fast_reader])
@pytest.mark.parametrize("load", [torch_load, dcp_fast.load])
def test_parts_of_torch_and_of_ours(cuda: torch.device, stored: Path, load: Any, reader: Any, planner: Any) -> None:
    states = [state_on(cuda), state_on(cuda)]
    torch_load(states[0], storage_reader=torch_reader(stored), planner=torch_planner())
    load(states[1], storage_reader=reader(stored), planner=planner())
    assert image(states[1]) == image(states[0])


@pytest.mark.filterwarnings("ignore:.*reduce_op.* is deprecated:FutureWarning")
def test_installed(cuda: torch.device, stored: Path) -> None:
    states = [state_on(cuda), state_on(cuda)]
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
    assert_same_load(stored, lambda: state_on(cuda), fallback=1)
    assert_same_load(stored, lambda: state_on(cuda), fallback=1, no_dist=True)
