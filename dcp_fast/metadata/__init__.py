"""The metadata of a checkpoint: read without running what it says, and made into objects only where it is looked at."""

from dcp_fast.metadata.lazy import LazyDict, columns_of
from dcp_fast.metadata.read import make_metadata, parse_blocks, parse_metadata, read_metadata

__all__ = ["LazyDict", "columns_of", "make_metadata", "parse_blocks", "parse_metadata", "read_metadata"]
