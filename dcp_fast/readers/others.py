"""Readers of others, whose data the native engine reads where that comes to the same."""

from __future__ import annotations

import copyreg
import os
from array import array
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cache, partial
from types import new_class
from typing import Any, TypeVar

from torch.distributed.checkpoint import filesystem as torch_filesystem
from torch.distributed.checkpoint import hf_storage as torch_huggingface
from torch.distributed.checkpoint import quantized_hf_storage as torch_quantized
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from dcp_fast import _native
from dcp_fast._torch import StorageInfo
from dcp_fast.errors import LoadError, typed_errors
from dcp_fast.metadata.lazy import columns_of
from dcp_fast.observe.report import joined_report
from dcp_fast.readers.engine_reader import EngineReader
from dcp_fast.readers.filesystem import FileSystemReader, read_metadata_of, read_trusted_metadata_of
from dcp_fast.readers.huggingface import (
    TARGET_DTYPES,
    HuggingFaceStorageReader,
    QuantizedHuggingFaceStorageReader,
    read_headers_of,
)
from dcp_fast.readers.proof import (
    class_name,
    has_torchs_payload_reads,
    has_torchs_read_data,
    local_files,
    method_of,
    why_no_payloads,
)
from dcp_fast.switches import are_on, original_of
from dcp_fast.transfer.destinations import DTYPES

Reader = TypeVar("Reader", bound=StorageReader)

_OWN_CLASS = "_own_class_of_accelerated"
_SUFFIX = ".distcp"  # of the files that DCP writes
_FIELDS = {"relative_path", "offset", "length", "transform_descriptors"}  # of torch's storage info, or fewer
_BLOCK = 1 << 20
_UNKNOWN = -1  # the dtype of a record that only torch.load can read
_ARCHIVE = b"PK\x03\x04"  # begins what torch.save writes since torch 1.6
# torch's own, as they are at import: in their place metadata is read natively where that is possible.
_FILE_METADATA = original_of(torch_filesystem.FileSystemReader.read_metadata)
_HEADERS = original_of(torch_huggingface.HuggingFaceStorageReader.read_metadata)
_OF_HEADERS = [
    *(_HEADERS, original_of(torch_quantized.QuantizedHuggingFaceStorageReader.read_metadata)),
    *(HuggingFaceStorageReader.read_metadata, QuantizedHuggingFaceStorageReader.read_metadata),
]


def fast_twin(reader: Any) -> EngineReader | str:
    """A reader of ours for the files of another one, or why there is none.

    Args:
        reader: whose ``read_data`` is that of a reader of torch's.
    """
    if has_torchs_payload_reads(reader):
        if reason := why_no_payloads(reader):
            return reason
        path, threads = getattr(reader, "path", ""), getattr(reader, "thread_count", 1)
        if isinstance(reader, torch_quantized.QuantizedHuggingFaceStorageReader):
            if reader.target_dtype not in TARGET_DTYPES:
                return f"it dequantizes to {reader.target_dtype}"
            payloads: HuggingFaceStorageReader = QuantizedHuggingFaceStorageReader(
                path, threads, reader.target_dtype, reader.block_size
            )
        else:
            payloads = HuggingFaceStorageReader(path, threads)
        payloads.storage_data = reader.storage_data
        return payloads
    files = local_files(reader)
    if files.reason:
        return files.reason
    twin = FileSystemReader(files.root)
    twin.storage_data, twin.transforms = reader.storage_data, reader.transforms
    return twin


def why_alone(reader: StorageReader) -> str:
    """Why a reader cannot share what it reads with other ranks; empty if it can."""
    engine: EngineReader | str = "its read_data is not the engine's"
    if has_torchs_read_data(reader) or has_torchs_payload_reads(reader):
        engine = fast_twin(reader)
    elif isinstance(reader, EngineReader) and method_of(reader, "read_data") is EngineReader.read_data:
        engine = reader
    return engine if isinstance(engine, str) else engine.why_slow()


def metadata_of(reader: StorageReader) -> Metadata:
    """What a reader's ``read_metadata`` returns, read natively where the method is torch's.

    By passing a reader of torch's, the caller trusts the file, unless dcp_fast is installed: what the native reader
    does not know is unpickled as torch does.
    """
    method: Any = reader.read_metadata
    if getattr(method, "__self__", None) is reader:
        if method.__func__ is _FILE_METADATA:
            return (read_metadata_of if are_on() else read_trusted_metadata_of)(method, reader)
        if method.__func__ is _HEADERS:
            with suppress(Exception):  # torch's method has its own errors
                return read_headers_of(method, reader)
    metadata: Metadata = method()
    return metadata


def why_metadata_is_slow(reader: StorageReader, metadata: Metadata) -> str:
    """Why metadata that a reader returned was not read natively; empty if it was."""
    if columns_of(metadata) is not None:
        return ""
    method = method_of(reader, "read_metadata")
    if method in (_FILE_METADATA, FileSystemReader.read_metadata):
        return "it holds what the native reader does not know"
    if method in _OF_HEADERS:
        return "" if isinstance(reader, EngineReader) or are_on() else "torch's reader has read the headers itself"
    return "the reader has a read_metadata of its own, which unpickles it, or changes what it gets"


def read_plan(reader: StorageReader, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
    """A reader's ``read_data``, by the engine where that gives the same."""
    if has_torchs_read_data(reader) or has_torchs_payload_reads(reader):
        return read_data_like_torch(reader.read_data, reader, plan, planner)
    if method_of(reader, "read_data") is EngineReader.read_data:
        return reader.read_data(plan, planner)
    with joined_report() as report, report.stage("transfer"):
        # Perhaps it hands on to one of ours, which then knows better.
        report.reader_fallback_reason = "it has a read_data of its own, see dcp_fast.accelerate"
        return reader.read_data(plan, planner)


def read_data_like_torch(
    torchs: Callable[..., Future[None]], reader: StorageReader, plan: LoadPlan, planner: LoadPlanner
) -> Future[None]:
    """What a reader of torch's does to read data. ``torchs``: its own method, bound to the reader."""
    return _read_by(fast_twin(reader), torchs, reader, plan, planner)


def _read_by(
    twin: EngineReader | str,
    slow: Callable[..., Future[None]],
    reader: StorageReader,
    plan: LoadPlan,
    planner: LoadPlanner,
) -> Future[None]:
    with joined_report() as report:
        if not report.reader:  # the load goes on in torch's code, of which only this is ours
            report.path = str(getattr(reader, "checkpoint_id", ""))
            report.reader, report.planner = class_name(reader), class_name(planner)
        if isinstance(twin, EngineReader):
            return twin.read_data(plan, planner)
        report.reader_fallback_reason = twin
        with report.stage("transfer"):
            return slow(plan, planner)


def accelerate(reader: Reader) -> Reader:
    """Have the engine read data for a reader that has a ``read_data`` of its own.

    By calling this you say that the reader does with each item of a plan what torch's FileSystemReader does. It takes
    the record of that offset and length from the file ``reader.path/relative_path``. A tensor is what ``torch.load``
    makes of the record: the item's box is copied to what ``planner.resolve_tensor`` returns, and
    ``planner.commit_tensor`` is called. A bytes entry goes to ``planner.load_bytes``. Items may come in any order.

    What can be checked is checked for each load, before anything is placed: ``reader.path`` is a local directory, all
    records lie in its ``.distcp`` files, none was stored with a transform, and each is an archive that the engine
    knows, of the dtype that the planner's metadata tells. If anything is in doubt, the reader reads all data itself,
    and the report of the load says why.

    Args:
        reader: an object. :func:`dcp_fast.install` takes classes, for readers that a framework makes.

    Returns:
        The same object, now of a class derived from its own, whose ``read_data`` is replaced. Whatever the class does
        when another one is derived from it, it does. Copies and pickles of the object are of its own class, unless they
        are made by a ``__copy__`` of that.

    Raises:
        TypeError: there can be no such class, or the object cannot become one of it.
    """
    cls: Any = type(reader)
    if "read_data" in getattr(reader, "__dict__", ()):
        raise TypeError(f"the {class_name(reader)} has a read_data beside that of its class")
    if _OWN_CLASS not in vars(cls):
        # Not by a method of the reader's own, which may hand on to another object.
        object.__setattr__(reader, "__class__", _accelerated_class(cls))
    return reader


@cache
def _accelerated_class(own: Any) -> Any:
    """A class for accelerated readers of a class. It is called as that is, so that reports and errors name that."""

    def reduce_ex(reader: Any, protocol: Any) -> Any:
        reduced = own.__reduce_ex__(reader, protocol)
        if not isinstance(reduced, tuple):
            return reduced
        function, arguments, *state = reduced
        arguments = tuple(own if argument is cls else argument for argument in arguments)
        function = own if function is cls else function
        # pickle insists that these make an object of the class that it has.
        if function is copyreg.__newobj__:  # type: ignore[attr-defined]
            return own.__new__, arguments, *state
        if function is copyreg.__newobj_ex__:  # type: ignore[attr-defined]
            _, positional, named = arguments
            return partial(own.__new__, own, *positional, **named), (), *state
        return function, arguments, *state

    def read_data(reader: Any, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        return accelerated_read_data(partial(own.read_data, reader), reader, plan, planner)

    names = {name: getattr(own, name) for name in ("__module__", "__qualname__", "__doc__")}
    members = {**names, "__slots__": (), "read_data": read_data, "__reduce_ex__": reduce_ex, _OWN_CLASS: own}
    cls: Any = new_class(own.__name__, (own,), {}, lambda namespace: namespace.update(members))
    return cls


def accelerated_read_data(
    own: Callable[..., Future[None]], reader: StorageReader, plan: LoadPlan, planner: LoadPlanner
) -> Future[None]:
    """One ``read_data`` of an accelerated reader. ``own``: the reader's own method."""
    return _read_by(_twin_of_records(reader, plan, planner), own, reader, plan, planner)


def _twin_of_records(reader: Any, plan: LoadPlan, planner: LoadPlanner) -> FileSystemReader | str:
    """A reader of ours for the records of a plan, or why there is none."""
    path: Any = getattr(reader, "path", None)
    stored: Any = getattr(reader, "storage_data", None)
    if not isinstance(path, (str, os.PathLike)) or not os.path.isdir(path):
        return f"its path is no local directory: a {class_name(path)}"
    if not hasattr(stored, "__getitem__"):
        return f"its storage_data is a {class_name(stored)}"
    infos: dict[MetadataIndex, StorageInfo] = {}
    tensors: dict[int, tuple[str, StorageInfo]] = {}
    entries: list[StorageInfo] = []
    for item in plan.items:
        try:
            info = stored[item.storage_index]
        except LookupError:
            return "its storage_data lacks items of the plan"
        if reason := _doubt(info):
            return reason
        infos[item.storage_index] = known = StorageInfo(info.relative_path, info.offset, info.length)
        if item.type is LoadItemType.BYTE_IO:
            entries.append(known)
        else:
            tensors[id(info)] = item.storage_index.fqn, known
    root = os.path.realpath(path)
    if reason := _unknown_entry(root, entries) or _unknown_tensor(root, list(tensors.values()), planner):
        return reason
    twin = FileSystemReader(root)
    twin.storage_data = infos
    return twin


def _doubt(info: Any) -> str:
    """What keeps a record from being known by its storage info; empty if nothing does."""
    name = getattr(info, "relative_path", None)
    numbers = (getattr(info, "offset", None), getattr(info, "length", None))
    if type(name) is not str or any(type(number) is not int or number < 0 for number in numbers):
        return f"a {class_name(info)} in its storage_data is no storage info of DCP"
    if not _field_names(info) <= _FIELDS:
        return f"a {class_name(info)} in its storage_data says more than where a record lies"
    if getattr(info, "transform_descriptors", None):
        return "an entry was stored with a transform"
    if not name.endswith(_SUFFIX) or os.path.isabs(name) or ".." in name.split("/"):
        return f"an entry lies elsewhere than in a {_SUFFIX} file of the checkpoint"
    return ""


def _field_names(info: Any) -> set[str]:
    """What a storage info has: attributes, slots, or the fields of a named tuple."""
    names = {*getattr(info, "__dict__", ()), *getattr(info, "_fields", ())}
    for cls in type(info).__mro__:
        slots = vars(cls).get("__slots__", ())
        names.update([slots] if isinstance(slots, str) else slots)
    return names


def _unknown_entry(root: str, infos: Iterable[StorageInfo]) -> str:
    offsets: dict[str, list[int]] = {}
    for info in infos:
        offsets.setdefault(info.relative_path, []).append(info.offset)
    for name, of_file in offsets.items():
        try:
            with open(os.path.join(root, name), "rb", buffering=0) as file:
                begins = {os.pread(file.fileno(), len(_ARCHIVE), offset) for offset in of_file}
        except OSError as error:
            return f"a file of the checkpoint cannot be read: {error.strerror}"
        if begins != {_ARCHIVE}:
            return "a bytes entry is stored in another way than by torch.save"
    return ""


def _unknown_tensor(root: str, tensors: Sequence[tuple[str, StorageInfo]], planner: LoadPlanner) -> str:
    files: dict[str, int] = {}
    rows = array("q")
    for _, info in tensors:
        rows.extend((files.setdefault(info.relative_path, len(files)), info.offset, info.length, 0))
    paths = [os.path.join(root, name) for name in files]
    options = _native.Options(threads=0, block_bytes=_BLOCK, staging_bytes=_BLOCK, mode=_native.IoMode.AUTO)
    try:
        with typed_errors():
            layouts = _native.open_files(paths, rows, options)
            layouts.read_headers(options)
    except LoadError as error:
        return f"a record cannot be read: {type(error).__name__}"
    metadata = getattr(getattr(planner, "metadata", None), "state_dict_metadata", {})
    for record, (fqn, _) in enumerate(tensors):
        code = layouts.dtype(record)
        if code == _UNKNOWN:
            return "a tensor is stored in another way than torch.save stores plain ones"
        properties = getattr(metadata.get(fqn), "properties", None)
        if properties is not None and properties.dtype != DTYPES[code]:
            return "a tensor is stored in another dtype than the metadata says"
    return ""
