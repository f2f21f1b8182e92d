"""Writes all checkpoints that the torch that runs can write, and what wrote them: `python write.py FOLDER`."""

from __future__ import annotations

import json
import platform
import sys
import warnings
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "support")]

import torch  # noqa: E402
from ranks import Ranks  # noqa: E402

from torches.checkpoints import KINDS, running, write  # noqa: E402


def write_all(folder: Path, ranks: Ranks) -> None:
    written = []
    for name, kind in KINDS.items():
        if running() < kind.since:
            print(f"torch {torch.__version__} cannot write {name!r}, which came with {kind.since}")
            continue
        ranks.run(kind.ranks, write, str(folder), name)
        written.append(name)
    python = platform.python_version_tuple()[:2]
    about = {"torch": torch.__version__, "python": ".".join(python), "kinds": written}
    (folder / "about.json").write_text(json.dumps(about))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    pool = Ranks()
    try:
        write_all(Path(sys.argv[1]), pool)
    finally:
        pool.close()
