"""The command line: ``dcp-fast inspect`` tells what a checkpoint consists of."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence

from dcp_fast.errors import LoadError, UntrustedMetadataError
from dcp_fast.tools.inspect import Chunk, Entry, Inspection, inspect

__all__ = ["main"]

FAILED = 1
SHORTEST_NAME = 20
JSON_KEYS = """\
the document of --json:
  path, version          the metadata file, or what holds the safetensors files; the version of its format, or null
  storage_meta           null, or: checkpoint_id, save_id, modules
  tensors, bytes_entries, chunks, files
                         how many there are; chunks are those of tensors
  missing_records        chunks and bytes entries that no file is known for
  payload_bytes, payload_bytes_by_dtype, record_bytes
                         bytes of all elements, and of the records that hold them
  entries                a list, of what --fqn selects; each has:
    fqn, dtype, layout, shape, payload_bytes
                         the last four are null for a bytes entry
    chunk_count, record_bytes, file_count, missing_records
    chunks               null, or with --fqn a list; each has: offsets, sizes (null for a bytes entry),
                         file, offset, length (null if no record is known), transforms

exit status: 0; 1 if the checkpoint cannot be read, or has no such entry; 2 for wrong usage
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, by default that of the process, and return the exit status."""
    options = _parser().parse_args(arguments)
    # Names may hold what the terminal's encoding lacks.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        inspection = inspect(options.path, options.fqn, trust_metadata=options.trust_metadata)
    except UntrustedMetadataError as error:
        return _fail(f"{error}; or, on this command line, --trust-metadata")
    except (LoadError, OSError, MemoryError) as error:
        return _fail(str(error) or type(error).__name__)
    if options.fqn is not None and not inspection.entries:
        return _fail(f"{inspection.path}: no entry matches {options.fqn!r}")
    if options.json:
        text = _as_json(inspection)
    else:
        lines = _summary(inspection) if options.fqn is None else _details(inspection)
        text = "\n".join(lines)
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # As a process that the signal ends, and without the message that Python prints at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dcp-fast", description="Tools for checkpoints of torch.distributed.checkpoint."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "inspect",
        help="tell what a checkpoint consists of",
        description="Tell what a checkpoint consists of. Only its metadata is read, and nothing that it names is run.",
        epilog=JSON_KEYS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("path", metavar="PATH", help="a checkpoint's folder, a metadata file, or a safetensors file")
    command.add_argument(
        "--fqn", metavar="PATTERN", help="show the chunks of these entries: an FQN, or a shell pattern such as '*.bias'"
    )
    command.add_argument("--json", action="store_true", help="print one JSON document; its keys are listed below")
    command.add_argument(
        "--trust-metadata", action="store_true", help="unpickle the metadata as torch does, which may run code"
    )
    return parser


def _fail(message: str) -> int:
    print(f"dcp-fast: {_printable(message)}", file=sys.stderr)
    return FAILED


def _as_json(inspection: Inspection) -> str:
    return json.dumps(inspection, indent=2, default=vars)  # every dataclass in it as a dict


def _summary(inspection: Inspection) -> Iterator[str]:
    meta = inspection.storage_meta or {}
    facts = [
        ("metadata", inspection.path),
        ("format version", inspection.version),
        ("saved to", meta.get("checkpoint_id")),
        ("save id", meta.get("save_id")),
        ("modules", ", ".join(meta.get("modules", ()))),
        ("tensors", f"{inspection.tensors:,} in {_count(inspection.chunks, 'chunk')}"),
        ("bytes entries", f"{inspection.bytes_entries:,}"),
        ("files", f"{inspection.files:,}"),
        ("payload", _size(inspection.payload_bytes)),
        *((f"  {dtype}", _size(count)) for dtype, count in inspection.payload_bytes_by_dtype.items()),
        ("records", _size(inspection.record_bytes)),
        ("without a record", f"{inspection.missing_records:,}" if inspection.missing_records else None),
    ]
    for name, value in facts:
        if value:
            yield f"{name:18}{_printable(value)}"
    if inspection.entries:
        yield ""
        yield from _entry_table(inspection.entries)


def _entry_table(entries: Sequence[Entry]) -> Iterator[str]:
    lines = [
        [
            _printable(entry.fqn),
            _kind(entry),
            _list(entry.shape),
            f"{entry.chunk_count:,}",
            f"{entry.record_bytes if entry.payload_bytes is None else entry.payload_bytes:,}",
            f"{entry.file_count:,}",
        ]
        for entry in entries
    ]
    headings = ["FQN", "dtype", "shape", "chunks", "bytes", "files"]
    if sys.stdout.isatty():
        others = sum(2 + max(map(len, column)) for column in list(zip(headings, *lines, strict=True))[1:])
        longest = max(SHORTEST_NAME, shutil.get_terminal_size().columns - others)
        lines = [[_shortened(line[0], longest), *line[1:]] for line in lines]
    yield from _aligned([headings, *lines], to_the_right=range(3, 6))


def _details(inspection: Inspection) -> Iterator[str]:
    for number, entry in enumerate(inspection.entries):
        if number:
            yield ""
        if entry.shape is None:
            yield f"{_printable(entry.fqn)}: {_kind(entry)}"
        else:
            yield (
                f"{_printable(entry.fqn)}: {_kind(entry)} {_list(entry.shape)}, {entry.payload_bytes:,} bytes, "
                f"{_count(entry.chunk_count, 'chunk')} in {_count(entry.file_count, 'file')}"
            )
        lines = [["  offsets", "sizes", "file", "byte range"]]
        lines += [[f"  {_list(chunk.offsets)}", _list(chunk.sizes), *_place(chunk)] for chunk in entry.chunks or ()]
        yield from _aligned(lines)


def _place(chunk: Chunk) -> tuple[str, str]:
    if chunk.file is None or chunk.offset is None or chunk.length is None:
        return "no record", ""
    transforms = f" ({', '.join(chunk.transforms)})" if chunk.transforms else ""
    return _printable(chunk.file), _printable(f"{chunk.offset} to {chunk.offset + chunk.length}{transforms}")


def _kind(entry: Entry) -> str:
    if entry.dtype is None:
        return "(bytes)"
    return entry.dtype if entry.layout == "strided" else f"{entry.dtype} ({entry.layout})"


def _list(numbers: Sequence[int] | None) -> str:
    return "" if numbers is None else str(list(numbers))


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _size(count: int) -> str:
    value, unit = float(count), "bytes"
    for larger in ("KB", "MB", "GB", "TB", "PB"):
        if abs(value) < 1000:
            break
        value, unit = value / 1000, larger
    return f"{count:,} bytes" if unit == "bytes" else f"{value:.3g} {unit} ({count:,} bytes)"


def _aligned(lines: Sequence[Sequence[str]], to_the_right: range = range(0)) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (
            cell.rjust(width) if place in to_the_right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()


def _shortened(name: str, longest: int) -> str:
    """Without its middle, as names of tensors differ at both ends."""
    if len(name) <= longest:
        return name
    end = (longest - 3) // 2
    return f"{name[: longest - 3 - end]}...{name[-end:]}"


def _printable(text: str) -> str:
    """Without what could move the cursor or colour a terminal: names come from the file."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
