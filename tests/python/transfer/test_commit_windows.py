"""Planners of which only ``commit_tensor`` is their own get windows of a program that has all items."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import (
    Entry,
    assert_same_load,
    fast_reader,
    fill,
    image,
    load_with,
    torch_load,
    torch_reader,
    write_checkpoint,
)
from torch.distributed._shard.sharded_tensor import Shard as LocalShard
from torch.distributed._shard.sharded_tensor import init_from_local_shards
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import dcp_fast
from dcp_fast.transfer.commit_windows import windows_of
from dcp_fast.transfer.windows import Windows

COUNT = 60
SHAPE = (8, 3)
Calls = list[tuple[str, Any, Any]]


def entry(i: int) -> Entry:
    whole = fill(SHAPE, torch.float32, i)
    chunks = [((0, 0), whole[:3].clone()), ((3, 0), whole[3:].clone())]
    return Entry(SHAPE, torch.float32, chunks, file="__%d_0.distcp")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tensors in two chunks, which lie in two files, with values between them."""
    entries: dict[str, Any] = {}
    for i in range(COUNT):
        entries[f"t{i:03}"] = entry(i)
        if i % 20 == 10:
            entries[f"t{i:03}.value"] = Entry(value=i, file=f"__{i % 2}_0.distcp")
    return write_checkpoint(tmp_path_factory.mktemp("commits"), entries)


def state() -> dict[str, Any]:
    result: dict[str, Any] = {}
    for i in range(COUNT):
        result[f"t{i:03}"] = torch.zeros(SHAPE)
        if i % 20 == 10:
            result[f"t{i:03}.value"] = None
    return result


class Committing(dcp.DefaultLoadPlanner):
    """Notes its calls where nobody can see it, with the values that have come."""

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self._note = calls.append  # a method of an extension: what it belongs to is not looked at

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        values = [value for key, value in self.state_dict.items() if key.endswith(".value")]
        self._note((item.dest_index.fqn, image([tensor, values]), item))
        self.act(item.dest_index.fqn, item.dest_offsets[0] == 0, tensor)

    def later(self, i: int = 40) -> torch.Tensor:
        tensor: torch.Tensor = self.state_dict[f"t{i:03}"]
        return tensor

    def act(self, fqn: str, is_first: bool, tensor: torch.Tensor) -> None:
        """What a planner does beyond looking."""


class Replacing(Committing):
    """Puts a new tensor in place of the one that has come, into which its next chunk goes."""

    def act(self, fqn: str, is_first: bool, tensor: torch.Tensor) -> None:
        if fqn >= "t030":
            self.original_state_dict[fqn] = self.state_dict[fqn] = self.state_dict[fqn] * 2


class ReplacingLater(Committing):
    """Puts a new tensor in place of one that comes later, in the same window."""

    def act(self, fqn: str, is_first: bool, tensor: torch.Tensor) -> None:
        if fqn == "t036" and is_first:
            self.original_state_dict["t040"] = self.state_dict["t040"] = torch.ones(SHAPE)


class Mirroring(Committing):
    """Writes to a tensor that comes later."""

    def act(self, fqn: str, is_first: bool, tensor: torch.Tensor) -> None:
        if fqn in ("t002", "t036"):
            self.later().fill_(7)


class Counting(Committing):
    """Begins to count in the midst of a window, and adds that to what has come, and to what comes."""

    committed = 0

    def act(self, fqn: str, is_first: bool, tensor: torch.Tensor) -> None:
        if fqn >= "t025":
            self.committed += 1
            tensor += self.committed
            self.later().add_(1)


class Writing(Committing):
    """Writes to a tensor that comes later, in inference mode."""

    def act(self, fqn: str, is_first: bool, tensor: torch.Tensor) -> None:
        if fqn == "t036":
            with torch.inference_mode():
                self.later().fill_(7)


class Moving(Committing):
    """Moves a tensor that comes later to other memory, and frees what it had."""

    def act(self, fqn: str, is_first: bool, tensor: torch.Tensor) -> None:
        if fqn in ("t020", "t037") and is_first:
            self.later().data = torch.full(SHAPE, 3.0)


class Transposing(Committing):
    """Gives a tensor that comes later other strides, in the memory that it has."""

    def act(self, fqn: str, is_first: bool, tensor: torch.Tensor) -> None:
        if fqn == "t010" and is_first:
            self.later().as_strided_(SHAPE, (1, 8))


class Freeing(Committing):
    """Frees the memory of a tensor that comes later, and allocates it anew, as FSDP does."""

    def act(self, fqn: str, is_first: bool, tensor: torch.Tensor) -> None:
        if fqn in ("t020", "t037") and is_first:
            storage = self.later().untyped_storage()
            size = storage.size()
            storage.resize_(0)
            self.kept = torch.zeros(SHAPE)  # takes the place that is free now
            storage.resize_(size)
            self.later().zero_()
            del self.kept


class OtherElements(Committing):
    """Gives tensors that come later other strides, another dtype or a negative bit, in the memory that they have."""

    def act(self, fqn: str, is_first: bool, tensor: torch.Tensor) -> None:
        if fqn == "t036" and is_first:
            self.later(40).as_strided_(SHAPE, (1, 8))
            self.later(41).data = self.later(41).view(torch.int32)
            self.later(42).data = torch._neg_view(self.later(42))
        if fqn == "t043" and is_first:
            self.original_state_dict["t044"] = self.state_dict["t044"] = torch.ones(SHAPE)
            self.later(45).as_strided_(SHAPE, (1, 8))


class Adding(Committing):
    """Adds a key to the state dict."""

    def act(self, fqn: str, is_first: bool, tensor: torch.Tensor) -> None:
        if fqn == "t020" and is_first:
            self.original_state_dict["more"] = self.state_dict["more"] = torch.ones(2)


PLANNERS = [
    *(Committing, Replacing, ReplacingLater, Mirroring, Counting, Moving, Transposing, OtherElements, Freeing, Adding),
]


def both(stored: Path, make: Callable[[Calls], Any], states: list[dict[str, Any]]) -> tuple[Calls, Calls, list[Any]]:
    """Load with torch and dcp_fast. Returns the calls of each, and the errors of each rank."""
    calls: list[Calls] = [[], []]
    loads = ((torch_load, torch_reader), (dcp_fast.load, fast_reader))
    outcomes = [
        load_with(load, into, storage_reader=reader(stored), planner=make(log))
        for (load, reader), into, log in zip(loads, states, calls, strict=True)
    ]
    return calls[0], calls[1], [outcome.errors for outcome in outcomes]


@pytest.mark.parametrize("planner", PLANNERS)
def test_as_under_torch(stored: Path, planner: Callable[[Calls], Any]) -> None:
    """Each call gets an equal item and an equal tensor, and sees the same values."""
    states = [state(), state()]
    theirs, ours, errors = both(stored, planner, states)
    assert errors == [None, None]
    assert ours == theirs
    assert image(states[1]) == image(states[0])
    assert len(ours) == 2 * COUNT


def refuse(*_: Any) -> None:
    raise AssertionError("an item was resolved by itself")


def test_nothing_is_resolved_item_by_item(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or these tests would prove nothing."""
    monkeypatch.setattr(Windows, "add", refuse)
    calls: Calls = []
    loaded = state()
    dcp_fast.load(loaded, storage_reader=fast_reader(stored), planner=Committing(calls))
    assert len(calls) == 2 * COUNT
    assert all(image(loaded[f"t{i:03}"]) == image(fill(SHAPE, torch.float32, i)) for i in range(COUNT))
    with pytest.raises(dcp.api.CheckpointException, match="by itself"):
        dcp_fast.load(state(), storage_reader=fast_reader(stored), planner=Mirroring([]))


def test_a_planner_that_lists_items(stored: Path) -> None:
    """Whoever asks for the items of the plan gets objects, and these are what is committed."""

    class Listing(Committing):
        def finish_plan(self, new_plan: Any) -> Any:
            self.wanted = [item for item in new_plan.items if item.dest_index.fqn != "t007"]
            return dcp.planner.LoadPlan(self.wanted)

    states = [state(), state()]
    theirs, ours, errors = both(stored, Listing, states)
    assert errors == [None, None]
    assert ours == theirs
    assert image(states[1]) == image(states[0])
    assert not states[1]["t007"].any()


def test_a_smaller_tensor(stored: Path) -> None:
    """A tensor that a hook has made too small for what comes is an error of torch's type, once it is its turn."""

    class Shrinking(Committing):
        def act(self, fqn: str, is_first: bool, tensor: torch.Tensor) -> None:
            if fqn == "t020" and is_first:
                self.later().resize_(2, 3)

    theirs, ours, (expected, errors) = both(stored, Shrinking, [state(), state()])
    assert errors.keys() == expected.keys()
    assert all(isinstance(errors[rank], type(error)) for rank, error in expected.items())
    assert ours == theirs
    assert len(ours) == 40


@pytest.mark.parametrize("at", [0, 1, 5, 70, 2 * COUNT - 1])
def test_a_commit_that_raises(stored: Path, at: int) -> None:
    """All before it is in place and committed, as under torch."""

    class Raising(Committing):
        def __init__(self, calls: Calls) -> None:
            super().__init__(calls)
            self._more = iter(chain([False] * at, [True], iter(bool, True)))

        def act(self, fqn: str, is_first: bool, tensor: torch.Tensor) -> None:
            if next(self._more):
                raise KeyError("of the planner")

    theirs, ours, errors = both(stored, Raising, [state(), state()])
    assert [type(error[0]) for error in errors] == [KeyError, KeyError]
    assert ours == theirs
    assert len(ours) == at + 1


def test_a_record_that_is_damaged(stored: Path, tmp_path: Path) -> None:
    """All before it is committed, though a window had more."""
    path = write_checkpoint(tmp_path, {f"t{i:03}": Entry.of(fill(SHAPE, torch.float32, i)) for i in range(COUNT)})
    info = next(info for index, info in fast_reader(path).read_metadata().storage_data.items() if index.fqn == "t040")
    file = path / info.relative_path
    data = bytearray(file.read_bytes())
    data[info.offset : info.offset + 60] = bytes(60)
    file.write_bytes(data)
    wanted = [{f"t{i:03}": torch.zeros(SHAPE) for i in range(COUNT)} for _ in range(2)]
    theirs, ours, (expected, errors) = both(path, Committing, wanted)
    assert expected is not None
    assert isinstance(errors[0], dcp_fast.LoadError)
    assert "t040" in str(errors[0])
    assert [fqn for fqn, *_ in ours] in ([], [fqn for fqn, *_ in theirs])


def test_tensors_that_share_memory(stored: Path) -> None:
    """The plan's order decides what is there in the end, and what each commit sees."""

    def overlapping() -> dict[str, Any]:
        memory = torch.zeros(COUNT + 8, 3)
        return {f"t{i:03}": memory[i : i + 8] for i in range(COUNT)}

    states = [overlapping(), overlapping()]
    theirs, ours, errors = both(stored, Committing, states)
    assert errors == [None, None]
    assert ours == theirs
    assert image(states[1]) == image(states[0])


def test_strided_and_converted(stored: Path) -> None:
    def mixed() -> dict[str, Any]:
        into = state()
        for i in range(0, COUNT, 3):
            into[f"t{i:03}"] = torch.zeros(SHAPE, dtype=torch.float64 if i % 2 else torch.complex64)
            into[f"t{i + 1:03}"] = torch.zeros(3, 8).t()
        return into

    assert_same_load(stored, mixed, planner=lambda: Committing([]))


class NewLocalTensor(Committing):
    """Puts other local tensors into DTensors and ShardedTensors that come later."""

    def act(self, fqn: str, is_first: bool, tensor: torch.Tensor) -> None:
        if fqn == "t036" and is_first:
            for i in (40, 55):
                value: Any = self.later(i)
                if isinstance(value, DTensor):
                    value._local_tensor = torch.zeros(SHAPE)
                else:
                    value.local_shards()[0].tensor = torch.zeros(SHAPE)


@pytest.mark.parametrize("kind", ["DTensor", "ShardedTensor"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_parts_of_tensors_whose_local_tensor_is_replaced(stored: Path, kind: str, gloo: None) -> None:
    mesh = init_device_mesh("cpu", (1,))

    def part() -> Any:
        local = torch.zeros(SHAPE)
        if kind == "DTensor":
            return DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
        return init_from_local_shards([LocalShard.from_tensor_and_offsets(local, [0, 0], 0)], *SHAPE)

    states = [{f"t{i:03}": part() for i in range(COUNT)} for _ in range(2)]
    theirs, ours, errors = both(stored, NewLocalTensor, states)
    assert errors == [None, None]
    assert ours == theirs
    for i in range(COUNT):
        value = states[1][f"t{i:03}"]
        local = value.to_local() if kind == "DTensor" else value.local_shards()[0].tensor
        assert image(local) == image(fill(SHAPE, torch.float32, i))


class WritingLater(Committing):
    """Writes to DTensors that come later, which counts with these alone and not with their local tensors."""

    def act(self, fqn: str, is_first: bool, tensor: torch.Tensor) -> None:
        if fqn in ("t002", "t036"):
            with torch.inference_mode(self.later().is_inference()):
                self.later(3).zero_()
                self.later(40).detach().add_(1)
                torch.nn.init.ones_(self.later(55))


class Resolving(WritingLater):
    """Has a way of its own to its tensors."""

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return super().resolve_tensor(read_item)


@pytest.mark.parametrize("planner", [WritingLater, Resolving])
@pytest.mark.parametrize("inference", [False, True])
def test_dtensors_that_a_commit_writes_to(stored: Path, planner: type[Committing], inference: bool, gloo: None) -> None:
    mesh = init_device_mesh("cpu", (1,))
    locals_ = [{f"t{i:03}": torch.zeros(SHAPE) for i in range(COUNT)} for _ in range(2)]
    with torch.inference_mode(inference):
        states = [
            {fqn: DTensor.from_local(local, mesh, [Shard(0)], run_check=False) for fqn, local in of_state.items()}
            for of_state in locals_
        ]
    theirs, ours, errors = both(stored, planner, states)
    assert errors == [None, None]
    assert ours == theirs
    assert image(locals_[1]) == image(locals_[0])


class Copying(torch.Tensor):
    """Gives copies where others give views."""

    def __getitem__(self, index: Any) -> torch.Tensor:
        return super().__getitem__(index).clone()


def test_boxes_of_a_subclass_are_views(stored: Path) -> None:
    class Adding(Committing):
        def act(self, fqn: str, is_first: bool, tensor: torch.Tensor) -> None:
            tensor += 1

    states = [{f"t{i:03}": torch.zeros(SHAPE).as_subclass(Copying) for i in range(COUNT)} for _ in range(2)]
    theirs, ours, errors = both(stored, Adding, states)
    assert errors == [None, None]
    assert ours == theirs
    assert image(states[1]) == image(states[0])


def test_tensors_of_inference_mode(stored: Path) -> None:
    """Nobody counts writes to them, so that they come one by one."""
    with torch.inference_mode():
        states = [state(), state()]
    theirs, ours, errors = both(stored, Writing, states)
    assert errors == [None, None]
    assert ours == theirs
    assert image(states[1]) == image(states[0])


def test_windows_have_each_tensor_once() -> None:
    fqns = [f"t{i % 7}" for i in range(40)]
    order = [*range(20), ~0, *range(20, 40), ~1]
    windows = windows_of(order, fqns)
    assert [item for window in windows for item in window] == order
    for window in windows:
        names = [fqns[item] for item in window if item >= 0]
        assert len(set(names)) == len(names)
    assert [len(window) for window in windows[:5]] == [1, 1, 1, 1, 7]
    lengths = [len(window) for window in windows_of(range(10_000), [str(i) for i in range(10_000)])]
    assert lengths == [1, 1, 1, 1, 8, 64, 512, 4096, 4096, 10_000 - 2 * 4096 - 588]
    assert windows_of([], []) == []
