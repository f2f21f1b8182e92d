"""That the simulated driver catches the bugs that a pipeline to a GPU has, and the tests meet them."""

from __future__ import annotations

import pytest
from processes import SIMULATED
from simulated_cuda import seeded_bugs
from simulated_cuda.seeded_bugs import BUGS, Build, Result

# They are about the simulator, and take minutes to build.
_REASON = seeded_bugs.why_not() if SIMULATED else "builds with bugs are for the simulated driver"
pytestmark = [
    pytest.mark.skipif(_REASON is not None, reason=str(_REASON)),
    pytest.mark.xdist_group("seeded_bugs"),  # they share what is built
]


@pytest.fixture(scope="module")
def build() -> Build:
    return Build(seeded_bugs.DEFAULT_BUILD)


@pytest.fixture(scope="module")
def results(build: Build) -> dict[str, Result]:
    return {result.bug.name: result for result in seeded_bugs.run(build, BUGS)}


def test_engine_without_a_bug_passes(build: Build) -> None:
    passed, output = seeded_bugs.without_bug(build)
    assert passed, output


@pytest.mark.parametrize("name", [bug.name for bug in BUGS])
def test_bug_is_caught(name: str, results: dict[str, Result]) -> None:
    result = results[name]
    assert result.caught, f"no {result.bug.caught_by!r} in:\n{result.output}"
