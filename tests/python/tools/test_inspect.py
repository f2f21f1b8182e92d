"""``dcp-fast inspect``: what it tells of checkpoints, and how it behaves on a command line."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import pty
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import save
from metadata_cases import make_metadata, parse_metadata, write_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

import dcp_fast
from dcp_fast.metadata.lazy import columns_of
from dcp_fast.tools.cli import main

# Not the checkout, which may hold no extension: `python -m` would look there first.
ELSEWHERE = Path(__file__).parent
COMMAND = [sys.executable, "-m", "dcp_fast", "inspect"]


def write(path: Path, metadata: Any) -> Path:
    (path / ".metadata").write_bytes(metadata if isinstance(metadata, bytes) else pickle.dumps(metadata))
    return path


def without_columns(metadata: Metadata) -> bytes:
    """What only the unpickler reads: planner data with a set."""
    metadata.planner_data = {"set": {1}}
    pickled = pickle.dumps(metadata)
    assert columns_of(parse_metadata(pickled, "")) is None
    return pickled


def described(capsys: pytest.CaptureFixture[str], *arguments: Any) -> Any:
    assert main(["inspect", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save(
        tmp_path / "ckpt",
        {
            "model": {"weight": torch.ones(4, 3), "bias": torch.ones(3, dtype=torch.bfloat16)},
            "scalar": torch.tensor(1, dtype=torch.int64),
            "step": 7,
        },
    )


def test_json_says_what_was_saved(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = described(capsys, checkpoint)
    entries = {entry.pop("fqn"): entry for entry in document.pop("entries")}
    records = document.pop("record_bytes")
    assert records == sum(entry["record_bytes"] for entry in entries.values())
    assert 62 < records <= sum(path.stat().st_size for path in checkpoint.glob("*.distcp"))
    meta = document.pop("storage_meta")
    assert meta.pop("save_id")
    assert meta == {"checkpoint_id": str(checkpoint), "modules": []}
    assert document == {
        "path": str(checkpoint / ".metadata"),
        "version": "1.0.0",
        "tensors": 3,
        "bytes_entries": 1,
        "chunks": 3,
        "missing_records": 0,
        "files": 1,
        "payload_bytes": 62,
        "payload_bytes_by_dtype": {"float32": 48, "int64": 8, "bfloat16": 6},
    }
    assert entries.keys() == {"model.weight", "model.bias", "scalar", "step"}
    assert entries["model.weight"].pop("record_bytes") > 48
    assert entries["model.weight"] == {
        "dtype": "float32",
        "layout": "strided",
        "shape": [4, 3],
        "chunk_count": 1,
        "payload_bytes": 48,
        "file_count": 1,
        "missing_records": 0,
        "chunks": None,
    }
    assert entries["scalar"]["shape"] == []
    assert entries["step"]["dtype"] is None
    assert entries["step"]["payload_bytes"] is None


def test_fqn_shows_where_each_chunk_is(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = described(capsys, checkpoint, "--fqn", "model.weight")
    (entry,) = document["entries"]
    (chunk,) = entry["chunks"]
    assert (chunk["offsets"], chunk["sizes"], chunk["transforms"]) == ([0, 0], [4, 3], [])
    assert chunk["length"] == entry["record_bytes"]
    record = (checkpoint / chunk["file"]).read_bytes()[chunk["offset"] :][: chunk["length"]]
    (checkpoint / "record").write_bytes(record)
    assert torch.equal(torch.load(checkpoint / "record"), torch.ones(4, 3))

    assert main(["inspect", str(checkpoint), "--fqn", "model.weight"]) == 0
    title, headings, line = capsys.readouterr().out.splitlines()
    assert title == "model.weight: float32 [4, 3], 48 bytes, 1 chunk in 1 file"
    assert headings.split() == ["offsets", "sizes", "file", "byte", "range"]
    place = f"{chunk['offset']} to {chunk['offset'] + chunk['length']}"
    assert line.split("  ") == ["", "[0, 0]", " [4, 3]", chunk["file"], place]


def test_text_has_a_summary_and_a_line_for_each_entry(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(checkpoint)]) == 0
    summary, table = capsys.readouterr().out.split("\n\n")
    facts = dict(line.split(maxsplit=1) for line in summary.splitlines())
    assert facts["metadata"] == str(checkpoint / ".metadata")
    assert facts["tensors"] == "3 in 3 chunks"
    assert facts["payload"] == "62 bytes"
    assert facts["bfloat16"] == "6 bytes"
    lines = [line.split() for line in table.splitlines()]
    assert lines[0] == ["FQN", "dtype", "shape", "chunks", "bytes", "files"]
    assert ["model.weight", "float32", "[4,", "3]", "1", "48", "1"] in lines


@pytest.mark.parametrize("pattern", ["model.*", "model.[wb]*", "*"])
def test_patterns_select(checkpoint: Path, capsys: pytest.CaptureFixture[str], pattern: str) -> None:
    fqns = [entry["fqn"] for entry in described(capsys, checkpoint, "--fqn", pattern)["entries"]]
    assert sorted(fqns) == sorted(["model.bias", "model.weight"] + (["scalar", "step"] if pattern == "*" else []))


def test_a_name_with_brackets_is_found_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, Metadata({"a[0]": BytesStorageMetadata(), "a0": BytesStorageMetadata()}, storage_data={}))
    entries = described(capsys, tmp_path, "--fqn", "a[0]")["entries"]
    assert [entry["fqn"] for entry in entries] == ["a[0]", "a0"]


@pytest.mark.parametrize("arguments", [(), ("--fqn", "*")])
def test_the_same_with_and_without_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    with_columns = described(capsys, write(tmp_path, make_metadata()), *arguments)
    assert with_columns["missing_records"] == 0
    entries = {entry["fqn"]: entry for entry in with_columns["entries"]}
    assert entries["sharded"]["payload_bytes"] == 2 * 4 << 40
    assert entries["sharded"]["file_count"] == 1
    assert entries["zero"]["payload_bytes"] == 0
    assert entries["no chunks"]["chunk_count"] == 0
    assert entries["sparse"]["layout"] == "sparse_coo"
    assert described(capsys, write(tmp_path, without_columns(make_metadata())), *arguments) == with_columns
    assert described(capsys, tmp_path, *arguments, "--trust-metadata") == with_columns
    for options in ([], ["--fqn", "*"]):
        assert main(["inspect", str(tmp_path), *options]) == 0
        assert "sharded" in capsys.readouterr().out


@pytest.mark.parametrize("storage_data", [None, {}])
@pytest.mark.parametrize("pickled", [pickle.dumps, without_columns])
def test_metadata_without_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], pickled: Any, storage_data: Any
) -> None:
    metadata = make_metadata()
    write(tmp_path, pickled(dataclasses.replace(metadata, storage_data=storage_data)))
    document = described(capsys, tmp_path, "--fqn", "*")
    assert document["files"] == document["record_bytes"] == 0
    assert document["missing_records"] == document["chunks"] + document["bytes_entries"]
    assert main(["inspect", str(tmp_path), "--fqn", "scalar"]) == 0
    assert "no record" in capsys.readouterr().out


def test_transforms_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage = {MetadataIndex("value"): _StorageInfo("a file", 5, 6, ["zstd", "other"])}
    write(tmp_path, Metadata({"value": BytesStorageMetadata()}, storage_data=storage))
    assert main(["inspect", str(tmp_path), "--fqn", "value"]) == 0
    assert "a file  5 to 11 (zstd, other)" in capsys.readouterr().out


def test_a_metadata_file_of_any_name(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = (checkpoint / ".metadata").rename(checkpoint / "__0.metadata")
    assert described(capsys, other)["tensors"] == 3


def test_names_cannot_control_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "\x1b[31mred\n\ud800ü"
    storage = {MetadataIndex(name): _StorageInfo("\x1b]0;title\x07", 0, 1)}
    write(tmp_path, Metadata({name: BytesStorageMetadata()}, storage_data=storage, version="\x1b[2J"))
    for options in ([], ["--fqn", "*"], ["--json"]):
        assert main(["inspect", str(tmp_path), *options]) == 0
        out = capsys.readouterr().out
        assert "\x1b" not in out
        assert "\ud800" not in out
        assert ("\\u001b[31mred" if options == ["--json"] else "\\x1b[31mred\\n\\ud800ü") in out


# Errors


class Command:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


def broken(**changes: Any) -> bytes:
    entry = TensorStorageMetadata(TensorProperties(), torch.Size([1]), [ChunkStorageMetadata([0], [1])])  # type: ignore[arg-type]
    vars(entry).update(changes)
    return without_columns(Metadata({"a": entry}, storage_data={}))


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        (pickle.dumps(make_metadata())[:100], "beyond the end of the file"),
        (pickle.dumps([]), "something else than Metadata"),
        (pickle.dumps(Metadata({}, planner_data=Command())), "--trust-metadata"),
        (broken(size=5), "int instead of a list"),
        (broken(size=[1 << 70]), "no numbers of 64 bits"),
        (broken(chunks=[()]), "tuple without offsets"),
        (broken(properties=None), "NoneType without dtype"),
    ],
)
def test_bad_metadata_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], metadata: bytes, reason: str
) -> None:
    assert main(["inspect", str(write(tmp_path, metadata))]) == 1
    captured = capsys.readouterr()
    assert not captured.out
    (line,) = captured.err.splitlines()
    assert line.startswith("dcp-fast: ")
    assert reason in line
    assert str(tmp_path) in line


@pytest.mark.parametrize("metadata", [pickle.dumps([]), b"\x80", b"cno_such_module\nname\n."])
def test_bad_metadata_that_is_trusted(tmp_path: Path, capsys: pytest.CaptureFixture[str], metadata: bytes) -> None:
    assert main(["inspect", str(write(tmp_path, metadata)), "--trust-metadata"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_trusted_metadata_runs_what_it_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, Metadata({}, planner_data=Command()))
    assert described(capsys, tmp_path, "--trust-metadata")["tensors"] == 0


def test_files_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        assert main(["inspect", str(path)]) == 1
        assert "No such file" in capsys.readouterr().err


def test_an_fqn_that_is_not_there(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(checkpoint), "--fqn", "model"]) == 1
    assert "no entry matches 'model'" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["inspect"], ["inspect", "a", "b"], ["explain", "a"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_of:
        main(arguments)
    assert exit_of.value.code == 2
    assert "usage: dcp-fast" in capsys.readouterr().err


def test_help_describes_every_key(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = described(capsys, checkpoint, "--fqn", "step")
    (entry,) = document["entries"]
    (chunk,) = entry["chunks"]
    with pytest.raises(SystemExit):
        main(["inspect", "--help"])
    words = capsys.readouterr().out.replace(",", " ").replace(";", " ").split()
    assert {*document, *document["storage_meta"], *entry, *chunk} <= set(words)


# Processes


def many(path: Path, fqn: str, count: int) -> Path:
    return write(path, Metadata({f"{fqn}{number}": BytesStorageMetadata() for number in range(count)}, storage_data={}))


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    many(tmp_path, "n" * 100, 5000)  # more than a pipe holds
    with subprocess.Popen(
        [*COMMAND, str(tmp_path)], cwd=ELSEWHERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith(b"metadata")
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + 13


def test_wide_names_are_cut_for_a_terminal(tmp_path: Path) -> None:
    name = "wide." * 100
    many(tmp_path, name, 1)
    master, terminal = pty.openpty()
    with open(master, "rb", buffering=0) as shown:
        environment = {**os.environ, "COLUMNS": "70"}
        subprocess.run([*COMMAND, str(tmp_path)], cwd=ELSEWHERE, stdout=terminal, env=environment, check=True)
        os.close(terminal)
        text = b""
        try:
            while part := shown.read(1 << 16):
                text += part
        except OSError:  # how the end of a terminal shows
            pass
    last = text.decode().splitlines()[-1]
    assert len(last) <= 70
    start, end = last.split()[0].split("...", 1)
    assert len(start) > 10
    assert len(end) > 10
    assert name.startswith(start)
    assert f"{name}0".endswith(end.lstrip("."))


def test_pipes_get_all_of_a_name_in_an_encoding_that_lacks_its_letters(tmp_path: Path) -> None:
    name = "wide." * 100
    many(tmp_path, f"{name}schlüssel", 1)
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*COMMAND, str(tmp_path)], cwd=ELSEWHERE, stdout=subprocess.PIPE, env=environment, check=True)
    assert f"{name}schl\\xfcssel0".encode() in done.stdout


def test_many_chunks_take_no_objects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (tmp_path / ".metadata").open("wb") as file:
        write_metadata(file, 250, 512)
    start = time.perf_counter()
    document = described(capsys, tmp_path)
    seconds = time.perf_counter() - start
    assert document["chunks"] == 250 * 512
    assert document["payload_bytes"] == 250 * 512 * 4 * 1024 * 4
    assert seconds < 30  # 0.15 on a quiet machine


# From Python


def test_the_command_prints_what_python_gets(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for fqn in (None, "model.weight", "model.*", "nothing"):
        inspection = dcp_fast.inspect(checkpoint, fqn)
        assert type(inspection) is dcp_fast.Inspection
        if inspection.entries:
            options = [] if fqn is None else ["--fqn", fqn]
            assert described(capsys, checkpoint, *options) == dataclasses.asdict(inspection)
        else:
            assert fqn == "nothing"


def test_entries_in_python(checkpoint: Path) -> None:
    inspection = dcp_fast.inspect(str(checkpoint / ".metadata"), "model.w*")
    (entry,) = inspection.entries
    assert (entry.fqn, entry.dtype, entry.shape, entry.payload_bytes) == ("model.weight", "float32", [4, 3], 48)
    assert entry.chunks is not None
    (chunk,) = entry.chunks
    assert (chunk.offsets, chunk.sizes) == ([0, 0], [4, 3])
    assert (checkpoint / str(chunk.file)).exists()
    assert [entry.chunks for entry in dcp_fast.inspect(checkpoint).entries] == [None] * 4


def test_errors_in_python(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        dcp_fast.inspect(tmp_path / "missing")
    with pytest.raises(dcp_fast.CorruptMetadataError):
        dcp_fast.inspect(write(tmp_path, b"\x80\x02}"))
    with pytest.raises(dcp_fast.UntrustedMetadataError):
        dcp_fast.inspect(write(tmp_path, b"cposix\nsystem\n(S'true'\ntR."))


def test_nothing_of_it_is_imported_before_it_is_asked_for() -> None:
    code = (
        "import sys, dcp_fast\n"
        "assert not any(name.startswith('dcp_fast.tools') for name in sys.modules)\n"
        "assert dcp_fast.inspect.__module__ in sys.modules\n"
        "from dcp_fast import Inspection\n"
        "assert not hasattr(dcp_fast, 'inspects')\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ELSEWHERE, check=True)
