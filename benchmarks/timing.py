"""What both benchmarks share: how a set of rounds is summed up, and what machine they ran on."""

import os
import platform
import re
import sys
from pathlib import Path

import numpy as np
import scipy.stats
import torch

RESULTS = Path(__file__).resolve().parent / "results"


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
