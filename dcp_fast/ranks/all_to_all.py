"""Every rank sends a part of its memory to every other one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist

from dcp_fast._torch import DistWrapper

# What torch says for a backend that has no such collective call (torch/csrc/distributed/c10d/Backend.hpp).
_LACKS = "does not support alltoall_base"


def start_all_to_all(
    received: torch.Tensor,
    sent: torch.Tensor,
    received_sizes: Sequence[int],
    sent_sizes: Sequence[int],
    ranks: DistWrapper,
) -> Callable[[], None]:
    """Start to send and receive: by ``all_to_all_single``, or by single messages if the backend does not have that.

    Args:
        received: memory for what comes, rank by rank.
        sent: what goes, rank by rank.
        received_sizes, sent_sizes: how many elements come from and go to each rank. None is 0.
        ranks: who takes part.

    Returns:
        What waits for the end.

    Raises:
        Exception: what the process group raises.
    """
    sizes = list(received_sizes), list(sent_sizes)
    try:
        work: Any = dist.all_to_all_single(received, sent, *sizes, group=ranks.group, async_op=True)
    except RuntimeError as error:
        if _LACKS not in str(error):
            raise
        works = _start_messages(received, sent, *sizes, ranks)
    else:
        works = [work]

    def wait() -> None:
        for work in works:
            work.wait()

    return wait


def _start_messages(
    received: torch.Tensor, sent: torch.Tensor, received_sizes: list[int], sent_sizes: list[int], ranks: DistWrapper
) -> list[dist.Work]:
    begins = zip(accumulate(received_sizes, initial=0), accumulate(sent_sizes, initial=0), strict=True)
    messages: list[dist.P2POp] = []
    for peer, (coming, going, (from_there, to_there)) in enumerate(
        zip(received_sizes, sent_sizes, begins, strict=False)
    ):
        into, out_of = received[from_there : from_there + coming], sent[to_there : to_there + going]
        if peer == ranks.rank:
            into.copy_(out_of)
            continue
        messages.append(dist.P2POp(dist.irecv, into, group=ranks.group, group_peer=peer))
        messages.append(dist.P2POp(dist.isend, out_of, group=ranks.group, group_peer=peer))
    return dist.batch_isend_irecv(messages) if messages else []
