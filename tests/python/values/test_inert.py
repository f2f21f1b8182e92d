"""Values of inert types load by default, as ``torch.load(weights_only=False)`` makes them, whatever wrote them."""

from __future__ import annotations

import codecs
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

from dcp_fast.values.inert import CALLS
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


NUMPYS = [
    numpy._core.multiarray._reconstruct,
    numpy._core.multiarray.scalar,
    numpy._core.numeric._frombuffer,
    numpy.ndarray,
    numpy.dtype,
    *(each for name, each in vars(numpy.dtypes).items() if name.endswith("DType")),
]
TORCHS = [
    torch.Tensor,
    torch.nn.Parameter,
    torch.Size,
    torch._utils._rebuild_tensor_v2,
    torch._utils._rebuild_parameter,
]
PYTHONS = list({id(cls): cls for cls, _ in CALLS.values()}.values())
# As accelerate, for one, allows it.
OF_FRAMEWORKS = [*NUMPYS[:1], numpy.ndarray, numpy.dtype, codecs.encode, type(numpy.dtype(numpy.uint32))]
ALLOWED = [*([each] for each in (*NUMPYS, *TORCHS, *PYTHONS)), OF_FRAMEWORKS, NUMPYS, [*NUMPYS, *TORCHS, *PYTHONS]]


@pytest.mark.parametrize("allowed", ALLOWED, ids=lambda each: each[0].__name__ if len(each) == 1 else str(len(each)))
def test_what_is_allowed_takes_nothing_away(allowed: list[Any]) -> None:
    for name, value in INERT.items():
        for protocol in (2, 5):
            data = record(value, protocol)
            expected = facts(load(data))
            with torch.serialization.safe_globals(allowed):
                assert facts(load(data)) == expected, name


@pytest.mark.parametrize(("name", "protocol"), NUMPY_1)
@pytest.mark.parametrize("allowed", [OF_FRAMEWORKS, NUMPYS], ids=["a few", "all"])
def test_what_is_allowed_takes_nothing_of_numpy_1_away(name: str, protocol: int, allowed: list[Any]) -> None:
    with torch.serialization.safe_globals(allowed):
        assert facts(load(archive(NUMPY_1[name, protocol]))) == facts(pickle.loads(NUMPY_1[name, protocol]))


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
    loaded = load(archive(pickled))
    assert facts(loaded) == facts(pickle.loads(pickled))
    if name in OF_NUMPY_1:
        assert facts(loaded) == facts(OF_NUMPY_1[name])


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
        # What has its state may be a part of others.
        within = load(record(slice(numpy.array([1, "a"], dtype=object), None)))
        assert within.start.tolist() == [1, "a"]


def test_pickle_of_a_module_that_is_not_there() -> None:
    """Nothing is imported to find out."""
    pickled = pickle.dumps(1, 2)[:2] + b"cno.such.module\nThing\n)R."
    with pytest.raises(pickle.UnpicklingError, match=r"no\.such\.module\.Thing"):
        load(archive(pickled))
