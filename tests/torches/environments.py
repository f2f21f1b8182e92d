"""An environment for each supported torch and Python, with the dcp_fast of this checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ROOT", "SUPPORTED", "Environment", "chosen", "interpreter"]

ROOT = Path(__file__).resolve().parents[2]
# They take about 5 GB each, as torch comes with CUDA.
FOLDER = Path(os.environ.get("TORCHES", ROOT / "build" / "torches"))

# What is tested: versions of Python by version of torch.
SUPPORTED = {
    "2.11.0": ("3.10", "3.11", "3.12", "3.13"),
    "2.13.0": ("3.12",),
    "2.14.1": ("3.11",),
    "2.15.0": ("3.11", "3.13"),
}


@dataclass(frozen=True)
class Environment:
    """Where one version of torch is, or will be, with one of Python."""

    torch: str
    python: str

    @property
    def name(self) -> str:
        return f"{self.torch}-{self.python}"

    @property
    def folder(self) -> Path:
        return FOLDER / self.name

    @property
    def checkpoints(self) -> Path:
        return FOLDER / "checkpoints" / self.name

    def program(self, name: str) -> Path:
        return self.folder / "bin" / name

    def set_up(self, log: Path) -> bool:
        """Make it, or bring it up to date. What was said is in the log."""
        python = self.program("python")
        pip = [python, "-m", "pip", "--disable-pip-version-check"]
        wheels = FOLDER / "wheels" / self.python
        if not python.exists() and not run([interpreter(self.python) or "", "-m", "venv", self.folder], log):
            return False
        if not run([*pip, "install", f"torch=={self.torch}"], log):
            return False
        # dcp_fast does not depend on torch's version, so that one build does for all of a version of Python.
        if not any(wheels.glob("*.whl")) and not run([*pip, "wheel", "--no-deps", "--wheel-dir", wheels, ROOT], log):
            return False
        (wheel,) = wheels.glob("*.whl")
        return run([*pip, "install", f"{wheel}[test]"], log) and run(
            [*pip, "install", "--no-deps", "--force-reinstall", wheel], log
        )


def run(command: Sequence[str | Path], log: Path, **environment: str) -> bool:
    """Whether a program ended well; what it says goes to the end of a log."""
    with log.open("a") as file:
        file.write(f"$ {' '.join(map(str, command))}\n")
        file.flush()
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **environment}, stdout=file, stderr=subprocess.STDOUT, check=False
        )
    return done.returncode == 0


def forget_wheels() -> None:
    """What was built of an earlier state of the checkout."""
    shutil.rmtree(FOLDER / "wheels", ignore_errors=True)


def chosen(names: Sequence[str]) -> list[Environment]:
    """Those with a version of torch, or with one of torch and one of Python, in the order of the table; all without."""
    everything = [Environment(torch, python) for torch, pythons in SUPPORTED.items() for python in pythons]
    unknown = set(names) - {each.name for each in everything} - set(SUPPORTED)
    if unknown:
        raise ValueError(f"not in the table: {', '.join(sorted(unknown))}; there are {', '.join(SUPPORTED)}")
    return [each for each in everything if not names or each.torch in names or each.name in names]


def interpreter(version: str) -> str | None:
    """A Python of a version that runs: in the path, or of pyenv; None if there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = [shutil.which(f"python{version}"), *pyenv.glob(f"versions/{version}.*/bin/python{version}")]
    for candidate in filter(None, found):
        # Those of pyenv in the path run only if a version is chosen.
        if subprocess.run([candidate, "-c", ""], stderr=subprocess.DEVNULL, check=False).returncode == 0:
            return str(candidate)
    return None
