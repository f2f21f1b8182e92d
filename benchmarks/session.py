"""Takes the steps of a run one after the other, and keeps what each has found before the next begins."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import (
    fresh,
    gpus,
    headers,
    huggingface,
    measure,
    metadata,
    metadata_ranks,
    node,
    optimizer,
    quantized,
    quantized_files,
    sharing,
    state_dicts,
    whole_states,
)
from benchmarks.budget import Budget
from benchmarks.record import Record
from benchmarks.steps import PATIENCE, Kind, Step, expected_seconds
from benchmarks.verify import VerificationError


class Session:
    """Runs steps into a record, whose JSON is at ``path``."""

    def __init__(
        self,
        record: Record,
        path: Path,
        options: measure.Options,
        scale: float,
        budget: Budget,
        say: Callable[[str], None],
    ) -> None:
        self._record = record
        self._path = path
        self._options = options
        self._scale = scale
        self._budget = budget
        self._say = say
        self._entrants = ["torch", "dcp_fast"] if options.with_dcp_fast else ["torch"]

    def run(self, steps: Sequence[Step]) -> None:
        """A step that fails does not stop the next one, and one that there is no time for is left out."""
        self._record.write(self._path)
        for step in steps:
            seconds = expected_seconds(step, self._options.data)
            if not self._budget.allows(seconds):
                self._record.left_out.append(str(step))
                self._say(f"left out for lack of time: {step}")
                continue
            try:
                gpus.release_cached()
                self._take(step, self._budget.share(PATIENCE * seconds) if seconds else self._budget)
            except Exception as error:
                if not isinstance(error, VerificationError):
                    self._say(traceback.format_exc())
                self._record.failed.append(f"{step}: {type(error).__name__}: {error}")
                self._say(f"FAILED: {step}: {error}")
            self._record.write(self._path)
        self._record.finished = True
        self._record.write(self._path)

    def _take(self, step: Step, share: Budget) -> None:
        record, options, say = self._record, self._options, self._say
        workload = step.workload
        if step.kind is Kind.NODE:
            record.of_node = node.run(options.data, self._scale, options.rounds, options.with_dcp_fast, say)
            return
        if step.kind is Kind.SHARING:
            if options.with_dcp_fast:
                record.of_shared_reads = sharing.run(options.data, self._scale, options.rounds, say)
            return
        if workload is None:
            record.of_metadata = metadata.run(options.data, self._scale, options.rounds, self._entrants, say)
            if options.with_dcp_fast:
                record.of_sharing = metadata_ranks.run(options.data, self._scale, options.rounds, say)
            return
        by_ranks = workload.checkpoint.kind == "optimizer"
        if step.kind is Kind.FIRST_LOADS and by_ranks:
            record.first_loads += optimizer.first_loads(workload, options.data, self._entrants, step.rounds, say)
        elif step.kind is Kind.FIRST_LOADS:
            found = fresh.measure(workload, options.data, self._entrants, step.rounds, self._budget, say)
            record.first_loads += found
        elif by_ranks:
            record.measurements.append(optimizer.run(workload, options, say))
        elif workload.checkpoint.kind == huggingface.MANY:
            record.measurements.append(headers.run(workload, options, say))
        elif workload.checkpoint.kind in quantized_files.KINDS:
            record.measurements.append(quantized.run(workload, options, share, say))
        elif workload.checkpoint.kind in state_dicts.SHAPES:
            record.measurements.append(whole_states.run(workload, options, share, say))
        else:
            assert step.temperature is not None
            record.measurements.append(measure.run(workload, step.temperature, options, share, say))
