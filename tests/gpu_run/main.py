"""The command line of tests/run_gpu."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from gpu_run import machine
from gpu_run.runner import Outcome, Run
from gpu_run.steps import BUILD, MACHINE, Setting, seconds_of, steps_of

__all__ = ["exit_code", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for."""
    options = _parser().parse_args(arguments)
    if sys.version_info < (3, 11):
        print("needs Python 3.11: before, a checkout without an extension hides the package that has it")
        return 1
    signal.signal(signal.SIGTERM, _end)
    parts = ("checks", "bench") if options.what == "all" else (options.what,)
    setting = Setting(parts, options.simulated, options.out.resolve(), options.doctest)
    run = Run(setting.results, setting.build / "logs", seconds_of(setting), _say)
    code = run.run(steps_of(setting))
    if no_gpu := _no_gpu(run.outcomes):
        _say(no_gpu)
    _say(f"results: {setting.results}")
    return exit_code(code, run.outcomes)


def exit_code(code: int, outcomes: Sequence[Outcome]) -> int:
    """That of a run whose steps ended so: 2 where there was no GPU to run them on."""
    return machine.NO_GPU if _no_gpu(outcomes) else code


def _no_gpu(outcomes: Sequence[Outcome]) -> str | None:
    found = next((outcome for outcome in outcomes if outcome.name == MACHINE), None)
    if found is None or found.exit_code != machine.NO_GPU:
        return None
    return "This machine has no GPU to run on. `--simulated` rehearses the run on the simulated driver."


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)  # by way of what ends the step that is under way


def _say(line: str) -> None:
    print(line, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tests/run_gpu",
        description="Prove dcp_fast on a machine with an NVIDIA GPU and no network; see docs/gpu.md.",
    )
    parser.add_argument("what", nargs="?", choices=["checks", "bench", "all"], default="all", help="(default: all)")
    parser.add_argument("--out", type=Path, default=BUILD / "results", help="where the results go (default: build/gpu)")
    parser.add_argument("--doctest", type=Path, help="the folder that has doctest/doctest.h, where it is not installed")
    parser.add_argument("--simulated", action="store_true", help="rehearse on the simulated driver, without a GPU")
    return parser
