"""How long a run, or a part of it, may take. On a machine that is lent by the minute, what matters most comes first."""

from __future__ import annotations

import math
import time


class Budget:
    """Seconds that may be used from now on; without a number there is no limit."""

    def __init__(self, seconds: float | None = None) -> None:
        self._end = math.inf if seconds is None else time.monotonic() + seconds

    def left(self) -> float:
        return max(0.0, self._end - time.monotonic())

    def allows(self, seconds: float) -> bool:
        """Whether what takes so long would end in time. When all is used up, nothing does."""
        return seconds < self.left()

    def share(self, seconds: float) -> Budget:
        """A budget for a part of the work: so much of this one, or what is left of it."""
        part = min(seconds, self.left())
        return Budget(None if math.isinf(part) else part)

    def timeout(self) -> float | None:
        """What is left, in the way that `subprocess` takes it."""
        return None if math.isinf(self._end) else self.left()
