"""Directories of safetensors files, as Hugging Face has them and as torch's HuggingFaceStorageWriter writes them."""

from __future__ import annotations

import os
from collections.abc import Callable

from torch.distributed.checkpoint import hf_storage as torch_huggingface
from torch.distributed.checkpoint.metadata import Metadata

from dcp_fast import _native
from dcp_fast.metadata.safetensors import read_headers
from dcp_fast.observe.report import LoadReport
from dcp_fast.readers.engine_reader import EngineReader, IoName, owned_by
from dcp_fast.readers.proof import why_no_payloads
from dcp_fast.transfer.payloads import Payloads

__all__ = ["HuggingFaceStorageReader", "read_headers_of"]


class HuggingFaceStorageReader(EngineReader, torch_huggingface.HuggingFaceStorageReader):
    """Drop-in for ``torch.distributed.checkpoint.HuggingFaceStorageReader`` that reads only the bytes that are needed.

    Works with any ``LoadPlanner``, and without the safetensors package. As torch's, it takes all ``.safetensors`` files
    of the directory together: single files, files that an index belongs to, and chunks that each rank saved for itself
    (``save_distributed``).

    Args:
        path: a local directory.
        thread_count: as torch's. If it is more than 1, it is the default of ``threads``.
        threads, block_bytes, staging_bytes, pinned_bytes, device_staging_bytes, synchronize, io, trace: as of
            :class:`dcp_fast.FileSystemReader`.

    Raises: as :class:`dcp_fast.FileSystemReader` from ``read_data`` and ``set_up_storage_reader``.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        thread_count: int = 1,
        *,
        threads: int | None = None,
        block_bytes: int | None = None,
        staging_bytes: int = 32 << 20,
        pinned_bytes: int | None = None,
        device_staging_bytes: int | None = None,
        synchronize: bool = True,
        io: IoName = "auto",
        trace: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(
            path,
            thread_count,
            threads=thread_count if threads is None and thread_count > 1 else threads,
            block_bytes=block_bytes,
            staging_bytes=staging_bytes,
            pinned_bytes=pinned_bytes,
            device_staging_bytes=device_staging_bytes,
            synchronize=synchronize,
            io=io,
            trace=trace,
        )

    def read_metadata(self) -> Metadata:
        """Read the headers of all files.

        The dicts of the result make their values when they are asked for; see
        :class:`dcp_fast.metadata.lazy.LazyDict`.

        Raises:
            OSError: as the file system does.
            CorruptHeaderError: a header is damaged, or an index or another file contradicts it.
            FileMissingError: an index names a file that is not there.
        """
        with self.metadata_stage():
            return read_headers_of(super().read_metadata, self)

    def _why_slow(self) -> str:
        return why_no_payloads(self)

    def _records(self, options: _native.Options, report: LoadReport) -> Payloads:
        return Payloads(self.storage_data, options, report)


def read_headers_of(_torchs: Callable[..., Metadata], reader: torch_huggingface.HuggingFaceStorageReader) -> Metadata:
    """Read metadata for a reader of torch's class, or one derived from it. ``_torchs``: its own method, bound to it."""
    return owned_by(reader, read_headers(reader.fs.ls(reader.path), getattr(reader, "threads", None)))
