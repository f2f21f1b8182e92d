"""Builds the C++ half of the torch backend, once for each version of torch and of its sources."""

from __future__ import annotations

import fcntl
import hashlib
import os
import warnings
from pathlib import Path
from types import ModuleType

import torch

_FOLDER = Path(__file__).resolve().parent
_BUILDS = _FOLDER.parents[2] / "build" / "torch_backend"


def load_extension() -> ModuleType:
    """The extension module, which registers its kernels on import. The first call takes some ten seconds."""
    from torch.utils import cpp_extension  # it looks for a CUDA toolkit, which nobody else needs

    sources = sorted(_FOLDER.glob("*.cpp"))
    digest = hashlib.sha256(torch.__version__.encode())
    for file in sorted(_FOLDER.glob("*.h")) + sources:
        digest.update(file.read_bytes())
    folder = _BUILDS / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
    with warnings.catch_warnings(), (folder / "builder").open("w") as builder:
        # One process at a time. A process that was killed leaves torch's own lock behind, on which torch waits forever.
        fcntl.flock(builder, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        # torch's headers take longer than our files: they are read once for each of two compilers.
        units = [folder / f"unit{number}.cpp" for number in range(2)]
        for number, unit in enumerate(units):
            if not unit.exists():  # it would be compiled again
                unit.write_text("".join(f'#include "{source}"\n' for source in sources[number::2]))
        warnings.simplefilter("ignore")  # no CUDA toolkit, no compiler check: neither matters here
        return cpp_extension.load(
            name="simulated_cuda_torch_backend",
            sources=[str(unit) for unit in units],
            extra_cflags=["-O1", "-g0", "-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion"],
            build_directory=str(folder),
            with_cuda=False,
        )
