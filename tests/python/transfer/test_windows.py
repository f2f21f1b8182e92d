"""Planners with hooks get windows of items, and cannot tell them from torch's one by one."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import Entry, assert_same_load, fast_reader, fill, image, torch_load, torch_reader, write_checkpoint
from hooked_planners import Doubling
from tensor_subclasses import Negated
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem

import dcp_fast
from dcp_fast import _native

COUNT = 60
Log = list[tuple[str, str]]


def sizes(i: int) -> tuple[int, int]:
    return 8, i % 5 + 1


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tensors in two chunks, which lie in two files, with values between them."""
    entries: dict[str, Any] = {}
    for i in range(COUNT):
        whole = fill(sizes(i), torch.float32, i)
        chunks = [((0, 0), whole[:3].clone()), ((3, 0), whole[3:].clone())]
        entries[f"t{i:03}"] = Entry(sizes(i), torch.float32, chunks, file="__%d_0.distcp")
        if i % 20 == 10:
            entries[f"t{i:03}.value"] = Entry(value=i, file=f"__{i % 2}_0.distcp")
    return write_checkpoint(tmp_path_factory.mktemp("windows"), entries)


def state() -> dict[str, Any]:
    result: dict[str, Any] = {}
    for i in range(COUNT):
        result[f"t{i:03}"] = torch.zeros(sizes(i))
        if i % 20 == 10:
            result[f"t{i:03}.value"] = None
    return result


def assert_loaded(loaded: dict[str, Any]) -> None:
    for i in range(COUNT):
        assert image(loaded[f"t{i:03}"]) == image(fill(sizes(i), torch.float32, i))


def logging_planner(log: Log, base: type = dcp.DefaultLoadPlanner, commits: bool = True) -> LoadPlanner:
    """Notes its calls where nobody can see it."""

    class Logging(base):  # type: ignore[misc]
        def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
            log.append(("resolve", item.dest_index.fqn))
            result: torch.Tensor = super().resolve_tensor(item)
            return result

        def load_bytes(self, item: ReadItem, value: io.BytesIO) -> None:
            log.append(("bytes", item.dest_index.fqn))
            super().load_bytes(item, value)

    class Committing(Logging):
        def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
            log.append(("commit", f"{item.dest_index.fqn} {image(tensor)}"))
            super().commit_tensor(item, tensor)

    planner: LoadPlanner = Committing() if commits else Logging()
    return planner


def run_lengths(log: Log, what: str) -> list[int]:
    """How many calls of a kind there are in a row, each time."""
    lengths, before = [], ""
    for kind, _ in log:
        if kind == what:
            lengths[-1:] = [lengths[-1] + 1] if before == what else [*lengths[-1:], 1]
        before = kind
    return lengths


def test_items_are_resolved_ahead(stored: Path) -> None:
    """Or these tests would prove nothing. Each kind of call comes in torch's order."""
    ours: Log = []
    theirs: Log = []
    states = [state(), state()]
    dcp_fast.load(states[0], storage_reader=fast_reader(stored), planner=logging_planner(ours))
    torch_load(states[1], storage_reader=torch_reader(stored), planner=logging_planner(theirs))
    assert image(states[0]) == image(states[1])
    assert max(run_lengths(theirs, "resolve")) == 1
    assert max(run_lengths(ours, "resolve")) >= COUNT // 4
    for kinds in ({"resolve"}, {"commit", "bytes"}):
        assert [call for call in ours if call[0] in kinds] == [call for call in theirs if call[0] in kinds]


def test_without_commits_boxes_of_one_tensor_share_a_window(stored: Path) -> None:
    log: Log = []
    loaded = state()
    dcp_fast.load(loaded, storage_reader=fast_reader(stored), planner=logging_planner(log, commits=False))
    assert max(run_lengths([call for call in log if call[0] != "bytes"], "resolve")) == 2 * COUNT
    assert_loaded(loaded)


class Rarely(dcp.DefaultLoadPlanner):
    """Takes some tensors a detour by way of an attribute, as Megatron-Core does with FP8."""

    detour: tuple[ReadItem, torch.Tensor] | None = None

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        tensor = super().resolve_tensor(item)
        if int(item.dest_index.fqn[1:]) % 25 != 24:
            return tensor
        self.detour = item, tensor
        return torch.empty_like(tensor)

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        if self.detour is not None:
            for_item, target = self.detour
            assert for_item is item, "not called right after resolve_tensor"
            target.copy_(tensor)
            self.detour = None


class Scratch(dcp.DefaultLoadPlanner):
    """Hands out the same memory again and again from the 20th item on, and keeps nothing of a call."""

    def __init__(self) -> None:
        super().__init__()
        self.scratch = torch.zeros(1000)

    def _target(self, item: ReadItem) -> torch.Tensor:
        return dcp.DefaultLoadPlanner.resolve_tensor(self, item)

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        target = self._target(item)
        if int(item.dest_index.fqn[1:]) < 20:
            return target
        at = int(item.dest_index.fqn[1:]) % 3  # not always the same place of it
        return self.scratch[at : at + target.numel()].view(target.shape)

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        target = self._target(item)
        if target.data_ptr() != tensor.data_ptr():
            target.copy_(tensor)
            tensor.fill_(-1)


class ScratchElsewhere(Scratch):
    """The same, in tensors of which nobody can tell where their memory is."""

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        return Negated.make(super().resolve_tensor(item))

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        super().commit_tensor(item, tensor.wrapped)


class Replacing(dcp.DefaultLoadPlanner):
    """Puts another tensor into the state dict once a chunk has come, into which the next chunk goes."""

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        fqn = item.dest_index.fqn
        self.original_state_dict[fqn] = self.state_dict[fqn] = self.state_dict[fqn] * 2


class Counting(dcp.DefaultLoadPlanner):
    """Adds to each tensor how many were committed before it was resolved."""

    committed = 0
    seen = 0

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        self.seen = self.committed
        return super().resolve_tensor(item)

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        self.committed += 1
        tensor += self.seen


class Collecting(dcp.DefaultLoadPlanner):
    """Sums up what has come, in an attribute that grows."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: list[float] = []

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        tensor = super().resolve_tensor(item)
        return tensor if len(self.sums) % 2 else tensor.new_zeros(tensor.shape)

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        self.sums.append(float(tensor.sum()))


class Slotted(LoadPlanner):
    """Has no attributes that anybody could look at."""

    __slots__ = ("inner", "last")

    def __init__(self) -> None:
        self.inner = dcp.DefaultLoadPlanner()

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        self.last = self.inner.resolve_tensor(item)
        return torch.empty_like(self.last)

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        self.last.copy_(tensor)

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        self.inner.set_up_planner(*args, **kwargs)

    def create_local_plan(self) -> Any:
        return self.inner.create_local_plan()

    def create_global_plan(self, plans: Any) -> Any:
        return self.inner.create_global_plan(plans)

    def finish_plan(self, plan: Any) -> Any:
        return self.inner.finish_plan(plan)

    def load_bytes(self, item: ReadItem, value: io.BytesIO) -> None:
        self.inner.load_bytes(item, value)


class SameKey(dcp.DefaultLoadPlanner):
    """Remembers the item at hand in places that no attribute tells: they are those of before."""

    counted = 0

    def __init__(self) -> None:
        super().__init__()
        self.now: dict[str, Any] = {"fqn": None, "list": [None]}
        self.helper = SimpleNamespace(count=0)
        self.count = torch.zeros(1)
        self.without_length = numpy.array(2.0)  # len() of it raises
        type(self).counted = 0

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        self.now["fqn"] = item.dest_index.fqn
        self.now["list"][0] = item.dest_index
        self.helper.count += 1
        self.count += 1
        type(self).counted += 1
        return super().resolve_tensor(item)

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        tensor += self.helper.count + self.counted + float(self.count)
        tensor += float(self.now["fqn"][1:]) + sum(self.now["list"][0].offset)


class Awaking(dcp.DefaultLoadPlanner):
    """Keeps nothing at first. In the midst of a window both of its hooks begin to."""

    committed = 0

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        if item.dest_index.fqn >= "t025":
            self.resolving = item.dest_index.fqn
            self.log.append("resolved")
        return super().resolve_tensor(item)

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        if item.dest_index.fqn >= "t020":
            self.committed += 1
            self.log.append("committed")
            tensor += self.committed + len(self.log) + self.log.count("resolved") / 2


class Forgetting(dcp.DefaultLoadPlanner):
    """Deletes an attribute when it resolves its first item."""

    def __init__(self) -> None:
        super().__init__()
        self.first = True

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        tensor = super().resolve_tensor(item)
        if not hasattr(self, "first"):
            return tensor
        del self.first
        return tensor.new_zeros(tensor.shape)


class Mirroring(dcp.DefaultLoadPlanner):
    """Writes what has come into a tensor that comes later, too."""

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        self.state_dict[f"t{COUNT - 1:03}"].fill_(7)


class Moving(dcp.DefaultLoadPlanner):
    """Gives a tensor that comes later in the same window other memory."""

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        return super().resolve_tensor(item)

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        if item.dest_index.fqn == "t036" and item.dest_offsets[0] == 0:
            self.state_dict["t040"].data = torch.full(sizes(40), 3.0)


class Toggling(dcp.DefaultLoadPlanner):
    """Changes the same on both ways, at one item each, and goes by it."""

    def __init__(self) -> None:
        super().__init__()
        self.is_on = False

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        tensor = super().resolve_tensor(item)
        if item.dest_index.fqn != "t040":
            return tensor
        self.is_on = not self.is_on
        return tensor.new_zeros(tensor.shape) if self.is_on else tensor

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        if item.dest_index.fqn == "t036" and item.dest_offsets[0] == 0:
            self.is_on = not self.is_on


class Scaling(dcp.DefaultLoadPlanner):
    """Goes by the values that have come."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[int] = []

    def load_bytes(self, item: ReadItem, value: io.BytesIO) -> None:
        super().load_bytes(item, value)
        self.values.append(int(item.dest_index.fqn[1:4]))

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        tensor = super().resolve_tensor(item)
        return tensor if len(self.values) % 2 else tensor.new_zeros(tensor.shape)


class LookingAtValues(dcp.DefaultLoadPlanner):
    """Looks at values in the state dict."""

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        tensor = super().resolve_tensor(item)
        return tensor if self.original_state_dict["t010.value"] is None else tensor.new_zeros(tensor.shape)


class LookingAtCommitted(dcp.DefaultLoadPlanner):
    """Goes by the value of the tensor that came before, and by a view of another one."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Any = None

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        tensor, last = super().resolve_tensor(item), self.last
        self.last = tensor
        looks = last is not None and last.numel() > 0 and bool(last.reshape(-1)[0] % 2 == 1)
        return tensor.new_zeros(tensor.shape) if looks else tensor


class LookingInStateDict(dcp.DefaultLoadPlanner):
    """Keeps nothing itself, so that windows are large."""

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        tensor = super().resolve_tensor(item)
        others = [other for other in self.state_dict.values() if isinstance(other, torch.Tensor) and other.numel()]
        total = sum(float(other.detach().flatten()[0]) for other in others[:40])
        return tensor.new_zeros(tensor.shape) if total % 3 == 1 else tensor


class Finishing(dcp.DefaultLoadPlanner):
    """Works on tensors that came before, once each."""

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        tensor = super().resolve_tensor(item)
        names = list(self.state_dict)
        before = self.state_dict[names[names.index(item.dest_index.fqn) - 1]]
        if isinstance(before, torch.Tensor) and before.is_floating_point():
            before.mul_(2)
        return tensor


class Swallowing(LookingInStateDict):
    """Goes on after any error of its own."""

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        try:
            return super().resolve_tensor(item)
        except Exception:
            return dcp.DefaultLoadPlanner.resolve_tensor(self, item)


class Locking(LookingInStateDict):
    """Holds a lock in its hooks, and commits change what resolves go by."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.scale = 0.0

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        assert self.lock.acquire(timeout=5)
        try:
            scale = self.scale
            tensor = super().resolve_tensor(item)
            return tensor if scale % 2 else tensor.new_zeros(tensor.shape)
        finally:
            self.lock.release()

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        with self.lock:
            self.scale = float(tensor.numel())


class ByOffset(dcp.DefaultLoadPlanner):
    """What is read first tells functions that look at no values themselves what to make."""

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        tensor = super().resolve_tensor(item)
        first = self.state_dict["t001"]
        numbers = torch.full((3,), 1.0)
        torch.zeros(3, out=numbers)
        looks = torch.full((2,), first.detach().view(-1)[1])  # type: ignore[call-overload]
        return tensor if item.dest_index.fqn == "t001" or looks[0] != 0 else tensor.new_zeros(tensor.shape)


@pytest.mark.parametrize("repeat", [1, 2, 3, 1 << 30])
def test_a_planner_that_swallows_what_placing_raises(stored: Path, repeat: int) -> None:
    expected = state()
    with _native.FaultInjection("pread", nth=-1) as counter:
        dcp_fast.load(expected, checkpoint_id=stored, planner=Swallowing(), no_dist=True)
    assert counter.calls > 20
    errors: list[Any] = []
    for nth in range(counter.calls):
        loaded = state()
        try:
            with _native.FaultInjection("pread", nth, error_number=5, repeat=repeat):
                dcp_fast.load(loaded, checkpoint_id=stored, planner=Swallowing(), no_dist=True)
        except CheckpointException as error:
            errors.append(error.failures[0][0])
        else:
            assert image(loaded) == image(expected), nth
    assert len(errors) > 2
    assert all(isinstance(error, dcp_fast.LoadError) for error in errors)


class InMemory(dcp.DefaultLoadPlanner):
    """Its commits tell its resolves by memory that nobody watches."""

    def __init__(self, memory: Any) -> None:
        super().__init__()
        self.memory = memory

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        tensor = super().resolve_tensor(item)
        return tensor.new_zeros(tensor.shape) if self.memory[0] % 5 == 3 else tensor

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        self.memory[0] = (self.memory[0] + 1) % 100


class Slots:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0

    def __getitem__(self, _: int) -> int:
        return self.value

    def __setitem__(self, _: int, value: int) -> None:
        self.value = value


class Delegating(Slotted):
    """Hands on to a planner that remembers the item at hand."""

    def __init__(self) -> None:
        self.inner: Any = Doubling()

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        return self.inner.resolve_tensor(item)  # type: ignore[no-any-return]

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        self.inner.commit_tensor(item, tensor)


NOTICING = [
    *(Rarely, Scratch, ScratchElsewhere, Replacing, Counting, Collecting, Slotted),
    *(SameKey, Awaking, Forgetting, Mirroring, Moving, Scaling, LookingAtValues, Delegating),
    *(LookingAtCommitted, LookingInStateDict, Toggling, Finishing, Swallowing, Locking, ByOffset),
    *(lambda: InMemory(bytearray(1)), lambda: InMemory(np.zeros(1)), lambda: InMemory(Slots())),
]


@pytest.mark.parametrize("planner", NOTICING)
@pytest.mark.parametrize("options", [{}, {"staging_bytes": 200}])
def test_planners_that_would_notice(stored: Path, planner: Callable[[], LoadPlanner], options: dict[str, Any]) -> None:
    outcome = assert_same_load(stored, state, planner=planner, options=options, fallback=None)
    assert any(bool(tensor.any()) for tensor in outcome.state.values() if isinstance(tensor, torch.Tensor))


@pytest.mark.parametrize("at", [0, 1, 9, 70, 2 * COUNT - 1])
def test_a_resolve_that_raises(stored: Path, at: int) -> None:
    """All before it is in place and committed, as under torch."""
    logs: list[Log] = []

    def planner() -> LoadPlanner:
        logs.append([])
        planner = logging_planner(logs[-1])
        resolve, calls = planner.resolve_tensor, [0]

        def failing(item: ReadItem) -> torch.Tensor:
            calls[0] += 1
            if calls[0] == at + 1:
                raise KeyError("of the planner")
            return resolve(item)

        planner.resolve_tensor = failing  # type: ignore[method-assign]
        return planner

    states = [state(), state()]
    for load, into, reader in ((dcp_fast.load, states[0], fast_reader), (torch_load, states[1], torch_reader)):
        with pytest.raises(dcp.api.CheckpointException):
            load(into, storage_reader=reader(stored), planner=planner())
    assert image(states[0]) == image(states[1])
    ours, theirs = ([call for call in log if call[0] != "resolve"] for log in logs)
    assert ours == theirs


def test_a_record_that_is_damaged(stored: Path, tmp_path: Path) -> None:
    """All before it in the plan is committed, though a window had more."""
    entries = {f"t{i:03}": Entry.of(fill(sizes(i), torch.float32, i)) for i in range(COUNT)}
    path = write_checkpoint(tmp_path, entries)
    info = fast_reader(path).read_metadata().storage_data[MetadataIndex("t040", torch.Size((0, 0)), 0)]
    file = path / info.relative_path
    data = bytearray(file.read_bytes())
    data[info.offset : info.offset + 60] = bytes(60)
    file.write_bytes(data)
    log: Log = []
    wanted = {name: torch.zeros(sizes(int(name[1:]))) for name in entries}
    with pytest.raises(dcp.api.CheckpointException) as error:
        dcp_fast.load(wanted, storage_reader=fast_reader(path), planner=logging_planner(log))
    (failure,) = error.value.failures.values()
    assert isinstance(failure[0], dcp_fast.LoadError)
    assert "t040" in str(failure[0])
    committed = [name.split()[0] for kind, name in log if kind == "commit"]
    assert committed in ([], [f"t{i:03}" for i in range(40)])


def test_failing_reads(stored: Path) -> None:
    """A read that fails once makes a window fail, and is repeated one by one; one that fails for good is an error."""
    with _native.FaultInjection("pread", nth=-1) as counter:
        dcp_fast.load(state(), storage_reader=fast_reader(stored, io="cached"), planner=logging_planner([]))
    for nth in range(counter.calls // 2, counter.calls, max(1, counter.calls // 20)):
        logs: Log = []
        with _native.FaultInjection("pread", nth=nth, error_number=5):
            try:
                loaded = state()
                reader = fast_reader(stored, io="cached")
                dcp_fast.load(loaded, storage_reader=reader, planner=logging_planner(logs))
            except dcp.api.CheckpointException as error:
                (failure,) = error.failures.values()
                assert isinstance(failure[0], dcp_fast.FileAccessError)
                continue
        assert_loaded(loaded)
