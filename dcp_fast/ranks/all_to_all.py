"""Every rank sends a part of its memory to every other one, or the same bytes to all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist

from dcp_fast._torch import DistWrapper

# What torch says for a backend that has no such collective call (torch/csrc/distributed/c10d/Backend.hpp).
_LACKS = "does not support alltoall_base"
# Of what a rank tells others at once: bytes for each of them, unless these are too many, and for all of them.
_LEAST_PIECE = 512
_MOST_MEMORY = 1 << 20


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


class ToAll:
    """Ranks tell all others something, in messages between each two of them.

    So every rank notices at once when another one dies: each waits for it itself. In gathers and broadcasts some ranks
    pass on what others send. When these leave because of a dead one, whoever waits for them waits for the time limit of
    the group.

    Args:
        ranks: who takes part.
        device: where the backend of their group wants tensors to be.

    Attributes:
        piece: how many bytes a rank sends to all others at once.
    """

    def __init__(self, ranks: DistWrapper, device: torch.device) -> None:
        self._ranks = ranks
        self._world = ranks.get_world_size()
        self.piece = max(_LEAST_PIECE, _MOST_MEMORY // self._world)
        # All memory is there before others may wait for this rank.
        size = self._world * self.piece
        self._packed, self._here = (torch.empty(size, dtype=torch.uint8, device="cpu") for _ in range(2))
        self._sent, self._received = self._packed, self._here
        if device.type != "cpu":
            self._sent, self._received = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))

    def tell(self, mine: torch.Tensor, sizes: Sequence[int], of_ranks: Mapping[int, torch.Tensor]) -> None:
        """Send bytes to all ranks, and receive theirs. Collective.

        Args:
            mine: what this rank sends, on the host; at least a byte.
            sizes: how many bytes each rank sends, this one included.
            of_ranks: by rank, memory on the host for what it sends. What others send is not kept.

        Raises:
            Exception: what the process group raises.
        """
        for begin in range(0, max(1, *sizes), self.piece):
            # At least a byte, so that each two ranks meet.
            pieces = [min(self.piece, max(size - begin, 1)) for size in sizes]
            own = pieces[self._ranks.rank]
            packed, sent = (memory[: own * self._world] for memory in (self._packed, self._sent))
            here, received = (memory[: sum(pieces)] for memory in (self._here, self._received))
            if begin < mine.numel():
                packed.view(self._world, own).copy_(mine[begin : begin + own].expand(self._world, own))
            if self._sent is not self._packed:
                sent.copy_(packed)
            start_all_to_all(received, sent, pieces, [own] * self._world, self._ranks)()
            if self._received is not self._here:
                here.copy_(received)
            for rank, (size, at) in enumerate(zip(pieces, accumulate(pieces, initial=0), strict=False)):
                memory = of_ranks.get(rank)
                if memory is not None and begin < memory.numel():
                    memory[begin : begin + size].copy_(here[at : at + size])
