"""Values that training jobs keep beside tensors, and what tells whether two are the same."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import enum
import fractions
import io
import pathlib
import random
import types
import uuid
from typing import Any

import numpy
import torch
from helpers import image

__all__ = ["INERT", "facts", "record"]


def _buffer(position: int) -> io.BytesIO:
    buffer = io.BytesIO(b"abc")
    buffer.seek(position)
    return buffer


def _attributed() -> Any:
    value = collections.OrderedDict(a=1)
    value.note = "kept"  # type: ignore[attr-defined]
    return value


INERT: dict[str, Any] = {
    "numpy scalars": [numpy.float64(1.5), numpy.int8(-3), numpy.bool_(True), numpy.complex64(1j), numpy.float16(2)],
    "numpy text": [numpy.str_("ab"), numpy.bytes_(b"ab"), numpy.array(["a", "bcd"]), numpy.array([b"a", b"bcd"])],
    "numpy times": [numpy.datetime64("2026-01-01", "us"), numpy.timedelta64(3, "s"), numpy.array(["2026"], "M8[D]")],
    "numpy array": numpy.arange(6, dtype=numpy.int32).reshape(2, 3),
    "numpy array by columns": numpy.asfortranarray(numpy.ones((2, 3))),
    "numpy array, transposed": numpy.arange(6).reshape(2, 3).T,
    "numpy array of another byte order": numpy.arange(3, dtype=">i4"),
    "numpy array without dimensions": numpy.array(1.5),
    "numpy array without elements": numpy.zeros((0, 5)),
    "numpy array, large": numpy.arange(5000.0),
    "numpy dtype": numpy.dtype("float32"),
    "numpy array of fields": [
        numpy.array([(1, 2.5), (3, 4.5)], [("a", "<i4"), ("b", ">f8")]),
        numpy.zeros((2, 2), [("rows", "f4", (2, 3)), ("inner", [("x", "M8[s]"), ("y", "S3")])]),
        numpy.zeros(3, numpy.dtype([("a", "i1"), ("b", "f8")], align=True)),
        numpy.zeros(2, {"names": ["b", "a"], "formats": ["f4", "i2"], "offsets": [8, 0], "itemsize": 16}),
        numpy.array((1, 2), [("a", "i2"), ("b", "u1")])[()],
        numpy.dtype([("a", "f4", (2, 2))]),
        numpy.dtype([]),
        numpy.dtype("V5"),
    ],
    "numpy dtype with metadata": [
        numpy.zeros(1, numpy.dtype("i1", metadata={"enum": {"a": 1}})),
        numpy.dtype("M8[s]", metadata={"note": "x"}),
        numpy.dtype([("a", "f4")], metadata={"note": [1]}),
        numpy.dtype("S3", metadata={}),
    ],
    "numpy array with titles": [
        numpy.array([(1, 2)], [(("title", "a"), "i4"), ("b", "i4")]),
        numpy.zeros(2, [(("first", "a"), "S2"), (("second", "b"), [(("third", "c"), "f8")])]),
    ],
    "numpy values without bytes": [
        numpy.str_(""),
        numpy.bytes_(b""),
        *(numpy.zeros(shape, name) for shape in (0, 2, (2, 3)) for name in ("U0", "S0", "V0")),
        *(numpy.empty(0, numpy.dtype(name)).view() for name in ("U0", "S0")),
        numpy.zeros(2, []),
        numpy.zeros((), [])[()],
        numpy.zeros(1, "V0")[0],
        numpy.zeros(2, [("a", "V0"), ("b", "i2")]),
        numpy.dtype("U0"),
    ],
    "numpy RandomState": numpy.random.RandomState(1).get_state(),
    "numpy Generator": numpy.random.default_rng(2).bit_generator.state,
    "random": random.Random(3).getstate(),
    "BytesIO": [_buffer(0), _buffer(2), io.BytesIO()],
    "datetime": datetime.datetime(2026, 1, 2, 3, 4, 5, 6, fold=1),
    "datetime with zone": datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc),
    "date": datetime.date(2026, 1, 2),
    "time": [datetime.time(1, 2), datetime.time(1, 2, tzinfo=datetime.timezone(datetime.timedelta(hours=1)))],
    "timedelta": datetime.timedelta(-1, 2, 3),
    "timezone": [datetime.timezone.utc, datetime.timezone(datetime.timedelta(hours=1), "name")],
    "Path": [pathlib.Path("a/b"), pathlib.PurePosixPath("/"), pathlib.PureWindowsPath("c:/x"), pathlib.Path()],
    "deque": [collections.deque([1, [2]], maxlen=4), collections.deque()],
    "defaultdict": [collections.defaultdict(list, {"x": [1]}), collections.defaultdict(None, a=1)],
    "defaultdict of int": collections.defaultdict(int, {(1, "a"): 2}),
    "Counter": collections.Counter("aab"),
    "OrderedDict": [collections.OrderedDict(b=1, a=2), _attributed()],
    "Decimal": [
        decimal.Decimal("1.25"),
        decimal.Decimal("-Infinity"),
        decimal.Decimal("NaN"),
        decimal.Decimal("1E+99"),
    ],
    "Fraction": [fractions.Fraction(1, 3), fractions.Fraction(-(10**40), 7)],
    "UUID": [uuid.UUID(int=7), uuid.UUID(int=8, is_safe=uuid.SafeUUID.safe)],
    "SimpleNamespace": types.SimpleNamespace(lr=0.1, inner=types.SimpleNamespace()),
    "Namespace": argparse.Namespace(lr=0.1, betas=(0.9, 0.99)),
    "range": [range(3), range(10**30, 0, -2)],
    "slice": [slice(1, 2), slice(None), slice("a", None, [1])],
    "complex": 1 + 2j,
    "Ellipsis": ...,
    "bytearray": [bytearray(b"\0\xff"), bytearray()],
    "bytes": [b"", b"\xff" * 300],
    "set": [{1, "a"}, set()],
    "frozenset": frozenset([1, (2, 3)]),
    "large int": [1 << 3000, -(1 << 3000)],
    "shared": (lambda array: [array, {"again": array}])(numpy.arange(3)),
    "tensors": [torch.arange(4), torch.nn.Parameter(torch.ones(2)), torch.eye(3).to_sparse(), torch.ones(2, 3).t()],
    "quantized tensor": [torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)],
}


def record(value: Any, protocol: int = 2, legacy: bool = False) -> bytes:
    """What torch.save writes."""
    stream = io.BytesIO()
    torch.save(value, stream, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


def facts(value: Any) -> Any:
    """Equal to those of another value only if both are of the same type and hold the same."""
    if isinstance(value, numpy.ndarray):
        layout = (facts(value.dtype), value.shape, value.strides)
        return (layout, value.flags.writeable, value.tobytes())
    if isinstance(value, numpy.dtype):
        return (repr(value), value.isalignedstruct, value.flags, facts(dict(value.metadata or {})))
    if isinstance(value, io.BytesIO):
        return (type(value), value.getvalue(), value.tell(), dict(vars(value)))  # which changes when it is gone
    if isinstance(value, (set, frozenset)):
        return (type(value), sorted(map(repr, value)))
    if isinstance(value, dict):
        extra = (getattr(value, "default_factory", None), getattr(value, "__dict__", None))
        return (type(value), [(facts(key), facts(item)) for key, item in value.items()], extra)
    if isinstance(value, (list, tuple, collections.deque)):
        return (type(value), [facts(item) for item in value], getattr(value, "maxlen", None))
    if isinstance(value, (types.SimpleNamespace, argparse.Namespace)):
        return (type(value), facts(vars(value)))
    if isinstance(value, slice):
        return (slice, facts([value.start, value.stop, value.step]))
    if isinstance(value, uuid.UUID):
        return (uuid.UUID, value.int, value.is_safe)
    if isinstance(value, torch.Tensor):
        return image(value)
    if isinstance(value, numpy.void):
        return (facts(value.dtype), value.tobytes())
    return (type(value), repr(value), value.value if isinstance(value, enum.Enum) else None)
