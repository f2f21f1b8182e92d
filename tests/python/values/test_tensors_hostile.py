"""Pickles that misuse the tensors in bytes entries, beside those that torch itself writes."""

from __future__ import annotations

import collections
import copy
import io
import pickle
import zipfile
from typing import Any

import numpy
import pytest
import torch
from damage import Call, archive
from hostile_pickles import named, refused, text
from inert_values import record

from dcp_fast.errors import CudaError
from dcp_fast.values.load import load_untrusted

HOOKS = named("collections", "OrderedDict") + b")R"


def number(value: int) -> bytes:
    return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)


def storage(elements: int = 4, key: str = "0", kind: str = "FloatStorage") -> bytes:
    parts = (text("storage"), named("torch", kind), text(key), text("cpu"), number(elements))
    return b"(" + b"".join(parts) + b"tQ"


def place(length: int, step: int = 1, offset: int = 0) -> bytes:
    return number(offset) + b"(" + number(length) + b"t(" + number(step) + b"t"


def rebuilt(hooks: bytes = HOOKS, *, key: str = "0", elements: int = 4, length: int = 4, step: int = 1) -> bytes:
    """Opcodes of a tensor of one dimension."""
    arguments = storage(elements, key) + place(length, step) + b"\x89" + hooks
    return named("torch._utils", "_rebuild_tensor_v2") + b"(" + arguments + b"tR"


def parameter(state: bytes, hooks: bytes = HOOKS) -> bytes:
    function = named("torch._utils", "_rebuild_parameter_with_state")
    return function + b"(" + rebuilt() + b"\x89" + hooks + state + b"tR"


def from_type(state: bytes, cls: bytes = named("torch", "Tensor")) -> bytes:
    inner = b"(" + storage() + place(4) + b"\x89" + HOOKS + b"t"
    function = named("torch._tensor", "_rebuild_from_type_v2") + b"(" + named("torch._utils", "_rebuild_tensor_v2")
    return function + cls + inner + state + b"tR"


def attribute(name: str, value: bytes) -> bytes:
    return b"}" + text(name) + value + b"s"


def entry(opcodes: bytes) -> bytes:
    return archive(b"\x80\x02" + opcodes + b".", bytes(16))


def load(data: bytes) -> Any:
    return load_untrusted(io.BytesIO(data), "value")


RANGE = named("builtins", "range") + b"(" + number(1 << 24) + b"tR"
NESTED = b"K\x01" + b"".join(b"q" + bytes([100 + i]) + b"h" + bytes([100 + i]) + b"\x86" for i in range(60))
HIDDEN = "attributes that hide its methods"
# What must be refused, and a part of the reason.
MISUSED: dict[str, tuple[bytes, str]] = {
    # Attributes that the unpickler, or torch, takes for the tensor's methods when it sets a state.
    "set_ makes a set": (from_type(attribute("set_", named("builtins", "set"))) + b"(" + RANGE + b"tb", HIDDEN),
    "set_ takes memory": (
        from_type(attribute("set_", named("builtins", "bytearray"))) + b"(" + number(1 << 30) + b"tb",
        HIDDEN,
    ),
    "set_ gets attributes": (
        from_type(attribute("set_", named("builtins", "getattr"))) + b"(" + text("abc") + text("upper") + b"tb",
        HIDDEN,
    ),
    "set_ of a parameter": (
        parameter(attribute("set_", named("builtins", "set"))) + b"(" + RANGE + b"NNNtb",
        HIDDEN,
    ),
    "__setstate__ hashes": (
        parameter(attribute("__setstate__", named("builtins", "frozenset"))) + NESTED + b"\x85b",
        HIDDEN,
    ),
    "a method in a slot": (from_type(b"N" + attribute("set_", named("builtins", "set")) + b"\x86"), HIDDEN),
    "an attribute of C": (parameter(attribute("data", rebuilt())), HIDDEN),
    "a state that is no dict": (parameter(b"K\x05"), "a Tensor with another state"),
    "attributes by numbers": (parameter(b"}K\x01K\x02s"), "a Tensor with another state"),
    "backward hooks": (rebuilt(b"}K\x01" + named("builtins", "getattr") + b"s"), "a tensor with backward hooks"),
    "backward hooks of a parameter": (
        parameter(b"}", b"}K\x01" + named("builtins", "getattr") + b"s"),
        "a tensor with backward hooks",
    ),
    "backward hooks in a state": (
        parameter(b"}") + b"\x89\x89}K\x01" + named("builtins", "getattr") + b"s\x87b",
        "a tensor with backward hooks",
    ),
    "a class that is no tensor": (from_type(b"}", named("builtins", "set")), "a class that is no tensor"),
    # States that make the storage grow.
    **{
        f"{cls} of no size": (
            named("torch", "Tensor") + b")R(" + named("torch.storage", cls) + b")R" + place(1 << 30) + b"tb",
            reason,
        )
        for cls, reason in (
            ("UntypedStorage", "a tensor without a storage"),
            ("TypedStorage", "a tensor that is larger than its storage"),
        )
    },
    "a state beyond the storage": (
        rebuilt() + b"(" + storage() + place(1 << 30) + b"tb",
        "a tensor that is larger than its storage",
    ),
    "steps beyond the storage": (
        named("torch", "Tensor") + b")R(" + storage() + place(2, 1 << 30) + b"tb",
        "a tensor that is larger than its storage",
    ),
    "an offset beyond the storage": (
        named("torch", "Tensor") + b")R(" + storage() + place(1, 1, 1 << 30) + b"tb",
        "a tensor that is larger than its storage",
    ),
    "a parameter beyond the storage": (
        parameter(b"}") + b"(" + storage() + place(1 << 30) + b"tb",
        "a tensor that is larger than its storage",
    ),
    "a state of another type": (
        named("torch", "DoubleTensor") + b")R(" + storage() + place(4) + b"tb",
        "a storage of another type",
    ),
    "a state of fewer parts": (rebuilt() + b"(" + storage() + b"tb", "a tensor of other state"),
    "a state of a parameter of fewer parts": (parameter(b"}") + b"(" + storage() + b"tb", "a parameter of other state"),
}


@pytest.mark.parametrize("name", MISUSED)
def test_misused(name: str) -> None:
    opcodes, reason = MISUSED[name]
    assert reason in refused(entry(opcodes), 64 << 20).reason


def test_storages_that_lie_upon_each_other() -> None:
    """Records of an archive that are one and the same, which torch would read again for each."""
    count, size = 100, 4 << 20
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        pickled = b"\x80\x02](" + b"".join(storage(size // 4, str(i)) for i in range(count)) + b"e."
        records = {"version": b"3\n", "data.pkl": pickled, "byteorder": b"little", "data/0": bytes(size)}
        for name, data in records.items():
            file.writestr(zipfile.ZipInfo(f"archive/{name}"), data)
        for i in range(1, count):
            again = copy.copy(file.getinfo("archive/data/0"))
            again.filename = f"archive/data/{i}"
            file.filelist.append(again)
    assert "storages of more bytes than" in refused(stream.getvalue(), 64 << 20).reason
    # The earlier format has no record of what is where.
    state = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    head = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, state))
    pickled = pickled.replace(text("cpu") + number(size // 4), text("cpu") + number(size // 4) + b"N")
    data = head + pickled + pickle.dumps([str(i) for i in range(count)], 2) + bytes(size)
    assert "storages of more bytes than" in refused(data, 64 << 20).reason


def recalled(value: bytes, call: bytes, *globals: tuple[str, str], times: int = 300) -> bytes:
    """Opcodes of calls that go back to the same value, which is in the memo under 0, and the globals from 1."""
    kept = b"".join(named(*each) + b"q" + bytes([key]) + b"0" for key, each in enumerate(globals, 1))
    return value + b"q\x000" + kept + b"](" + call * times + b"e"


NUMBERS = b"".join(b"J" + i.to_bytes(4, "little") for i in range(50_000))
PAIRS = b"}(" + b"".join(b"J" + i.to_bytes(4, "little") + b"K\x01" for i in range(50_000)) + b"u"
FIELDS = b"}(" + b"".join(text(f"k{i}") + b"K\x01" for i in range(50_000)) + b"u"
MEGABYTE = 1 << 18  # in elements
TENSOR = rebuilt(elements=MEGABYTE)
PARAMETER = ("torch._utils", "_rebuild_parameter_with_state")
FROM_NUMPY = ("torch._utils", "_rebuild_device_tensor_from_numpy")
FROM_CPU = ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor")
WIDE = ("torch", "complex128")
CONVERTED = b"h\x01(h\x00h\x02" + text("cpu") + b"\x89tR"
SCALES = named("torch", "per_channel_affine") + 2 * rebuilt(key="1", length=1 << 20, step=0) + b"K\x00"
COPIES: dict[str, bytes] = {
    "a Counter": recalled(PAIRS, b"h\x01h\x00\x85R", ("collections", "Counter")),
    "a namespace": recalled(FIELDS, b"h\x01)Rh\x00b", ("types", "SimpleNamespace")),
    "a set": recalled(b"](" + NUMBERS + b"e", b"h\x01h\x00\x85R", ("builtins", "set")),
    "a frozenset": recalled(b"](" + NUMBERS + b"e", b"h\x01h\x00\x85R", ("builtins", "frozenset")),
    "a torch.Size": recalled(
        named("torch", "Size") + b"(" + NUMBERS + b"t\x85R", b"h\x01h\x00\x85R", ("torch", "Size"), times=1000
    ),
    "attributes of a parameter": recalled(FIELDS, b"h\x01(h\x02\x89Nh\x00tR", PARAMETER, ("torch", "Tensor")).replace(
        named("torch", "Tensor"), TENSOR
    ),
    "slots of a parameter": recalled(FIELDS, b"h\x01(h\x02\x89NNh\x00\x86tR", PARAMETER, ("torch", "Tensor")).replace(
        named("torch", "Tensor"), TENSOR
    ),
    "an array of wider numbers": recalled(
        pickle.dumps(numpy.zeros(MEGABYTE, "i1"), 2)[2:-1], CONVERTED, FROM_NUMPY, WIDE
    ),
    "a tensor of wider numbers": recalled(rebuilt(elements=MEGABYTE, length=MEGABYTE), CONVERTED, FROM_CPU, WIDE),
    "a tensor that repeats its element": recalled(
        rebuilt(elements=MEGABYTE, length=1 << 28, step=0), CONVERTED, FROM_CPU, WIDE, times=1
    ),
    "scales of a quantized tensor": recalled(
        b"(" + storage(1 << 20, kind="QInt8Storage") + place(1 << 20) + b"(" + SCALES + b"t\x89Nt",
        b"h\x01h\x00R",
        ("torch._utils", "_rebuild_qtensor"),
    ),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies(name: str) -> None:
    data = archive(b"\x80\x02" + COPIES[name] + b".", bytes(1 << 20), **{"data/1": bytes(16)})
    assert "many copies of the same" in refused(data).reason


DENSE: dict[str, Any] = {
    # Of as few bytes in a pickle as can be: what a copy takes is the most times the entry.
    "sets": [set(range(256)) for _ in range(10_000)],
    "Counter": collections.Counter(range(1_000_000)),
    "bytes": [b"\xff" * 100_000 for _ in range(100)],
    "torch.Size": [torch.Size(range(256)) for _ in range(5000)],
}


@pytest.mark.parametrize("name", DENSE)
def test_what_is_written_without_copies_is_no_copy(name: str) -> None:
    assert load(record(DENSE[name])) == DENSE[name]


@pytest.mark.parametrize("legacy", [False, True])
def test_sparse_tensor_with_an_index_beyond_its_size(legacy: bool) -> None:
    """Checked as torch does when it loads what it does not trust: since torch 2.14, or if it is told to."""
    coordinates, values = torch.tensor([[100_000_000]]), torch.ones(1)
    arguments = (torch.sparse_coo, (coordinates, values, torch.Size([2])))
    data = record(Call(torch._utils._rebuild_sparse_tensor, *arguments), legacy=legacy)
    try:
        theirs = torch.load(io.BytesIO(data), weights_only=True)
    except RuntimeError as error:
        theirs = error
    if isinstance(theirs, RuntimeError):
        assert str(theirs) in refused(data).reason
    else:
        assert torch.equal(load(data)._indices(), theirs._indices())
    with torch.sparse.check_sparse_tensor_invariants():
        assert "size is inconsistent with indices" in refused(data).reason


def test_tensor_of_a_gpu_that_is_not_there() -> None:
    """The entry is intact. torch has a RuntimeError for it."""
    data = entry(rebuilt().replace(text("cpu"), text("cuda:99")))
    with pytest.raises(RuntimeError) as theirs:
        torch.load(io.BytesIO(data), weights_only=False)
    with pytest.raises(CudaError) as ours:
        load(data)
    assert str(theirs.value) in ours.value.reason
    assert ours.value.fqn == "value"


class Gauge:
    """A class that somebody allows."""


def test_object_of_an_allowed_class_that_would_set_its_state_by_a_function() -> None:
    state = attribute("__setstate__", named("builtins", "frozenset"))
    opcodes = named(__name__, "Gauge") + b")\x81" + state + b"b" + NESTED + b"\x85b"
    with torch.serialization.safe_globals([Gauge]):
        assert "sets its state by a function" in refused(entry(opcodes)).reason


def test_attributes_are_kept() -> None:
    parameter, tensor = torch.nn.Parameter(torch.ones(2)), torch.zeros(3)
    for value in (parameter, tensor):
        value.tensor_model_parallel, value.partition = True, (1, [2])  # type: ignore[attr-defined]
    loaded = load(record([parameter, tensor]))
    assert [type(value) for value in loaded] == [torch.nn.Parameter, torch.Tensor]
    for value, saved in zip(loaded, (parameter, tensor), strict=True):
        assert vars(value) == vars(saved)
        assert torch.equal(value, saved)


def test_states_as_torch_wrote_them_before_0_4() -> None:
    state = b"(" + storage() + place(2, 2, 1) + b"t"
    for cls in ("FloatTensor", "Tensor"):
        data = archive(b"\x80\x02" + named("torch", cls) + b")R" + state + b"b.", torch.arange(4.0).numpy().tobytes())
        assert load(data).tolist() == torch.load(io.BytesIO(data), weights_only=False).tolist() == [1.0, 3.0]
    # A parameter: whether it requires a gradient, whether it is volatile, its hooks.
    made = named("torch.nn.parameter", "Parameter") + b"(" + rebuilt() + b"\x88tR"
    data = entry(made + b"\x89\x89" + HOOKS + b"\x87b")
    for loaded in (load(data), torch.load(io.BytesIO(data), weights_only=False)):
        assert type(loaded) is torch.nn.Parameter
        assert not loaded.requires_grad
