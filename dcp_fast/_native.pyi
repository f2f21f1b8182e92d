from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlanner, ReadItem
from typing_extensions import Buffer, Self, TypeIs

DTYPES: tuple[str, ...]
METADATA_DTYPES: tuple[str, ...]
METADATA_LAYOUTS: tuple[str, ...]

class NativeError(Exception):
    """What failed, and where: see csrc/error.h. Numbers are -1 and texts empty where nothing is known."""

    kind: str
    reason: str
    error_number: int
    record: int
    path: str
    offset: int
    length: int
    device: int
    fqn: str

class IoMode:
    AUTO: IoMode
    CACHED: IoMode
    DIRECT: IoMode
    MAPPED: IoMode

class TraceRecorder:
    def now(self) -> int: ...
    def add(self, track: str | None, name: str, begin: int, end: int, bytes: int | None = None) -> None: ...
    def events(self) -> list[tuple[str, str, int, int, int | None, str | None, int | None]]: ...

class Options:
    recorder: TraceRecorder | None
    reading_seconds: float
    waiting_seconds: float
    def __init__(
        self,
        *,
        threads: int,
        block_bytes: int,
        staging_bytes: int,
        mode: IoMode,
        recorder: TraceRecorder | None = None,
    ) -> None: ...
    def share(self, parts: int, *, threads: int = 0, mapped: bool = True) -> Options: ...
    def joining(self, most_gap: int) -> Options: ...
    def on_node(self, bytes: float, bytes_stored: float) -> Options: ...

class Layouts:
    requests: int
    bytes_read: int
    def read_headers(self, options: Options) -> None: ...
    def read_as(self, options: Options) -> None: ...
    shared_files: int
    def threads(self, options: Options) -> int: ...
    def is_tensor(self, record: int) -> bool: ...
    def fallback_reason(self, record: int) -> str: ...
    def dtype(self, record: int) -> int: ...
    def strides(self, record: int) -> list[int]: ...
    def __len__(self) -> int: ...

def open_files(
    paths: Sequence[str], records: Buffer, options: Options, payloads: Buffer | None = None
) -> Layouts: ...  # whose headers are yet to be read

class Stats:
    requests: int
    bytes_read: int
    bytes_placed: int
    bytes_mapped: int
    why_unmapped: str
    converted_items: int

class Program:
    waves: int
    bytes_needed: int
    def __init__(self, layouts: Layouts, items: Buffer, destinations: Buffer) -> None: ...
    def bytes_needed_of(self, wave: int) -> int: ...
    def cut(self, waves: Sequence[Sequence[int]]) -> None: ...  # items of each wave; for programs that have one
    def box(self, item: int) -> tuple[list[int], list[int]]: ...
    def bytes_to_read(self, options: Options) -> int: ...  # of the first wave, gaps included, if nothing is mapped
    def converted(self, wave: int) -> list[int]: ...
    def fallback(self, wave: int) -> list[int]: ...
    def run(
        self, wave: int, options: Options, ring: PinnedRing | None = None, streams: dict[int, int] = ...
    ) -> Stats: ...

class DeviceStats:
    bytes_copied: int
    copies: int
    launches: int
    copy_seconds: float

class PinnedBuffer(Buffer):
    def __init__(self, size: int, device: int) -> None: ...

class PinnedRing:
    pinned_bytes: int
    device_bytes: int
    def __init__(self, *, pinned_bytes: int, device_bytes: int, block_bytes: int) -> None: ...
    def prepare(self, device: int) -> None: ...
    def synchronize(self, streams: dict[int, int]) -> None: ...
    def drain(self) -> None: ...
    def take_stats(self) -> DeviceStats: ...
    def take_slot_seconds(self) -> float: ...

class Need:
    """What this rank needs of the files, and where it goes."""

    converted_items: int
    bytes_left_out: int  # of headers, as memory for them is short
    left_out: list[int]  # records for which it is
    @staticmethod
    def of_program(program: Program, wave: int, names: Sequence[str]) -> Need: ...
    @staticmethod
    def of_headers(
        layouts: Layouts, records: Sequence[int], most_bytes: int, names: Sequence[str], options: Options
    ) -> Need: ...
    @staticmethod
    def of_records(layouts: Layouts, records: Sequence[int], names: Sequence[str]) -> Need: ...
    @staticmethod
    def of_quantized(layouts: Layouts, rows: Buffer, names: Sequence[str]) -> Need: ...
    def is_on(self, device: int) -> bool: ...
    def encode(self) -> bytes: ...

def keep(layouts: Layouts, need: Need) -> None: ...
def drop(layouts: Layouts, need: Need) -> None: ...

class RoundStats:
    placed: Stats
    requests: int
    bytes_read: int

class Exchange:
    """Who reads what in which round, as all ranks come to it; and this rank's part in it."""

    obstacle: str  # why nothing can be shared
    rounds: int
    read_bytes: list[int]  # by rank
    def __init__(
        self,
        *,
        needs: Sequence[tuple[int, int]],  # address and size
        need_of_rank: Sequence[int],
        node_of_rank: Sequence[int],
        read_before: Sequence[int] = ...,  # by rank, in earlier exchanges; empty: nothing
        rank: int,
        need: Need | None,  # of this rank; or any of its layouts
        send_bytes: int,
        receive_bytes: int,
    ) -> None: ...
    def bytes_to_read(self, layouts: Layouts, options: Options) -> list[int]: ...  # by rank
    def traffic(self) -> tuple[list[int], list[int], int]: ...  # sent and received by rank, sent between nodes
    def bytes_to_send(self, round: int) -> list[int]: ...
    def bytes_to_receive(self, round: int) -> list[int]: ...
    def passes_on(self, round: int) -> bool: ...
    def step(
        self,
        need: Need,
        layouts: Layouts,
        send: tuple[int, int, int] | None,  # round, address and size
        receive: tuple[int, int, int] | None,
        options: Options,
        ring: PinnedRing | None = None,
        streams: dict[int, int] = ...,
        on_device: tuple[int, int, int] | None = None,  # ordinal, address and size
    ) -> RoundStats: ...

def require_not_capturing(streams: dict[int, int]) -> None: ...
def ranks_of_node() -> int: ...
def most_reader_threads(wanted: int) -> int: ...
def run_programs(
    programs: Sequence[Program],
    options: Options,
    ring: PinnedRing,
    streams: dict[int, int],
    placed: Callable[[int], None],
) -> Stats: ...

class RecordBytes(Buffer): ...

def can_dequantize(stored: int, exponents: bool, target: int, destination: int) -> bool: ...
def dequantize(rows: Buffer) -> None: ...
def can_dequantize_on_device(stored: int, target: int, destination: int) -> bool: ...
def dequantize_on_device(ring: PinnedRing, device: int, stream: int, rows: Buffer) -> None: ...
def read_records(
    layouts: Layouts,
    records: Sequence[int],
    most_bytes: int,
    options: Options,
    take: Callable[[int, RecordBytes], None],
) -> Stats: ...
def find_archive(record: Buffer) -> tuple[bytes, dict[str, tuple[int, int]]] | None: ...
def read_plain_values(
    layouts: Layouts, records: Sequence[int], options: Options
) -> tuple[list[Any], int, int]: ...  # an Ellipsis for what is no plain value; requests, bytes
def parse_plain_value(record: Buffer) -> Any: ...
def read_record(
    layouts: Layouts, record: int, options: Options
) -> tuple[bytes, int, int]: ...  # and how many requests and bytes brought it

class MetadataColumns:
    """Metadata of a checkpoint. An entry is the number of a key of state_dict_metadata, a row one of storage_data."""

    entry_count: int
    dtypes: list[int]  # all codes that are in use; indices into METADATA_DTYPES
    def fqns(self) -> list[str]: ...
    def find_entry(self, fqn: str) -> int: ...  # -1: there is none
    def find_size(self, fqn: str) -> tuple[int, tuple[int, ...] | None] | None: ...
    def are_keys_of(self, values: dict[str, Any]) -> bool: ...  # all fqns()
    def entry_fields(
        self, entry: int
    ) -> tuple[int, int, bool, int, bool, bool, tuple[int, ...], tuple[int, ...] | None] | None: ...
    def chunks(self, entry: int) -> memoryview: ...  # int64: chunk, offsets or sizes, dimension
    has_storage: bool
    row_count: int
    row_files: memoryview  # uint32, indices into files()
    row_offsets: memoryview  # int64
    row_lengths: memoryview  # int64
    def files(self) -> list[str]: ...
    def find_row(self, fqn: str, offset: Sequence[int] | None) -> int: ...  # -1: there is none
    def row_of_chunk(self, entry: int, chunk: int) -> int: ...  # -1: there is none
    def stored_bytes(self, fqns: Sequence[str]) -> float: ...
    def row(
        self, index: int
    ) -> tuple[str, tuple[int, ...] | None, int | None, str, int, int, list[str] | tuple[str, ...] | None]: ...
    has_payloads: bool  # records are mere payloads of safetensors files
    def payload(self, row: int) -> tuple[str, int, int, int, tuple[int, ...]]: ...  # path, offset, length, dtype, sizes
    planner_data: bytes
    storage_meta: bytes
    attributes: list[tuple[str, bytes | None]]  # beyond the fields of Metadata; None: only the file has it
    left_out: list[tuple[str, str, str]]  # module, class, field
    version: str | None

def parse_metadata(pickle: Buffer) -> MetadataColumns | str: ...
def parse_blocks(size: int, next_block: Callable[[], Buffer]) -> MetadataColumns | str: ...
def read_safetensors(files: Sequence[str], indexes: Sequence[str], threads: int) -> MetadataColumns: ...
def read_metadata(path: str) -> MetadataColumns | str: ...

class Rows(Buffer): ...  # int64

def bytes_rows(columns: MetadataColumns, fqns: Sequence[str]) -> Rows: ...  # file, offset, length, is transformed

class TensorTypes:
    """Tells what values of state dicts are, by their exact types; see dcp_fast/planning/values.py."""

    def __init__(self, dtensor: type, whole: tuple[type, ...], overrides: tuple[str, ...]) -> None: ...
    def is_whole(self, value: object) -> TypeIs[torch.Tensor]: ...
    def plain_local_tensor(self, value: object) -> torch.Tensor | None: ...

class PlainTensors:
    """Knows tensors on the host whose memory holds their elements as they are."""

    def __init__(self, types: tuple[type, ...], api: object, dtypes: dict[torch.dtype, tuple[int, int]]) -> None: ...
    def rows(
        self, tensors: list[torch.Tensor], other: Callable[[torch.Tensor], Sequence[int]]
    ) -> tuple[Rows, bool]: ...

class PlacedBoxes:
    """Whether boxes are still where they were resolved and placed."""

    def __init__(
        self,
        plain: PlainTensors,
        fqns: list[str],
        values: list[Any],
        numbers: Sequence[int],
        tensors: list[torch.Tensor],
        types: TensorTypes,
    ) -> None: ...
    def others(self) -> list[int]: ...  # boxes of which only `look` knows
    def are_as_resolved(
        self, state_dict: dict[str, Any], boxes: Sequence[int], look: Callable[[int], bool]
    ) -> bool: ...
    def keep_versions(self, boxes: Sequence[int]) -> None: ...
    def commit(
        self,
        planner: LoadPlanner,
        window: Sequence[int],
        items: list[ReadItem],
        look: Callable[[int], bool],
        other: Callable[[int, ReadItem], torch.Tensor],
        load_bytes: Callable[[int], None],
        has_changed: Callable[[], bool],
    ) -> tuple[int, bool]: ...

class PlannedRecords:
    """The stored tensors that boxes are parts of."""

    of_box: list[int]
    requests: list[int]  # of the first box of each
    missing: int | None  # the first box whose chunk storage_data lacks
    files: tuple[list[str], list[int]]  # their names, and the requests of the first box of each
    def rows(self, all_fallback: bool) -> Rows: ...  # for open_files, files as numbered above
    def payloads(self) -> Rows | None: ...  # likewise

class PlannedBoxes:
    uncovered: list[int]  # requests of which the checkpoint lacks some elements
    def __len__(self) -> int: ...
    requests: list[int]  # of each
    def items(
        self,
        indices: Sequence[int],
        fqns: list[str],
        wanted: list[Sequence[ChunkStorageMetadata] | None],
        read_item: type[ReadItem],
        metadata_index: type,
        size: type,
        tensor: LoadItemType,
    ) -> list[ReadItem]: ...
    def destinations(
        self,
        fqns: list[str],
        wanted: list[Sequence[ChunkStorageMetadata] | None],
        state_dict: dict[str, Any],
        types: TensorTypes,
        other: Callable[[int, int, int], torch.Tensor],  # given request, wanted chunk and dimensions
    ) -> list[torch.Tensor]: ...
    destination_of_box: list[int]
    def find_records(self) -> PlannedRecords: ...
    def rows(self, records: PlannedRecords) -> Rows: ...  # for Program

WHOLE: int  # a request for a whole tensor: its entry, and this in place of the number of wanted chunks

def holds(container: object, elements: list[Any]) -> bool | None: ...  # None: not a dict, list or class of Python's own
def all_hold(watched: list[tuple[object, list[Any]]], lengths: list[tuple[Any, int]]) -> bool: ...
def flatten(
    state_dict: dict[str, Any], tensors: tuple[type, ...], sharded_tensor: type, ordered_dict: type
) -> tuple[dict[str, Any], dict[str, tuple[str | int, ...]]] | None: ...
def containers(
    state_dict: dict[str, Any], tensors: tuple[type, ...], sharded_tensor: type, ordered_dict: type
) -> set[str] | None: ...

class Requests:
    """What is wanted of tensors: one request for each."""

    fqns: list[str]
    wanted: list[Sequence[ChunkStorageMetadata] | None]  # chunks of each; None: a whole tensor
    def __init__(
        self,
        columns: MetadataColumns,
        made: dict[str, Any],  # entries that are left to Python
        types: TensorTypes,
        placements: tuple[type, ...],
    ) -> None: ...
    def __len__(self) -> int: ...
    def add_all(self, items: Iterable[tuple[str, Any]], other: Callable[[str, Any], None]) -> None: ...
    def add(self, fqn: str, entry: int, chunks: list[ChunkStorageMetadata], values: Sequence[int]) -> None: ...
    def learn(self, dtensor: Any, chunks: list[ChunkStorageMetadata], values: Sequence[int]) -> None: ...
    def find_boxes(self) -> PlannedBoxes: ...

def find_boxes(columns: MetadataColumns, requests: Sequence[int]) -> PlannedBoxes: ...
def find_overlaps(
    dims: int, wanted: Sequence[int], wanted_count: int, stored: Sequence[int], stored_count: int
) -> list[int]: ...

class FaultInjection:
    calls: int
    def __init__(
        self, function: str, nth: int, error_number: int = 0, repeat: int = 1, short_bytes: int = 1
    ) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

class SlowStorage:
    bytes: int
    requests: int
    def __init__(self, path: str, *, bytes_per_second: float, latency_seconds: float = 0.0) -> None: ...
    def take(self, bytes: int) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
