"""What the sign consistency costs: SGSC and the other ways to the same number, against a plain backward pass.

Each pass is a forward pass, a backward pass and whatever gives c (and, for the last row of ours, the gated gradients).
The methods take turns in one process; a method's ratio is taken within a round, to the plain pass of that round. Once
with two cores, once with one. Memory is measured in a process for each method. No method is timed before its c was
compared with SGSC's.

    python bench_statistic.py             writes results/statistic.csv
    python bench_statistic.py --quick     a few rounds, writes results/quick/statistic.csv
"""

import copy
import gc
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pandas as pd
import torch
from methods import FLOOR, GAMMA, HOOKS, METHODS, OURS, SCALED, Result, backward
from models import MODELS, build
from timing import compared, in_turns, machine, median_interval, note, on_cores, quick_or_not
from torch import Tensor, nn

CORES = 2  # where memory is measured, and every peer is timed
ON_ONE_CORE = 2  # so many of the peers, the fastest on two cores, are timed on one core as well
MOST_WRONG = 1e-4  # share of entries of c that may differ: float32 signs of values within rounding of zero

# ---- Checking and timing ---------------------------------------------------------------------------------------------


def differing(method: str, found: Result, model: nn.Module, c: dict[str, Tensor], floor: nn.Module) -> tuple[int, int]:
    """How many entries are not what SGSC's c says: of c itself, or of the gated gradient for `scale_gradients_`; and
    in how many of these the mean gradient is zero but for rounding, so that the samples' signs are noise."""
    if method in (FLOOR, HOOKS):
        return 0, 0
    gradients = {name: p.grad for name, p in floor.named_parameters()}
    zero = 100 * torch.finfo(torch.float32).eps * max(float(g.abs().max()) for g in gradients.values())
    total = of_rounding = 0
    for name, p in model.named_parameters():
        if method == SCALED:
            off = ~torch.isclose(p.grad, gradients[name] * c[name] ** GAMMA, rtol=1e-4, atol=1e-9)
        else:
            off = ~torch.isclose(found[name], c[name], rtol=0, atol=1e-6)
        total += int(off.sum())
        of_rounding += int((off & (gradients[name].abs() <= zero)).sum())
    return total, of_rounding


def time_model(name: str, methods: list[str], cores: int, rounds: int, budget: float) -> list[dict]:
    """Compare every method's c with ours, then time them in turns; one row a method."""
    floor, x, y = build(MODELS[name])
    models = {method: floor if method == FLOOR else copy.deepcopy(floor) for method in methods}
    passes, known, rows, reference = {}, {}, [], None
    for method in methods:
        package = METHODS[method][1]
        row = {"model": name, "batch_size": len(x), "cores": cores, "method": method, "package": package}
        row |= {"version": importlib.metadata.version(package)}
        rows.append(row)
        try:
            once = METHODS[method][0](models[method], x, y)
            start = time.perf_counter()
            found = once()
            known[method] = time.perf_counter() - start
        except Exception as error:  # a peer's own, of any kind, for a model that it does not serve
            if METHODS[method][1] == "sgsc":
                raise
            row["why"] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            note(f"{name}, {cores} core(s): {method}: {row['why']}")
            continue
        reference = found if method == OURS else reference
        entries = sum(p.numel() for p in floor.parameters())
        wrong, of_rounding = differing(method, found, models[method], reference, floor)
        row |= {"entries": entries, "differing": wrong, "of_rounding": of_rounding}
        note(f"{name}, {cores} core(s): {method}: {wrong} of {entries} entries differ, {of_rounding} of rounding")
        if wrong - of_rounding > MOST_WRONG * entries:
            row["why"] = f"c differs in {wrong} of {entries} entries"
        else:
            passes[method] = once
        del found
    taken = in_turns(passes, rounds, budget, known)
    for row in rows:
        if (method := row["method"]) in taken:
            row |= {"rounds": len(taken[method]), "milliseconds": 1e3 * median_interval(taken[method])[0]}
            row |= compared(taken, method, FLOOR, "ratio") | compared(taken, method, OURS, "times_sgsc")
    return rows


def fastest_peers(rows: list[dict]) -> list[str]:
    """The methods that are timed on one core, from a model's rows on two."""
    peers = [row for row in rows if row["package"] != "sgsc" and row["method"] not in (FLOOR, HOOKS) and "ratio" in row]
    best = sorted(peers, key=lambda row: row["ratio"])[:ON_ONE_CORE]
    return [FLOOR, HOOKS, OURS, SCALED, *(row["method"] for row in best)]


# ---- Memory ----------------------------------------------------------------------------------------------------------


def peak_memory(name: str, method: str) -> None:
    """Print, as JSON, this process's peak memory in one pass, and how much of it came with the pass, in MiB."""
    model, x, y = build(MODELS[name])
    make = METHODS[method][0]
    torch.optim.Adam(model.parameters())  # imports what every training process has imported
    # Code and libraries are loaded; the method's on a small model, so that no second copy of this one is counted.
    backward(copy.deepcopy(model), x[:2], y[:2])
    make(*build(MODELS["40-128-128-10"]))()
    gc.collect()  # hooks make cycles
    once = make(model, x, y)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = status("VmRSS")
    once()
    print(json.dumps({"peak_mib": status("VmHWM"), "pass_mib": status("VmHWM") - before}))


def status(field: str) -> float:
    """A memory size of this process in MiB, as Linux has it."""
    return int(re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text()).group(1)) / 1024


def measure_memory(name: str, method: str) -> dict[str, float]:
    """`peak_memory` in a process of its own; nothing where the system is not Linux."""
    if not Path("/proc/self/clear_refs").exists():
        return {}
    # Blocks above 64 KiB go back to the system when freed, so that the peak is of memory in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--memory", name, method]
    return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)


def main() -> None:
    args, folder = quick_or_not(__doc__, "memory")
    # Opacus and BackPACK hook the first layer too, whose input needs no gradient; PyTorch warns about that.
    warnings.simplefilter("ignore")
    # What these two warn of is that they cannot serve a model.
    warnings.filterwarnings("error", message="vmap cannot batch the model|Extension saving to grad_batch")
    if args.memory:
        torch.set_num_threads(CORES)
        return peak_memory(*args.memory)
    rounds, budget = (3, 0.3) if args.quick else (31, 2.5)
    if args.cores:
        cores, name, *methods = args.cores
        torch.set_num_threads(int(cores))
        return print(json.dumps(time_model(name, methods, int(cores), rounds, budget)))
    from sgsc_study import write_table  # not above: what it loads would be part of every peak of memory

    quick, rows = ["--quick"] * args.quick, []
    for name in MODELS:
        own = on_cores(CORES, __file__, name, *METHODS, *quick)
        rows += own + on_cores(1, __file__, name, *fastest_peers(own), *quick)
    for row in rows:
        if row["cores"] == CORES and "why" not in row:
            row |= measure_memory(row["model"], row["method"])
            note(f"{row['model']}: {row['method']}: {row.get('peak_mib', float('nan')):.0f} MiB at most")
    frame = pd.DataFrame(rows)
    for size in {"peak_mib", "pass_mib"} & set(frame):
        floor = frame[(frame.method == FLOOR) & (frame.cores == CORES)].set_index("model")[size]
        frame[size.replace("mib", "ratio")] = frame[size] / frame.model.map(floor)
    write_table(frame.assign(machine=machine()), folder / "statistic.csv")
    shown = ["model", "cores", "method", "rounds", "milliseconds", "ratio", "times_sgsc", "peak_ratio"]
    note(frame.reindex(columns=shown).to_string(index=False, float_format="{:.2f}".format))


if __name__ == "__main__":
    main()
