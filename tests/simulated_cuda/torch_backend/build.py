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
    """The extension module, which registers its kernels on import. The first call takes about a minute."""
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
        warnings.simplefilter("ignore")  # no CUDA toolkit, no compiler check: neither matters here
        return cpp_extension.load(
            name="simulated_cuda_torch_backend",
            sources=[str(source) for source in sources],
            extra_cflags=["-O1", "-g0", "-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion"],
            build_directory=str(folder),
            with_cuda=False,
        )
