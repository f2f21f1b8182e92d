"""NumPy's scalars, arrays and dtypes, also as NumPy 1 wrote them, but nothing that holds Python objects.

NumPy's own ``__setstate__`` takes what it is given: a dtype that lies about its size or about holding objects makes
addresses of bytes. So a state is only set if it is the one that NumPy itself gives to such a dtype, and an array only
gets as many bytes as its shape takes.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from dcp_fast.unpickling import RefusedError, expect

_MOST_BYTES = 1 << 62
_MOST_PARTS = 500
# Elements without bytes, such as those of "V0": nothing else bounds how many a few bytes of the entry may ask for.
_MOST_EMPTY = 1 << 16
_ALIGNED = 0x80  # the flag of a dtype whose fields are where C would have them
_DTYPE = re.compile(r"[biufcmMSUV][0-9]{1,9}")
_UNITS = (b"Y", b"M", b"W", b"D", b"h", b"m", b"s", b"ms", b"us", b"ns", b"ps", b"fs", b"as", b"generic")
WITH_OBJECTS = (
    "numpy._core.multiarray._reconstruct",
    "numpy.ndarray",
    "numpy.dtype",
    "numpy.dtypes.ObjectDType",
)


@functools.lru_cache(maxsize=1)
def calls() -> dict[str, tuple[Any, Callable[..., Any]]]:
    """By the name in a pickle: what it stands for, and what makes one; empty without NumPy."""
    try:
        import numpy
    except ImportError:
        return {}
    core = numpy._core if hasattr(numpy, "_core") else numpy.core
    functions: dict[str, tuple[Any, Callable[..., Any]]] = {
        "multiarray._reconstruct": (core.multiarray._reconstruct, _reconstruct),
        "multiarray.scalar": (core.multiarray.scalar, _scalar),
        "numeric._frombuffer": (core.numeric._frombuffer, _from_buffer),
    }
    return {
        "numpy.dtype": (numpy.dtype, _dtype),
        "numpy.ndarray": (numpy.ndarray, _ndarray),
        **{f"numpy.{core}.{name}": made for name, made in functions.items() for core in ("_core", "core")},
    }


def state_setter(made: Any) -> Callable[[Any, Any], None] | None:
    """What sets the state of a dtype or an array; None for all else."""
    if not calls():
        return None
    import numpy

    if type(made) is numpy.ndarray:
        return _set_array
    return _set_dtype if isinstance(made, numpy.dtype) else None


def _original(name: str) -> Any:
    return calls()[f"numpy._core.{name}"][0]


def _check_size(shape: Any, dtype: Any, content: Any) -> None:
    """Refuse a shape that takes another number of bytes than there are."""
    import numpy

    expect(isinstance(dtype, numpy.dtype), "an array without a dtype")
    if dtype.hasobject:
        raise RefusedError("an array of Python objects", *WITH_OBJECTS)
    expect(type(shape) is tuple and all(type(size) is int and size >= 0 for size in shape), "an array without a shape")
    # Sizes beside a zero count as well: NumPy multiplies them.
    expect(len(shape) <= 64, "an array of too many dimensions")
    count = math.prod(size or 1 for size in shape)
    expect(count * dtype.itemsize < _MOST_BYTES if dtype.itemsize else count <= _MOST_EMPTY, "an array without bounds")
    expect(len(content) == math.prod(shape) * dtype.itemsize, "an array whose bytes do not fill its shape")


def _ndarray(*arguments: Any) -> Any:
    raise RefusedError("a call of numpy.ndarray")


def _reconstruct(*arguments: Any) -> Any:
    """An empty array, whose state tells the rest."""
    cls, shape, code = arguments if len(arguments) == 3 else (None,) * 3
    expect(cls is calls()["numpy.ndarray"][0], "an array of a class of its own")
    expect(type(shape) is tuple and shape == (0,), "an array that is not empty before it is filled")
    expect(type(code) in (bytes, str) and code in (b"b", "b"), "an array that is not empty before it is filled")
    return _original("multiarray._reconstruct")(cls, shape, code)


def _set_array(array: Any, state: Any) -> None:
    expect(type(state) is tuple and len(state) == 5, "an array with another state")
    version, shape, dtype, by_columns, content = state
    expect(type(version) is int and version in (0, 1), "an array with another state")
    expect(type(by_columns) in (bool, int), "an array with another state")
    if type(content) is list:
        raise RefusedError("an array of Python objects", *WITH_OBJECTS)
    expect(type(content) is bytes, "an array of other than bytes")
    _check_size(shape, dtype, content)
    array.__setstate__(state)


def _scalar(*arguments: Any) -> Any:
    expect(len(arguments) == 2, "a NumPy scalar of other than a dtype and bytes")
    dtype, content = arguments
    if type(content) is not bytes:
        raise RefusedError("a NumPy scalar of a Python object", "numpy._core.multiarray.scalar", *WITH_OBJECTS[2:])
    _check_size((), dtype, content)
    return _original("multiarray.scalar")(dtype, content)


def _from_buffer(*arguments: Any) -> Any:
    """An array of protocol 5."""
    expect(len(arguments) in (4, 5), "an array with other arguments")
    content, dtype, shape, order, *axes = arguments
    expect(type(content) in (bytes, bytearray), "an array of other than bytes")
    expect(type(order) is str and order in ("C", "F", "A", "K"), "an array with another order")
    _check_size(shape, dtype, content)
    for axis in axes:  # since NumPy 2.3
        expect(axis is None or type(axis) is tuple, "an array with other axes")
        known = axis is None or all(type(number) is int for number in axis)
        expect(known and sorted(axis or range(len(shape))) == list(range(len(shape))), "an array with other axes")
    return _original("numeric._frombuffer")(*arguments)


def _dtype(*arguments: Any) -> Any:
    cls = calls()["numpy.dtype"][0]
    expect(len(arguments) == 3 and all(type(flag) in (bool, int) for flag in arguments[1:]), "a dtype with others")
    name = arguments[0]
    if type(name) is not str or name[:1] == "O":
        raise RefusedError("a dtype of Python objects, or of a class of its own", *WITH_OBJECTS)
    expect(_DTYPE.fullmatch(name) is not None, "a dtype in another form")
    return cls(name, False, True)  # a copy: others share NumPy's own


def parts_of(state: Any) -> Iterator[Any]:
    """What the state of a dtype or an array is made of: its items, and theirs where these are tuples or fields."""
    for item in state if type(state) is tuple else ():
        yield item
        for inner in (item,) if type(item) is tuple else item.values() if type(item) is dict else ():
            yield from inner if type(inner) is tuple else ()


def _expect_few_parts(dtype: Any) -> None:
    """Refuse a dtype of too many parts.

    Fields may lie upon each other, so that with a few bytes for each level of them there is twice as much for a hash or
    a comparison to look at.
    """
    count, parts = 0, [dtype]
    while parts:
        part = parts.pop()
        if part.subdtype is not None:
            parts.append(part.subdtype[0])
        elif part.fields:
            parts += [place[0] for place in part.fields.values()]  # a field with a title has two places
        count += 1
        expect(count + len(parts) <= _MOST_PARTS, f"a dtype of more than {_MOST_PARTS} fields, and theirs")


def _is_part(part: Any) -> bool:
    import numpy

    return isinstance(part, numpy.dtype) and not part.hasobject


def _dtype_of_fields(size: int, names: Any, fields: Any, is_aligned: bool) -> Any:
    import numpy

    expect(type(names) is tuple and type(fields) is dict, "a dtype with other fields")
    expect(all(type(name) is str and name in fields for name in names), "a dtype with other fields")
    places = [fields[name] for name in names]
    known = all(type(place) is tuple and len(place) in (2, 3) and _is_part(place[0]) for place in places)
    expect(known, "a dtype with other fields")
    titles = [place[2] if len(place) == 3 else None for place in places]
    given = [title for title in titles if title is not None]
    # Other titles than texts are no keys, but a second name of the field.
    expect(all(type(title) is str for title in given), "a dtype with titles that are no texts")
    expect(len(fields) == len({*names, *given}) and fields.keys() == {*names, *given}, "a dtype with other fields")
    inside = all(type(place[1]) is int and 0 <= place[1] <= size - place[0].itemsize for place in places)
    expect(inside, "a dtype with fields beyond its end")
    parts: dict[str, Any] = {"names": list(names), "formats": [place[0] for place in places]}
    parts |= {"offsets": [place[1] for place in places], "itemsize": size, "aligned": is_aligned}
    made: Any = parts | {"titles": titles} if given else parts
    return numpy.dtype(made)


def _state_of_parts(size: int, state: tuple[Any, ...]) -> Any:
    """The state of a dtype with fields, or of a subarray, as NumPy itself makes it of the same parts.

    Args:
        size: of the dtype in bytes.
        state: in a pickle.
    """
    import numpy

    _, _, subarray, names, fields, *numbers = state
    expect(list(map(type, numbers)) == [int, int, int] and numbers[0] == size, "a dtype of another size than its own")
    if subarray is not None:
        expect(
            type(subarray) is tuple and len(subarray) == 2 and _is_part(subarray[0]), "a dtype with another subarray"
        )
        part, shape = subarray
        expect(type(shape) is tuple and all(type(n) is int and n >= 0 for n in shape), "a dtype with another subarray")
        expect(math.prod(n or 1 for n in shape) * (part.itemsize or 1) <= max(size, 1), "a subarray without bounds")
        made = numpy.dtype((part, shape))
    else:
        made = _dtype_of_fields(size, names, fields, bool(numbers[2] & _ALIGNED))
    _expect_few_parts(made)
    own: Any = made.__reduce__()[2]
    flags = numbers[2]
    # NumPy 1 has them as a number of 8 bits with a sign. What NumPy 2 makes of that is for NumPy to say.
    same_flags = -128 <= flags < 256 > own[7] and (flags - own[7]) % 256 == 0
    same = len(own) == len(state) and [own[0], own[1], *own[5:7]] == [state[0], state[1], *numbers[:2]]
    expect(same and same_flags and not made.hasobject, "a dtype that NumPy makes otherwise of its parts")
    return (*own[:7], flags)


def _set_dtype(dtype: Any, state: Any) -> None:
    own = dtype.__reduce__()[2]
    notes: tuple[Any, ...] = ()
    if dtype.kind not in "mM" and type(state) is tuple and len(state) == len(own) + 1:
        # NumPy looks at what somebody has noted, such as h5py, no further than to copy it.
        expect(type(state[0]) is int and state[0] == 4 and type(state[8]) is dict, "a dtype with other metadata")
        state, notes = (own[0], *state[1:8]), (state[8],)
    expect(type(state) is tuple and len(state) == len(own), "a dtype with another state")
    expect(type(state[0]) is int and state[0] == own[0], "a dtype with another state")
    expect(type(state[1]) is str and state[1] in ("<", ">", "=", "|"), "a dtype with another byte order")
    if dtype.kind == "V" and (state[2] is not None or state[3] is not None):
        state = _state_of_parts(dtype.itemsize, state)
    else:
        same = all(type(part) is type(mine) and part == mine for part, mine in zip(state[2:8], own[2:8], strict=True))
        expect(same, "a dtype with fields, or of another size than its own")
    if dtype.kind in "mM":
        _check_unit(state[8])
    dtype.__setstate__((4, *state[1:], *notes) if notes else state)


def _check_unit(unit: Any) -> None:
    """Of times: what somebody has noted, and the unit."""
    expect(type(unit) is tuple and len(unit) == 2, "a dtype with metadata")
    notes, unit = unit
    expect(notes is None or type(notes) is dict, "a dtype with metadata")
    expect(type(unit) is tuple and list(map(type, unit)) == [bytes, int, int, int], "a dtype with another unit")
    name, count, divisor, event = unit
    expect(name in _UNITS and 1 <= count < 1 << 31 and divisor == event == 1, "a dtype with another unit")
