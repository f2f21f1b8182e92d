"""Quantized tensors of safetensors files: which ones are, and where their scales lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from dcp_fast import _native
from dcp_fast._torch import SafetensorsInfo
from dcp_fast.errors import CorruptCheckpointError, SizeMismatchError, UnsupportedDTypeError
from dcp_fast.metadata.lazy import LazyDict
from dcp_fast.metadata.safetensors import read_columns
from dcp_fast.observe.report import LoadReport
from dcp_fast.transfer.destinations import DTYPES
from dcp_fast.transfer.payloads import Payloads
from dcp_fast.transfer.quantized_tensors import CODES, MXFP4, QuantizedTensor, StoredTensor

_SCALE_INV = "_scale_inv"
_BLOCKS, _SCALES = "_blocks", "_scales"
_EXPONENTS = CODES["float8_e8m0fnu"]
# The least bounce buffer has room for two blocks of MXFP4 of so many bytes. Models have 16.
_MOST_BLOCK_BYTES = 256


class QuantizedPayloads(Payloads):
    """The tensors of a directory of safetensors files, some of them quantized.

    Args:
        storage_data, options, report: as of :class:`Payloads`.
        target_dtype: of what quantized tensors become, before they are converted to the dtype of their destination.
        block_size: rows and columns of the blocks that have a scale, but for MXFP4.
    """

    def __init__(
        self,
        storage_data: Mapping[MetadataIndex, SafetensorsInfo],
        options: _native.Options,
        report: LoadReport,
        target_dtype: torch.dtype,
        block_size: int,
    ) -> None:
        super().__init__(storage_data, options, report)
        self._target_dtype = target_dtype
        self._block_size = block_size

    def quantized(self, fqns: Sequence[str]) -> dict[int, QuantizedTensor]:
        found: dict[int, QuantizedTensor] = {}
        for record, fqn in enumerate(fqns):
            tensor = self._blocks_of_mxfp4(fqn) if fqn.endswith(_BLOCKS) else self._scaled(fqn)
            if tensor is not None:
                found[record] = tensor
        return found

    def _scaled(self, fqn: str) -> QuantizedTensor | None:
        scales = self._find(fqn + _SCALE_INV)
        stored = self._find(fqn) if scales is not None else None
        if scales is None or stored is None:
            return None
        has_exponents = scales.code == _EXPONENTS
        float32 = CODES["float32"]
        if not has_exponents and not _native.can_dequantize(scales.code, False, float32, float32):
            raise scales.error(UnsupportedDTypeError, f"scales of dtype {_native.DTYPES[scales.code]}")
        if not _native.can_dequantize(stored.code, has_exponents, float32, float32):
            raise stored.error(UnsupportedDTypeError, f"scales for elements of dtype {_native.DTYPES[stored.code]}")
        if len(stored.sizes) < 2:
            raise stored.error(SizeMismatchError, f"blocks of scales for a tensor of sizes {list(stored.sizes)}")
        size = self._block_size
        blocks = (*stored.sizes[:-2], *(-(-length // size) for length in stored.sizes[-2:]))
        _check(stored, scales, blocks, f" in blocks of {size} x {size}")
        return QuantizedTensor(
            stored, scales, stored.sizes, (size, size), stored.code, has_exponents, self._target_dtype
        )

    def _blocks_of_mxfp4(self, fqn: str) -> QuantizedTensor | None:
        stored = self._find(fqn)
        if stored is None or not _is_mxfp4(fqn, DTYPES[stored.code], stored.sizes):
            return None
        name = fqn.removesuffix(_BLOCKS) + _SCALES
        scales = self._find(name)
        if scales is None:
            raise stored.error(CorruptCheckpointError, f"the checkpoint lacks the scales {name!r} of these blocks")
        if scales.code not in (CODES["uint8"], _EXPONENTS):
            raise scales.error(UnsupportedDTypeError, f"scales of MXFP4 of dtype {_native.DTYPES[scales.code]}")
        if stored.sizes[-1] > _MOST_BLOCK_BYTES:
            raise stored.error(SizeMismatchError, f"blocks of MXFP4 of {stored.sizes[-1]} bytes; models have 16")
        _check(stored, scales, stored.sizes[:-1], "")
        block = (1, 2 * stored.sizes[-1])
        return QuantizedTensor(stored, scales, dequantized_size(stored.sizes), block, MXFP4, True, self._target_dtype)

    def _find(self, fqn: str) -> StoredTensor | None:
        """A tensor by its name; None if the checkpoint has none."""
        columns = self._all_columns
        is_whole = True
        if columns is None:
            indices = self._indices.get(fqn)
            if indices is None:
                return None
            is_whole = len(indices) == 1
            path = self.storage_data[indices[0]].relative_path
            columns = self._headers.get(path)
            if columns is None:
                columns = self._headers[path] = read_columns([path], threads=1)
        entry = columns.find_entry(fqn)
        if entry < 0:
            return None
        chunks: list[list[list[int]]] = cast(Any, columns.chunks(entry).tolist())
        is_whole = is_whole and len(chunks) == 1 and not any(chunks[0][0])
        path, offset, length, code, sizes = columns.payload(columns.row_of_chunk(entry, 0))
        tensor = StoredTensor(fqn, path, offset, length, code, tuple(sizes), is_whole)
        if code >= len(_native.DTYPES):
            raise tensor.error(UnsupportedDTypeError, f"torch has no dtype {_native.METADATA_DTYPES[code]}")
        return tensor

    @cached_property
    def _all_columns(self) -> _native.MetadataColumns | None:
        return self.storage_data.untouched_columns if isinstance(self.storage_data, LazyDict) else None

    @cached_property
    def _indices(self) -> dict[str, list[MetadataIndex]]:
        indices: dict[str, list[MetadataIndex]] = {}
        for index in self.storage_data:
            indices.setdefault(index.fqn, []).append(index)
        return indices


def _check(stored: StoredTensor, scales: StoredTensor, blocks: Sequence[int], how: str) -> None:
    for tensor in (stored, scales):
        if not tensor.is_whole:
            raise tensor.error(SizeMismatchError, "a quantized tensor must be in one piece, as must its scales")
    if scales.sizes != tuple(blocks):
        reason = (
            f"scales of sizes {list(scales.sizes)} for {stored.fqn!r} of sizes {list(stored.sizes)}{how}, "
            f"which needs {list(blocks)}"
        )
        raise scales.error(SizeMismatchError, reason)


def _is_mxfp4(fqn: str, dtype: torch.dtype | None, sizes: Sequence[int]) -> bool:
    return fqn.endswith(_BLOCKS) and dtype == torch.uint8 and len(sizes) >= 2


def dequantized_size(sizes: Sequence[int]) -> tuple[int, ...]:
    """What blocks of MXFP4 become: their last two dimensions are one, in which a byte is two elements."""
    return (*sizes[:-2], sizes[-2] * sizes[-1] * 2)


def with_dequantized_sizes(metadata: Metadata) -> Metadata:
    """Metadata of safetensors files whose blocks of MXFP4 have the size of the dequantized tensor. It is changed."""
    for fqn in metadata.state_dict_metadata:
        if fqn.endswith(_BLOCKS):
            entry = metadata.state_dict_metadata[fqn]
            if isinstance(entry, TensorStorageMetadata) and _is_mxfp4(fqn, entry.properties.dtype, entry.size):
                entry.size = torch.Size(dequantized_size(entry.size))
    return with_dequantized_chunks(metadata)


def with_dequantized_chunks(metadata: Metadata) -> Metadata:
    """Metadata whose chunks of MXFP4 fit the size of the dequantized tensor, which torch corrects alone.

    Args:
        metadata: it is changed. Other sizes than those of tensors with such a size are left alone.
    """
    offsets: dict[MetadataIndex, torch.Size] = {}
    for fqn in metadata.state_dict_metadata:
        entry = metadata.state_dict_metadata[fqn] if fqn.endswith(_BLOCKS) else None
        if not isinstance(entry, TensorStorageMetadata) or entry.properties.dtype != torch.uint8:
            continue
        if any(len(chunk.sizes) != len(entry.size) + 1 for chunk in entry.chunks):
            continue
        for number, chunk in enumerate(entry.chunks):
            *before, group, byte = chunk.offsets
            at = torch.Size((*before, 2 * (group * chunk.sizes[-1] + byte)))
            offsets[MetadataIndex(fqn, chunk.offsets, number)] = at
            entry.chunks[number] = ChunkStorageMetadata(at, torch.Size(dequantized_size(chunk.sizes)))
    if offsets:
        metadata.storage_data = {
            MetadataIndex(index.fqn, offsets.get(index, index.offset), index.index): info
            for index, info in metadata.storage_data.items()
        }
    return metadata
