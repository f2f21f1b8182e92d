"""Bytes entries that run code when they are unpickled, or that are damaged: an error that tells, and nothing is run."""

from __future__ import annotations

import contextlib
import copyreg
import io
import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from damage import Call, archive, fast_error, legacy_record, limited, replace_record, set_storage, span, torch_error
from helpers import fill, image, load_with, save
from ranks import Ranks
from torch.distributed.checkpoint.api import CheckpointException

import dcp_fast
import dcp_fast.values.load
from dcp_fast.errors import CorruptPickleError, LoadError, UntrustedBytesError
from dcp_fast.tools.cli import main

VALUE = {"step": 5, "names": ["a", "b"], "rng": (torch.arange(4), 1 << 70), "size": torch.Size([2])}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save(tmp_path / "ckpt", {"t": torch.ones(3), "value": (VALUE,)})


def wanted() -> dict[str, Any]:
    return {"t": torch.zeros(3), "value": "before"}


def refused(checkpoint: Path, record: bytes) -> UntrustedBytesError:
    """The error of a load of a checkpoint whose value is such a record."""
    replace_record(checkpoint, "value", record)
    state = wanted()
    with limited(20):
        error = fast_error(checkpoint, state)
    assert isinstance(error, UntrustedBytesError), repr(error)
    assert isinstance(error, pickle.UnpicklingError)
    where = span(checkpoint, "value")
    assert (error.path, error.fqn, error.offset, error.length) == (str(where.path), "value", where.offset, where.length)
    assert "trust_bytes=True" in error.reason
    assert state["value"] == "before"
    assert vars(pickle.loads(pickle.dumps(error))) == vars(error)
    return error


# Code


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def executing_pickles(marker: Path) -> dict[str, tuple[bytes, str]]:
    """Pickles that make a file when Python's own unpickler runs them, and what an error must name."""
    command = f"touch {marker}"
    system = Call(os.system, command)
    rebuild = torch._tensor._rebuild_from_type_v2  # which torch allows, and which calls what it is given
    pickles = {f"os.system, protocol {n}": (pickle.dumps(system, n), "posix.system") for n in range(6)}
    pickles |= {
        "eval": (pickle.dumps(Call(eval, f"__import__('os').system({command!r})"), 2), "eval"),
        "open": (pickle.dumps(Call(open, str(marker), "w"), 2), "io.open"),
        "getattr": (pickle.dumps(Call(getattr(os, "system"), command), 2), "posix.system"),  # noqa: B009
        "within": (pickle.dumps({"a": [(1, system)]}, 2), "posix.system"),
        "as an argument of an allowed function": (
            pickle.dumps(Call(rebuild, os.system, torch.Tensor, (command,), {}), 2),
            "posix.system",
        ),
        "after allowed types": (pickle.dumps((torch.Size([1]), {1}, 1 + 2j, system), 2), "posix.system"),
        "instance": (f"(S'{command}'\nios\nsystem\n.".encode(), "os.system"),
        "object": (f"(cos\nsystem\nS'{command}'\no.".encode(), "os.system"),
        "names from the memo": (
            b"\x80\x04" + text("os") + b"\x94" + text("system") + b"\x9400h\0h\x01\x93" + text(command) + b"\x85R.",
            "os.system",
        ),
        "a path of attributes": (
            b"\x80\x04" + text("torch.serialization") + text("os.system") + b"\x93" + text(command) + b"\x85R.",
            "torch.serialization.os.system",
        ),
        "a name of Python 2": (
            f"\x80\x02ccommands\ngetoutput\nX{chr(len(command))}\0\0\0{command}\x85R.".encode("latin1"),
            "subprocess.getoutput",
        ),
    }
    return pickles


CONTAINERS = {"archive": archive, "bare": lambda pickled: pickled}


@pytest.mark.parametrize("name", executing_pickles(Path("unused")))
@pytest.mark.parametrize("container", CONTAINERS)
def test_pickle_that_runs_code(checkpoint: Path, tmp_path: Path, name: str, container: str) -> None:
    marker = tmp_path / "executed"
    pickled, named = executing_pickles(marker)[name]
    error = refused(checkpoint, CONTAINERS[container](pickled))
    assert named in error.reason
    if "system" in named:
        assert "add_safe_globals" not in error.reason, "torch does not let it be allowed"
    with dcp_fast.install():
        outcome = load_with(dcp.load, wanted(), checkpoint_id=checkpoint)
    assert outcome.errors is not None
    assert isinstance(outcome.errors[0], UntrustedBytesError)
    assert not marker.exists()
    # The proof that it would.
    load_with(dcp_fast.load, wanted(), checkpoint_id=checkpoint, trust_bytes=True)
    assert marker.exists()


@pytest.mark.parametrize(
    ("code", "opcode", "name"),
    [(0x7F, b"\x82\x7f", "EXT1"), (0x7FFF, b"\x83\xff\x7f", "EXT2"), (0x7FFFFF, b"\x84\xff\xff\x7f\0", "EXT4")],
)
def test_extension_registry(checkpoint: Path, tmp_path: Path, code: int, opcode: bytes, name: str) -> None:
    """A code of the registry may stand for anything."""
    marker = tmp_path / "executed"
    copyreg.add_extension("os", "mkdir", code)
    try:
        error = refused(checkpoint, archive(b"\x80\x02" + opcode + text(str(marker)) + b"\x85R."))
        assert f"{name} of pickle protocol 2" in error.reason
        assert not marker.exists()
        load_with(dcp_fast.load, wanted(), checkpoint_id=checkpoint, trust_bytes=True)
        assert marker.exists()
    finally:
        copyreg.remove_extension("os", "mkdir", code)


@pytest.mark.parametrize("pid", [text("id"), b"(" + text("module") + b"K\x01t", b"]"])
def test_persistent_ids(checkpoint: Path, pid: bytes) -> None:
    assert "persistent" in refused(checkpoint, archive(b"\x80\x02" + pid + b"Q.")).reason


HARMFUL = {
    "state of a class": b"ctorch\nSize\n}" + text("__setstate__") + b"ctorch\nSize\nsb.",
    "state of a torch.Size": b"ctorch\nSize\n)\x85R}" + text("x") + b"K\x01sb.",
    "items of a set": b"\x8f(K\x01e.",
    "keys of a list": b"]K\x01K\x02s.",
    "call of a text": text("os.system") + b")R.",
    "an object of a function": b"c_codecs\nencode\n)\x81}b.",
}


@pytest.mark.parametrize("name", HARMFUL)
def test_what_no_value_needs(checkpoint: Path, name: str) -> None:
    """Allowed globals, used as they are not meant to be: an error of ours, and torch's classes stay as they are."""
    before = dict(vars(torch.Size))
    replace_record(checkpoint, "value", archive(b"\x80\x02" + HARMFUL[name]))
    error = fast_error(checkpoint, wanted())
    assert isinstance(error, LoadError), repr(error)
    assert (error.fqn, error.path) == ("value", str(span(checkpoint, "value").path))
    assert dict(vars(torch.Size)) == before


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_script_module(checkpoint: Path) -> None:
    stream = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), stream)
    assert "TorchScript" in refused(checkpoint, stream.getvalue()).reason


def test_inspect_reads_no_entry(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marker = tmp_path / "executed"
    replace_record(checkpoint, "value", archive(pickle.dumps(Call(os.system, f"touch {marker}"), 2)))
    for options in ([], ["--fqn", "value"], ["--json"], ["--trust-metadata"]):
        assert main(["inspect", str(checkpoint), *options]) == 0
    assert "value" in capsys.readouterr().out
    assert not marker.exists()


# Many ranks


def load_on_rank(path: Path, only_last: bool) -> tuple[dict[int, tuple[str, str, str]], Any]:
    state = wanted()
    if only_last and dist.get_rank() != dist.get_world_size() - 1:
        del state["value"]
    with pytest.raises(CheckpointException) as caught:
        dcp_fast.load(state, checkpoint_id=path)
    failures = {}
    for rank, (error, _) in caught.value.failures.items():
        assert isinstance(error, UntrustedBytesError)
        failures[rank] = (error.fqn, error.path, error.reason)
    return failures, state.get("value")


@pytest.mark.parametrize("only_last", [False, True])
def test_every_rank_is_told(ranks: Ranks, checkpoint: Path, tmp_path: Path, only_last: bool) -> None:
    marker = tmp_path / "executed"
    refused(checkpoint, archive(pickle.dumps(Call(os.system, f"touch {marker}"), 2)))
    for failures, value in ranks.run(4, load_on_rank, checkpoint, only_last):
        assert list(failures) == ([3] if only_last else [0, 1, 2, 3])
        for fqn, path, reason in failures.values():
            assert (fqn, path) == ("value", str(span(checkpoint, "value").path))
            assert "posix.system" in reason
        assert value in (None, "before")
    assert not marker.exists()


# Damage


def damaged_error(checkpoint: Path, data: bytes, state: dict[str, Any]) -> BaseException | None:
    """The error of a load of a checkpoint whose value is stored as these bytes."""
    where = span(checkpoint, "value")
    with where.path.open("r+b") as file:
        file.seek(where.offset)
        file.write(data)
    with limited(20):
        error = fast_error(checkpoint, state)
    if error is not None:
        assert isinstance(error, LoadError), repr(error)
        assert error.fqn == "value"
        assert error.path == str(where.path)
        assert error.offset is not None
    return error


def record(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


@pytest.mark.parametrize("legacy", [False, True])
def test_truncated_entry(checkpoint: Path, legacy: bool) -> None:
    data = legacy_record(VALUE) if legacy else record(VALUE)
    replace_record(checkpoint, "value", data)
    assert fast_error(checkpoint, wanted()) is None
    for length in range(0, len(data), 7):
        set_storage(checkpoint, "value", length=length)
        state = wanted()
        error = damaged_error(checkpoint, data, state)
        theirs = torch_error(checkpoint, wanted())
        assert (error is None) == (theirs is None)
        assert not isinstance(error, UntrustedBytesError)
        if error is not None:
            assert state["value"] == "before"


@pytest.mark.parametrize("seed", range(6))
def test_flipped_bits(checkpoint: Path, seed: int) -> None:
    """An entry of allowed types: what torch loads of the same bytes, or an error that does not ask to trust them."""
    rng = random.Random(seed)
    data = record(VALUE)
    replace_record(checkpoint, "value", data)
    outcomes = {"same": 0, "error": 0}
    for _ in range(100):
        flipped = bytearray(data)
        for _ in range(rng.choice([1, 1, 1, 3])):
            flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        ours, theirs = wanted(), wanted()
        error = damaged_error(checkpoint, bytes(flipped), ours)
        if error is None:
            assert torch_error(checkpoint, theirs) is None
            assert image(ours) == image(theirs)
            outcomes["same"] += 1
        else:
            assert not isinstance(error, UntrustedBytesError), error
            assert ours["value"] == "before"
            outcomes["error"] += 1
    assert min(outcomes.values()) > 5


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("container", ["archive", "bare", "legacy"])
def test_flipped_bits_of_a_hostile_entry(checkpoint: Path, tmp_path: Path, container: str, seed: int) -> None:
    rng = random.Random(seed)
    marker = tmp_path / "executed"
    call = Call(os.system, f"touch {marker}")
    data = legacy_record(call) if container == "legacy" else CONTAINERS[container](pickle.dumps(call, 2))
    replace_record(checkpoint, "value", data)
    for _ in range(100):
        flipped = bytearray(data)
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        damaged_error(checkpoint, bytes(flipped), wanted())
        assert not marker.exists()
    with contextlib.suppress(Exception):  # it still would
        assert damaged_error(checkpoint, data, wanted()) is not None
        torch.load(io.BytesIO(data), weights_only=False)
    assert marker.exists()


def test_damaged_name_is_not_asked_to_be_trusted(checkpoint: Path) -> None:
    data = record(VALUE)
    damaged = data.replace(b"ctorch\nSize\n", b"ctorch\nSizf\n")
    assert damaged != data
    replace_record(checkpoint, "value", damaged)
    assert isinstance(fast_error(checkpoint, wanted()), CorruptPickleError)


def test_memory_that_cannot_be_had(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(dcp_fast.values.load, "load_archive_natively", no_memory)
    error = fast_error(checkpoint, wanted())
    assert isinstance(error, dcp_fast.OutOfMemoryError)
    assert error.fqn == "value"


def test_tensor_within_an_entry(checkpoint: Path) -> None:
    """Bit for bit, with its strides."""
    value = [fill((3, 4), torch.float64).t()]
    replace_record(checkpoint, "value", record(value))
    state = wanted()
    assert fast_error(checkpoint, state) is None
    assert image(state["value"]) == image(value)
