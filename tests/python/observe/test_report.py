"""The report of a load."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Entry, ShardedBuffer, fill, image, load_with, save, write_checkpoint

import dcp_fast

FLOAT = torch.float32


def load(path: Path, state: dict[str, Any], **options: Any) -> dcp_fast.LoadReport:
    before = dcp_fast.last_report()
    dcp_fast.load(state, storage_reader=dcp_fast.FileSystemReader(path, **options))
    report = dcp_fast.last_report()
    assert report is not None
    assert report is not before
    assert report.path == str(path)
    assert set(report.seconds) == {"metadata", "planning", "ranks", "layout", "transfer", "commit"}
    assert all(seconds >= 0 for seconds in report.seconds.values())
    assert report.total_seconds == pytest.approx(sum(report.seconds.values()))
    return report


@pytest.mark.parametrize("io", ["cached", "direct"])
def test_plain_load(tmp_path: Path, io: str) -> None:
    stored = {"a": fill((2000, 500), FLOAT), "b": fill((50,), torch.int8)}
    save(tmp_path, stored)
    report = load(tmp_path, {key: torch.zeros_like(value) for key, value in stored.items()}, io=io)
    assert report.bytes_needed == 2000 * 500 * 4 + 50
    assert report.bytes_needed <= report.bytes_read < 1.2 * report.bytes_needed
    assert report.read_amplification == report.bytes_read / report.bytes_needed
    assert report.records == 2
    assert report.requests >= 1
    assert report.fallback_records == 0
    assert report.staged_items == 0
    assert report.seconds["metadata"] > 0
    assert report.seconds["planning"] > 0
    assert report.seconds["transfer"] > 0
    assert report.gigabytes_per_second > 0


def test_bytes_entries_count(tmp_path: Path) -> None:
    save(tmp_path, {"value": list(range(5000))})
    report = load(tmp_path, {"value": None})
    assert report.records == 1
    assert report.bytes_needed == report.bytes_read > 5000
    assert report.seconds["commit"] > 0


def test_only_the_wanted_rows_are_read(tmp_path: Path) -> None:
    save(tmp_path, {"t": fill((1024, 1024), FLOAT)})
    state = {"t": ShardedBuffer.make((1024, 1024), [(256, 0)], [torch.zeros(128, 1024)])}
    report = load(tmp_path, state, io="cached")
    assert report.bytes_needed == 128 * 1024 * 4
    assert report.read_amplification < 1.05


def test_fallback_and_staged_items_count(tmp_path: Path) -> None:
    write_checkpoint(
        tmp_path, {"old": Entry.of(fill((9,), FLOAT), legacy=True), "half": Entry.of(torch.ones(7, dtype=torch.half))}
    )
    report = load(tmp_path, {"old": torch.zeros(9), "half": torch.zeros(7)})
    assert report.fallback_records == 1
    assert report.fallback_reasons == {"no zip directory as torch.save writes it": 1}
    assert "fallback, 1 records: no zip directory" in str(report)
    assert report.staged_items == 1
    assert report.bytes_needed == 9 * 4 + 7 * 2
    assert report.bytes_read >= report.bytes_needed


def test_record_that_torch_reads_for_several_boxes_counts_once(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"t": Entry.of(fill((8,), FLOAT), legacy=True)})
    shards = [torch.zeros(3), torch.zeros(4)]
    report = load(tmp_path, {"t": ShardedBuffer.make((8,), [(0,), (3,)], shards)})
    assert report.records == report.fallback_records == 1
    assert report.bytes_needed == 7 * 4


def test_reasons_of_fallback(tmp_path: Path) -> None:
    quantized = torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)
    entries = {name: Entry.of(quantized) for name in ("q", "r")} | {"e": Entry.of(torch.ones(1).expand(5))}
    write_checkpoint(tmp_path, entries)
    report = load(tmp_path, {"q": quantized.clone(), "r": quantized.clone(), "e": torch.zeros(5)})
    assert report.fallback_reasons == {"not the pickle of a plain tensor": 2, "its elements share memory": 1}
    assert report.fallback_records == 3


def test_load_of_nothing(tmp_path: Path) -> None:
    save(tmp_path, {"t": torch.ones(2)})
    report = load(tmp_path, {})
    assert (report.bytes_needed, report.bytes_read, report.requests, report.records) == (0, 0, 0, 0)
    assert report.read_amplification == 0.0
    assert "0.000" in str(report)


def test_table(tmp_path: Path) -> None:
    save(tmp_path, {"t": fill((1000, 1000), FLOAT)})
    report = load(tmp_path, {"t": torch.zeros(1000, 1000)})
    lines = str(report).splitlines()
    assert str(tmp_path) in lines[0]
    assert len({len(line) for line in lines[1:]}) == 1, "a table has straight edges"
    values = dict(line.strip().rsplit("  ", 1) for line in lines[1:])
    names = {name.strip(): value.strip() for name, value in values.items()}
    assert names["bytes needed"] == "4,000,000"
    assert names["bytes read"] == f"{report.bytes_read:,}"
    assert names["records"] == "1"
    assert names["metadata"] == "read"
    assert names["read amplification"] == f"{report.read_amplification:.3f}"
    assert {f"{stage} (s)" for stage in report.seconds} <= names.keys()


def test_empty_report() -> None:
    report = dcp_fast.LoadReport()
    assert report.read_amplification == 0.0
    assert report.gigabytes_per_second == 0.0
    assert report.total_seconds == 0.0
    assert str(report)


def test_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, {"t": torch.ones(2)})
    with caplog.at_level(logging.INFO, "dcp_fast"):
        report = load(tmp_path, {"t": torch.zeros(2)})
    messages = [record.getMessage() for record in caplog.records if record.name == "dcp_fast"]
    assert messages == [str(report)]
    assert next(record.levelno for record in caplog.records if record.name == "dcp_fast") == logging.INFO


def test_failed_load_has_a_report_too(tmp_path: Path) -> None:
    save(tmp_path, {"t": torch.ones(2), "u": torch.ones(3)}, single_file_per_rank=False)
    for file in tmp_path.glob("*.distcp"):
        file.unlink()
    before = dcp_fast.last_report()
    outcome = load_with(dcp_fast.load, {"t": torch.zeros(2)}, checkpoint_id=tmp_path)
    assert outcome.errors is not None
    assert dcp_fast.last_report() is not before


def test_report_of_a_reader_that_planned_twice(tmp_path: Path) -> None:
    save(tmp_path, {"t": torch.ones(2)})
    reader = dcp_fast.FileSystemReader(tmp_path)
    assert load_with(dcp_fast.load, {"missing": torch.zeros(2)}, storage_reader=reader).errors
    dcp_fast.load({"t": torch.zeros(2)}, storage_reader=reader)
    report = dcp_fast.last_report()
    assert report is not None
    assert report.records == 1


def test_the_last_report_is_never_of_an_earlier_load(tmp_path: Path) -> None:
    save(tmp_path / "first", {"x": torch.ones(3)})
    save(tmp_path / "second", {"y": torch.ones(300)})
    load(tmp_path / "first", {"x": torch.zeros(3)})

    class Python(dcp_fast.FileSystemReader):
        """Torch's own read_data must serve it."""

        def _slice_file(self, file: Any, info: Any) -> Any:
            return super()._slice_file(file, info)

    dcp_fast.load({"y": torch.zeros(300)}, storage_reader=Python(tmp_path / "second"))
    report = dcp_fast.last_report()
    assert report is not None
    assert report.path == str(tmp_path / "second")
    assert report.seconds["transfer"] > 0
    load(tmp_path / "first", {"x": torch.zeros(3)})
    assert load_with(dcp_fast.load, {"zzz": torch.zeros(3)}, checkpoint_id=tmp_path / "second").errors
    report = dcp_fast.last_report()
    assert report is not None
    assert report.path == str(tmp_path / "second")
    assert report.bytes_read == 0


@pytest.mark.parametrize(("size", "count", "most"), [(128, 60, 1.15), (256, 20, 1.05)])
def test_headers_bring_no_payloads_along(tmp_path: Path, size: int, count: int, most: float) -> None:
    """Payloads of 64 and 256 KiB, which would be read again, even past the page cache, where requests cost much."""
    stored = {f"t{number}": torch.full((size, size), float(number)) for number in range(count)}
    save(tmp_path, stored)
    state = {fqn: torch.zeros(size, size) for fqn in stored}
    dcp_fast.load(state, storage_reader=dcp_fast.FileSystemReader(tmp_path, io="direct"))
    assert image(state) == image(stored)
    report = dcp_fast.last_report()
    assert report is not None
    assert report.bytes_read <= most * sum(file.stat().st_size for file in tmp_path.glob("*.distcp"))
