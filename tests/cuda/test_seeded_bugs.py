"""That the simulated driver catches the bugs that a pipeline to a GPU has, and the tests meet them."""

from __future__ import annotations

import pytest
from processes import SIMULATED
from simulated_cuda import seeded_bugs

# They are about the simulator, and take minutes to build.
_REASON = seeded_bugs.why_not() if SIMULATED else "builds with bugs are for the simulated driver"
pytestmark = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))


def test_every_bug_is_caught() -> None:
    """One test, as all bugs share what is built."""
    build = seeded_bugs.Build(seeded_bugs.DEFAULT_BUILD)
    passed, output = seeded_bugs.without_bug(build)
    assert passed, output
    results = list(seeded_bugs.run(build, seeded_bugs.BUGS))
    assert len(results) == len(seeded_bugs.BUGS)
    missed = [f"{r.bug.name}: no {r.bug.caught_by!r} in:\n{r.output}" for r in results if not r.caught]
    assert not missed, "\n\n".join(missed)
