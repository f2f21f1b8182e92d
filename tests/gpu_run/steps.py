"""The steps of a run on a machine with a GPU, and of its rehearsal on the simulated driver."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpu_run import logs
from gpu_run.runner import Step

__all__ = ["BUILD", "MACHINE", "Setting", "seconds_of", "steps_of"]

REPOSITORY = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
BUILD = REPOSITORY / "build" / "gpu"
MACHINE = "machine"

# What each part may take, the steps that both begin with included.
SECONDS = {"checks": 300, "bench": 240}
# A rehearsal may take longer: threads share few cores, and what a GPU does is interpreted.
PATIENCE = 8
REHEARSED_CORES = 16

BENCHMARK = ("--gpu", "--seconds", "140")
SWEEP = ("--gpu", "--sweep", "--seconds", "60")
REHEARSED = ("--scale", "0.005", "--rounds", "1")

TARGETS = ("_native", "dcp_fast_cuda_tests", "dcp_fast_cuda_fault_tests", "dcp_fast_abi_check")
# Straight copies, and both kernels; each is over in a moment.
SANITIZED_TESTS = "device: rows and columns*,device: a destination with gaps*,device: boxes are dequantized*"
SANITIZER_FOUND_SOMETHING = 86


@dataclass(frozen=True)
class Setting:
    """Where a run happens, and what is asked of it.

    Args:
        parts: some of "checks" and "bench".
        simulated: whether it is a rehearsal on the simulated driver.
        results: where the results go.
        doctest: the folder that has ``doctest/doctest.h``, if that is given.
    """

    parts: Sequence[str]
    simulated: bool
    results: Path
    doctest: Path | None = None

    @property
    def build(self) -> Path:
        return BUILD / ("simulated" if self.simulated else "real")

    @property
    def simulator(self) -> Path:
        return self.build / "tests" / "simulated_cuda" / "driver" / "libsimcuda.so"

    @property
    def patience(self) -> int:
        return PATIENCE if self.simulated else 1

    def environment(self) -> dict[str, str | None]:
        """That of all programs. Nothing is downloaded, and nothing is left in the checkout."""
        return {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
            "PIP_NO_INDEX": "1",
            "PYTHONPYCACHEPREFIX": str(BUILD / "pycache"),
            "PYTHONUNBUFFERED": "1",
            # The checkout's dcp_fast has no extension: it must not be found before the package that was built.
            "PYTHONSAFEPATH": "1",
            "PYTHONPATH": os.pathsep.join(map(str, (self.build / "package", REPOSITORY, REPOSITORY / "tests"))),
            "DCP_FAST_LIBCUDA": None,
        }

    def on_devices(self) -> dict[str, str | None]:
        """That of programs that use GPUs. Unset, the driver is the real one, and torch has its own way to it."""
        if not self.simulated:
            return self.environment()
        cores = self.build / "tests" / "simulated_cuda" / "cores" / "libsimcores.so"
        return {
            **self.environment(),
            "DCP_FAST_LIBCUDA": str(self.simulator),
            "LD_PRELOAD": str(cores),
            "SIMULATED_CORES": str(REHEARSED_CORES),
            "OMP_NUM_THREADS": "2",  # torch's own threads are not what is rehearsed
        }


def seconds_of(setting: Setting) -> float:
    """How long a run may take altogether."""
    return setting.patience * sum(SECONDS[part] for part in setting.parts)


def steps_of(setting: Setting) -> list[Step]:
    """All steps, in order."""
    steps = _preparation(setting)
    if "checks" in setting.parts:
        steps += _checks(setting)
    if "bench" in setting.parts:
        steps += _benchmark(setting)
    return steps


def _preparation(setting: Setting) -> list[Step]:
    simulated, patience, environment = setting.simulated, setting.patience, setting.environment()
    targets = (*TARGETS, "simcuda", "simcores") if simulated else TARGETS
    package: list[str | Path] = [
        sys.executable,
        HERE / "package.py",
        REPOSITORY / "dcp_fast",
        setting.build,
        setting.build / "package",
    ]
    build = [_configure(setting), ["cmake", "--build", setting.build, "--parallel", "--target", *targets], package]
    steps = [
        Step(
            MACHINE,
            [[sys.executable, HERE / "machine.py", *(["--simulated"] if simulated else [])]],
            60 * patience,
            kept=10,
            environment=environment,
            facts=logs.facts_of_machine,
        ),
        Step("build", build, 120 * patience, kept=50, needs=[MACHINE], environment=environment),
    ]
    if simulated:
        install = "from simulated_cuda import torch_backend; torch_backend.install()"
        steps.append(
            Step(
                "torch_backend",
                [[sys.executable, "-c", install]],
                120 * patience,
                needs=["build"],
                # Without the cores that are not there: it compiles.
                environment={**environment, "DCP_FAST_LIBCUDA": str(setting.simulator)},
            )
        )
    return steps


def _configure(setting: Setting) -> list[str | Path]:
    library = setting.simulator if setting.simulated else "libcuda.so.1"
    command: list[str | Path] = ["cmake", "--fresh", "-S", REPOSITORY, "-B", setting.build, "-G", "Ninja"]
    command += ["-DCMAKE_BUILD_TYPE=RelWithDebInfo", "-DDCP_FAST_TESTS=ON", f"-DDCP_FAST_TEST_LIBCUDA={library}"]
    command += [f"-DPython_EXECUTABLE={sys.executable}"]
    if setting.doctest is not None:
        command.append(f"-DDOCTEST_INCLUDE={setting.doctest.resolve()}")
    pybind11 = importlib.util.find_spec("pybind11")
    if pybind11 is not None and pybind11.origin is not None:  # else CMake may find one that the system has
        command.append(f"-Dpybind11_DIR={Path(pybind11.origin).parent / 'share' / 'cmake' / 'pybind11'}")
    return command


def _checks(setting: Setting) -> list[Step]:
    simulated, patience = setting.simulated, setting.patience
    on_devices = setting.on_devices()
    folder = setting.build / "tests" / "native" / "cuda"
    # The native tests ask the same library that the engine loads what else they need.
    native = on_devices if simulated else {**on_devices, "DCP_FAST_LIBCUDA": "libcuda.so.1"}
    # About the simulator, and minutes of compiling: on a GPU these skip themselves.
    left_out: list[str | Path] = (
        ["--ignore", REPOSITORY / "tests" / "cuda" / "test_seeded_bugs.py"] if simulated else []
    )

    def native_tests(name: str, program: str, seconds: float, kept: float) -> Step:
        command: list[str | Path] = [folder / program, "--no-colors=1", "--duration=1"]
        limit = seconds * patience
        return Step(name, [command], limit, kept, ["build"], native, folder, logs.doctest_counts)

    def python_tests(name: str, seconds: float, kept: float, needs: Sequence[str], *arguments: str | Path) -> Step:
        command: list[str | Path] = [sys.executable, "-m", "pytest", *_pytest_options(patience), *arguments]
        limit = seconds * patience
        return Step(name, [command], limit, kept, needs, on_devices, REPOSITORY, logs.pytest_counts, logs.pytest_skips)

    tests = REPOSITORY / "tests"
    needs = ["torch_backend"] if simulated else ["build"]
    return [
        native_tests("native", "dcp_fast_cuda_tests", 90, 20),
        native_tests("native_faults", "dcp_fast_cuda_fault_tests", 30, 5),
        python_tests("pytest_cuda", 150, 60, needs, tests / "cuda", *left_out),
        python_tests("kernel_ptx", 45, 20, [MACHINE], tests / "python" / "transfer" / "test_kernel_ptx.py"),
        *(_sanitized(setting, tool, folder, native) for tool in ("memcheck", "racecheck")),
    ]


def _pytest_options(patience: int) -> list[str]:
    options = ["-p", "no:cacheprovider", "-rsfE", "--color=no", "--tb=short", "--durations=15"]
    options += ["-o", f"faulthandler_timeout={60 * patience}"]  # shows where a test hangs in native code
    if importlib.util.find_spec("pytest_timeout") is not None:
        options.append(f"--timeout={90 * patience}")
    return options


def _sanitized(setting: Setting, tool: str, folder: Path, environment: dict[str, str | None]) -> Step:
    sanitizer = _compute_sanitizer()
    skipped = None
    if setting.simulated:
        skipped = "compute-sanitizer is for a real driver"
    elif sanitizer is None:
        skipped = "there is no compute-sanitizer in PATH or under CUDA_HOME"
    command: list[str | Path] = [sanitizer or "compute-sanitizer", "--tool", tool]
    command += ["--error-exitcode", str(SANITIZER_FOUND_SOMETHING), "--print-limit", "20"]
    command += [folder / "dcp_fast_cuda_tests", "--no-colors=1", f"--test-case={SANITIZED_TESTS}"]
    return Step(
        tool,
        [command],
        40 * setting.patience,
        15,
        ["build"],
        environment,
        folder,
        logs.sanitizer_facts,
        why_skipped=logs.unsupported,
        skipped=skipped,
    )


def _compute_sanitizer() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [str(Path(home) / part) for home in homes if home for part in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def _benchmark(setting: Setting) -> list[Step]:
    # In this order: the figures are of the defaults, which the sweep is there to choose anew.
    return [
        _measured(setting, "bench", BENCHMARK, 165, 75),
        _measured(setting, "sweep", SWEEP, 75, 0),
    ]


def _measured(setting: Setting, name: str, arguments: Sequence[str], seconds: float, kept: float) -> Step:
    where: list[str | Path] = ["--out", setting.results, "--data", setting.build / "data"]
    command: list[str | Path] = [sys.executable, "-m", "benchmarks", *arguments, *where]
    environment = setting.on_devices()
    if setting.simulated:
        command += REHEARSED
        environment["BENCHMARKS_PRELUDE"] = str(HERE / "simulated_devices.py")
    needs = ["torch_backend"] if setting.simulated else ["build"]
    return Step(name, [command], seconds * setting.patience, kept, needs, environment, REPOSITORY)
