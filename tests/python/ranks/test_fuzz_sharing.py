"""Random loads of 2 to 8 ranks that share what they read, compared with torch's and with those that share nothing.

A failure names its seed and the number of ranks. `tests/run -k "test_fuzz_sharing and 4" --fuzz-seed SEED` runs that
case alone, on 4 ranks.
"""

from __future__ import annotations

import itertools
import random
import time
from pathlib import Path

import pytest
from fuzz_cases import LONG_SECONDS
from fuzz_sharing import Said, load_cases
from ranks import Ranks

CASES = {2: 15, 3: 10, 4: 12, 8: 5}
BATCH = 25  # of a long run


def load(ranks: Ranks, world_size: int, path: Path, seeds: list[int]) -> list[list[Said]]:
    """What all ranks say of the cases of seeds, by case; nothing is wrong with any."""
    by_case = [list(said) for said in zip(*ranks.run(world_size, load_cases, path, seeds, timeout=600), strict=True)]
    wrong = [
        "\n".join([f"seed {said.seed}, {world_size} ranks:", *said.problems])
        for of_ranks in by_case
        for said in of_ranks
        if said.problems
    ]
    assert not wrong, "\n\n".join(wrong)
    for of_ranks in by_case:
        assert sum(said.sent for said in of_ranks) == sum(said.received for said in of_ranks), of_ranks[0].seed
    return by_case


@pytest.mark.parametrize("world_size", CASES)
def test_random_loads(ranks: Ranks, tmp_path: Path, world_size: int, request: pytest.FixtureRequest) -> None:
    only = request.config.getoption("--fuzz-seed")
    seeds = range(100 * world_size, 100 * world_size + CASES[world_size])
    by_case = load(ranks, world_size, tmp_path, [*seeds] if only is None else [only])
    if only is not None:
        return
    # They are no easy ones on the whole.
    every = [said for of_ranks in by_case for said in of_ranks]
    assert sum(said.is_shared for said in every) > 0.3 * len(every)  # others are alone in their groups
    assert sum(said.has_changed for said in every) > 0.3 * len(every)
    assert sum(said.has_failed for said in every) < 0.2 * len(every)
    assert any(said.rounds > 5 for said in every)
    shared = [said for said in every if said.is_shared and not said.has_failed]
    assert sum(said.reason == "" for said in shared) > 0.7 * len(shared), [said.reason for said in shared]
    assert any(said.batches for said in shared)


@pytest.mark.long
def test_random_loads_for_long(ranks: Ranks, tmp_path: Path) -> None:
    start = time.monotonic()
    first = time.time_ns() % (1 << 40)
    done = 0
    for batch in itertools.count():
        if time.monotonic() - start > LONG_SECONDS:
            break
        seeds = [*range(first + batch * BATCH, first + (batch + 1) * BATCH)]
        load(ranks, random.Random(seeds[0]).randint(2, 8), tmp_path, seeds)
        done += len(seeds)
    assert done > sum(CASES.values())
