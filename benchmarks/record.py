"""All that a run has found so far, and how it is kept as JSON. It is written anew after every step."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import metadata, metadata_ranks, node, results, sharing
from benchmarks.fresh import FirstLoads
from benchmarks.measure import Measurement

PACKAGES = ("torch", "numpy", "dcp_fast", "safetensors", "runai-model-streamer", "fastsafetensors")


@dataclass
class Record:
    """What a run was asked for, and what came of it."""

    parameters: dict[str, Any]
    measurements: list[Measurement] = field(default_factory=list)
    first_loads: list[FirstLoads] = field(default_factory=list)
    of_metadata: list[metadata.Measurement] = field(default_factory=list)
    of_sharing: list[metadata_ranks.Measurement] = field(default_factory=list)
    of_node: list[node.Measurement] = field(default_factory=list)
    of_shared_reads: list[sharing.Measurement] = field(default_factory=list)
    # Steps that there was no time for, and those that failed, with the reason.
    left_out: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    finished: bool = False

    def rows(self) -> list[results.Row]:
        return [row for measurement in self.measurements for row in results.rows_of(measurement)]

    def tables(self, on_gpus: bool) -> list[str]:
        rows = self.rows()
        tables = [
            results.load_table(rows) if rows else None,
            results.gpu_table(self.measurements) if rows and on_gpus else None,
            results.peer_table(self.measurements),
            results.fresh_table(self.first_loads) if self.first_loads else None,
            results.gpu_memory_table(self.first_loads) if self.first_loads and on_gpus else None,
            results.table(metadata.HEADINGS, metadata.table_lines(self.of_metadata)) if self.of_metadata else None,
            results.table(metadata_ranks.HEADINGS, metadata_ranks.table_lines(self.of_sharing))
            if self.of_sharing
            else None,
            results.table(node.HEADINGS, node.table_lines(self.of_node)) if self.of_node else None,
            results.table(sharing.HEADINGS, sharing.table_lines(self.of_shared_reads))
            if self.of_shared_reads
            else None,
        ]
        return [text for text in tables if text is not None]

    def write(self, path: Path) -> None:
        document = {
            "parameters": self.parameters,
            "finished": self.finished,
            "left_out": self.left_out,
            "failed": self.failed,
            "measurements": [_measurement_as_json(measurement) for measurement in self.measurements],
            "table": [dict(zip(results.HEADINGS, row.cells(), strict=True)) for row in self.rows()],
            "first_loads": [
                {"workload": first.workload.name, "loads": [asdict(load) for load in first.loads]}
                for first in self.first_loads
            ],
            "metadata": [asdict(measurement) for measurement in self.of_metadata],
            "shared_metadata": [asdict(measurement) for measurement in self.of_sharing],
            "node": [asdict(measurement) for measurement in self.of_node],
            "shared_reads": [asdict(measurement) for measurement in self.of_shared_reads],
        }
        write_json(path, document)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write the document, and what it was found with. Whoever is killed meanwhile leaves the file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    text = json.dumps({"machine": _machine(), "versions": _versions(), **document}, indent=2, default=str)
    unfinished.write_text(text + "\n")
    unfinished.replace(path)


def _measurement_as_json(measurement: Measurement) -> dict[str, Any]:
    workload = measurement.workload
    return {
        "workload": workload.name,
        "title": workload.title,
        "checkpoint": asdict(workload.checkpoint),
        "wanted": asdict(workload.wanted),
        "temperature": measurement.temperature.value,
        "bytes_needed": workload.bytes_needed(),
        "seconds": {name: [s.seconds for s in samples] for name, samples in measurement.samples.items()},
        "read_data_seconds": {
            name: [s.read_data_seconds for s in samples]
            for name, samples in measurement.samples.items()
            if samples[0].read_data_seconds is not None
        },
        "reports": [sample.report for sample in measurement.samples.get("dcp_fast", [])],
        "ceilings": {
            c.name: {"best": str(c.best), "tried": c.tried, "untried": c.untried} for c in measurement.ceilings
        },
        "notes": measurement.notes,
    }


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _machine() -> dict[str, Any]:
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
