"""Reads that the ranks of a job share: each byte is read by one rank, and sent to all that need it.

1. Each rank tells whether it has failed, and a digest of what it needs of the files. Ranks with the same needs, such as
   replicas, need to tell them once: the first of them sends its need to all ranks.
2. Every rank comes to the same assignment of bytes to ranks and rounds, natively and from the same numbers
   (``csrc/exchange``). So the number of rounds is known before the first.
3. In each round every rank sends to each other one what that needs of the bytes which it has read. One round is under
   way while the next one is read and the last one is placed. Collective calls are made by one thread, in one order.

Nobody waits for a rank that fails: it takes part in the next round, of which each part tells whether its sender has
failed, and all leave after that. A rank that dies makes the collective calls of the others fail.
"""

from __future__ import annotations

import hashlib
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import ClassVar, cast

import torch
import torch.distributed as dist

from dcp_fast import _native
from dcp_fast._torch import DistWrapper
from dcp_fast.observe.report import LoadReport
from dcp_fast.ranks.collectives import Outcome, collective_device, largest
from dcp_fast.ranks.interrupts import deferred_interrupt
from dcp_fast.transfer.sharing import ExchangeStep, Part

__all__ = ["EXCHANGE_BYTES", "MIN_EXCHANGE_BYTES", "Exchange", "GroupError", "OtherRankError"]

EXCHANGE_BYTES = 128 << 20  # by default
MIN_EXCHANGE_BYTES = 1 << 20
_EXCHANGES = 2  # of a load, see Sharing
_BUFFERS = 4  # two for what is sent, and two for what is received
_HEADER_BYTES = _native.EXCHANGE_HEADER_BYTES
_VERSION = 1  # of what ranks send each other
_EMPTY_NEED = bytes(3 * 8)  # no files, no boxes, no loops
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class OtherRankError(Exception):
    """Another rank has failed, so that this one could not go on. What it was, the last step of the load tells."""


class GroupError(Exception):
    """The process group has failed, so that no further collective call is of use. The cause is what it reported."""


@contextmanager
def _group_errors() -> Iterator[None]:
    """What the process group raises within is a GroupError."""
    try:
        yield
    except Exception as error:
        raise GroupError(str(error)) from error


class Exchange:
    """One rank's end of the exchange of one load.

    Args:
        ranks: of the load.
        most_bytes: memory for what is sent and received, on the host, and on a GPU if the process group needs it there.
        report: counts what is read and exchanged.

    Attributes:
        by_default: whether loads share reads that are not told.
    """

    by_default: ClassVar[bool] = False

    def __init__(self, ranks: DistWrapper, most_bytes: int, report: LoadReport) -> None:
        self._ranks = ranks
        self.most_bytes = most_bytes
        self._report = report
        self._device = collective_device(ranks)
        self._left = _EXCHANGES

    def share(self, find: Callable[[], tuple[_native.Need, ExchangeStep]]) -> bool:
        """See :class:`dcp_fast.transfer.sharing.Sharing`."""
        found = Outcome(find)
        need, step = (None, None) if found.error is not None else found.value
        return self._take_part(need, step, found.error)

    def decline(self, reason: str) -> None:
        """See :class:`dcp_fast.transfer.sharing.Sharing`."""
        self._report.sharing_fallback_reason = reason
        self._take_part(None, None, None)

    def leave(self, error: BaseException | None) -> None:
        """Take part in what exchanges are left, and tell the other ranks of an error that came before them."""
        while self._left:
            self._take_part(None, None, error)  # which raises the error

    def _take_part(self, need: _native.Need | None, step: ExchangeStep | None, error: BaseException | None) -> bool:
        left, self._left = self._left - 1, 0  # nobody goes on after a failure that all know of
        encoded = Outcome(lambda: _EMPTY_NEED if need is None else need.encode())
        last: BaseException | None = None
        with deferred_interrupt() as interrupt:
            exchange = self._agree(encoded.value or _EMPTY_NEED, error or encoded.error)
            if exchange.obstacle:
                self._report.sharing_fallback_reason = exchange.obstacle
            else:
                last = self._run(exchange, step, interrupt)
        self._left = left
        if last is not None:
            raise last  # of which others learn in the next exchange, or at the end of the load
        return not exchange.obstacle

    # Agreement

    def _agree(self, need: bytes, error: BaseException | None) -> _native.Exchange:
        """The exchange that all ranks come to. Raises the error, or OtherRankError if another rank has one."""
        digest = hashlib.sha256(need).digest()
        # 63 bits each, as the numbers of a tensor have signs.
        hashes = [int.from_bytes(digest[i : i + 8], "little") >> 1 for i in (0, 8)]
        mine = [_VERSION, error is not None, len(need), self.most_bytes, _node(), *hashes]
        of_ranks = self._all_gather(mine)
        if error is not None:
            raise error
        if any(failed for _, failed, *_ in of_ranks):
            raise OtherRankError
        if any(version != _VERSION for version, *_ in of_ranks):
            raise RuntimeError("ranks run versions of dcp_fast that do not share reads with each other")
        senders: dict[tuple[int, ...], int] = {}  # the first rank of each need
        need_of_rank = []
        for rank, (_, _, size, _, _, *hashes) in enumerate(of_ranks):
            senders.setdefault((size, *hashes), rank)
            need_of_rank.append(list(senders).index((size, *hashes)))
        needs = self._send_needs(need, {rank: key[0] for key, rank in senders.items()})
        most_bytes = min(most for _, _, _, most, *_ in of_ranks) // _BUFFERS
        made = Outcome(
            partial(
                _native.Exchange,
                needs=[(need.data_ptr(), need.numel()) for need in needs],
                need_of_rank=need_of_rank,
                node_of_rank=[node for _, _, _, _, node, *_ in of_ranks],
                rank=self._ranks.rank,
                send_bytes=most_bytes,
                receive_bytes=most_bytes,
            )
        )
        allocated = Outcome(lambda: self._allocate(made.get()))
        with _group_errors():
            failed = largest(self._ranks, [allocated.error is not None])[0]
        if allocated.error is None and failed:
            raise OtherRankError
        self._sent, self._received = allocated.get()
        return made.value

    def _all_gather(self, numbers: Sequence[int]) -> list[list[int]]:
        mine = torch.tensor(numbers, dtype=torch.int64, device=self._device)
        of_ranks = [torch.empty_like(mine) for _ in range(self._ranks.get_world_size())]
        with _group_errors():
            dist.all_gather(of_ranks, mine, group=self._ranks.group)
        return [tensor.tolist() for tensor in of_ranks]

    def _send_needs(self, mine: bytes, sizes: dict[int, int]) -> list[torch.Tensor]:
        """All different needs, as bytes, in the order of the ranks that send them.

        Args:
            mine: the need of this rank.
            sizes: of the needs, by the rank that sends each.
        """
        world = self._ranks.get_world_size()
        copies = world if self._ranks.rank in sizes else 0
        sent = torch.frombuffer(bytearray(mine), dtype=torch.uint8).to(self._device).repeat(copies)
        received = torch.empty(sum(sizes.values()), dtype=torch.uint8, device=self._device)
        to_receive = [sizes.get(rank, 0) for rank in range(world)]
        to_send = [len(mine) if copies else 0] * world
        with _group_errors():
            dist.all_to_all_single(received, sent, to_receive, to_send, group=self._ranks.group)
        # The ranks ascend, as they were found in that order.
        return list(torch.split(received.cpu(), list(sizes.values())))

    def _allocate(self, exchange: _native.Exchange) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Memory for two rounds of what is sent, and of what is received."""

        def pair(bytes_of: Callable[[int], list[int]]) -> list[torch.Tensor]:
            most = max((sum(bytes_of(round)) for round in range(exchange.rounds)), default=0)
            return [torch.empty(most, dtype=torch.uint8) for _ in range(min(2, exchange.rounds))]

        return pair(exchange.bytes_to_send), pair(exchange.bytes_to_receive)

    # Rounds

    def _run(
        self, exchange: _native.Exchange, step: ExchangeStep | None, interrupt: Callable[[], None]
    ) -> BaseException | None:
        """Exchange all rounds. Returns an error of this rank that came after the last one, when nobody is told."""
        report, rounds = self._report, exchange.rounds
        error: BaseException | None = None
        bytes_read, read_before = 0, report.bytes_read_by_job

        def work(to_send: int, to_place: int) -> None:
            nonlocal error, bytes_read
            if step is None or error is not None:
                return
            send: Part = (to_send, self._sent[to_send % 2]) if to_send < rounds else None
            receive: Part = (to_place, self._received[to_place % 2]) if to_place >= 0 else None
            if send or receive:
                stats = Outcome(lambda: step(exchange, send, receive))
                if stats.error is None:
                    bytes_read += stats.value.bytes_read
                error = stats.error or Outcome(interrupt).error

        work(0, -1)
        for round in range(rounds):
            sizes = exchange.bytes_to_send(round), exchange.bytes_to_receive(round)
            recorder = None if report.timeline is None else report.timeline.recorder
            began = 0 if recorder is None else recorder.now()
            pending = self._begin_round(round, sizes, error is not None, bytes_read)
            work(round + 1, round - 1)
            begin = time.perf_counter()
            pending()
            report.wait_seconds["ranks"] += time.perf_counter() - begin
            if recorder is not None:
                recorder.add("exchange", "exchange", began, recorder.now(), sum(sizes[1]))
            report.exchange_rounds += 1
            report.bytes_sent += sum(sizes[0]) - sizes[0][self._ranks.rank]
            report.bytes_received += sum(sizes[1]) - sizes[1][self._ranks.rank]
            headers = self._headers(round, sizes[1])
            report.bytes_read_by_job = read_before + sum(of_rank for _, of_rank in headers)
            if any(failed for failed, _ in headers):
                raise error or OtherRankError
        work(rounds, rounds - 1)
        return error

    def _begin_round(
        self, round: int, sizes: tuple[list[int], list[int]], failed: bool, bytes_read: int
    ) -> Callable[[], None]:
        """Send and receive what belongs to a round. Returns what waits for its end."""
        sent, received = self._sent[round % 2], self._received[round % 2]
        to_send, to_receive = sizes
        begin = 0
        for size in to_send:
            header = sent[begin : begin + _HEADER_BYTES].view(torch.int64)
            header[0], header[1] = failed, bytes_read
            begin += size
        input, output = sent[:begin], received[: sum(to_receive)]
        is_on_host = self._device.type == "cpu"
        there = output if is_on_host else torch.empty_like(output, device=self._device)
        there_too = input if is_on_host else input.to(self._device)
        with _group_errors():
            work = dist.all_to_all_single(there, there_too, to_receive, to_send, group=self._ranks.group, async_op=True)

        def wait() -> None:
            with _group_errors():
                cast(dist.Work, work).wait()
            if not is_on_host:
                output.copy_(there)

        return wait

    def _headers(self, round: int, sizes: list[int]) -> list[tuple[bool, int]]:
        """Of each rank whether it has failed, and how many bytes it has read."""
        headers = []
        begin = 0
        for size in sizes:
            header = self._received[round % 2][begin : begin + _HEADER_BYTES].view(torch.int64)
            headers.append((bool(header[0]), int(header[1])))
            begin += size
        return headers


def _node() -> int:
    """A number that tells this machine from others."""
    boot = ""
    with suppress(OSError):
        boot = _BOOT_ID.read_text()
    digest = hashlib.sha256(f"{socket.gethostname()} {boot}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
