"""The data, the model, stacked training and the measures, each against an independent truth."""

import functools
import itertools
import json
import math
import os
import platform
import random
import subprocess
import sys
import time

import joblib
import matplotlib.pyplot as plt
import numpy as np
import optuna
import pandas as pd
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import FloatDistribution
from statsmodels.stats.proportion import proportion_confint
from torch import nn

import sgsc_lib
from sgsc_lib import (
    SGSC,
    Dataset,
    Run,
    adam_step_,
    compare_paired,
    draw_mnist1d,
    load_mnist1d,
    mlp,
    noise_floor,
    per_sample_gradients,
    sign_consistency,
    smoothness,
    train,
    tune,
)

EVERY_CURVE = ("step_loss", "probe_loss", *sgsc_lib.EPOCH_CURVES, "fresh_loss", "fresh_accuracy")


@pytest.fixture(scope="module")
def data() -> Dataset:
    return load_mnist1d()


@pytest.fixture(scope="module")
def small(data: Dataset) -> Dataset:
    return Dataset(*(part[:96] for part in data))


# -- data --------------------------------------------------------------------------------------------------------------


def test_data_have_the_published_hash_shapes_and_types(data):
    assert sgsc_lib.sha256_of(*draw_mnist1d()) == sgsc_lib.DATA_SHA256
    assert [tuple(part.shape) for part in data] == [(3200, 40), (3200,), (800, 40), (800,), (1000, 40), (1000,)]
    assert {part.dtype for part in data[::2]} == {torch.float32} and {part.dtype for part in data[1::2]} == {
        torch.int64
    }


def test_validation_is_cut_from_training_and_test_stays(data):
    whole = load_mnist1d(valid_fraction=0.0)
    assert torch.equal(torch.cat([data.x_train, data.x_valid]), whole.x_train)
    assert torch.equal(data.x_test, whole.x_test) and len(whole.x_valid) == 0


@pytest.mark.parametrize("noise", [0.1, 0.5, 1.0])
def test_label_noise_is_exact_and_touches_training_labels_only(data, noise):
    noisy = load_mnist1d(label_noise=noise)
    assert int((noisy.y_train != data.y_train).sum()) == round(noise * 3200)
    assert torch.equal(noisy.y_valid, data.y_valid) and torch.equal(noisy.y_test, data.y_test)
    assert torch.equal(noisy.x_train, data.x_train) and noisy.y_train.min() >= 0 and noisy.y_train.max() <= 9


def test_loading_keeps_numpys_global_state_and_protects_the_cached_draw(data):
    before = np.random.get_state()[1].copy()
    draw_mnist1d.__wrapped__(100, seed=7)
    assert np.array_equal(before, np.random.get_state()[1])
    load_mnist1d().x_train.zero_()
    assert torch.equal(load_mnist1d().x_train, data.x_train)


def test_another_data_set_under_the_default_seed_is_refused(monkeypatch):
    monkeypatch.setattr(sgsc_lib, "DATA_SHA256", "0" * 64)
    with pytest.raises(RuntimeError, match="should have SHA-256 0000"):
        draw_mnist1d.__wrapped__(5000, seed=42)


# -- model -------------------------------------------------------------------------------------------------------------


def test_mlp_is_pytorchs_own_initialisation_without_its_global_state():
    torch.manual_seed(3)
    own = nn.Sequential(nn.Linear(40, 16), nn.ReLU(), nn.Linear(16, 10))
    state = torch.get_rng_state()
    made = mlp((40, 16, 10), seed=3)
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), made.parameters(), strict=True))
    assert torch.equal(state, torch.get_rng_state()) and [type(m) for m in made] == [type(m) for m in own]


# -- training ----------------------------------------------------------------------------------------------------------

RUNS = [
    Run(s, lr, g, p)
    for (s, lr), (g, p) in itertools.product(
        [(0, 0.003), (1, 0.02)], [(0.0, "before"), (0.3, "before"), (0.3, "after")]
    )
]
RUNS += [Run(0, 0.01, 0.5, p, c) for p in ("before", "after") for c in ("permuted", "layer-mean", "frozen")]
SHORT = {"epochs": 2, "batch_size": 40, "widths": (40, 24, 10), "probe_size": 8}


def test_a_run_is_the_same_alone_and_in_any_stack(small):
    fresh = small.x_test, small.y_test
    together = train(RUNS, small, fresh=fresh, n_jobs=1, stack_size=5, **SHORT)
    shuffled = train(RUNS[::-1], small, fresh=fresh, n_jobs=2, stack_size=3, **SHORT)
    for r, run in enumerate(RUNS):
        alone = train([run], small, fresh=fresh, n_jobs=1, **SHORT)
        for name in EVERY_CURVE:
            assert np.array_equal(getattr(alone, name)[0], getattr(together, name)[r]), (run, name)
            assert np.array_equal(getattr(alone, name)[0], getattr(shuffled, name)[len(RUNS) - 1 - r]), (run, name)


def test_a_diverging_run_keeps_its_nans_and_does_not_disturb_its_neighbours(small):
    quiet, wild = Run(0, 0.01, 0.25), Run(1, 1e30, 0.25)
    both, alone = train([quiet, wild], small, n_jobs=1, **SHORT), train([quiet], small, n_jobs=1, **SHORT)
    assert not np.isfinite(both.train_loss[1, -1]) and np.isfinite(both.train_loss[0]).all()
    assert np.array_equal(both.step_loss[0], alone.step_loss[0]) and np.array_equal(
        both.train_loss[0], alone.train_loss[0]
    )


def by_hand(run: Run, data: Dataset, epochs: int, batch_size: int, widths: tuple) -> list[float]:
    """The same run with torch's own modules, torch.optim.Adam and SGSC: the loss of every step."""
    model = mlp(widths, seed=run.seed).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=run.lr)
    order, losses = sgsc_lib._stream(run.seed, 1), []
    with SGSC(model, run.gamma) as sgsc:
        for _ in range(epochs):
            for batch in torch.randperm(len(data.x_train), generator=order).split(batch_size):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(data.x_train[batch]), data.y_train[batch])
                loss.backward()
                losses.append(loss.item())
                if run.placement == "before":
                    sgsc.scale_gradients_()
                    optimizer.step()
                else:
                    with sgsc.scaled_update():
                        optimizer.step()
    return losses


@pytest.mark.parametrize("run", RUNS[:6], ids=str)
def test_training_equals_torchs_modules_and_optimiser_in_float64(small, run):
    double = Dataset(*(part.double() if part.is_floating_point() else part for part in small))
    curves = train([run], double, n_jobs=1, epochs=3, batch_size=40, widths=(40, 24, 10))
    np.testing.assert_allclose(curves.step_loss[0], by_hand(run, double, 3, 40, (40, 24, 10)), rtol=1e-9)


def test_gamma_zero_is_plain_adam_bit_for_bit(small):
    mixed = train([Run(0, 0.01, 0.0, "after"), Run(0, 0.01, 0.5, "after")], small, n_jobs=1, **SHORT)
    plain = train([Run(0, 0.01)], small, n_jobs=1, **SHORT)
    assert np.array_equal(mixed.step_loss[0], plain.step_loss[0])
    assert not np.array_equal(mixed.step_loss[1], plain.step_loss[0])


def test_our_adam_is_torchs_adam_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(1, 7, 5, generator=generator)
    theirs = p[0].clone().requires_grad_()
    optimizer, moments = torch.optim.Adam([theirs], lr=0.0123), [(torch.zeros_like(p), torch.zeros_like(p))]
    for step in range(1, 51):
        g = torch.randn(1, 7, 5, generator=generator) * 10.0 ** (step % 7 - 5)
        theirs.grad = g[0].clone()
        optimizer.step()
        adam_step_([p], [g], moments, torch.tensor([0.0123], dtype=torch.float64), step)
        assert torch.equal(p[0], theirs)


def test_layer_mean_and_permuted_controls_keep_the_mean_gate_and_frozen_keeps_the_first():
    gate = torch.rand(2, 6, 4, generator=torch.Generator().manual_seed(0))
    generators = [torch.Generator().manual_seed(s) for s in (1, 2)]
    (mean,) = sgsc_lib._controlled([gate], "layer-mean", None, generators)
    (permuted,) = sgsc_lib._controlled([gate], "permuted", None, generators)
    first = [torch.ones_like(gate)]
    torch.testing.assert_close(mean[1], gate[1].mean().expand(6, 4))
    assert torch.equal(permuted.flatten(1).sort().values, gate.flatten(1).sort().values) and not torch.equal(
        permuted, gate
    )
    assert sgsc_lib._controlled([gate], "frozen", first, generators) is first


def test_the_cache_answers_for_the_same_code_only(small, tmp_path, monkeypatch):
    first = train(RUNS[:2], small, cache=tmp_path, n_jobs=1, **SHORT)
    monkeypatch.setattr(torch.autograd, "grad", None)  # whoever trains now fails
    again = train(RUNS[:2], small, cache=tmp_path, n_jobs=1, **SHORT)
    assert all(np.array_equal(getattr(first, n), getattr(again, n), equal_nan=True) for n in EVERY_CURVE)
    monkeypatch.setattr(sgsc_lib, "BETA1", 0.8)
    with pytest.raises(TypeError, match="not callable"):
        train(RUNS[:2], small, cache=tmp_path, n_jobs=1, **SHORT)


def test_the_cache_key_covers_every_function_that_training_uses():
    source = sgsc_lib.source_of(sgsc_lib._train_stack)
    for name in (
        "_train_stack",
        "_forward",
        "_losses",
        "_evaluate",
        "adam_step_",
        "_controlled",
        "factored_sums",
        "_nonzero",
        "_stream",
        "_stacked_parameters",
        "mlp",
    ):
        assert f"def {name}(" in source, name
    assert "BETA2 = 0.999" in source and "SUMS['square'] = square" in source
    assert "def power_gate(" in sgsc_lib.source_of(sgsc_lib.GATES["sign"])  # a stack's key holds that of its gate


# -- gates and relatives -----------------------------------------------------------------------------------------------

# Each gate from per-sample gradients g [B, *shape] as its paper has it: no factors, no sums.
DEFINITIONS = {
    "sign": lambda g, gamma: g.sign().mean(0).abs() ** gamma,
    "active": lambda g, gamma: (g.sign().sum(0).abs() / (g != 0).sum(0)).nan_to_num(0) ** gamma,
    "magnitude": lambda g, gamma: (g.mean(0).abs() / g.abs().mean(0)).nan_to_num(0) ** gamma,
    "snr": lambda g, gamma: (1 / (1 + g.var(0, correction=0) / g.mean(0) ** 2)).nan_to_num(0) ** gamma,
    "and-mask": lambda g, gamma: (mask := (g.sign().mean(0).abs() >= gamma).to(g.dtype)) / (mask.mean() + 1e-10),
}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.lists(st.integers(1, 7), min_size=2, max_size=4))
@pytest.mark.parametrize("name", sgsc_lib.GATES)
def test_each_gate_is_its_definition_on_per_sample_gradients(name, seed, batch_size, widths):
    draw = torch.Generator().manual_seed(seed)
    model = mlp(widths, seed=seed).double()
    x, y = torch.randn(batch_size, widths[0], generator=draw).double(), torch.randint(widths[-1], (batch_size,))
    gamma = 0.25 + torch.rand((), generator=draw).item() / 2
    inputs, outputs = sgsc_lib._forward([p.detach().unsqueeze(0) for p in model.parameters()], x.unsqueeze(0))
    for output in outputs:
        output.requires_grad_()
    inputs, outputs = sgsc_lib._forward([p.detach().unsqueeze(0) for p in model.parameters()], x.unsqueeze(0))
    errors = torch.autograd.grad(sgsc_lib._losses(outputs[-1], y.unsqueeze(0)).sum(), outputs)
    sums = {"total": lambda t: t, **sgsc_lib.SUMS}
    found = []
    for a, delta in zip(inputs, errors, strict=True):
        by_name = {key: sgsc_lib.factored_sums(a, delta, sums[key]) for key in sgsc_lib.sums_of(sgsc_lib.GATES[name])}
        for k in range(2):
            tensors = [pair[k] for pair in by_name.values()]
            gammas = torch.tensor([gamma], dtype=torch.float64)
            found.append(sgsc_lib.GATES[name](*tensors, batch_size=batch_size, gamma=gammas)[0])
    for gate, g in zip(found, per_sample_gradients(model, x, y).values(), strict=True):
        # where the mean gradient is a rounding error of zero, two ways round differently
        settled = (g.mean(0).abs() > 1e-12 * g.abs().mean(0)) | (g.abs().amax(0) == 0)
        expected = DEFINITIONS[name](g, gamma)
        if name == "and-mask":
            settled = torch.ones_like(settled)
        torch.testing.assert_close(gate[settled], expected[settled], rtol=1e-8, atol=1e-12)


def by_reference(run: Run, data: Dataset, epochs: int, batch_size: int, widths: tuple) -> list[float]:
    """A run from per-sample gradients, torch.optim.AdamW and torch's scheduler: the loss of every step."""
    model = mlp(widths, seed=run.seed).double()
    parameters, order, losses = list(model.parameters()), sgsc_lib._stream(run.seed, 1), []
    optimizer = torch.optim.AdamW(parameters, lr=run.lr, weight_decay=run.weight_decay)
    steps = epochs * math.ceil(len(data.x_train) / batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(data.x_train), generator=order).split(batch_size):
            x, y = data.x_train[batch], data.y_train[batch]
            smoothed = functools.partial(F.cross_entropy, label_smoothing=run.label_smoothing)
            losses.append(smoothed(model(x), y).item())
            per_sample = list(per_sample_gradients(model, x, y, smoothed).values())
            before = [p.detach().clone() for p in parameters]
            gated = [DEFINITIONS[run.gate](g, run.gamma) for g in per_sample] if run.gate in DEFINITIONS else None
            for k, (p, g) in enumerate(zip(parameters, per_sample, strict=True)):
                vote = run.gate == "vote"
                p.grad = g.sign().mean(0).sign() if vote else g.mean(0)
                if gated and run.placement == "before":
                    p.grad = p.grad * gated[k]
            gradients = [p.grad.clone() for p in parameters]
            optimizer.step()
            with torch.no_grad():
                for k, (p, old) in enumerate(zip(parameters, before, strict=True)):
                    update = p - old
                    if gated and run.placement == "after":
                        update = update * gated[k]
                    if run.gate == "cautious":
                        agrees = (update * gradients[k] < 0).double()
                        update = update * agrees / agrees.mean().clamp(min=1e-3)
                    if run.gate == "vote" and run.placement == "after":
                        update = -optimizer.param_groups[0]["lr"] * gradients[k]
                    p.copy_(old + update)
            if run.schedule == "cosine":
                schedule.step()
    return losses


RELATED = [
    Run(0, 0.01, 0.4, p, gate=g) for p in ("before", "after") for g in ("active", "magnitude", "snr", "and-mask")
]
RELATED += [Run(0, 0.003, 1.0, p, gate="vote") for p in ("before", "after")]
RELATED += [
    Run(0, 0.01, 1.0, "after", gate="cautious"),
    Run(0, 0.01, schedule="cosine"),
    Run(0, 0.01, weight_decay=0.3),
    Run(0, 0.01, label_smoothing=0.2),
    Run(0, 0.05, 0.5, "after", schedule="cosine", label_smoothing=0.1),
]


@pytest.mark.parametrize("run", RELATED, ids=str)
def test_every_relative_and_remedy_trains_as_torch_does_it_from_per_sample_gradients(small, run):
    double = Dataset(*(part.double() if part.is_floating_point() else part for part in small))
    curves = train([run], double, n_jobs=1, epochs=3, batch_size=40, widths=(40, 24, 10))
    tolerance = 1e-6 if run.gate == "snr" else 1e-8
    np.testing.assert_allclose(curves.step_loss[0], by_reference(run, double, 3, 40, (40, 24, 10)), rtol=tolerance)


def test_a_relative_is_the_same_alone_and_in_a_stack(small):
    together = train([*RELATED, *RUNS], small, n_jobs=1, **SHORT)
    for r, run in enumerate(RELATED):
        alone = train([run], small, n_jobs=1, **SHORT)
        assert np.array_equal(alone.step_loss[0], together.step_loss[r]), run


def test_a_gate_of_ones_own_trains_on_other_processes_and_has_a_cache_of_its_own(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sgsc_lib.GATES, "mine", lambda sign, *, batch_size, gamma: (sign.abs() / batch_size) ** 0.5)
    mine, ours = Run(0, 0.01, 0.5, gate="mine"), Run(0, 0.01, 0.5)
    found = train([mine] * 2 + [ours], small, n_jobs=2, stack_size=1, cache=tmp_path, **SHORT)
    np.testing.assert_allclose(found.step_loss[0], found.step_loss[2], rtol=1e-5)
    monkeypatch.setitem(sgsc_lib.GATES, "mine", lambda sign, *, batch_size, gamma: sign * 0.0)
    again = train([mine], small, n_jobs=1, cache=tmp_path, **SHORT)
    assert not np.array_equal(again.step_loss[0], found.step_loss[0])


def test_evaluating_seldom_changes_nothing_but_the_rows(small):
    often, seldom = (train(RUNS[:3], small, n_jobs=1, evaluate_every=k, **SHORT | {"epochs": 5}) for k in (1, 2))
    assert seldom.evaluated.tolist() == [2, 4, 5] and often.evaluated.tolist() == [1, 2, 3, 4, 5]
    assert np.array_equal(seldom.test_loss, often.test_loss[:, [1, 3, 4]])
    assert seldom.frame()["epoch"].tolist() == [2, 4, 5] * 3
    assert "epoch_roughness" not in seldom.final() and "epoch_roughness" in often.final()


# -- the cache and tuning survive --------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["truncated", "emptied", "flipped"])
def test_a_damaged_cache_entry_is_computed_again(small, tmp_path, damage, capfd):
    first = train(RUNS[:2], small, cache=tmp_path, n_jobs=1, **SHORT)
    entries = list(tmp_path.rglob("output.pkl"))
    assert entries
    for entry in entries:
        whole = bytearray(entry.read_bytes())
        if damage == "flipped":
            where = max(whole.find(row.tobytes()) for row in first.step_loss)  # one bit of one loss
            assert where > 0
            whole[where + 2] ^= 1
        entry.write_bytes({"truncated": whole[: len(whole) // 2], "emptied": b"", "flipped": whole}[damage])
    again = train(RUNS[:2], small, cache=tmp_path, n_jobs=1, **SHORT)
    assert all(np.array_equal(getattr(first, n), getattr(again, n), equal_nan=True) for n in EVERY_CURVE)
    if damage == "flipped":
        assert "is damaged: training it again" in capfd.readouterr().err


SPACE = {"lr": FloatDistribution(1e-3, 1e-1, log=True), "gamma": FloatDistribution(0.0, 2.0), "placement": "after"}
SEARCH = {"study": "test", "n_studies": 2, "n_trials": 7, "ask_batch": 3, "epochs": 1, "batch_size": 40, "n_jobs": 1}


def search(data: Dataset, cache, **changes) -> pd.DataFrame:
    arms = {"Adam": {"lr": SPACE["lr"]}, "after": SPACE}
    return tune(arms, data, cache=cache, widths=(40, 10), **SEARCH | changes)


class Stop(Exception):
    """As good as a kill: raised in the middle of a call, with nothing tidied up."""


@pytest.mark.parametrize("call", ["ask", "tell", "train"])
def test_a_search_stopped_anywhere_has_the_history_of_one_that_was_not(small, tmp_path, monkeypatch, call):
    whole, stops = search(small, tmp_path / "whole"), 0
    owner = sgsc_lib if call == "train" else optuna.Study
    original, budget = getattr(owner, call), [0]

    @functools.wraps(original)
    def stopping(*args, **kwargs):
        budget[0] -= 1
        if budget[0] < 0:
            raise Stop
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, call, stopping)
    for attempt in range(1, 30):
        budget[0] = 1 if call == "train" else 5 * attempt
        try:
            resumed = search(small, tmp_path / "stopped")
            break
        except Stop:
            stops += 1
    assert 2 <= stops < 29
    pd.testing.assert_frame_equal(resumed, whole, check_exact=True)
    assert whole.groupby(["arm", "study"]).size().tolist() == [7] * 4


def test_a_damaged_journal_is_refused_by_name(small, tmp_path):
    search(small, tmp_path, n_trials=2)
    (journal,) = tmp_path.rglob("*.journal")
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:3], b'{"broken\n', *lines[4:]]))
    with pytest.raises(RuntimeError, match=r"storage can't be read.*Delete .*test\.journal"):
        search(small, tmp_path, n_trials=2)


def journal_of(folder):
    (journal,) = folder.rglob("*.journal")
    return journal


def test_a_bit_of_a_journal_that_flipped_is_noticed_wherever_it_is(small, tmp_path):
    whole = search(small, tmp_path, n_trials=2)
    journal, at = journal_of(tmp_path), random.Random(0)
    written = journal.read_bytes()
    for _ in range(25):
        byte = at.randrange(len(written))
        journal.write_bytes(written[:byte] + bytes([written[byte] ^ 1 << at.randrange(8)]) + written[byte + 1 :])
        with pytest.raises(RuntimeError, match=r"not what its seal says.*Delete .*test\.journal"):
            search(small, tmp_path, n_trials=2)
    journal.write_bytes(written[:-9])
    with pytest.raises(RuntimeError, match="not what its seal says: truncated"):
        search(small, tmp_path, n_trials=2)
    journal.unlink()  # as the error says
    pd.testing.assert_frame_equal(search(small, tmp_path, n_trials=2), whole, check_exact=True)


def test_a_line_that_a_power_cut_left_unfinished_is_cut_off(small, tmp_path):
    whole = search(small, tmp_path / "whole")
    part = search(small, tmp_path / "stopped", n_trials=3)
    journal = journal_of(tmp_path / "stopped")
    with open(journal, "ab") as file:
        file.write(b'{"op_code": 4, "worker_id": "half a li')
    pd.testing.assert_frame_equal(search(small, tmp_path / "stopped", n_trials=3), part, check_exact=True)
    assert journal.read_bytes().endswith(b"\n")
    pd.testing.assert_frame_equal(search(small, tmp_path / "stopped"), whole, check_exact=True)


def test_two_searches_on_one_journal_take_turns(small, tmp_path):
    whole = search(small, tmp_path / "whole")
    both = joblib.Parallel(n_jobs=2)(joblib.delayed(search)(small, tmp_path / "both") for _ in range(2))
    for each in both:
        pd.testing.assert_frame_equal(each, whole, check_exact=True)


def test_processes_on_one_database_ask_with_seeds_of_their_own(monkeypatch):
    assert sgsc_lib._sampler_seed(2, 3, shared=False) == 2003
    seeds = set()
    for machine, process in itertools.product(("one", "two"), range(50)):
        monkeypatch.setattr(sgsc_lib.platform, "node", lambda machine=machine: machine)
        monkeypatch.setattr(sgsc_lib.os, "getpid", lambda process=process: process)
        seeds |= {sgsc_lib._sampler_seed(study, n, shared=True) for study in range(3) for n in range(5)}
    assert len(seeds) == 2 * 50 * 15


def test_a_worker_ends_with_the_process_it_works_for():
    """Even one that waits for the rest of a task, as after a kill in the middle of handing it over."""
    worker = (
        "import os, sys, sgsc_lib as s; s._end_with(os.getppid()); print(os.getpid(), flush=True); sys.stdin.read()"
    )
    script = (
        "import os, subprocess, sys, time\n"
        f"worker = subprocess.Popen([sys.executable, '-c', {worker!r}], stdin=-1, stdout=-1)\n"
        "os.set_inheritable(worker.stdin.fileno(), True)\n"
        "print(int(worker.stdout.readline()), flush=True)\n"
        "subprocess.Popen(['sleep', '20'], close_fds=False)  # holds the pipe open: no end of file comes\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    parent.kill()
    deadline = time.monotonic() + 15
    while os.path.exists(f"/proc/{worker}") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not os.path.exists(f"/proc/{worker}")


@pytest.mark.parametrize(
    ("gate", "error", "message"),
    [
        (lambda sign, *, batch_size: sign, TypeError, r"a `\*`, the keywords `batch_size` and `gamma`"),
        (lambda sign, batch_size, gamma: sign, TypeError, r"a `\*`, the keywords `batch_size` and `gamma`"),
        (lambda cube, *, batch_size, gamma: cube, ValueError, "should be of total, sign, .* Found cube"),
        (lambda sign, *, batch_size, gamma: sign.mean(), ValueError, r"should return \[R, \*shape\].* Found \(\(\),"),
        (lambda sign, *, batch_size, gamma: sign - sign.mean(), ValueError, "should not mix runs"),
        (lambda sign, *, batch_size, gamma: sign * math.nan, ValueError, "finite numbers of its sums. Found NaN"),
        (
            lambda active, *, batch_size, gamma: 1 / active,
            ValueError,
            "where no sample has a gradient, which are all 0",
        ),
        (lambda total, square, *, batch_size, gamma: total**2 / square.clamp(min=1e-70), ValueError, "NaN or infinity"),
        (lambda sign, *, batch_size, gamma: sign.double(), ValueError, r"in the dtype of its sums.* Found .*float64"),
        (
            lambda sign, *, batch_size, gamma: sign.abs() * sign.abs().mean((1, 2), keepdim=True),
            ValueError,
            r"here a bias's \(2, 5\)",
        ),
        (lambda sign, *, batch_size, gamma: sign.abs() / sign.abs().max().clamp(min=1), ValueError, "should not mix"),
        (lambda sign, *, batch_size, gamma: sign.abs() ** float(gamma[0]), ValueError, "each run its own γ"),
        (lambda total, *, batch_size, gamma: total.abs_(), ValueError, "Found them changed in place"),
        (lambda total, *, batch_size, gamma: torch.rand_like(total), ValueError, "is it random"),
        (lambda sign, *, batch_size, gamma: sign * gamma, ValueError, r"`gamma` \[R\]; align_runs\(gamma, sum\)"),
        (lambda sign, *, batch_size, gamma: sign / batch_size, ValueError, r"factors of 0 or more.* sum.abs\(\)"),
        (lambda sign, *, batch_size, gamma: (sign / batch_size) ** 0.5, ValueError, r"a power.* sum.abs\(\)"),
    ],
)
def test_what_is_no_gate_is_refused_before_any_training(small, monkeypatch, gate, error, message):
    monkeypatch.setitem(sgsc_lib.GATES, "mine", gate)
    with pytest.raises(error, match=message):
        train([Run(0, 0.1, 1.0, gate="mine")], small, n_jobs=1, **SHORT)


@pytest.mark.parametrize("name", sgsc_lib.RELATIVES)
def test_a_gate_with_the_name_of_another_method_is_refused(small, monkeypatch, name):
    monkeypatch.setitem(sgsc_lib.GATES, name, sgsc_lib.sign_gate)
    with pytest.raises(ValueError, match=f"The gate '{name}' should have another name"):
        train([Run(0, 0.1, 1.0, "after", gate=name)], small, n_jobs=1, **SHORT)


def test_a_gate_whose_loss_is_lost_in_training_is_named(small, monkeypatch):
    def mine(total, *, batch_size, gamma):  # finite on every small sum that the check tries
        return torch.where(total.abs() < 1e-3, torch.nan, 1.0) if total.shape[-1] > 5 else torch.ones_like(total)

    monkeypatch.setitem(sgsc_lib.GATES, "mine", mine)
    with pytest.warns(UserWarning, match="The loss of 1 runs with the gate 'mine' is not finite"):
        train([Run(0, 0.1, 1.0, gate="mine"), Run(0, 0.1)], small, n_jobs=1, **SHORT)


def test_trials_without_validation_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`data` should have validation rows"):
        search(load_mnist1d(100, valid_fraction=0.0), tmp_path)


@pytest.mark.parametrize("part", range(3))  # source, torch, arithmetic
def test_a_worker_with_another_engine_is_refused(part):
    version = sgsc_lib.engine_version()
    version[part] = "another"
    with pytest.raises(RuntimeError, match="A worker should have the sgsc_lib, the torch and the arithmetic of the"):
        sgsc_lib.by_same_engine(version, abs, -1)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the variables are those of x86-64")
def test_arithmetic_tells_instructions_that_round_otherwise_apart():
    ask = "import sgsc_lib, torch; print(sgsc_lib.arithmetic(), torch.get_num_threads())"
    own, threads, *others = (
        subprocess.run(
            [sys.executable, "-c", ask], env=os.environ | variables, check=True, capture_output=True, text=True
        ).stdout.split()
        for variables in (
            {},
            {"OMP_NUM_THREADS": "2"},
            {"ATEN_CPU_CAPABILITY": "default"},
            {"MKL_CBWR": "COMPATIBLE"},
            {"ONEDNN_MAX_CPU_ISA": "SSE41"},
            {"NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4"},
        )
    )
    assert own[0] == threads[0] == sgsc_lib.arithmetic() and threads[1] == "2"
    assert len({own[0], *(fingerprint for fingerprint, _ in others)}) == 5


def test_a_cached_entry_of_another_kind_is_computed_again(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(sgsc_lib, "_sealed_stack", functools.wraps(sgsc_lib._sealed_stack)(lambda key, compute: 1.5))
    with pytest.raises(TypeError):
        sgsc_lib.cached(tmp_path, "one", lambda: {"zeros": np.zeros(2)})
    assert "is damaged: training it again" in capfd.readouterr().err


def test_processes_that_share_a_database_share_the_trials(small, tmp_path):
    url = f"sqlite:///{tmp_path / 'trials.db'}"  # empty: both find no tables there
    own = {"storage": url, "n_studies": 1, "n_trials": 5}
    both = joblib.Parallel(n_jobs=2)(joblib.delayed(search)(small, tmp_path / str(k), **own) for k in range(2))
    assert all(part.groupby(["arm", "study"]).size().tolist() == [5] * 2 for part in both)
    pd.testing.assert_frame_equal(*both)


def test_a_trial_that_another_process_tells_in_the_same_moment_is_told_once(small, tmp_path, monkeypatch):
    original, told_before = optuna.storages.RDBStorage.set_trial_state_values, []

    def told_twice(self, trial_id, state, values=None):  # by the other process, and then by this one
        if trial_id % 2:
            told_before.append(trial_id)
            original(self, trial_id, state, values)
        return original(self, trial_id, state, values)

    monkeypatch.setattr(optuna.storages.RDBStorage, "set_trial_state_values", told_twice)
    table = search(small, tmp_path, storage=f"sqlite:///{tmp_path / 'trials.db'}")
    assert len(told_before) >= 5
    assert table.groupby(["arm", "study"]).size().tolist() == [7] * 4


def test_an_edited_gate_is_searched_anew_and_a_cluster_is_not(small, tmp_path, monkeypatch, capfd):
    def trained(gate, **changes) -> bool:
        monkeypatch.setitem(sgsc_lib.GATES, "mine", gate)
        arms = {"mine": {"lr": SPACE["lr"], "gamma": 0.5, "gate": "mine"}}
        tune(arms, small, cache=tmp_path, progress="mine", widths=(40, 10), **SEARCH | changes)
        return "mine" in capfd.readouterr().err

    def half(sign, *, batch_size, gamma):
        return sign.abs().clamp(max=1) * 0.5

    def third(sign, *, batch_size, gamma):
        return sign.abs().clamp(max=1) * 0.3

    assert trained(half) and not trained(half)
    assert trained(third) and not trained(third, n_jobs=2, stack_size=3)
    assert trained(third, batch_size=20)


def test_a_database_that_cannot_be_opened_is_refused_before_any_training(small, tmp_path, monkeypatch):
    monkeypatch.setattr(sgsc_lib.time, "sleep", lambda _: None)
    with pytest.raises(ValueError, match="`storage` should be the URL of a database that can be opened"):
        search(small, tmp_path, storage=f"sqlite:///{tmp_path / 'nowhere' / 'trials.db'}")


def test_frame_and_final_are_tidy(small):
    curves = train(RUNS[:2], small, n_jobs=1, **{**SHORT, "epochs": 4})
    frame, final = curves.frame(), curves.final()
    assert len(frame) == 8 and list(frame["epoch"]) == [1, 2, 3, 4] * 2 and len(final) == 2
    assert frame.loc[3, "test_accuracy"] == final.loc[0, "final_test_accuracy"] == curves.test_accuracy[0, -1]
    assert {"epoch_roughness", "probe_spike_count"} <= set(final.columns)


def test_the_papers_own_table_comes_out():
    """MNIST-1D's authors report 32 % for logistic regression and 68 % for an MLP (arXiv 2011.14439, table 1)."""
    whole = load_mnist1d(valid_fraction=0.0)
    linear = train([Run(s, 0.01) for s in range(2)], whole, epochs=60, batch_size=100, widths=(40, 10))
    deep = train([Run(s, 0.01) for s in range(2)], whole, epochs=100, batch_size=100, widths=(40, 100, 100, 10))
    assert abs(linear.test_accuracy[:, -1].mean() - 0.32) < 0.04
    assert abs(deep.test_accuracy.max(1).mean() - 0.68) < 0.04


BAD_ARGUMENTS = [
    (lambda d: Run(-1, 0.1), "`seed` should be ≥ 0. Found -1."),
    (lambda d: Run(0.5, 0.1), "`seed` should be an int. Found 0.5."),
    (lambda d: Run(0, 0.0), "`lr` should be > 0"),
    (lambda d: Run(0, math.nan), "`lr` should be finite"),
    (lambda d: Run(0, "0.1"), "`lr` should be a float. Found '0.1'."),
    (lambda d: Run(0, 0.1, gamma=-0.1), "`gamma` should be ≥ 0.0. Found -0.1."),
    (lambda d: Run(0, 0.1, gamma=True), "`gamma` should be a float. Found True."),
    (lambda d: Run(0, 0.1, placement="during"), "`placement` should be one of 'before', 'after'. Found 'during'."),
    (lambda d: Run(0, 0.1, control="random"), "`control` should be one of"),
    (lambda d: load_mnist1d(4999), "`num_samples` should be a multiple of the 10 classes. Found 4999."),
    (lambda d: load_mnist1d(valid_fraction=1.0), "`valid_fraction` should be ≤ 0.9"),
    (lambda d: load_mnist1d(label_noise=-0.1), "`label_noise` should be ≥ 0.0"),
    (lambda d: mlp((40,), seed=0), "`widths` should name at least"),
    (lambda d: mlp((40, 0, 10), seed=0), "`widths` should be ≥ 1. Found 0."),
    (lambda d: train([], d), "`runs` should be a non-empty list of Run"),
    (lambda d: train([{"seed": 0}], d), "`runs` should be a non-empty list of Run"),
    (lambda d: train([Run(0, 0.1)], d, epochs=0), "`epochs` should be ≥ 1. Found 0."),
    (lambda d: train([Run(0, 0.1)], d, batch_size=97), "`batch_size` should be ≤ 96. Found 97."),
    (lambda d: train([Run(0, 0.1)], d, widths=(41, 10)), "`widths` should start with 40"),
    (lambda d: train([Run(0, 0.1)], d, widths=(40, 5)), "end with at least 10"),
    (lambda d: train([Run(0, 0.1)], d, batch_size=32, probe_size=97), "`probe_size` should be ≤ 96"),
    (lambda d: train([Run(0, 0.1)], d, batch_size=32, stack_size=0), "`stack_size` should be ≥ 1"),
    (lambda d: smoothness([1.0, 2.0]), "`loss` should be [..., T] with T ≥ 4"),
    (lambda d: smoothness(np.ones(50), window=24), "`window` should be odd. Found 24."),
    (lambda d: compare_paired([1.0], [2.0], margin=1.0), "at least 2 pairs"),
    (lambda d: compare_paired([1.0, math.nan], [2.0, 1.0], margin=1.0), "Found 1 pairs that are not"),
    (lambda d: compare_paired([1.0, 2.0], [2.0, 1.0], margin=0.0), "`margin` should be > 0"),
    (lambda d: sign_consistency(torch.zeros(0, 3)), "with B ≥ 1"),
    (lambda d: per_sample_gradients(mlp((40, 10), seed=0), d.x_train, d.y_train[:5]), "`y` should have as many rows"),
    (lambda d: noise_floor(0), "`batch_size` should be ≥ 1"),
]


@pytest.mark.parametrize(("call", "message"), BAD_ARGUMENTS, ids=[message for _, message in BAD_ARGUMENTS])
def test_bad_arguments_are_refused_by_name(small, call, message):
    with pytest.raises((ValueError, TypeError)) as error:
        call(small)
    assert message in str(error.value)


# -- measures ----------------------------------------------------------------------------------------------------------


def test_smoothness_by_hand():
    found = smoothness([4.0, 2.0, 3.0, 1.0], window=3, spike_threshold=0.0)
    assert found["total_rise"] == 1.0 and found["upward_share"] == pytest.approx(1 / 3)
    assert found["normalised_total_variation"] == pytest.approx(5 / 3)
    log = np.log([4.0, 2.0, 3.0, 1.0])
    assert found["roughness"] == pytest.approx(
        np.mean([(log[2] - 2 * log[1] + log[0]) ** 2, (log[3] - 2 * log[2] + log[1]) ** 2])
    )
    change = np.array([-2.0, 1.0, -2.0]) + 1.0
    assert found["lag1_autocorrelation"] == pytest.approx((change[1:] * change[:-1]).sum() / (change**2).sum())


def test_a_falling_curve_is_perfectly_smooth_and_a_spike_is_found():
    curve = 3 * np.exp(-np.linspace(0, 4, 200)) + 0.1
    falling = smoothness(curve)
    assert falling["total_rise"] == falling["upward_share"] == falling["spike_count"] == 0
    assert falling["normalised_total_variation"] == pytest.approx(1)
    spiked = curve.copy()
    spiked[100] += 1
    assert smoothness(spiked)["spike_count"] == 1


def test_smoothness_keeps_leading_axes_and_isolates_diverged_curves():
    curves = np.random.default_rng(0).uniform(1, 2, (2, 3, 60))
    curves[1, 2, 30] = np.nan
    found = smoothness(curves)
    alone = smoothness(curves[0, 1])
    assert all(value.shape == (2, 3) and np.isnan(value[1, 2]) for value in found.values())
    assert all(found[name][0, 1] == pytest.approx(alone[name], nan_ok=True) for name in found)


def test_paired_comparison_against_scipy_and_statsmodels():
    rng = np.random.default_rng(1)
    a, b = rng.normal(0.2, 1, 40), rng.normal(0, 1, 40)
    found, theirs = compare_paired(a, b, margin=0.1), scipy.stats.ttest_rel(a, b)
    np.testing.assert_allclose([found.ci_low, found.ci_high], theirs.confidence_interval(0.95))
    np.testing.assert_allclose([found.ci90_low, found.ci90_high], theirs.confidence_interval(0.90))
    assert found.p == pytest.approx(theirs.pvalue, abs=0.03)
    low, high = proportion_confint((a > b).sum(), 40, method="wilson")
    np.testing.assert_allclose([found.probability_low, found.probability_high], [low, high])
    assert found.correlation == pytest.approx(scipy.stats.pearsonr(a, b).statistic)
    assert found.effect_size == pytest.approx(theirs.statistic / math.sqrt(40))


def test_sign_flip_p_is_exact_for_few_pairs():
    d = np.array([0.3, 0.1, 0.2, -0.05, 0.4])
    flips = [abs(np.mean(d * signs)) for signs in itertools.product((1, -1), repeat=5)]
    assert compare_paired(d, np.zeros(5), margin=1e-3).p == pytest.approx(
        np.mean(np.array(flips) >= abs(d.mean()) - 1e-12)
    )


@pytest.mark.parametrize(
    ("shift", "spread", "verdict"),
    [
        (0.05, 0.01, "better"),
        (-0.05, 0.01, "worse"),
        (0.001, 0.005, "equivalent"),
        (0.004, 0.001, "equivalent"),
        (0.005, 0.05, "inconclusive"),
    ],
)
def test_the_four_verdicts(shift, spread, verdict):
    noise = np.linspace(-1, 1, 20)
    assert compare_paired(0.6 + shift + spread * noise, np.full(20, 0.6), margin=0.01).verdict == verdict


def test_equal_arms_are_equivalent_with_p_one():
    found = compare_paired([0.5, 0.6, 0.7], [0.5, 0.6, 0.7], margin=0.01)
    assert (found.verdict, found.p, found.effect_size, found.probability_greater) == ("equivalent", 1.0, 0.0, 0.5)


# -- results -----------------------------------------------------------------------------------------------------------


def test_tables_are_written_whole_and_a_missing_one_names_its_maker(tmp_path):
    frame = pd.DataFrame({"x": [0.1 + 0.2, 1e-300]})
    sgsc_lib.write_table(frame, tmp_path / "t.csv")
    assert sgsc_lib.read_table(tmp_path / "t.csv", made_by="02")["x"].tolist() == frame["x"].tolist()
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]
    with pytest.raises(FileNotFoundError, match=r"02_tuning makes it\. A relative path starts at "):
        sgsc_lib.read_table(tmp_path / "none.csv", made_by="02_tuning")
    with pytest.raises(FileNotFoundError, match=r"python report/build\.py --profile quick, where 02_tuning"):
        sgsc_lib.read_table("report/results/quick/none.csv", made_by="02_tuning")
    manifest = {"notebooks": {"02_tuning": {}}, "results": {}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"t\.csv is of an earlier build: .* --only 02_tuning$"):
        sgsc_lib.read_table(tmp_path / "t.csv", made_by="02_tuning")


def test_claims_are_replaced_by_notebook(tmp_path):
    row = dict.fromkeys(sgsc_lib.CLAIM_COLUMNS, "x")
    del row["notebook"]
    for notebook, ids in (("02", "ab"), ("03", "c"), ("02", "d")):
        sgsc_lib.write_claims([{**row, "id": i} for i in ids], tmp_path, notebook=notebook)
    written = sgsc_lib.read_table(tmp_path / "claims.csv", made_by="02")
    assert list(written.columns) == list(sgsc_lib.CLAIM_COLUMNS) and list(written["id"]) == ["c", "d"]
    with pytest.raises(ValueError, match="should have the columns"):
        sgsc_lib.write_claims([{"id": "a"}], tmp_path, notebook="02")


@pytest.mark.parametrize("label", ["loss curves", "", 'x" onload="'])
def test_labels_that_no_link_could_name_are_refused(label):
    with pytest.raises(ValueError, match="`label` should be letters, digits and hyphens"):
        sgsc_lib.table(pd.DataFrame({"p": [1]}), label, caption="A table.")
    with pytest.raises(ValueError, match="`label` should be letters, digits and hyphens"):
        sgsc_lib.figure(plt.figure(), label, caption="A figure.", alt="Empty.")
