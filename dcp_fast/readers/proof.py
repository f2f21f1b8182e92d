"""Whether a reader reads the records of local files just as torch's FileSystemReader does: by proof, not by guess.

Functions are compared by identity with torch's as they are at import. Whoever patches one of them has a way of their
own.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import filesystem as torch_filesystem
from torch.distributed.checkpoint import hf_storage as torch_huggingface
from torch.distributed.checkpoint import quantized_hf_storage as torch_quantized

from dcp_fast._torch import FsspecFiles, StorageReaderTransforms
from dcp_fast.switches import original_of

try:
    from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]
except ImportError:
    LocalFileSystem = None


_READ_DATA = torch_filesystem.FileSystemReader.read_data
_SLICE_FILE = torch_filesystem.FileSystemReader._slice_file
# What torch's HuggingFaceStorageReader reads data by.
_READ_PAYLOADS = torch_huggingface.HuggingFaceStorageReader.read_data
_STEPS_OF_PAYLOADS: dict[str, Any] = {
    name: getattr(torch_huggingface.HuggingFaceStorageReader, name)
    for name in ("_process_read_request", "_read_files_from_queue")
}
# The same of the class derived from it.
_STEPS_OF_QUANTIZED: dict[str, Any] = {
    name: getattr(torch_quantized.QuantizedHuggingFaceStorageReader, name)
    for name in (
        *("_read_files_from_queue", "_process_read_request", "_is_tensor_quantized", "_build_weight_scale_mapping"),
        *("_read_quantized_tensor_with_block_alignment", "_get_slice_to_block_mapping"),
        *("_dequantize_tensor", "_dequantize_tensor_mxfp4"),
    )
}
_TRANSFORM = StorageReaderTransforms.transform_load_stream
# By class: the methods that tell which bytes are read, as they are at import.
_METHODS = {
    cls: {name: getattr(cls, name) for name in names}
    for cls, names in (
        (torch_filesystem.FileSystem, ("create_stream", "concat_path")),
        (FsspecFiles, ("create_stream", "concat_path")),
        (LocalFileSystem, ("open", "_open", "_strip_protocol")),
    )
    if cls is not None
}


class LocalFiles:
    """Where a reader's files lie, or why that cannot be told.

    Attributes:
        root: directory of the checkpoint, if there is no reason.
        reason: why another way of reading may differ from the reader's own; empty if none can.
    """

    def __init__(self, root: str | os.PathLike[str] = "", reason: str = "") -> None:
        self.root = root
        self.reason = reason


def local_files(reader: Any) -> LocalFiles:
    """Where torch's ``read_data`` looks for the files of a reader."""
    cls: Any = type(reader)
    if cls.__getattribute__ is not object.__getattribute__:
        return LocalFiles(reason="it has attributes of its own making")
    if method_of(reader, "_slice_file") is not _SLICE_FILE:
        return LocalFiles(reason="it has a _slice_file of its own")
    transforms = getattr(reader, "transforms", None)
    if (
        type(transforms) is not StorageReaderTransforms
        or method_of(transforms, "transform_load_stream") is not _TRANSFORM
    ):
        return LocalFiles(reason="it has transforms of its own")
    files: Any = getattr(reader, "fs", None)
    path = getattr(reader, "path", None)
    if not isinstance(path, (str, os.PathLike)):
        return LocalFiles(reason=f"its path is a {class_name(path)}")
    if not _is_as_imported(files):
        return LocalFiles(reason=f"it reads through a {class_name(files)}")
    if is_torchs_file_system(files):
        return LocalFiles(path if isinstance(path, Path) else Path(path))
    remote: Any = files.fs
    if not _is_as_imported(remote) or type(remote) is not LocalFileSystem:
        return LocalFiles(reason=f"fsspec reads through a {class_name(remote)}")
    return LocalFiles(remote._strip_protocol(os.fspath(path)))


def has_torchs_read_data(reader: object) -> bool:
    """Whether the ``read_data`` of a reader, which need not be derived from torch's, is that of FileSystemReader."""
    return method_of(reader, "read_data") is _READ_DATA


def has_torchs_payload_reads(reader: object) -> bool:
    """Whether the ``read_data`` of a reader is that of torch's HuggingFaceStorageReader."""
    return method_of(reader, "read_data") is _READ_PAYLOADS


def why_no_payloads(reader: Any) -> str:
    """Why the payloads of safetensors files may be something else to a reader than to torch's; empty if not.

    Args:
        reader: whose ``read_data`` is that of torch's HuggingFaceStorageReader, or ours. If its class is derived from
            torch's QuantizedHuggingFaceStorageReader, that is the one it is compared with.
    """
    if sys.byteorder != "little":
        return "payloads are little-endian, and this machine is not"
    cls: Any = type(reader)
    if cls.__getattribute__ is not object.__getattribute__:
        return "it has attributes of its own making"
    is_quantized = isinstance(reader, torch_quantized.QuantizedHuggingFaceStorageReader)
    steps = _STEPS_OF_QUANTIZED if is_quantized else _STEPS_OF_PAYLOADS
    own = [name for name, step in steps.items() if method_of(reader, name) is not step]
    return f"it has a {own[0]} of its own" if own else ""


def is_torchs_file_system(files: object) -> bool:
    """Whether streams are opened by torch's class for local files."""
    return type(files) is torch_filesystem.FileSystem and _is_as_imported(files)


def method_of(value: object, name: str) -> Any:
    """The function behind a method of an object: torch's own where one of ours stands in its place."""
    own = getattr(value, "__dict__", {}).get(name)
    return original_of(getattr(type(value), name, None) if own is None else own)


def class_name(value: object) -> str:
    """The full name of an object's class."""
    cls = type(value)
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


def _is_as_imported(value: Any) -> bool:
    methods = _METHODS.get(type(value))
    return methods is not None and all(method_of(value, name) == method for name, method in methods.items())
