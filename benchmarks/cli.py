"""The command line of ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import gpus, measure, metadata, metadata_plot, node, peers, plot, sharing, steps, sweep
from benchmarks.budget import Budget
from benchmarks.contenders import why_dcp_fast_is_missing
from benchmarks.record import Record
from benchmarks.session import Session
from benchmarks.workloads import Place, Temperature, Workload, workloads_of

HERE = Path(__file__).resolve().parent
# What `main` returns where nothing could be measured.
NOT_RUN = 2
# With --gpu, unless told otherwise. What begins in time and takes longer than was thought still ends within 4 minutes.
GPU_SECONDS = 210.0


def main(arguments: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    parser = _parser()
    options = parser.parse_args(arguments)
    place = Place.GPU if options.gpu else Place.HOST
    if options.sweep and place is Place.HOST:
        parser.error("--sweep needs --gpu: it looks for the best settings of loads to a GPU")
    if place is Place.GPU and (reason := gpus.why_there_is_none()) is not None and not options.list:
        _say(f"not run: {reason}")
        return NOT_RUN
    workloads = workloads_of(place, options.scale, gpus.names())
    if options.list:
        _list(workloads, place)
        return 0
    known = [*workloads, metadata.NAME, node.NAME, sharing.NAME] if place is Place.HOST else list(workloads)
    chosen = options.workloads.split(",") if options.workloads else known
    if unknown := [name for name in chosen if name not in known]:
        parser.error(f"unknown workloads: {', '.join(unknown)}; known are {', '.join(known)}")

    seconds = options.seconds or (GPU_SECONDS if place is Place.GPU else None)
    budget = Budget(seconds)
    missing = why_dcp_fast_is_missing()
    if missing is not None:
        _say(f"dcp_fast skipped: {missing}")
    parameters: dict[str, Any] = {"scale": options.scale, "rounds": options.rounds, "seconds": seconds}
    if place is Place.GPU:
        models = gpus.models()
        _say(f"into the memory of: {', '.join(models)}")
        if gpus.simulated():
            _say(gpus.SIMULATED)
        parameters |= {"gpus": models, "simulated": gpus.simulated()}
    if options.sweep:
        if missing is not None:
            return NOT_RUN
        status = sweep.run(workloads["same"], options.data, options.out, options.rounds, parameters, budget, _say)
    else:
        found, skipped = peers.importable(place)
        if any(workloads[name].peers for name in chosen if name in workloads):
            for line in skipped:
                _say(line)
        run_options = measure.Options(options.data, options.rounds, with_dcp_fast=missing is None, peers=found)
        parameters |= {"workloads": chosen, "fresh_rounds": options.fresh_rounds}
        plan = (
            steps.on_host(workloads, chosen, options.fresh_rounds)
            if place is Place.HOST
            else steps.on_gpus(workloads, chosen, options.fresh_rounds, options.scale)
        )
        status = _run(plan, place, Record(parameters), options, run_options, budget)
    _say(f"took {time.monotonic() - started:.0f} s")
    return status


def _run(
    plan: Sequence[steps.Step],
    place: Place,
    record: Record,
    options: argparse.Namespace,
    run_options: measure.Options,
    budget: Budget,
) -> int:
    """Take all steps, and show what they found. Returns 1 if one of them failed, or not all were taken."""
    name = "gpu_results" if place is Place.GPU else "results"
    json_path = options.out / f"{name}.json"
    # Whoever ends the run, by a signal or at the keyboard, still sees what it had found.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        Session(record, json_path, run_options, options.scale, budget, _say).run(plan)
    except KeyboardInterrupt:
        _say("\nstopped")

    for text in record.tables(on_gpus=place is Place.GPU):
        _say(f"\n{text}")
    simulated = place is Place.GPU and gpus.simulated()
    if simulated:
        _say(f"\n{gpus.SIMULATED}")
    if record.left_out:
        _say(f"\nleft out for lack of time (--seconds): {', '.join(record.left_out)}")
    for line in record.failed:
        _say(f"\nFAILED: {line}")
    _say(f"\nwritten: {json_path}")
    if rows := record.rows():
        plot_path = options.out / f"{name}.png"
        _say(plot.draw(plot_path, rows, gpus.SIMULATED if simulated else None) or f"written: {plot_path}")
    if record.of_metadata:
        plot_path = options.out / f"{metadata.NAME}.png"
        _say(metadata_plot.draw(plot_path, record.of_metadata) or f"written: {plot_path}")
    return 1 if record.failed or not record.finished else 0


def _list(workloads: Mapping[str, Workload], place: Place) -> None:
    for workload in workloads.values():
        temperatures = ", ".join(temperature.value for temperature in workload.targets)
        print(f"{workload.name:16}{workload.title} ({temperatures})")
    if place is Place.HOST:
        print(f"{metadata.NAME:16}{metadata.TITLE} ({Temperature.WARM.value})")
        print(f"{node.NAME:16}{node.TITLE} ({Temperature.COLD.value})")
        print(f"{sharing.NAME:16}{sharing.TITLE} ({Temperature.WARM.value})")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Time dcp_fast against torch DCP.")
    parser.add_argument("--gpu", action="store_true", help="load into GPU memory instead of host memory")
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="with --gpu: try threads, block sizes and ring sizes on the workload `same`, and nothing else",
    )
    parser.add_argument("--workloads", metavar="A,B", help="only these (default: all, see --list)")
    parser.add_argument(
        "--seconds",
        type=_positive_float,
        metavar="N",
        help=f"leave out what would take longer than N seconds in all (default: {GPU_SECONDS:g} with --gpu, else none)",
    )
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


def _positive_float(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError("must be positive")
    return value


def _say(line: str) -> None:
    print(line, flush=True)
