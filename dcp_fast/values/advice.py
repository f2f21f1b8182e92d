"""What to do about entries that are refused: all that would have to be allowed, found without running anything.

Whoever wrote an entry chose its names. So nothing but plain names becomes code that somebody may paste, and messages
have bounds.
"""

from __future__ import annotations

import enum
import io
import os
import pickletools
import re
import sys
import types
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dcp_fast._torch import PyTorchFileReader, is_zipfile, weights_only_unpickler
from dcp_fast.errors import UntrustedBytesError
from dcp_fast.names import MOST_LETTERS, is_plain, shown
from dcp_fast.unpickling import RefusedError
from dcp_fast.values import arrays
from dcp_fast.values.unpickler import find_allowed, python3_name, users_globals

# A record in the format before torch 1.6: a magic number, a version, the machine and the value, each a pickle.
_LEGACY_PICKLES = 4
_MOST_ENTRIES = 5  # that are named
_MOST_NAMES = 30
_TEXTS = ("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
_MEMO_WRITERS = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")
_MEMO_READERS = ("GET", "BINGET", "LONG_BINGET")
_DTYPES = re.compile(r"O[48]?|V[0-9]+")  # of what may hold Python objects, as NumPy's pickles have them
# Functions of NumPy that make what is needed beside them, though no opcode names it: the class of an object whose
# state is set afterwards, and what makes arrays whose elements are no bytes.
_NEEDED_TOO = {
    "numpy.random._pickle.__randomstate_ctor": ("numpy.random.mtrand.RandomState",),
    "numpy.random._pickle.__generator_ctor": ("numpy.random._generator.Generator",),  # as NumPy 1 wrote it
    "numpy._core._internal._convert_to_stringdtype_kwargs": arrays.WITH_OBJECTS[:2],
}
_TRUST = (
    "if you trust the checkpoint, trust_bytes=True of dcp_fast.load or DefaultLoadPlanner (where a framework makes the "
    "planner: dcp_fast.install(trust_bytes=True)) unpickles all entries as torch's planner does, which runs whatever "
    "code they name"
)
_NO_TRUST = "TORCH_FORCE_WEIGHTS_ONLY_LOAD is set, with which torch loads it nowhere"


def advice(allow: Sequence[str] = (), those: str = "it") -> str:
    """What to do about it.

    Args:
        allow: what ``torch.serialization.add_safe_globals`` would have to be given, as code; empty if that does not
            help.
        those: what is refused.
    """
    # Then torch's own planner refuses as well what is trusted.
    forced = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0").lower() in ("1", "y", "yes", "true")
    if not allow:
        return _NO_TRUST if forced else _TRUST
    code = f"torch.serialization.add_safe_globals([{', '.join(allow)}])"
    return f"if you trust that, {code} allows {those}" + ("" if forced else f", or {_TRUST}")


def with_others(first: UntrustedBytesError, others: Sequence[UntrustedBytesError]) -> str:
    """The reason of an error that tells of all entries that are refused, and what all of them ask for.

    Args:
        first: the error of the first one.
        others: the errors of those behind it.
    """
    if not others:
        return first.reason
    names = ", ".join(repr(other.fqn[:MOST_LETTERS]) for other in others[:_MOST_ENTRIES])
    more = "" if len(others) <= _MOST_ENTRIES else f" and {len(others) - _MOST_ENTRIES} more"
    needs = list(dict.fromkeys(name for error in (first, *others) for name in error.safe_globals))
    helps = len(needs) <= _MOST_NAMES and all(error.safe_globals for error in (first, *others))
    why = first.reason.removesuffix(f"; {advice(first.safe_globals)}")
    return f"{why}; other entries are refused as well ({names}{more}); {advice(needs if helps else (), 'all of them')}"


def refusal_of(error: RefusedError, entry: io.BytesIO) -> tuple[str, tuple[str, ...]] | None:
    """Why an entry that is intact is refused, and what would have to be allowed; None if it is damaged."""
    entry.seek(0)
    try:
        asked = _globals(entry)
    except Exception:  # whatever damage leads to
        return None
    users = users_globals()
    names = [name for name in asked.names if name not in users and find_allowed(name) is None]
    names += [name for name in _beside(error, asked) if name not in users]
    names = list(dict.fromkeys(names))
    blocked = [name for name in names if _is_blocked(name) or _is_blocked(_own_name(name) or "")]
    if blocked:
        return f"the entry asks for {_listed(blocked)}, which can run any code; {advice()}", ()
    if not names:
        return f"the entry asks for {error}, which no inert value needs; {advice()}", ()
    if why := _never_allowed(asked.names, names):
        return f"the entry asks for {_listed(names)}, and {why}; {advice()}", ()
    about = "" if names[0] == (error.globals or ("",))[0] else f" (it holds {error})" if error.globals else ""
    # Of too many names nobody reads what they are, and what is no name is no code.
    helps = len(names) <= _MOST_NAMES and all(map(is_plain, names))
    spelled = tuple(map(_spelled, names)) if helps else ()
    return f"the entry asks for {_listed(names)}{about}, which may run code; {advice(spelled)}", spelled


def _listed(names: list[str]) -> str:
    listed = ", ".join(shown(name).removeprefix("builtins.") for name in names[:_MOST_NAMES])
    return listed if len(names) <= _MOST_NAMES else f"{listed} and {len(names) - _MOST_NAMES} more"


def _beside(error: RefusedError, asked: _Asked) -> Iterable[str]:
    """What an entry would be refused for after the names that it has."""
    yield from error.globals
    for maker, others in _NEEDED_TOO.items():
        if maker in asked.names:
            yield from others
    if "numpy.dtype" in asked.names and any(name[0] == "O" for name in asked.dtypes):
        yield from arrays.WITH_OBJECTS
        if any(name[0] == "V" for name in asked.dtypes):
            yield "numpy.dtypes.VoidDType"


def _is_blocked(name: str) -> bool:
    """Whether torch lets nobody allow it."""
    return name.rpartition(".")[0] in weights_only_unpickler._blocklisted_modules


def _never_allowed(names: Iterable[str], missing: list[str]) -> str | None:
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


@dataclass
class _Asked:
    """What is in an entry.

    Attributes:
        names: of globals.
        dtypes: texts that tell NumPy of objects, or of fields.
    """

    names: dict[str, None] = field(default_factory=dict)
    dtypes: set[str] = field(default_factory=set)


def _globals(entry: io.BytesIO) -> _Asked:
    """What an entry asks for.

    Raises:
        Exception: any, if the entry is damaged.
    """
    asked = _Asked()
    if is_zipfile(entry):
        _scan(io.BytesIO(PyTorchFileReader(entry).get_record("data.pkl")), asked)
        return asked
    users = users_globals()
    for _ in range(_LEGACY_PICKLES):
        _scan(entry, asked)
        if any(find_allowed(name) is None and name not in users for name in asked.names):
            break  # it may be no record, but one bare pickle
    return asked


def _scan(stream: io.BytesIO, found: _Asked) -> None:
    """Add the same of one pickle of a stream, which is then at its end."""
    memo: dict[Any, str | None] = {}
    pushed: deque[str | None] = deque([None, None], maxlen=2)  # the last two values, if they are texts
    protocol = 0
    argument: Any
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name == "PROTO":
            protocol = argument
        if opcode.name in _MEMO_WRITERS:
            place = len(memo) if argument is None else argument
            if place >= 1 << 32:  # numbers chosen to have one hash would take forever
                raise ValueError("a place in the memo that no pickler counts to")
            memo[place] = pushed[-1]
            continue
        asked = None
        if opcode.name in ("GLOBAL", "INST"):
            asked = argument.split(" ", 1)
        elif opcode.name == "STACK_GLOBAL":
            asked = [text or "(computed)" for text in pushed]
        if asked is not None:
            found.names[".".join(python3_name(*asked) if protocol < 3 else asked)] = None
        text = argument if opcode.name in _TEXTS else None
        if text is not None and _DTYPES.fullmatch(text[:10]):
            found.dtypes.add(text[:10])
        pushed.append(memo.get(argument) if opcode.name in _MEMO_READERS else text)


def _spelled(name: str) -> str:
    """A global in the form that torch.serialization.add_safe_globals takes.

    torch goes by the name that an object has for itself, unless it is told another.
    """
    own = _own_name(name)
    if own is None and name.startswith("numpy.core."):  # NumPy 2 has another name for it
        own = _own_name(name.replace("numpy.core.", "numpy._core.", 1))
    code = (own if own and is_plain(own) else name).removeprefix("builtins.")
    has_none = own is None and _loaded(name) is not None
    return f'({code}, "{name}")' if has_none or own not in (None, name) else code


def _own_name(name: str) -> str | None:
    """How a class or function calls itself; None for all else."""
    found = _loaded(name)
    if not isinstance(found, (type, types.FunctionType, types.BuiltinFunctionType)):
        return None
    return f"{found.__module__}.{found.__qualname__}"


def _loaded(name: str) -> Any:
    """An object by its name; None if it is in no module that is loaded. Nothing is imported or called."""
    if not is_plain(name):
        return None
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        found: Any = sys.modules.get(".".join(parts[:count]))
        if not isinstance(found, types.ModuleType):
            continue
        for part in parts[count:]:
            found = vars(found).get(part) if isinstance(found, (type, types.ModuleType)) else None
        return found
    return None
