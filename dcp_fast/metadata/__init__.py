"""The metadata of a checkpoint: read without running what it says, and made into objects only where it is looked at."""

from dcp_fast.metadata.lazy import LazyDict, columns_of
from dcp_fast.metadata.read import (
    known_columns,
    make_metadata,
    parse_columns,
    read_columns,
    read_metadata,
    unpickle_metadata,
)

__all__ = [
    "LazyDict",
    "columns_of",
    "known_columns",
    "make_metadata",
    "parse_columns",
    "read_columns",
    "read_metadata",
    "unpickle_metadata",
]
