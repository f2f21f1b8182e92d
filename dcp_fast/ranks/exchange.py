"""Reads that the ranks of a job share: each byte is read by one rank, and sent to all that need it.

1. Each rank tells whether it has failed, a digest of what it needs of the files, and the begin of that. Small needs end
   there. Of ranks with the same larger need, such as replicas, the first one tells the others all of it.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from operator import add
from pathlib import Path
from typing import ClassVar

import torch

from dcp_fast import _native
from dcp_fast._torch import DistWrapper
from dcp_fast.observe.report import LoadReport
from dcp_fast.ranks.all_to_all import ToAll, start_all_to_all
from dcp_fast.ranks.collectives import Outcome, collective_device
from dcp_fast.ranks.interrupts import Interrupts, deferred_interrupt
from dcp_fast.ranks.round_memory import RoundMemory
from dcp_fast.transfer.sharing import ExchangeStep, Phase

EXCHANGE_BYTES = 128 << 20  # by default
MIN_EXCHANGE_BYTES = 1 << 20
MAX_EXCHANGE_BYTES = 1 << 40

_OF_EACH_LOAD = (Phase.HEADERS, Phase.BOXES)  # one exchange each; ranks tell each other of more
ROUND_PARTS = 4  # of the memory: two rounds of what is sent, and two of what is received
_VERSION = 7  # of what ranks send each other
_EMPTY_NEED = bytes(3 * 8)  # no files, no boxes, no loops
_FIRST_BYTES = 4096  # of what a rank tells in the first step
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def check_sharing(share_reads: bool | None, exchange_bytes: int) -> None:
    """Raise TypeError or ValueError for arguments of ``load`` that are none."""
    if share_reads is not None and not isinstance(share_reads, bool):
        raise TypeError(f"share_reads must be True, False or None, got {share_reads!r}")
    if not isinstance(exchange_bytes, int) or isinstance(exchange_bytes, bool):
        raise TypeError(f"exchange_bytes must be a number of bytes, got {exchange_bytes!r}")
    if not MIN_EXCHANGE_BYTES <= exchange_bytes <= MAX_EXCHANGE_BYTES:
        limits = f"from {MIN_EXCHANGE_BYTES} to {MAX_EXCHANGE_BYTES}"
        raise ValueError(f"exchange_bytes must be {limits}, got {exchange_bytes}")


def why_too_many(bytes_of_needs: int, exchange_bytes: int) -> str:
    """Why ranks cannot tell each other what they need; empty if they can."""
    if bytes_of_needs <= exchange_bytes:
        return ""
    return f"what ranks need takes {bytes_of_needs} bytes to tell, and exchange_bytes is {exchange_bytes}"


class OtherRankError(Exception):
    """Another rank has failed, so that this one could not go on. What it was, the last step of the load tells."""


class GroupError(Exception):
    """The process group has failed, so that no further collective call is of use. The cause is what it reported."""


@dataclass(frozen=True)
class _Nothing:
    """In the place of an exchange that all ranks know to be none."""

    obstacle: str


class _Told:
    """What a rank tells others that it needs.

    Attributes:
        content: a need, encoded.
        hashes: of the content, which tell equal needs. 63 bits each, as the numbers of a tensor have signs.
    """

    def __init__(self, need: _native.Need | None) -> None:
        content = bytearray(_EMPTY_NEED if need is None else need.encode())
        digest = hashlib.sha256(content).digest()
        self.content = torch.frombuffer(content, dtype=torch.uint8)
        self.hashes = [int.from_bytes(digest[i : i + 8], "little") >> 1 for i in (0, 8)]


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
            The same on all ranks.
        save_id: of the checkpoint; empty where it has none.
        report: counts what is read and exchanged.

    Attributes:
        by_default: whether loads share reads that are not told.
    """

    by_default: ClassVar[bool] = False

    def __init__(self, ranks: DistWrapper, most_bytes: int, save_id: str, report: LoadReport) -> None:
        self._ranks = ranks
        self.most_bytes = most_bytes
        self.save_id = save_id
        self._report = report
        self._device = collective_device(ranks)
        self._to_all = ToAll(ranks, self._device)
        self._memory = RoundMemory(self._device)
        self._nothing = _Told(None)
        size = min(_FIRST_BYTES, self._to_all.piece)
        self._first = torch.zeros(size, dtype=torch.uint8, device="cpu")
        self._first_of_ranks = {rank: torch.zeros_like(self._first) for rank in range(ranks.get_world_size())}
        self._left = [int(phase in _OF_EACH_LOAD) for phase in Phase]
        self._expected = [0] * len(Phase)  # more exchanges, which this rank has yet to tell the others of
        self._more = [0] * len(Phase)  # that any rank told of last
        # Bytes that each rank was to read of boxes so far. Headers count for nothing, so that `dcp-fast plan`, which
        # does not look at them, foretells who reads what in the first exchange of boxes.
        self._assigned = [0] * ranks.get_world_size()

    def share(self, phase: Phase, find: Callable[[], tuple[_native.Need, ExchangeStep]]) -> bool:
        """See :class:`dcp_fast.transfer.sharing.Sharing`."""
        while any(self._left[:phase]):
            self._take_part(None, None, None)
        if not self._left[phase]:
            raise RuntimeError(f"a load has no more exchanges of {phase.name} than its ranks have agreed on")
        found = Outcome(find)
        need, step = (None, None) if found.error is not None else found.value
        return self._take_part(need, step, found.error)

    @property
    def left(self) -> int:
        """See :class:`dcp_fast.transfer.sharing.Sharing`."""
        return sum(self._left)

    def expect(self, phase: Phase, exchanges: int) -> None:
        """See :class:`dcp_fast.transfer.sharing.Sharing`."""
        self._expected[phase] = exchanges

    def decline(self, reason: str) -> None:
        """See :class:`dcp_fast.transfer.sharing.Sharing`."""
        if self.left > 0:
            self._report.sharing_fallback_reason = reason or self._report.sharing_fallback_reason
            self.leave(None)

    def leave(self, error: BaseException | None) -> None:
        """Take part in what exchanges are left, and tell the other ranks of an error that came before them."""
        while self.left > 0:
            self._take_part(None, None, error)  # which raises the error

    def largest(self, numbers: Sequence[int]) -> list[int]:
        """For each number the largest that any rank has. Collective. Raises GroupError."""
        return [max(of_ranks) for of_ranks in zip(*self._all_gather(numbers), strict=True)]

    def close(self) -> None:
        """Let go of the memory for rounds. There are no more exchanges."""
        self._memory.free()

    def _take_part(self, need: _native.Need | None, step: ExchangeStep | None, error: BaseException | None) -> bool:
        phase = next(phase for phase in Phase if self._left[phase])
        told = Outcome(partial(_Told, need))
        last: BaseException | None = None
        with deferred_interrupt() as interrupts:
            # Nobody goes on after a failure that all know of.
            left, self._left = self._left, [0] * len(Phase)
            exchange = self._agree(phase, need, told.value or self._nothing, error or told.error)
            if isinstance(exchange, _Nothing) or exchange.obstacle:
                self._report.sharing_fallback_reason = exchange.obstacle
            else:
                last = self._run(exchange, step, interrupts)
            left[phase] -= 1
            self._left = list(map(add, left, self._more))
        if last is not None:
            raise last  # of which others learn in the next exchange, or at the end of the load
        return not exchange.obstacle

    # Agreement

    def _agree(
        self, phase: Phase, need: _native.Need | None, told: _Told, error: BaseException | None
    ) -> _native.Exchange | _Nothing:
        """The exchange that all ranks come to. Raises the error, or OtherRankError if another rank has one."""
        mine = [_VERSION, error is not None, told.content.numel(), _node(), *told.hashes, *self._expected]
        of_ranks, begins = self._tell_first(mine, told.content)
        self._expected = [0] * len(Phase)
        if error is not None:
            raise error
        if any(failed for _, failed, *_ in of_ranks):
            raise OtherRankError
        if any(version != _VERSION for version, *_ in of_ranks):
            raise RuntimeError("ranks run versions of dcp_fast that do not share reads with each other")
        numbers: dict[tuple[int, ...], int] = {}  # of all different needs
        senders: list[int] = []  # the first rank of each
        need_of_rank = []
        for rank, (_, _, size, _, *words) in enumerate(of_ranks):
            number = numbers.setdefault((size, *words[: len(told.hashes)]), len(numbers))
            if number == len(senders):
                senders.append(rank)
            need_of_rank.append(number)
        self._more = [max(expected) for expected in zip(*(words[-len(Phase) :] for words in of_ranks), strict=True)]
        sizes = {rank: of_ranks[rank][2] for rank in senders}
        if obstacle := why_too_many(sum(sizes.values()), self.most_bytes):
            return _Nothing(obstacle)
        needs = self._tell_needs(told.content, begins, sizes)
        most_bytes = self.most_bytes // ROUND_PARTS

        def make() -> _native.Exchange:
            exchange = _native.Exchange(
                needs=[(tensor.data_ptr(), tensor.numel()) for tensor in needs.get()],
                need_of_rank=need_of_rank,
                node_of_rank=[node for _, _, _, node, *_ in of_ranks],
                read_before=self._assigned,
                rank=self._ranks.rank,
                need=need,
                send_bytes=most_bytes,
                receive_bytes=most_bytes,
            )
            self._memory.make_room(exchange, need)
            return exchange

        made = Outcome(make)
        failed = any(failed for (failed,) in self._all_gather([made.error is not None]))
        if made.error is None and failed:
            raise OtherRankError
        exchange = made.get()
        if not exchange.obstacle and phase is not Phase.HEADERS:
            self._assigned = [before + now for before, now in zip(self._assigned, exchange.read_bytes, strict=True)]
        return exchange

    def _tell_first(self, numbers: Sequence[int], content: torch.Tensor) -> tuple[list[list[int]], list[torch.Tensor]]:
        """The numbers of each rank, and the begin of its content."""
        mine = torch.tensor(numbers, dtype=torch.int64, device="cpu").view(torch.uint8)
        at = mine.numel()
        begin = content[: self._first.numel() - at]
        self._first[:at].copy_(mine)
        self._first[at : at + begin.numel()].copy_(begin)
        self._tell(self._first, [self._first.numel()] * len(self._first_of_ranks), self._first_of_ranks)
        of_ranks = [told[:at].view(torch.int64).tolist() for told in self._first_of_ranks.values()]
        return of_ranks, [told[at:] for told in self._first_of_ranks.values()]

    def _tell_needs(
        self, content: torch.Tensor, begins: Sequence[torch.Tensor], sizes: Mapping[int, int]
    ) -> Outcome[list[torch.Tensor]]:
        """All different needs, encoded. Collective if any is larger than what ranks have told of theirs.

        Args:
            content: the need of this rank.
            begins: by rank, what it has told.
            sizes: of each need, by the rank that sends it.

        Returns:
            An error if there is no memory. The next step tells that, which may fail for want of memory as well.
        """
        larger = {rank: size for rank, size in sizes.items() if size > begins[rank].numel()}
        memory = Outcome(
            lambda: {rank: torch.empty(size, dtype=torch.uint8, device="cpu") for rank, size in larger.items()}
        )
        if larger:
            self._tell(content, [larger.get(rank, 0) for rank in range(len(begins))], memory.value or {})
        return Outcome(lambda: [memory.get().get(rank, begins[rank][:size]) for rank, size in sizes.items()])

    def _all_gather(self, numbers: Sequence[int]) -> list[list[int]]:
        mine = torch.tensor(numbers, dtype=torch.int64, device="cpu")
        of_ranks = {rank: torch.empty_like(mine) for rank in range(self._ranks.get_world_size())}
        sizes = [mine.nbytes] * len(of_ranks)
        self._tell(mine.view(torch.uint8), sizes, {rank: told.view(torch.uint8) for rank, told in of_ranks.items()})
        return [told.tolist() for told in of_ranks.values()]

    def _tell(self, mine: torch.Tensor, sizes: Sequence[int], of_ranks: Mapping[int, torch.Tensor]) -> None:
        """As of :class:`ToAll`, with what this waits for in the report and in the timeline."""
        recorder = None if self._report.timeline is None else self._report.timeline.recorder
        began = 0 if recorder is None else recorder.now()
        begin = time.perf_counter()
        with _group_errors():
            self._to_all.tell(mine, sizes, of_ranks)
        self._report.wait_seconds["ranks"] += time.perf_counter() - begin
        if recorder is not None:
            recorder.add("exchange", "agree", began, recorder.now(), sum(sizes))

    # Rounds

    def _run(
        self, exchange: _native.Exchange, step: ExchangeStep | None, interrupts: Interrupts
    ) -> BaseException | None:
        """Exchange all rounds. Returns an error of this rank that came after the last one, when nobody is told."""
        report, rounds = self._report, exchange.rounds
        error: BaseException | None = None
        bytes_read, read_before = 0, report.bytes_read_by_job

        def heed_interrupt() -> None:
            nonlocal error
            if error is None:
                error = Outcome(interrupts.strike).error

        def work(to_send: int, to_place: int) -> None:
            nonlocal error, bytes_read
            heed_interrupt()
            if step is None or error is not None:
                return
            send = self._memory.sending(to_send) if to_send < rounds else None
            receive = self._memory.received(to_place) if to_place >= 0 else None
            if send or receive:
                stats = Outcome(lambda: step(exchange, send, receive))
                if stats.error is None:
                    bytes_read += stats.value.bytes_read
                error = stats.error

        work(0, -1)
        for round in range(rounds):
            sizes = exchange.bytes_to_send(round), exchange.bytes_to_receive(round)
            recorder = None if report.timeline is None else report.timeline.recorder
            began = 0 if recorder is None else recorder.now()
            heed_interrupt()
            pending, failure = self._begin_round(round, sizes, error is not None, bytes_read)
            error = error or failure
            work(round + 1, round - 1)
            begin = time.perf_counter()
            pending()
            del pending  # it knows the memory of the round, which a failed load would hold with it
            report.wait_seconds["ranks"] += time.perf_counter() - begin
            if recorder is not None:
                recorder.add("exchange", "exchange", began, recorder.now(), sum(sizes[1]))
            report.exchange_rounds += 1
            report.bytes_sent += sum(sizes[0]) - sizes[0][self._ranks.rank]
            report.bytes_received += sum(sizes[1]) - sizes[1][self._ranks.rank]
            arrived = Outcome(partial(self._memory.bring_to_host, round, sum(sizes[1])))
            headers = Outcome(partial(self._headers, round, sizes[1], arrived.value or False))
            error = error or arrived.error or headers.error
            if headers.error is not None:  # the others go on, and learn of it in the next round
                continue
            if any(failed for failed, _ in headers.value):
                raise error or OtherRankError
            report.bytes_read_by_job = read_before + sum(of_rank for _, of_rank in headers.value)
        work(rounds, rounds - 1)
        return error

    def _begin_round(
        self, round: int, sizes: tuple[list[int], list[int]], failed: bool, bytes_read: int
    ) -> tuple[Callable[[], None], BaseException | None]:
        """Send and receive what belongs to a round.

        Returns:
            What waits for its end; and an error of this rank, of which all others learn in this round.
        """
        to_send, to_receive = sizes
        packed = Outcome(partial(self._memory.pack_headers, round, to_send, (int(failed), bytes_read)))
        there, back = self._memory.for_group(round, sum(to_send), sum(to_receive))
        with _group_errors():
            if packed.error is not None:
                there.fill_(1)  # no header that says anything else
            pending = start_all_to_all(back, there, to_receive, to_send, self._ranks)
        self._report.bytes_to_device += packed.value or 0

        def wait() -> None:
            with _group_errors():
                pending()

        return wait, packed.error

    def _headers(self, round: int, sizes: list[int], on_host: bool) -> list[tuple[bool, int]]:
        """Of each rank whether it has failed, and how many bytes it has read."""
        return [(failed != 0, read) for failed, read in self._memory.headers(round, sizes, on_host)]


def _node() -> int:
    """A number that tells this machine from others."""
    boot = ""
    with suppress(OSError):
        boot = _BOOT_ID.read_text()
    digest = hashlib.sha256(f"{socket.gethostname()} {boot}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
