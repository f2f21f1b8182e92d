"""Loads the value of a bytes entry as torch does, without running what it names."""

from __future__ import annotations

import enum
import io
import pickle
import pickletools
import sys
import types
import zipfile
import zlib
from collections import deque
from collections.abc import Sequence
from typing import IO, Any

from dcp_fast import _native
from dcp_fast._torch import PyTorchFileReader, is_zipfile, load_archive, load_legacy, weights_only_unpickler
from dcp_fast.errors import CorruptPickleError, UntrustedBytesError, torch_load_error
from dcp_fast.unpickling import RefusedError
from dcp_fast.values.unpickler import Unpickler, find_allowed, python3_name, users_globals

# A record in the format before torch 1.6: a magic number, a version, the machine and the value, each a pickle.
_LEGACY_PICKLES = 4
_MOST_NAMED = 5
_ENCODING = "utf-8"  # torch.load's, of texts that Python 2 wrote
_NO_STORAGES = {"": 0}
# In names of globals that torch's loader of archives takes for others, or does more for than to call them.
_NAMES_OF_TORCH = (b"Storage", b"torch.tensor", b"torch._utils", b"torch._tensor")
_TEXTS = ("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
_MEMO_WRITERS = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")
_MEMO_READERS = ("GET", "BINGET", "LONG_BINGET")
# Functions that make an object whose state is set afterwards, which asks for its class; no opcode names that.
_CLASSES_SET_LATER = {"numpy.random._pickle.__randomstate_ctor": "numpy.random.mtrand.RandomState"}
_TRUST = (
    "if you trust the checkpoint, trust_bytes=True of dcp_fast.load or DefaultLoadPlanner (where a framework makes the "
    "planner: dcp_fast.install(trust_bytes=True)) unpickles all entries as torch's planner does, which runs whatever "
    "code they name"
)


def load_untrusted(value: IO[bytes], fqn: str) -> Any:
    """The value of a bytes entry, if its types are inert: see docs/security.md.

    Types that were registered with ``torch.serialization.add_safe_globals`` are allowed too.

    Args:
        value: what ``torch.save`` wrote.
        fqn: named in errors.

    Raises:
        UntrustedBytesError: the entry asks for something else.
        LoadError: the entry is damaged.
    """
    # torch looks for other formats, which run code, in what is a file of the system.
    entry = value if type(value) is io.BytesIO and value.tell() == 0 else io.BytesIO(value.read())
    plain = _native.parse_plain_value(entry.getbuffer())
    if plain is not ...:
        return plain
    try:
        return _load(entry)
    except RefusedError as error:
        refusal = _refusal(error, entry)
        if refusal is None:
            raise CorruptPickleError(f"the entry is damaged: it asks for {error}", fqn=fqn) from None
        refused = UntrustedBytesError(refusal[0], fqn=fqn)
        refused.safe_globals = refusal[1]
        raise refused from None
    except UntrustedBytesError as error:
        raise UntrustedBytesError(error.reason, fqn=fqn) from None
    except Exception as error:
        cls, reason = torch_load_error(error)
        raise cls(reason, fqn=fqn) from error


def with_others(first: UntrustedBytesError, others: Sequence[UntrustedBytesError]) -> str:
    """The reason of an error that tells of all entries that are refused, and what all of them ask for.

    Args:
        first: the error of the first one.
        others: the errors of those behind it.
    """
    if not others:
        return first.reason
    names = ", ".join(repr(other.fqn) for other in others[:_MOST_NAMED])
    more = "" if len(others) <= _MOST_NAMED else f" and {len(others) - _MOST_NAMED} more"
    needs = list(dict.fromkeys(name for error in (first, *others) for name in error.safe_globals))
    helps = all(error.safe_globals for error in (first, *others))
    advice = f"torch.serialization.add_safe_globals([{', '.join(needs)}]) allows all of them"
    advice = advice if helps else "trust_bytes=True alone allows all of them"
    return f"{first.reason}; other entries are refused as well ({names}{more}): {advice}"


def _load(entry: io.BytesIO) -> Any:
    archive = _native.find_archive(entry.getbuffer())
    if archive is None and not is_zipfile(entry):
        return load_legacy(entry, None, _pickle_module(entry, {}), encoding=_ENCODING)
    if archive is not None:
        pickled, storages = archive
        if not storages and not any(name in pickled for name in _NAMES_OF_TORCH):
            bounds = entry.getbuffer().nbytes, _NO_STORAGES
            return Unpickler(io.BytesIO(pickled), encoding=_ENCODING, bounds=bounds).load()
    reader = PyTorchFileReader(entry)
    if archive is None:
        if "constants.pkl" in reader.get_all_records():
            raise UntrustedBytesError(f"the entry is TorchScript, which is a program; {_TRUST}")
        sizes = _storage_sizes(entry, reader)
    else:
        sizes = {key: size for key, (_, size) in storages.items()}
    return load_archive(reader, None, _pickle_module(entry, sizes or _NO_STORAGES), encoding=_ENCODING)


def _storage_sizes(entry: io.BytesIO, reader: Any) -> dict[str, int]:
    """Bytes of each storage by its key, of an archive of another form than torch's, after checks that torch lacks."""
    with zipfile.ZipFile(entry) as archive:
        records = {item.filename.partition("/")[2]: item for item in archive.infolist()}
        if any(item.compress_type != zipfile.ZIP_STORED for item in records.values()):
            raise ValueError("the entry is compressed")
    checksum = records["data.pkl"].CRC  # 0 if the writer was told not to compute it
    if checksum and zlib.crc32(reader.get_record("data.pkl")) != checksum:
        raise pickle.UnpicklingError("the checksum of data.pkl is wrong")
    return {name[5:]: item.file_size for name, item in records.items() if name.startswith("data/")}


def _pickle_module(entry: io.BytesIO, sizes: dict[str, int]) -> Any:
    """What torch takes for the module pickle."""
    bounds = {"entry_size": entry.getbuffer().nbytes, "storage_sizes": sizes}
    unpickler = type("EntryUnpickler", (Unpickler,), bounds)
    return types.SimpleNamespace(
        Unpickler=unpickler, load=lambda file, **options: unpickler(file, **options).load(), __name__=__name__
    )


# What to do about an entry that is refused: all that would have to be allowed, found without running anything.


def _refusal(error: RefusedError, entry: io.BytesIO) -> tuple[str, tuple[str, ...]] | None:
    """Why an entry that is intact is refused, and what would have to be allowed; None if it is damaged."""
    entry.seek(0)
    try:
        asked = _globals(entry)
    except Exception:  # whatever damage leads to
        return None
    users = users_globals()
    names = [name for name in asked if not _is_allowed(name)]
    names += [cls for maker, cls in _CLASSES_SET_LATER.items() if maker in asked and not _is_allowed(cls)]
    names = list(dict.fromkeys([*names, *(name for name in error.globals if name not in users)]))
    blocked = [name for name in names if _is_blocked(name) or _is_blocked(_own_name(name) or "")]
    if blocked:
        return f"the entry asks for {', '.join(blocked)}, which can run any code; {_TRUST}", ()
    if not names:
        return f"the entry asks for {error}, which no inert value needs; {_TRUST}", ()
    listed = ", ".join(name.removeprefix("builtins.") for name in names)
    if why := _never_allowed(asked, names):
        return f"the entry asks for {listed}, and {why}; {_TRUST}", ()
    about = "" if names[0] == (error.globals or ("",))[0] else f" (it holds {error})" if error.globals else ""
    spelled = tuple(map(_spelled, names))
    reason = (
        f"the entry asks for {listed}{about}, which may run code; if you trust that, "
        f"torch.serialization.add_safe_globals([{', '.join(spelled)}]) allows it, or {_TRUST}"
    )
    return reason, spelled


def _is_allowed(name: str) -> bool:
    return find_allowed(name) is not None or name in users_globals()


def _is_blocked(name: str) -> bool:
    """Whether torch lets nobody allow it."""
    return name.rpartition(".")[0] in weights_only_unpickler._blocklisted_modules


def _never_allowed(names: list[str], missing: list[str]) -> str | None:
    """Why an entry would be refused if all that it asks for were allowed, if that can be told."""
    array = _loaded("numpy.ndarray")
    wanted = [_loaded(name) for name in missing]
    # Another function might make one.
    if array and any(name.endswith(".multiarray._reconstruct") for name in names):
        classes = all(isinstance(each, type) for each in wanted)
        if classes and any(issubclass(each, array) and each is not array for each in wanted):
            return "an array of a class of its own is made only of what is trusted"
    # What cannot be looked up might be an enum.
    found = [_loaded(name) for name in names]
    if "builtins.getattr" in names and not any(each is None or isinstance(each, enum.EnumMeta) for each in found):
        return "getattr of other than an enum is called only for what is trusted"
    return None


def _globals(entry: io.BytesIO) -> list[str]:
    """Names of the globals that an entry asks for.

    Raises:
        Exception: any, if the entry is damaged.
    """
    if is_zipfile(entry):
        return _scan(io.BytesIO(PyTorchFileReader(entry).get_record("data.pkl")))
    names: list[str] = []
    for _ in range(_LEGACY_PICKLES):
        names += _scan(entry)
        if not all(map(_is_allowed, names)):  # it may be no record, but one bare pickle
            break
    return names


def _scan(stream: io.BytesIO) -> list[str]:
    """The same of one pickle of a stream, which is then at its end."""
    names: dict[str, None] = {}
    memo: dict[Any, str | None] = {}
    pushed: deque[str | None] = deque([None, None], maxlen=2)  # the last two values, if they are texts
    protocol = 0
    argument: Any
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name == "PROTO":
            protocol = argument
        if opcode.name in _MEMO_WRITERS:
            memo[len(memo) if argument is None else argument] = pushed[-1]
            continue
        asked = None
        if opcode.name in ("GLOBAL", "INST"):
            asked = argument.split(" ", 1)
        elif opcode.name == "STACK_GLOBAL":
            asked = [text or "(computed)" for text in pushed]
        if asked is not None:
            names[".".join(python3_name(*asked) if protocol < 3 else asked)] = None
        text = argument if opcode.name in _TEXTS else None
        pushed.append(memo.get(argument) if opcode.name in _MEMO_READERS else text)
    return list(names)


def _spelled(name: str) -> str:
    """A global in the form that torch.serialization.add_safe_globals takes.

    torch goes by the name that an object has for itself, unless it is told another.
    """
    own = _own_name(name)
    if own is None and name.startswith("numpy.core."):  # NumPy 2 has another name for it
        own = _own_name(name.replace("numpy.core.", "numpy._core.", 1))
    shown = (own or name).removeprefix("builtins.")
    has_none = own is None and _loaded(name) is not None
    return f'({shown}, "{name}")' if has_none or own not in (None, name) else shown


def _own_name(name: str) -> str | None:
    """How a class or function calls itself; None for all else."""
    found = _loaded(name)
    if not isinstance(found, (type, types.FunctionType, types.BuiltinFunctionType)):
        return None
    return f"{found.__module__}.{found.__qualname__}"


def _loaded(name: str) -> Any:
    """An object by its name; None if it is in no module that is loaded. Nothing is imported or called."""
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        found: Any = sys.modules.get(".".join(parts[:count]))
        if not isinstance(found, types.ModuleType):
            continue
        for part in parts[count:]:
            found = vars(found).get(part) if isinstance(found, (type, types.ModuleType)) else None
        return found
    return None
