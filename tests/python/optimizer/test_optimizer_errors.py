"""Optimizer state that cannot be loaded: what is raised, and that no rank waits for one that failed."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import save
from optimizer_cases import KEY, by_rows, check, fast_reader, load_fast, torch_load_optimizer, write_metadata
from ranks import Ranks
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

import dcp_fast

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture
def path(tmp_path: Path, gloo: None) -> Path:
    """A checkpoint of the state of one parameter."""
    state = {"w": {"exp_avg": torch.ones(4, 3), "step": torch.tensor(1.0)}}
    return save(
        tmp_path / "ckpt", {KEY: {"state": state, "param_groups": [{"lr": 0.1}]}, "model": {"w": torch.ones(1)}}
    )


def fails(path: Path, match: str, model: dict[str, Any] | None = None, key: str = KEY, **options: Any) -> Exception:
    with pytest.raises(dcp_fast.OptimizerStateError, match=match) as info:
        load_fast({} if model is None else model, key, fast_reader(path), **options)
    assert isinstance(info.value, (dcp_fast.LoadError, AssertionError))
    return info.value


def dtensor(tensor: torch.Tensor) -> DTensor:
    return DTensor.from_local(tensor, init_device_mesh("cpu", (1,)), [Replicate()], run_check=False)


def test_missing_key_names_those_that_are_there(path: Path) -> None:
    error = fails(path, "no key 'optim'; it has 'model', 'optimizer'", key="optim")
    assert isinstance(error, KeyError)


def test_missing_key_in_a_checkpoint_of_many_names_some(tmp_path: Path, gloo: None) -> None:
    write_metadata(tmp_path, {f"k{number:02}": (2,) for number in range(30)})
    fails(tmp_path, "it has 'k00', 'k01',.* 'k19' and 10 more")


@pytest.mark.parametrize("planner_data", [None, "text"])
def test_missing_planner_data(tmp_path: Path, gloo: None, planner_data: Any) -> None:
    write_metadata(tmp_path, {"optimizer.state.w.exp_avg": (4, 3)}, planner_data)
    error = fails(tmp_path, "planner data")
    assert isinstance(error, TypeError)  # as torch's, which subscripts None


def test_planner_data_without_a_key(tmp_path: Path, gloo: None) -> None:
    write_metadata(tmp_path, {"optimizer.state.w.exp_avg": (4, 3)}, {"other": ("other",)})
    error = fails(tmp_path, "lacks a key; FQN 'optimizer.state.w.exp_avg'")
    assert isinstance(error, KeyError)
    with pytest.raises(KeyError):
        torch_load_optimizer({}, KEY, fast_reader(tmp_path))


def test_metadata_that_cannot_be_read_raises_what_the_reader_raises(tmp_path: Path, gloo: None) -> None:
    for load in (torch_load_optimizer, load_fast):
        with pytest.raises(FileNotFoundError):
            load({}, KEY, fast_reader(tmp_path / "nowhere"))


def test_unknown_value_of_like(path: Path) -> None:
    with pytest.raises(ValueError, match="like must be None or \"model\", got 'Model'"):
        load_fast({"w": torch.ones(4, 3)}, KEY, fast_reader(path), like="Model")


@pytest.mark.parametrize("form", [lambda t: t, dtensor, by_rows], ids=["plain", "dtensor", "sharded"])
def test_size_of_a_state_that_differs_from_its_parameters(path: Path, form: Callable[[torch.Tensor], Any]) -> None:
    # A parameter of as many elements will not do either.
    for size in ((4, 4), (3, 4), (12,)):
        error = fails(
            path, "Size mismatch between saved .*4, 3.* and current", {"w": form(torch.ones(size))}, like="model"
        )
        assert "optimizer.state.w.exp_avg" in str(error)


def test_state_without_a_parameter(path: Path) -> None:
    fails(path, "state of 1 parameters that the model's state dict lacks.* 'w'", {"v": torch.ones(4, 3)}, like="model")


def test_state_without_a_parameter_is_left_out_of_a_partial_load(path: Path) -> None:
    planner = dcp_fast.DefaultLoadPlanner(allow_partial_load=True)
    assert "state" not in load_fast({"v": torch.ones(4, 3)}, KEY, fast_reader(path), planner, like="model").get(KEY, {})


def test_state_that_is_not_stored_whole(tmp_path: Path, gloo: None) -> None:
    write_metadata(tmp_path, {"optimizer.state.w.exp_avg": (4, 3)})
    fails(tmp_path, "only 0 of the 12 elements of a state tensor; FQN 'optimizer.state.w.exp_avg'")


def test_parameter_without_state_is_no_error(path: Path) -> None:
    model = {"w": torch.ones(4, 3), "frozen": torch.ones(2)}
    assert load_fast(model, KEY, fast_reader(path), like="model")[KEY]["state"].keys() == {"w"}


def test_state_of_what_is_no_tensor(path: Path) -> None:
    fails(path, "state of a int", {"w": 3}, like="model")


@pytest.mark.parametrize("like", [None, "model"])
def test_nested_dtensor(path: Path, like: Any) -> None:
    nested = dtensor(torch.ones(4, 3))
    nested._local_tensor = dtensor(torch.ones(4, 3))
    fails(path, "nested DTensor; FQN 'w'", {"w": nested}, like=like)
    nested._local_tensor = by_rows(torch.ones(4, 3))
    fails(path, "nested DTensor; FQN 'w'", {"w": nested}, like=like)
    sharded = by_rows(torch.ones(4, 3))
    sharded.local_shards()[0].tensor = dtensor(torch.ones(4, 3))
    error = fails(path, "DTensor nested inside a ShardedTensor; FQN 'w'", {"w": sharded}, like=like)
    with pytest.raises(ValueError, match="DTensor nested inside ShardedTensor") as info:
        torch_load_optimizer({"w": sharded}, KEY, fast_reader(path))
    assert isinstance(error, type(info.value))


def test_several_local_shards_of_a_nested_tensor(path: Path) -> None:
    outer = by_rows(torch.ones(4, 3))
    outer.local_shards()[0].tensor = by_rows(torch.ones(4, 3))
    outer._local_shards = outer.local_shards() * 2
    error = fails(path, "more than one local shard; FQN 'w'", {"w": outer})
    with pytest.raises(AssertionError) as info:
        torch_load_optimizer({"w": outer}, KEY, fast_reader(path))
    assert isinstance(error, type(info.value))


def test_size_of_a_sliced_parameter_that_differs(path: Path) -> None:
    outer = by_rows(torch.ones(5, 3))
    outer.local_shards()[0].tensor = by_rows(torch.ones(5, 3))
    fails(path, "Size mismatch between saved .*4, 3.* and current: .*5, 3", {"w": outer})
    # Nor may a parameter beside one that is sliced differ.
    outer = by_rows(torch.ones(4, 3))
    outer.local_shards()[0].tensor = by_rows(torch.ones(4, 3))
    fails(path, "Size mismatch", {"v": outer, "w": by_rows(torch.ones(5, 3))})


# One failing rank


def expect(action: Callable[[], Any], kind: type[Exception], on: int) -> None:
    """The rank that fails gets its own exception, the others one that has it."""
    start = time.monotonic()
    with pytest.raises((Exception, CheckpointException)) as info:
        action()
    assert time.monotonic() - start < 20
    if dist.get_rank() == on:
        assert type(info.value) is kind
    else:
        assert type(info.value) is CheckpointException
        assert info.value.failures.keys() == {on}
        assert type(info.value.failures[on][0]) is kind


class FailingReader(dcp_fast.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if dist.get_rank() == 2:
            raise OSError("of one rank")
        return super().read_metadata(*args, **kwargs)


class NotPicklableError(Exception):
    """Pickles, but cannot be unpickled."""

    def __init__(self, what: str, where: str) -> None:
        super().__init__(f"{what} at {where}")


class BadlyFailingReader(dcp_fast.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if dist.get_rank() == 1:
            raise NotPicklableError("denied", "bucket")
        return super().read_metadata(*args, **kwargs)


def exception_that_cannot_be_sent(path: Path) -> None:
    with pytest.raises((NotPicklableError, CheckpointException)) as info:
        load_fast({}, KEY, BadlyFailingReader(path / "one"))
    if dist.get_rank() == 1:
        assert type(info.value) is NotPicklableError
    else:
        assert "NotPicklableError('denied at bucket')" in str(info.value)


def reader_fails_on_one_rank(path: Path) -> None:
    expect(lambda: load_fast({}, KEY, FailingReader(path / "one")), OSError, 2)


def model_fails_on_one_rank(path: Path) -> None:
    size = (4, 3) if dist.get_rank() != 1 else (4, 4)
    model = {"w": torch.ones(size)}
    reader = fast_reader(path / "one")
    expect(lambda: load_fast(model, KEY, reader, like="model"), dcp_fast.OptimizerStateError, 1)
    mesh = init_device_mesh("cpu", (4,))
    nested = DTensor.from_local(torch.ones(4, 3), mesh, [Replicate()], run_check=False)
    if dist.get_rank() == 3:
        nested._local_tensor = nested.clone()
    expect(lambda: load_fast({"w": nested}, KEY, reader), dcp_fast.OptimizerStateError, 3)


def argument_fails_on_one_rank(path: Path) -> None:
    like: Any = "nothing" if dist.get_rank() == 0 else None
    expect(lambda: load_fast({}, KEY, fast_reader(path / "one"), like=like), ValueError, 0)


def load_fails_on_one_rank(path: Path) -> None:
    """Once ranks have begun to load it is as in dcp_fast.load."""

    class Planner(dcp_fast.DefaultLoadPlanner):
        def load_bytes(self, read_item: Any, value: Any) -> None:
            if dist.get_rank() == 1:
                raise ZeroDivisionError
            super().load_bytes(read_item, value)

    with pytest.raises(CheckpointException) as info:
        load_fast({}, KEY, fast_reader(path / "one"), Planner())
    assert info.value.failures.keys() == {1}
    assert type(info.value.failures[1][0]) is ZeroDivisionError


def fails_on_every_rank(path: Path) -> None:
    with pytest.raises(dcp_fast.OptimizerStateError, match="no key 'optim'"):
        load_fast({}, "optim", fast_reader(path / "one"))


def works_afterwards(path: Path) -> None:
    loaded = load_fast({}, KEY, fast_reader(path / "one"))
    assert isinstance(loaded[KEY]["state"]["w"]["exp_avg"], ShardedTensor)


def test_a_failure_of_one_rank_reaches_all(ranks: Ranks, tmp_path: Path) -> None:
    save(tmp_path / "one", {KEY: {"state": {"w": {"exp_avg": torch.ones(4, 3)}}, "param_groups": [1]}})
    scenarios = [
        exception_that_cannot_be_sent,
        reader_fails_on_one_rank,
        model_fails_on_one_rank,
        argument_fails_on_one_rank,
    ]
    check(ranks, 4, [*scenarios, load_fails_on_one_rank, fails_on_every_rank, works_afterwards], tmp_path)
