"""The command line of tests/all_torches."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from torches.environments import FOLDER, ROOT, Environment, chosen, forget_wheels, interpreter, run

__all__ = ["main"]

COUNTS = re.compile(r"^=* ?((?:\d+ \w+(?:, )?)+) in [\d.]+s", re.MULTILINE)


class Row:
    """What became of one environment."""

    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        self.log = FOLDER / "logs" / f"{environment.name}.log"
        self.steps: list[tuple[str, bool, str]] = []

    @property
    def failed(self) -> bool:
        return not all(passed for _, passed, _ in self.steps)

    def step(self, name: str, command: Sequence[str | Path], **environment: str) -> None:
        """Run a program, and take from what it said how many tests passed."""
        begin = time.monotonic()
        log = self.log.with_suffix(f".{name}.log")
        log.unlink(missing_ok=True)
        passed = run(command, log, **environment)
        counts = "; ".join(COUNTS.findall(log.read_text(errors="replace"))) or f"see {log}"
        self.add(name, passed, f"{counts} ({time.monotonic() - begin:.0f} s)")

    def add(self, name: str, passed: bool, said: str) -> None:
        self.steps.append((name, passed, said))
        environment = self.environment
        outcome = "passed" if passed else "FAILED"
        print(f"torch {environment.torch:8} Python {environment.python:5} {name:12} {outcome}  {said}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Set up what is asked for, test it, and print a line for each step and a table at the end."""
    options = _parser().parse_args(arguments)
    try:
        environments = chosen(options.which)
    except ValueError as error:
        print(error)
        return 2
    (FOLDER / "logs").mkdir(parents=True, exist_ok=True)
    forget_wheels()
    rows = [Row(environment) for environment in environments]
    there = [row for row in rows if _set_up(row)]
    if not options.cross:
        for row in there:
            _test(row, options.tests)
    # Those of an earlier run write too.
    for row in [Row(each) for each in chosen(()) if each.program("dcp-fast").exists()]:
        _write(row, next((one for one in there if one.environment == row.environment), None))
    for row in there:
        _load_all(row)
    print(_table(rows))
    return int(any(row.failed for row in rows))


def _set_up(row: Row) -> bool:
    environment = row.environment
    if not environment.program("python").exists() and interpreter(environment.python) is None:
        row.add("environment", False, f"there is no Python {environment.python}: put it in the path, or use pyenv")
        return False
    row.log.unlink(missing_ok=True)
    passed = environment.set_up(row.log)
    if not passed:
        row.add("environment", False, f"see {row.log}")
    return passed


def _test(row: Row, arguments: str) -> None:
    environment = {"VENV": str(row.environment.folder), "SET_UP": "1", "NATIVE": "0"}
    row.step("tests", [ROOT / "tests" / "run", *shlex.split(arguments)], **environment)


def _write(row: Row, reported: Row | None) -> None:
    """Let an environment write its checkpoints; one that nobody asked for says so only if it fails."""
    environment = row.environment
    shutil.rmtree(environment.checkpoints, ignore_errors=True)
    environment.checkpoints.mkdir(parents=True)
    command = [environment.program("python"), ROOT / "tests" / "torches" / "write.py", environment.checkpoints]
    log = row.log.with_suffix(".writes.log")
    log.unlink(missing_ok=True)
    if not run(command, log):
        (reported or row).add("writes", False, f"see {log}")


def _load_all(row: Row) -> None:
    command: list[str | Path] = [row.environment.program("pytest"), ROOT / "tests" / "torches"]
    row.step("cross", [*command, "--written", FOLDER / "checkpoints"], PYTHONDONTWRITEBYTECODE="1")


def _table(rows: Sequence[Row]) -> str:
    lines = ["", f"{'torch':9}{'Python':8}outcome"]
    for row in rows:
        failed = [name for name, passed, _ in row.steps if not passed]
        said = "; ".join(f"{name}: {said}" for name, _, said in row.steps)
        outcome = f"FAILED ({', '.join(failed)})" if failed else "passed"
        lines.append(f"{row.environment.torch:9}{row.environment.python:8}{outcome}  {said}")
    if not _simulator():
        lines.append("Without the simulated driver, which tests/run builds where there is a cuda.h.")
    return "\n".join(lines)


def _simulator() -> bool:
    driver = ROOT / "build" / "native" / "tests" / "simulated_cuda" / "driver" / "libsimcuda.so"
    return driver.exists() or "DCP_FAST_LIBCUDA" in os.environ


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tests/all_torches",
        description="Run all Python tests on every supported torch, and let each load what each other one saved.",
        epilog="Environments are kept in build/torches, or in the folder that TORCHES names; 5 GB each. pip's own "
        "variables hold for them, such as PIP_CONSTRAINT.",
    )
    parser.add_argument(
        "which", nargs="*", metavar="TORCH[-PYTHON]", help="such as 2.15.0 or 2.11.0-3.12 (default: all)"
    )
    parser.add_argument("--cross", action="store_true", help="only the checkpoints of each for each, not all tests")
    parser.add_argument("--tests", default="", metavar="ARGUMENTS", help='for pytest, such as "-k fuzz" or "-n 0"')
    return parser
