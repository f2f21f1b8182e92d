"""Optimizer state: the counterpart of ``torch.distributed.checkpoint.optimizer``."""

from dcp_fast.optimizer.load import load_sharded_optimizer_state_dict

__all__ = ["load_sharded_optimizer_state_dict"]
