"""What a log tells: counts of tests, why tests were skipped, and what else belongs in the summary."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

__all__ = ["doctest_counts", "facts_of_machine", "pytest_counts", "pytest_skips", "sanitizer_facts", "unsupported"]


def facts_of_machine(log: str) -> str:
    return "; ".join(re.findall(r"^FACTS: (.+)$", log, re.MULTILINE))


def doctest_counts(log: str) -> str:
    """Of every program in the log."""
    found = re.findall(r"test cases: *\d+ *\| *(\d+) passed *\| *(\d+) failed *\| *(\d+) skipped", log)
    return "; ".join(f"{passed} passed, {failed} failed, {skipped} skipped" for passed, failed, skipped in found)


def pytest_counts(log: str) -> str:
    """Of the last line, but for its time."""
    found = re.findall(r"^=* ?((?:\d+ [a-z]+,? ?)+) in [\d.]+s", log, re.MULTILINE)
    return found[-1] if found else ""


def pytest_skips(log: str) -> Sequence[str]:
    """One line for each reason."""
    counts: Counter[str] = Counter()
    for count, reason in re.findall(r"^SKIPPED \[(\d+)\] \S+: (.+)$", log, re.MULTILINE):
        counts[reason.removeprefix("Skipped: ")] += int(count)
    return [f"{reason}: {count} test{'s' * (count > 1)} skipped" for reason, count in counts.most_common()]


def sanitizer_facts(log: str) -> str:
    found = re.findall(r"^=+ ((?:ERROR|RACECHECK) SUMMARY: .+)$", log, re.MULTILINE)
    return "; ".join(filter(None, [doctest_counts(log), *found]))


def unsupported(log: str) -> str | None:
    """Why compute-sanitizer could not look at this device."""
    found = re.search(r"[^\n=]*\bDevice not supported[^\n]*", log)
    return f"compute-sanitizer: {found[0].strip()}" if found else None
