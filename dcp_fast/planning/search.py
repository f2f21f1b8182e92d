"""The search: which boxes of which stored chunks does a state dict want?

State-dict semantics are torch's own, called rather than copied; only the search for overlaps is native.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import (
    create_read_items_for_chunk_list as torch_read_items_for_chunk_list,
)
from torch.distributed.tensor import DTensor, Replicate, Shard

from dcp_fast import _native
from dcp_fast._torch import ShardedTensor, StridedShard, create_chunk_list, is_checkpointable_tensor
from dcp_fast.metadata.lazy import LazyDict, columns_of
from dcp_fast.observe.report import current_report
from dcp_fast.planning.column_plan import ColumnPlan, PlannedTensors, bytes_item
from dcp_fast.planning.values import TENSOR_TYPES, plain_local_tensor

logger = logging.getLogger("dcp_fast")

# Placements whose equal instances split a tensor in the same way. Subclasses may have more to tell than they compare.
_KNOWN_PLACEMENTS = (Shard, Replicate, StridedShard)
# Of DTensors as torch has them the chunks follow from mesh, placements and shape.
_CREATE_CHUNK_LIST = DTensor.__create_chunk_list__


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

    Where no stored chunk covers a part of a wanted tensor, the plan leaves that part out, as torch's does. Unlike
    torch, this function then logs a warning that names the tensors.

    Args:
        state_dict: what is wanted, flat: tensors or values by FQN.
        metadata: of the checkpoint.
        strict: whether a key that the checkpoint lacks is an error. If not, it is skipped.

    Raises:
        RuntimeError: the checkpoint lacks a key, and ``strict`` is set.
        ValueError: a tensor has another size in the checkpoint, or an entry is of another kind there.
    """
    if (report := current_report()) is not None:
        report.planned_natively = True
    search = _Search(metadata, strict)
    search.add_all(state_dict)
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
    """Collects what is wanted of all tensors, then finds all overlaps in one native call.

    That call compares with the columns of the metadata. If there are none, or if an entry exists as an object, which
    somebody may have changed, the chunks of that entry are compared at once, tensor by tensor.

    Attributes:
        requests: for the native call, where there are columns. It also collects what needs no Python: whole tensors,
            and DTensors like one before.
        made: items that need no native call, each with the number of requests before it.
        incomplete: FQNs of tensors of which the checkpoint lacks something.
    """

    def __init__(self, metadata: Metadata, strict: bool) -> None:
        self.strict = strict
        self.metadata = metadata.state_dict_metadata
        self.columns = columns_of(metadata)
        self.requests: _native.Requests | None = None
        if self.columns is not None:
            self.requests = _native.Requests(self.columns, self.metadata, TENSOR_TYPES, _KNOWN_PLACEMENTS)
        self.made: list[tuple[int, ReadItem | str]] = []  # of bytes entries: the FQN
        self.incomplete: set[str] = set()

    def add_all(self, state_dict: dict[str, Any]) -> None:
        if self.requests is not None:
            self.requests.add_all(state_dict.items(), self.add)
            return
        for fqn, value in state_dict.items():
            self.add(fqn, value)

    def add(self, fqn: str, value: Any) -> None:
        """Add what is wanted of a value, as torch's planner wants it."""
        entry = self._find(fqn)
        if entry is None:
            if self.strict:
                raise RuntimeError(f"Missing key in checkpoint state_dict: {fqn}.")
            return
        number, stored_size = entry
        if stored_size is not None and getattr(value, "size", None) is not None:
            size = global_size(value)
            if stored_size != size:
                raise ValueError(f"Size mismatch between saved {torch.Size(stored_size)} and current: {size} for {fqn}")
        # A rank outside the mesh of a DTensor on a sub-mesh holds nothing of it.
        is_outside = isinstance(value, DTensor) and value.device_mesh.get_coordinate() is None
        if stored_size is None:
            if not is_outside:
                self.made.append((self._request_count, fqn))
            return
        try:
            wanted = [] if is_outside else create_chunk_list(value)
        except ValueError as error:
            raise ValueError(
                f"Invalid checkpoint metadata for {fqn}, expected BytesStorageMetadata but found "
                f"{TensorStorageMetadata}",
            ) from error
        self._add_chunks(fqn, number, len(stored_size), value, wanted)

    def _find(self, fqn: str) -> tuple[int | None, Sequence[int] | None] | None:
        """None if the checkpoint lacks the key, else two facts about its entry.

        The first is the entry's number in the columns, None if the entry must be looked at as an object. The second is
        the size of the tensor, None for a bytes entry.
        """
        if self.columns is not None and not cast(LazyDict[str, Any], self.metadata).made(fqn):
            return self.columns.find_size(fqn)
        entry = self.metadata.get(fqn)
        if entry is None:
            return None
        return None, entry.size if isinstance(entry, TensorStorageMetadata) else None

    def _add_chunks(
        self, fqn: str, number: int | None, dims: int, value: Any, wanted: list[ChunkStorageMetadata]
    ) -> None:
        if self.requests is not None and number is not None and (values := _flatten(wanted, dims)) is not None:
            if plain_local_tensor(value) is not None and DTensor.__create_chunk_list__ is _CREATE_CHUNK_LIST:
                self.requests.learn(value, wanted, values)
            if wanted:
                self.requests.add(fqn, number, wanted, values)
            return
        if not wanted:
            return
        stored = cast(TensorStorageMetadata, self.metadata[fqn])
        items = create_read_items_for_chunk_list(fqn, stored, wanted)
        if _volume(item.lengths for item in items) < _volume(chunk.sizes for chunk in wanted):
            self.incomplete.add(fqn)
        self.made += ((self._request_count, item) for item in items)

    @property
    def _request_count(self) -> int:
        return 0 if self.requests is None else len(self.requests)

    def run(self) -> tuple[LoadPlan, set[str]]:
        """The plan, in the order of the state dict, and ``incomplete``."""
        if self.columns is None or self.requests is None:
            items = [bytes_item(item) if isinstance(item, str) else item for _, item in self.made]
            return LoadPlan(items), self.incomplete
        boxes, fqns = self.requests.find_boxes(), self.requests.fqns
        self.incomplete.update(fqns[request] for request in boxes.uncovered)
        plan = ColumnPlan.of(PlannedTensors(self.columns, boxes, fqns, self.requests.wanted), self.made)
        if all(isinstance(item, str) for _, item in self.made):
            return plan, self.incomplete
        return LoadPlan(plan.items), self.incomplete


def global_size(value: Any) -> torch.Size:
    """The size of the global tensor that a value of a state dict is, or is a part of, in elements."""
    if isinstance(value, ShardedTensor):
        return value.metadata().size  # as size() returns, which takes longer and warns
    size: torch.Size = torch.Size(value.global_shape) if is_checkpointable_tensor(value) else value.size()
    return size
