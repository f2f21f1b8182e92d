"""Readers: drop-ins for the StorageReaders of torch.distributed.checkpoint."""
