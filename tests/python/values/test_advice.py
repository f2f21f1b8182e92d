"""What the error of a refused bytes entry says to do about it."""

from __future__ import annotations

import collections
import datetime
import enum
import functools
import io
import ipaddress
import os
import pickle
import sys
import zoneinfo
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.distributed.checkpoint as dcp
from damage import Call, archive
from hostile_pickles import refused, text
from inert_values import record
from torch.distributed.checkpoint.api import CheckpointException

import dcp_fast
from dcp_fast.errors import LoadError, UntrustedBytesError
from dcp_fast.values.load import load_untrusted


def load(data: bytes) -> Any:
    return load_untrusted(io.BytesIO(data), "value")


def test_all_that_is_missing_is_named_at_once() -> None:
    class Local:
        pass

    value = [Call(os.getpid), Call(pickle.PicklingError, "a"), Call(bytearray, 5)]
    error = refused(archive(pickle.dumps(value[1:], 4)))
    assert "pickle.PicklingError" in error.reason
    error = refused(archive(pickle.dumps([Call(collections.UserDict), Call(collections.ChainMap)], 4)))
    for name in ("collections.UserDict", "collections.ChainMap", "install(trust_bytes=True)"):
        assert name in error.reason
    assert "add_safe_globals([collections.UserDict, collections.ChainMap])" in error.reason


class Zone(datetime.tzinfo):
    """Of a user, as many programs have one."""

    def utcoffset(self, moment: datetime.datetime | None) -> datetime.timedelta:
        return datetime.timedelta(hours=1)

    def __eq__(self, other: object) -> bool:
        return type(other) is Zone

    def __hash__(self) -> int:
        return 1


def test_what_is_allowed_may_do_its_work_within_inert_values() -> None:
    """All that an error says to allow is enough."""
    nested = collections.defaultdict(functools.partial(collections.defaultdict, int), {"a": {"b": 1}})
    moment = datetime.datetime(2026, 1, 1, tzinfo=Zone())
    for value, cls in ((nested, functools.partial), (moment, Zone), (moment.timetz(), Zone)):
        error = refused(record(value))
        assert error.safe_globals == (f"{cls.__module__}.{cls.__qualname__}",)
        with torch.serialization.safe_globals([cls]):
            loaded = load(record(value))
        assert loaded == value
        assert type(loaded) is type(value)
    assert load_nested(nested)["new"]["one"] == 0


def load_nested(value: Any) -> Any:
    with torch.serialization.safe_globals([functools.partial]):
        return load(record(value))


def test_names_that_need_pairs_are_given_as_pairs() -> None:
    """torch goes by the name that an object has for itself."""
    pickled = b"\x80\x02cnumpy.core.multiarray\nfrombuffer\n)R."
    error = refused(archive(pickled))
    assert '(numpy.frombuffer, "numpy.core.multiarray.frombuffer")' in error.reason
    advice = error.reason.partition("add_safe_globals([")[2].partition("])")[0]
    with torch.serialization.safe_globals([eval(advice, {"numpy": numpy})]):
        with pytest.raises(LoadError) as caught:
            load_untrusted(io.BytesIO(archive(pickled)), "value")
        assert "frombuffer() missing" in str(caught.value)  # it was called


def test_advice_for_arrays_of_objects_works() -> None:
    data = record(numpy.array([1, "a"], dtype=object))
    error = refused(data)
    advice = error.reason.partition("add_safe_globals([")[2].partition("])")[0]
    with torch.serialization.safe_globals(list(eval(f"({advice},)", {"numpy": numpy}))):
        assert load(data).tolist() == [1, "a"]


class Grid(numpy.ndarray):
    """An array of a class of its own."""


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (numpy.arange(3).view(Grid), "an array of a class of its own is made only of what is trusted"),
        (numpy.arange(4).reshape(2, 2).view(numpy.matrix), "an array of a class of its own is made only of"),
        (numpy.arange(3).view(numpy.recarray), "an array of a class of its own"),
        (zoneinfo.ZoneInfo("UTC"), "getattr of other than an enum is called only for what is trusted"),
        (datetime.datetime(2026, 1, 1, tzinfo=zoneinfo.ZoneInfo("UTC")), "getattr of other than an enum"),
    ],
    ids=["subclass", "matrix", "recarray", "ZoneInfo", "datetime with ZoneInfo"],
)
def test_what_only_trust_loads_is_told_so(value: Any, reason: str, protocol: int, legacy: bool) -> None:
    data = record(value, protocol, legacy)
    error = refused(data)
    assert isinstance(error, UntrustedBytesError)
    assert reason in error.reason
    assert "trust_bytes=True" in error.reason
    assert "add_safe_globals" not in error.reason
    with torch.serialization.safe_globals([Grid, numpy.matrix, numpy.recarray, zoneinfo.ZoneInfo]):
        refused(data)  # so that the advice would have been in vain


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("legacy", [False, True])
def test_advice_for_random_states_works(protocol: int, legacy: bool) -> None:
    """A function makes them, and their state is set afterwards: that asks for the class, which no opcode names."""
    value = numpy.random.RandomState(3)
    data = record([value, NotImplemented], protocol, legacy)
    advice = refused(data).reason.partition("add_safe_globals([")[2].partition("])")[0]
    with torch.serialization.safe_globals(list(eval(f"({advice},)", {"numpy": numpy}))):
        assert load(data)[0].randint(1 << 30) == value.randint(1 << 30)


def test_advice_for_masked_arrays_works() -> None:
    """Their own function makes them, beside one of numpy's for plain arrays."""
    value = [numpy.ma.masked_array([1, 2], [True, False]), numpy.arange(2)]
    data = record(value)
    advice = refused(data).reason.partition("add_safe_globals([")[2].partition("])")[0]
    with torch.serialization.safe_globals(list(eval(f"({advice},)", {"numpy": numpy}))):
        assert repr(load(data)) == repr(value)


class Phase(enum.Enum):
    WARM_UP = 1


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize(
    "value",
    [
        numpy.array([(1, None)], [("a", "i4"), ("b", "O")]),
        numpy.array([(1, (None,))], [("a", "i4"), ("b", [("c", "O")])]),
        numpy.array(["a", "bb"], numpy.dtypes.StringDType()),
        [Phase.WARM_UP, numpy.array([1, "a"], object)],
    ],
    ids=["structure with objects", "structure within", "StringDType", "beside another"],
)
def test_one_message_names_all(value: Any, protocol: int) -> None:
    data = record(value, protocol)
    advice = refused(data).reason.partition("add_safe_globals([")[2].partition("])")[0]
    with torch.serialization.safe_globals(
        list(eval(f"({advice},)", {"numpy": numpy, __name__: sys.modules[__name__]}))
    ):
        assert repr(load(data)) == repr(torch.load(io.BytesIO(data), weights_only=False))


# As NumPy 1 wrote it: the state is set afterwards.
GENERATOR_OF_NUMPY_1 = (
    b"\x80\x02cnumpy.random._pickle\n__generator_ctor\nX\x05\0\0\0PCG64cnumpy.random._pickle\n__bit_generator_ctor\n\x86R"
    b"}(X\x0d\0\0\0bit_generatorX\x05\0\0\0PCG64X\x05\0\0\0state}(X\x05\0\0\0stateK\x05X\x03\0\0\0incK\x07u"
    b"X\x0a\0\0\0has_uint32K\0X\x08\0\0\0uintegerK\0ub."
)


def test_advice_for_a_generator_of_numpy_1_works() -> None:
    data = archive(GENERATOR_OF_NUMPY_1)
    advice = refused(data).reason.partition("add_safe_globals([")[2].partition("])")[0]
    with torch.serialization.safe_globals(list(eval(f"({advice},)", {"numpy": numpy}))):
        assert load(data).bit_generator.state["state"] == {"state": 5, "inc": 7}


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os_", "x]) or __import__('os').system('echo PWNED') or ([0"),
        ("a\x1b[2J\n\nERROR all fine", "x"),
        ("a", "b c"),
        ("a", "lambda"),
        ("a", "b\N{LATIN SMALL LETTER LONG S}"),  # which Python takes for an s
        ("a", "b" * 500_000),
        ("a." * 500_000, "b"),
    ],
    ids=["code", "escapes", "space", "keyword", "another letter", "long", "many parts"],
)
def test_what_is_no_name_becomes_no_code(module: str, name: str) -> None:
    error = refused(archive(b"\x80\x04" + text(module) + text(name) + b"\x93."))
    assert isinstance(error, UntrustedBytesError)
    assert error.safe_globals == ()
    assert "add_safe_globals" not in error.reason
    assert "trust_bytes=True" in error.reason
    assert error.reason.isprintable()
    assert len(error.reason) < 1000
    full_name = f"{module}.{name}"
    assert repr(full_name) in error.reason or repr(full_name[:200]) in error.reason


def test_damage_is_told_without_what_somebody_put_there() -> None:
    with pytest.raises(LoadError) as caught:
        load(archive(b"\x80\x04" + text("a\x1b[2J" + "b" * 500_000) + text("x") + b"\x93"))
    assert "\x1b" not in caught.value.reason
    assert len(caught.value.reason) < 5000


def test_very_many_names_are_counted() -> None:
    names = b"".join(f"cmodule{i}\nname\n".encode() for i in range(20_000))
    error = refused(archive(b"\x80\x02(" + names + b"t."))
    assert isinstance(error, UntrustedBytesError)
    assert "module29.name and 19970 more" in error.reason
    assert "add_safe_globals" not in error.reason
    assert "trust_bytes=True" in error.reason
    assert len(error.reason) < 2000


def test_no_advice_that_a_variable_of_torch_forbids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    error = refused(record([collections.UserDict()]))
    assert "add_safe_globals([collections.UserDict]) allows it" in error.reason
    assert "trust_bytes" not in error.reason
    error = refused(record(zoneinfo.ZoneInfo("UTC")))
    assert "trust_bytes" not in error.reason
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD is set" in error.reason


@pytest.mark.parametrize("protocol", [2, 4])
def test_advice_for_what_has_no_name_of_its_own_works(protocol: int) -> None:
    data = record([NotImplemented], protocol)
    advice = refused(data).reason.partition("add_safe_globals([")[2].partition("])")[0]
    with torch.serialization.safe_globals([eval(advice)]):
        assert load(data) == [NotImplemented]


def test_all_entries_that_are_refused_are_told_at_once(tmp_path: Path) -> None:
    stored = {
        "a": (collections.UserDict(),),
        "b": 5,
        "c": (collections.ChainMap(),),
        "d": torch.arange(3),
        "e": (ipaddress.IPv4Address(7),),
        **{f"f{i}": (collections.UserDict(a=i),) for i in range(9)},
    }
    dcp.save(stored, checkpoint_id=tmp_path, no_dist=True)

    def load_it() -> str:
        with pytest.raises(CheckpointException) as caught:
            dcp_fast.load(dict.fromkeys(stored, 0) | {"d": torch.zeros(3)}, checkpoint_id=tmp_path, no_dist=True)
        (error,) = (failure[0] for failure in caught.value.failures.values())
        assert isinstance(error, UntrustedBytesError)
        assert error.fqn == "a"
        return error.reason

    reason = load_it()
    assert reason.count("add_safe_globals") == reason.count("install(trust_bytes=True)") == 1
    assert "other entries are refused as well ('c', 'e', 'f0', 'f1', 'f2' and 6 more)" in reason
    advice = reason.rpartition("add_safe_globals([")[2].partition("])")[0]
    allowed = list(eval(f"({advice},)", {"collections": collections, "ipaddress": ipaddress}))
    assert len(allowed) == 3
    with torch.serialization.safe_globals(allowed):
        loaded = dict.fromkeys(stored, 0) | {"d": torch.zeros(3, dtype=torch.int64)}
        dcp_fast.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(loaded.pop("d"), stored.pop("d"))  # type: ignore[arg-type]
    assert loaded == stored
