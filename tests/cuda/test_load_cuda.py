"""Differential tests: destinations of all kinds on CUDA devices."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from fuzz_cases import CONVERSIONS
from helpers import (
    DTYPES,
    Entry,
    ShardedBuffer,
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
from tensor_subclasses import Functional, Negated, Plain
from torch.distributed.checkpoint._extension import ZStandard

import dcp_fast
from dcp_fast import _native

FLOAT = torch.float32
MIN_BYTES = 1 << 20  # of pinned memory and of staging on a device


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """Numbers: what becomes of the payload of a NaN in a conversion is up to the device."""
    return save(tmp_path / "stored", {"t": torch.arange(24.0).view(6, 4) / 7, "u": torch.arange(3.0)})


def pair(make: Callable[[], torch.Tensor], cuda: torch.device) -> Callable[[], dict[str, Any]]:
    return lambda: {"t": make(), "u": torch.zeros(3, device=cuda)}


def report() -> dcp_fast.LoadReport:
    last = dcp_fast.last_report()
    assert last is not None
    return last


# Types


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
def test_dtypes(cuda: torch.device, tmp_path: Path) -> None:
    stored = {str(dtype).replace(".", "_"): fill((17, 5), dtype, i) for i, dtype in enumerate(DTYPES)}
    write_checkpoint(tmp_path, {name: Entry.of(tensor) for name, tensor in stored.items()})

    def make(*inner: int) -> dict[str, Any]:
        return {name: torch.zeros(17, 5, *inner, dtype=tensor.dtype, device=cuda) for name, tensor in stored.items()}

    assert_same_load(tmp_path, make)
    assert_same_load(tmp_path, lambda: {name: tensor[..., 1] for name, tensor in make(2).items()})
    assert report().staged_items == 0


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_conversions(cuda: torch.device, tmp_path: Path, layout: str) -> None:
    values = torch.arange(-99, 100)
    pairs = [(a, b) for a in CONVERSIONS for b in CONVERSIONS if a != b]
    entries = {f"{a} {b}": Entry.of(values[: 11 * 17].view(11, 17).to(a)) for a, b in pairs}
    write_checkpoint(tmp_path, entries)

    def make() -> dict[str, Any]:
        sizes = (11, 17) if layout == "contiguous" else (17, 11)
        state = {f"{a} {b}": torch.zeros(sizes, dtype=b, device=cuda) for a, b in pairs}
        return state if layout == "contiguous" else {name: tensor.t() for name, tensor in state.items()}

    assert_same_load(tmp_path, make)
    assert report().staged_items == len(pairs)


@pytest.mark.parametrize("synchronize", [True, False])
def test_conversion_in_batches(cuda: torch.device, tmp_path: Path, synchronize: bool) -> None:
    """More than the staging memory holds, in one tensor and in many."""
    save(tmp_path, {"large": torch.randn(700, 1000), **{f"t{i}": torch.randn(40, 100) for i in range(40)}})

    def make() -> dict[str, Any]:
        small = {f"t{i}": torch.zeros(40, 100, dtype=torch.float64, device=cuda) for i in range(40)}
        return {"large": torch.zeros(700, 1000, dtype=torch.bfloat16, device=cuda), **small}

    limits = {"device_staging_bytes": MIN_BYTES, "pinned_bytes": MIN_BYTES, "synchronize": synchronize}
    assert_same_load(tmp_path, make, options=limits)
    state = make()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    dcp_fast.load(state, storage_reader=fast_reader(tmp_path, **limits))
    assert torch.cuda.max_memory_allocated() - before <= MIN_BYTES // 2
    assert report().device_staging_bytes <= MIN_BYTES
    assert report().pinned_bytes <= MIN_BYTES
    assert report().staged_items == 41


def test_conversion_takes_no_more_memory_than_it_needs(cuda: torch.device, tmp_path: Path) -> None:
    save(tmp_path, {"t": torch.arange(1000.0)})
    state = {"t": torch.zeros(1000, dtype=torch.float64, device=cuda)}
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    dcp_fast.load(state, storage_reader=fast_reader(tmp_path))
    assert state["t"].tolist() == list(range(1000))
    assert torch.cuda.max_memory_allocated() - before <= 8192


# Layouts

SIZE = (6, 4, 5, 7)
LAYOUTS: dict[str, Callable[[torch.device], torch.Tensor]] = {
    "contiguous": lambda device: torch.zeros(SIZE, device=device),
    "permuted": lambda device: torch.zeros(7, 4, 5, 6, device=device).permute(3, 1, 2, 0),
    "channels_last": lambda device: torch.zeros(SIZE, device=device).to(memory_format=torch.channels_last),
    "padded": lambda device: torch.zeros(8, 5, 6, 9, device=device)[1:7, 1:, :5, 1:8],
    "strided": lambda device: torch.zeros(12, 4, 10, 14, device=device)[::2, :, 1::2, ::2],
    "unaligned": lambda device: torch.zeros(6 * 4 * 5 * 7 + 1, device=device)[1:].view(SIZE),
    "rows": lambda device: ShardedBuffer.make(SIZE, [(2, 0, 0, 0)], [torch.zeros(3, 4, 5, 7, device=device)]),
    "columns": lambda device: ShardedBuffer.make(SIZE, [(0, 0, 0, 2)], [torch.zeros(6, 4, 5, 3, device=device)]),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_layouts(cuda: torch.device, tmp_path: Path, kind: str) -> None:
    whole = fill(SIZE, FLOAT)
    halves = [((0, 0, 0, 0), whole[:, :3].clone()), ((0, 3, 0, 0), whole[:, 3:].clone())]
    write_checkpoint(tmp_path, {"t": Entry.of(whole), "halves": Entry(whole.shape, FLOAT, halves)})
    assert_same_load(tmp_path, lambda: {"t": LAYOUTS[kind](cuda), "halves": LAYOUTS[kind](cuda)})


def test_stored_layouts(cuda: torch.device, tmp_path: Path) -> None:
    """Records that hold more than a contiguous tensor."""
    base = fill((10, 12), FLOAT)
    views = {"t": base.t(), "slice": base[2:9, 3:11:2], "row": base[3], "expanded": base[:1].expand(10, 12)}
    write_checkpoint(tmp_path, {name: Entry.of(view) for name, view in views.items()})
    make = lambda: {name: torch.zeros(view.shape, device=cuda) for name, view in views.items()}  # noqa: E731
    assert_same_load(tmp_path, make, fallback=None)


def test_no_dimensions_and_no_elements(cuda: torch.device, tmp_path: Path) -> None:
    save(tmp_path, {"scalar": fill((), torch.float64), "empty": torch.zeros(0, 3), "hollow": torch.zeros(4, 0, 2)})
    sizes: dict[str, tuple[int, ...]] = {"scalar": (), "empty": (0, 3), "hollow": (4, 0, 2)}
    for dtype in (torch.float64, torch.float32):
        make = lambda dtype=dtype: {name: torch.zeros(s, dtype=dtype, device=cuda) for name, s in sizes.items()}  # noqa: E731
        assert_same_load(tmp_path, make)
    assert_same_load(tmp_path, lambda: {"empty": torch.zeros(0, 3, device=cuda)}, changes=False)
    assert report().device_copies == 0


# Destinations that share memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tied_tensors(cuda: torch.device, tmp_path: Path, dtype: torch.dtype) -> None:
    """Of several entries that go to the same place the last one in torch's order stays."""
    save(tmp_path, {name: fill((50, 30), FLOAT, seed) for seed, name in enumerate("abcd")})

    def make() -> dict[str, Any]:
        tied = torch.zeros(50, 30, dtype=dtype, device=cuda)
        return {"a": tied, "b": tied.view(50, 30), "c": tied, "d": torch.zeros(50, 30, device=cuda)}

    assert_same_load(tmp_path, make)


def test_overlapping_slices(cuda: torch.device, tmp_path: Path) -> None:
    save(tmp_path, {name: fill((40, 30), FLOAT, seed) for seed, name in enumerate("abc")})

    def make() -> dict[str, Any]:
        base = torch.zeros(100, 64, device=cuda)
        return {"a": base[:40, :30], "b": base[20:60, 10:40], "c": base[:80, 5:35][::2]}

    assert_same_load(tmp_path, make)


# Where destinations lie


def test_pinned_host_memory(cuda: torch.device, tmp_path: Path) -> None:
    save(tmp_path, {"a": fill((300, 20), FLOAT), "b": fill((9,), FLOAT), "c": fill((5, 5), FLOAT)})

    def make() -> dict[str, Any]:
        pinned = torch.zeros(300, 20, pin_memory=True)
        transposed = torch.zeros(5, 5, pin_memory=True).t()
        return {"a": pinned, "b": torch.zeros(9, device=cuda), "c": transposed}

    outcome = assert_same_load(tmp_path, make)
    assert outcome.state["a"].is_pinned()


@pytest.mark.parametrize("synchronize", [True, False])
def test_devices_and_host_in_one_load(
    two_devices: tuple[torch.device, torch.device], tmp_path: Path, synchronize: bool
) -> None:
    names = [f"t{i}" for i in range(12)]
    save(tmp_path, {name: torch.randn(200, 30) for name in names} | {"n": {"step": 3}})
    places = [torch.device("cpu"), *two_devices]

    def make() -> dict[str, Any]:
        state: dict[str, Any] = {"n": {"step": 0}}
        for i, name in enumerate(names):
            dtype = torch.float16 if i % 5 == 4 else FLOAT
            tensor = torch.zeros(200, 30, dtype=dtype, device=places[i % 3])
            state[name] = tensor if i % 4 else tensor.t().contiguous().t()
        return state

    assert_same_load(tmp_path, make, options={"synchronize": synchronize})
    assert torch.cuda.current_device() == 0


def test_shards_of_one_tensor_on_two_devices(two_devices: tuple[torch.device, torch.device], tmp_path: Path) -> None:
    save(tmp_path, {"t": fill((64, 48), FLOAT)})

    def make() -> dict[str, Any]:
        shards = [torch.zeros(64, 24, device=device) for device in two_devices]
        return {"t": ShardedBuffer.make((64, 48), [(0, 0), (0, 24)], shards)}

    assert_same_load(tmp_path, make)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_another_current_device(
    two_devices: tuple[torch.device, torch.device], stored: Path, dtype: torch.dtype
) -> None:
    with torch.cuda.device(1):
        assert_same_load(stored, lambda: {"t": torch.zeros(6, 4, dtype=dtype, device=two_devices[0])})
        assert torch.cuda.current_device() == 1
    with torch.device("cuda:1"):
        assert_same_load(stored, lambda: {"t": torch.zeros(6, 4, dtype=dtype, device=two_devices[0])})
        assert_same_load(stored, lambda: {"t": torch.zeros(6, 4, dtype=dtype, device="cpu")})


# Tensors that are more than their memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parameter", [True, False])
def test_leaf_that_requires_grad(cuda: torch.device, stored: Path, dtype: torch.dtype, parameter: bool) -> None:
    def make() -> torch.Tensor:
        tensor = torch.zeros(6, 4, dtype=dtype, device=cuda)
        return torch.nn.Parameter(tensor) if parameter else tensor.requires_grad_()

    outcome = assert_same_load(stored, pair(make, cuda))
    assert outcome.state["t"].is_leaf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_backward_notices_the_load(cuda: torch.device, stored: Path, dtype: torch.dtype) -> None:
    weight = torch.zeros(6, 4, dtype=dtype, requires_grad=True, device=cuda)
    version = weight._version
    product = (weight * weight).sum()
    dcp_fast.load({"t": weight}, checkpoint_id=stored)
    assert weight._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inference_tensor(cuda: torch.device, stored: Path, inside: bool, dtype: torch.dtype) -> None:
    def make() -> torch.Tensor:
        with torch.inference_mode():
            return torch.zeros(6, 4, dtype=dtype, device=cuda)

    with torch.inference_mode(inside):
        assert_same_load(stored, pair(make, cuda))


@pytest.mark.parametrize("cls", [Plain, Functional])
def test_subclass(cuda: torch.device, stored: Path, cls: type[torch.Tensor]) -> None:
    Functional.calls = 0
    outcome = assert_same_load(stored, pair(lambda: torch.zeros(6, 4, device=cuda).as_subclass(cls), cuda))
    assert type(outcome.state["t"]) is cls
    if cls is Functional:
        assert Functional.calls >= 2, "copy_ belongs to the subclass"


@pytest.mark.parametrize("synchronize", [True, False])
def test_wrapper_subclass(cuda: torch.device, stored: Path, synchronize: bool) -> None:
    options = {"synchronize": synchronize}
    assert_same_load(stored, pair(lambda: Negated.make(torch.zeros(6, 4, device=cuda)), cuda), options=options)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_lazy_views(cuda: torch.device, tmp_path: Path, dtype: torch.dtype) -> None:
    parts = torch.arange(60.0).view(30, 2)
    save(tmp_path, {"conj": torch.view_as_complex(parts), "neg": parts.clone()})

    def make() -> dict[str, Any]:
        real = torch.float64 if dtype == torch.complex128 else FLOAT
        neg = torch._neg_view(torch.zeros(30, 2, dtype=real, device=cuda))
        return {"conj": torch.zeros(30, dtype=dtype, device=cuda).conj(), "neg": neg}

    assert_same_load(tmp_path, make)


def test_meta_tensors_that_a_planner_materializes(cuda: torch.device, stored: Path) -> None:
    def materializing(base: Any) -> Any:
        class Materializing(base):  # type: ignore[misc]
            def set_up_planner(self, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
                for key, value in state_dict.items():
                    state_dict[key] = torch.zeros_like(value, device=cuda)
                super().set_up_planner(state_dict, *args, **kwargs)

        return Materializing

    states = [{"t": torch.zeros(6, 4, device="meta"), "u": torch.zeros(3, device="meta")} for _ in range(2)]
    torch_load(states[0], storage_reader=torch_reader(stored), planner=materializing(dcp.DefaultLoadPlanner)())
    dcp_fast.load(states[1], storage_reader=fast_reader(stored), planner=materializing(dcp_fast.DefaultLoadPlanner)())
    assert states[1]["t"].device == cuda
    assert image(states[1]) == image(states[0])


# Records that torch.load reads


def test_legacy_records_and_values(cuda: torch.device, tmp_path: Path) -> None:
    entries = {"old": Entry.of(fill((9, 3), FLOAT), legacy=True), "new": Entry.of(fill((5,), FLOAT))}
    write_checkpoint(tmp_path, {**entries, "value": Entry(value={"lr": 0.1})})
    make = lambda: {"old": torch.zeros(3, 9, device=cuda).t(), "new": torch.zeros(5, device=cuda), "value": 0}  # noqa: E731
    assert_same_load(tmp_path, make, fallback=1)


@pytest.mark.filterwarnings("ignore:.*quantiz.*", "ignore:.*deprecat.*")
def test_quantized_record(cuda: torch.device, tmp_path: Path) -> None:
    quantized = torch.quantize_per_tensor(torch.arange(24.0).view(6, 4) / 10, 0.1, 3, torch.qint8)
    write_checkpoint(tmp_path, {"t": Entry.of(quantized)})
    make = lambda: {"t": torch.zeros(6, 4, device=cuda)}  # noqa: E731
    outcome = load_with(torch_load, make(), storage_reader=torch_reader(tmp_path))
    error = None if outcome.errors is None else next(iter(outcome.errors.values()))
    assert_same_load(tmp_path, make, fallback=None, raises=error and type(error))


def test_zstd(cuda: torch.device, tmp_path: Path) -> None:
    pytest.importorskip("zstandard")
    save(tmp_path, {"a": fill((30, 31), FLOAT), "b": fill((7,), torch.int64)}, _extensions=[ZStandard()])
    make = lambda: {"a": torch.zeros(30, 31, device=cuda), "b": torch.zeros(7, dtype=torch.int64, device=cuda)}  # noqa: E731
    assert_same_load(tmp_path, make, fallback=2)


# Several ranks of one node


@pytest.mark.parametrize("rank", [0, 2])
def test_slots_from_a_place_of_its_own(
    cuda: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    stored = {f"t{i}": fill((300, 1000), FLOAT, i) for i in range(5)}
    save(tmp_path, stored)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    # As if none of it was in the page cache.
    with _native.FaultInjection("pread_nowait", nth=0, error_number=errno.EAGAIN, repeat=1 << 30):
        assert_same_load(tmp_path, lambda: {name: torch.zeros(300, 1000, device=cuda) for name in stored})
        assert report().files_shared_on_node == 1
        assert_same_load(tmp_path, lambda: {name: torch.zeros(300, 2000, device=cuda)[:, ::2] for name in stored})
