"""What a checkout without a built extension says, and which version a package says it is."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import dcp_fast


def test_import_without_an_extension_says_what_to_do(tmp_path: Path) -> None:
    source = Path(dcp_fast.__file__).parent
    shutil.copytree(source, tmp_path / "dcp_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    done = subprocess.run(
        [sys.executable, "-c", "import dcp_fast"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert error.startswith(f"ImportError: {tmp_path / 'dcp_fast'} has no built extension: run `pip install .`")


def test_version() -> None:
    assert dcp_fast.__version__ == importlib.metadata.version("dcp_fast")
