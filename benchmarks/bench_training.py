"""What a trained run costs: the study's stacked `train`, the usual way one run at a time, and JAX.

Every way trains 40-128-128-10 on MNIST-1D by Adam with SGSC before it, from the same weights on the same batches in the
same order, and evaluates on all training, validation and test rows after every epoch. A few epochs are timed and scaled
to the study's 50. The ways take turns in one process: once on one core (what a process of the study has), once on two.

    python bench_training.py             writes results/training.csv
    python bench_training.py --quick     one epoch, three rounds, writes results/quick/training.csv
"""

import importlib.metadata
import json
import time
from collections.abc import Callable

import pandas as pd
import torch
import torch.nn.functional as F
from timing import compared, machine, median_interval, note, on_cores, quick_or_not

from sgsc_lib import mlp, per_sample_gradients, sign_consistency
from sgsc_study import Dataset, Run, load_mnist1d, train, write_table
from sgsc_study.engine import stream

WIDTHS, BATCH_SIZE, EPOCHS, STACK = (40, 128, 128, 10), 128, 50, 8
LOSS_TOLERANCE = 0.02  # between ways: float32 sums in another order, over some dozens of steps
RUNS = [Run(seed=seed, lr=0.005, gamma=0.25) for seed in range(2 * STACK)]

# From data and a number of epochs: each run's last training loss and test accuracy.
Way = Callable[[Dataset, int], tuple[list[float], list[float]]]

# ---- The ways --------------------------------------------------------------------------------------------------------


def stacked(n_runs: int, n_jobs: int) -> Way:
    """The study's engine: 8 runs a stack, one thread a process."""

    def way(data: Dataset, epochs: int) -> tuple[list[float], list[float]]:
        curves = train(
            RUNS[:n_runs], data, epochs=epochs, batch_size=BATCH_SIZE, widths=WIDTHS, stack_size=STACK, n_jobs=n_jobs
        )
        return curves.train_loss[:, -1].tolist(), curves.test_accuracy[:, -1].tolist()

    return way


def batch_order(run: Run, n: int, epochs: int) -> torch.Tensor:
    """The rows of each batch [epochs, n]: the order in which `train` draws them."""
    generator = stream(run.seed, 1)
    return torch.stack([torch.randperm(n, generator=generator) for _ in range(epochs)])


def one_at_a_time(data: Dataset, epochs: int) -> tuple[list[float], list[float]]:
    """The usual way: per-sample gradients by vmap, their sign consistency, torch.optim.Adam."""
    run = RUNS[0]
    model = mlp(WIDTHS, seed=run.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=run.lr)
    for order in batch_order(run, len(data.x_train), epochs):
        for batch in order.split(BATCH_SIZE):
            per_sample = per_sample_gradients(model, data.x_train[batch], data.y_train[batch])
            for name, p in model.named_parameters():
                p.grad = per_sample[name].mean(0) * sign_consistency(per_sample[name]) ** run.gamma
            optimizer.step()
        with torch.no_grad():
            parts = [(model(x), y) for x, y in (data[:2], data[2:4], data[4:])]
            losses = [F.cross_entropy(logits, y).item() for logits, y in parts]
            accuracies = [(logits.argmax(-1) == y).float().mean().item() for logits, y in parts]
    return [losses[0]], [accuracies[2]]


def jax_run(data: Dataset) -> tuple[Callable, Callable]:
    """Two functions: (parameters, batch order [E, T, B], lr, gamma) -> training loss and test accuracy of a whole run,
    by scan over epochs and steps; and (parameters, x, y) -> c of a batch."""
    import jax
    import jax.numpy as jnp

    parts = [(jnp.asarray(x.numpy()), jnp.asarray(y.numpy())) for x, y in (data[:2], data[2:4], data[4:])]

    def logits_of(parameters, x):
        for weight, bias in parameters[:-1]:
            x = jax.nn.relu(x @ weight.T + bias)
        return x @ parameters[-1][0].T + parameters[-1][1]

    def losses_of(parameters, x, y):
        log_p = jax.nn.log_softmax(logits_of(parameters, x))
        return -jnp.take_along_axis(log_p, y[..., None], -1)[..., 0]

    per_sample = jax.vmap(jax.grad(losses_of), in_axes=(None, 0, 0))

    def consistency(g):
        return jnp.abs(jnp.sign(g).mean(0))

    def step(carry, batch, lr, gamma):
        parameters, m, v, t = carry
        x, y = parts[0]
        gradients = per_sample(parameters, x[batch], y[batch])
        gradients = jax.tree.map(lambda g: g.mean(0) * consistency(g) ** gamma, gradients)
        t = t + 1
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, gradients)
        v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, v, gradients)

        def update(p, m, v):
            return p - lr * (m / (1 - 0.9**t)) / (jnp.sqrt(v / (1 - 0.999**t)) + 1e-8)

        return (jax.tree.map(update, parameters, m, v), m, v, t), None

    def epoch(carry, batches, lr, gamma):
        carry, _ = jax.lax.scan(lambda c, batch: step(c, batch, lr, gamma), carry, batches)

        def evaluate(x, y):
            return losses_of(carry[0], x, y).mean(), (logits_of(carry[0], x).argmax(-1) == y).mean()

        return carry, [evaluate(x, y) for x, y in parts]

    def whole(parameters, order, lr, gamma):
        zeros = jax.tree.map(jnp.zeros_like, parameters)
        carry = (parameters, zeros, zeros, jnp.zeros((), jnp.float32))
        _, measures = jax.lax.scan(lambda c, batches: epoch(c, batches, lr, gamma), carry, order)
        return measures[0][0][-1], measures[2][1][-1]

    return whole, lambda parameters, x, y: jax.tree.map(consistency, per_sample(parameters, x, y))


def jax_arguments(runs: list[Run], n: int, epochs: int) -> tuple:
    """What `jax_run`'s function takes, with the runs along the first axis."""
    import jax.numpy as jnp

    if n % BATCH_SIZE:
        raise ValueError(f"The training rows should fill whole batches of {BATCH_SIZE}. Found {n} rows.")
    models = [[p.detach() for p in mlp(WIDTHS, seed=run.seed).parameters()] for run in runs]
    tensors = [jnp.asarray(torch.stack(ps).numpy()) for ps in zip(*models, strict=True)]
    order = torch.stack([batch_order(run, n, epochs) for run in runs]).view(len(runs), epochs, -1, BATCH_SIZE)
    rates, gammas = (jnp.asarray([getattr(run, field) for run in runs], jnp.float32) for field in ("lr", "gamma"))
    return list(zip(tensors[::2], tensors[1::2], strict=True)), jnp.asarray(order.int().numpy()), rates, gammas


def jax_way(n_runs: int) -> Way:
    """JAX: one compiled function for the whole training, of one run or vmapped over a stack of runs."""
    compiled = []  # on the first call, which is not timed

    def way(data: Dataset, epochs: int) -> tuple[list[float], list[float]]:
        import jax

        if not compiled:
            compiled.append(jax.jit(jax.vmap(jax_run(data)[0]) if n_runs > 1 else jax_run(data)[0]))
        arguments = jax_arguments(RUNS[:n_runs], len(data.x_train), epochs)
        if n_runs == 1:
            arguments = jax.tree.map(lambda t: t[0], arguments)
        loss, accuracy = compiled[0](*arguments)
        return loss.reshape(-1).tolist(), accuracy.reshape(-1).tolist()

    return way


def ways(cores: int) -> dict[str, tuple[Way, int]]:
    """Each way with the number of runs that one call trains."""
    own = "stacked train, 1 process" if cores == 1 else f"stacked train, {cores} processes"
    return {
        own: (stacked(STACK * cores, cores), STACK * cores),
        "vmap, one run at a time": (one_at_a_time, 1),
        "JAX, one run at a time": (jax_way(1), 1),
        "JAX, vmapped over 8 runs": (jax_way(STACK), STACK),
    }


# ---- Checking and timing ---------------------------------------------------------------------------------------------


def check_consistency(data: Dataset) -> None:
    """Refuse to time anything where JAX's c on a batch is not PyTorch's; a few float32 signs near zero may differ."""
    import jax

    x, y = data.x_train[:BATCH_SIZE], data.y_train[:BATCH_SIZE]
    expected = sign_consistency(per_sample_gradients(mlp(WIDTHS, seed=0), x, y))
    parameters = jax.tree.map(lambda t: t[0], jax_arguments(RUNS[:1], len(data.x_train), 1)[0])
    found = jax.tree.leaves(jax_run(data)[1](parameters, x.numpy(), y.numpy()))
    wrong = sum(
        int((torch.tensor(f.tolist()) - e).abs().gt(1e-6).sum()) for f, e in zip(found, expected.values(), strict=True)
    )
    entries = sum(e.numel() for e in expected.values())
    note(f"c on one batch: {wrong} of {entries} entries differ between JAX and PyTorch")
    if wrong > 1e-4 * entries:
        raise RuntimeError(f"JAX's c should be PyTorch's. Found {wrong} of {entries} entries that differ.")


def time_ways(cores: int, epochs: int, rounds: int) -> list[dict]:
    """Time every way in turns on this process's cores; one row a way, with seconds for a run of 50 epochs."""
    torch.set_num_threads(cores)
    data = load_mnist1d()
    check_consistency(data)
    all_ways = ways(cores)
    first = {name: way(data, epochs) for name, (way, _) in all_ways.items()}  # also compiles and starts processes
    (own, *_), (losses, _) = all_ways, next(iter(first.values()))
    for name, (loss, _) in first.items():
        note(f"{cores} core(s), {name}: training loss of run 0 after {epochs} epochs {loss[0]:.5f}")
        if abs(loss[0] - losses[0]) > LOSS_TOLERANCE * losses[0]:
            raise RuntimeError(f"{name} should train as {own} does, to a loss of {losses[0]:.5f}. Found {loss[0]:.5f}.")
    taken: dict[str, list[float]] = {name: [] for name in all_ways}
    for _ in range(rounds):
        for name, (way, n_runs) in all_ways.items():
            start = time.perf_counter()
            way(data, epochs)
            taken[name].append((time.perf_counter() - start) / n_runs * EPOCHS / epochs)
    rows = []
    for name, (_, n_runs) in all_ways.items():
        loss, accuracy = (values[0] for values in first[name])
        rows.append(
            {
                "cores": cores,
                "method": name,
                "runs_a_call": n_runs,
                "rounds": rounds,
                "epochs_timed": epochs,
                "seconds_a_run": median_interval(taken[name])[0],
                **compared(taken, name, own, "ratio"),
                "train_loss": loss,
                "test_accuracy": accuracy,
            }
        )
    return rows


def main() -> None:
    args, folder = quick_or_not(__doc__)
    epochs, rounds = (1, 3) if args.quick else (3, 7)
    if args.cores:
        return print(json.dumps(time_ways(int(args.cores[0]), epochs, rounds)))
    quick = ["--quick"] * args.quick
    rows = [row for cores in (1, 2) for row in on_cores(cores, __file__, *quick)]
    frame = pd.DataFrame(rows).assign(machine=machine(), jax=importlib.metadata.version("jax"))
    write_table(frame, folder / "training.csv")
    note(frame.drop(columns=["machine", "jax"]).to_string(index=False, float_format="{:.3f}".format))


if __name__ == "__main__":
    main()
