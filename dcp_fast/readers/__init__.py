"""Readers: drop-ins for the StorageReaders of torch.distributed.checkpoint."""

from dcp_fast.readers.filesystem import FileSystemReader

__all__ = ["FileSystemReader"]
