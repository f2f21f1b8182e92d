"""Puts the Python files of dcp_fast and an extension that was built together, where PYTHONPATH finds them.

python package.py SOURCE BUILD PACKAGE
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path


def main(source: Path, build: Path, package: Path) -> None:
    """Copies: the checkout stays as it is."""
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(source, package / source.name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    (extension,) = build.glob("_native*.so")
    shutil.copy2(extension, package / source.name)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
