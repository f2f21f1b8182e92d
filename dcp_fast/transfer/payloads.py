"""Records of safetensors files: mere payloads, which the engine places without any help of torch's."""

from __future__ import annotations

from collections.abc import Mapping

from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from dcp_fast import _native
from dcp_fast._torch import SafetensorsInfo, StorageReaderTransforms
from dcp_fast.errors import CorruptHeaderError, SizeMismatchError
from dcp_fast.metadata.safetensors import read_columns
from dcp_fast.observe.report import LoadReport
from dcp_fast.transfer.record_rows import Place
from dcp_fast.transfer.records import Records


class Payloads(Records):
    """The tensors of a directory of safetensors files.

    Where plan and metadata come from the same columns, these tell where payloads lie. Otherwise the files are asked by
    name, as torch's reader asks them.

    Args:
        storage_data: as torch's HuggingFaceStorageReader makes it: index of a chunk to its file.
        options, report: as of :class:`Records`.
    """

    def __init__(
        self, storage_data: Mapping[MetadataIndex, SafetensorsInfo], options: _native.Options, report: LoadReport
    ) -> None:
        super().__init__("", storage_data, StorageReaderTransforms(), options, report)  # type: ignore[arg-type]
        self._headers: dict[str, _native.MetadataColumns] = {}

    def path(self, file: str) -> str:
        return file

    def place(self, item: ReadItem) -> Place:
        path, fqn = self.storage_data[item.storage_index].relative_path, item.storage_index.fqn
        if item.type is LoadItemType.BYTE_IO:
            raise SizeMismatchError("a value is wanted where the file has a tensor", path, fqn)
        columns = self._headers.get(path)
        if columns is None:
            columns = self._headers[path] = read_columns([path], threads=1)
        entry = columns.find_entry(fqn)
        if entry < 0:
            raise CorruptHeaderError("the file holds no such tensor", path, fqn)
        _, offset, length, code, sizes = columns.payload(columns.row_of_chunk(entry, 0))
        return Place(path, offset, length, payload=(code, sizes))
