"""The metadata of a checkpoint: read without running what it says, and made into objects only where it is looked at."""

from dcp_fast.metadata.lazy import LazyDict, columns_of
from dcp_fast.metadata.read import parse_metadata

__all__ = ["LazyDict", "columns_of", "parse_metadata"]
