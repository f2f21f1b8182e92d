"""Entries that hold tensors: their storages are as torch.load makes them."""

from __future__ import annotations

import io
from typing import Any

import numpy
import pytest
import torch
from damage import archive
from helpers import image
from hostile_pickles import refused
from inert_values import facts, record
from torch._subclasses.fake_tensor import FakeTensorMode

import dcp_fast.values.load
from dcp_fast.errors import CorruptCheckpointError
from dcp_fast.values.load import load_untrusted

BASE = torch.arange(6, dtype=torch.float64)
VALUES: dict[str, Any] = {
    "views of one storage": [BASE, BASE[2:], BASE.view(2, 3).t()],
    "a tensor and its storage": [BASE, BASE.storage()],
    "nothing": [torch.zeros(0), torch.zeros(2, 0)],
    "many types": [
        torch.ones(3).to(t) for t in (torch.bfloat16, torch.bool, torch.complex64, torch.uint8, torch.int16)
    ],
    "8 bits": [torch.ones(3).to(torch.float8_e4m3fn), torch.ones(2, dtype=torch.uint16)],
    "a parameter": torch.nn.Parameter(torch.ones(2)),
    "meta": torch.ones(3, device="meta"),
    "sparse": [torch.eye(3).to_sparse(), torch.eye(3).to_sparse_csr()],
    "conjugated": torch.ones(2, dtype=torch.complex64).conj(),
    "beside others": [torch.ones(2), numpy.arange(3), {"a": {1}}],
}


def load(data: bytes) -> Any:
    return load_untrusted(io.BytesIO(data), "value")


def sizes_of(value: Any) -> list[int]:
    tensors = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, torch.Tensor)]
    dense = [tensor.untyped_storage() for tensor in tensors if tensor.layout is torch.strided]
    return [storage.nbytes() for storage in dense]


@pytest.mark.filterwarnings("ignore:.*beta state", "ignore:.*TypedStorage is deprecated")
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", VALUES)
def test_as_torch_loads_it(monkeypatch: pytest.MonkeyPatch, name: str, protocol: int) -> None:
    data = record(VALUES[name], protocol)
    expected = torch.load(io.BytesIO(data), weights_only=False)
    if name != "nothing":  # the native parser leaves storages without bytes to torch
        monkeypatch.delattr(dcp_fast.values.load, "load_archive")  # which takes twice as long
    loaded = load(data)
    if name == "beside others":
        assert facts(loaded) == facts(expected)
    else:
        assert str(loaded) == str(expected)
    assert sizes_of(loaded) == sizes_of(expected)
    assert torch.serialization._serialization_tls.map_location is None


def test_views_share_memory_and_not_that_of_the_entry() -> None:
    entry = io.BytesIO(record(VALUES["views of one storage"]))
    whole, part, _ = load_untrusted(entry, "value")
    assert part.data_ptr() == whole.data_ptr() + 16
    entry.getbuffer()[:] = bytes(len(entry.getvalue()))
    assert image(whole) == image(BASE)
    entry.write(bytes(10_000))  # so nothing holds its memory


@pytest.mark.filterwarnings("ignore:.*beta state", "ignore:.*TypedStorage is deprecated")
@pytest.mark.parametrize("name", VALUES)
def test_under_another_default_device(name: str) -> None:
    data = record(VALUES[name])
    with torch.device("meta"):
        try:
            expected = str(torch.load(io.BytesIO(data), weights_only=name == "sparse"))
        except NotImplementedError:  # the check of sparse tensors, which torch 2.14 and later make then
            assert isinstance(refused(data), CorruptCheckpointError)
        else:
            assert str(load(data)) == expected


def test_torch_s_settings_are_heeded() -> None:
    data = record([BASE])
    with FakeTensorMode():
        (loaded,) = load(data)
        (expected,) = torch.load(io.BytesIO(data), weights_only=False)
    assert type(loaded) is type(expected)
    with torch.serialization.skip_data():
        (loaded,) = load(data)
    assert loaded.shape == BASE.shape


def test_a_location_that_is_not_there() -> None:
    data = record([BASE])
    assert b"X\x03\0\0\0cpu" in data
    pickled = data[data.index(b"\x80\x02]") : data.index(b"a.", data.index(b"\x80\x02]")) + 2]
    error = refused(archive(pickled.replace(b"X\x03\0\0\0cpu", b"X\x05\0\0\0where"), bytes(48)))
    assert "don't know how to restore data location" in error.reason
    assert load(archive(pickled, bytes(48)))[0].tolist() == [0.0] * 6
