"""Checkpoints that torch's FileSystemWriter wrote, on a local or mounted file system."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, ClassVar

from torch.distributed.checkpoint import filesystem as torch_filesystem
from torch.distributed.checkpoint.metadata import Metadata

from dcp_fast import _native
from dcp_fast._torch import ExtensionRegistry
from dcp_fast.metadata.read import parse_metadata, parse_natively, read_metadata, read_natively
from dcp_fast.observe.report import LoadReport
from dcp_fast.readers.engine_reader import EngineReader, IoName, owned_by
from dcp_fast.readers.proof import is_torchs_file_system, local_files
from dcp_fast.this_load import option, trusted
from dcp_fast.transfer.records import Records


class FileSystemReader(EngineReader):
    """Drop-in for ``torch.distributed.checkpoint.FileSystemReader`` that reads only the bytes that are needed.

    Works with any ``LoadPlanner``. Tensors land in host memory without a copy in between wherever the stored and the
    wanted layout allow it.

    Args:
        path: directory of the checkpoint.
        _extension_registry: as torch's, for stream transforms.
        threads: reader threads. By default one for each core that this process may use, by its affinity and control
            groups and divided by LOCAL_WORLD_SIZE, and at most 16; 16 where storage is read directly.
        block_bytes: the most that one request reads. At least 64 KiB. By default 4 MiB through the page cache, 2 MiB
            past it on the way to host memory, and 4 MiB on the way to GPUs. It is less where the threads together would
            need more than ``staging_bytes``.
        staging_bytes: host memory for bytes that cannot be read straight into place, for all threads together. Records
            that only ``torch.load`` can read are read ahead into as much again; one of them, while it is unpickled,
            takes its own size on top.
        pinned_bytes: host memory that copies to GPUs come from; only used if a destination lies on one, and kept for
            the next load until :func:`dcp_fast.release_staging`. At least 1 MiB; by default two blocks for each thread,
            and 64 MiB at least.
        device_staging_bytes: memory on each GPU for boxes that are placed by a kernel there, or converted. At least
            1 MiB; by default twice as much as ``pinned_bytes``. Only used if there are such boxes.
        synchronize: whether a load to GPUs returns only when all is in place, as torch's does. If not, work on the
            streams that are current during the load still finds all in place.
        io: ``"cached"`` reads through the page cache, ``"direct"`` past it (O_DIRECT, where the file system allows it),
            ``"mapped"`` copies from a mapping of the page cache; ``"auto"`` decides for each file by
            whether its bytes are in the page cache, and maps only files of local file systems.
        trace: a file for the timeline of each load, as Chrome trace events (https://ui.perfetto.dev opens it). It is
            written anew for each load, also for one that fails. ``{rank}`` in it stands for the rank; without it, rank
            0 writes the file itself, and each other rank appends ``.rankN``.
        trust_metadata: unpickle ``.metadata`` as torch does, which runs whatever code the file names, where it is not
            read natively. By default only the types that DCP writes are made, and nothing is run. None: False, or as
            :func:`dcp_fast.install` was told.

    Raises (from ``read_data``; ``dcp.load`` wraps them in ``CheckpointException``):
        LoadError: see :mod:`dcp_fast.errors`.

    Raises (from ``set_up_storage_reader``, before anything is planned or read; likewise wrapped):
        OSError: the trace cannot be written. If only its end cannot, the load succeeds with a warning in the log.
    """

    trust_metadata_by_default: ClassVar[bool] = False

    def __init__(
        self,
        path: str | os.PathLike[str],
        _extension_registry: ExtensionRegistry | None = None,
        *,
        threads: int | None = None,
        block_bytes: int | None = None,
        staging_bytes: int = 32 << 20,
        pinned_bytes: int | None = None,
        device_staging_bytes: int | None = None,
        synchronize: bool = True,
        io: IoName = "auto",
        trace: str | os.PathLike[str] | None = None,
        trust_metadata: bool | None = None,
    ) -> None:
        super().__init__(
            path,
            _extension_registry,
            threads=threads,
            block_bytes=block_bytes,
            staging_bytes=staging_bytes,
            pinned_bytes=pinned_bytes,
            device_staging_bytes=device_staging_bytes,
            synchronize=synchronize,
            io=io,
            trace=trace,
        )
        self.trust_metadata = self.trust_metadata_by_default if trust_metadata is None else trust_metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read ``.metadata``, or ``__{rank}.metadata`` for the keyword ``rank``.

        Its dicts make their values when they are asked for; see :class:`dcp_fast.metadata.lazy.LazyDict`.

        Raises:
            OSError: as the file system does.
            CorruptMetadataError: the file is damaged.
            UntrustedMetadataError: it asks for what could run code.
        """
        with self.metadata_stage():
            return read_metadata_of(super().read_metadata, self, *args, **kwargs)

    def why_slow(self) -> str:
        return local_files(self).reason

    def _records(self, options: _native.Options, report: LoadReport) -> Records:
        return Records(local_files(self).root, self.storage_data, self.transforms, options, report)


def read_metadata_of(
    torchs: Callable[..., Metadata], reader: torch_filesystem.FileSystemReader, *args: Any, **kwargs: Any
) -> Metadata:
    """Read metadata for a reader of torch's class, or one derived from it. ``torchs``: its own method, bound to it."""
    if option(reader, "trust_metadata", FileSystemReader.trust_metadata_by_default):
        return read_trusted_metadata_of(torchs, reader, *args, **kwargs)
    path = reader._get_metadata_path(kwargs.get("rank"))
    if is_torchs_file_system(reader.fs):
        return owned_by(reader, read_metadata(str(path)))
    content = file_content(reader, path)
    return owned_by(reader, parse_metadata(content, str(path), partial(file_content, reader, path)))


def read_trusted_metadata_of(
    torchs: Callable[..., Metadata], reader: torch_filesystem.FileSystemReader, *args: Any, **kwargs: Any
) -> Metadata:
    """The same of a file that is trusted: torch's method unpickles what the native reader does not know."""
    metadata = None
    with suppress(Exception):  # torch's method finds its own words for it
        path = reader._get_metadata_path(kwargs.get("rank"))
        if is_torchs_file_system(reader.fs):
            metadata = read_natively(str(path), trusted=True)
        else:
            again = partial(file_content, reader, path)
            metadata = parse_natively(again(), str(path), again, trusted=True)
    if metadata is not None:
        return owned_by(reader, metadata)
    with trusted():
        return torchs(*args, **kwargs)


def file_content(reader: torch_filesystem.FileSystemReader, path: str | os.PathLike[str]) -> bytes:
    """All bytes of a file, by the reader's file system."""
    with reader.fs.create_stream(path, "rb") as file:
        content: bytes = file.read()
        return content
