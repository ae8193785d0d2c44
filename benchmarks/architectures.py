"""What SGSC does on the real architectures of zoo.py: how it serves them, whether c is right, and what it costs.

For each: how its parameters are served; how many entries of c differ from a loop over samples, in float64 and without
dropout; whether training mode with dropout runs; time and peak memory of a pass with c, beside a plain pass and vmap.

    python architectures.py                     writes results/architectures.csv and docs/architectures.md
    python architectures.py --only gpt2 vit     measures these and prints them
    python architectures.py --page              writes docs/architectures.md from the table
"""

import argparse
import os
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

os.environ |= {"KINETO_LOG_LEVEL": "9", "TORCH_CPP_LOG_LEVEL": "ERROR"}  # the profiler's chatter; read on import
import pandas as pd
import torch
from cases import ARCHITECTURES
from summary import ROOT, markdown, put
from timing import RESULTS, machine, median_interval, note
from torch import nn
from torch.utils._pytree import tree_map

from sgsc_lib import SGSC, check_consistency, sign_consistency

COMPARED = 6  # samples of the batch for which c is compared with the loop
DROPOUT = 0.1
ROUNDS, SECONDS = (3, 15), 1.5  # the fewest and the most rounds of timing, and about how long they may take
PAGE, TABLE = ROOT / "docs" / "architectures.md", RESULTS / "architectures.csv"
Pass = Callable[[], Any]

# ---- A model and its batch -------------------------------------------------------------------------------------------


def call(model: nn.Module, x: Any) -> Any:
    return model(**x) if isinstance(x, dict) else model(*x) if isinstance(x, tuple) else model(x)


def build(name: str, dropout: float = 0.0) -> Any:
    """The case, the same at every call, in training mode."""
    torch.manual_seed(0)
    case = ARCHITECTURES[name](dropout)
    for p in case.model.parameters():
        if not p.any():  # a head or an adapter that starts at zero passes no gradient on: nothing could be compared
            nn.init.normal_(p, std=0.1)
    case.model.train()
    return case


def ready(name: str, dropout: float = 0.0) -> Any:
    """The case after the way out of the refusal that is expected of it."""
    case = build(name, dropout)
    if case.way_out is not None:
        case.way_out(case.model)
    return case


def precise(case: Any) -> Any:
    """The case in float64, on the samples that are compared."""
    x = tree_map(lambda t: t[:COMPARED].double() if t.is_floating_point() else t[:COMPARED], case.x)
    return case._replace(model=case.model.double(), x=x, y=case.y[:COMPARED])


# Each takes a case and returns a function that makes one forward and backward pass on its batch. All leave the mean
# gradient, which a training step needs.


def plain(case: Any) -> Pass:
    def once() -> None:
        case.model.zero_grad()
        case.loss_fn(call(case.model, case.x), case.y).backward()

    return once


def with_sgsc(case: Any) -> Pass:
    sgsc, backward = SGSC(case.model, gamma=0.5), plain(case)

    def once() -> dict[str, torch.Tensor]:
        backward()
        return sgsc.consistency()

    return once


def with_vmap(case: Any) -> Pass:
    parameters = {name: p.detach() for name, p in case.model.named_parameters() if p.requires_grad}
    rest = {name: p.detach() for name, p in case.model.named_parameters() if not p.requires_grad}
    rest |= dict(case.model.named_buffers())

    def loss(parameters: dict[str, torch.Tensor], x: Any, y: torch.Tensor) -> torch.Tensor:
        def model(*args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(case.model, (parameters, rest), args, kwargs)

        return case.loss_fn(call(model, tree_map(lambda t: t.unsqueeze(0), x)), y.unsqueeze(0))

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0), randomness="different")

    def once() -> dict[str, torch.Tensor]:
        per_sample = gradients(parameters, case.x, case.y)
        _ = {name: g.mean(0) for name, g in per_sample.items()}
        return sign_consistency(per_sample)

    return once


# ---- What is measured ------------------------------------------------------------------------------------------------


def refusal(name: str) -> dict[str, str]:
    """The refusal that is expected of this case as it is, and what its way out does; nothing where none is expected."""
    case = build(name)
    if case.way_out is None:
        return {}
    try:
        SGSC(case.model, gamma=0.5)
    except ValueError as error:
        return {"refusal": str(error).splitlines()[0], "way_out": case.way_out.__doc__}
    raise AssertionError("It should be refused as it is, and was served.")


def compare(name: str) -> dict[str, Any]:
    """How many entries of c differ from a loop over samples, and how many parameters are served in which way."""
    case = precise(ready(name))
    rows = check_consistency(case.model, case.x, case.y, case.loss_fn)
    names = {"_rule": "", "_": " ", ", ": " + "}
    ways = Counter()
    for row in rows:
        way = row.served_by.partition(" in ")[0]
        for old, new in names.items():
            way = way.replace(old, new)
        ways[way] += 1
    whole = sum(row.served_by.startswith("recomputed in 'model' ") for row in rows)
    served = ", ".join(f"{way} {count}" for way, count in ways.most_common())
    served += f" ({whole} of these in the whole model)" if whole else ""
    return {
        "served": served,
        "entries": sum(row.entries for row in rows),
        "differing": sum(row.differing for row in rows),
    }


def with_dropout(name: str) -> dict[str, Any]:
    """Entries of c that differ in training mode with dropout, from a loop over the samples of one forward pass: each
    sample's own loss is sent back through that pass, with its random numbers. Nothing where nothing is random."""
    case = precise(ready(name, DROPOUT))
    losses = [case.loss_fn(call(case.model, case.x), case.y).detach() for _ in range(2)]
    if torch.equal(*losses):
        return {}
    parameters = {name: p for name, p in case.model.named_parameters() if p.requires_grad}
    torch.manual_seed(1)
    output, per_sample = call(case.model, case.x), []
    for i in range(len(case.y)):
        loss = case.loss_fn(tree_map(lambda t, i=i: t[i : i + 1], output), case.y[i : i + 1])
        inputs = list(parameters.values())
        per_sample.append(torch.autograd.grad(loss, inputs, retain_graph=True, materialize_grads=True))
    once = with_sgsc(case)
    once()  # SGSC checks itself on its first batch
    torch.manual_seed(1)
    c, differing = once(), 0
    gradients = {name: torch.stack(g) for name, *g in zip(parameters, *per_sample, strict=True)}
    # Two ways to one mean gradient tell how exact either is: transformers' norms compute in float32 in any case.
    mean = {name: p.grad for name, p in parameters.items()}
    rounding = 10 * max((g.mean(0) - mean[name]).abs().max() for name, g in gradients.items())
    largest = max(g.abs().max() for g in gradients.values())
    assert rounding < 1e-5 * largest, "The two passes should have the same random numbers."
    for name, g in gradients.items():
        doubtful = (g.abs() < rounding).sum(0) * (g != 0).any(0)  # zero in one of the two, noise in the other
        off = (sign_consistency(g) - c[name]).abs() * len(g)
        differing += int((off > 2 * doubtful + 1e-3).sum())
    return {"differing_dropout": differing}


def peak(once: Pass) -> int:
    """The most bytes of tensors that a pass holds beyond what was there before it."""
    once()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        once()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def seconds(once: Pass) -> float:
    start = time.perf_counter()
    once()
    return time.perf_counter() - start


def costs(name: str) -> dict[str, Any]:
    """Time and peak memory over those of a plain pass: in turns, with a ratio within each round; the median of them."""
    row: dict[str, Any] = {}
    passes = {"plain": plain(ready(name))}
    seconds(passes["plain"])
    first = []  # passes, on which SGSC checks itself
    for _ in range(3):
        passes["sgsc"] = with_sgsc(ready(name))
        first.append(seconds(passes["sgsc"]))
    vmap = with_vmap(ready(name))
    with suppress(RuntimeError):  # an operation without a batching rule, or control flow that depends on data
        vmap()
        passes["vmap"] = vmap
    taken: dict[str, list[float]] = {way: [] for way in passes}
    (least, most), start = ROUNDS, time.perf_counter()
    while len(taken["plain"]) < least or (len(taken["plain"]) < most and time.perf_counter() - start < SECONDS):
        for way, once in passes.items():
            taken[way].append(seconds(once))
    floor = median_interval(taken["plain"])[0]
    row |= {"rounds": len(taken["plain"]), "milliseconds": 1e3 * floor, "first": median_interval(first)[0] / floor}
    held = {way: peak(once) for way, once in passes.items()}
    for way in list(passes)[1:]:
        ratios = [own / other for own, other in zip(taken[way], taken["plain"], strict=True)]
        columns = (f"{way}_time", f"{way}_time_low", f"{way}_time_high")
        row |= dict(zip(columns, median_interval(ratios), strict=True))
        row[f"{way}_memory"] = held[way] / held["plain"]
    return row


def measure(name: str) -> dict[str, Any]:
    library, _, architecture = name.partition(": ")
    row = {"library": library, "architecture": architecture, "batch_size": len(build(name).y)}
    return row | refusal(name) | compare(name) | with_dropout(name) | costs(name)


# ---- The page --------------------------------------------------------------------------------------------------------


def page(frame: pd.DataFrame) -> str:
    refused = frame.way_out.notna()
    medians = {column: frame[column].median() for column in ("sgsc_time", "sgsc_memory", "vmap_time", "vmap_memory")}
    without, as_they_are = int(frame.vmap_time.isna().sum()), len(frame) - refused.sum()
    sentences = (
        f"SGSC serves {as_they_are} of {len(frame)} architectures as they are, and {refused.sum()} after the way out "
        f"that its refusal names. c differs in {frame.differing.sum()} of {frame.entries.sum():,} entries; "
        f"with dropout, in {frame.differing_dropout.sum():.0f}.\n\n"
        f"A pass with SGSC takes {medians['sgsc_time']:.1f} × the time and {medians['sgsc_memory']:.1f} × the memory "
        f"of a plain one in the median, at most {frame.sgsc_time.max():.1f} × and {frame.sgsc_memory.max():.1f} ×. A "
        f"plain pass takes {frame.milliseconds.median():.1f} ms in the median.\n\n"
        f"Where vmap of the whole model runs it takes {medians['vmap_time']:.1f} × and {medians['vmap_memory']:.1f} ×; "
        f"it fails on {without}.\n\n"
    )

    def ratio(column: str) -> pd.Series:
        return frame[column].map(lambda value: "fails" if pd.isna(value) else f"{value:.1f}")

    table = pd.DataFrame(
        {
            "library": frame.library,
            "architecture": frame.architecture,
            "parameters, by how they are served": frame.served,
            "entries that differ": frame.differing.astype(str) + frame.entries.map(" of {:,}".format),
            "with dropout": frame.differing_dropout.map(lambda n: "not random" if pd.isna(n) else f"{n:.0f}"),
            "time, SGSC": ratio("sgsc_time"),
            "time, vmap": ratio("vmap_time"),
            "memory, SGSC": ratio("sgsc_memory"),
            "memory, vmap": ratio("vmap_memory"),
            "first pass": ratio("first"),
        }
    )
    refusals = frame[refused][["architecture", "refusal", "way_out"]].rename(columns={"way_out": "done here"})
    setting = f"Batches of {frame.batch_size.iloc[0]}, one thread, {frame.machine.iloc[0]}; {frame.versions.iloc[0]}."
    return (
        f"{sentences}{markdown(table)}\n{setting}\n\n## Refused as they are\n\nThe rows above are those of the model "
        f"after this was done to it.\n\n{markdown(refusals)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=[], help="parts of names: measure these, write nothing")
    parser.add_argument("--page", action="store_true", help="only write the page, from the table that is there")
    args = parser.parse_args()
    if args.page:
        return put("architectures", page(pd.read_csv(TABLE)), PAGE, "architectures.py")
    import zoo  # here and not above: `--page` needs none of its libraries
    import zoo_torch  # noqa: F401 - both enter their architectures, in the order of the table

    from sgsc_study import write_table

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows, failed = [], []
    for name in ARCHITECTURES:
        if args.only and not any(part in name for part in args.only):
            continue
        start = time.perf_counter()
        try:
            rows.append(measure(name))
        except Exception:
            failed.append(name)
            note(traceback.format_exc())
        note(f"{name}: {time.perf_counter() - start:.1f} s")
    frame = pd.DataFrame(rows).assign(machine=machine(), versions=zoo.versions())
    print(frame.drop(columns=["machine", "versions"]).to_string(index=False, float_format="{:.2f}".format))
    wrong = [row["architecture"] for row in rows if row["differing"] or row.get("differing_dropout")]
    if failed or wrong:
        raise SystemExit(f"Nothing is written. Refused or failed: {failed}. With entries that differ: {wrong}.")
    if not args.only:
        write_table(frame, TABLE)
        put("architectures", page(pd.read_csv(TABLE)), PAGE, "architectures.py")


if __name__ == "__main__":
    main()
