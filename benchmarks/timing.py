"""What the benchmarks share: rounds in which the ways take turns, how they are summed up, and what machine it was."""

import argparse
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
import torch

RESULTS = Path(__file__).resolve().parent / "results"
ROUND_SECONDS = 0.03  # a fast way repeats its pass within a round until about this much time has gone
SLOW = 1.0  # seconds a pass, above which nothing is warmed up


def seconds(once: Callable[[], Any], repeat: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(repeat):
        once()
    return (time.perf_counter() - start) / repeat


def warmed_up(once: Callable[[], Any]) -> float:
    """The seconds of a pass: the better of two, as a fast way's first is a warm-up."""
    first = seconds(once)
    return first if first > SLOW else min(first, seconds(once))


def in_turns(
    passes: dict[str, Callable[[], Any]], rounds: int, budget: float, known: dict[str, float] | None = None
) -> dict[str, list[float]]:
    """The seconds of each way's pass, in rounds in which the ways take turns.

    A way has as many rounds as fit into `budget` seconds, `rounds` at most. One whose pass takes longer than that has
    one round: the pass by which that was found, or the one that was made before, whose seconds are in `known`.
    """
    known = known or {}
    first = {way: known[way] if known.get(way, 0) > budget else warmed_up(once) for way, once in passes.items()}
    repeat = {way: max(1, round(ROUND_SECONDS / first[way])) for way in passes}
    fit = {way: budget / (first[way] * (repeat[way] + (first[way] < SLOW))) for way in passes}
    taken = {way: [] if fit[way] >= 1 else [first[way]] for way in passes}
    for _ in range(rounds):
        for way, once in passes.items():
            if len(taken[way]) < math.floor(fit[way]):
                if first[way] < SLOW:
                    once()  # what the way before left in the caches is not this one's cost
                taken[way].append(seconds(once, repeat[way]))
    return taken


def compared(taken: dict[str, list[float]], way: str, base: str, column: str) -> dict[str, float]:
    """The median of a way's time over that of another in the same round, with its interval, as three columns."""
    ratios = [own / other for own, other in zip(taken[way], taken[base], strict=False)]
    return dict(zip((column, f"{column}_low", f"{column}_high"), median_interval(ratios), strict=True))


def on_cores(cores: int, script: str, *arguments: Any) -> list[dict]:
    """What a script prints as JSON in a process that has only so many cores, libraries' own threads included."""
    kept = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None  # elsewhere than on Linux: all cores
    try:
        if kept:
            os.sched_setaffinity(0, sorted(kept)[:cores])
        command = [sys.executable, script, "--cores", str(cores), *map(str, arguments)]
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    finally:
        if kept:
            os.sched_setaffinity(0, kept)


def quick_or_not(description: str, *names: str) -> tuple[argparse.Namespace, Path]:
    """The command line of a benchmark, with `--quick` and what it hands to a process of its own; where results go."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few rounds, to results/quick")
    parser.add_argument("--cores", nargs="+", help=argparse.SUPPRESS)
    for name in names:
        parser.add_argument(f"--{name}", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = RESULTS / "quick" if args.quick else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    return args, folder


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """The median of the rounds and its 95 % interval, which assumes no distribution (it is made of order statistics).

    Fewer than 6 rounds cannot give such an interval: then its ends are the smallest and the largest value.
    """
    values = np.asarray(values, dtype=float)
    if len(values) < 6:
        return float(np.median(values)), float(values.min()), float(values.max())
    interval = scipy.stats.quantile_test(values, p=0.5).confidence_interval(0.95)
    return float(np.median(values)), float(interval.low), float(interval.high)


def machine() -> str:
    """The processor, the number of cores and the system, in one line."""
    try:
        processor = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()).group(1)
    except (OSError, AttributeError):
        processor = platform.processor() or platform.machine()
    return f"{processor}, {os.cpu_count()} cores, {platform.system()}, torch {torch.__version__}"


def note(message: str) -> None:
    """Progress goes to stderr, at once."""
    print(message, file=sys.stderr, flush=True)
