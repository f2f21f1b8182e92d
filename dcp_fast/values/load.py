"""Loads the value of a bytes entry as torch does, without running what it names."""

from __future__ import annotations

import io
import pickle
import types
import zipfile
import zlib
from typing import IO, Any

from dcp_fast import _native
from dcp_fast._torch import PyTorchFileReader, is_zipfile, load_archive, load_legacy, makes_no_storages
from dcp_fast.errors import CorruptPickleError, UntrustedBytesError, torch_load_error
from dcp_fast.names import cleaned
from dcp_fast.unpickling import RefusedError
from dcp_fast.values.advice import advice, refusal_of
from dcp_fast.values.archives import load_archive_natively
from dcp_fast.values.unpickler import Unpickler

_ENCODING = "utf-8"  # torch.load's, of texts that Python 2 wrote
_NO_STORAGES = {"": 0}


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
        refusal = refusal_of(error, entry)
        if refusal is None:
            raise CorruptPickleError(f"the entry is damaged: it asks for {cleaned(str(error))}", fqn=fqn) from None
        refused = UntrustedBytesError(refusal[0], fqn=fqn)
        refused.safe_globals = refusal[1]
        raise refused from None
    except UntrustedBytesError as error:
        raise UntrustedBytesError(error.reason, fqn=fqn) from None
    except Exception as error:
        cls, reason = torch_load_error(error)
        raise cls(cleaned(reason), fqn=fqn) from error


def _load(entry: io.BytesIO) -> Any:
    archive = _native.find_archive(entry.getbuffer())
    if archive is None and not is_zipfile(entry):
        return load_legacy(entry, None, _pickle_module(entry, {}), encoding=_ENCODING)
    if archive is not None and not (archive[1] and makes_no_storages()):
        return load_archive_natively(entry.getbuffer(), entry.getbuffer().nbytes, *archive, _ENCODING)
    reader = PyTorchFileReader(entry)
    if archive is None:
        if "constants.pkl" in reader.get_all_records():
            raise UntrustedBytesError(f"the entry is TorchScript, which is a program; {advice()}")
        sizes = _storage_sizes(entry, reader)
    else:
        sizes = {key: size for key, (_, size) in archive[1].items()}
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

    def load(file: IO[bytes], **options: Any) -> Any:
        """A part of a record before torch 1.6: two numbers, what the machine was like, the keys of storages."""
        part = unpickler(file, **options).load()
        # torch's errors quote it, and the text of nested tuples that share their items never ends.
        if type(part) not in (int, dict) and not (type(part) is list and all(type(key) is str for key in part)):
            raise pickle.UnpicklingError("the record has another part than those of torch")
        return part

    return types.SimpleNamespace(Unpickler=unpickler, load=load, __name__=__name__)
