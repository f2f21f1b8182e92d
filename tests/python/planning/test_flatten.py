"""Nested state dicts are flattened as torch's planner flattens them."""

from __future__ import annotations

import random
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties
from torch.distributed.checkpoint import _version
from torch.distributed.checkpoint import default_planner as torch_planner
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.tensor import DTensor, Shard, init_device_mesh

import dcp_fast
from dcp_fast._torch import LocalShard, ShardedTensor, ShardedTensorMetadata
from dcp_fast.planning import planner
from dcp_fast.planning.flatten import containers_of, flatten_at_once

# Bound here so that an installed dcp_fast cannot become its own oracle.
TorchPlanner = torch_planner.DefaultLoadPlanner
METADATA = Metadata({})

# What torch says of where it puts tensors of the meta device.
pytestmark = pytest.mark.filterwarnings("ignore:.*_get_pg_default_device:UserWarning", "ignore:Multiple b:UserWarning")


class TensorWithMore(torch.Tensor):
    pass


def same(ours: Any, theirs: Any) -> bool:
    """Whether two nested values have the same types, the same tensors and equal other leaves, in the same order."""
    if type(ours) is not type(theirs):
        return False
    if isinstance(ours, torch.Tensor):
        # torch makes new tensors of those on the meta device, which have no elements here.
        return ours is theirs or (not ours.is_meta and ours.equal(theirs))
    if isinstance(ours, dict):
        return list(ours) == list(theirs) and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, (list, tuple)):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return bool(ours == theirs)


def set_up(planner: torch_planner.DefaultLoadPlanner, state_dict: dict[str, Any]) -> Any:
    try:
        planner.set_up_planner(state_dict, METADATA, True)
    except Exception as error:
        return type(error), str(error)
    assert planner.original_state_dict is state_dict
    return planner.state_dict, planner.mappings, state_dict, planner.metadata is METADATA, planner.is_coordinator


def assert_same(make: Callable[[], dict[str, Any]], **options: Any) -> bool:
    """Returns whether one walk did."""
    flat = flatten_at_once(make())
    ours, theirs = make(), make()
    lists = [value for value in ours.values() if type(value) is list]
    result = set_up(dcp_fast.DefaultLoadPlanner(**options), ours)
    expected = set_up(TorchPlanner(**options), theirs)
    assert same(result, expected), f"{result}\n{expected}"
    # torch puts copies of lists in their place, so that those who hold a list see no change of it.
    if expected[0] is not ValueError and options.get("flatten_state_dict", True):
        assert not any(value is before for value in ours.values() if type(value) is list for before in lists)
    return flat is not None


TENSORS = [torch.ones(3), torch.nn.Parameter(torch.ones(2, 2)), torch.zeros(()), torch.zeros(0, 4)]


def inert(rng: random.Random) -> Any:
    return rng.choice([None, True, 3, 2.5, "text", b"bytes", (), (1, "a", None)])


def nested(rng: random.Random, depth: int, odd: float, more: list[Any]) -> Any:
    if rng.random() < odd:
        return rng.choice(
            [
                dict,
                list,
                lambda: [{}, torch.ones(1)],
                lambda: (torch.ones(1), 3),
                lambda: ([1], 2),
                lambda: {1: torch.ones(2)},
                lambda: {1: 2, "1": 3},
                lambda: {"a.b": 1, "a": {"b": 2}},
                lambda: {"a": [1, {"c": 1}], "a.1.c": 2},
                lambda: defaultdict(list, {"a": torch.ones(1)}),
                lambda: TensorWithMore(torch.ones(2)),
                lambda: torch.ones(0, 2, device="meta"),
                lambda: {"deep": {"er": {}}},
                lambda: [[1, 2], [3]],
                lambda: [[torch.ones(1)]],
                lambda: object,
                lambda: {3, 4},
            ]
        )()
    kind = rng.random()
    if depth == 0 or kind < 0.4:
        return rng.choice([*TENSORS, *more, inert(rng)])
    size = rng.randrange(1, 5)
    if kind < 0.8:
        cls = rng.choice([dict, dict, OrderedDict])
        return cls((f"k{i}", nested(rng, depth - 1, odd, more)) for i in rng.sample(range(9), size))
    return [nested(rng, depth - 1, odd, more) for _ in range(size)]


@pytest.mark.parametrize("odd", [0.0, 0.1])
def test_random_state_dicts(odd: float, gloo: None) -> None:
    mesh = init_device_mesh("cpu", (1,))
    dtensors = [DTensor.from_local(local, mesh, [Shard(0)], run_check=False) for local in TENSORS[:1]]
    at_once = 0
    for seed in range(600):

        def make(seed: int = seed) -> dict[str, Any]:
            rng = random.Random(seed)
            return {f"top{i}": nested(rng, 4, odd, dtensors) for i in range(rng.randrange(6))}

        options = {"flatten_sharded_tensors": seed % 3 != 0, "flatten_state_dict": seed % 7 != 0}
        at_once += assert_same(make, **options)
    assert at_once > (300 if odd == 0 else 100)


@pytest.mark.parametrize(
    "make",
    [
        lambda: {"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)},
        lambda: {"a.b": torch.ones(1), "a": {"b": torch.ones(1)}},
        lambda: {"a": [torch.ones(1)], "a.0": 1},
        lambda: OrderedDict(a=torch.ones(1)),
        lambda: defaultdict(int, a=torch.ones(1)),
        lambda: {0: torch.ones(1)},
        lambda: {"a": torch.ones(0, 2, device="meta")},
        dict,
    ],
)
def test_what_torch_has_to_do(make: Callable[[], dict[str, Any]]) -> None:
    assert assert_same(make) == (make() == {} and type(make()) is dict)


def sharded(*shards: torch.Tensor) -> ShardedTensor:
    """Of this rank's shards, one below the other."""
    local, begin = [], 0
    for shard in shards:
        local.append(LocalShard(shard, ShardMetadata([begin, 0], list(shard.size()), f"rank:0/{shard.device}")))
        begin += shard.size(0)
    properties = TensorProperties(dtype=torch.float32)
    whole = ShardedTensorMetadata([shard.metadata for shard in local], torch.Size([begin, 2]), properties)
    return ShardedTensor._init_from_local_shards_and_global_metadata(local, whole)


def image(found: Any) -> Any:
    """What was set up: the error; or keys, paths, and of each tensor which memory it has."""
    if isinstance(found[0], type):
        return found
    leaves = []
    for key, value in found[0].items():
        shards = value.local_shards() if isinstance(value, ShardedTensor) else ()
        addresses = [
            shard.tensor if isinstance(shard.tensor, ShardedTensor) else shard.tensor.data_ptr() for shard in shards
        ]
        leaves.append((key, type(value), addresses or id(value)))
    return leaves, found[1]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_sharded_tensors(gloo: None) -> None:
    """Those of plain tensors are leaves. torch leaves out empty ones, and makes one of two that are nested."""
    leaf, empty = sharded(torch.ones(2, 2)), sharded(torch.ones(2, 2))
    empty.local_shards().clear()  # as on a rank past the last row
    cases = {
        "leaf": (leaf, True),
        "several": (sharded(torch.ones(1, 2), torch.zeros(2, 2)), True),
        "parameter": (sharded(torch.nn.Parameter(torch.ones(2, 2), requires_grad=False)), True),
        "empty": (empty, False),
        "nested": (sharded(sharded(torch.ones(2, 2))), False),
        "meta": (sharded(torch.ones(2, 2, device="meta")), False),
    }
    for name, (value, is_leaf) in cases.items():
        state = {"a": {"b": [value, torch.ones(1)]}, "c": value, "n": 3}
        assert (flatten_at_once(state) is not None) == is_leaf, name
        assert (containers_of(state) is not None) == (is_leaf or name == "meta"), name
        for flattens in (True, False):
            ours = set_up(dcp_fast.DefaultLoadPlanner(flatten_sharded_tensors=flattens), dict(state))
            theirs = set_up(TorchPlanner(flatten_sharded_tensors=flattens), dict(state))
            assert image(ours) == image(theirs), name
    assert flatten_at_once({"a": {"b": leaf}}) == ({"a.b": leaf}, {"a.b": ("a", "b")})


def test_lists_of_an_optimizer() -> None:
    """Parameter groups are walked through at once, and their lists of parameters are leaves."""

    def make() -> dict[str, Any]:
        groups = [{"lr": 0.1, "betas": (0.9, 0.99), "params": ["w", "b"]}, {"lr": 0.2, "params": []}]
        return {"optim": {"state": {"w": {"step": torch.ones(())}}, "param_groups": groups}}

    assert assert_same(make)
    flat, paths = flatten_at_once(make()) or ({}, {})
    assert flat["optim.param_groups.0.params"] == ["w", "b"]
    assert paths["optim.param_groups.1.lr"] == ("optim", "param_groups", 1, "lr")


@pytest.mark.parametrize("odd", [0.0, 0.1])
def test_keys_of_old_checkpoints_are_those_of_containers(odd: float) -> None:
    """Before torch 2.4 containers without tensors were leaves. All other keys are the same."""
    told = old_only = 0
    for seed in range(600):
        rng = random.Random(seed)
        state = {f"top{i}": nested(rng, 4, odd, []) for i in range(rng.randrange(6))}
        containers = containers_of(state)
        if containers is None:
            continue
        try:
            new, _ = flatten_state_dict(state)
            with mock.patch.object(_version, "_derived_version", "2_3"):
                old, _ = flatten_state_dict(state)
        except ValueError:  # keys that clash
            continue
        assert old.keys() - new.keys() <= containers
        told += 1
        old_only += bool(old.keys() - new.keys())
    assert told > (500 if odd == 0 else 200)
    assert old_only > (100 if odd == 0 else 20)


def test_a_part_of_a_checkpoint_is_flattened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = {"model": {"w": torch.ones(3), "list": [torch.ones(1)]}, "optimizer": {"step": 1, "m": torch.ones(3)}}
    dcp.save(saved, checkpoint_id=tmp_path)

    def refuse(*_: Any) -> None:
        raise AssertionError("torch was asked to flatten")

    monkeypatch.setattr(planner, "flatten_state_dict", refuse)
    state = {"model": {"w": torch.zeros(3), "list": [torch.zeros(1)]}}
    dcp_fast.load(state, checkpoint_id=tmp_path)
    assert state["model"]["w"].equal(saved["model"]["w"])
    assert state["model"]["list"][0].equal(torch.ones(1))


def test_deep_state_dicts_are_left_to_torch() -> None:
    def nested_dicts(levels: int) -> dict[str, Any]:
        state: dict[str, Any] = {"w": 1}
        for _ in range(levels):
            state = {"a": state}
        return state

    assert flatten_at_once(nested_dicts(200)) is not None
    assert flatten_at_once(nested_dicts(100_000)) is None
    assert containers_of(nested_dicts(100_000)) is None
