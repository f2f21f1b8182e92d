"""The search: which boxes of which stored chunks does a state dict want?

State-dict semantics are torch's own, called rather than copied; only the search for overlaps is native.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import (
    create_read_items_for_chunk_list as torch_read_items_for_chunk_list,
)
from torch.distributed.tensor import DTensor

from dcp_fast import _native
from dcp_fast._torch import ShardedTensor, create_chunk_list, create_read_items, is_checkpointable_tensor
from dcp_fast.metadata.lazy import LazyDict, columns_of
from dcp_fast.observe.report import current_report
from dcp_fast.planning.column_plan import ColumnPlan, PlannedTensors, is_whole

__all__ = ["create_default_local_load_plan", "create_read_items_for_chunk_list", "global_size"]

logger = logging.getLogger("dcp_fast")


def create_read_items_for_chunk_list(
    fqn: str,
    checkpoint_md: TensorStorageMetadata,
    local_chunks: list[ChunkStorageMetadata],
) -> list[ReadItem]:
    """Drop-in for ``torch.distributed.checkpoint.planner_helpers.create_read_items_for_chunk_list``.

    Args:
        fqn: the FQN that the items name.
        checkpoint_md: the stored tensor and its chunks.
        local_chunks: chunks of the same global tensor that are wanted.

    Returns:
        One TENSOR item for each overlap of a wanted and a stored chunk, in torch's order.
    """
    stored = checkpoint_md.chunks
    if not local_chunks or not stored:
        return []
    dims = len(local_chunks[0].offsets)
    wanted_values, stored_values = _flatten(local_chunks, dims), _flatten(stored, dims)
    if wanted_values is None or stored_values is None:
        # Chunks of different dimensions: torch has its own way with them.
        return torch_read_items_for_chunk_list(fqn, checkpoint_md, local_chunks)
    rows = _native.find_overlaps(dims, wanted_values, len(local_chunks), stored_values, len(stored))
    items = []
    width = 2 + 3 * dims
    for at in range(0, len(rows), width):
        wanted_index, stored_index = rows[at], rows[at + 1]
        box = rows[at + 2 : at + width]
        items.append(
            ReadItem(
                type=LoadItemType.TENSOR,
                dest_index=MetadataIndex(fqn, local_chunks[wanted_index].offsets, wanted_index),
                dest_offsets=torch.Size(box[dims : 2 * dims]),
                storage_index=MetadataIndex(fqn, stored[stored_index].offsets, stored_index),
                storage_offsets=torch.Size(box[:dims]),
                lengths=torch.Size(box[2 * dims :]),
            )
        )
    return items


def _flatten(chunks: Sequence[ChunkStorageMetadata], dims: int) -> list[int] | None:
    """Offsets and sizes of all chunks in a row; None if any has other than ``dims`` dimensions."""
    values: list[int] = []
    for chunk in chunks:
        offsets, sizes = chunk.offsets, chunk.sizes
        if len(offsets) != dims or len(sizes) != dims:
            return None
        values += offsets
        values += sizes
    return values


def create_default_local_load_plan(state_dict: dict[str, Any], metadata: Metadata, strict: bool = True) -> LoadPlan:
    """Drop-in for ``torch.distributed.checkpoint.default_planner.create_default_local_load_plan``.

    Raises as torch does: RuntimeError for a key that is not in the checkpoint (if ``strict``), ValueError for a size or
    a kind of entry that differs. Where no stored chunk covers a part of a wanted tensor, torch leaves that part as it
    was without a word; so does this function, but it logs a warning that names the tensors.
    """
    if (report := current_report()) is not None:
        report.planned_natively = True
    search = _Search(metadata)
    find, add_whole = search.finder(), search.add_whole
    for fqn, value in state_dict.items():
        entry = find(fqn)
        if entry is None:
            if strict:
                raise RuntimeError(f"Missing key in checkpoint state_dict: {fqn}.")
            continue
        number, stored_size = entry
        if number is not None and stored_size is not None and is_whole(value) and value.shape == stored_size:
            add_whole(fqn, number)
            continue
        if stored_size is not None and getattr(value, "size", None) is not None:
            size = global_size(value)
            if stored_size != size:
                raise ValueError(f"Size mismatch between saved {torch.Size(stored_size)} and current: {size} for {fqn}")
        # A rank outside the mesh of a DTensor on a sub-mesh holds nothing of it.
        if isinstance(value, DTensor) and value.device_mesh.get_coordinate() is None:
            continue
        if stored_size is None:
            search.add_bytes(fqn, value)
            continue
        try:
            wanted = search.wanted_chunks(value)
        except ValueError as error:
            raise ValueError(
                f"Invalid checkpoint metadata for {fqn}, expected BytesStorageMetadata but found "
                f"{TensorStorageMetadata}",
            ) from error
        search.add_chunks(fqn, number, len(stored_size), wanted)
    plan, incomplete = search.run()
    if incomplete:
        uncovered = [fqn for fqn in state_dict if fqn in incomplete]
        logger.warning(
            "the checkpoint has no data for parts of %d tensors, which keep what they hold: %s%s",
            len(uncovered),
            ", ".join(uncovered[:10]),
            ", ..." if len(uncovered) > 10 else "",
        )
    return plan


def _volume(sizes: Any) -> int:
    return sum(map(math.prod, sizes))


class _Search:
    """Collects what is wanted of all tensors, then looks for all overlaps in one go.

    Without columns, or where somebody may have changed an entry, chunks are compared tensor by tensor.
    """

    def __init__(self, metadata: Metadata) -> None:
        self.metadata = metadata.state_dict_metadata
        self.columns = columns_of(metadata)
        # Requests to the columns, of one tensor each.
        self.requests: list[int] = []
        self.fqns: list[str] = []
        self.wanted: list[Sequence[ChunkStorageMetadata] | None] = []
        # Items of all else, with the number of requests before.
        self.made: list[tuple[int, ReadItem]] = []
        self.incomplete: set[str] = set()  # FQNs
        self.dtensor_chunks: dict[Any, list[ChunkStorageMetadata]] = {}

    def finder(self) -> Callable[[str], tuple[int | None, Sequence[int] | None] | None]:
        """What tells the number of a key's entry, if the columns have it, and the size of its tensor, if it is one."""
        if self.columns is not None and cast(LazyDict[str, Any], self.metadata).untouched_columns is not None:
            return self.columns.find_size
        return self._find

    def _find(self, fqn: str) -> tuple[int | None, Sequence[int] | None] | None:
        if self.columns is not None and not cast(LazyDict[str, Any], self.metadata).made(fqn):
            return self.columns.find_size(fqn)
        entry = self.metadata.get(fqn)
        if entry is None:
            return None
        return None, entry.size if isinstance(entry, TensorStorageMetadata) else None

    def wanted_chunks(self, value: Any) -> list[ChunkStorageMetadata]:
        """torch's ``_create_chunk_list``; the geometry of DTensors that are alike is computed once."""
        # DTensor asks its local tensor first, which may tell its chunks by an attribute of its own.
        if type(value) is not DTensor or type(value._local_tensor) is not torch.Tensor or vars(value._local_tensor):
            return create_chunk_list(value)
        key = (value.device_mesh, value.placements, value.shape)
        chunks = self.dtensor_chunks.get(key)
        if chunks is None:
            chunks = self.dtensor_chunks[key] = create_chunk_list(value)
        return chunks

    def add_bytes(self, fqn: str, value: Any) -> None:
        self.made += ((len(self.fqns), item) for item in create_read_items(fqn, BytesStorageMetadata(), value))

    def add_whole(self, fqn: str, number: int) -> None:
        self.requests += (number, _native.WHOLE)
        self.fqns.append(fqn)
        self.wanted.append(None)

    def add_chunks(self, fqn: str, number: int | None, dims: int, wanted: list[ChunkStorageMetadata]) -> None:
        if not wanted:
            return
        values = None if number is None else _flatten(wanted, dims)
        if values is not None:
            assert number is not None
            self.requests += (number, len(wanted), *values)
            self.fqns.append(fqn)
            self.wanted.append(wanted)
            return
        stored = cast(TensorStorageMetadata, self.metadata[fqn])
        items = create_read_items_for_chunk_list(fqn, stored, wanted)
        if _volume(item.lengths for item in items) < _volume(chunk.sizes for chunk in wanted):
            self.incomplete.add(fqn)
        self.made += ((len(self.fqns), item) for item in items)

    def run(self) -> tuple[LoadPlan, set[str]]:
        """The plan, in the order of the state dict, and the tensors of which the checkpoint lacks something."""
        if self.columns is None:
            return LoadPlan([item for _, item in self.made]), self.incomplete
        boxes = _native.find_boxes(self.columns, self.requests)
        self.incomplete.update(self.fqns[request] for request in boxes.uncovered)
        plan = ColumnPlan.of(PlannedTensors(self.columns, boxes, self.fqns, self.wanted), self.made)
        if all(item.type is LoadItemType.BYTE_IO for _, item in self.made):
            return plan, self.incomplete
        return LoadPlan(plan.items), self.incomplete


def global_size(value: Any) -> torch.Size:
    """The size of the global tensor that a value of a state dict is, or is a part of."""
    if isinstance(value, ShardedTensor):
        return value.metadata().size  # what size() returns too, after a detour and with a warning
    size: torch.Size = torch.Size(value.global_shape) if is_checkpointable_tensor(value) else value.size()
    return size
