"""What the sign consistency costs: SGSC and the other ways to the same number, against a plain backward pass.

Each pass is a forward pass, a backward pass and whatever gives c (and, for the last row of ours, the gated gradients).
The methods take turns in one process; a method's ratio is taken within a round, to the plain pass of that round.
Memory is measured in a process for each method. No method is timed before its c was compared with SGSC's.

    python bench_statistic.py             writes results/statistic.csv
    python bench_statistic.py --quick     a few rounds, writes results/quick/statistic.csv
"""

import argparse
import copy
import gc
import importlib.metadata
import json
import math
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from timing import RESULTS, machine, median_interval, note
from torch import Tensor, nn

from sgsc_lib import SGSC, factored_sums, mlp, per_sample_gradients

THREADS = 2
GAMMA = 0.25
ROUND_SECONDS = 0.03  # a fast method repeats its pass within a round until about this much time has gone
SLOW, VERY_SLOW = 1.0, 10.0  # seconds a pass, above which a method gets only a few rounds, or one
MOST_WRONG = 1e-4  # share of entries of c that may differ: float32 signs of values within rounding of zero

Result = dict[str, Tensor] | None
Pass = Callable[[], Result]

# ---- The models ------------------------------------------------------------------------------------------------------


def mnist1d_cnn() -> nn.Module:
    """The convolutional network of the MNIST-1D paper (Greydanus & Kobak, arXiv 2011.14439)."""
    convolutions = (nn.Conv1d(1, 25, 5, 2, 1), nn.Conv1d(25, 25, 3, 2, 1), nn.Conv1d(25, 25, 3, 2, 1))
    with_relu = [layer for convolution in convolutions for layer in (convolution, nn.ReLU())]
    return nn.Sequential(nn.Unflatten(1, (1, 40)), *with_relu, nn.Flatten(), nn.Linear(125, 10))


MODELS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {  # how to build it, features, batch size
    "40-128-128-10": (lambda: mlp((40, 128, 128, 10), seed=0), 40, 128),
    "784-1024-1024-10": (lambda: mlp((784, 1024, 1024, 10), seed=0), 784, 512),
    "MNIST-1D CNN": (mnist1d_cnn, 40, 128),
}


def build(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A model and a batch for it: standard normal features, uniform labels; the same at every call."""
    torch.manual_seed(0)
    make, features, batch_size = MODELS[name]
    return make(), torch.randn(batch_size, features), torch.randint(10, (batch_size,))


# ---- The methods -----------------------------------------------------------------------------------------------------
# Each takes a model and a batch and returns a function that makes one pass and returns {parameter name: c}. All leave
# the batch's mean gradient as well, in `.grad` or as a tensor, because a training step needs it. The peers' per-sample
# gradients are turned into signs in place, which is faster and smaller than sgsc_lib.sign_consistency.


def backward(model: nn.Module, x: Tensor, y: Tensor) -> None:
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()


def consistency_(per_sample: Tensor) -> Tensor:
    """c from per-sample gradients [B, *shape], which are overwritten."""
    return per_sample.sign_().sum(0).div_(len(per_sample)).abs_()


def plain(model: nn.Module, x: Tensor, y: Tensor) -> Pass:
    return lambda: backward(model, x, y)


def sgsc(model: nn.Module, x: Tensor, y: Tensor) -> Pass:
    gate = SGSC(model, GAMMA)

    def once() -> Result:
        backward(model, x, y)
        return gate.consistency()

    return once


def hooked(model: nn.Module, x: Tensor, y: Tensor, on_errors: Callable[[Tensor, Tensor], None]) -> Pass:
    """A plain pass with the hooks that any such method needs at each layer: for its input and its errors."""

    def on_layer(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        output.register_hook(lambda errors: on_errors(args[0].detach(), errors))

    for module in model.modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_hook(on_layer)
    return lambda: backward(model, x, y)


def empty_hooks(model: nn.Module, x: Tensor, y: Tensor) -> Pass:
    return hooked(model, x, y, lambda inputs, errors: None)


def bare_products(model: nn.Module, x: Tensor, y: Tensor) -> Pass:
    def on_errors(inputs: Tensor, errors: Tensor) -> None:
        if inputs.ndim == 2:  # of a Linear layer
            factored_sums(inputs, errors)

    return hooked(model, x, y, on_errors)


def sgsc_scaled(model: nn.Module, x: Tensor, y: Tensor) -> Pass:
    gate = SGSC(model, GAMMA)

    def once() -> Result:
        backward(model, x, y)
        gate.scale_gradients_()
        return None

    return once


def vmap(model: nn.Module, x: Tensor, y: Tensor) -> Pass:
    def once() -> Result:
        per_sample = per_sample_gradients(model, x, y)
        _ = {name: g.mean(0) for name, g in per_sample.items()}
        return {name: consistency_(per_sample.pop(name)) for name in list(per_sample)}

    return once


def vmap_chunks(model: nn.Module, x: Tensor, y: Tensor) -> Pass:
    size = 32

    def once() -> Result:
        sums, signs = {}, {}
        for start in range(0, len(x), size):
            part = slice(start, start + size)
            for name, g in per_sample_gradients(model, x[part], y[part]).items():
                sums[name] = sums.get(name, 0) + g.sum(0)
                signs[name] = signs.get(name, 0) + g.sign_().sum(0)
        _ = {name: total.div_(len(x)) for name, total in sums.items()}
        return {name: total.div_(len(x)).abs_() for name, total in signs.items()}

    return once


def opacus(model: nn.Module, x: Tensor, y: Tensor) -> Pass:
    from opacus import GradSampleModule

    wrapped = GradSampleModule(model, loss_reduction="mean")

    def once() -> Result:
        backward(wrapped, x, y)
        c = {}
        for name, p in model.named_parameters():
            c[name], p.grad_sample = consistency_(p.grad_sample), None
        return c

    return once


def backpack(model: nn.Module, x: Tensor, y: Tensor) -> Pass:
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    model, loss = extend(model), extend(nn.CrossEntropyLoss())

    def once() -> Result:
        model.zero_grad()
        with backpack(BatchGrad()):
            loss(model(x), y).backward()
        c = {}
        for name, p in model.named_parameters():
            c[name] = consistency_(p.grad_batch)
            del p.grad_batch
        return c

    return once


def torchjd(model: nn.Module, x: Tensor, y: Tensor) -> Pass:
    from torchjd.autojac import jac

    names, parameters = zip(*model.named_parameters(), strict=True)

    def once() -> Result:
        jacobians = list(jac(F.cross_entropy(model(x), y, reduction="none"), parameters))
        _ = [j.mean(0) for j in jacobians]
        return {name: consistency_(jacobians.pop(0)) for name in names}

    return once


FLOOR, OURS, SCALED = "plain backward", "SGSC, statistic", "SGSC, scale_gradients_"
# Not methods but the parts of one, timed to see where SGSC's time goes: hooks that do nothing, and hooks with the
# products of signs and nothing else, no counts, checks or c.
PARTS = ("hooks that do nothing", "hooks and sign products")
METHODS: dict[str, tuple[Callable[[nn.Module, Tensor, Tensor], Pass], str]] = {  # with the package it comes from
    FLOOR: (plain, "torch"),
    PARTS[0]: (empty_hooks, "torch"),
    PARTS[1]: (bare_products, "torch"),
    OURS: (sgsc, "sgsc"),
    SCALED: (sgsc_scaled, "sgsc"),
    "torch.func vmap": (vmap, "torch"),
    "torch.func vmap, chunks of 32": (vmap_chunks, "torch"),
    "Opacus GradSampleModule": (opacus, "opacus"),
    "BackPACK BatchGrad": (backpack, "backpack-for-pytorch"),
    "TorchJD jac": (torchjd, "torchjd"),
}

# ---- Checking, timing, memory ----------------------------------------------------------------------------------------


def differing(method: str, found: Result, model: nn.Module, reference: dict[str, Tensor], floor: nn.Module) -> int:
    """How many entries are not what SGSC's c says: of c itself, or of the gated gradient for `scale_gradients_`."""
    if method in (FLOOR, *PARTS):
        return 0
    if method == SCALED:
        plain_gradients = {name: p.grad for name, p in floor.named_parameters()}
        return sum(
            int((~torch.isclose(p.grad, plain_gradients[name] * reference[name] ** GAMMA, rtol=1e-4, atol=1e-9)).sum())
            for name, p in model.named_parameters()
        )
    return sum(int((~torch.isclose(found[name], c, rtol=0, atol=1e-6)).sum()) for name, c in reference.items())


def seconds(once: Pass, repeat: int) -> float:
    start = time.perf_counter()
    for _ in range(repeat):
        once()
    return (time.perf_counter() - start) / repeat


def time_model(name: str, rounds: int, slow_rounds: int) -> Iterator[dict]:
    """Compare every method's c with ours, then time them in turns; one row a method."""
    model, x, y = build(name)
    models = {method: copy.deepcopy(model) for method in METHODS}
    passes = {method: make(models[method], x, y) for method, (make, _) in METHODS.items()}
    passes[FLOOR]()
    reference = passes[OURS]()
    entries = sum(c.numel() for c in reference.values())
    first, wrong = {}, {}
    for method, once in passes.items():
        first[method] = math.inf
        for _ in range(2):  # a fast method's first pass is a warm-up
            start = time.perf_counter()
            found = once()
            first[method] = min(first[method], time.perf_counter() - start)
            if first[method] > SLOW:
                break
        wrong[method] = differing(method, found, models[method], reference, models[FLOOR])
        del found
        note(f"{name}: {method}: {wrong[method]} of {entries} entries differ; a pass takes {first[method]:.3g} s")
    timed = [method for method in passes if wrong[method] <= MOST_WRONG * entries]

    repeat = {method: max(1, round(ROUND_SECONDS / first[method])) for method in timed}
    n_rounds = {
        method: 1 if first[method] > VERY_SLOW else slow_rounds if first[method] > SLOW else rounds for method in timed
    }
    # A very slow method's one round is the pass that was checked.
    taken = {method: [first[method]] if first[method] > VERY_SLOW else [] for method in timed}
    for _ in range(rounds):
        for method in timed:
            if len(taken[method]) < n_rounds[method]:
                if first[method] < SLOW:
                    passes[method]()  # what the method before left in the caches is not this one's cost
                taken[method].append(seconds(passes[method], repeat[method]))
    for method, (_, package) in METHODS.items():
        row = {
            "model": name,
            "batch_size": len(x),
            "method": method,
            "package": package,
            "version": importlib.metadata.version(package),
            "entries": entries,
            "differing": wrong[method],
        }
        if method in timed:
            row |= {"rounds": n_rounds[method], "milliseconds": 1e3 * median_interval(taken[method])[0]}
            for column, base in (("ratio", FLOOR), ("times_sgsc", OURS)):
                ratios = [own / other for own, other in zip(taken[method], taken[base], strict=False)]
                row |= dict(zip((column, f"{column}_low", f"{column}_high"), median_interval(ratios), strict=True))
        yield row


def peak_memory(name: str, method: str) -> None:
    """Print, as JSON, this process's peak memory in one pass, and how much of it came with the pass, in MiB."""
    model, x, y = build(name)
    make = METHODS[method][0]
    torch.optim.Adam(model.parameters())  # imports what every training process has imported
    make(copy.deepcopy(model), x[:2], y[:2])()  # code and libraries are loaded
    gc.collect()  # hooks make cycles
    once = make(model, x, y)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = status("VmRSS")
    once()
    print(json.dumps({"peak_mib": status("VmHWM"), "pass_mib": status("VmHWM") - before}))


def status(field: str) -> float:
    """A memory size of this process in MiB, as Linux has it."""
    return int(re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text()).group(1)) / 1024


def measure_memory(name: str, method: str, threads: int) -> dict[str, float]:
    """`peak_memory` in a process of its own; nothing where the system is not Linux."""
    if not Path("/proc/self/clear_refs").exists():
        return {}
    # Blocks above 64 KiB go back to the system when freed, so that the peak is of memory in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--threads", str(threads), "--memory", name, method]
    return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few rounds, to results/quick")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="only these (needs --quick)")
    parser.add_argument("--threads", type=int, default=THREADS, help="PyTorch's threads (default: %(default)s)")
    parser.add_argument("--memory", nargs=2, metavar=("MODEL", "METHOD"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.models != list(MODELS) and not args.quick:
        parser.error("--models needs --quick: the committed table has every model")
    torch.set_num_threads(args.threads)
    # Opacus and BackPACK hook the first layer too, whose input needs no gradient; PyTorch warns about that.
    warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
    if args.memory:
        return peak_memory(*args.memory)
    from sgsc_study import write_table  # not above: what it loads would be part of every peak of memory

    rows = []
    for name in args.models:
        rounds, slow_rounds = (5, 1) if args.quick else (31, 3)
        rows += time_model(name, rounds, slow_rounds)
    for row in rows:
        row |= measure_memory(row["model"], row["method"], args.threads)
        note(f"{row['model']}: {row['method']}: {row.get('peak_mib', float('nan')):.0f} MiB at most")
    frame = pd.DataFrame(rows)
    for size in {"peak_mib", "pass_mib"} & set(frame):
        floor = frame[frame.method == FLOOR].set_index("model")[size]
        frame[size.replace("mib", "ratio")] = frame[size] / frame.model.map(floor)
    frame = frame.assign(threads=args.threads, machine=machine())
    folder = RESULTS / "quick" if args.quick else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    write_table(frame, folder / "statistic.csv")
    hidden = ["batch_size", "package", "version", "entries", "times_sgsc_low", "times_sgsc_high", "threads", "machine"]
    note(frame.drop(columns=hidden).to_string(index=False, float_format="{:.2f}".format))


if __name__ == "__main__":
    main()
