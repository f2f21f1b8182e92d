"""Processes of tests, forked from one that has torch and pytest and no threads: to import these takes seconds."""

from __future__ import annotations

import multiprocessing

__all__ = ["FORKS"]

FORKS = multiprocessing.get_context("forkserver")
# One list: all that fork share one server, which would have imported the modules of the list that is set last.
FORKS.set_forkserver_preload(
    [
        "torch._dynamo",
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "dcp_fast",
        "pytest",  # which the modules of tests import
    ]
)
