"""Bugs of the kind that a pipeline to a GPU has, put into the engine one at a time: the simulator must catch each.

    python tests/simulated_cuda/seeded_bugs.py [--build FOLDER] [bug ...]

Builds the engine, its tests on CUDA and the simulator once; then compiles, for every bug, the one file that it is in,
links it in front of the engine's library, and runs tests that meet it. A bug counts as caught if the tests fail with a
report of the expected kind: a crash or a hang does not do.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
DEFAULT_BUILD = REPOSITORY / "build" / "seeded_bugs"
_PROGRAM = "tests/native/cuda/dcp_fast_cuda_tests"
_SIMULATOR = "tests/simulated_cuda/driver/libsimcuda.so"
_SECONDS_TO_RUN = 120
_COMPILERS_AT_ONCE = 2

# Tests that meet most of what a load does, by what makes them necessary.
_RING = "device: a small ring*"  # both ways to the device, through a ring whose slots are filled again and again
_ORDER = "device: torch's work*"
_END = "ring: it can go*"
_TURNS = "device: programs in turns*"
_GAPS = "device: a destination with gaps*"
_ERROR = "device: a read that fails*"
_CONTEXT = "ring: the calling thread*"
_FUZZ = "device: any boxes*"


@dataclasses.dataclass(frozen=True)
class Bug:
    name: str
    source: str  # below csrc/
    changes: Sequence[tuple[str, str]]  # each text occurs exactly once
    tests: str  # doctest's filter
    caught_by: str  # a regular expression that the tests' output contains


@dataclasses.dataclass(frozen=True)
class Result:
    bug: Bug
    caught: bool
    output: str


def _without(text: str) -> tuple[str, str]:
    return text, ""


BUGS = [
    Bug(
        "a slot is filled again while it is copied from",
        "cuda/pinned_ring.cpp",
        [_without("  wait(lease.slot());\n")],
        _RING,
        r"RACE: the write by the host, reader is not ordered with the read by cuMemcpyHtoDAsync",
    ),
    Bug(
        "a slot is filled again while its kernel runs",
        "cuda/device.cpp",
        [
            (
                "cuEventSynchronize, (slot.launched ? slot.placed : slot.copied).get()",
                "cuEventSynchronize, slot.copied.get()",
            )
        ],
        _RING,
        r"RACE: .*(HtoDAsync.* the read by cuLaunchKernel|the read by cuLaunchKernel.*HtoDAsync)",
    ),
    Bug(
        "the event of a copy is recorded before the copy",
        "cuda/device.cpp",
        [
            _without("  DCP_FAST_CUDA(cuEventRecord, slot.copied.get(), copy_stream_.get());\n"),
            (
                "  DCP_FAST_CUDA(cuEventRecord, slot.copy_begin.get(), copy_stream_.get());\n",
                "  DCP_FAST_CUDA(cuEventRecord, slot.copy_begin.get(), copy_stream_.get());\n"
                "  DCP_FAST_CUDA(cuEventRecord, slot.copied.get(), copy_stream_.get());\n",
            ),
        ],
        _RING,
        r"RACE: .*(cuLaunchKernel|the host)",
    ),
    Bug(
        "a kernel does not wait for the copies of its slot",
        "cuda/device.cpp",
        [_without("  DCP_FAST_CUDA(cuStreamWaitEvent, kernel_stream_.get(), slot.copied.get(), 0);\n")],
        _RING,
        r"RACE: .*cuLaunchKernel",
    ),
    Bug(
        "all slots share the staging memory of the first",
        "cuda/device.cpp",
        [("staging_.get() + index * slot_bytes_", "staging_.get() + 0 * index")],
        _RING,
        r"RACE: .*cuLaunchKernel",
    ),
    Bug(
        "descriptors are written once the copy is enqueued",
        "transfer/engine.cpp",
        [
            ("        task.plan.write_descriptors(slot.data());\n", "        std::byte* const memory = slot.data();\n"),
            (
                "        std::move(slot).submit(device, task.plan);\n",
                "        std::move(slot).submit(device, task.plan);\n        task.plan.write_descriptors(memory);\n",
            ),
        ],
        _RING,
        r"HOST-CHANGED",
    ),
    Bug(
        "the first write does not wait for torch's stream",
        "cuda/device.cpp",
        [_without("    DCP_FAST_CUDA(cuStreamWaitEvent, copy_stream_.get(), torch_before_.get(), 0);\n")],
        _ORDER,
        r"RACE: .*cuMemsetD8Async",
    ),
    Bug(
        "a memory is written to while what it held is converted",
        "transfer/engine.cpp",
        [_without("    if (index + kWavesAtOnce < waves.size()) waves[index + kWavesAtOnce]->begin();\n")],
        _TURNS,
        r"RACE: .*cuMemcpyDtoDAsync",
    ),
    Bug(
        "torch's stream does not wait for the copies",
        "cuda/device.cpp",
        [_without("    DCP_FAST_CUDA(cuStreamWaitEvent, torch_stream, copies_done_.get(), 0);\n")],
        _ORDER,
        r"RACE: the read by cuMemcpyDtoHAsync.*cuMemcpyHtoDAsync",
    ),
    Bug(
        "torch's stream does not wait for the kernels",
        "cuda/device.cpp",
        [_without("    DCP_FAST_CUDA(cuStreamWaitEvent, torch_stream, kernels_done_.get(), 0);\n")],
        _ORDER,
        r"RACE: .*cuLaunchKernel",
    ),
    Bug(
        "a load does not end on the devices",
        "transfer/engine.cpp",
        [_without("    waves[index]->end();\n")],
        _ORDER,
        r"RACE: .*cuMemcpyDtoHAsync",
    ),
    Bug(
        "the ring is not pinned",
        "cuda/pinned.cpp",
        [("driver().cuMemHostRegister_v2(memory, size, kHostRegisterPortable)", "kSuccess")],
        _RING,
        r"PAGEABLE: .*the host memory is not pinned",
    ),
    Bug(
        "the ring is pinned for one device alone",
        "cuda/pinned.cpp",
        [("memory, size, kHostRegisterPortable", "memory, size, 0")],
        _RING,
        r"PAGEABLE: .*only for the one that registered it",
    ),
    Bug(
        "the ring is unpinned while it is copied from",
        "cuda/pinned_ring.cpp",
        [("  drain();\n  if (devices_.empty()) return;\n", "  if (devices_.empty()) return;\n")],
        _END,
        r"USE-AFTER-UNREGISTER",
    ),
    Bug(
        "after an error work goes on in destinations that may be gone",
        "transfer/engine.cpp",
        [_without("    if (run.cuda.ring != nullptr) run.cuda.ring->drain();\n")],
        _ERROR,
        r"USE-AFTER-FREE: cuMemFree",
    ),
    Bug(
        "after an error only the copies are waited for",
        "cuda/device.cpp",
        [_without("    wait(kernel_stream_, kernels_done_);\n")],
        _ERROR,
        r"USE-AFTER-FREE: cuMemFree.*cuLaunchKernel",
    ),
    Bug(
        "a stream is lost",
        "cuda/resources.cpp",
        [
            (
                "  DCP_FAST_CUDA(cuStreamCreate, &handle, kStreamNonBlocking);\n",
                2 * "  DCP_FAST_CUDA(cuStreamCreate, &handle, kStreamNonBlocking);\n",
            )
        ],
        _RING,
        r"LEAK: ",
    ),
    Bug(
        "an event is lost",
        "cuda/resources.cpp",
        [
            (
                "  DCP_FAST_CUDA(cuEventCreate, &handle, kEventBlockingSync);\n",
                2 * "  DCP_FAST_CUDA(cuEventCreate, &handle, kEventBlockingSync);\n",
            )
        ],
        _RING,
        r"LEAK: ",
    ),
    Bug(
        "a context is never released",
        "cuda/resources.cpp",
        [_without("static_cast<void>(driver().cuDevicePrimaryCtxRelease_v2(device_));")],
        _RING,
        r"CHECK\( [^R]*\d contexts",
    ),
    Bug(
        "a thread has no context",
        "cuda/device.cpp",
        [_without("    const CurrentContext current(context_);\n")],
        _RING,
        r"CONTEXT: ",
    ),
    Bug(
        "a thread is left with another context",
        "cuda/resources.cpp",
        [_without("  static_cast<void>(driver().cuCtxSetCurrent(before_));\n")],
        _CONTEXT,
        r"CHECK\( current_context\(\) == before \)",
    ),
    Bug(
        "a copy is longer than its destination",
        "cuda/slot.cpp",
        [
            (
                "plan.add_straight({plan.offsets[i], box.bytes,",
                "plan.add_straight({plan.offsets[i], box.bytes + 16,",
            )
        ],
        _RING,
        r"OUT-OF-BOUNDS: .*cuMemcpyHtoDAsync",
    ),
    Bug(
        "a kernel writes past its destination",
        "cuda/slot.cpp",
        [
            (
                "const uint32_t vectors = box.bytes / box.vector_bytes;",
                "const uint32_t vectors = box.bytes / box.vector_bytes + 1;",
            )
        ],
        _RING,
        r"OUT-OF-BOUNDS: .*cuLaunchKernel",
    ),
    Bug(
        "the staging memory of a device is too small",
        "cuda/device.cpp",
        [("allocate(slots_.size() * slot_bytes_)", "allocate(slots_.size() / 2 * slot_bytes_)")],
        _RING,
        r"OUT-OF-BOUNDS: .*cuMemcpyHtoDAsync",
    ),
    Bug(
        "a vector is wider than the strides allow",
        "cuda/slot.cpp",
        [("bits |= static_cast<uint64_t>(dims[i].stride);", "bits |= 0 * static_cast<uint64_t>(dims[i].stride);")],
        _GAPS,
        r"MISALIGNED: ",
    ),
    Bug(
        "a vector is wider than the destination's alignment",
        "cuda/slot.cpp",
        [("uint64_t bits = destination | ", "uint64_t bits = 0 * destination | ")],
        _FUZZ,
        r"MISALIGNED: ",
    ),
]


def why_not() -> str | None:
    """What is missing to run this, if anything is."""
    missing = [tool for tool in ("c++", "cmake", "ninja") if shutil.which(tool) is None]
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda", "/opt/cuda"]
    if not any(folder and (Path(folder) / "include" / "cuda.h").exists() for folder in folders):
        missing.append("cuda.h")
    return "needs " + ", ".join(missing) if missing else None


class Build:
    """The engine without bugs, its tests and the simulator."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        options = [
            "-DDCP_FAST_PYTHON=OFF",
            "-DDCP_FAST_TESTS=ON",
            "-DDCP_FAST_WERROR=OFF",
            # A bug is put into one file, which is compiled alone.
            f"-DDCP_FAST_APART={';'.join(sorted({f'csrc/{bug.source}' for bug in BUGS}))}",
            "-DCMAKE_BUILD_TYPE=None",
            "-DCMAKE_CXX_FLAGS=-O0",
        ]
        _run(["cmake", "-S", str(REPOSITORY), "-B", str(folder), "-G", "Ninja", *options])
        targets = [Path(_PROGRAM).name]
        # One that is built already will do.
        self._simulator = os.environ.get("DCP_FAST_LIBCUDA")
        if self._simulator is None:
            self._simulator = str(self.folder / _SIMULATOR)
            targets.append("simcuda")
        _run(["cmake", "--build", str(folder), "--target", *targets])
        units = json.loads((folder / "compile_commands.json").read_text())
        self._compilations = {Path(unit["file"]): shlex.split(unit["command"]) for unit in units}
        commands = _run(["ninja", "-C", str(folder), "-t", "commands", _PROGRAM]).splitlines()
        self._link = next(line for line in reversed(commands) if f"-o {_PROGRAM} " in line)

    def with_changes(self, source: Path, changed: str, into: Path) -> Path:
        """Builds the tests with the changed text of one file of the engine."""
        text = into / source.name
        compiled = into / "changed.o"
        program = into / "tests"
        text.write_text(changed)
        command = list(self._compilations[source])
        command[command.index("-o") + 1] = str(compiled)
        command[command.index(str(source))] = str(text)
        _run(command, cwd=self.folder)
        # What the library has too is taken from the object, as it comes first.
        link = self._link.replace(f"-o {_PROGRAM} ", f"{shlex.quote(str(compiled))} -o {shlex.quote(str(program))} ")
        _run(["sh", "-c", link], cwd=self.folder)
        return program

    def run_tests(self, program: Path, tests: str) -> tuple[bool, str]:
        """Whether the tests of a filter pass, and what they write."""
        # What is reported is told at once: some bugs crash the tests before these can tell it.
        environment = {**os.environ, "DCP_FAST_LIBCUDA": self._simulator, "SIMCUDA_VERBOSE": "1"}
        with tempfile.TemporaryDirectory() as folder:
            try:
                done = subprocess.run(
                    [str(program), f"-tc={tests}"],
                    cwd=folder,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                    timeout=_SECONDS_TO_RUN,
                    check=False,
                )
            except subprocess.TimeoutExpired as error:
                return False, f"{error}"
        ran = re.search(r"test cases: +[1-9]", done.stdout) is not None
        return done.returncode == 0 and ran, done.stdout

    def program(self) -> Path:
        return self.folder / _PROGRAM


def without_bug(build: Build) -> tuple[bool, str]:
    """Whether the engine as it is passes the tests that are to catch bugs, and what they write."""
    return build.run_tests(build.program(), ",".join(sorted({bug.tests for bug in BUGS})))


def changed_text(bug: Bug) -> str:
    text = (REPOSITORY / "csrc" / bug.source).read_text()
    for old, new in bug.changes:
        assert text.count(old) == 1, f"{bug.name}: csrc/{bug.source} has {text.count(old)} times: {old}"
        text = text.replace(old, new)
    return text


def run(build: Build, bugs: Sequence[Bug]) -> Iterator[Result]:
    def run_one(bug: Bug) -> Result:
        with tempfile.TemporaryDirectory() as folder:
            program = build.with_changes(REPOSITORY / "csrc" / bug.source, changed_text(bug), Path(folder))
            passed, output = build.run_tests(program, bug.tests)
        return Result(bug, not passed and re.search(bug.caught_by, output) is not None, output)

    with ThreadPoolExecutor(_COMPILERS_AT_ONCE) as pool:
        yield from pool.map(run_one, bugs)


def _run(command: list[str], cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stdout}")
    return done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=DEFAULT_BUILD, help="where to build (%(default)s)")
    parser.add_argument("bugs", nargs="*", help="parts of the names of the bugs to try; else all")
    arguments = parser.parse_args()
    if reason := why_not():
        print(reason)
        return 1
    build = Build(arguments.build)
    passed, output = without_bug(build)
    if not passed:
        print(f"the engine without a bug fails:\n{output}")
        return 1
    chosen = [bug for bug in BUGS if not arguments.bugs or any(part in bug.name for part in arguments.bugs)]
    missed = 0
    for result in run(build, chosen):
        print(f"{'caught' if result.caught else 'MISSED'}  {result.bug.name}", flush=True)
        if not result.caught:
            missed += 1
            print(f"expected {result.bug.caught_by!r} in:\n{result.output}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
