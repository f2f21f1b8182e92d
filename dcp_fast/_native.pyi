from collections.abc import Sequence
from types import TracebackType

from typing_extensions import Buffer, Self

DTYPES: tuple[str, ...]

class NativeError(Exception): ...

class IoMode:
    AUTO: IoMode
    CACHED: IoMode
    DIRECT: IoMode

class Options:
    block_bytes: int
    def __init__(self, *, threads: int, block_bytes: int, staging_bytes: int, mode: IoMode) -> None: ...
    def with_threads(self, threads: int) -> Options: ...

class Layouts:
    requests: int
    bytes_read: int
    modes: list[IoMode]
    def threads(self, options: Options) -> int: ...
    def dtype(self, record: int) -> int: ...
    def unknown(self) -> dict[int, str]: ...
    def __len__(self) -> int: ...

def read_layouts(paths: Sequence[str], records: Buffer, options: Options) -> Layouts: ...

class Stats:
    requests: int
    bytes_read: int
    bytes_placed: int

class Program:
    waves: int
    bytes_needed: int
    def __init__(self, layouts: Layouts, items: Buffer, destinations: Buffer) -> None: ...
    def staged(self, wave: int) -> list[int]: ...
    def unknown(self, wave: int) -> list[int]: ...
    def run(self, wave: int, options: Options) -> Stats: ...

def read_range(path: str, offset: int, length: int) -> bytes: ...
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
