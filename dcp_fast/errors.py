"""Exceptions of a load. Each names the file, the FQN and the byte range, and is of the type that torch raises there."""

from __future__ import annotations

import errno
import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from dcp_fast import _native

try:
    from safetensors import SafetensorError  # type: ignore[import-not-found,unused-ignore]
except ImportError:  # then nobody else raises it

    class SafetensorError(Exception):  # type: ignore[no-redef]
        """Stands in for the class of the same name."""


__all__ = [
    "CorruptCheckpointError",
    "CorruptHeaderError",
    "CorruptMetadataError",
    "CorruptPickleError",
    "CudaError",
    "CudaOutOfMemoryError",
    "FileAccessError",
    "FileMissingError",
    "FilePermissionError",
    "FileTimeoutError",
    "LoadError",
    "MetadataAccessError",
    "NotADirectoryInPathError",
    "NotAFileError",
    "OptimizerStateError",
    "OutOfMemoryError",
    "SizeMismatchError",
    "TruncatedFileError",
    "UnknownTransformError",
    "UnsupportedDTypeError",
    "UntrustedBytesError",
    "UntrustedMetadataError",
]


class LoadError(Exception):
    """Base of all errors that dcp_fast raises about a checkpoint.

    Attributes:
        reason: what is wrong.
        path: the file, "" if no single file is at fault.
        fqn: the FQN of the tensor or value, "" if none is known.
        offset, length: the byte range in the file, None if none is known.
        error_number: errno of the system call that failed, 0 if none did.

    Tensors of the state dict that were not loaded before the error hold what they held before it, wherever they lie;
    which ones were loaded, or were being loaded, is not told. No thread and no GPU writes to them any more.
    """

    def __init__(
        self,
        reason: str,
        path: str = "",
        fqn: str = "",
        offset: int | None = None,
        length: int | None = None,
        error_number: int = 0,
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.path = path
        self.fqn = fqn
        self.offset = offset
        self.length = length
        self.error_number = error_number

    def __str__(self) -> str:
        text = self.reason
        if self.fqn:
            text += f"; FQN {self.fqn!r}"
        if self.path:
            text += f"; file {self.path!r}"
        if self.offset is not None and self.length is not None:
            text += f"; bytes {self.offset} to {self.offset + self.length}"
        if self.error_number:
            text += f"; {errno.errorcode.get(self.error_number, 'errno')} ({self.error_number})"
        return text

    def __reduce__(self) -> tuple[object, ...]:
        # torch sends the exceptions of each rank to all others.
        return type(self), (self.reason, self.path, self.fqn, self.offset, self.length, self.error_number)


class CorruptCheckpointError(LoadError, RuntimeError, SafetensorError):  # type: ignore[misc,unused-ignore]
    """The bytes of a file contradict themselves or the metadata.

    torch raises a RuntimeError about its own files, and a SafetensorError about those of safetensors, if that is there.
    """


class TruncatedFileError(CorruptCheckpointError, EOFError):
    """A file ends before the bytes that the metadata promises."""


class CorruptPickleError(CorruptCheckpointError, pickle.UnpicklingError):
    """The description of a tensor within a record cannot be read, or asks for what is not allowed there."""


class CorruptMetadataError(CorruptPickleError, EOFError, ValueError, AssertionError):
    """The metadata of the checkpoint cannot be read.

    Depending on where it is damaged, torch's reader raises one type or another, and its load an AssertionError; this is
    all of them but accidents.
    """


class CorruptHeaderError(CorruptMetadataError, KeyError, TypeError):
    """The header of a safetensors file cannot be read, or contradicts the file, another file or the index."""


class UnsupportedDTypeError(LoadError, KeyError):
    """A tensor that is wanted is stored in a dtype that this torch does not have."""


class UntrustedMetadataError(LoadError, pickle.UnpicklingError, AssertionError):
    """The metadata asks for what could run code; ``FileSystemReader(path, trust_metadata=True)`` lets it."""


class UntrustedBytesError(LoadError, pickle.UnpicklingError):
    """A bytes entry asks for what could run code, and so is refused.

    ``torch.serialization.add_safe_globals`` allows single types; ``trust_bytes=True`` of :func:`dcp_fast.load`,
    :class:`dcp_fast.DefaultLoadPlanner` or :func:`dcp_fast.install` allows everything.

    Attributes:
        safe_globals: what ``add_safe_globals`` would have to be given for this entry, as code; empty if that does not
            help.
    """

    safe_globals: tuple[str, ...] = ()

    def __reduce__(self) -> tuple[object, ...]:
        told = {name: value for name, value in vars(self).items() if name == "safe_globals"}
        return *super().__reduce__(), told


class UnknownTransformError(CorruptCheckpointError, ValueError):
    """An entry was stored with a transform that is not known here."""


class SizeMismatchError(LoadError, AssertionError, RuntimeError, IndexError):
    """A box that the plan asks for does not fit the stored tensor or its destination.

    Depending on how it does not fit, torch raises one type or another; this is all of them.
    """


class OptimizerStateError(LoadError, AssertionError, ValueError, KeyError, TypeError):
    """The optimizer state that was asked for is not in the checkpoint, or does not fit the model.

    Depending on what is wrong, torch raises one type or another where it raises at all; this is all of them.
    """


class OutOfMemoryError(LoadError, MemoryError):
    """There is not memory enough for bounce buffers, or for a record."""


class CudaError(LoadError, RuntimeError):
    """A call of the CUDA driver failed, or work that a GPU was given. What the load wrote on the GPU is unknown.

    Or a bytes entry holds a tensor of a GPU that is not there.
    """


class CudaOutOfMemoryError(CudaError, OutOfMemoryError, torch.OutOfMemoryError):
    """Memory on a GPU could not be had."""


# By the errno of the system call that failed; FileAccessError for all others, whose subclasses add their own.
_BY_ERRNO: dict[int, type[LoadError]] = {errno.ENOMEM: OutOfMemoryError}


class FileAccessError(LoadError, OSError):
    """A system call on a file failed; `errno` tells how."""

    def __init_subclass__(cls, errnos: Sequence[int] = ()) -> None:
        _BY_ERRNO.update(dict.fromkeys(errnos, cls))

    def __init__(
        self,
        reason: str,
        path: str = "",
        fqn: str = "",
        offset: int | None = None,
        length: int | None = None,
        error_number: int = 0,
    ) -> None:
        super().__init__(reason, path, fqn, offset, length, error_number)
        self.errno = error_number
        self.strerror = os.strerror(error_number)
        self.filename = path


class FileMissingError(FileAccessError, FileNotFoundError, errnos=[errno.ENOENT]):
    """A file that the metadata names does not exist."""


class NotAFileError(FileAccessError, IsADirectoryError, errnos=[errno.EISDIR]):
    """A directory stands where the metadata names a file."""


class NotADirectoryInPathError(FileAccessError, NotADirectoryError, errnos=[errno.ENOTDIR]):
    """A file stands where the metadata names a directory."""


class FileTimeoutError(FileAccessError, TimeoutError, errnos=[errno.ETIMEDOUT]):
    """A network file system did not answer."""


class FilePermissionError(FileAccessError, PermissionError, errnos=[errno.EACCES, errno.EPERM]):
    """A file may not be read."""


class MetadataAccessError(FileAccessError, AssertionError):
    """A system call on the metadata of the checkpoint failed: most often there is none.

    torch's load raises an AssertionError, and its reader an OSError.
    """


_BY_KIND: dict[str, type[LoadError]] = {
    "truncated": TruncatedFileError,
    "corrupt": CorruptCheckpointError,
    "corrupt_pickle": CorruptPickleError,
    "cuda": CudaError,
    "cuda_out_of_memory": CudaOutOfMemoryError,
    "cuda_refused": CudaError,
    "corrupt_metadata": CorruptMetadataError,
    "corrupt_header": CorruptHeaderError,
    "unknown_dtype": UnsupportedDTypeError,
    "size_mismatch": SizeMismatchError,
}


def torch_load_error(error: Exception) -> tuple[type[LoadError], str]:
    """The class and the reason for what ``torch.load(weights_only=True)`` raises about an entry."""
    if isinstance(error, pickle.UnpicklingError):
        return CorruptPickleError, str(error)
    if isinstance(error, EOFError):
        return TruncatedFileError, f"the record ends early: {error}"
    if isinstance(error, MemoryError):
        return OutOfMemoryError, "out of memory for a record"
    # An entry that is intact, and was saved on a GPU: torch's planner too loads it nowhere else.
    if str(error).startswith(
        ("Attempting to deserialize object on a CUDA", "Attempting to deserialize object on CUDA")
    ):
        return CudaError, f"{type(error).__name__}: {error}"
    # What torch's allocator raises on the CPU is a RuntimeError like any other.
    cls = OutOfMemoryError if "DefaultCPUAllocator" in str(error) else CorruptCheckpointError
    return cls, f"{type(error).__name__}: {error}"


@contextmanager
def typed_errors(fqns: Sequence[str] = (), checkpoint: str | os.PathLike[str] = "") -> Iterator[None]:
    """Turn errors of the native engine into the classes above.

    Args:
        fqns: names the records by index.
        checkpoint: named where memory ran out for no file in particular.
    """
    try:
        yield
    except _native.NativeError as error:
        cls = _BY_ERRNO.get(error.error_number, FileAccessError) if error.kind == "io" else _BY_KIND[error.kind]
        raise cls(
            error.reason,
            error.path,
            fqns[error.record] if 0 <= error.record < len(fqns) else error.fqn,
            error.offset if error.offset >= 0 else None,
            error.length if error.length >= 0 else None,
            error.error_number,
        ) from None
    except MemoryError as error:
        if isinstance(error, LoadError):
            raise
        raise OutOfMemoryError(str(error) or "out of memory while loading", os.fspath(checkpoint)) from error
