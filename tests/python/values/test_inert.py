"""Values of inert types load by default, as ``torch.load(weights_only=False)`` makes them, whatever wrote them."""

from __future__ import annotations

import enum
import io
import pathlib
import pickle
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from damage import archive, fast_error
from helpers import Entry, write_checkpoint
from inert_values import INERT, facts, record
from numpy_1_pickles import NUMPY_1

from dcp_fast.values.load import load_untrusted


def load(data: bytes) -> Any:
    return load_untrusted(io.BytesIO(data), "value")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", INERT)
def test_as_torch_loads_it(name: str, protocol: int, legacy: bool) -> None:
    data = record(INERT[name], protocol, legacy)
    expected = torch.load(io.BytesIO(data), weights_only=False)
    assert type(expected) is type(INERT[name])
    assert facts(load(data)) == facts(expected)


@pytest.mark.parametrize("name", INERT)
def test_in_a_checkpoint(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path, {"value": Entry(value=(INERT[name],))})
    state: dict[str, Any] = {"value": None}
    assert fast_error(tmp_path, state) is None
    (entry,) = state["value"]
    assert facts(entry) == facts(torch.load(io.BytesIO(record(INERT[name])), weights_only=False))


def test_what_is_shared_is_shared() -> None:
    array, holder = load(record(INERT["shared"]))
    assert holder["again"] is array


OF_NUMPY_1: dict[str, Any] = {
    "array": numpy.arange(6, dtype=numpy.int32).reshape(2, 3),
    "columns": numpy.asfortranarray(numpy.ones((2, 3))),
    "scalar": numpy.float64(1.5),
    "rng": ("MT19937", numpy.array([1, 1812433254, 3713160357], numpy.uint32), 624, 0, 0.0),
    "time": numpy.array(["2026-01-01"], "M8[ns]"),
    "text": numpy.array(["ab", "c"]),
}


@pytest.mark.parametrize(("name", "protocol"), NUMPY_1)
def test_written_by_numpy_1(name: str, protocol: int) -> None:
    pickled = NUMPY_1[name, protocol]
    assert b"numpy.core" in pickled
    assert facts(load(archive(pickled))) == facts(OF_NUMPY_1[name])


@pytest.mark.parametrize("name", ["PosixPath", "PurePosixPath", "PureWindowsPath"])
@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_path_of_another_python(module: str, name: str) -> None:
    """Python 3.13 has another name for the module."""
    pickled = f"\x80\x02c{module}\n{name}\nX\x01\0\0\0aX\x01\0\0\0b\x86R.".encode("latin1")
    loaded = load(archive(pickled))
    assert loaded == getattr(pathlib, name)("a", "b")
    assert type(loaded) is getattr(pathlib, name)


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_path_that_only_windows_can_make(module: str) -> None:
    pickled = f"\x80\x02c{module}\nWindowsPath\nX\x03\0\0\0c:\\X\x01\0\0\0b\x86R.".encode("latin1")
    loaded = load(archive(pickled))
    assert loaded == pathlib.PureWindowsPath("c:\\b")


class Phase(enum.Enum):
    WARM_UP = 1

    def __reduce_ex__(self, protocol: Any) -> Any:
        return getattr, (Phase, "WARM_UP")  # as Python 3.11.0 did


def test_enum_by_the_name_of_its_member() -> None:
    with torch.serialization.safe_globals([Phase]):
        assert load(record(Phase.WARM_UP)) is Phase.WARM_UP


def test_state_of_a_random_generator_can_be_set() -> None:
    generator = numpy.random.RandomState(5)
    loaded = load(record(generator.get_state()))
    expected = generator.random_sample(3).tolist()
    other = numpy.random.RandomState(6)
    other.set_state(loaded)
    assert other.random_sample(3).tolist() == expected


def test_arrays_of_python_objects_if_they_are_allowed() -> None:
    data = record(numpy.array([1, "a"], dtype=object))
    reconstruct = numpy._core.multiarray._reconstruct
    with torch.serialization.safe_globals([reconstruct, numpy.ndarray, numpy.dtype, numpy.dtypes.ObjectDType]):
        assert load(data).tolist() == [1, "a"]


def test_pickle_of_a_module_that_is_not_there() -> None:
    """Nothing is imported to find out."""
    pickled = pickle.dumps(1, 2)[:2] + b"cno.such.module\nThing\n)R."
    with pytest.raises(pickle.UnpicklingError, match=r"no\.such\.module\.Thing"):
        load(archive(pickled))
