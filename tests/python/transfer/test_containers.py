"""Differential tests: nested state dicts, Stateful objects, bytes entries, keys that differ."""

from __future__ import annotations

import collections
import datetime
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import assert_same_load, fast_reader, fill, image, load_with, save, torch_load, torch_reader

import dcp_fast

FLOAT = torch.float32


class Custom:
    def __init__(self, value: Any) -> None:
        self.value = value


VALUES: dict[str, Any] = {
    "int": 7,
    "float": 0.1,
    "string": "text",
    "none": None,
    "bytes": b"\0\1",
    "tuple": (1, "b", (2.0,)),
    "set": {3, 4},
    "object": Custom([1, 2]),
    "date": datetime.date(2026, 1, 2),
    "tensors_in_tuple": (torch.arange(3), torch.ones(2)),
    "list_of_numbers": [1, 2, 3],
    "rng": torch.get_rng_state(),
    "stream": io.BytesIO(b"raw"),
    "dtype": torch.bfloat16,
}


def other_values() -> dict[str, Any]:
    values: dict[str, Any] = dict.fromkeys(VALUES, 0)
    values["rng"] = torch.zeros_like(VALUES["rng"])
    return values


def test_values_that_are_pickled(tmp_path: Path) -> None:
    save(tmp_path, dict(VALUES))
    with torch.serialization.safe_globals([Custom, datetime.date, io.BytesIO]):
        outcome = assert_same_load(tmp_path, other_values)
    assert image(outcome.state["object"]) == image(VALUES["object"])
    report = dcp_fast.last_report()
    assert report is not None
    assert report.bytes_needed >= VALUES["rng"].nbytes


def test_nested_containers(tmp_path: Path) -> None:
    def make(factor: int) -> dict[str, Any]:
        number = iter(range(100))

        def tensor(*sizes: int) -> torch.Tensor:
            return fill(sizes, FLOAT, next(number)) if factor else torch.zeros(sizes)

        return {
            "a": {"b": {"c": tensor(3, 2), "d": 1 * factor}, "e": [tensor(2), [tensor(1), {"f": tensor(4)}]]},
            "ordered": collections.OrderedDict(x=tensor(2), y=collections.OrderedDict(z=factor * 5)),
            "numbers": [factor, 2 * factor],
            "mixed": [tensor(2), factor, "s" * factor],
            "tuple": (factor, 2),
            "empty_dict": {},
            "empty_list": [],
            "int_keys": {0: tensor(2), 1: {"state": tensor(3)}},
            "dotted.key": tensor(2),
        }

    save(tmp_path, make(1))
    assert_same_load(tmp_path, lambda: make(0))


def test_duplicate_flattened_key(tmp_path: Path) -> None:
    save(tmp_path, {"a.b": fill((2,), FLOAT)})
    assert_same_load(tmp_path, lambda: {"a.b": torch.zeros(2), "a": {"b": torch.zeros(2)}}, raises=ValueError)


def test_modules_and_optimizers(tmp_path: Path) -> None:
    def make(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * seed)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        for _ in range(seed):
            model(torch.randn(3, 5)).sum().backward()
            optimizer.step()
            scheduler.step()
        return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "step": seed}

    save(tmp_path, make(3))
    states = []
    for load, reader in ((torch_load, torch_reader), (dcp_fast.load, fast_reader)):
        state = make(1)
        assert load_with(load, state, storage_reader=reader(tmp_path)).errors is None
        states.append({k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in state.items()})
    assert image(states[1]) == image(states[0])
    wanted = {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in make(3).items()}
    assert image(states[1]["model"]) == image(wanted["model"])


class Counter:
    """A Stateful object whose state is a new tensor each time."""

    def __init__(self) -> None:
        self.loaded: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {"t": torch.zeros(3), "n": 0, "same": torch.ones(2).requires_grad_()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loaded = state_dict


def test_stateful_object(tmp_path: Path) -> None:
    save(tmp_path, {"c": {"t": fill((3,), FLOAT), "n": 5, "same": fill((2,), FLOAT, 1)}})
    outcome = assert_same_load(tmp_path, lambda: {"c": Counter()})
    assert outcome.state["c"].loaded["n"] == 5


# Keys and kinds that differ


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    return save(tmp_path / "ckpt", {"t": fill((3, 2), FLOAT), "u": fill((4,), FLOAT, 1), "n": 5, "d": {"x": 1}})


@pytest.mark.parametrize("key", ["t", "u", "n", "d"])
def test_subset_of_the_checkpoint(stored: Path, key: str) -> None:
    state = {"t": torch.zeros(3, 2), "u": torch.zeros(4), "n": 0, "d": {"x": 0}}
    values = [{key: state[key]}, {key: state[key].clone() if isinstance(state[key], torch.Tensor) else state[key]}]
    if key == "d":
        values = [{"d": {"x": 0}}, {"d": {"x": 0}}]
    assert_same_load(stored, lambda: values.pop())


MISMATCHES: dict[str, tuple[dict[str, Any], type[Exception]]] = {
    "missing tensor": ({"t": torch.zeros(3, 2), "missing": torch.zeros(1)}, RuntimeError),
    "missing value": ({"missing": 1}, RuntimeError),
    "missing nested": ({"d": {"x": 0, "y": 0}}, RuntimeError),
    "size": ({"t": torch.zeros(2, 3)}, ValueError),
    "dimensions": ({"t": torch.zeros(6)}, ValueError),
    "scalar for tensor": ({"t": torch.zeros(())}, ValueError),
    "value for tensor": ({"t": 5}, ValueError),
    "none for tensor": ({"t": None}, ValueError),
    "string for tensor": ({"t": "x"}, ValueError),
}


@pytest.mark.parametrize("case", MISMATCHES)
@pytest.mark.parametrize("flatten", [True, False])
def test_mismatch(stored: Path, case: str, flatten: bool) -> None:
    state, error = MISMATCHES[case]
    if case == "missing nested" and not flatten:
        error = RuntimeError
    for planner in (dcp.DefaultLoadPlanner, dcp_fast.DefaultLoadPlanner):
        assert_same_load(
            stored,
            lambda: dict(state),
            planner=lambda planner=planner: planner(flatten_state_dict=flatten),
            raises=error,
        )


def test_messages_of_mismatches(stored: Path) -> None:
    for state, error in MISMATCHES.values():
        outcomes = [
            load_with(load, dict(state), storage_reader=reader(stored))
            for load, reader in ((torch_load, torch_reader), (dcp_fast.load, fast_reader))
        ]
        messages = [str(outcome.errors[0]) for outcome in outcomes if outcome.errors]
        assert len(messages) == 2
        assert messages[1] == messages[0]
        assert isinstance(outcomes[1].errors and outcomes[1].errors[0], error)


def test_tensor_where_a_value_is_stored(stored: Path) -> None:
    assert_same_load(stored, lambda: {"n": torch.zeros(3)})


@pytest.mark.parametrize("planner", [dcp.DefaultLoadPlanner, dcp_fast.DefaultLoadPlanner])
def test_partial_load(stored: Path, planner: Any) -> None:
    make = lambda: {"t": torch.zeros(3, 2), "missing": torch.ones(2), "d": {"x": 0, "y": 8}, "z": "kept"}  # noqa: E731
    outcome = assert_same_load(stored, make, planner=lambda: planner(allow_partial_load=True))
    assert outcome.state["z"] == "kept"
    assert_same_load(stored, make, planner=planner, raises=RuntimeError)


def test_partial_load_of_nothing(stored: Path) -> None:
    make = lambda: {"missing": torch.ones(2)}  # noqa: E731
    assert_same_load(stored, make, planner=lambda: dcp.DefaultLoadPlanner(allow_partial_load=True), changes=False)
    assert_same_load(stored, dict, changes=False)


def test_key_that_is_not_a_string(tmp_path: Path) -> None:
    save(tmp_path, {"0": fill((2,), FLOAT), "state": {0: fill((2,), FLOAT, 1)}})
    assert_same_load(tmp_path, lambda: {"0": torch.zeros(2), "state": {0: torch.zeros(2)}})


def test_no_dist_with_a_process_group(tmp_path: Path, gloo: None) -> None:
    save(tmp_path / "ckpt", {"t": fill((3,), FLOAT)})
    assert_same_load(tmp_path / "ckpt", lambda: {"t": torch.zeros(3)}, no_dist=True)
    assert_same_load(tmp_path / "ckpt", lambda: {"t": torch.zeros(3)}, no_dist=False)
