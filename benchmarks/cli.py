"""The command line of ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import fresh, gpus, measure, metadata, metadata_plot, metadata_ranks, optimizer, peers, plot, results
from benchmarks.contenders import why_dcp_fast_is_missing
from benchmarks.workloads import Place, Temperature, workloads_of

HERE = Path(__file__).resolve().parent
# What `main` returns where nothing could be measured.
NOT_RUN = 2


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    place = Place.GPU if options.gpu else Place.HOST
    if place is Place.GPU and (reason := gpus.why_there_is_none()) is not None and not options.list:
        _say(f"not run: {reason}")
        return NOT_RUN
    workloads = workloads_of(place, options.scale, gpus.names())
    if options.list:
        for workload in workloads.values():
            temperatures = ", ".join(temperature.value for temperature in workload.targets)
            print(f"{workload.name:16}{workload.title} ({temperatures})")
        if place is Place.HOST:
            print(f"{metadata.NAME:16}{metadata.TITLE} ({Temperature.WARM.value})")
        return 0
    known = [*workloads, metadata.NAME] if place is Place.HOST else list(workloads)
    chosen = options.workloads.split(",") if options.workloads else known
    if unknown := [name for name in chosen if name not in known]:
        parser.error(f"unknown workloads: {', '.join(unknown)}; known are {', '.join(known)}")

    started = time.monotonic()
    models = gpus.models() if place is Place.GPU else []
    if models:
        _say(f"into the memory of: {', '.join(models)}")
    missing = why_dcp_fast_is_missing()
    if missing is not None:
        _say(f"dcp_fast skipped: {missing}")
    found, skipped = peers.importable()
    if any(workloads[name].peers for name in chosen if name in workloads):
        for line in skipped:
            _say(line)
    run_options = measure.Options(options.data, options.rounds, with_dcp_fast=missing is None, peers=found)
    entrants = ["torch"] if missing is not None else ["torch", "dcp_fast"]
    measurements: list[measure.Measurement] = []
    first_loads: list[fresh.FirstLoads] = []
    of_metadata: list[metadata.Measurement] = []
    of_sharing: list[metadata_ranks.Measurement] = []
    for name in chosen:
        try:
            if name == metadata.NAME:
                of_metadata = metadata.run(options.data, options.scale, options.rounds, entrants, _say)
                if missing is None:
                    of_sharing = metadata_ranks.run(options.data, options.scale, options.rounds, _say)
                continue
            workload = workloads[name]
            by_ranks = workload.checkpoint.kind == "optimizer"
            run = optimizer.run if by_ranks else measure.run
            measurements += run(workload, run_options, _say)
        except measure.VerificationError as error:
            _say(f"FAILED: {error}")
            return 1
        rounds = workload.fresh_rounds if options.fresh_rounds is None else options.fresh_rounds
        if workload.fresh_rounds and rounds:
            run_first = optimizer.first_loads if by_ranks else fresh.measure
            first_loads += run_first(workload, options.data, entrants, rounds, _say)

    rows = [row for measurement in measurements for row in results.rows_of(measurement)]
    tables = [
        results.load_table(rows) if rows else None,
        results.gpu_table(measurements) if place is Place.GPU else None,
        results.peer_table(measurements),
        results.fresh_table(first_loads) if first_loads else None,
        results.gpu_memory_table(first_loads) if first_loads and place is Place.GPU else None,
        results.table(metadata.HEADINGS, metadata.table_lines(of_metadata)) if of_metadata else None,
        results.table(metadata_ranks.HEADINGS, metadata_ranks.table_lines(of_sharing)) if of_sharing else None,
    ]
    for text in tables:
        if text is not None:
            _say(f"\n{text}")
    parameters = {
        "workloads": chosen,
        "scale": options.scale,
        "rounds": options.rounds,
        "fresh_rounds": options.fresh_rounds,
        "gpus": models,
    }
    name = "gpu_results" if place is Place.GPU else "results"
    json_path = options.out / f"{name}.json"
    results.write_json(json_path, parameters, measurements, rows, first_loads, of_metadata, of_sharing)
    _say(f"\nwritten: {json_path}")
    if rows:
        plot_path = options.out / f"{name}.png"
        _say(plot.draw(plot_path, rows) or f"written: {plot_path}")
    if of_metadata:
        plot_path = options.out / f"{metadata.NAME}.png"
        _say(metadata_plot.draw(plot_path, of_metadata) or f"written: {plot_path}")
    _say(f"took {time.monotonic() - started:.0f} s")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Time dcp_fast against torch DCP.")
    parser.add_argument("--gpu", action="store_true", help="load into GPU memory instead of host memory")
    parser.add_argument("--workloads", metavar="A,B", help="only these (default: all, see --list)")
    parser.add_argument("--rounds", type=_positive_int, help="timed rounds (default: each workload's own, 3 or 5)")
    parser.add_argument(
        "--fresh-rounds",
        type=int,
        metavar="N",
        help="loads in fresh processes (default: each workload's own, 0 to 3)",
    )
    parser.add_argument("--scale", type=float, default=1.0, help="size of the data; 1.0 is 1.5 to 1.9 GB a checkpoint")
    parser.add_argument("--data", type=Path, default=HERE / "data", help="where checkpoints are kept between runs")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="where the results' JSON and plot go")
    parser.add_argument("--list", action="store_true", help="list the workloads and stop")
    return parser


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _say(line: str) -> None:
    print(line, flush=True)
