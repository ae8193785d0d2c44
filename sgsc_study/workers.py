"""Where work is done: processes on this machine or a Dask cluster, and whether they compute the same bits."""

import gc
import hashlib
import json
import os
import platform
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from sgsc_study.cache import cached, code_version
from sgsc_study.data import Dataset
from sgsc_study.engine import stream, train_stack
from sgsc_study.gates import sign_gate
from sgsc_study.runs import Run

PATIENCE = 60  # seconds for which there may be no worker
CODE = code_version("sgsc_study.engine")  # as it is when this process loads it, whatever is edited later


def _settle() -> None:
    """One thread and float32 for all that follows: more threads add up in another order."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)


@contextmanager
def _settled() -> Iterator[None]:
    """A block that is settled (one thread, float32), after which all is as before."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    _settle()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)


def engine_version() -> list[str]:
    """What a trained run's bits depend on, beside its own settings: the code, torch and the `arithmetic`."""
    return [CODE, torch.__version__, arithmetic()]


@lru_cache
@_settled()
def arithmetic() -> str:
    """Fingerprint of how this process rounds: where two differ, the same runs end in other bits.

    PyTorch, MKL, oneDNN and NumPy choose their instructions by the processor or a variable of the environment. Some
    steps of training, a convolution and some logarithms show the choice, whatever made it.
    """
    x, y = torch.randn(512, 40, generator=stream(0, 1)), torch.arange(512) % 10
    runs = [Run(seed, lr=0.01, gamma=0.25) for seed in range(8)]
    settings: dict[str, Any] = {"epochs": 1, "batch_size": 128, "widths": (40, 128, 128, 10), "probe_size": 0}
    shown = train_stack(runs, Dataset(*(x, y) * 3), None, sign_gate, evaluate_every=1, **settings)
    kernels = torch.randn(25, 25, 3, generator=stream(1, 1))
    shown["convolution"] = F.conv1d(x[:500].view(20, 25, 40), kernels, stride=2, padding=1).numpy()
    for kind in (np.float32, np.float64):
        numbers = np.linspace(0.01, 9, 1000, dtype=kind)
        shown |= {f"{f.__name__} {numbers.dtype}": f(numbers) for f in (np.log, np.exp)}
    digest = hashlib.sha256()
    for name, array in shown.items():
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:12]


def by_same_engine(version: list[str], function: Callable[..., Any], *given: Any) -> Any:
    """Return `function(*given)`, on one thread; RuntimeError where this process has not that `engine_version`."""
    _settle()  # before the fingerprint, which restores what it finds: on a cluster another task may be running beside
    refuse_stranger(f"process {os.getpid()} on {platform.node()}", version, engine_version())
    return function(*given)


def refuse_stranger(worker: str, version: list[str], found: Any) -> None:
    """RuntimeError, which names the worker, where not its caller's `engine_version` was found there."""
    if found != version:
        raise RuntimeError(
            f"The worker {worker} should have its caller's code, torch and arithmetic, {version}. Found {found!r}: "
            "install the same on the workers, and start them with the same ATEN_CPU_CAPABILITY, MKL_CBWR, "
            "ONEDNN_MAX_CPU_ISA and NPY_DISABLE_CPU_FEATURES."
        )


@_settled()
def parallel(
    function: Callable[..., Any],
    tasks: Sequence[tuple],
    *,
    n_jobs: int = -1,
    scheduler: str = "",
    cache: str | os.PathLike | None = None,
    keys: Sequence[Any] = (),
    progress: str | None = None,
) -> list[Any]:
    """`[function(*task) for task in tasks]`, on `n_jobs` processes (-1: one a core) or a Dask cluster's workers.

    A task has one thread, and float32 as torch's default. With `cache`, a folder, a result is read from it where the
    same code computed it before from the same of `keys`, one for each task, that json can write (left out: the tasks
    themselves); then `function` should have a name in its module. `progress` is a label under which tasks done and time
    left are printed to stderr. Raises ValueError for another function.

    >>> parallel(divmod, [(7, 2), (9, 4)], n_jobs=1)
    [(3, 1), (2, 1)]
    """
    engine = engine_version()
    jobs = [partial(by_same_engine, engine, function, *task) for task in tasks]
    if cache is not None:
        name = getattr(function, "__qualname__", "<none>")
        if "<" in name:  # a lambda's, or that of a function made within another, which tells them not apart
            raise ValueError(f"`function` should have a name in its module where `cache` is given. Found {function}.")
        made_by = [function.__module__, name, code_version(function.__module__), engine]
        told = [json.dumps([*made_by, key]) for key in keys or tasks]
        jobs = [partial(cached, Path(cache), key, job) for key, job in zip(told, jobs, strict=True)]
    with on_workers(scheduler, n_jobs, len(tasks)) as run:
        return list(with_progress(run(jobs, progress), len(tasks), progress))


@contextmanager
def on_workers(scheduler: str, n_jobs: int, n_tasks: int) -> Iterator[Callable[[Sequence, str | None], Iterator]]:
    """Who runs jobs: a function that gives their results in order, by processes here or by a Dask scheduler's workers.

    Raises ValueError for a scheduler that does not answer, and RuntimeError, which names the worker, where one should
    not take part or the last one is gone.
    """
    if not scheduler:
        own = {"initializer": end_with, "initargs": (os.getpid(),)}
        before = os.environ.get("PYTHONSAFEPATH", "")
        os.environ["PYTHONSAFEPATH"] = "1"  # a random.py in the working folder is not the one that a worker asks for
        try:
            with joblib.parallel_config("loky", n_jobs=min(joblib.effective_n_jobs(n_jobs), max(n_tasks, 1)), **own):
                yield lambda jobs, _: joblib.Parallel(return_as="generator")(joblib.delayed(job)() for job in jobs)
        finally:
            os.environ["PYTHONSAFEPATH"] = before  # "" is as good as none
        return
    from distributed import Client, KilledWorker  # only a cluster needs it

    gc.collect()  # a client that found no scheduler closes when it is collected; within another's start that hangs
    try:
        client = Client(scheduler, timeout="10s")
    except (OSError, ValueError) as error:
        told = f"`scheduler` should be a running Dask scheduler's tcp://host:port. Found {scheduler!r}: {error}"
        raise ValueError(told) from None
    with client:
        try:
            client.wait_for_workers(1, timeout=PATIENCE)
        except TimeoutError:
            told = f"`scheduler` should have a worker. Found none at {scheduler} in {PATIENCE} seconds."
            raise RuntimeError(told) from None
        refuse_strangers(client)
        try:
            yield partial(on_cluster, client)
        except KilledWorker:  # it names the last one of those that a task has ended
            raise
        except Exception:
            refuse_strangers(client)  # one that came later is the better reason
            raise


def refuse_strangers(client: Any) -> None:
    """Refuse the cluster's workers that compute otherwise than this process, or not at all."""
    for address, found in client.run(engine_version, on_error="return").items():
        refuse_stranger(address, engine_version(), found)


def on_cluster(client: Any, jobs: Sequence[Callable[[], Any]], label: str | None) -> Iterator:
    """The jobs' results in order; a few are handed out at a time, and a lost worker's go to the others.

    Under the `label` it prints how many workers there are, whenever that changes.
    """
    left, handed_out, known, seen, told = iter(jobs), deque(), {}, time.monotonic(), 0
    while True:
        threads = client.nthreads()
        if not threads and time.monotonic() - seen > PATIENCE:
            raise RuntimeError(f"The workers of the `scheduler`, {[*known]}, are gone for {PATIENCE} seconds.")
        if label and len(threads) != told:
            print(f"  {label}: number of workers: {len(threads)}", file=sys.stderr)
        told = len(threads)
        if threads:
            known, seen = threads, time.monotonic()
        room = max(4 * sum(threads.values()), 1) - len(handed_out)
        handed_out.extend(client.submit(job, pure=False) for job in islice(left, max(room, 0)))
        if not handed_out:
            return
        try:
            result = handed_out[0].result(timeout=5)
        except TimeoutError:
            if handed_out[0].done():  # the job's own
                raise
            continue
        handed_out.popleft()
        yield result


def end_with(parent: int) -> None:
    """Have this worker end with its parent: if that is killed while it hands over a task, it would wait for ever."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def with_progress(items: Iterable, total: int, label: str | None) -> Iterator:
    """Pass `items` on; tqdm prints a line to stderr every 10 seconds and at the end, under the `label` (None: none).

    >>> sum(with_progress((k * k for k in range(4)), 4, None))
    14
    """
    # a bar that is drawn over would be unreadable in a log and dead in an executed notebook
    line = "  {desc}: {n_fmt}/{total_fmt} done, {elapsed} so far, {remaining} left\n"
    yield from tqdm(
        items, label, total, mininterval=10, miniters=1, file=sys.stderr, disable=label is None, bar_format=line
    )
