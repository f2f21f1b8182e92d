"""The fast, safe load path for torch.distributed.checkpoint. Public names are those of that module, plus our own."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

try:
    import dcp_fast._native  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "dcp_fast._native":
        raise
    raise ImportError(
        f"{__path__[0]} has no built extension: run `pip install .` and start Python outside the checkout, "
        "or `pip install -e .` to work in it"
    ) from None

from dcp_fast.errors import (
    CorruptCheckpointError,
    CorruptHeaderError,
    CorruptMetadataError,
    CorruptPickleError,
    CudaError,
    CudaOutOfMemoryError,
    FileAccessError,
    FileMissingError,
    FilePermissionError,
    FileTimeoutError,
    LoadError,
    MetadataAccessError,
    NotADirectoryInPathError,
    NotAFileError,
    OptimizerStateError,
    OutOfMemoryError,
    SizeMismatchError,
    TruncatedFileError,
    UnknownTransformError,
    UnsupportedDTypeError,
    UntrustedBytesError,
    UntrustedMetadataError,
)
from dcp_fast.install import install, uninstall
from dcp_fast.load import load, load_state_dict
from dcp_fast.observe.report import LoadReport, last_report
from dcp_fast.optimizer.load import load_sharded_optimizer_state_dict
from dcp_fast.planning.planner import DefaultLoadPlanner
from dcp_fast.planning.search import create_read_items_for_chunk_list
from dcp_fast.readers.filesystem import FileSystemReader
from dcp_fast.readers.huggingface import HuggingFaceStorageReader, QuantizedHuggingFaceStorageReader
from dcp_fast.readers.others import accelerate
from dcp_fast.transfer.gpu import prepare_staging, release_staging

if TYPE_CHECKING:
    from dcp_fast.tools.inspect import Inspection, inspect

__all__ = [
    "CorruptCheckpointError",
    "CorruptHeaderError",
    "CorruptMetadataError",
    "CorruptPickleError",
    "CudaError",
    "CudaOutOfMemoryError",
    "DefaultLoadPlanner",
    "FileAccessError",
    "FileMissingError",
    "FilePermissionError",
    "FileSystemReader",
    "FileTimeoutError",
    "HuggingFaceStorageReader",
    "Inspection",
    "LoadError",
    "LoadReport",
    "MetadataAccessError",
    "NotADirectoryInPathError",
    "NotAFileError",
    "OptimizerStateError",
    "OutOfMemoryError",
    "QuantizedHuggingFaceStorageReader",
    "SizeMismatchError",
    "TruncatedFileError",
    "UnknownTransformError",
    "UnsupportedDTypeError",
    "UntrustedBytesError",
    "UntrustedMetadataError",
    "accelerate",
    "create_read_items_for_chunk_list",
    "inspect",
    "install",
    "last_report",
    "load",
    "load_sharded_optimizer_state_dict",
    "load_state_dict",
    "prepare_staging",
    "release_staging",
    "uninstall",
]


def __getattr__(name: str) -> Any:
    # What no load needs is imported when it is first asked for.
    if name in ("Inspection", "inspect"):
        from dcp_fast.tools import inspect

        return getattr(inspect, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
