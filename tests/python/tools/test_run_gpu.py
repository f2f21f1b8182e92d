"""tests/run_gpu itself: what it says where there is no GPU, where steps fail, hang or cannot run."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from gpu_run import logs, machine, runner
from gpu_run.main import exit_code
from gpu_run.runner import Outcome, Run, Step
from gpu_run.steps import MACHINE, Setting, seconds_of, steps_of

SCRIPT = Path(__file__).resolve().parents[2] / "run_gpu"


def step(name: str, code: str = "", limit: float = 20, **options: Any) -> Step:
    """A step that is a few lines of Python."""
    return Step(name, [[sys.executable, "-c", code]], limit, **options)


def run(path: Path, steps: Sequence[Step], seconds: float = 60) -> tuple[int, list[str], Run]:
    """The exit code, the lines of the summary, and the run."""
    said: list[str] = []
    result = Run(path / "results", path / "logs", seconds, said.append)
    code = result.run(steps)
    summary = (path / "results" / "summary.txt").read_text().splitlines()
    assert said[:-1] == summary[: len(steps)]
    assert said[-1] == summary[-1]
    return code, summary, result


def test_summary(tmp_path: Path) -> None:
    steps = [
        step("good", "print('12 passed, 3 skipped in 1.5s')", facts=logs.pytest_counts),
        step("bad", "raise SystemExit(3)", facts=lambda log: "said so", notes=lambda log: ["a note"]),
        step("not here", skipped="there is none"),
        step("needy", needs=["good", "bad"]),
        Step("missing", [["/nowhere/program"]], 20),
    ]
    code, summary, _ = run(tmp_path, steps)
    assert code == 1
    lines = [" ".join(line.split()) for line in summary]
    assert lines[0].startswith("good exit 0 ")
    assert lines[0].endswith(" s 12 passed, 3 skipped")
    assert lines[1].startswith("bad exit 3 ")
    assert lines[1].endswith(" s said so")
    assert lines[2:4] == ["not here skipped 0.0 s there is none", "needy not run 0.0 s needs bad"]
    assert lines[4].startswith("missing exit 127 ")
    assert lines[5:] == ["bad: a note", "FAILED: bad, needy, missing (skipped: not here)"]
    with tarfile.open(tmp_path / "results" / "logs.tar.gz") as archive:
        assert archive.getnames() == ["logs/bad.log", "logs/good.log", "logs/missing.log"]
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["logs.tar.gz", "summary.txt"]


def test_exit_code_of_a_run_that_passes(tmp_path: Path) -> None:
    code, summary, _ = run(tmp_path, [step("one"), step("two", needs=["one"]), step("three", skipped="not here")])
    assert code == 0
    assert summary[-1] == "passed (skipped: three)"


def test_first_failure_ends_a_step(tmp_path: Path) -> None:
    commands = [[sys.executable, "-c", f"print({n}); raise SystemExit({n})"] for n in (0, 4, 5)]
    code, summary, _ = run(tmp_path, [Step("several", commands, 20)])
    assert code == 1
    assert "exit 4" in summary[0]
    log = (tmp_path / "logs" / "several.log").read_text().splitlines()
    assert [line for line in log if not line.startswith("$")] == ["0", "4"]


@pytest.mark.parametrize("deaf", [False, True])
def test_hanging_step(tmp_path: Path, deaf: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends at its limit with all that it started, and the next one runs."""
    monkeypatch.setattr(runner, "SECONDS_TO_SAY_GOODBYE", 0.5)
    child = f"{sys.executable} -c 'import time; time.sleep(60)'"
    hang = "import os, signal, subprocess, time; print('begun', flush=True); "
    hang += "signal.signal(signal.SIGINT, signal.SIG_IGN); " if deaf else ""
    hang += f"print(subprocess.Popen({child!r}, shell=True).pid, flush=True); time.sleep(60)"
    started = time.monotonic()
    code, summary, _ = run(tmp_path, [step("hangs", hang, limit=6), step("next")])
    assert time.monotonic() - started < 30
    assert code == 1
    assert summary[0].split()[1:3] == ["timed", "out"]
    assert "exit 0" in summary[1]
    assert summary[-1] == "FAILED: hangs"
    _, begun, pid, *_ = (tmp_path / "logs" / "hangs.log").read_text().splitlines()
    assert begun == "begun"
    deadline = time.monotonic() + 10
    while _runs(int(pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(int(pid))


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_what_a_step_leaves_running_is_ended(tmp_path: Path) -> None:
    code = f"import subprocess; print(subprocess.Popen([{sys.executable!r}, '-c', 'import time; time.sleep(60)']).pid)"
    assert run(tmp_path, [step("leaves", code)])[0] == 0
    pid = int((tmp_path / "logs" / "leaves.log").read_text().split()[-1])
    deadline = time.monotonic() + 10
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(pid)


def test_time_is_kept_for_later_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "SECONDS_TO_SAY_GOODBYE", 0.1)
    steps = [step("greedy", "import time; time.sleep(60)", limit=100), step("later", kept=10)]
    code, summary, _ = run(tmp_path, steps, seconds=12)
    assert code == 1
    assert "timed out" in summary[0]
    assert "after 2 s" in summary[0]
    assert "exit 0" in summary[1]
    _, summary, _ = run(tmp_path, [step("too late")], seconds=0.5)
    assert summary[0].endswith("no time is left")


def test_summary_after_every_step(tmp_path: Path) -> None:
    """A run that is ended leaves that of the steps until then, and nothing that runs."""
    look = f"import pathlib; print(pathlib.Path({str(tmp_path / 'results' / 'summary.txt')!r}).read_text())"
    run(tmp_path, [step("first"), step("looks", look)])
    assert "first  exit 0" in (tmp_path / "logs" / "looks.log").read_text()


def test_long_logs_are_shortened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "MOST_LOG_BYTES", 4000)
    run(tmp_path, [step("wordy", "print('begin'); print('x' * 100000); print('end')")])
    with tarfile.open(tmp_path / "results" / "logs.tar.gz") as archive:
        assert archive.getnames() == ["logs/wordy.log"]
        file = archive.extractfile("logs/wordy.log")
        assert file is not None
        text = file.read().decode()
    assert "begin" in text
    assert text.endswith("end\n")
    assert len(text) < 4000


def test_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAKEN_AWAY", "1")
    code = "import os; print(os.environ.get('TAKEN_AWAY'), os.environ['ADDED'])"
    run(tmp_path, [step("looks", code, environment={"TAKEN_AWAY": None, "ADDED": "2"})])
    assert (tmp_path / "logs" / "looks.log").read_text().splitlines()[-1] == "None 2"


# Logs


def test_counts() -> None:
    doctest = "[doctest] test cases:  20 |  19 passed | 1 failed | 3 skipped\n"
    assert logs.doctest_counts(doctest) == "19 passed, 1 failed, 3 skipped"
    lines = "SKIPPED [2] tests/cuda/conftest.py:61: needs two devices\nSKIPPED [1] tests/a.py:1: other\n"
    lines += "SKIPPED [3] tests/cuda/conftest.py:61: needs two devices\n"
    lines += "1 failed, 200 passed, 6 skipped in 61.02s (0:01:01)\n"
    assert logs.pytest_counts(lines) == "1 failed, 200 passed, 6 skipped"
    assert logs.pytest_skips(lines) == ["needs two devices: 5 tests skipped", "other: 1 test skipped"]
    assert logs.pytest_counts("Killed") == logs.doctest_counts("") == ""
    sanitizer = "========= COMPUTE-SANITIZER\n" + doctest + "========= ERROR SUMMARY: 0 errors\n"
    assert logs.sanitizer_facts(sanitizer) == "19 passed, 1 failed, 3 skipped; ERROR SUMMARY: 0 errors"


def test_sanitizer_that_cannot_look(tmp_path: Path) -> None:
    """No fault of the code, and no rerun helps: skipped, and the last line says so."""
    code = "print('========= Error: Device not supported. Please refer to the docs'); raise SystemExit(1)"
    exit_code, summary, _ = run(tmp_path, [step("memcheck", code, why_skipped=logs.unsupported)])
    assert exit_code == 0
    assert "skipped" in summary[0]
    assert "Device not supported" in summary[0]
    assert summary[-1] == "passed (skipped: memcheck)"
    assert logs.unsupported("ERROR SUMMARY: 3 errors") is None


# What is run


def test_steps() -> None:
    real = Setting(("checks", "bench"), False, Path("results"))
    names = [
        "machine",
        "build",
        "native",
        "native_faults",
        "pytest_cuda",
        "kernel_ptx",
        "memcheck",
        "racecheck",
        "bench",
        "sweep",
    ]
    assert [step.name for step in steps_of(real)] == names
    assert seconds_of(Setting(("checks",), False, Path("results"))) == 300
    assert seconds_of(Setting(("bench",), False, Path("results"))) == 240
    for setting in (real, Setting(("checks",), False, Path()), Setting(("bench",), False, Path())):
        assert sum(step.kept for step in steps_of(setting)) < seconds_of(setting)
    for planned in steps_of(real):
        assert {"PIP_NO_INDEX", "PYTHONPYCACHEPREFIX", "PYTHONPATH"} <= set(planned.environment)
        assert "LD_PRELOAD" not in planned.environment


def test_without_a_gpu(tmp_path: Path) -> None:
    assert exit_code(1, [Outcome(MACHINE, runner.FAILED, machine.NO_GPU)]) == 2
    assert exit_code(1, [Outcome(MACHINE, runner.FAILED, 1)]) == 1
    if os.path.exists("/dev/nvidiactl"):
        pytest.skip("there is a GPU")
    command = [sys.executable, SCRIPT, "checks", "--out", tmp_path / "results"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=100, check=False)
    if sys.version_info < (3, 11):
        assert done.returncode == 1
        assert done.stdout.startswith("needs Python 3.11")
        return
    assert done.returncode == 2
    assert "This machine has no GPU" in done.stdout
    summary = (tmp_path / "results" / "summary.txt").read_text()
    assert "no GPU" in summary.splitlines()[0]
    assert all("not run" in line for line in summary.splitlines()[1:-1])
