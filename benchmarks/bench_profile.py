"""Where the time of a pass with SGSC goes, by torch's profiler; and that of a stacked training run.

The model's own part is a plain pass, timed without the profiler, as is the whole. Products, and the elementwise signs,
sums and copies, are the operations' own times, less those of a plain pass. What remains is Python and the rest.

    python bench_profile.py             writes results/profile.csv
    python bench_profile.py --quick     a few rounds, writes results/quick/profile.csv
"""

import json
import os
import re
import statistics
from collections.abc import Callable
from typing import Any

os.environ |= {"KINETO_LOG_LEVEL": "9", "TORCH_CPP_LOG_LEVEL": "ERROR"}  # the profiler's chatter; read on import
import pandas as pd
import torch
from methods import FLOOR, METHODS, OURS
from models import MODELS, build
from timing import in_turns, machine, median_interval, note, on_cores, quick_or_not
from torch.profiler import ProfilerActivity, profile

PRODUCT = re.compile(r"aten::.*(mm|mv|dot|matmul|einsum|linear|conv\w*)$")
TRAINING = "a stacked training run"


def operations(once: Callable[[], Any], passes: int) -> tuple[float, float]:
    """Milliseconds of a pass in matrix products and convolutions, and in all other operations."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(passes):
            once()
    spent = [0.0, 0.0]
    for event in found.key_averages():
        if event.key.startswith("aten::"):
            spent[PRODUCT.match(event.key) is None] += event.self_cpu_time_total / 1e3 / passes
    return spent[0], spent[1]


def of_model(name: str, cores: int, rounds: int, budget: float) -> dict:
    passes = {way: METHODS[way][0](*build(MODELS[name])) for way in (FLOOR, OURS)}
    taken = in_turns(passes, rounds, budget)
    own, whole = (1e3 * median_interval(taken[way])[0] for way in passes)
    repeat = max(1, round(50 / whole))
    profiles = [[operations(once, repeat) for once in passes.values()] for _ in range(max(3, rounds // 3))]
    products, others = (statistics.median(ours[i] - floor[i] for floor, ours in profiles) for i in (0, 1))
    row = {"model": name, "cores": cores, "milliseconds": whole, "own": own}
    return row | {"products": products, "elementwise": others, "rest": whole - own - products - others}


def of_training(cores: int) -> dict:
    """The same of one process of the study's engine, where the model's own products are not told from SGSC's."""
    from bench_training import STACK, stacked

    from sgsc_study import load_mnist1d

    data, way = load_mnist1d(), stacked(STACK, 1)
    taken = in_turns({TRAINING: lambda: way(data, 1)}, 3, 5.0)
    whole = 1e3 * median_interval(taken[TRAINING])[0]
    products, others = operations(lambda: way(data, 1), 1)
    row = {"model": TRAINING, "cores": cores, "milliseconds": whole, "products": products, "elementwise": others}
    return row | {"rest": whole - products - others}


def main() -> None:
    args, folder = quick_or_not(__doc__)
    if args.cores:
        cores = int(args.cores[0])
        torch.set_num_threads(cores)
        rows = [of_model(name, cores, *((3, 0.2) if args.quick else (15, 1.5))) for name in MODELS]
        return print(json.dumps(rows + [of_training(cores)] * (cores == 1)))
    from sgsc_study import write_table

    rows = [row for cores in (2, 1) for row in on_cores(cores, __file__, *["--quick"] * args.quick)]
    frame = pd.DataFrame(rows)
    write_table(frame.assign(machine=machine()), folder / "profile.csv")
    note(frame.to_string(index=False, float_format="{:.2f}".format))


if __name__ == "__main__":
    main()
