"""What the differential tests share: the same load by torch and by dcp_fast, compared bit for bit."""

from __future__ import annotations

import ctypes
import io
import pickle
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlanner
from torch.distributed.tensor import DTensor

import dcp_fast

__all__ = [
    "DTYPES",
    "Entry",
    "Outcome",
    "ShardedBuffer",
    "assert_same_load",
    "fast_reader",
    "fill",
    "image",
    "load_with",
    "save",
    "torch_reader",
    "write_checkpoint",
]

# Bound here so that an installed dcp_fast cannot become its own oracle.
torch_load = dcp.load
torch_reader = dcp.FileSystemReader
torch_planner = dcp.DefaultLoadPlanner
fast_reader = dcp_fast.FileSystemReader

_DTYPE_NAMES = (
    "float32 float64 float16 bfloat16 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu "
    "complex32 complex64 complex128 bool int8 int16 int32 int64 uint8 uint16 uint32 uint64"
)
# Types that have a copy_ kernel; see test_shell_dtypes for the rest.
DTYPES = [getattr(torch, name) for name in _DTYPE_NAMES.split() if hasattr(torch, name)]


def fill(sizes: Sequence[int], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """A contiguous tensor of random bits of a type: NaN payloads, infinities and negative zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    count = 1
    for size in sizes:
        count *= size
    if dtype == torch.bool:
        return torch.randint(0, 2, (count,), generator=generator, dtype=torch.uint8).view(dtype).view(torch.Size(sizes))
    bits = torch.randint(0, 256, (count * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return bits.view(dtype).view(torch.Size(sizes))


# Comparison


def image(value: Any, layout: bool = True) -> Any:
    """A value that is equal to another one's image only if both are the same bit for bit, containers included.

    ``layout`` includes strides, dtype aside, which a load into an existing tensor must not touch.
    """
    if isinstance(value, DTensor):
        return ("DTensor", tuple(value.shape), str(value.placements), image(value.to_local(), layout))
    if isinstance(value, ShardedTensor):
        shards = [(tuple(s.metadata.shard_offsets), image(s.tensor, layout)) for s in value.local_shards()]
        return ("ShardedTensor", tuple(value.size()), shards)
    if isinstance(value, ShardedBuffer):
        return ("ShardedBuffer", [image(shard, layout) for shard in value.shards])
    if isinstance(value, torch.Tensor):
        return _tensor_image(value, layout)
    if isinstance(value, Mapping):
        return (type(value).__name__, [(key, image(item, layout)) for key, item in value.items()])
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, [image(item, layout) for item in value])
    if isinstance(value, io.BytesIO):
        return ("BytesIO", value.getvalue())
    if hasattr(value, "__dict__") and not isinstance(value, type):
        return (type(value).__name__, image(vars(value), layout))
    return (type(value).__name__, repr(value))


def _tensor_image(tensor: torch.Tensor, layout: bool) -> Any:
    facts: list[Any] = [type(tensor).__name__, str(tensor.dtype), tuple(tensor.shape), str(tensor.device)]
    facts += [str(tensor.layout), tensor.requires_grad, tensor.is_leaf, tensor.grad_fn is not None]
    inner = getattr(tensor, "wrapped", None)
    if inner is not None:  # a wrapper subclass of the tests
        return (*facts, _tensor_image(inner, layout))
    if hasattr(tensor, "__tensor_flatten__"):
        names, context = tensor.__tensor_flatten__()
        return (*facts, repr(context), [(name, image(getattr(tensor, name), layout)) for name in names])
    if tensor.device.type == "meta":
        return (*facts, tuple(tensor.stride()))
    if tensor.layout == torch.sparse_coo:
        parts = (tensor._indices(), tensor._values())
        return (*facts, tensor.is_coalesced(), [_tensor_image(part, layout) for part in parts])
    if tensor.layout != torch.strided:
        return (*facts, repr(tensor.to_dense()))
    if tensor.is_quantized:
        return (*facts, str(tensor.qscheme()), repr(tensor.int_repr()))
    with torch.no_grad():
        plain = tensor.detach().resolve_conj().resolve_neg().as_subclass(torch.Tensor).contiguous().cpu()
    bits = ctypes.string_at(plain.data_ptr(), plain.numel() * plain.itemsize) if plain.numel() else b""
    if layout:
        facts += [tuple(tensor.stride()), tensor.storage_offset(), tensor.is_conj(), tensor.is_neg()]
    return (*facts, bits)


# Checkpoints


@dataclass
class Entry:
    """One FQN of a checkpoint written by hand: chunks of a global tensor, or a value that is pickled."""

    size: Sequence[int] = ()
    dtype: torch.dtype = torch.float32
    chunks: list[tuple[tuple[int, ...], torch.Tensor]] = field(default_factory=list)  # offsets, what torch.save gets
    value: Any = None
    file: str = "__0_0.distcp"  # or, with a "%", one for each chunk
    legacy: bool = False

    @staticmethod
    def of(tensor: torch.Tensor, **options: Any) -> Entry:
        """A tensor that is stored whole, just as it is."""
        return Entry(tuple(tensor.shape), tensor.dtype, [((0,) * tensor.dim(), tensor)], **options)


def write_checkpoint(path: Path, entries: Mapping[str, Entry | Any]) -> Path:
    """Write a checkpoint without torch's writer, which copies a tensor that does not fill its storage.

    Tensors are stored as they are, so that a record may hold a slice of a larger storage or an expanded tensor.
    """
    path.mkdir(parents=True, exist_ok=True)
    files: dict[str, io.BytesIO] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    metadata: dict[str, Any] = {}

    def put(index: MetadataIndex, value: Any, file: str, legacy: bool = False) -> None:
        stream = files.setdefault(file, io.BytesIO())
        offset = stream.seek(0, io.SEEK_END)
        record = io.BytesIO()
        torch.save(value, record, _use_new_zipfile_serialization=not legacy)
        stream.write(record.getvalue())
        storage[index] = _StorageInfo(file, offset, stream.tell() - offset)

    for fqn, given in entries.items():
        entry = given if isinstance(given, Entry) else Entry(value=given)
        if not entry.chunks:
            metadata[fqn] = BytesStorageMetadata()
            put(MetadataIndex(fqn), entry.value, entry.file)
            continue
        chunks = [ChunkStorageMetadata(torch.Size(offsets), part.size()) for offsets, part in entry.chunks]
        metadata[fqn] = TensorStorageMetadata(TensorProperties(dtype=entry.dtype), torch.Size(entry.size), chunks)
        for number, (offsets, part) in enumerate(entry.chunks):
            file = entry.file % number if "%" in entry.file else entry.file
            put(MetadataIndex(fqn, torch.Size(offsets), number), part, file, entry.legacy)
    for name, stream in files.items():
        (path / name).write_bytes(stream.getvalue())
    with (path / ".metadata").open("wb") as file_object:
        pickle.dump(Metadata(metadata, storage_data=storage), file_object)
    return path


def save(path: Path, state_dict: dict[str, Any], **options: Any) -> Path:
    """Write a checkpoint with torch's writer."""
    dcp.save(state_dict, storage_writer=dcp.FileSystemWriter(path, sync_files=False, **options))
    return path


class ShardedBuffer(torch.Tensor):
    """A global tensor of which this process holds any chunks, through the protocol that DTensor uses as well."""

    shards: list[torch.Tensor]
    chunks: list[ChunkStorageMetadata]

    @staticmethod
    def make(size: Sequence[int], offsets: Iterable[Sequence[int]], shards: Sequence[torch.Tensor]) -> ShardedBuffer:
        dtype = shards[0].dtype if shards else torch.float32
        self = torch.Tensor._make_wrapper_subclass(ShardedBuffer, torch.Size(size), dtype=dtype)
        self.shards = list(shards)
        pairs = zip(offsets, shards, strict=True)
        self.chunks = [ChunkStorageMetadata(torch.Size(at), shard.size()) for at, shard in pairs]
        return self

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return self.chunks

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        assert index.index is not None
        assert self.chunks[index.index].offsets == index.offset
        return self.shards[index.index]

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"{function} of a tensor that is only known by its shards")


# Loading


@dataclass
class Outcome:
    """What a load did to a state dict, or which exceptions it raised by rank (rank -1: not wrapped)."""

    state: Any = None
    errors: dict[int, BaseException] | None = None

    def image(self) -> Any:
        return image(self.state)


def load_with(load: Callable[..., None], state: Any, **arguments: Any) -> Outcome:
    """Call a load function on a state dict."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            load(state, **arguments)
        except CheckpointException as error:
            return Outcome(state, {rank: failure[0] for rank, failure in error.failures.items()})
        except Exception as error:
            return Outcome(state, {-1: error})
    return Outcome(state)


def assert_same_load(
    path: Path,
    make: Callable[[], dict[str, Any]],
    *,
    planner: Callable[[], LoadPlanner] | None = None,
    options: Mapping[str, Any] | None = None,
    fallback: int | None = 0,
    raises: type[BaseException] | None = None,
    changes: bool = True,
    **arguments: Any,
) -> Outcome:
    """Load a checkpoint with torch and with dcp_fast into equal state dicts, and compare all that came of it.

    Args:
        path: the checkpoint.
        make: makes the state dict to load into; called twice.
        planner: makes the planner for both; None: the default of each.
        options: of dcp_fast.FileSystemReader.
        fallback: how many records torch.load must have read for dcp_fast; None: any number.
        raises: what torch must raise on its own; None: it must not raise.
        changes: whether torch's load must have changed the state dict, lest both loads did nothing.
        arguments: for both load functions.

    Returns:
        What dcp_fast did.
    """
    before = make()
    untouched = image(before)
    expected = load_with(
        torch_load,
        before,
        storage_reader=torch_reader(path),
        planner=planner() if planner else torch_planner(),
        **arguments,
    )
    actual = load_with(
        dcp_fast.load,
        make(),
        storage_reader=fast_reader(path, **(options or {})),
        planner=planner() if planner else None,
        **arguments,
    )
    if expected.errors is not None:
        assert raises is not None, f"torch itself raises {expected.errors}"
        assert all(isinstance(error, raises) for error in expected.errors.values()), expected.errors
        assert actual.errors is not None, f"torch raises {expected.errors}, dcp_fast does not"
        assert actual.errors.keys() == expected.errors.keys()
        for rank, error in expected.errors.items():
            assert isinstance(actual.errors[rank], type(error)), f"{actual.errors[rank]!r} instead of {error!r}"
        return actual
    assert raises is None, f"torch does not raise {raises}"
    if actual.errors is not None:
        raise AssertionError(f"dcp_fast raises {actual.errors}") from next(iter(actual.errors.values()))
    assert actual.image() == expected.image()
    assert not changes or expected.image() != untouched, "the load changed nothing"
    report = dcp_fast.last_report()
    assert report is not None
    assert fallback is None or report.fallback_records == fallback
    return actual
