"""Planners whose hooks would notice if items did not come one by one, in torch's order.

Some of them name tensors of the checkpoint that they are tried with: "t000" to "t059", of the sizes below.
"""

from __future__ import annotations

import io
import itertools
import queue
import random
import threading
from types import SimpleNamespace
from typing import Any

import numpy
import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from hooked_planners import Doubling
from tensor_subclasses import Negated
from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem

COUNT = 60


def sizes(i: int) -> tuple[int, int]:
    return 8, i % 5 + 1


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


class Aside(dcp.DefaultLoadPlanner):
    """Loads into tensors of its own, which it hands out as an object of C tells."""

    def __init__(self) -> None:
        super().__init__()
        self.begin()

    def begin(self) -> None:
        raise NotImplementedError

    def take(self, item: ReadItem) -> torch.Tensor:
        return torch.full(tuple(item.lengths), -1.0)

    def give_back(self, tensor: torch.Tensor) -> None:
        """The tensor is not used any more."""

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        return self.take(item)

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        super().resolve_tensor(item).copy_(tensor)
        self.give_back(tensor)


class Locked(Aside):
    """One at a time."""

    def begin(self) -> None:
        self.lock = threading.Lock()

    def take(self, item: ReadItem) -> torch.Tensor:
        assert self.lock.acquire(timeout=10)
        return super().take(item)

    def give_back(self, tensor: torch.Tensor) -> None:
        self.lock.release()


class Pooled(Aside):
    """Two at a time."""

    def begin(self) -> None:
        self.pool: queue.SimpleQueue[str] = queue.SimpleQueue()
        for number in range(2):
            self.pool.put(str(number))

    def take(self, item: ReadItem) -> torch.Tensor:
        self.pool.get(timeout=10)
        return super().take(item)

    def give_back(self, tensor: torch.Tensor) -> None:
        self.pool.put("another")


class Alternating(Aside):
    """A generator tells what comes next."""

    def begin(self) -> None:
        self.steps = itertools.cycle(["take", "give back"])

    def take(self, item: ReadItem) -> torch.Tensor:
        assert next(self.steps) == "take"
        return super().take(item)

    def give_back(self, tensor: torch.Tensor) -> None:
        assert next(self.steps) == "give back"


class Drawing(Aside):
    """Scales by random numbers, drawn one for each hook."""

    def begin(self) -> None:
        self.draw = random.Random(1).random

    def take(self, item: ReadItem) -> torch.Tensor:
        self.draw()
        return super().take(item)

    def give_back(self, tensor: torch.Tensor) -> None:
        if self.draw() > 0.5:
            self.state_dict["t000"].add_(1)


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
    *(Locked, Pooled, Alternating, Drawing),
    *(lambda: InMemory(bytearray(1)), lambda: InMemory(np.zeros(1)), lambda: InMemory(Slots())),
]
