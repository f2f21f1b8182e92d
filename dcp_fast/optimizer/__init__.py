"""Optimizer state: the counterpart of ``torch.distributed.checkpoint.optimizer``."""
