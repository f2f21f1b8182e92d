"""The command line: ``dcp-fast inspect`` tells what a checkpoint consists of, ``dcp-fast plan`` who would read what."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence

from dcp_fast.errors import LoadError, UntrustedMetadataError
from dcp_fast.ranks.exchange import EXCHANGE_BYTES, MIN_EXCHANGE_BYTES
from dcp_fast.tools.inspect import Chunk, Entry, Inspection, inspect
from dcp_fast.tools.plan import ReadPlan, Sharding, plan_reads

FAILED = 1
SHORTEST_NAME = 20
MOST_RANKS = 4096  # all ranks could hold all of a large checkpoint: then it takes minutes
EXIT_STATUS = """
exit status: 0; 1 if the checkpoint cannot be read, or has no such entry; 2 for wrong usage
"""
INSPECTION_KEYS = """\
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
"""
PLAN_NOTES = """\
shardings, as DTensors have them:
  replicate              each rank holds all
  rows                   Shard(0) on all ranks, as of FSDP
  columns                Shard(1) on all ranks; tensors of one dimension by Shard(0)
  hsdp:AxB               Replicate on A, Shard(0) on B; the mesh is AxB, row by row
  fsdp+tp:AxB            Shard(0) on A, Shard(1) on B; tensors of one dimension are replicated on B

the document of --json; sizes are in bytes:
  path, sharding, ranks, nodes
  obstacle, rounds       why ranks could not share, or ""; how many rounds the exchange has
  needed_once_bytes      of all that any rank needs, each byte once
  needed_bytes, alone_bytes, shared_bytes
                         of all ranks: what they need, read without sharing, and with it; only of tensors that
                         the engine places
  sent_bytes, between_nodes_bytes
                         what goes from rank to rank, and how much of it to another node
  other_bytes            of bytes entries and records that only torch can read, in none of the figures above; nor are
                         headers of records
  alone_seconds, shared_seconds
                         alone_bytes and shared_bytes, divided by --bandwidth; null without that
  of_ranks               a list; each has: rank, node, needed_bytes, alone_bytes, shared_bytes, sent_bytes,
                         received_bytes, other_bytes
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, by default that of the process, and return the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if "sharding" in options:
        try:
            Sharding.parse(options.sharding, options.ranks)
        except ValueError as error:
            parser.error(f"argument --sharding: {error}")
    # Names may hold what the terminal's encoding lacks.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        text = options.run(options)
    except UntrustedMetadataError as error:
        return _fail(f"{error}; or, on this command line, --trust-metadata")
    except (LoadError, OSError, MemoryError) as error:
        return _fail(str(error) or type(error).__name__)
    except NoSuchEntryError as error:
        return _fail(str(error))
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # As a process that the signal ends, and without the message that Python prints at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return 0


class NoSuchEntryError(Exception):
    """The checkpoint has no entry that was asked for."""


def _inspect(options: argparse.Namespace) -> str:
    inspection = inspect(options.path, options.fqn, trust_metadata=options.trust_metadata)
    if options.fqn is not None and not inspection.entries:
        raise NoSuchEntryError(f"{inspection.path}: no entry matches {options.fqn!r}")
    if options.json:
        return _as_json(inspection)
    return "\n".join(_summary(inspection) if options.fqn is None else _details(inspection))


def _plan(options: argparse.Namespace) -> str:
    plan = plan_reads(
        options.path,
        options.sharding,
        options.ranks,
        ranks_per_node=options.ranks_per_node,
        exchange_bytes=options.exchange_bytes,
        trust_metadata=options.trust_metadata,
    )
    seconds: tuple[float | None, float | None] = (None, None)
    if options.bandwidth is not None:
        seconds = tuple(count / (1e9 * options.bandwidth) for count in (plan.alone_bytes, plan.shared_bytes))
    if options.json:
        return _as_json({**vars(plan), "alone_seconds": seconds[0], "shared_seconds": seconds[1]})
    return "\n".join(_plan_summary(plan, *seconds))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dcp-fast", description="Tools for checkpoints of torch.distributed.checkpoint."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "inspect",
        help="tell what a checkpoint consists of",
        description="Tell what a checkpoint consists of. Only its metadata is read, and nothing that it names is run.",
        epilog=INSPECTION_KEYS + EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_common(command, _inspect)
    command.add_argument(
        "--fqn", metavar="PATTERN", help="show the chunks of these entries: an FQN, or a shell pattern such as '*.bias'"
    )
    command = commands.add_parser(
        "plan",
        help="tell what each rank of a job would read",
        description="Tell what each rank of a job would read of a checkpoint from storage, with share_reads and "
        "without. Its metadata and the headers of its records are read, and no payload.",
        epilog=PLAN_NOTES + EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_common(command, _plan)
    command.add_argument("--ranks", metavar="N", type=_whole_number(1, MOST_RANKS), required=True, help="of the job")
    command.add_argument("--sharding", required=True, help="how they hold all tensors; listed below")
    command.add_argument(
        "--ranks-per-node", metavar="N", type=_whole_number(1, MOST_RANKS), default=8, help="8 by default"
    )
    command.add_argument(
        "--exchange-bytes",
        metavar="N",
        type=_whole_number(MIN_EXCHANGE_BYTES, 1 << 62),
        default=EXCHANGE_BYTES,
        help="memory of a rank, as of dcp_fast.load",
    )
    command.add_argument(
        "--bandwidth", metavar="GB/s", type=_bandwidth, help="of the storage for all ranks together: tells seconds, too"
    )
    return parser


def _add_common(command: argparse.ArgumentParser, run: Callable[[argparse.Namespace], str]) -> None:
    command.set_defaults(run=run)
    command.add_argument("path", metavar="PATH", help="a checkpoint's folder, a metadata file, or a safetensors file")
    command.add_argument("--json", action="store_true", help="print one JSON document; its keys are listed below")
    command.add_argument(
        "--trust-metadata", action="store_true", help="unpickle the metadata as torch does, which may run code"
    )


def _whole_number(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        number = int(text) if text.isascii() and text.isdigit() else -1
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"a whole number from {least} to {most} is needed, not {text!r}")
        return number

    return parse


def _bandwidth(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"a number above 0 is needed, not {text!r}")
    return number


def _fail(message: str) -> int:
    print(f"dcp-fast: {_printable(message)}", file=sys.stderr)
    return FAILED


def _as_json(document: object) -> str:
    return json.dumps(document, indent=2, default=vars)  # every dataclass in it as a dict


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
    yield from _facts(facts)
    if inspection.entries:
        yield ""
        yield from _entry_table(inspection.entries)


def _facts(facts: Sequence[tuple[str, str | None]]) -> Iterator[str]:
    for name, value in facts:
        if value:
            yield f"{name:18}{_printable(value)}"


def _plan_summary(plan: ReadPlan, alone_seconds: float | None, shared_seconds: float | None) -> Iterator[str]:
    def times(count: int) -> str:
        needed = plan.needed_once_bytes
        return f"{_size(count)}, {count / needed:.3g} times what is needed" if needed else _size(count)

    def time(seconds: float | None) -> str | None:
        return None if seconds is None else f"{seconds:.3g} s, by the bandwidth of the storage and nothing else"

    yield from _facts(
        [
            ("checkpoint", plan.path),
            ("ranks", f"{plan.ranks:,} on {_count(plan.nodes, 'node')}, {plan.sharding}"),
            ("needed", f"{_size(plan.needed_once_bytes)}, each byte once"),
            ("read alone", times(plan.alone_bytes)),
            ("read shared", plan.obstacle or times(plan.shared_bytes)),
            ("  sent", f"{_size(plan.sent_bytes)} in {_count(plan.rounds, 'round')}"),
            ("  between nodes", _size(plan.between_nodes_bytes) if plan.nodes > 1 else None),
            ("others", f"{_size(plan.other_bytes)}, not in these figures" if plan.other_bytes else None),
            ("time alone", time(alone_seconds)),
            ("time shared", time(shared_seconds)),
        ]
    )
    yield ""
    lines = [["rank", "node", "needed", "alone", "shared", "sent", "received"]]
    for reads in plan.of_ranks:
        numbers = [reads.rank, reads.node, reads.needed_bytes, reads.alone_bytes, reads.shared_bytes]
        lines.append([f"{number:,}" for number in (*numbers, reads.sent_bytes, reads.received_bytes)])
    yield from _aligned(lines, to_the_right=range(7))


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
