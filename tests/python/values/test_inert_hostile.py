"""Pickles that misuse what is allowed: none runs code, and none takes memory that the entry does not account for."""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import os
import pickle
import types
import uuid
from collections.abc import Callable
from pathlib import Path, PosixPath
from typing import Any

import numpy
import pytest
import torch
from damage import Call, archive
from hostile_pickles import refused
from inert_values import record

from dcp_fast.errors import CorruptCheckpointError


def reduced(function: Any, *arguments: Any, state: Any = None) -> bytes:
    return archive(pickle.dumps(Call(function, *arguments, state=state), 4))


class New:
    """Pickles into an object of a class that is given a state, once or more."""

    def __init__(self, cls: type, state: Any, *arguments: Any) -> None:
        self.cls, self.state, self.arguments = cls, state, arguments

    def __reduce__(self) -> Any:
        return self.cls.__new__, (self.cls, *self.arguments), self.state


def built(cls: type, state: Any, *arguments: Any) -> bytes:
    """Opcodes: an object, and its state."""
    pickler = io.BytesIO()
    pickler.write(b"\x80\x04")
    pickler.write(pickle.dumps(cls, 4)[2:-1])
    pickler.write(pickle.dumps(tuple(arguments), 4)[2:-1] + b"\x81")
    pickler.write(pickle.dumps(state, 4)[2:-1] + b"b")
    return archive(_without_frames(pickler.getvalue()) + b".")


def _without_frames(pickled: bytes) -> bytes:
    # pickle.dumps frames what is longer than four bytes.
    out, at = b"", 0
    while (frame := pickled.find(b"\x95", at)) >= 0 and frame + 9 <= len(pickled):
        out, at = out + pickled[at:frame], frame + 9
    return out + pickled[at:]


HUGE = 10**12
_reconstruct = numpy._core.multiarray._reconstruct
_scalar = numpy._core.multiarray.scalar
_from_buffer = numpy._core.numeric._frombuffer
_FLOAT = numpy.dtype("f8")


def array_with(shape: Any, content: Any, descriptor: Any = _FLOAT) -> bytes:
    return reduced(_reconstruct, numpy.ndarray, (0,), b"b", state=(1, shape, descriptor, False, content))


def dtype_with(name: Any, *state: Any) -> bytes:
    return reduced(numpy.dtype, name, False, True, state=state)


class StateLater:
    """Pickles into a dtype. Its state holds what is made of it before it has that."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.make = make

    def __reduce__(self) -> Any:
        return numpy.dtype, ("V8", False, True), (self.make(self),)


def overlapping(levels: int) -> Any:
    """A dtype whose hash looks at all its fields: twice as many for each level."""
    dtype = numpy.dtype("i1")
    for _ in range(levels):
        dtype = numpy.dtype({"names": ["a", "b"], "formats": [dtype, dtype], "offsets": [0, 0], "itemsize": 1})
    return dtype


def titled(levels: int) -> Any:
    """The same by fields that have two names each."""
    dtype = numpy.dtype("i1")
    for _ in range(levels):
        dtype = numpy.dtype([(("title", "name"), dtype)])
    return dtype


# A part of each type's name, and what must be refused.
MISUSED: dict[str, Callable[[], bytes]] = {
    "bytearray of a size": lambda: reduced(bytearray, HUGE),
    "bytearray of a range": lambda: reduced(bytearray, range(HUGE)),
    "bytearray with another codec": lambda: reduced(bytearray, "a" * 100, "utf-32"),
    "bytearray, opcode beyond the end": lambda: archive(b"\x80\x05\x96" + HUGE.to_bytes(8, "little") + b"abc."),
    "bytearray, many copies": lambda: archive(
        b"\x80\x04cbuiltins\nbytearray\n\x94B\0\0\x40\0"
        + bytes(4 << 20)
        + b"\x94\x85\x94("
        + b"h\0h\x02R" * 10_000
        + b"l."
    ),
    "bytes with another codec": lambda: archive(b"\x80\x02c_codecs\nencode\nX\x01\0\0\0aX\x06\0\0\0utf-32\x86R."),
    "set of a range": lambda: reduced(set, range(HUGE)),
    "frozenset of a range": lambda: reduced(frozenset, range(HUGE)),
    "list of a range": lambda: reduced(list, range(HUGE)),
    "tuple of a range": lambda: reduced(tuple, range(HUGE)),
    "Counter of a range": lambda: reduced(collections.Counter, range(HUGE)),
    "OrderedDict of a range": lambda: reduced(collections.OrderedDict, range(HUGE)),
    "OrderedDict with attributes that hide": lambda: reduced(collections.OrderedDict, state={"items": bytearray}),
    "OrderedDict with a state twice": lambda: archive(
        b"\x80\x02ccollections\nOrderedDict\n)R}X\x01\0\0\0aK\x01sb}X\x01\0\0\0bK\x01sb."
    ),
    "deque of a range": lambda: reduced(collections.deque, range(HUGE)),
    "deque with a negative length": lambda: reduced(collections.deque, (), -1),
    "deque with more arguments": lambda: reduced(collections.deque, (), 1, 2),
    "defaultdict of code": lambda: reduced(collections.defaultdict, os.getcwd),
    "defaultdict of a value": lambda: reduced(collections.defaultdict, 1),
    "defaultdict of an object": lambda: reduced(collections.defaultdict, types.SimpleNamespace()),
    "defaultdict with items": lambda: reduced(collections.defaultdict, list, {1: 2}),
    "torch.Size of a range": lambda: reduced(torch.Size, range(HUGE)),
    "text of a number": lambda: reduced(int, "9" * 5000),
    "int of a text": lambda: reduced(int, "7"),
    "range of other than numbers": lambda: reduced(range, "a"),
    "range without arguments": lambda: reduced(range),
    "slice of one part": lambda: reduced(slice, 1),
    "complex of a text": lambda: reduced(complex, "1" * 1000),
    "Ellipsis, called": lambda: archive(b"\x80\x04cbuiltins\nEllipsis\n)R."),
    "Decimal with a huge exponent": lambda: reduced(__import__("decimal").Decimal, "1E+999999999999"),
    "Decimal with a tiny exponent": lambda: reduced(__import__("decimal").Decimal, "1E-999999999999"),
    "Decimal of a tuple": lambda: reduced(__import__("decimal").Decimal, (0, (1,), HUGE)),
    "Fraction with an exponent": lambda: reduced(__import__("fractions").Fraction, "1e999999999"),
    "Fraction of nothing": lambda: reduced(__import__("fractions").Fraction, 1, 0),
    "Fraction of huge numbers": lambda: reduced(__import__("fractions").Fraction, 1 << 200_000, (1 << 199_999) + 1),
    "Fraction of a float": lambda: reduced(__import__("fractions").Fraction, 1e300),
    "UUID of other than a number": lambda: built(uuid.UUID, {"int": "text"}),
    "UUID of more bits": lambda: built(uuid.UUID, {"int": 1 << 200}),
    "UUID with other fields": lambda: built(uuid.UUID, {"int": 1, "__class__": "x"}),
    "UUID with arguments": lambda: reduced(uuid.UUID, "0" * 32),
    "SimpleNamespace that sets its state": lambda: reduced(types.SimpleNamespace, state={"__setstate__": bytearray}),
    "SimpleNamespace with a class": lambda: reduced(types.SimpleNamespace, state={"__class__": argparse.Namespace}),
    "SimpleNamespace of a list": lambda: reduced(types.SimpleNamespace, state=[("a", 1)]),
    "SimpleNamespace of a mapping": lambda: reduced(types.SimpleNamespace, {"a": 1}),
    "SimpleNamespace with slots": lambda: reduced(types.SimpleNamespace, state=({"a": 1}, {"b": 2})),
    "SimpleNamespace twice": lambda: archive(
        b"\x80\x02ctypes\nSimpleNamespace\n)R}X\x01\0\0\0aK\x01sb}X\x01\0\0\0bK\x01sb."
    ),
    "Namespace that hides its methods": lambda: built(argparse.Namespace, {"_get_kwargs": list}),
    "Namespace that is copied by code": lambda: built(argparse.Namespace, {"__deepcopy__": list}),
    "BytesIO far behind its end": lambda: built(io.BytesIO, (b"abc", HUGE, None)),
    "BytesIO before its beginning": lambda: built(io.BytesIO, (b"abc", -1, None)),
    "BytesIO of a bytearray": lambda: built(io.BytesIO, (bytearray(b"abc"), 0, None)),
    "BytesIO that hides its methods": lambda: built(io.BytesIO, (b"abc", 0, {"read": bytearray})),
    "BytesIO with arguments": lambda: reduced(io.BytesIO, b"abc"),
    "datetime of a text": lambda: reduced(datetime.datetime, "a" * 10),
    "datetime of numbers": lambda: reduced(datetime.datetime, 2026, 1, 1),
    "datetime of nonsense": lambda: reduced(datetime.datetime, b"\xff" * 10),
    "datetime of more bytes": lambda: reduced(datetime.datetime, b"\x07\xea\x01\x02" + bytes(7)),
    "datetime with a zone of code": lambda: reduced(
        datetime.datetime, b"\x07\xea\x01\x02" + bytes(6), types.SimpleNamespace()
    ),
    "date without arguments": lambda: reduced(datetime.date),
    "time of nonsense": lambda: reduced(datetime.time, b"\xff" * 6),
    "timedelta beyond its range": lambda: reduced(datetime.timedelta, HUGE, 0, 0),
    "timedelta of floats": lambda: reduced(datetime.timedelta, 1e308, 0, 0),
    "timezone of a number": lambda: reduced(datetime.timezone, 1),
    "timezone beyond its range": lambda: reduced(datetime.timezone, datetime.timedelta(days=2)),
    "Path of other than texts": lambda: archive(b"\x80\x02cpathlib\nPosixPath\nctypes\nSimpleNamespace\n)R\x85R."),
    "Path with a state": lambda: archive(b"\x80\x02cpathlib\nPosixPath\n)R}X\x04\0\0\0_rawK\x01sb."),
    "array that is larger than its bytes": lambda: array_with((HUGE,), b"12345678"),
    "array with sizes beside a zero": lambda: array_with((0, 1 << 40, 1 << 40), b""),
    "array with a negative size": lambda: array_with((-1, -1), b"12345678"),
    "array of too many dimensions": lambda: array_with((1,) * 100, b"12345678"),
    "array of a range": lambda: array_with(range(HUGE), b"12345678"),
    "array of nothing": lambda: array_with((HUGE,), b"", numpy.dtype("V0")),
    "array of nothing, beside a zero": lambda: array_with((0, HUGE), b"", numpy.dtype("U0")),
    "array of objects": lambda: array_with((1,), [1], numpy.dtype("O")),
    "array of addresses": lambda: array_with((1,), b"12345678", numpy.dtype("O")),
    "array with another state": lambda: reduced(_reconstruct, numpy.ndarray, (0,), b"b", state=(1, (1,))),
    "array, made large": lambda: reduced(_reconstruct, numpy.ndarray, (HUGE,), b"b"),
    "array of another class": lambda: reduced(_reconstruct, numpy.ma.MaskedArray, (0,), b"b"),
    "array, called": lambda: reduced(numpy.ndarray, (1 << 30,)),
    "array of protocol 5 that is larger than its bytes": lambda: reduced(
        _from_buffer, b"12345678", _FLOAT, (HUGE,), "C"
    ),
    "array of protocol 5 of objects": lambda: reduced(_from_buffer, b"12345678", numpy.dtype("O"), (1,), "C"),
    "array of protocol 5 of a namespace": lambda: reduced(_from_buffer, types.SimpleNamespace(), _FLOAT, (1,), "C"),
    "array of protocol 5 in another order": lambda: reduced(_from_buffer, b"12345678", _FLOAT, (1,), "X"),
    "scalar of an object": lambda: reduced(_scalar, numpy.dtype("O"), [1]),
    "scalar of an address": lambda: reduced(_scalar, numpy.dtype("O"), b"12345678"),
    "scalar of fewer bytes": lambda: reduced(_scalar, _FLOAT, b"1"),
    "scalar of a huge text": lambda: reduced(_scalar, numpy.dtype("U100000000"), b"1"),
    "dtype of objects": lambda: reduced(numpy.dtype, "O8", False, True),
    "dtype with a shape": lambda: reduced(numpy.dtype, "(1000000000,)f8", False, True),
    "dtype of several": lambda: reduced(numpy.dtype, "f8,O", False, True),
    "dtype that aligns": lambda: reduced(numpy.dtype, {"names": ["a"], "formats": ["O"]}, True, True),
    "dtype with fields beyond its end": lambda: dtype_with("V8", 3, "|", None, ("a",), {"a": (_FLOAT, 1)}, 8, 1, 16),
    "dtype with fields before it": lambda: dtype_with("V8", 3, "|", None, ("a",), {"a": (_FLOAT, -1)}, 8, 1, 16),
    "dtype with fields of a larger one": lambda: dtype_with("V8", 3, "|", None, ("a",), {"a": (_FLOAT, 8)}, 16, 1, 16),
    "dtype with fields of objects": lambda: dtype_with(
        "V8", 3, "|", None, ("a",), {"a": (numpy.dtype("O"), 0)}, 8, 1, 16
    ),
    "dtype with fields that hide objects": lambda: dtype_with("V8", 3, "|", None, ("a",), {"a": (_FLOAT, 0)}, 8, 1, 63),
    "dtype with fields without names": lambda: dtype_with("V8", 3, "|", None, ("a",), {"b": (_FLOAT, 0)}, 8, 1, 16),
    "dtype with fields of no dtype": lambda: dtype_with("V8", 3, "|", None, ("a",), {"a": ("f8", 0)}, 8, 1, 16),
    "dtype with fields of a number": lambda: dtype_with("f8", 3, "<", None, ("a",), {"a": (_FLOAT, 0)}, -1, -1, 0),
    "dtype with fields upon each other": lambda: archive(pickle.dumps(overlapping(60), 4)),
    "dtype with titles within each other": lambda: archive(pickle.dumps(titled(60), 4)),
    "dtype with very many fields": lambda: archive(
        pickle.dumps(numpy.dtype([(f"f{number}", "i1") for number in range(500)]), 4)
    ),
    "dtype that gets its state after a scalar": lambda: archive(
        pickle.dumps(StateLater(lambda dtype: Call(_scalar, dtype, bytes(8))), 4)
    ),
    "dtype that gets its state after an array": lambda: archive(
        pickle.dumps(
            StateLater(
                lambda dtype: Call(_reconstruct, numpy.ndarray, (0,), b"b", state=(1, (1,), dtype, False, b"8" * 8))
            ),
            4,
        )
    ),
    "dtype that gets its state after an array of protocol 5": lambda: archive(
        pickle.dumps(StateLater(lambda dtype: Call(_from_buffer, bytes(8), dtype, (1,), "C")), 4)
    ),
    "dtype that gets its state after another one": lambda: archive(
        pickle.dumps(
            StateLater(
                lambda dtype: Call(
                    numpy.dtype, "V8", False, True, state=(3, "|", None, ("a",), {"a": (dtype, 0)}, 8, 1, 16)
                )
            ),
            4,
        )
    ),
    "dtype that gets its state after a subarray": lambda: archive(
        pickle.dumps(
            StateLater(
                lambda dtype: Call(numpy.dtype, "V8", False, True, state=(3, "|", (dtype, (1,)), None, None, 8, 1, 16))
            ),
            4,
        )
    ),
    "dtype with fields and metadata": lambda: dtype_with(
        "V8", 4, "|", None, ("a",), {"a": (_FLOAT, 0)}, 8, 1, 16, [("a", 1)]
    ),
    "dtype of another size": lambda: dtype_with("f8", 3, "<", None, None, None, 1 << 30, 1, 0),
    "dtype that hides objects": lambda: dtype_with("V8", 3, "|", None, None, None, 8, 1, 63),
    "dtype with a subarray without bounds": lambda: dtype_with("V8", 3, "|", (_FLOAT, (HUGE,)), None, None, 8, 1, 0),
    "dtype with a subarray of nothing": lambda: dtype_with(
        "V8", 3, "|", (numpy.dtype("V0"), (HUGE,)), None, None, 8, 1, 0
    ),
    "dtype with a subarray of a range": lambda: dtype_with("V8", 3, "|", (_FLOAT, range(HUGE)), None, None, 8, 1, 0),
    "dtype with a subarray that is smaller": lambda: dtype_with("V9", 3, "|", (_FLOAT, (1,)), None, None, 9, 8, 0),
    "dtype with metadata": lambda: dtype_with(
        "f8", 4, "<", None, None, None, -1, -1, 0, types.SimpleNamespace(keys=list)
    ),
    "dtype with more than metadata": lambda: dtype_with("f8", 4, "<", None, None, None, -1, -1, 0, {}, {}),
    "dtype with titles that are no keys": lambda: dtype_with(
        "V8", 3, "|", None, ("a",), {"a": (_FLOAT, 0, "b")}, 8, 1, 16
    ),
    "dtype with titles that are objects": lambda: dtype_with(
        "V8", 3, "|", None, ("a",), {"a": (_FLOAT, 0, 1), 1: (_FLOAT, 0, 1)}, 8, 1, 16
    ),
    "dtype with a title of objects": lambda: dtype_with(
        "V8", 3, "|", None, ("a",), {"a": (_FLOAT, 0, "b"), "b": (_FLOAT, 0, "b"), "c": (_FLOAT, 0)}, 8, 1, 16
    ),
    "dtype with other flags": lambda: dtype_with("V8", 3, "|", None, ("a",), {"a": (_FLOAT, 0)}, 8, 1, 16 - 256 * 9),
    "dtype of times with metadata": lambda: dtype_with(
        "M8", 4, "<", None, None, None, -1, -1, 0, ([("a", 1)], (b"s", 1, 1, 1))
    ),
    "dtype of times with another unit": lambda: dtype_with(
        "M8", 4, "<", None, None, None, -1, -1, 0, (None, (b"x", 1, 1, 1))
    ),
    "tensor of a size": lambda: reduced(torch.FloatTensor, HUGE),
    "tensor of a namespace": lambda: reduced(torch._utils._rebuild_parameter, types.SimpleNamespace(), True, None),
    "storage of a size": lambda: reduced(torch.storage.UntypedStorage, HUGE),
    "tensor's function of a set": lambda: reduced(
        torch._tensor._rebuild_from_type_v2, bytearray, torch.Tensor, (HUGE,), {}
    ),
    "key of tuples without end": lambda: archive(b"\x80\x04})" + b"\x94h\0h\0\x86" * 0 + b"2\x86" * 60 + b"K\x01s."),
}


# What each is refused for: a part of the reason.
REASONS = {
    "bytearray of a size": "a call of bytearray with arguments",
    "bytearray of a range": "a call of bytearray with arguments",
    "bytearray with another codec": "bytearray with another codec than latin-1",
    "bytearray, opcode beyond the end": "a bytearray beyond the end of the pickle",
    "bytearray, many copies": "many copies of the same",
    "bytes with another codec": "_codecs.encode with another codec than latin1",
    "set of a range": "a call of set with arguments",
    "frozenset of a range": "a call of frozenset with arguments",
    "list of a range": "a call of builtins.list",
    "tuple of a range": "a call of builtins.tuple",
    "Counter of a range": "a call of collections.Counter with arguments",
    "OrderedDict of a range": "a call of collections.OrderedDict with arguments",
    "OrderedDict with attributes that hide": "a OrderedDict with attributes that hide its methods",
    "OrderedDict with a state twice": "a state of a collections.OrderedDict",
    "deque of a range": "a call of collections.deque with arguments",
    "deque with a negative length": "ValueError: maxlen must be non-negative",
    "deque with more arguments": "a call of collections.deque with arguments",
    "defaultdict of code": "posix.getcwd",
    "defaultdict of a value": "a defaultdict with a factory that is code",
    "defaultdict of an object": "a defaultdict with a factory that is code",
    "defaultdict with items": "a defaultdict with more than a factory",
    "torch.Size of a range": "a torch.Size of other than numbers",
    "text of a number": "a call of builtins.int",
    "int of a text": "a call of builtins.int",
    "range of other than numbers": "a call of range with arguments",
    "range without arguments": "a call of range with arguments",
    "slice of one part": "a slice of other than three parts",
    "complex of a text": "a call of complex with arguments",
    "Ellipsis, called": "a call of a value (ellipsis)",
    "Decimal with a huge exponent": "a decimal.Decimal without bounds",
    "Decimal with a tiny exponent": "a decimal.Decimal without bounds",
    "Decimal of a tuple": "a call of decimal.Decimal with arguments",
    "Fraction with an exponent": "a fractions.Fraction in another form",
    "Fraction of nothing": "ZeroDivisionError: Fraction(1, 0)",
    "Fraction of huge numbers": "a fractions.Fraction without bounds",
    "Fraction of a float": "a call of fractions.Fraction with arguments",
    "UUID of other than a number": "a uuid.UUID of other than 128 bits",
    "UUID of more bits": "a uuid.UUID of other than 128 bits",
    "UUID with other fields": "a uuid.UUID with other fields",
    "UUID with arguments": "a call of uuid.UUID with arguments",
    "SimpleNamespace that sets its state": "a SimpleNamespace with attributes that hide its methods",
    "SimpleNamespace with a class": "a SimpleNamespace with attributes that hide its methods",
    "SimpleNamespace of a list": "a SimpleNamespace with another state",
    "SimpleNamespace of a mapping": "a call of types.SimpleNamespace with arguments",
    "SimpleNamespace with slots": "a SimpleNamespace with another state",
    "SimpleNamespace twice": "a state of a types.SimpleNamespace",
    "Namespace that hides its methods": "a Namespace with attributes that hide its methods",
    "Namespace that is copied by code": "a Namespace with attributes that hide its methods",
    "BytesIO far behind its end": "an io.BytesIO that is past its end",
    "BytesIO before its beginning": "an io.BytesIO that is past its end",
    "BytesIO of a bytearray": "an io.BytesIO with another state",
    "BytesIO that hides its methods": "an io.BytesIO with attributes",
    "BytesIO with arguments": "a call of io.BytesIO with arguments",
    "datetime of a text": "a call of datetime.datetime with arguments",
    "datetime of numbers": "a call of datetime.datetime with arguments",
    "datetime of nonsense": "TypeError: 'bytes' object cannot be interpreted as an intege",
    "datetime of more bytes": "a datetime.datetime of other than 10 bytes",
    "datetime with a zone of code": "a call of datetime.datetime with arguments",
    "date without arguments": "a call of datetime.date with arguments",
    "time of nonsense": "TypeError: 'bytes' object cannot be interpreted as an intege",
    "timedelta beyond its range": "OverflowError: Python int too large to convert to C int",
    "timedelta of floats": "a call of datetime.timedelta with arguments",
    "timezone of a number": "a call of datetime.timezone with arguments",
    "timezone beyond its range": "ValueError: offset must be a timedelta strictly between -tim",
    "Path of other than texts": "a call of pathlib.PosixPath with other than texts",
    "Path with a state": f"a state of a {PosixPath.__module__}.PosixPath",
    "array that is larger than its bytes": "an array whose bytes do not fill its shape",
    "array with sizes beside a zero": "an array without bounds",
    "array with a negative size": "an array without a shape",
    "array of too many dimensions": "an array of too many dimensions",
    "array of a range": "an array without a shape",
    "array of nothing": "an array without bounds",
    "array of nothing, beside a zero": "an array without bounds",
    "array of objects": "numpy.dtypes.ObjectDType",
    "array of addresses": "numpy.dtypes.ObjectDType",
    "array with another state": "an array with another state",
    "array, made large": "an array that is not empty before it is filled",
    "array of another class": "numpy.ma.MaskedArray",
    "array, called": "a call of numpy.ndarray",
    "array of protocol 5 that is larger than its bytes": "an array whose bytes do not fill its shape",
    "array of protocol 5 of objects": "numpy.dtypes.ObjectDType",
    "array of protocol 5 of a namespace": "an array of other than bytes",
    "array of protocol 5 in another order": "an array with another order",
    "scalar of an object": "numpy.dtypes.ObjectDType",
    "scalar of an address": "numpy.dtypes.ObjectDType",
    "scalar of fewer bytes": "an array whose bytes do not fill its shape",
    "scalar of a huge text": "an array whose bytes do not fill its shape",
    "dtype of objects": "numpy.dtypes.ObjectDType",
    "dtype with a shape": "a dtype in another form",
    "dtype of several": "a dtype in another form",
    "dtype that aligns": "numpy.dtypes.ObjectDType",
    "dtype with fields beyond its end": "a dtype with fields beyond its end",
    "dtype with fields before it": "a dtype with fields beyond its end",
    "dtype with fields of a larger one": "a dtype of another size than its own",
    "dtype with fields of objects": "numpy.dtypes.ObjectDType",
    "dtype with fields that hide objects": "a dtype that NumPy makes otherwise of its parts",
    "dtype with fields without names": "a dtype with other fields",
    "dtype with fields of no dtype": "a dtype with other fields",
    "dtype with fields of a number": "a dtype with fields, or of another size than its own",
    "dtype with fields and metadata": "a dtype with other metadata",
    "dtype with fields upon each other": "a dtype of more than 500 fields",
    "dtype with titles within each other": "a dtype of more than 500 fields",
    "dtype with very many fields": "a dtype of more than 500 fields",
    "dtype that gets its state after a scalar": "a dtype or an array that has no state yet",
    "dtype that gets its state after an array": "a dtype or an array that has no state yet",
    "dtype that gets its state after an array of protocol 5": "a dtype or an array that has no state yet",
    "dtype that gets its state after another one": "a dtype or an array that has no state yet",
    "dtype that gets its state after a subarray": "a dtype or an array that has no state yet",
    "dtype of another size": "a dtype with fields, or of another size than its own",
    "dtype that hides objects": "a dtype with fields, or of another size than its own",
    "dtype with a subarray without bounds": "a subarray without bounds",
    "dtype with a subarray of nothing": "a subarray without bounds",
    "dtype with a subarray of a range": "a dtype with another subarray",
    "dtype with a subarray that is smaller": "a dtype that NumPy makes otherwise of its parts",
    "dtype with metadata": "a dtype with other metadata",
    "dtype with more than metadata": "a dtype with another state",
    "dtype with titles that are no keys": "a dtype with other fields",
    "dtype with titles that are objects": "a dtype with titles that are no texts",
    "dtype with a title of objects": "a dtype with other fields",
    "dtype with other flags": "a dtype that NumPy makes otherwise of its parts",
    "dtype of times with metadata": "a dtype with metadata",
    "dtype of times with another unit": "a dtype with another unit",
    "tensor of a size": "a call of FloatTensor, which takes memory of any size",
    "tensor of a namespace": "a call of _rebuild_parameter with other than tensors",
    "storage of a size": "a call of UntypedStorage, which takes memory of any size",
    "tensor's function of a set": "a call of _rebuild_from_type_v2 with other than torch's func",
    "key of tuples without end": "a key of tuples without end",
}


@pytest.mark.parametrize("name", MISUSED)
def test_misused(name: str) -> None:
    assert REASONS[name] in refused(MISUSED[name]()).reason


@pytest.mark.parametrize(
    "name",
    [
        *("array of addresses", "array of protocol 5 of objects", "scalar of an address", "array with another state"),
        *("dtype with fields of objects", "dtype with fields that hide objects", "dtype that hides objects"),
        *("dtype of another size", "dtype that gets its state after an array", "array that is larger than its bytes"),
    ],
)
def test_misused_while_numpy_s_dtypes_are_allowed(name: str) -> None:
    """Their states are as checked as before."""
    with torch.serialization.safe_globals([numpy.dtype]):
        refused(MISUSED[name]())


def test_storage_that_the_entry_does_not_have() -> None:
    data = record([torch.arange(4)])
    pickled = b"K\x04tq\x06Q"
    assert pickled in data
    start = data.index(b"\x80\x02]")
    end = data.index(b"ca.", start) if b"ca." in data else data.index(b"Rq\x0ca.", start) + 5
    grown = (
        data[start:end]
        .replace(pickled, b"J\xff\xff\xff\x0ftq\x06Q")
        .replace(b"K\x04\x85q\x07", b"J\xff\xff\xff\x0f\x85q\x07")
    )
    assert isinstance(refused(archive(grown, bytes(32))), CorruptCheckpointError)


def executing(command: str) -> dict[str, Any]:
    """Values of each kind with a call in them that makes a file."""
    call = Call(os.system, command)
    return {
        "SimpleNamespace": types.SimpleNamespace(a=call),
        "Namespace": argparse.Namespace(a=call),
        "deque": collections.deque([call]),
        "defaultdict": collections.defaultdict(list, {1: call}),
        "Counter": collections.Counter({"a": call}),  # type: ignore[dict-item]
        "OrderedDict": collections.OrderedDict(a=call),
        "slice": slice(call, None),
        "array": Call(_reconstruct, numpy.ndarray, (0,), b"b", state=(1, (1,), numpy.dtype("O"), False, [call])),
        "scalar": Call(_scalar, numpy.dtype("O"), call),
        "dtype": Call(numpy.dtype, call, False, True),
        "datetime": Call(datetime.datetime, bytes(10), call),
        "BytesIO": New(io.BytesIO, (call, 0, None)),
        "UUID": New(uuid.UUID, {"int": call}),
        "range": Call(range, call),
        "bytearray": Call(bytearray, call),
        "set": Call(set, [call]),
        "frozenset": Call(frozenset, [call]),
    }


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("name", executing(""))
def test_code_within(tmp_path: Path, name: str, protocol: int) -> None:
    marker = tmp_path / "executed"
    data = archive(pickle.dumps(executing(f"touch {marker}")[name], protocol))
    error = refused(data)
    assert "posix.system" in error.reason
    assert not marker.exists()
    try:
        torch.load(io.BytesIO(data), weights_only=False)
    except Exception:  # what it makes of the result of the call
        assert marker.exists()
    assert marker.exists()
