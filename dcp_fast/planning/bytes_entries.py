"""Unpickles bytes entries, the values of a checkpoint that are no tensors, without running what they name.

torch's own restricted unpickler does it (``torch.load(weights_only=True)``). What it raises does not tell damage from a
type that it refuses; that is found out here, by reading the opcodes of the pickle.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
import zlib
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import deque
from typing import IO, Any

import torch

from dcp_fast._torch import PyTorchFileReader, is_zipfile, weights_only_unpickler
from dcp_fast.errors import UntrustedBytesError, torch_load_error

__all__ = ["load_untrusted"]

# A record in the format before torch 1.6: a magic number, a version, the machine and the value, each a pickle.
_LEGACY_PICKLES = 4
_OPCODES = {f"Unsupported operand {ord(opcode.code)}": opcode for opcode in pickletools.opcodes}
_TEXTS = ("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
_MEMO_WRITERS = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")
_MEMO_READERS = ("GET", "BINGET", "LONG_BINGET")


def load_untrusted(value: IO[bytes], fqn: str) -> Any:
    """The value of a bytes entry, if it takes no more than ``torch.load(weights_only=True)`` allows.

    Types that were registered with ``torch.serialization.add_safe_globals`` are allowed too.

    Args:
        value: what ``torch.save`` wrote.
        fqn: named in errors.

    Raises:
        UntrustedBytesError: the entry asks for something else.
        LoadError: the entry is damaged.
    """
    start = value.tell()
    try:
        return torch.load(value, mmap=False, weights_only=True)
    except Exception as error:
        refused = _refused(error, value, start)
        if refused is not None:
            raise UntrustedBytesError(refused, fqn=fqn) from None
        cls, reason = torch_load_error(error)
        raise cls(reason, fqn=fqn) from error


def _refused(error: Exception, value: IO[bytes], start: int) -> str | None:
    """Why torch refuses an entry that is intact, and what to do about it; None if it is damaged.

    Args:
        error: what torch raised.
        value, start: the entry, and where it begins.
    """
    trust = (
        "if you trust the checkpoint, trust_bytes=True (of dcp_fast.load, DefaultLoadPlanner or install) unpickles all "
        "entries as torch's planner does, which runs whatever code they name"
    )
    if isinstance(error, RuntimeError) and "weights_only=True`` with" in str(error):  # TorchScript, tar files
        return f"{str(error).partition('. ')[0]}; {trust}"
    if not isinstance(error, pickle.UnpicklingError):
        return None
    try:
        value.seek(start)
        names = _unsafe_globals(io.BytesIO(value.read()))
    except Exception:  # whatever damage leads to
        return None
    blocked = [name for name in names if name.rpartition(".")[0] in weights_only_unpickler._blocklisted_modules]
    if blocked:
        return f"the entry asks for {', '.join(blocked)}, which can run any code; {trust}"
    listed = ", ".join(name.removeprefix("builtins.") for name in names)
    reason = _reason(error)
    if opcode := _OPCODES.get(reason):
        used = f"{opcode.name} of pickle protocol {opcode.proto}, which torch.load(weights_only=True) does not know"
        return f"the entry uses {used}{listed and f', and asks for {listed}'}; {trust}"
    if not names:
        return (
            f"torch.load(weights_only=True) refuses the entry: {reason}; types that you trust can be allowed by "
            f"torch.serialization.add_safe_globals, or {trust}"
        )
    return (
        f"the entry asks for {listed}, which may run code; if you trust that, "
        f"torch.serialization.add_safe_globals([{listed}]) allows it, or {trust}"
    )


def _reason(error: Exception) -> str:
    """What torch's unpickler said, without the advice that torch.load adds for its own callers."""
    text = str(error).partition("\n\nCheck the documentation of torch.load")[0]
    return text.rpartition("WeightsUnpickler error:")[2].strip()


def _unsafe_globals(entry: io.BytesIO) -> list[str]:
    """Names of the globals that an entry asks for and that torch does not allow. Runs nothing.

    Raises:
        Exception: any, if the entry is damaged.
    """
    if not is_zipfile(entry):
        names: list[str] = []
        for _ in range(_LEGACY_PICKLES):
            names = names or _scan(entry)
        return names
    pickled = PyTorchFileReader(entry).get_record("data.pkl")
    with zipfile.ZipFile(entry) as archive:
        (stored,) = (item for item in archive.infolist() if item.filename.partition("/")[2] == "data.pkl")
    if stored.CRC and zlib.crc32(pickled) != stored.CRC:  # 0: the writer was told not to compute it
        raise ValueError("the checksum of the pickle differs")
    return _scan(io.BytesIO(pickled))


def _scan(stream: io.BytesIO) -> list[str]:
    """The same of one pickle of a stream, which is then at its end."""
    names: dict[str, None] = {}
    memo: dict[Any, str | None] = {}
    pushed: deque[str | None] = deque([None, None], maxlen=2)  # the last two values, if they are texts
    argument: Any
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in _MEMO_WRITERS:
            memo[len(memo) if argument is None else argument] = pushed[-1]
            continue
        if opcode.name in ("GLOBAL", "INST"):
            names[_torch_name(*argument.split(" ", 1))] = None
        elif opcode.name == "STACK_GLOBAL":
            names[_torch_name(*(text or "(computed)" for text in pushed))] = None
        text = argument if opcode.name in _TEXTS else None
        pushed.append(memo.get(argument) if opcode.name in _MEMO_READERS else text)
    defaults = weights_only_unpickler._get_allowed_globals()
    users: dict[str, Any] = weights_only_unpickler._get_user_allowed_globals()  # type: ignore[no-untyped-call]
    return [name for name in names if name not in defaults and name not in users]


def _torch_name(module: str, name: str) -> str:
    """A global as torch's list has it; pickles of protocol 2 have the names of Python 2."""
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"
