"""What torch's own methods find in their modules while dcp_fast is installed.

Methods that somebody took from torch's classes before that, into a class attribute, a closure or a default, are torch's
functions themselves. What they would run of a checkpoint they look up in their modules, by ``torch.load`` and
``pickle.load``. There they find functions that are as strict as ours.
"""

from __future__ import annotations

import pickle
from types import ModuleType
from typing import IO, Any

import torch

from dcp_fast.metadata.read import parse_metadata
from dcp_fast.planning.planner import trusts_bytes_by_default
from dcp_fast.readers.filesystem import FileSystemReader
from dcp_fast.this_load import is_trusted
from dcp_fast.values.load import load_untrusted


class _Instead(ModuleType):
    """A module with another function ``load``."""

    def __init__(self, module: ModuleType, load: Any) -> None:
        super().__init__(module.__name__, module.__doc__)
        self._module = module
        self.load = load

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _load_entry(value: IO[bytes], *args: Any, **kwargs: Any) -> Any:
    """The value of a bytes entry, as torch's ``DefaultLoadPlanner.load_bytes`` asks for it."""
    if is_trusted() or trusts_bytes_by_default():
        return torch.load(value, *args, **kwargs)
    return load_untrusted(value, "")  # whoever called the planner knows the FQN


def _load_metadata(file: IO[bytes], **kwargs: Any) -> Any:
    """The metadata, as torch's ``FileSystemReader.read_metadata`` asks for it."""
    if is_trusted() or FileSystemReader.trust_metadata_by_default:
        return pickle.load(file, **kwargs)
    content = file.read()
    return parse_metadata(content, str(getattr(file, "name", "")), lambda: content)


torch_of_planners: ModuleType = _Instead(torch, _load_entry)
pickle_of_readers: ModuleType = _Instead(pickle, _load_metadata)
