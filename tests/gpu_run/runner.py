"""Runs steps one after the other: each within a time limit, with a log of its own, whatever became of the ones before.

After every step the summary and the archive of logs are written anew, so that a run that is ended leaves both.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

__all__ = ["Outcome", "Run", "Step"]

# A step that is interrupted may say what it was doing before it is killed.
SECONDS_TO_SAY_GOODBYE = 5.0
# Of a log that is larger, the middle is left out of the archive.
MOST_LOG_BYTES = 4 << 20

PASSED, FAILED, TIMED_OUT, SKIPPED, NOT_RUN = "passed", "failed", "timed out", "skipped", "not run"


@dataclass(frozen=True)
class Step:
    """Programs that run one after the other until one fails.

    Args:
        name: of the step and of its log.
        commands: the programs.
        limit: the seconds that all of them may take.
        kept: of the time of the whole run, the seconds that steps before it leave to it.
        needs: steps that must have passed.
        environment: on top of that of this process; None removes a variable.
        folder: where the programs run.
        facts: finds in the log what to say of the step, such as counts of tests.
        notes: finds in the log what else is worth a line.
        why_skipped: finds in the log of a failed step why it could not run here, if that is why.
        skipped: why it cannot run here, where that is known beforehand.
    """

    name: str
    commands: Sequence[Sequence[str | Path]]
    limit: float
    kept: float = 0
    needs: Sequence[str] = ()
    environment: Mapping[str, str | None] = field(default_factory=dict)
    folder: Path | None = None
    facts: Callable[[str], str] = lambda log: ""
    notes: Callable[[str], Sequence[str]] = lambda log: ()
    why_skipped: Callable[[str], str | None] = lambda log: None
    skipped: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a step."""

    name: str
    status: str
    exit_code: int | None = None
    seconds: float = 0
    text: str = ""
    notes: Sequence[str] = ()

    def line(self, width: int = 0) -> str:
        """Name, exit code or what happened instead, seconds, and what there is to say."""
        what = f"exit {self.exit_code}" if self.status in (PASSED, FAILED) else self.status
        return f"{self.name:{width}}  {what:9}  {self.seconds:6.1f} s  {self.text}".rstrip()


class Run:
    """The steps of one run, and their results in a folder: ``summary.txt`` and ``logs.tar.gz``."""

    def __init__(self, results: Path, logs: Path, seconds: float, say: Callable[[str], None] = print) -> None:
        self.results = results
        self.logs = logs
        self.outcomes: list[Outcome] = []
        self._deadline = time.monotonic() + seconds
        self._say = say
        results.mkdir(parents=True, exist_ok=True)
        logs.mkdir(parents=True, exist_ok=True)
        for old in logs.glob("*.log"):
            old.unlink()

    def run(self, steps: Sequence[Step]) -> int:
        """Run all steps; 0 if none failed, else 1."""
        width = max(len(step.name) for step in steps)
        for number, step in enumerate(steps):
            kept = sum(later.kept for later in steps[number + 1 :])
            outcome = self._outcome(step, self._deadline - time.monotonic() - kept)
            self.outcomes.append(outcome)
            self._say(outcome.line(width))
            self.write(width)
        self._say(self._verdict())
        return 0 if not self._bad() else 1

    def write(self, width: int = 0) -> None:
        """Write the summary and the archive."""
        lines = [outcome.line(width) for outcome in self.outcomes]
        lines += [f"{outcome.name}: {note}" for outcome in self.outcomes for note in outcome.notes]
        (self.results / "summary.txt").write_text("\n".join([*lines, self._verdict()]) + "\n")
        with tarfile.open(self.results / "logs.tar.gz.part", "w:gz") as archive:
            for log in sorted(self.logs.glob("*.log")):
                archive.add(_shortened(log), f"logs/{log.name}")
        os.replace(self.results / "logs.tar.gz.part", self.results / "logs.tar.gz")

    def _bad(self) -> list[str]:
        return [outcome.name for outcome in self.outcomes if outcome.status in (FAILED, TIMED_OUT, NOT_RUN)]

    def _verdict(self) -> str:
        skipped = [outcome.name for outcome in self.outcomes if outcome.status == SKIPPED]
        but = f" (skipped: {', '.join(skipped)})" if skipped else ""
        return (f"FAILED: {', '.join(self._bad())}" if self._bad() else "passed") + but

    def _outcome(self, step: Step, available: float) -> Outcome:
        passed = {outcome.name for outcome in self.outcomes if outcome.status == PASSED}
        missing = [name for name in step.needs if name not in passed]
        if missing:
            return Outcome(step.name, NOT_RUN, text=f"needs {', '.join(missing)}")
        if step.skipped is not None:
            return Outcome(step.name, SKIPPED, text=step.skipped)
        limit = min(step.limit, available)
        if limit < 1:
            return Outcome(step.name, NOT_RUN, text="no time is left")
        path = self.logs / f"{step.name}.log"
        start = time.monotonic()
        code = None
        with path.open("w") as log:
            for command in step.commands:
                code = _run_command(command, step, start + limit, log)
                if code != 0:
                    break
        seconds = time.monotonic() - start
        text = path.read_text(errors="replace")
        facts, notes = step.facts(text), step.notes(text)
        if code is None:
            return Outcome(step.name, TIMED_OUT, None, seconds, f"after {limit:.0f} s  {facts}".rstrip(), notes)
        if code != 0 and (reason := step.why_skipped(text)) is not None:
            return Outcome(step.name, SKIPPED, code, seconds, reason, notes)
        return Outcome(step.name, PASSED if code == 0 else FAILED, code, seconds, facts, notes)


def _run_command(command: Sequence[str | Path], step: Step, deadline: float, log: TextIO) -> int | None:
    """The exit code of a program, or None if it had not ended by the deadline. Nothing that it started goes on."""
    words = [str(word) for word in command]
    log.write(f"$ {shlex.join(words)}\n")
    log.flush()
    environment = {**os.environ, **step.environment}
    try:
        process = subprocess.Popen(
            words,
            cwd=step.folder,
            env={name: value for name, value in environment.items() if value is not None},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        log.write(f"{error}\n")
        return 127
    try:
        return process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        _signal(process, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS_TO_SAY_GOODBYE)
        return None
    finally:
        _signal(process, signal.SIGKILL)
        process.wait()


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    """To the process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _shortened(log: Path) -> Path:
    """The log, or what of it goes into the archive."""
    if log.stat().st_size <= MOST_LOG_BYTES:
        return log
    short = log.with_suffix(".short")
    with log.open("rb") as file:
        head = file.read(MOST_LOG_BYTES // 4)
        file.seek(-MOST_LOG_BYTES // 2, os.SEEK_END)
        short.write_bytes(head + b"\n[... left out ...]\n" + file.read())
    return short
