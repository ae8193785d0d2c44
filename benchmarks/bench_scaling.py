"""How SGSC's cost grows with the batch, the width and the length of sequences, beside vmap, over a plain pass.

vmap is left out where the per-sample gradients alone would fill more than about a gigabyte.

    python bench_scaling.py             writes results/scaling.csv
    python bench_scaling.py --quick     a few rounds, writes results/quick/scaling.csv
"""

import copy
import json
from functools import partial

import pandas as pd
import torch
from methods import FLOOR, METHODS, OURS, VMAP
from models import build, mlp_on, on_sequences
from timing import compared, in_turns, machine, median_interval, note, on_cores, quick_or_not

CORES = 2
MOST = 2.5e8  # numbers in the per-sample gradients
PANELS = {
    "batch size": {n: partial(mlp_on, n, 40, 128, 128, 10) for n in (8, 32, 128, 512, 2048)},
    "width": {n: partial(mlp_on, 128, 40, n, n, 10) for n in (16, 64, 256, 1024, 4096)},
    "positions": {n: partial(on_sequences, n) for n in (4, 16, 64, 256, 1024)},
}


def time_panel(panel: str, rounds: int, budget: float) -> list[dict]:
    rows = []
    for size, make in PANELS[panel].items():
        model, x, y = build(make)
        ways = [FLOOR, OURS, VMAP]
        if sum(p.numel() for p in model.parameters()) * len(x) > MOST:
            ways.remove(VMAP)
        passes = {way: METHODS[way][0](copy.deepcopy(model), x, y) for way in ways}
        taken = in_turns(passes, rounds, budget)
        for way in ways:
            row = {"panel": panel, "size": size, "cores": CORES, "method": way, "rounds": len(taken[way])}
            row |= {"milliseconds": 1e3 * median_interval(taken[way])[0]} | compared(taken, way, FLOOR, "ratio")
            rows.append(row)
    return rows


def main() -> None:
    args, folder = quick_or_not(__doc__)
    if args.cores:
        cores, panel = args.cores
        torch.set_num_threads(int(cores))
        return print(json.dumps(time_panel(panel, *((3, 0.2) if args.quick else (21, 1.5)))))
    from sgsc_study import write_table

    frame = pd.DataFrame(
        [row for panel in PANELS for row in on_cores(CORES, __file__, panel, *["--quick"] * args.quick)]
    )
    write_table(frame.assign(machine=machine()), folder / "scaling.csv")
    note(frame.to_string(index=False, float_format="{:.2f}".format))


if __name__ == "__main__":
    main()
