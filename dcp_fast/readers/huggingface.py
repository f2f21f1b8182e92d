"""Directories of safetensors files, as Hugging Face has them and as torch's HuggingFaceStorageWriter writes them."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch.distributed.checkpoint import hf_storage as torch_huggingface
from torch.distributed.checkpoint import quantized_hf_storage as torch_quantized
from torch.distributed.checkpoint.metadata import Metadata

from dcp_fast import _native
from dcp_fast.metadata.safetensors import read_headers
from dcp_fast.observe.report import LoadReport
from dcp_fast.readers.engine_reader import EngineReader, IoName, owned_by
from dcp_fast.readers.proof import why_no_payloads
from dcp_fast.transfer.payloads import Payloads
from dcp_fast.transfer.quantization import QuantizedPayloads, with_dequantized_chunks, with_dequantized_sizes

TARGET_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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

    def why_slow(self) -> str:
        return why_no_payloads(self)

    def _records(self, options: _native.Options, report: LoadReport) -> Payloads:
        return Payloads(self.storage_data, options, report)


def read_headers_of(_torchs: Callable[..., Metadata], reader: torch_huggingface.HuggingFaceStorageReader) -> Metadata:
    """Read metadata for a reader of torch's class, or one derived from it. ``_torchs``: its own method, bound to it."""
    return owned_by(reader, read_headers(reader.fs.ls(reader.path), getattr(reader, "threads", None)))


class QuantizedHuggingFaceStorageReader(HuggingFaceStorageReader, torch_quantized.QuantizedHuggingFaceStorageReader):
    """Drop-in for torch's ``QuantizedHuggingFaceStorageReader`` that dequantizes tensors while it reads them.

    A tensor ``x`` is quantized if there are scales ``x_scale_inv`` for its blocks, as of FP8, or if it is
    ``y_blocks``, in bytes of MXFP4, whose scales are ``y_scales``. All others are read as by
    :class:`dcp_fast.HuggingFaceStorageReader`.

    Args:
        path, thread_count: as of :class:`dcp_fast.HuggingFaceStorageReader`.
        target_dtype: float32, bfloat16 or float16. What is dequantized is rounded to this dtype, and converted from it
            to the dtype of its destination if that is another one.
        block_size: rows and columns of the blocks that have a scale, but for MXFP4.
        threads, block_bytes, staging_bytes, pinned_bytes, device_staging_bytes, synchronize, io, trace: as of
            :class:`dcp_fast.FileSystemReader`.

    Raises: as :class:`dcp_fast.HuggingFaceStorageReader`. What is wrong with scales is found before anything is placed:
        SizeMismatchError if they do not fit, UnsupportedDTypeError for dtypes that cannot be dequantized,
        CorruptCheckpointError if those of MXFP4 are missing.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        thread_count: int = 1,
        target_dtype: torch.dtype = torch.float32,
        block_size: int = 128,
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
        if target_dtype not in TARGET_DTYPES:
            raise ValueError(
                f"target_dtype must be one of {[str(dtype) for dtype in TARGET_DTYPES]}, got {target_dtype}"
            )
        if block_size < 1:
            raise ValueError(f"block_size must be positive, got {block_size}")
        super().__init__(
            path,
            thread_count,
            threads=threads,
            block_bytes=block_bytes,
            staging_bytes=staging_bytes,
            pinned_bytes=pinned_bytes,
            device_staging_bytes=device_staging_bytes,
            synchronize=synchronize,
            io=io,
            trace=trace,
        )
        self.target_dtype = target_dtype
        self.block_size = block_size

    def read_metadata(self) -> Metadata:
        """Read the headers of all files. MXFP4 has the size of the dequantized tensor.

        Raises: as :meth:`dcp_fast.HuggingFaceStorageReader.read_metadata`.
        """
        return with_dequantized_sizes(super().read_metadata())

    def _records(self, options: _native.Options, report: LoadReport) -> QuantizedPayloads:
        return QuantizedPayloads(self.storage_data, options, report, self.target_dtype, self.block_size)


def read_quantized_headers_of(
    torchs: Callable[..., Metadata], reader: torch_quantized.QuantizedHuggingFaceStorageReader
) -> Metadata:
    """Read metadata for a reader of torch's class, or one derived from it. ``torchs``: its own method, bound to it."""
    return with_dequantized_chunks(torchs())
