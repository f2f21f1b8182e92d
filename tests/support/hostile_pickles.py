"""Metadata and bytes entries in opcodes of no writer, and what must become of them."""

from __future__ import annotations

import io
import pickle
import struct

import pytest
from damage import limited, peak_memory, reset_peak_memory
from metadata_cases import parse_metadata

from dcp_fast.errors import CorruptCheckpointError, LoadError, UntrustedBytesError
from dcp_fast.values.load import load_untrusted

__all__ = ["CHECKPOINT", "error_of", "metadata_with", "named", "new", "refused", "text"]

CHECKPOINT = "torch.distributed.checkpoint.metadata"


def error_of(pickled: bytes) -> LoadError:
    with pytest.raises(LoadError) as caught, limited(20):
        parse_metadata(pickled, "the/path")
    error = caught.value
    assert error.path == "the/path"
    assert error.offset is not None
    assert 0 <= error.offset <= len(pickled)
    for fact in (error.reason, "'the/path'", f"bytes {error.offset} to"):
        assert fact in str(error)
    assert vars(pickle.loads(pickle.dumps(error))) == vars(error)
    return error


def refused(entry: bytes, bound: int = 256 << 20) -> LoadError:
    """The error of a bytes entry, which must not take much time or memory."""
    before = reset_peak_memory()
    with limited(20), pytest.raises(LoadError) as caught:
        load_untrusted(io.BytesIO(entry), "the.fqn")
    assert peak_memory() - before < bound
    error = caught.value
    assert error.fqn == "the.fqn"
    assert isinstance(error, (UntrustedBytesError, CorruptCheckpointError)), repr(error)
    return error


def text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def new(name: str, module: str = CHECKPOINT) -> bytes:
    return named(module, name) + b")\x81"


def metadata_with(planner_data: bytes) -> bytes:
    """Whole metadata with any opcodes for its planner data."""
    fields = text("state_dict_metadata") + b"}" + text("planner_data") + planner_data + text("storage_data") + b"}"
    return b"\x80\x04" + new("Metadata") + b"}(" + fields + b"ub."
