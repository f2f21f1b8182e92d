"""What runs first in every process that uses devices: this one, and those that it starts.

BENCHMARKS_PRELUDE names a Python file that does what must be done before torch is asked for devices: for a rehearsal
without a GPU it makes torch believe in simulated ones. Usually there is none.
"""

from __future__ import annotations

import os
import runpy

VARIABLE = "BENCHMARKS_PRELUDE"


def run() -> None:
    path = os.environ.get(VARIABLE)
    if path:
        runpy.run_path(path)
