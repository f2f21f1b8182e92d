"""The 2-D layout: optimizer state of tensor-parallel slices that FSDP shards. The saved tensors are the proof."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import fill, image, save, torch_planner, torch_reader
from optimizer_cases import (
    BASES,
    KEY,
    Allocations,
    assert_same_result,
    by_rows,
    check,
    fast_reader,
    flipping,
    load_fast,
    lookup_elsewhere,
    recording,
)
from ranks import Ranks
from torch.distributed._shard.sharded_tensor import Shard as LocalShard
from torch.distributed._shard.sharded_tensor import ShardedTensor, ShardMetadata, TensorProperties
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

import dcp_fast

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

# By name: size; dimension that tensor parallelism splits, None if it does not; lengths of the slices on two and on
# three tensor-parallel ranks, where None is a rank that holds no shard.
Split = tuple[tuple[int, ...], int | None, dict[int, list[int | None]]]
PARAMETERS: dict[str, Split] = {
    "rows": ((10, 7), 0, {2: [5, 5], 3: [4, 4, 2]}),
    "uneven_rows": ((8, 5), 0, {2: [1, 7], 3: [1, 5, 2]}),
    "columns": ((9, 8), 1, {2: [3, 5], 3: [3, 0, 5]}),
    "deep": ((4, 3, 6), 2, {2: [2, 4], 3: [1, 2, 3]}),
    "middle": ((5, 6, 2), 1, {2: [6, 0], 3: [1, 1, 4]}),
    "zero_rows": ((3, 2), 0, {2: [3, 0], 3: [1, 2, 0]}),
    "one_holder": ((4, 6), 0, {2: [4, None], 3: [None, 4, None]}),
    "two_holders": ((4, 6), 1, {2: [1, 5], 3: [2, None, 4]}),
    "vector": ((9,), 0, {2: [5, 4], 3: [3, 3, 3]}),
    "element": ((1,), 0, {2: [1, None], 3: [1, None, None]}),
    "replicated": ((6, 4), None, {}),
    "single_row": ((1, 3), None, {}),  # fewer rows than data-parallel ranks
    "four_rows": ((4, 2), None, {}),  # of three ranks the last one would begin past the end
    "empty": ((0, 2), None, {}),
}
STRANGER = (7, 2)  # of the state that belongs to no parameter of the model


class Layout:
    """A mesh of data-parallel by tensor-parallel ranks, and this rank's place in it."""

    def __init__(self, dp: int, tp: int, tp_major: bool) -> None:
        self.dp, self.tp = dp, tp
        grid = torch.arange(dp * tp).view(tp, dp).t() if tp_major else torch.arange(dp * tp).view(dp, tp)
        self.grid: list[list[int]] = grid.tolist()
        self.my_dp, self.my_tp = divmod((grid == dist.get_rank()).reshape(-1).nonzero().item(), tp)
        columns = [dist.new_group(sorted(column)) for column in grid.t().tolist()]
        rows = [dist.new_group(sorted(row)) for row in self.grid]
        self.dp_group, self.tp_group = columns[self.my_tp], rows[self.my_dp]

    def slice_of(self, name: str) -> tuple[int, int, int]:
        """Dimension, start and length of this rank's slice."""
        size, dim, lengths = PARAMETERS[name]
        if dim is None:
            return 0, 0, size[0]
        before = lengths[self.tp][: self.my_tp]
        return dim, sum(length or 0 for length in before), lengths[self.tp][self.my_tp] or 0

    def parameter(self, name: str) -> ShardedTensor:
        size, dim, lengths = PARAMETERS[name]
        full = torch.zeros(size)
        if dim is None:
            return by_rows(full, self.dp_group)
        placed = []
        starts = [0, *itertools.accumulate(length or 0 for length in lengths[self.tp])]
        for tp, (start, length) in enumerate(zip(starts, lengths[self.tp], strict=False)):
            if length is not None:
                placed.append((self.grid[self.my_dp][tp], dim, start, length))
        return nested(full, placed, self.dp_group, self.tp_group)

    def expected(self, name: str, full: torch.Tensor) -> tuple[list[int], torch.Tensor]:
        """Global offsets and value of this rank's shard."""
        start, rows = 0, full
        offsets = [0] * full.dim()
        if name in PARAMETERS:
            dim, start, length = self.slice_of(name)
            rows = full.narrow(dim, start, length)
            offsets[dim] = start
        count = -(-len(rows) // self.dp)
        first = min(count * self.my_dp, len(rows))
        offsets[0] += first
        return offsets, rows[first : first + count].clone(memory_format=torch.contiguous_format)


def nested(
    full: torch.Tensor,
    placed: Sequence[tuple[int, int, int, int]],
    inner_group: dist.ProcessGroup | None,
    outer_group: dist.ProcessGroup | None,
) -> ShardedTensor:
    """As torch's tensor.parallel.fsdp._chunk_tensor; placed: rank, dimension, start and length of each slice."""
    metadata, local = [], []
    for rank, dim, start, length in placed:
        offsets, sizes = [0] * full.dim(), list(full.shape)
        offsets[dim], sizes[dim] = start, length
        metadata.append(ShardMetadata(offsets, sizes, f"rank:{rank}/cpu"))
        if rank == dist.get_rank():
            inner = by_rows(full.narrow(dim, start, length).clone(), inner_group)
            local.append(LocalShard(inner, metadata[-1]))
    whole = ShardedTensorMetadata(metadata, full.size(), TensorProperties(dtype=full.dtype))
    return ShardedTensor._init_from_local_shards_and_global_metadata(local, whole, process_group=outer_group)


def stored(name: str) -> torch.Tensor:
    size = PARAMETERS[name][0] if name in PARAMETERS else STRANGER
    return fill(size, torch.int32, sum(map(ord, name)))


def save_state(path: Path) -> None:
    mesh = init_device_mesh("cpu", (4,))
    for form in ("plain", "rows", "columns"):
        state = {}
        for name in (*PARAMETERS, "stranger"):
            tensor: Any = stored(name)
            if form != "plain":
                dim = 0 if form == "rows" else tensor.dim() - 1
                tensor = distribute_tensor(tensor, mesh, [Shard(dim)], src_data_rank=None)
            state[name] = {"momentum": tensor, "step": torch.tensor(5.0)}
        # As torch has it, the third part of a path is the parameter's FQN whatever the second one is.
        ema = {"rows": {"shadow": state["rows"]["momentum"]}}
        groups = [{"lr": 0.5, "betas": (1, 2)}]
        save(path / form, {KEY: {"state": state, "param_groups": groups, "ema": ema}, "other": torch.ones(3)})


def check_result(layout: Layout, loaded: dict[str, Any], change: Any = None) -> None:
    assert loaded.keys() == {KEY}
    assert loaded[KEY]["param_groups"] == [{"lr": 0.5, "betas": (1, 2)}]
    state = loaded[KEY]["state"]
    assert state.keys() == {*PARAMETERS, "stranger"}
    if change is None:
        assert image(loaded[KEY]["ema"]["rows"]["shadow"]) == image(state["rows"]["momentum"])
    group = dist.get_process_group_ranks(layout.dp_group)
    for name in state:
        assert state[name].keys() == {"momentum", "step"}
        assert image(state[name]["step"]) == image(torch.tensor(5.0))
        value, full = state[name]["momentum"], stored(name)
        full = full if change is None else change(full)
        if name == "element":
            assert image(value) == image(full)
            continue
        assert type(value) is ShardedTensor
        assert dist.get_process_group_ranks(value._process_group) == group
        assert [shard.placement.rank() for shard in value.metadata().shards_metadata] == group
        (shard,) = value.local_shards()
        offsets, expected = layout.expected(name, full)
        assert image(shard.tensor) == image(expected), name
        if name in PARAMETERS:
            dim, start, length = layout.slice_of(name)
            assert value.size()[dim] == length, name
            offsets[dim] -= start
            assert list(value.size()) == [length if d == dim else n for d, n in enumerate(full.shape)]
        assert not expected.numel() or shard.metadata.shard_offsets == offsets
        assert shard.metadata.shard_sizes == list(expected.shape)


def each_slice_holds_what_was_saved(path: Path, dp: int, tp: int, tp_major: bool) -> None:
    layout = Layout(dp, tp, tp_major)
    model = {name: layout.parameter(name) for name in PARAMETERS}
    # All loads come before the first check: a rank that fails a check must not leave the others waiting in a load.
    results = [load_fast(dict(model), KEY, fast_reader(path / form)) for form in ("plain", "rows", "columns")]
    results.append(load_fast(model, KEY, torch_reader(path / "columns"), torch_planner()))
    with pytest.raises(dcp_fast.OptimizerStateError, match=r"state of 1 parameters .*'stranger'"):
        load_fast(model, KEY, fast_reader(path / "plain"), like="model")
    partial = dcp_fast.DefaultLoadPlanner(allow_partial_load=True)
    like_model = load_fast(model, KEY, fast_reader(path / "columns"), partial, like="model")[KEY]
    for result in results:
        check_result(layout, result)
    assert like_model["state"].keys() == set(PARAMETERS)
    assert image(like_model["ema"]) == image(results[0][KEY]["ema"])
    for name, value in like_model["state"].items():
        if PARAMETERS[name][1] is not None:
            assert image(value) == image(results[2][KEY]["state"][name])
            continue
        assert value["momentum"].metadata().shards_metadata == model[name].metadata().shards_metadata
        for shard in value["momentum"].local_shards():
            assert image(shard.tensor) == image(layout.expected(name, stored(name))[1])


def slices_of_a_grid(path: Path) -> None:
    """Four tensor-parallel ranks in a square, so that slices have offsets in both dimensions, uneven ones."""
    alone = [dist.new_group([rank]) for rank in range(4)][dist.get_rank()]
    full = stored("rows")  # 10 by 7
    metadata = [
        ShardMetadata([top, left], [height, width], f"rank:{2 * (top > 0) + (left > 0)}/cpu")
        for top, height in ((0, 4), (4, 6))
        for left, width in ((0, 5), (5, 2))
    ]
    mine = metadata[dist.get_rank()]
    inner = by_rows(torch.zeros(mine.shard_sizes), alone)
    whole = ShardedTensorMetadata(metadata, full.size(), TensorProperties())
    outer = ShardedTensor._init_from_local_shards_and_global_metadata([LocalShard(inner, mine)], whole)
    for form in ("plain", "rows", "columns"):
        loaded = load_fast({"rows": outer}, KEY, fast_reader(path / form))[KEY]["state"]["rows"]["momentum"]
        (top, left), (height, width) = mine.shard_offsets, mine.shard_sizes
        assert list(loaded.size()) == [height, width]
        expected = full[top : top + height, left : left + width].clone(memory_format=torch.contiguous_format)
        assert image(loaded.local_shards()[0].tensor) == image(expected)


def some_ranks_have_no_slice(path: Path) -> None:
    """The data-parallel ranks are then told by parameters that are not tensor-parallel, or not at all."""
    layout = Layout(2, 2, True)
    alone = {"one_holder": layout.parameter("one_holder")}
    beside = alone | {"replicated": layout.parameter("replicated")}
    # Over all ranks, so that in the 2-D layout some hold nothing of it: that does not make it tensor-parallel.
    over_all = by_rows(torch.zeros(1, 3))
    loaded = load_fast(beside, KEY, fast_reader(path / "plain"))[KEY]["state"]
    both = load_fast({**beside, "single_row": over_all}, KEY, fast_reader(path / "rows"))[KEY]["state"]
    kind: Any = CheckpointException if layout.my_tp == 0 else dcp_fast.OptimizerStateError
    with pytest.raises(kind, match="" if layout.my_tp == 0 else "data-parallel ranks cannot be told: one_holder"):
        load_fast(alone, KEY, fast_reader(path / "plain"))
    group = dist.get_process_group_ranks(layout.dp_group)
    for state in (loaded, both):
        for name in ("one_holder", "replicated", "single_row"):
            value = state[name]["momentum"]
            assert dist.get_process_group_ranks(value._process_group) == group, name
            (shard,) = value.local_shards()
            assert image(shard.tensor) == image(layout.expected(name, stored(name))[1]), name


def planners_see_the_stored_tensors(path: Path, dp: int, tp: int, tp_major: bool) -> None:
    layout = Layout(dp, tp, tp_major)
    model = {name: layout.parameter(name) for name in PARAMETERS}
    results, recorded = [], []
    for base in BASES:
        for reader in (fast_reader, torch_reader):
            calls: list[Any] = []
            results.append(load_fast(model, KEY, reader(path / "rows"), recording(base, calls)()))
            results.append(load_fast(model, KEY, reader(path / "rows"), lookup_elsewhere(base)()))
            recorded.append(calls)
    flipped = load_fast(model, KEY, fast_reader(path / "rows"), flipping(BASES[1])())
    for result in results:
        check_result(layout, result)
    for calls in recorded:
        check_items(layout, [call[1] for call in calls if call[0] == "commit_tensor"])
        names = [call[0] for call in calls]
        assert names.count("create_local_plan") == 1
        assert names.count("load_bytes") > 0
    for name, value in flipped[KEY]["state"].items():
        if name != "element":
            _, expected = layout.expected(name, ~stored(name))
            assert image(value["momentum"].local_shards()[0].tensor) == image(expected)


def check_items(layout: Layout, items: list[Any]) -> None:
    """The hooks see indices of the stored tensors: global offsets, of which the parts that are read are a partition."""
    found: dict[str, int] = {}
    for item in items:
        _, part, name, kind = item.dest_index.fqn.split(".")
        if part == "state" and kind == "momentum" and name != "element":
            offsets, expected = layout.expected(name, stored(name))
            assert list(item.dest_index.offset) == offsets
            at = [sum(pair) for pair in zip(item.dest_index.offset, item.dest_offsets, strict=True)]
            assert at == [sum(pair) for pair in zip(item.storage_index.offset, item.storage_offsets, strict=True)]
            found[name] = found.get(name, 0) + item.lengths.numel()
            assert found[name] <= expected.numel()
    for name in (*PARAMETERS, "stranger"):
        assert name == "element" or found.get(name, 0) == layout.expected(name, stored(name))[1].numel()


def only_the_shard_is_allocated(path: Path) -> None:
    layout = Layout(2, 2, False)
    rows = 1 << 17
    placed = [(layout.grid[layout.my_dp][tp], 1, 4 * tp, 4) for tp in range(2)]
    model = {"w": nested(torch.zeros(rows, 8), placed, layout.dp_group, layout.tp_group)}
    with Allocations() as allocations:
        load_fast(model, KEY, fast_reader(path))
    assert allocations.largest == rows * 8 * 4 // 4


@pytest.fixture(scope="module")
def shared(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints that four ranks wrote."""
    path = tmp_path_factory.mktemp("optimizer_2d")
    check(ranks, 4, [save_state], path)
    return path


@pytest.mark.parametrize("tp_major", [False, True], ids=["dp-major", "tp-major"])
@pytest.mark.parametrize(("dp", "tp"), [(2, 2), (2, 3), (3, 2)], ids=str)
def test_slices_of_saved_tensors(ranks: Ranks, shared: Path, dp: int, tp: int, tp_major: bool) -> None:
    check(ranks, dp * tp, [functools.partial(each_slice_holds_what_was_saved, dp=dp, tp=tp, tp_major=tp_major)], shared)


def test_slices_with_offsets_in_both_dimensions(ranks: Ranks, shared: Path) -> None:
    check(ranks, 4, [slices_of_a_grid], shared)


def test_ranks_without_any_slice(ranks: Ranks, shared: Path) -> None:
    check(ranks, 4, [some_ranks_have_no_slice], shared)


@pytest.mark.parametrize(("dp", "tp"), [(2, 2), (2, 3)], ids=str)
def test_planners(ranks: Ranks, shared: Path, dp: int, tp: int) -> None:
    check(ranks, dp * tp, [functools.partial(planners_see_the_stored_tensors, dp=dp, tp=tp, tp_major=True)], shared)


def test_memory(ranks: Ranks, tmp_path: Path) -> None:
    save(tmp_path, {KEY: {"state": {"w": {"exp_avg": torch.zeros(1 << 17, 8)}}}})
    check(ranks, 4, [only_the_shard_is_allocated], tmp_path)


# Where torch's own works: when the data-parallel ranks are all ranks, whichever slice they hold.


def as_torch_for_slice(path: Path, number: int) -> None:
    others = (dist.get_rank() + 1) % dist.get_world_size()
    owner = [others, others]
    owner[number] = dist.get_rank()

    def model() -> dict[str, Any]:
        made: dict[str, Any] = {"replicated": by_rows(torch.zeros(6, 4)), "four_rows": by_rows(torch.zeros(4, 2))}
        for name in ("rows", "uneven_rows", "columns", "deep"):
            size, dim, lengths = PARAMETERS[name]
            assert dim is not None
            first = lengths[2][0] or 0
            placed = [(owner[0], dim, 0, first), (owner[1], dim, first, size[dim] - first)]
            made[name] = nested(torch.zeros(size), placed, None, None)
        return made

    for form in ("plain", "columns"):
        assert_same_result(path / form, model)
        assert_same_result(path / form, model, reader=torch_reader)


def test_same_result_as_torch(ranks: Ranks, shared: Path, tmp_path: Path) -> None:
    scenarios = [functools.partial(as_torch_for_slice, number=number) for number in (0, 1)]
    check(ranks, 2, scenarios, shared)
