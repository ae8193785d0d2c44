"""The engine: a stack computes, bit for bit, what each run computes alone, and what torch computes by other means."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from study_inputs import CONTROLLED, DOUBLE, FRESH, MUON, OPTIMIZED, RELATED, RUNS, SHORT, SMALL, assert_same, shortly
from test_gates import DEFINITIONS

from sgsc_lib import SGSC, mlp, per_sample_gradients
from sgsc_study import GATES, Dataset, Run
from sgsc_study.engine import controlled, evaluate, stream, training
from sgsc_study.runs import HALVES

X, Y = DOUBLE.x_train, DOUBLE.y_train


def test_a_run_is_the_same_alone_and_in_any_stack():
    every = RUNS + CONTROLLED + RELATED + OPTIMIZED + MUON
    together = shortly(every, fresh=FRESH, stack_size=5)
    assert_same(shortly(every[::-1], fresh=FRESH, stack_size=3, n_jobs=2), together, slice(None, None, -1))
    for r, run in enumerate(every):
        assert_same(shortly([run], fresh=FRESH), together, slice(r, r + 1))


def test_a_diverging_run_keeps_its_nans_and_does_not_disturb_its_neighbours():
    quiet, wild = Run(0, 0.01, 0.25), Run(1, 1e30, 0.25)
    both = shortly([quiet, wild])
    assert not np.isfinite(both.train_loss[1, -1]) and np.isfinite(both.train_loss[0]).all()
    assert_same(shortly([quiet]), both, slice(1))


def by_reference(run: Run) -> list[float]:
    """A run from per-sample gradients, torch's optimizer and torch's scheduler: each step's loss, then of the test rows
    the last accuracy and loss. SGD's weight decay, which torch does not decouple, is added by hand."""
    model, losses = mlp(SHORT["widths"], seed=run.seed).double(), []
    parameters, order = list(model.parameters()), stream(run.seed, 1)
    batches = [b for _ in range(3) for b in torch.randperm(len(X), generator=order).split(SHORT["batch_size"])]
    optimizer = (torch.optim.AdamW(parameters, run.lr) if run.optimizer == "adam"
                 else torch.optim.SGD(parameters, run.lr, momentum=0.9, nesterov=True))  # fmt: skip
    optimizer.param_groups[0]["weight_decay"] = 0.0
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    smoothed = functools.partial(F.cross_entropy, label_smoothing=run.label_smoothing)
    for rows in batches:
        losses.append(smoothed(model(X[rows]), Y[rows]).item())
        per_sample = list(per_sample_gradients(model, X[rows], Y[rows], smoothed).values())
        before = [p.detach().clone() for p in parameters]
        half = len(rows) // 2
        judged = {"own-half": slice(half), "other-half": slice(-half, None)}.get(run.control, slice(None))
        gates = ([DEFINITIONS[run.gate](g[judged], run.gamma) for g in per_sample] if run.gate in DEFINITIONS else None)
        per_sample = [g[:half] if run.control in HALVES else g for g in per_sample]
        for k, (p, g) in enumerate(zip(parameters, per_sample, strict=True)):
            p.grad = g.sign().mean(0).sign() if run.gate == "vote" else g.mean(0)
            if gates and run.placement == "before":
                p.grad *= gates[k]
        optimizer.step()
        for k, (p, old) in enumerate(zip(parameters, before, strict=True)):
            update = p.detach() - old
            if gates and run.placement == "after":
                update *= gates[k]
            if run.gate == "cautious":
                agrees = (update * p.grad < 0).double()
                update *= agrees / agrees.mean().clamp(min=1e-3)
            if run.gate == "vote" and run.placement == "after":
                update = -optimizer.param_groups[0]["lr"] * p.grad
            p.data = old * (1 - optimizer.param_groups[0]["lr"] * run.weight_decay) + update
        if run.schedule == "cosine":
            schedule.step()
    logits, labels = model(DOUBLE.x_test), DOUBLE.y_test
    return [*losses, (logits.argmax(1) == labels).float().mean().item(), F.cross_entropy(logits, labels).item()]


@pytest.mark.parametrize("run", RUNS + RELATED + OPTIMIZED, ids=str)
def test_every_run_trains_as_torch_does_it_from_per_sample_gradients_in_float64(run):
    curves = shortly([run], DOUBLE, epochs=3, probe_size=96)
    found = [*curves.step_loss[0], curves.test_accuracy[0, -1], curves.test_loss[0, -1]]
    np.testing.assert_allclose(found, by_reference(run), rtol=1e-6 if run.gate == "snr" else 1e-8)
    np.testing.assert_allclose(curves.probe_loss[0, 2::3], curves.train_loss[0], rtol=1e-9)  # of all rows, after a step


@pytest.mark.parametrize("run", RUNS[:3] + CONTROLLED + RELATED + OPTIMIZED + MUON[:2], ids=str)
def test_a_step_stays_on_the_device_of_its_data(run):
    """torch's device "meta" has shapes and no numbers: what the processor holds can't be mixed in unmoved."""
    elsewhere = Dataset(*(part.to("meta") for part in SMALL))
    step = next(training([run] * 2, elsewhere, GATES.get(run.gate) if run.gamma else None, 1, 40, (40, 24, 10)))
    kept = [step.losses, *step.gradients, *(step.gates or []), *step.updates, *step.parameters]
    assert {part.device.type for part in [*kept, *evaluate(step.parameters, *elsewhere[:2])]} == {"meta"}


def test_gamma_zero_is_plain_adam_bit_for_bit():
    mixed = shortly([Run(0, 0.01, 0.0, "after", "frozen", "active"), Run(0, 0.01, 0.5, "after")])
    assert_same(shortly([Run(0, 0.01)]), mixed, slice(1))
    assert not np.array_equal(mixed.step_loss[0], mixed.step_loss[1])


def test_layer_mean_and_permuted_controls_keep_the_mean_gate_and_frozen_keeps_the_first():
    gate = torch.rand(2, 6, 4, generator=torch.Generator().manual_seed(0))
    generators, first = [torch.Generator().manual_seed(s) for s in (1, 2)], [torch.ones_like(gate)]
    (mean,) = controlled([gate], "layer-mean", None, generators)
    (permuted,), (again,) = (controlled([gate], "permuted", None, generators) for _ in range(2))
    torch.testing.assert_close(mean[1], gate[1].mean().expand(6, 4))
    assert torch.equal(permuted.flatten(1).sort().values, gate.flatten(1).sort().values)
    assert not torch.equal(permuted, gate) and not torch.equal(permuted, again)  # afresh each step
    assert controlled([gate], "frozen", first, generators) is first


def test_the_class_gates_adamws_update_as_the_study_does_step_by_step():
    run, x, y = Run(0, 0.03, 0.5, "after", weight_decay=0.3), DOUBLE.x_train, DOUBLE.y_train
    model, order = mlp((40, 24, 10), seed=0).double(), stream(0, 1)
    optimizer, sgsc = torch.optim.AdamW(model.parameters(), run.lr, weight_decay=run.weight_decay), SGSC(model, 0.5)
    steps = training([run], DOUBLE, GATES["sign"], 25, 48, (40, 24, 10))
    for _ in range(25):
        for rows in torch.randperm(len(x), generator=order).split(48):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            with sgsc.scaled_update():
                optimizer.step()
            stacked = next(steps).parameters
            for p, ours in zip(model.parameters(), stacked, strict=True):
                torch.testing.assert_close(p.detach(), ours[0], rtol=1e-9, atol=1e-12)
    assert next(steps, None) is None  # 50 steps
