"""Places boxes of records that only torch can read, while the engine reads the records that come next."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch.distributed.checkpoint.planner import ReadItem

from dcp_fast import _native
from dcp_fast._torch import narrow_tensor_by_index
from dcp_fast.errors import SizeMismatchError
from dcp_fast.observe.report import LoadReport
from dcp_fast.transfer.records import Records
from dcp_fast.transfer.shared_records import SharedRecords


def place_fallback(
    boxes: Sequence[tuple[ReadItem, int, torch.Tensor]],
    records: Records,
    layouts: _native.Layouts,
    options: _native.Options,
    most_bytes: int,
    report: LoadReport,
    shared: SharedRecords,
) -> None:
    """Place boxes one after another. Those that follow each other and have a record in common share one load of it.

    Args:
        boxes: an item, its record and its target.
        records: of the checkpoint.
        layouts: of the records.
        options: for the native reads.
        most_bytes: memory for what is read ahead. The record that is unpickled takes its own size on top.
        report: counts what is read and placed.
        shared: records that come from other ranks.

    Raises:
        LoadError: a record cannot be read or holds no tensor, or a box does not fit.
        Exception: whatever ``copy_`` of a target raises.
    """
    by_record = [(record, list(group)) for record, group in groupby(boxes, key=lambda box: box[1])]
    of_records = iter(by_record)

    def take(_: int, content: _native.RecordBytes) -> None:
        record, of_record = next(of_records)
        tensor = records.load_tensor(of_record[0][0], content)
        report.fallback_records += 1
        reason = layouts.fallback_reason(record) or "its elements share memory"
        report.fallback_reasons[reason] = report.fallback_reasons.get(reason, 0) + 1
        for item, _, target in of_record:
            _place(item, tensor, target, records, report)

    for run in shared.runs(record for record, _ in by_record):
        stats = _native.read_records(layouts, run, most_bytes, options, take)
        report.requests += stats.requests
        report.bytes_read += stats.bytes_read


def _place(item: ReadItem, tensor: torch.Tensor, target: torch.Tensor, records: Records, report: LoadReport) -> None:
    try:
        source = narrow_tensor_by_index(tensor, item.storage_offsets, item.lengths)
    except (RuntimeError, IndexError) as error:
        raise records.error(SizeMismatchError, str(error), item) from error
    if target.size() != source.size():
        reason = f"req {item.storage_index} mismatch sizes {target.size()} vs {source.size()}"
        raise records.error(SizeMismatchError, reason, item)
    target.copy_(source)
    report.bytes_needed += source.numel() * source.element_size()
