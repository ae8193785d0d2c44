"""SGSC on any model, exact: against the per-sample gradients that define it."""

import copy
import gc
import math
import subprocess
import sys
import warnings
import weakref
from contextlib import nullcontext
from functools import partial

import inputs
import pytest
import torch
import torch.nn.functional as F
from asserts import (
    assert_consistency,
    assert_equal,
    examples,
    gated_step,
    hooks_on,
    loss_of,
    measured,
    one_by_one,
    parts_of_one_pass,
    weighted,
)
from hypothesis import given
from hypothesis import strategies as st
from inputs import CLASSES, Made, one, problems, toy
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_pre_hooks
from torch.utils.checkpoint import checkpoint

from sgsc_core import sums
from sgsc_core.gradients import Products
from sgsc_lib import (
    SGSC,
    check_consistency,
    factored_sums,
    mlp,
    noise_floor,
    per_sample_gradients,
    power_gate,
    sign_consistency,
)

OPTIMISERS = [partial(torch.optim.SGD, lr=0.1, momentum=0.9), partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)]


def test_its_import_loads_the_standard_library_and_torch_alone():
    script = "import sys, torch; before = set(sys.modules); import sgsc_lib; print(*set(sys.modules) - before)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    tops = {name.partition(".")[0] for name in loaded}
    assert {"sgsc_lib", "sgsc_core"} <= tops <= {"sgsc_lib", "sgsc_core", "torch", *sys.stdlib_module_names}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@examples(40)
@given(st.data(), st.randoms(use_true_random=False), st.floats(1e-3, 1e3), st.sampled_from(["mean", "sum"]))
def test_equals_per_sample_gradients_in_any_order_and_on_any_scale_of_the_loss(dtype, data, random, factor, reduction):
    model, x, y = data.draw(problems(dtype))
    order = random.sample(range(len(x)), len(x))
    c = measured(model, x[order], y[order], lambda *batch: factor * loss_of(*batch, reduction))
    flips = assert_consistency(c, per_sample_gradients(model, x, y))
    assert flips <= 0.02 * sum(tensor.numel() for tensor in c.values()) + 2


@examples(15)
@given(problems(torch.bfloat16))
def test_bfloat16_counts_whole_samples_in_float32(problem):
    model, x, y = problem
    for name, c in measured(model, x, y).items():
        assert c.dtype == torch.float32 and ((c >= 0) & (c <= 1)).all(), name
        torch.testing.assert_close(c * len(x), (c * len(x)).round())


@pytest.mark.parametrize("layer, shape", [(nn.Linear(2, 2), (2,)), (nn.Linear(2, 2), (3, 2)), (nn.LayerNorm(2), (2,))])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])  # float32 under autocast
def test_bfloat16_sums_beyond_256_samples(layer, shape, dtype):
    model = nn.Sequential(layer, nn.Flatten()).to(dtype)
    x, y = torch.rand(1, *shape, dtype=dtype).expand(1001, *shape), torch.zeros(1001, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        assert all((c == 1).all() for c in measured(model, x, y).values())  # 1001 is no bfloat16


def test_an_inactive_unit_and_nan_cap_c():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU()).double()
    nn.init.ones_(model[0].weight)
    x = torch.tensor([[1.0], [2.0], [3.0], [-1.0], [math.nan]]).double()
    assert measured(model, x, torch.ones(5, 1), weighted)["0.weight"].item() == 0.6


# -- the gate and its two placements -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("batch", [1, 8, 300])
def test_power_gate_is_c_to_the_gamma_of_each_run(batch, dtype):
    sums, gammas = torch.arange(-batch, batch + 1, dtype=dtype), [0.0, 1e-3, 0.3, 5.0]
    found = power_gate(sums.expand(4, -1), batch, torch.tensor(gammas, dtype=torch.float64))
    expected = [(sums.double().abs() / batch) ** gamma for gamma in gammas]  # 0 ** 0 = 1
    assert_equal(found, torch.stack(expected).to(dtype))
    assert_equal(found[2], power_gate(sums, batch, 0.3))


@pytest.mark.parametrize("placement", ["before", "after"])
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_training_equals_the_definition_by_hand(placement, optimiser):
    model, x, y = toy(20)
    by_hand = copy.deepcopy(model)
    sgsc, ours, theirs = SGSC(model, 5.0), *(optimiser(m.parameters()) for m in (model, by_hand))
    for sgsc.gamma, x_batch, y_batch in zip((0.3, 0, 1.5), x.split(8), y.split(8), strict=True):  # 8, 8 and 4 samples
        ours.zero_grad()
        loss_of(model, x_batch, y_batch).backward()
        gated_step(sgsc, ours, placement)
        per_sample = per_sample_gradients(by_hand, x_batch, y_batch)
        gates = {name: c**sgsc.gamma for name, c in sign_consistency(per_sample).items()}
        before = {name: p.detach().clone() for name, p in by_hand.named_parameters()}
        for name, p in by_hand.named_parameters():
            p.grad = per_sample[name].mean(0) * (gates[name] if placement == "before" else 1)
        theirs.step()
        group = theirs.param_groups[0]
        kept = 1 - group["lr"] * group["weight_decay"] if group.get("decoupled_weight_decay") else 1
        for name, p in by_hand.named_parameters() if placement == "after" else ():
            p.data = kept * before[name] + gates[name] * (p.data - kept * before[name])
    torch.testing.assert_close(model.state_dict(), by_hand.state_dict(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("placement", ["before", "after"])
@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gamma_0_is_the_plain_optimiser_bit_for_bit(placement, optimiser, dtype):
    model, x, y = toy(dtype=dtype)
    plain = copy.deepcopy(model)
    sgsc, ours, theirs = SGSC(model, 0), *(optimiser(m.parameters()) for m in (model, plain))
    for _ in range(3):
        ours.zero_grad(), theirs.zero_grad()
        loss_of(model, x, y).backward(), loss_of(plain, x, y).backward()
        gated_step(sgsc, ours, placement), theirs.step()
    assert_equal(model.state_dict(), plain.state_dict())


def test_scaled_update_with_a_gate_of_1_keeps_infinities_and_negative_zeros_and_leaves_a_failed_step_alone():
    model, extremes = nn.Linear(1, 3, bias=False), torch.tensor([[math.inf], [-math.inf], [-0.0]])
    sgsc = SGSC(model, gamma=0.0)
    for sgsc.gamma, expectation in ((0.0, nullcontext()), (1.0, pytest.raises(ZeroDivisionError))):
        model(torch.tensor([[1.0], [-1.0]])).sum().backward()  # c = 0
        with expectation, sgsc.scaled_update():
            model.weight.data.copy_(extremes)
            if sgsc.gamma:
                raise ZeroDivisionError
        assert str(model.weight.tolist()) == str(extremes.tolist())
        nn.init.ones_(model.weight)


@pytest.mark.parametrize("build, decoupled", [
    (lambda ps: torch.optim.AdamW(ps, 0.1, weight_decay=0.3), True),
    (lambda ps: torch.optim.AdamW(ps, torch.tensor(0.1), weight_decay=0.3), True),
    (lambda ps: torch.optim.NAdam(ps, 0.1, weight_decay=0.3, decoupled_weight_decay=True), True),
    (lambda ps: torch.optim.Adafactor(ps, 0.1, weight_decay=0.3), True),
    (lambda ps: torch.optim.Muon(ps, 0.1, weight_decay=0.3), True),
    (lambda ps: torch.optim.Adam(ps, 0.1, weight_decay=0.3), False),
    (lambda ps: torch.optim.SGD(ps, 0.1, weight_decay=0.3), False),
])  # fmt: skip
def test_where_c_is_0_decoupled_decay_alone_acts(build, decoupled):
    model = nn.Linear(1, 3, bias=False)
    start, optimizer = model.weight.detach().clone(), build([model.weight])
    sgsc = SGSC(model, gamma=1.0)
    model(torch.tensor([[1.0], [-1.0]])).sum().backward()
    with sgsc.scaled_update():
        optimizer.step()
    torch.testing.assert_close(model.weight.detach(), start * (1 - 0.03 * decoupled))
    assert not _global_optimizer_pre_hooks


def test_decay_is_that_of_a_step_that_is_taken_and_of_the_parameters_that_it_takes():
    model = nn.Linear(1, 3)
    start, sgsc = copy.deepcopy(model.state_dict()), SGSC(model, gamma=1.0)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.3)
    optimizer.found_inf = torch.tensor(1.0)  # as a GradScaler says to a fused step, which then does nothing
    optimizer.step = torch.optim.Optimizer.profile_hook_step(lambda self: None).__get__(optimizer)
    model(torch.tensor([[1.0], [-1.0]])).sum().backward()
    with sgsc.scaled_update():
        optimizer.step()
    assert_equal(model.state_dict(), start)


# -- which samples a statistic covers ----------------------------------------------------------------------------------


@examples(20)
@given(problems(least=2), st.integers(1, 4))
def test_a_batch_in_parts_equals_one_pass(problem, size):
    model, x, y = problem
    sgsc = SGSC(model, gamma=1.0)
    for x_part, y_part in zip((*x.split(size), x[:0]), (*y.split(size), y[:0]), strict=True):  # the last part is empty
        loss_of(model, x_part, y_part, "sum").backward()
        sgsc.consistency()  # reading it in between changes nothing
    assert_consistency(sgsc.consistency(), per_sample_gradients(model, x, y))
    assert (sgsc.summary()["samples"] == len(x)).all()


@pytest.mark.parametrize("parts", [  # shapes and factors; a part of factor 0 has no gradient, but its samples count
    [((3,), 1), ((5, 6), 1)], [((5, 6), 1), ((3,), 1)], [((1,), 0), ((1,), 1), ((2,), 0), ((1,), 1)],
])  # fmt: skip
def test_parts_may_be_vectors_or_sequences_or_without_a_gradient(parts):
    model = nn.Linear(4, 2).double()
    drawn = [(torch.randn(*shape, 4).double(), factor * torch.randn(*shape, 2).double()) for shape, factor in parts]
    expected = [one_by_one(model, *part, weighted) for part in drawn]
    sgsc = SGSC(model, gamma=1.0)
    for part in drawn:
        weighted(model, *part).backward()
    assert_consistency(sgsc.consistency(), {name: torch.cat([g[name] for g in expected]) for name in expected[0]})


@pytest.mark.parametrize("to_none", [True, False])
def test_clearing_the_gradients_starts_a_new_statistic_and_a_branch_that_a_batch_does_not_use_has_c_0(to_none):
    model, x, y = inputs.branches()
    sgsc = SGSC(model, gamma=1.0)
    for branch, other in ("ab", "ba", "ab"):
        model.zero_grad(set_to_none=to_none)
        F.cross_entropy(model(x, branch), y).backward()
        expected = {f"{branch}.{key}": g for key, g in per_sample_gradients(getattr(model, branch), x, y).items()}
        unused = {f"{other}.{key}": p.new_zeros(12, *p.shape) for key, p in getattr(model, other).named_parameters()}
        assert_consistency(sgsc.consistency(), expected | unused)
    sgsc.scale_gradients_()


def test_a_gate_starts_a_new_statistic_what_was_measured_stays_and_two_instances_do_not_disturb_each_other():
    model, x, y = toy()
    first, second = SGSC(model, gamma=1.0), SGSC(model, gamma=0.5)
    for rows in (slice(0, 6), slice(6, 12)):
        loss_of(model, x[rows], y[rows]).backward()
        first.scale_gradients_()
        assert_consistency(first.consistency(), per_sample_gradients(model, x[rows], y[rows]))
    assert_consistency(second.consistency(), per_sample_gradients(model, x, y))  # neither gated nor cleared
    c = first.consistency()
    first.remove()
    loss_of(model, x[:3], y[:3]).backward()
    assert_equal(first.consistency(), c)
    first.remove()  # twice is once


@pytest.mark.parametrize("build", [toy, inputs.batch_norm])
def test_what_runs_between_forward_and_backward_is_harmless(build):
    model, x, y = build()
    sgsc = SGSC(model, gamma=1.0)
    loss_of(model, x[:3], y[:3])  # its loss is dropped
    loss = loss_of(model, x, y)
    reference = per_sample_gradients(model, x, y)
    loss_of(copy.deepcopy(model).train(), x[:3], y[:3]).backward()  # a copy does not report to its original
    for evaluation in (torch.no_grad, torch.inference_mode):
        with evaluation():
            model(x[:3])
    loss.backward()
    assert_consistency(sgsc.consistency(), reference)
    assert (sgsc.summary()["samples"] == len(x)).all()


HOOKED, PARTLY_FROZEN, WEIGHT_NORM = nn.Linear(5, 5), nn.Linear(5, 5), nn.utils.parametrizations.weight_norm
HOOKED.register_forward_hook(lambda _, args, output: output * args[0][:, :1].sign())
PARTLY_FROZEN.weight.requires_grad_(False)
WRAPPED, TWICE = nn.Linear(5, 5), nn.LayerNorm(5)
WRAPPED.forward = lambda x, forward=WRAPPED.forward: forward(x) * x[:, :1]
TWICE.register_parameter("bias", TWICE.weight)
with warnings.catch_warnings(action="ignore"):
    OLDER = nn.utils.weight_norm(nn.Linear(5, 5))


SERVED = {  # what stands before a last Linear layer
    "a layer alone": [],
    "a layer of one's own": [inputs.scale(5), nn.ReLU()],
    "a subclass": [type("MyLinear", (nn.Linear,), {})(5, 5)],
    "batch norm in eval mode": inputs.batch_norm()[0][:3],
    "a hook that replaces an output": [HOOKED, nn.ReLU()],
    "a forward that was replaced": [WRAPPED],
    "tied weights": [inputs.tied()],
    "one parameter under two names": [TWICE],
    "a layer used twice": [one(nn.Linear(5, 5), lambda self, x: self.layer(self.layer(x).tanh()))],
    "a weight used by hand": [one(nn.Linear(5, 5), lambda self, x: F.linear(self.layer(x), self.layer.weight))],
    "batch folded into another axis": [
        nn.Unflatten(1, (5, 1)), one(nn.Linear(1, 1), lambda self, x: self.layer(x.flatten(0, 1)).view(-1, 5))],
    "batch along the second axis": [
        nn.Unflatten(1, (5, 1)), one(nn.Linear(1, 1), lambda self, x: self.layer(x.transpose(0, 1))[..., 0].T)],
    "parametrisation": [WEIGHT_NORM(nn.Linear(5, 5))],
    "older weight norm": [OLDER],
    "two inputs": [one(nn.Bilinear(5, 5, 5), lambda self, x: self.layer(x, x.tanh()))],
    "a dict for an output": [one(one(nn.Linear(5, 5), lambda self, x: {"a": self.layer(x), "b": [self.layer.bias + x]}),
                                 lambda self, x: (out := self.layer(x))["a"] * out["b"][0])],
    "a list of parameters": [Made(lambda self, x: x * self.own[0], own=nn.ParameterList([torch.randn(5)]))],
    "recurrent": [nn.Unflatten(1, (5, 1)), one(nn.GRU(1, 2, batch_first=True), lambda self, x: self.layer(x)[0][:, -1]),
                  nn.Linear(2, 5)],
    "checkpointing": [one(mlp((5, 5, 5), seed=0), lambda self, x: checkpoint(self.layer, x, use_reentrant=False))],
    "reentrant checkpointing": [
        nn.Linear(5, 5), one(mlp((5, 5, 5), seed=0), lambda self, x: checkpoint(self.layer, x, use_reentrant=True))],
    "frozen": [PARTLY_FROZEN, nn.ReLU(), *(m.requires_grad_(False) for m in (inputs.tied(), WEIGHT_NORM(nn.PReLU())))],
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*vmap cannot", "ignore:.*batching rule")
@pytest.mark.parametrize("layers", SERVED.values(), ids=SERVED)
def test_serves(layers):
    last, (_, x, y) = nn.Linear(5, CLASSES), toy()
    model = (nn.Sequential(*layers, last) if layers else last).double().eval()
    assert not [row.problem for row in SGSC.explain(model) if row.problem]
    assert_consistency(measured(model, x, y), one_by_one(model, x, y))


def test_a_layers_view_and_an_operation_in_place_behind_it():
    class Permuted(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    model = nn.Sequential(nn.Conv2d(2, 4, 3), Permuted(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, CLASSES))
    x, y = torch.randn(6, 2, 6, 6).double(), torch.randint(CLASSES, (6,))
    model.double()
    assert_consistency(measured(model, x, y), one_by_one(model, x, y))


@pytest.mark.filterwarnings("ignore:SGSC recomputes")
@pytest.mark.parametrize("kind", [nn.Dropout, nn.AlphaDropout, "transposed", "stochastic depth", "attention"])
def test_random_operations_are_repeated_with_the_numbers_of_the_forward_pass(kind):
    torch.manual_seed(0)
    width = 4
    own = {"own": nn.Parameter(torch.randn(width)), "layer": nn.Linear(width, width)}
    if kind == "transposed":
        drop = lambda self, x: F.dropout(x.transpose(1, 2), 0.5).transpose(1, 2)  # noqa: E731
    elif kind == "stochastic depth":
        drop = lambda self, x: x * x.new_empty(len(x), 1, 1).bernoulli_(0.5)  # noqa: E731
    elif kind == "attention":
        own["drop"] = nn.MultiheadAttention(width, 2, dropout=0.5, batch_first=True)
        drop = lambda self, x: self.drop(x, x, x)[0]  # noqa: E731
    else:
        own["drop"] = kind(0.5)
        drop = lambda self, x: self.drop(x)  # noqa: E731
    first = Made(lambda self, x: self.layer(drop(self, x * self.own).tanh()), **own)
    model = nn.Sequential(first, nn.Flatten(), nn.Linear(3 * width, CLASSES)).double()
    x, y = torch.randn(6, 3, width).double(), torch.randint(CLASSES, (6,))
    sgsc = SGSC(model, gamma=1.0)
    torch.manual_seed(1)
    losses = F.cross_entropy(model(x), y, reduction="none")
    losses.sum().backward()
    c = sgsc.consistency()
    sgsc.remove()
    torch.manual_seed(1)
    assert_consistency(c, parts_of_one_pass(model, x, y))  # with the same masks


@pytest.mark.parametrize("build", [  # exact rules of layers that no random architecture holds
    lambda: (nn.InstanceNorm1d(4, affine=True), (4, 5)), lambda: (nn.ConvTranspose3d(4, 2, 2, groups=2), (4, 2, 3, 2)),
    lambda: (nn.InstanceNorm2d(4, affine=True, track_running_stats=True), (4, 3, 3)), lambda: (nn.PReLU(), (4, 3)),
    lambda: (nn.RMSNorm(4), (3, 4)), lambda: (nn.EmbeddingBag(5, 4, mode="mean", padding_idx=1), None),
    lambda: (nn.EmbeddingBag(5, 4, mode="max"), None), lambda: (nn.EmbeddingBag(5, 4, mode="sum"), None),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:SGSC recomputes")
def test_the_rules_of_other_layers(build):
    torch.manual_seed(0)
    layer, shape = build()
    x = torch.randint(5, (6, 7)) if shape is None else torch.randn(6, *shape).double()
    layer.double()
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(layer(x).flatten(1).shape[1], CLASSES).double())
    y = torch.randint(CLASSES, (6,))
    assert_consistency(measured(model, x, y), one_by_one(model, x, y))
    assert SGSC.explain(model)[0].rule.endswith("_rule") or layer.mode == "max"


# -- exactly the samples and uses that made p.grad ---------------------------------------------------------------------


def test_passes_that_gave_no_parameter_a_gradient_do_not_count():
    model, x, y = toy(16)
    sgsc = SGSC(model, 0.5)
    for rows in (slice(0, 8), slice(8, 16)):
        adversarial = x[rows].clone().requires_grad_()
        torch.autograd.grad(loss_of(model, adversarial, y[rows]), adversarial)
        loss_of(model, x[rows], y[rows])  # a batch that is skipped
        loss_of(model, x[rows], y[rows]).backward()
    assert_consistency(sgsc.consistency(), per_sample_gradients(model, x, y))
    assert (sgsc.summary()["samples"] == 16).all()


@pytest.mark.filterwarnings("ignore:SGSC sees layers called")
def test_layers_that_are_called_directly_go_on_after_a_batch_that_was_skipped():
    _, x, y = toy()
    model = nn.ModuleDict({"body": nn.Linear(5, 5), "head": nn.Linear(5, CLASSES)}).double()
    sgsc = SGSC(model, gamma=1.0)
    for skipped in (False, True, False):
        loss = F.cross_entropy(model["head"](model["body"](x).relu()), y)
        if not skipped:
            model.zero_grad()
            loss.backward()
            expected = per_sample_gradients(nn.Sequential(model["body"], nn.ReLU(), model["head"]), x, y)
            assert_consistency(sgsc.consistency(), dict(zip(sgsc.consistency(), expected.values(), strict=True)))


def test_a_part_that_no_optimizer_clears_runs_on_and_the_rest_starts_anew():
    model, x, y = toy()
    sgsc, optimizer = SGSC(model, 0.0), torch.optim.SGD(model[4].parameters(), lr=0.1)
    for step in range(1, 4):
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()
        samples = dict(zip(sgsc.summary()["parameter"], sgsc.summary()["samples"], strict=True))
        assert samples["4.weight"] == 12 and samples["0.weight"] == 12 * step


def test_frozen_thawed_replaced_and_reparametrised_after_sgsc_was_built():
    model, x, y = toy()
    sgsc = SGSC(model.requires_grad_(False), gamma=0.5)
    changes = (lambda: model[4].requires_grad_(True), lambda: model.requires_grad_(True),
               lambda: setattr(model, "2", nn.Linear(7, 6).double()),
               lambda: nn.utils.parametrizations.weight_norm(model[0]))  # fmt: skip
    for change in changes:
        change()
        model.zero_grad()
        loss_of(model, x, y).backward()
        assert_consistency(sgsc.consistency(), per_sample_gradients(model, x, y))
        sgsc.scale_gradients_()


def test_several_models_at_once_as_in_a_gan():
    torch.manual_seed(0)
    generator, critic = mlp((2, 8, 5), seed=0).double(), mlp((5, 8, 1), seed=1).double()
    gates = SGSC(generator, 1.0), SGSC(critic, 1.0)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (generator, critic)]
    z, real = torch.randn(6, 2).double(), torch.randn(6, 5).double()
    for _ in range(2):
        optimizers[1].zero_grad()
        critic(real).mean().backward()
        (-critic(generator(z).detach()).mean()).backward()
        shown, signs = torch.cat([real, generator(z).detach()]), torch.tensor([[1.0]] * 6 + [[-1.0]] * 6)
        expected = one_by_one(copy.deepcopy(critic), shown, signs, weighted)
        assert_consistency(gates[1].consistency(), {k: g.detach() for k, g in expected.items()})
        gates[1].scale_gradients_(), optimizers[1].step()
        optimizers[0].zero_grad()
        critic(generator(z)).mean().backward()
        both = copy.deepcopy(nn.Sequential(generator, critic))
        expected = {k[2:]: g for k, g in one_by_one(both, z, torch.ones(6, 1), weighted).items() if k.startswith("0.")}
        assert_consistency(gates[0].consistency(), expected)
        gates[0].scale_gradients_(), optimizers[0].step()


def test_a_model_is_saved_and_copied_without_its_hooks(tmp_path):
    model, x, y = toy()
    sgsc = SGSC(model, gamma=1.0)
    torch.save(model, tmp_path / "model.pt")
    for other in (torch.load(tmp_path / "model.pt", weights_only=False), copy.deepcopy(model)):
        loss_of(other, x, y).backward()
    with pytest.raises(RuntimeError, match="backward"):
        sgsc.consistency()


def test_a_grad_scaler_may_skip_a_step_and_scale_what_is_compared():
    model, x, y = toy(dtype=torch.float32)
    sgsc, optimizer = SGSC(model, 1.0), torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    for _ in range(20):
        optimizer.zero_grad()
        scaler.scale(100 * loss_of(model, x, y)).backward()
        expected = per_sample_gradients(model, x, y)
        scaler.unscale_(optimizer)
        if all(p.grad.isfinite().all() for p in model.parameters()):
            assert_consistency(sgsc.consistency(), expected)
            sgsc.scale_gradients_()
        scaler.step(optimizer), scaler.update()
    assert scaler.get_scale() < 2.0**127


def test_check_consistency_finds_a_wrong_rule_and_leaves_the_model_alone(monkeypatch):
    model, x, y = toy()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = hooks_on(model), model[0].weight.grad
    assert sum(row.differing for row in check_consistency(model, x, y)) == 0

    def twisted(module, a, errors):
        return {"weight": torch.einsum("bo,bi->boi", errors, a.roll(1, 0)), "bias": errors}

    monkeypatch.setitem(SGSC.rules, nn.Linear, twisted)  # the first batch shows it, and the layer is run again
    rows = check_consistency(model, x, y)
    assert not any(row.differing for row in rows) and rows[0].served_by.startswith("recomputed")

    def even(module, a, errors):  # its sum is right, its samples are not
        return {"weight": (errors.T @ a / len(a)).expand(len(a), -1, -1), "bias": errors}

    monkeypatch.setitem(SGSC.rules, nn.Linear, even)
    assert sum(row.differing for row in check_consistency(model, x, y)) > 0
    assert (hooks_on(model), model[0].weight.grad) == before
    with pytest.raises(ValueError, match="`model`"):
        check_consistency(nn.Sequential(nn.Dropout(), model), x, y)


def test_inputs_by_keyword_and_in_a_dict():
    model, x, y = toy()
    expected = {f"body.{name}": g for name, g in per_sample_gradients(model, x, y).items()}
    for compute, named in (
        (lambda self, features: self.body(input=features), {"features": x}),
        (lambda self, batch: self.body(batch["x"]), {"batch": {"x": x}}),
    ):
        c = measured(Made(compute, body=model), named, y, lambda made, named, y: F.cross_entropy(made(**named), y))
        assert_consistency(c, expected)


@examples(20)
@given(problems())
def test_summary_against_brute_force(problem):
    model, x, y = problem
    sgsc = SGSC(model, gamma=1.0, count_active=True)
    loss_of(model, x, y).backward()
    rows, c, per_sample = sgsc.summary().to_dict("records"), sgsc.consistency(), per_sample_gradients(model, x, y)
    largest = max(float(g.abs().max()) for g in per_sample.values())
    for row, (name, values) in zip(rows, c.items(), strict=True):
        g = per_sample[name]
        quantiles = {f"q{q:02d}": values.quantile(q / 100).item() for q in (5, 25, 50, 75, 95)}
        shares = {"share_zero": (values == 0).double().mean().item(), "active_share": (g != 0).double().mean().item()}
        expected = {"parameter": name, "entries": values.numel(), "samples": len(x), **quantiles, **shares}
        expected |= {"mean": values.mean().item(), "noise_floor": noise_floor(len(x)), "computed": row["computed"]}
        expected |= {"rounding": row["rounding"]}
        doubtful = (g.abs() <= 1e-14 * largest).double().mean().item()
        assert row == pytest.approx(expected, abs=doubtful + 1e-9)


def test_noise_floor_is_the_mean_of_c_under_random_signs():
    signs = torch.randint(2, (128, 100_000), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    assert noise_floor(128) == pytest.approx(sign_consistency(signs).mean().item(), rel=0.01)


def test_autocast_equals_one_backward_a_sample_under_autocast():
    model, x, y = inputs.cnn()
    loss = torch.autocast("cpu", torch.bfloat16)(loss_of)
    c, expected = measured(model, x, y, loss), sign_consistency(one_by_one(model, x, y, loss))
    for name in c:  # autograd rounds a gradient to bfloat16, the rules sum in float32: some signs near zero differ
        assert (c[name] - expected[name]).abs().mean() < 0.02, name


@pytest.mark.parametrize("build", [toy, inputs.cnn, inputs.batch_norm])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_a_model_compiled_after_sgsc_was_built_gives_the_same_c(build, in_place, backend):
    torch._dynamo.reset()
    model, x, y = build()
    expected = measured(model, x, y)
    sgsc = SGSC(model, gamma=1.0)
    compiled = model if in_place else torch.compile(model, backend=backend)
    if in_place:
        model.compile(backend=backend)
    for _ in range(2):
        model.zero_grad()
        loss_of(compiled, x, y).backward()
        assert_equal(sgsc.consistency(), expected)


@pytest.mark.parametrize("entries", [1, 200, 5000])
def test_chunks_bound_the_gradients_held_at_once_and_change_nothing(entries, monkeypatch):
    model, x, y = inputs.cnn()
    whole, held = measured(model, x, y), []
    summed = sums.sums_of
    monkeypatch.setattr("sgsc_core.rules.CHUNK_ENTRIES", entries)
    monkeypatch.setattr("sgsc_core.gradients.BLOCK_ENTRIES", entries)
    blocks = Products.blocks
    monkeypatch.setattr(Products, "blocks", lambda self: (
        held.append((block.numel(), block[0].numel())) or block for block in blocks(self)))  # fmt: skip
    monkeypatch.setattr(sums, "sums_of", lambda g, *f: held.append((g.numel(), g[0].numel())) or summed(g, *f)
                        if isinstance(g, Tensor) else summed(g, *f))  # fmt: skip
    assert_equal(measured(model, x, y), whole)
    biases = 10 * 6  # of a Linear layer: its errors, which come whole
    assert held and all(total <= max(entries, of_one, biases) for total, of_one in held)


def test_summary_marks_a_gradient_that_is_zero_but_for_rounding():
    torch.manual_seed(0)
    attention = Made(lambda self, x: self.value(x).mul(torch.softmax(self.query(x) @ self.key(x).mT, -1).sum(-1, True)),
                     query=nn.Linear(4, 4), key=nn.Linear(4, 4), value=nn.Linear(4, 4))  # fmt: skip
    model = nn.Sequential(attention, nn.Flatten(), nn.Linear(20, CLASSES))
    sgsc = SGSC(model, gamma=1.0)
    loss_of(model, torch.randn(8, 5, 4), torch.randint(CLASSES, (8,))).backward()
    assert set(sgsc.summary().query("rounding")["parameter"]) == {"0.query.weight", "0.query.bias", "0.key.weight",
                                                                  "0.key.bias"}  # fmt: skip


def test_a_kept_loss_keeps_no_activations():
    model = mlp((5, 37, 37, CLASSES), seed=0)
    SGSC(model, gamma=1.0)
    loss = loss_of(model, torch.randn(13, 5), torch.randint(CLASSES, (13,)))
    loss.backward()
    gc.collect()
    assert not [t for t in gc.get_objects() if type(t) is Tensor and t.shape == (13, 37)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("rows, width", [(1, 1), (7, 3), (600, 33), (33, 640)])
def test_signs_summed_as_bytes_are_those_of_the_definition(rows, width, dtype):
    """Beyond 127 samples, and of any layout."""
    a, delta = torch.ones(rows, 5, dtype=dtype), torch.randn(rows, width).to(dtype) * (torch.rand(rows, width) < 0.9)
    a[:, 1:4], a[0, 4] = torch.randn(rows, 3).relu(), math.nan
    delta[:, 0] = -1.0
    for pair in ((a, delta), (a.T.contiguous().T, delta.T.contiguous().T), (a, delta[:1].expand(rows, -1))):
        for found, expected in zip(sums._in_bytes(*pair), factored_sums(*pair, sums._sign), strict=True):
            assert_equal(found, expected)


def test_a_model_that_nobody_holds_goes_with_its_hooks_and_its_statistic():
    model, x, y = toy()
    sgsc = SGSC(model, gamma=1.0)
    loss_of(model, x, y).backward()
    sgsc.scale_gradients_()
    held = [weakref.ref(t) for p in model.parameters() for t in (p, p.grad, sgsc.consistency()["0.weight"])]
    held += [weakref.ref(sums) for sums in sgsc._statistic().sums.values()]
    del model, sgsc
    gc.collect()
    assert not [t for t in held if t() is not None]


def test_two_samples_do_not_need_memory_for_the_vocabulary():
    model, largest = nn.Sequential(nn.Embedding(1000, 4), nn.Flatten(), nn.Linear(12, CLASSES)), []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            largest.append(result.numel() if isinstance(result, Tensor) else 0)
            return result

    with SGSC(model, gamma=1.0) as sgsc, Sizes():
        loss_of(model, torch.randint(1000, (2, 3)), torch.tensor([0, 1])).backward()
    assert max(largest) == 1000 * 4  # the gradient and the sums; B of them would be 8,000
    assert (sgsc.consistency()["0.weight"] > 0).any()


def test_what_all_samples_share_is_not_run_again_and_dropout_does_not_matter():
    """A small GPT: tied embeddings, positions by arange, one token in front, dropout; as many positions as samples."""
    torch.manual_seed(0)
    parts = {"tokens": nn.Embedding(7, 8), "positions": nn.Embedding(6, 8), "head": nn.Linear(8, 7, bias=False)}
    parts |= {"block": nn.Linear(8, 8), "first": nn.Parameter(torch.randn(1, 1, 8))}
    parts["head"].weight = parts["tokens"].weight

    def forward(self, ids):
        x = self.tokens(ids) + self.positions(torch.arange(6)).unsqueeze(0)
        x = torch.cat([self.first.expand(len(x), -1, -1), F.dropout(x, 0.2)], 1)
        return self.head(x + F.dropout(self.block(x.transpose(1, 2).mT).relu(), 0.2)).mean(1)

    model, x, y = Made(forward, **parts).double(), torch.randint(7, (6, 6)), torch.randint(7, (6,))
    sgsc = SGSC(model, gamma=1.0)
    for _ in range(2):  # the second pass is not checked any more
        model.zero_grad()
        torch.manual_seed(1)
        F.cross_entropy(model(x), y).backward()
        c = sgsc.consistency()
    computed = dict(zip(sgsc.summary()["parameter"], sgsc.summary()["computed"], strict=True))
    assert computed["first"] == computed["positions.weight"] == "its part of a broadcast"
    assert computed["tokens.weight"] == "embedding_rule, linear_rule"
    sgsc.remove()
    torch.manual_seed(1)
    assert_consistency(c, parts_of_one_pass(model, x, y))


def axial(self, x):
    return self.head(torch.tanh(self.body(x + (self.row + self.column))).mean((1, 2)))


def prefixed(self, x):
    x = torch.cat([self.row.expand(len(x), -1, -1), x + self.column], 1)
    return self.head(torch.tanh(self.body(x)).mean(1))


def time_major(self, x):
    """The samples are the second of two folded axes, which data that are the same for all of them do not show."""
    rows = self.body((x + self.column).transpose(0, 1).reshape(-1, 4)).tanh()
    return self.head(rows.view(x.shape[1], -1, 4).mean(0))


def by_hand(self, x):
    return self.head(torch.tanh(F.linear(self.body(x), self.body.weight)) * self.row * self.column)


LATER = {  # a model, the shapes of its parameters, and those of its batches one after another
    "two shared tensors, as long as the batch": (axial, (8, 1, 4), (1, 8, 4), [(n, 8, 8) for n in (8, 4, 1, 5)]),
    "sequences as long as the batch, one sample": (prefixed, (1, 1, 4), (1, 1, 4), [(6, 5), (1, 5), (8, 8), (4, 7)]),
    "folded in another order": (time_major, (1,), (1,), [(6, 5), (5, 5), (3, 2)]),
    "a weight used by hand": (by_hand, (4,), (4,), [(6,), (4,), (1,)]),
}


@pytest.mark.filterwarnings("ignore:SGSC recomputes")
@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("case", LATER.values(), ids=LATER)
def test_later_batches_of_other_shapes_and_samples_that_are_alike(case, alike):
    compute, row, column, shapes = case
    torch.manual_seed(0)
    parts = {"row": nn.Parameter(torch.randn(row)), "column": nn.Parameter(torch.randn(column))}
    model = Made(compute, **parts, body=nn.Linear(4, 4), head=nn.Linear(4, CLASSES)).double()
    sgsc = SGSC(model, gamma=1.0)
    for number, shape in enumerate(shapes):
        x, y = torch.randn(*shape, 4).double(), torch.randint(CLASSES, shape[:1])
        if alike and not number:
            x[-1] = x[0]  # the two samples that are looked at
        model.zero_grad()
        loss_of(model, x, y).backward()
        c = sgsc.consistency()
        assert_consistency(c, {name: g for name, g in one_by_one(copy.deepcopy(model), x, y).items() if name in c})
        if number == 1:
            model.head.bias.requires_grad_(False)  # what was learnt of the others stays


def test_the_look_leaves_what_a_forward_pass_counts_and_keeps():
    class Stateful(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head, self.state, self.steps = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 3), None, 0
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.seen, self.steps = self.seen + 1, self.steps + 1
            out, state = self.layer(x, self.state)
            self.state = state.detach()
            return self.head(out[:, -1])

    model = Stateful()
    SGSC(model, gamma=1.0)
    model(torch.randn(8, 3, 4))
    assert (model.seen.item(), model.steps, tuple(model.state.shape)) == (1, 1, (1, 8, 5))


def test_a_number_in_front_of_the_samples_is_no_batch_of_one():
    model = Made(lambda self, time, x: self.layer(x) * time, layer=nn.Linear(5, CLASSES)).double()
    _, x, y = toy()
    sgsc = SGSC(model, gamma=1.0)
    F.cross_entropy(model(torch.ones(1).double(), x), y).backward()
    assert_consistency(sgsc.consistency(), {f"layer.{k}": g for k, g in one_by_one(model.layer, x, y).items()})
