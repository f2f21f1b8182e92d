"""Differential tests: destinations that are more than plain tensors."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import (
    Entry,
    assert_same_load,
    fast_reader,
    fill,
    image,
    load_with,
    save,
    torch_load,
    torch_reader,
    write_checkpoint,
)
from tensor_subclasses import Attributed, Functional, Misshapen, Negated, Plain

import dcp_fast
from dcp_fast import _native
from dcp_fast.transfer.destinations import DTYPES, HOST, PLAIN_TENSORS

FLOAT = torch.float32


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    return save(tmp_path / "ckpt", {"t": fill((6, 4), FLOAT), "u": fill((3,), FLOAT, 1)})


def pair(make: Callable[[], torch.Tensor]) -> Callable[[], dict[str, Any]]:
    return lambda: {"t": make(), "u": torch.zeros(3)}


# What is found out natively


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype is not None and not dtype.is_complex], ids=str)
def test_plain_tensors_are_known_without_asking_them(dtype: torch.dtype) -> None:
    if dtype.itemsize == 1 and "bits" in str(dtype):
        pytest.skip("DLPack has no name for it")
    base = torch.empty(6, 8, dtype=dtype)
    parts = [base[1:3], base[:, 2:5], base.t(), torch.empty(0, dtype=dtype), torch.empty((), dtype=dtype)]
    rows, all_have_addresses = PLAIN_TENSORS.rows(parts, lambda tensor: pytest.fail(f"{tensor.dtype} is not plain"))
    expected = []
    for tensor in parts:
        expected += [tensor.data_ptr(), HOST, DTYPES.index(dtype), dtype.itemsize, tensor.dim()]
        expected += [*tensor.size(), *tensor.stride()]
    assert list(memoryview(rows)) == expected
    assert all_have_addresses


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch._neg_view(torch.zeros(3)),
        lambda: torch.zeros(3).to_sparse(),
        lambda: torch.zeros(3, device="meta"),
        lambda: torch.zeros(3, dtype=torch.complex64),
        lambda: torch.quantize_per_tensor(torch.zeros(3), 1.0, 0, torch.qint8),
        lambda: Plain(torch.zeros(3)),
    ],
    ids=["negated", "sparse", "meta", "complex", "quantized", "subclass"],
)
@pytest.mark.filterwarnings("ignore:.*quantized tensor.*:UserWarning")
def test_other_tensors_are_asked(make: Callable[[], torch.Tensor]) -> None:
    asked = []

    def other(tensor: torch.Tensor) -> tuple[int, ...]:
        asked.append(tensor)
        return (1, HOST, 0, 4, 1, 3, 1)

    tensor = make()
    PLAIN_TENSORS.rows([tensor], other)
    assert len(asked) == 1
    assert asked[0] is tensor


@pytest.mark.parametrize("dtype", [torch.int1, torch.int4, torch.uint1, torch.uint4], ids=str)
@pytest.mark.parametrize("from_dtype", [torch.int8, torch.uint8, torch.float32], ids=str)
def test_dtypes_that_dlpack_calls_the_same(tmp_path: Path, dtype: torch.dtype, from_dtype: torch.dtype) -> None:
    """What fills a byte with fewer bits is not an int8 or uint8: torch cannot write to it."""
    stored = save(tmp_path / "ckpt", {"t": torch.tensor([7, 100, 3, 1], dtype=from_dtype)})
    for load in (torch_load, dcp_fast.load):
        memory = torch.full((4,), 9, dtype=torch.uint8)
        with pytest.raises(dcp.api.CheckpointException):
            load({"t": memory.view(dtype)}, checkpoint_id=stored)
        assert memory.tolist() == [9] * 4


def test_tensors_that_dlpack_refuses_do_not_take_long() -> None:
    tensors = [torch.zeros(3, device="meta") for _ in range(5000)]
    start = time.process_time()
    PLAIN_TENSORS.rows(tensors, lambda _: (0, HOST, 0, 4, 1, 3, 1))
    assert time.process_time() - start < 1  # of each of them it takes a millisecond


# Autograd


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parameter", [True, False])
def test_leaf_that_requires_grad(stored: Path, dtype: torch.dtype, parameter: bool) -> None:
    def make() -> torch.Tensor:
        tensor = torch.zeros(6, 4, dtype=dtype)
        return torch.nn.Parameter(tensor) if parameter else tensor.requires_grad_()

    outcome = assert_same_load(stored, pair(make), fallback=0)
    assert outcome.state["t"].is_leaf
    assert outcome.state["t"].grad_fn is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])  # the last one: by torch
def test_backward_notices_the_load(stored: Path, dtype: torch.dtype) -> None:
    for load in (torch_load, dcp_fast.load):
        weight = torch.zeros(6, 4, dtype=dtype, requires_grad=True)
        version = weight._version
        product = (weight * weight).sum().abs()
        load_with(load, {"t": weight}, checkpoint_id=stored)
        assert weight._version > version, load
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


def test_view_of_a_parameter_keeps_its_graph(stored: Path) -> None:
    def make() -> torch.Tensor:
        weight = torch.nn.Parameter(torch.zeros(8, 4))
        return weight[1:7]

    outcome = assert_same_load(stored, pair(make))
    outcome.state["t"].sum().backward()


def test_unrelated_version_counters_stay(stored: Path) -> None:
    base = torch.zeros(20, 4)
    other = torch.zeros(3)
    dcp_fast.load({"t": base[2:8]}, checkpoint_id=stored)
    assert base._version > 0
    assert other._version == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])  # the last one: by torch
@pytest.mark.parametrize("inside", [True, False])
def test_inference_tensor(stored: Path, inside: bool, dtype: torch.dtype) -> None:
    def make() -> torch.Tensor:
        with torch.inference_mode():
            return torch.zeros(6, 4, dtype=dtype)

    with torch.inference_mode(inside):
        assert_same_load(stored, pair(make))


def test_normal_tensor_in_inference_mode(stored: Path) -> None:
    tensors = [torch.zeros(6, 4), torch.zeros(6, 4)]
    with torch.inference_mode():
        assert_same_load(stored, pair(lambda: tensors.pop()))


# Tensor subclasses


@pytest.mark.parametrize("cls", [Plain, Attributed, Misshapen, Functional])
def test_subclass(stored: Path, cls: type[torch.Tensor]) -> None:
    Functional.calls = 0
    outcome = assert_same_load(stored, pair(lambda: torch.zeros(6, 4).as_subclass(cls)))
    assert type(outcome.state["t"]) is cls
    if cls is Functional:
        assert Functional.calls >= 2, "copy_ belongs to the subclass"


def test_parameter_of_a_subclass(stored: Path) -> None:
    assert_same_load(stored, pair(lambda: torch.nn.Parameter(torch.zeros(6, 4).as_subclass(Attributed))))


@pytest.mark.parametrize("options", [{}, {"staging_bytes": 1}])
def test_wrapper_subclass(stored: Path, options: dict[str, Any]) -> None:
    assert_same_load(stored, pair(lambda: Negated.make(torch.zeros(6, 4))), options=options)
    assert_same_load(stored, pair(lambda: Negated.make(torch.zeros(4, 6).t())), options=options)


@pytest.mark.parametrize("first", ["wrapper", "wrapped"])
def test_wrapper_and_what_it_wraps(tmp_path: Path, first: str) -> None:
    save(tmp_path, {"a": torch.full((5,), 1.0), "b": torch.full((5,), 2.0)})

    def make() -> dict[str, Any]:
        wrapped = torch.zeros(5)
        pair = (Negated.make(wrapped), wrapped)
        return dict(zip("ab", pair if first == "wrapper" else pair[::-1], strict=True))

    assert_same_load(tmp_path, make)


def test_subclass_on_the_stored_side(tmp_path: Path) -> None:
    write_checkpoint(
        tmp_path,
        {"p": Entry.of(torch.nn.Parameter(fill((5, 3), FLOAT))), "b": Entry.of(torch.nn.Buffer(fill((4,), FLOAT)))},
    )
    assert_same_load(tmp_path, lambda: {"p": torch.zeros(5, 3), "b": torch.zeros(4)}, fallback=None)


def test_stored_class_that_weights_only_refuses(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"t": Entry.of(fill((5,), FLOAT).as_subclass(Attributed))})
    outcome = load_with(torch_load, {"t": torch.zeros(5)}, storage_reader=torch_reader(tmp_path))
    raises = None if outcome.errors is None else type(outcome.errors[0])
    assert_same_load(tmp_path, lambda: {"t": torch.zeros(5)}, fallback=None, raises=raises)


def test_copy_on_write_destination(stored: Path) -> None:
    for load in (torch_load, dcp_fast.load):
        original = torch.zeros(6, 4)
        lazy = torch._lazy_clone(original)
        load_with(load, {"t": lazy}, checkpoint_id=stored)
        assert original.count_nonzero() == 0, load
        assert lazy.count_nonzero() > 0


def test_shared_memory_and_numpy_destinations(stored: Path) -> None:
    numpy = pytest.importorskip("numpy")
    assert_same_load(stored, pair(lambda: torch.from_numpy(numpy.zeros((6, 8), dtype="float32")[:, ::2])))
    assert_same_load(stored, pair(lambda: torch.zeros(6, 4).share_memory_()))


# Other layouts and quantized tensors: whatever torch does with them, dcp_fast does too.


def quantized(values: torch.Tensor) -> torch.Tensor:
    return torch.quantize_per_tensor(values, 0.1, 3, torch.qint8)


def per_channel(values: torch.Tensor) -> torch.Tensor:
    return torch.quantize_per_channel(values, torch.full((6,), 0.1), torch.zeros(6), 0, torch.qint8)


KINDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "dense": lambda values: values,
    "qint8": quantized,
    "per_channel": per_channel,
    "quint4x2": lambda v: torch.quantize_per_channel(v, torch.full((6,), 0.1), torch.zeros(6), 0, torch.quint4x2),
    "sparse": lambda values: values.to_sparse(),
    "csr": lambda values: values.to_sparse_csr(),
    "mkldnn": lambda values: values.to_mkldnn(),
    "meta": lambda values: values.to("meta"),
}


@pytest.mark.parametrize("wanted", KINDS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mkldnn"])  # which torch.save refuses
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:.*quantiz.*", "ignore:.*deprecat.*")
def test_kinds_of_tensors(tmp_path: Path, kind: str, wanted: str) -> None:
    values = (torch.arange(24.0).view(6, 4) % 5) / 10
    write_checkpoint(tmp_path, {"t": Entry.of(KINDS[kind](values))})
    make = lambda: {"t": KINDS[wanted](torch.ones(6, 4))}  # noqa: E731
    outcome = load_with(torch_load, make(), storage_reader=torch_reader(tmp_path))
    error = None if outcome.errors is None else next(iter(outcome.errors.values()))
    assert_same_load(tmp_path, make, fallback=None, raises=error and type(error), changes=kind != "sparse")


@pytest.mark.parametrize("chunk", ["rows", "columns"])
def test_quantized_destination_of_chunks(tmp_path: Path, chunk: str) -> None:
    values = torch.arange(24.0).view(6, 4) / 10
    parts = {
        "rows": [((0, 0), values[:2]), ((2, 0), values[2:])],
        "columns": [((0, 0), values[:, :1]), ((0, 1), values[:, 1:])],
    }
    write_checkpoint(tmp_path, {"t": Entry((6, 4), FLOAT, parts[chunk])})
    make = lambda: {"t": quantized(torch.ones(6, 4))}  # noqa: E731
    outcome = load_with(torch_load, make(), storage_reader=torch_reader(tmp_path))
    error = None if outcome.errors is None else outcome.errors[0]
    assert_same_load(tmp_path, make, fallback=None, raises=error and type(error))
    if error is None:
        assert_same_load(tmp_path, make, fallback=None, options={"staging_bytes": 100})


# Devices


def test_meta_tensors(stored: Path, gloo: None) -> None:
    outcome = assert_same_load(stored, lambda: {"t": torch.zeros(6, 4, device="meta"), "u": torch.zeros(3)})
    assert outcome.state["t"].device.type == "cpu"
    assert_same_load(stored, lambda: {"t": torch.zeros(4, 6, device="meta").t(), "u": torch.zeros(3, device="meta")})
    assert_same_load(stored, pair(lambda: torch.zeros(6, 4, dtype=torch.bfloat16, device="meta")))


def test_meta_tensors_in_containers(tmp_path: Path, gloo: None) -> None:
    save(tmp_path / "ckpt", {"a": {"x": fill((3,), FLOAT)}, "b": [fill((2,), FLOAT), fill((4,), FLOAT)]})
    meta = torch.device("meta")
    assert_same_load(
        tmp_path / "ckpt",
        lambda: {"a": {"x": torch.zeros(3, device=meta)}, "b": [torch.zeros(2, device=meta), torch.zeros(4)]},
    )


def test_meta_tensors_without_a_process_group(stored: Path) -> None:
    make = pair(lambda: torch.zeros(6, 4, device="meta"))
    outcome = load_with(torch_load, make(), storage_reader=torch_reader(stored))
    error = None if outcome.errors is None else outcome.errors[0]
    assert_same_load(stored, make, raises=error and type(error))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])  # the last one: by torch
@pytest.mark.parametrize("how", ["context", "default"])
def test_default_device_does_not_matter(stored: Path, how: str, dtype: torch.dtype) -> None:
    states = [{"t": torch.zeros(6, 4, dtype=dtype), "u": torch.zeros(3)} for _ in range(2)]
    if how == "context":
        with torch.device("meta"):
            outcomes = [
                load_with(load, state, storage_reader=reader(stored))
                for load, reader, state in zip(
                    (torch_load, dcp_fast.load), (torch_reader, fast_reader), states, strict=True
                )
            ]
    else:
        torch.set_default_device("meta")
        try:
            outcomes = [
                load_with(load, state, storage_reader=reader(stored))
                for load, reader, state in zip(
                    (torch_load, dcp_fast.load), (torch_reader, fast_reader), states, strict=True
                )
            ]
        finally:
            torch.set_default_device(None)
    assert outcomes[0].errors is None
    assert outcomes[1].errors is None, outcomes[1].errors
    assert outcomes[1].image() == outcomes[0].image()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])  # the last one: by torch
def test_default_dtype_and_deterministic_fill_do_not_matter(stored: Path, dtype: torch.dtype) -> None:
    torch.set_default_dtype(torch.float16)
    torch.use_deterministic_algorithms(True)
    try:
        assert_same_load(stored, pair(lambda: torch.zeros(6, 4, dtype=dtype)))
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)


def test_fake_tensors(stored: Path) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        states = [{"t": torch.zeros(6, 4)} for _ in range(2)]
    results = [
        load_with(torch_load, states[0], storage_reader=torch_reader(stored)),
        load_with(dcp_fast.load, states[1], storage_reader=fast_reader(stored)),
    ]
    expected, actual = (None if result.errors is None else type(result.errors[0]) for result in results)
    assert actual is expected
    assert type(states[1]["t"]) is type(states[0]["t"])


def test_a_state_dict_is_changed_in_place(stored: Path) -> None:
    tensor = torch.zeros(6, 4)
    state = {"t": tensor}
    before = image(state)
    dcp.load(state, storage_reader=fast_reader(stored))
    assert state["t"] is tensor
    assert image(state) != before


# Destinations that have no address, so that the load goes item by item


def test_layouts_are_read_once(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    open_files = _native.open_files

    def counted(*args: Any) -> Any:
        calls.append(1)
        return open_files(*args)

    monkeypatch.setattr(_native, "open_files", counted)
    assert_same_load(stored, pair(lambda: Negated.make(torch.zeros(6, 4))))
    report = dcp_fast.last_report()
    assert len(calls) == 1
    assert report is not None
    assert report.records == 2


# Tensors whose own attributes hide what is asked of them


@pytest.mark.parametrize(
    ("name", "value"),
    [("stride", 5), ("stride", (3,)), ("data_ptr", None), ("data_ptr", 64), ("is_neg", True)],
)
def test_attributes_that_hide_methods(stored: Path, name: str, value: Any) -> None:
    def make() -> torch.Tensor:
        tensor = torch.zeros(6, 4)
        setattr(tensor, name, lambda: value)
        return tensor

    states = [{"t": make()}, {"t": make()}]
    torch_load(states[0], storage_reader=torch_reader(stored))
    dcp_fast.load(states[1], storage_reader=fast_reader(stored))
    assert torch.Tensor.equal(states[0]["t"], fill((6, 4), FLOAT))
    assert torch.Tensor.equal(states[1]["t"], fill((6, 4), FLOAT))


def test_strided_tensors_without_an_address(stored: Path) -> None:
    """torch copies to them; there is no memory for the engine."""
    state = {"t": torch._to_functional_tensor(torch.zeros(6, 4)), "u": torch.zeros(3)}
    dcp_fast.load(state, storage_reader=fast_reader(stored))
    torch._sync(state["t"])
    assert torch._from_functional_tensor(state["t"]).equal(fill((6, 4), FLOAT))
