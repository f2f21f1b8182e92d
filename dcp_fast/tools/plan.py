"""What each rank of a job would read of a checkpoint, alone and with ``share_reads``, told without loading it."""

from __future__ import annotations

import math
import os
import pickle
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.checkpoint.metadata import Metadata

from dcp_fast import _native
from dcp_fast.collector import paused_collection
from dcp_fast.errors import CorruptMetadataError, typed_errors
from dcp_fast.metadata.lazy import columns_of
from dcp_fast.ranks.exchange import EXCHANGE_BYTES, ROUND_PARTS, why_too_many
from dcp_fast.tools.inspect import find_metadata_file, read_metadata_file

# Of each dimension of the mesh: the dimension of tensors that it shards, or None if it replicates.
_SHARDINGS: dict[str, tuple[int | None, ...]] = {
    "replicate": (None,),
    "rows": (0,),
    "columns": (1,),
    "hsdp": (None, 0),
    "fsdp+tp": (0, 1),
}
_HOST = -1
_MOST_ITEM_BYTES = 16
_MOST_ADDRESS = 1 << 62


@dataclass(frozen=True)
class Sharding:
    """How ranks hold all tensors, as DTensors on a mesh.

    Attributes:
        mesh: its sizes. Ranks lie in it row by row.
        dims: of each dimension of the mesh the dimension of tensors that it shards, or None.
    """

    mesh: tuple[int, ...]
    dims: tuple[int | None, ...]

    @classmethod
    def parse(cls, text: str, ranks: int) -> Sharding:
        """From a name, and for a mesh of two dimensions its sizes: ``rows``, ``hsdp:2x4``.

        Raises:
            ValueError: there is no such sharding, or its mesh has another number of ranks.
        """
        name, colon, sizes = text.partition(":")
        dims = _SHARDINGS.get(name)
        if dims is None:
            raise ValueError(f"no such sharding: {name!r}; there are {', '.join(_SHARDINGS)}")
        mesh: tuple[int, ...] = (ranks,)
        if len(dims) > 1:
            parts = sizes.split("x")
            if len(parts) != len(dims) or not all(part.isascii() and part.isdigit() for part in parts):
                raise ValueError(f"{name} needs the sizes of its mesh, such as {name}:2x4")
            mesh = tuple(map(int, parts))
        elif colon:
            raise ValueError(f"{name} has a mesh of one dimension, and takes no sizes")
        if math.prod(mesh) != ranks:
            raise ValueError(f"a mesh of {sizes} has {math.prod(mesh)} ranks, not {ranks}")
        return cls(mesh, dims)

    def place_of(self, rank: int) -> tuple[int, ...]:
        """Where a rank is along each dimension of the mesh; 0 where all ranks hold the same."""
        place = []
        for size, dim in zip(reversed(self.mesh), reversed(self.dims), strict=True):
            rank, at = divmod(rank, size)
            place.append(0 if dim is None else at)
        return tuple(reversed(place))

    def chunk(self, size: Sequence[int], place: tuple[int, ...]) -> tuple[list[int], list[int]]:
        """Offsets and sizes of what the ranks of a place hold of a tensor.

        As torch.chunk cuts: chunks are as large as the first one, but for the last of them, and some ranks may get
        nothing. What has no columns is sharded by rows if the mesh has no other dimension, else replicated.
        """
        offsets, sizes = [0] * len(size), list(size)
        for parts, wanted, at in zip(self.mesh, self.dims, place, strict=True):
            dim = 0 if wanted == 1 and len(size) == 1 and len(self.mesh) == 1 else wanted
            if dim is None or dim >= len(size):
                continue
            step = -(-sizes[dim] // parts)
            begin = min(at * step, sizes[dim])
            offsets[dim] += begin
            sizes[dim] = min(step, sizes[dim] - begin)
        return offsets, sizes


@dataclass(frozen=True)
class RankReads:
    """What one rank would read, in bytes.

    Attributes:
        rank, node: their numbers.
        needed_bytes: of tensors that the engine places. All that follows is about these, but for ``other_bytes``.
            Headers of records are nowhere counted.
        alone_bytes: read by a rank that does not share, gaps included that cost less than a request.
        shared_bytes: read by a rank that does.
        sent_bytes, received_bytes: to and from other ranks.
        other_bytes: of bytes entries, and of records that only torch can read, as the rank needs them.
    """

    rank: int
    node: int
    needed_bytes: int
    alone_bytes: int
    shared_bytes: int
    sent_bytes: int
    received_bytes: int
    other_bytes: int


@dataclass(frozen=True)
class ReadPlan:
    """What the ranks of a job would read.

    Attributes:
        path: the metadata file, or for safetensors files their folder or the one file.
        sharding, ranks, nodes: of the job.
        obstacle: why the ranks could not share; empty if they can.
        rounds: of the exchange of boxes.
        needed_once_bytes: of all that any rank needs, each byte once.
        needed_bytes, alone_bytes, shared_bytes, sent_bytes, other_bytes: of all ranks, as in :class:`RankReads`.
        between_nodes_bytes: of what is sent.
        of_ranks: each of them.
    """

    path: str
    sharding: str
    ranks: int
    nodes: int
    obstacle: str
    rounds: int
    needed_once_bytes: int
    needed_bytes: int
    alone_bytes: int
    shared_bytes: int
    sent_bytes: int
    between_nodes_bytes: int
    other_bytes: int
    of_ranks: list[RankReads]


def plan_reads(
    path: str | os.PathLike[str],
    sharding: str,
    ranks: int,
    *,
    ranks_per_node: int,
    exchange_bytes: int = EXCHANGE_BYTES,
    trust_metadata: bool = False,
) -> ReadPlan:
    """Tell what the ranks of a job would read, if each wants its part of all that a checkpoint holds.

    The metadata is read, and both ends of each record, as by a load; but no payload. Files count as not being in the
    page cache.

    Args:
        path: of the checkpoint's folder, of a metadata file, or of a safetensors file.
        sharding: as :meth:`Sharding.parse` takes it.
        ranks, ranks_per_node: of the job. The first ranks are on the first node.
        exchange_bytes: as of :func:`dcp_fast.load`.
        trust_metadata: unpickle the metadata as torch does, which runs whatever code it names.

    Raises:
        ValueError: there is no such sharding.
        LoadError: as a load; OSError: as the file system does.
    """
    placed = Sharding.parse(sharding, ranks)
    file = find_metadata_file(path)
    with paused_collection(), typed_errors(checkpoint=file):
        checkpoint = _Checkpoint(_columns(read_metadata_file(file, trust_metadata), file), file)
        # The first rank of each place stands for those that hold the same.
        numbers: dict[tuple[int, ...], int] = {}
        part_of_rank = [numbers.setdefault(placed.place_of(rank), len(numbers)) for rank in range(ranks)]
        whole, *parts = checkpoint.parts([(Sharding((1,), (None,)), (0,)), *((placed, place) for place in numbers)])
        needs: dict[bytes, int] = {}
        need_of_part = [needs.setdefault(part.need, len(needs)) for part in parts]
        nodes = [rank // ranks_per_node for rank in range(ranks)]
        exchange = _exchange(
            list(needs),
            [need_of_part[part] for part in part_of_rank],
            nodes,
            checkpoint.need,
            exchange_bytes // ROUND_PARTS,
        )
        obstacle = why_too_many(sum(map(len, needs)), exchange_bytes) or exchange.obstacle
        if obstacle:
            shared = [parts[part].alone_bytes for part in part_of_rank]
            sent, received, between_nodes = [0] * ranks, [0] * ranks, 0
        else:
            shared = exchange.bytes_to_read(checkpoint.layouts, checkpoint.options)
            sent, received, between_nodes = exchange.traffic()
    of_ranks = [
        RankReads(
            rank,
            node,
            needed_bytes=parts[part].needed_bytes,
            alone_bytes=parts[part].alone_bytes,
            shared_bytes=shared[rank],
            sent_bytes=sent[rank],
            received_bytes=received[rank],
            other_bytes=parts[part].other_bytes,
        )
        for rank, (node, part) in enumerate(zip(nodes, part_of_rank, strict=True))
    ]
    return ReadPlan(
        path=str(file),
        sharding=sharding,
        ranks=ranks,
        nodes=nodes[-1] + 1,
        obstacle=obstacle,
        rounds=0 if obstacle else exchange.rounds,
        needed_once_bytes=whole.needed_bytes,
        needed_bytes=sum(reads.needed_bytes for reads in of_ranks),
        alone_bytes=sum(reads.alone_bytes for reads in of_ranks),
        shared_bytes=sum(shared),
        sent_bytes=sum(sent),
        between_nodes_bytes=between_nodes,
        other_bytes=sum(reads.other_bytes for reads in of_ranks),
        of_ranks=of_ranks,
    )


def _columns(metadata: Metadata, file: Path) -> _native.MetadataColumns:
    columns: _native.MetadataColumns | str | None = columns_of(metadata)
    if columns is None:
        # The native reader does not know something that lies beside the entries.
        bare = Metadata(metadata.state_dict_metadata, storage_data=metadata.storage_data)
        columns = _native.parse_metadata(pickle.dumps(bare))
    if isinstance(columns, str):
        raise CorruptMetadataError(f"the metadata is not as DCP writes it: {columns}", str(file))
    return columns


def _exchange(
    needs: Sequence[bytes],
    need_of_rank: list[int],
    node_of_rank: list[int],
    of_layouts: _native.Need,
    round_bytes: int,
) -> _native.Exchange:
    encoded = [array("q", need) for need in needs]
    return _native.Exchange(
        needs=[(address, 8 * words) for address, words in (need.buffer_info() for need in encoded)],
        need_of_rank=need_of_rank,
        node_of_rank=node_of_rank,
        rank=0,
        need=of_layouts,
        send_bytes=round_bytes,
        receive_bytes=round_bytes,
    )


@dataclass(frozen=True)
class _Part:
    """What the ranks of one place need: as of :class:`RankReads`, and as ranks send it to each other."""

    needed_bytes: int
    alone_bytes: int
    other_bytes: int
    need: bytes


class _Checkpoint:
    """Tensors and records of a checkpoint, whose layouts are read once for all ranks.

    Attributes:
        options: of the native engine, as a load has them by default, for files that are not in the page cache.
        layouts: of the records that anybody needs, once :meth:`parts` was called.
        need: of one holder; it knows the files of the layouts.
    """

    layouts: _native.Layouts
    need: _native.Need

    def __init__(self, columns: _native.MetadataColumns, file: Path) -> None:
        self._columns = columns
        self._file = file
        self.options = _native.Options(threads=0, block_bytes=0, staging_bytes=32 << 20, mode=_native.IoMode.DIRECT)
        fqns = columns.fqns()
        fields = list(map(columns.entry_fields, range(len(fqns))))
        self._tensors = [(number, found[6]) for number, found in enumerate(fields) if found is not None]
        self._fqns = [fqns[number] for number, _ in self._tensors]
        self._bytes_entries = [fqn for fqn, found in zip(fqns, fields, strict=True) if found is None]

    def parts(self, holders: Sequence[tuple[Sharding, tuple[int, ...]]]) -> list[_Part]:
        """What ranks need, each told by its sharding and its place in that."""
        requests: list[int] = []
        for sharding, place in holders:
            for number, size in self._tensors:
                offsets, sizes = sharding.chunk(size, place)
                requests += (number, 1, *offsets, *sizes)
        boxes = _native.find_boxes(self._columns, requests)
        records = boxes.find_records()
        if records.missing is not None:
            raise self._no_record(self._fqn_of(boxes.requests[records.missing]))
        other_bytes = self._bytes_of_entries()
        names, _ = records.files
        root = "" if self._columns.has_payloads else self._file.parent
        fqns = list(map(self._fqn_of, records.requests))
        with typed_errors(fqns, self._file):
            paths = [os.path.join(root, name) for name in names]
            rows = records.rows(all_fallback=False)
            self.layouts = _native.open_files(paths, rows, self.options, records.payloads())
            self.layouts.read_headers(self.options)
            lengths = memoryview(rows).cast("B").cast("q")[2::4].tolist()
            parts = []
            for box_records, program in self._programs(boxes, records, len(holders)):
                self.need = _native.Need.of_program(program, 0, names)
                left_to_torch = {box_records[item] for item in program.fallback(0)}
                parts.append(
                    _Part(
                        needed_bytes=program.bytes_needed,
                        alone_bytes=program.bytes_to_read(self.options),
                        other_bytes=other_bytes + sum(lengths[record] for record in left_to_torch),
                        need=self.need.encode(),
                    )
                )
        return parts

    def _programs(
        self, boxes: _native.PlannedBoxes, records: _native.PlannedRecords, count: int
    ) -> Iterator[tuple[list[int], _native.Program]]:
        """Of each holder: the records of its boxes, and a program that is not to be run.

        Each box gets a destination of its own, of the record's dtype, at an address where nothing is: where boxes go
        changes nothing of what is read.
        """
        rows = array("q", bytes(memoryview(boxes.rows(records)).cast("B")))
        of_box, requests = records.of_box, boxes.requests
        dtypes = list(map(self.layouts.dtype, range(len(self.layouts))))
        box = at = 0
        for holder in range(1, count + 1):
            first_request_behind = holder * len(self._tensors)
            end = bisect_left(requests, first_request_behind, box)
            items, destinations = array("q"), array("q")
            address = _MOST_ITEM_BYTES
            for number, record in enumerate(of_box[box:end]):
                dims = rows[at + 2]
                offsets, sizes = rows[at + 3 : at + 3 + dims], rows[at + 3 + 2 * dims : at + 3 + 3 * dims]
                at += 3 + 3 * dims
                strides = [math.prod(sizes[dim + 1 :]) for dim in range(dims)]
                address, begin = address + _MOST_ITEM_BYTES * math.prod(sizes), address
                if address > _MOST_ADDRESS:
                    raise CorruptMetadataError("chunks of impossible sizes", str(self._file))
                items.extend((record, number, dims, *offsets, *(0,) * dims, *sizes))
                destinations.extend((begin, _HOST, dtypes[record], 0, dims, *sizes, *strides))
            yield of_box[box:end], _native.Program(self.layouts, items, destinations)
            box = end

    def _bytes_of_entries(self) -> int:
        try:
            rows = _native.bytes_rows(self._columns, self._bytes_entries)
        except KeyError as error:
            raise self._no_record(error.args[0]) from None
        return sum(memoryview(rows).cast("B").cast("q")[2::4])

    def _fqn_of(self, request: int) -> str:
        return self._fqns[request % len(self._fqns)]

    def _no_record(self, fqn: str) -> CorruptMetadataError:
        return CorruptMetadataError("the metadata tells no file that holds it", str(self._file), fqn)
