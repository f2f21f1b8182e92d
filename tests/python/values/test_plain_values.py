"""Bytes entries of plain values are read natively: what torch loads, or left to torch."""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import archive, fast_error, replace_record, torch_error
from helpers import fast_reader, image, load_with, save, torch_load, torch_planner, torch_reader
from inert_values import record
from torch.distributed.checkpoint._extension import ZStandard

import dcp_fast
from dcp_fast import _native
from dcp_fast.errors import LoadError, TruncatedFileError
from dcp_fast.transfer.plan_transfer import PlanTransfer
from dcp_fast.values.load import load_untrusted

shared = [1]
PLAIN: dict[str, Any] = {
    "none": None,
    "bools": [True, False],
    "ints": [0, 255, 256, 65535, 65536, -1, -(1 << 31), 1 << 31, (1 << 63) - 1, -(1 << 63)],
    "floats": [0.1, -0.0, math.inf, math.nan],
    "texts": ["", "a", "\u00e9\u20ac\U0001f600", "\ud800", "long " * 100],
    "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), ((1, ("a",)),)],
    "dict": {"a": 1, 2: [3], None: {}, 1.5: "b", True: ()},
    "shared": [shared, shared, ("text", "text")],
    "many": list(range(3000)),
    "nested": [[[[[["deep"]]]]]],
    "names of all parameters": [f"layers.{i}.weight" for i in range(20_000)],
}
LEFT: dict[str, Any] = {
    "large int": 1 << 63,
    "set": {1},
    "complex": 1j,
    "tensor": [torch.ones(2)],
    "torch.Size": torch.Size([2]),
    "key that is a tuple": {(1, 2): 3},
    "large": ["text" * 300_000],
}


def parse(data: bytes) -> Any:
    return _native.parse_plain_value(data)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", PLAIN)
def test_plain(name: str, protocol: int) -> None:
    data = record(PLAIN[name], protocol)
    assert image(parse(data)) == image(torch.load(io.BytesIO(data), weights_only=False))


@pytest.mark.parametrize("name", LEFT)
def test_left_to_torch(name: str) -> None:
    assert parse(record(LEFT[name])) is ...


def test_what_is_shared_within_a_value() -> None:
    first, second, _ = parse(record(PLAIN["shared"]))
    assert first is second


def test_list_that_contains_itself() -> None:
    value: list[Any] = []
    value.append(value)
    loaded = parse(record(value))
    assert loaded[0] is loaded


@pytest.mark.parametrize("protocol", [2, 4])
def test_flipped_bits(protocol: int) -> None:
    """Every one of them: what torch loads of the same bytes, or left to torch."""
    data = record({"step": (5, 0.5), "names": ["a", None, True]}, protocol)
    kept = 0
    for at in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[at // 8] ^= 1 << at % 8
        loaded = parse(bytes(flipped))
        if loaded is not ...:
            kept += 1
            assert repr(loaded) == repr(torch.load(io.BytesIO(flipped), weights_only=False))
    assert kept > 1000


@pytest.mark.parametrize("protocol", [2, 4])
def test_cut(protocol: int) -> None:
    data = record({"step": (5, 0.5)}, protocol)
    for length in range(len(data)):
        assert parse(data[:length]) is ...


@pytest.mark.parametrize(
    "pickled",
    [
        b"",
        b".",
        b"\x80\x02.",
        b"\x80\x02N",
        b"\x80\x02NN.",
        b"\x80\x02N.N",
        b"\x80\x06N.",
        b"\x80\x02(.",
        b"\x80\x02a.",
        b"\x80\x02t.",
        b"\x80\x02(](K\x01e.",
        b"\x80\x02K\x01K\x02s.",
        b"\x80\x02}(K\x01u.",
        b"\x80\x02]K\x01K\x02s.",
        b"\x80\x02}K\x01a.",
        b"\x80\x02h\0.",
        b"\x80\x02Nq\x05.",
        b"\x80\x02Nr\xff\xff\xff\xff.",
        b"\x80\x02q\0.",
        b"\x80\x02X\xff\xff\xff\xffa.",
        b"\x80\x02B\xff\xff\xff\x7fa.",
        b"\x80\x02X\x01\0\0\0\xff.",
        b"\x80\x02\x8a\x09123456789.",
        b"\x80\x02\x8a\xff1.",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\xffN.",
        b"\x80\x04\x95\x03\0\0\0\0\0\0\0X\x02\0\0\0ab.",  # an opcode goes over the end of its frame
        b"\x80\x04\x95\x0a\0\0\0\0\0\0\0\x95\x01\0\0\0\0\0\0\0N.",  # frames within each other
        b"\x80\x02}]K\x01s.",
        b"\x80\x02}}K\x01s.",
        b"\x80\x02\x85.",
        b"\x80\x02(K\x01\x86.",
    ],
)
def test_opcodes_of_no_writer(pickled: bytes) -> None:
    assert parse(archive_of_torch(b"\x80\x02K\x05.")) == 5
    assert parse(archive_of_torch(pickled)) is ...


def large() -> dict[str, Any]:
    """More than is in memory at the same time, of one length, and nothing that can change."""
    values = {f"e{i:03}": f"{i:08}" * 100_000 for i in range(60)}
    values |= {f"t{i:03}": (f"{i:08}" * 100_000, i) for i in range(20)}
    return values | {f"same{i}": "x" * 800_000 for i in range(3)}


def test_more_than_is_in_memory_at_once(tmp_path: Path) -> None:
    expected = large()
    path = save(tmp_path / "ckpt", dict(expected))
    loaded: dict[str, Any] = dict.fromkeys(expected)
    dcp_fast.load(loaded, checkpoint_id=path, no_dist=True)
    wrong = [key for key, value in expected.items() if loaded[key] != value]
    assert wrong == []


def archive_of_torch(pickled: bytes) -> bytes:
    """An archive that torch's own writer made around a pickle."""
    stream = io.BytesIO()
    with torch.serialization._open_zipfile_writer(stream) as writer:
        writer.write_record("data.pkl", pickled, len(pickled))
        writer.write_record("byteorder", "little", 6)
    return stream.getvalue()


# Whole loads


def many() -> dict[str, Any]:
    state: dict[str, Any] = {}
    for i in range(300):
        kinds = {"lr": 1e-3, "betas": (0.9, 0.95), "on": True, "n": i, "list": [1, (2, "x")], "set": {i}}
        state.update({f"p{i}.{name}": value for name, value in kinds.items()})
    return state | {"t": torch.arange(4.0)}


def blank(state: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.zeros(4) if name == "t" else None for name in state}


@pytest.mark.parametrize("io_mode", ["cached", "direct"])
def test_thousands(tmp_path: Path, io_mode: str) -> None:
    expected = many()
    save(tmp_path, expected, thread_count=3)
    loaded, theirs = blank(expected), blank(expected)
    assert fast_error(tmp_path, loaded, io=io_mode) is None
    torch_load(theirs, storage_reader=torch_reader(tmp_path), planner=torch_planner())
    assert image(loaded) == image(theirs) == image(expected)
    report = dcp_fast.last_report()
    assert report is not None
    # The sets are read one by one, all else together; and a few for the tensor.
    assert 300 <= report.requests <= 320
    assert report.records == len(expected)
    assert report.bytes_needed > 1000 * len(expected)


def test_values_that_can_change_are_not_shared_between_entries(tmp_path: Path) -> None:
    save(tmp_path, {"a": Stateful([1, [2]]), "b": Stateful([1, [2]]), "c": (1, 2.5), "d": (1, 2.5)})
    state: dict[str, Any] = {"a": Stateful([]), "b": Stateful([]), "c": (), "d": ()}
    dcp_fast.load(state, checkpoint_id=tmp_path)
    assert state["a"].value == state["b"].value == [1, [2]]
    assert state["a"].value is not state["b"].value
    assert state["a"].value[1] is not state["b"].value[1]
    assert state["c"] is state["d"]


class Stateful:
    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


@pytest.mark.parametrize("flatten", [True, False])
def test_nested(tmp_path: Path, flatten: bool) -> None:
    state = {"a": {"b": [{"c": 1}, torch.ones(2)], "d": "x"}} if flatten else {"a": 1, "t": torch.ones(2)}
    save(tmp_path, state)
    blank = {"a": {"b": [{"c": 0}, torch.zeros(2)], "d": ""}} if flatten else {"a": 0, "t": torch.zeros(2)}
    outcome = load_with(
        dcp_fast.load,
        blank,
        storage_reader=fast_reader(tmp_path),
        planner=dcp_fast.DefaultLoadPlanner(flatten, flatten),
    )
    assert outcome.errors is None
    assert image(outcome.state) == image(state)


def test_transformed(tmp_path: Path) -> None:
    pytest.importorskip("zstandard")
    expected = {"a": 1, "b": (1, 2)}
    save(tmp_path, expected, _extensions=[ZStandard()])
    loaded: dict[str, Any] = {"a": None, "b": None}
    assert fast_error(tmp_path, loaded) is None
    assert loaded == expected


def test_file_that_shrinks_after_its_ranges_were_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, {f"v{i}": i for i in range(5)})
    (data,) = tmp_path.glob("*.distcp")
    original = PlanTransfer.run

    def cut_then_run(self: PlanTransfer) -> None:
        data.write_bytes(data.read_bytes()[:10])
        original(self)

    monkeypatch.setattr(PlanTransfer, "run", cut_then_run)
    error = fast_error(tmp_path, {f"v{i}": None for i in range(5)})
    assert isinstance(error, TruncatedFileError)
    assert error.path == str(data)
    assert error.fqn.startswith("v")


def test_missing_in_storage_data(tmp_path: Path) -> None:
    """As torch: a KeyError."""
    from damage import edit_metadata

    save(tmp_path, {"v": 1, "w": 2})
    with edit_metadata(tmp_path) as metadata:
        for index in list(metadata.storage_data):
            if index.fqn == "v":
                del metadata.storage_data[index]
    ours, theirs = fast_error(tmp_path, {"v": 0}), torch_error(tmp_path, {"v": 0})
    assert type(ours) is type(theirs) is KeyError
    assert ours.args == theirs.args


def test_damaged_entry_among_plain_ones(tmp_path: Path) -> None:
    save(tmp_path, {"a": 1, "b": 2})
    replace_record(tmp_path, "b", archive(b"\x80\x02cno.such\nname\n)R."))
    state: dict[str, Any] = {"a": None, "b": None}
    error = fast_error(tmp_path, state)
    assert isinstance(error, dcp_fast.UntrustedBytesError)
    assert error.fqn == "b"


@pytest.mark.parametrize("version", [b"99", b"0\n", b"x\n", b"9\n"])
@pytest.mark.parametrize("value", [5, {1, 2}], ids=["native", "in Python"])
def test_the_version_of_an_archive_is_heeded(value: Any, version: bytes) -> None:
    """All else is as torch writes it, the checksum of the version included."""
    stream = io.BytesIO()
    torch.save(value, stream)
    with zipfile.ZipFile(stream) as file:
        (entry,) = [each for each in file.infolist() if each.filename.endswith("/version")]
        known = file.read(entry)
    assert known == b"3\n"
    sums = [zlib.crc32(content).to_bytes(4, "little") for content in (known, version)]
    data = bytearray(stream.getvalue().replace(*sums))
    at = data.index(known, entry.header_offset + 30 + len(entry.filename))
    data[at : at + len(known)] = version
    record = bytes(data)
    try:
        expected = torch.load(io.BytesIO(record), weights_only=False)
    except RuntimeError:
        with pytest.raises(LoadError):
            load_untrusted(io.BytesIO(record), "value")
    else:
        assert load_untrusted(io.BytesIO(record), "value") == expected == value
        assert version == b"9\n"
