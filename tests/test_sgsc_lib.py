"""SGSC on any model, exact: against the per-sample gradients that define it."""

import copy
import gc
import math
import subprocess
import sys
from pathlib import Path

import inputs
import pytest
import torch
import torch.nn.functional as F
from asserts import assert_consistency, assert_equal, examples, gated_step, loss_of, measured, one_by_one, weighted
from hypothesis import given
from hypothesis import strategies as st
from inputs import CLASSES, OPTIMISERS, Made, MeanOverTime, problems, toy
from torch import Tensor, nn

import sgsc_lib
from sgsc_lib import SGSC, factored_sums, mlp, noise_floor, per_sample_gradients, per_sample_rule, power_gate
from sgsc_lib import sign_consistency as consistency_of

# -- the module --------------------------------------------------------------------------------------------------------


def test_the_module_is_small_and_its_import_loads_the_standard_library_and_torch_alone():
    assert len(Path(sgsc_lib.__file__).read_text().splitlines()) <= 700
    script = "import sys, torch; before = set(sys.modules); import sgsc_lib; print(*set(sys.modules) - before)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    tops = {name.partition(".")[0] for name in loaded}
    assert {"sgsc_lib", "sgsc_checks"} <= tops <= {"sgsc_lib", "sgsc_checks", "torch", *sys.stdlib_module_names}


# -- truth -------------------------------------------------------------------------------------------------------------


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
@given(problems(torch.bfloat16), st.sampled_from(["before", "after"]))
def test_bfloat16_counts_exactly_and_keeps_its_dtype(problem, placement):
    model, x, y = problem
    sgsc, optimiser = SGSC(model, gamma=0.5), torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of(model, x, y).backward()
    for name, c in sgsc.consistency().items():
        assert c.dtype == torch.float32 and ((c >= 0) & (c <= 1)).all(), name
        torch.testing.assert_close(c * len(x), (c * len(x)).round())  # whole numbers of samples
    gated_step(sgsc, optimiser, placement)
    assert all(p.dtype == p.grad.dtype == torch.bfloat16 and p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("layer, shape", [(nn.Linear(2, 2), (2,)), (nn.Linear(2, 2), (3, 2)), (nn.LayerNorm(2), (2,))])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])  # float32 under autocast
def test_bfloat16_sums_beyond_256_samples(layer, shape, dtype):
    model = nn.Sequential(layer, nn.Flatten()).to(dtype)
    x, y = torch.rand(1, *shape, dtype=dtype).expand(1001, *shape), torch.zeros(1001, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        assert all((c == 1).all() for c in measured(model, x, y).values())  # 1001 is no bfloat16


@examples(30)
@given(problems(most=1), st.integers(1, 5))
def test_a_unanimous_batch_has_c_1_where_there_is_a_gradient_and_one_sample_0_or_1(problem, copies):
    model, x, y = problem
    per_sample = per_sample_gradients(model, x, y)
    largest = max(float(g.abs().max()) for g in per_sample.values())
    for name, c in measured(model, x.repeat_interleave(copies, 0), y.repeat_interleave(copies, 0)).items():
        assert (c[per_sample[name][0].abs() > 1e-12 * largest] == 1).all(), name
        assert copies > 1 or ((c == 0) | (c == 1)).all(), name


def test_by_hand_an_inactive_unit_caps_c_and_the_uses_of_a_token_add_up_before_the_sign():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU())
    nn.init.ones_(model[0].weight)
    x = torch.tensor([[1.0], [2.0], [3.0], [-1.0]])
    assert measured(model, x, torch.ones(4, 1), weighted)["0.weight"].item() == 0.75
    model = nn.Sequential(nn.Embedding(4, 1, padding_idx=0), nn.Flatten())
    tokens = torch.tensor([[1, 1, 0], [1, 2, 0]])
    errors = torch.tensor([[3.0, -1.0, 1.0], [-1.0, 5.0, 1.0]])  # token 1: 3 - 1 > 0 in sample 0, -1 < 0 in sample 1
    assert measured(model, tokens, errors, weighted)["0.weight"].flatten().tolist() == [0, 0, 0.5, 0]


def test_nan_gradients_count_as_sign_zero():
    assert torch.tensor([math.nan, -math.nan]).sign().tolist() == [0, 0]  # what all rules rely on
    model, x, y = toy()
    x[3] = math.nan
    sgsc = SGSC(model, gamma=0.5)
    loss_of(model, x, y, "sum").backward()
    kept = [i for i in range(len(x)) if i != 3]
    expected = {name: consistency_of(g) * 11 / 12 for name, g in per_sample_gradients(model, x[kept], y[kept]).items()}
    torch.testing.assert_close(sgsc.consistency(), expected)
    sgsc.scale_gradients_()
    assert len(sgsc.summary()) == 6


@examples(30)
@given(st.data())
def test_factored_sums_serve_every_multiplicative_function(data):
    torch.manual_seed(data.draw(st.integers(0, 999)))
    batch, fan_in, fan_out = (data.draw(st.integers(1, 6)) for _ in range(3))
    lead = data.draw(st.sampled_from([(), (2,), (2, 3)]))
    f = data.draw(st.sampled_from([torch.sign, torch.abs, torch.square, lambda t: (t != 0).double(), lambda t: t]))
    inputs = torch.randn(*lead, batch, fan_in, dtype=torch.float64).relu()
    errors = torch.randn(*lead, batch, fan_out, dtype=torch.float64)
    weight, bias = factored_sums(inputs, errors, f)
    per_sample = torch.einsum("...bo,...bi->...boi", errors, inputs)
    torch.testing.assert_close(weight, f(per_sample).sum(-3))
    torch.testing.assert_close(bias, f(errors).sum(-2))


# -- the gate and its two placements -----------------------------------------------------------------------------------


@examples(40)
@given(st.integers(1, 300), st.lists(st.floats(0, 5, allow_subnormal=False), min_size=1, max_size=3), st.integers(0))
def test_power_gate_is_c_to_the_gamma_of_each_run(batch, gammas, seed):
    sums = torch.randint(-batch, batch + 1, (len(gammas), 12), generator=torch.Generator().manual_seed(seed % 999))
    for dtype, rtol, atol in ((torch.float64, 1e-14, 0), (torch.float32, 1e-6, 1e-37)):
        together = power_gate(sums.to(dtype), batch, torch.tensor(gammas, dtype=torch.float64))
        for row, own, gamma in zip(together, sums, gammas, strict=True):
            expected = ((own.double().abs() / batch) ** gamma).to(dtype)  # 0 ** 0 = 1
            torch.testing.assert_close(row, expected, rtol=rtol, atol=atol)
            assert torch.equal(row, power_gate(own.to(dtype), batch, gamma))


@examples(20)
@given(problems(), st.floats(0, 3))
def test_scale_gradients_multiplies_the_mean_gradient_by_the_gate(problem, gamma):
    model, x, y = problem
    sgsc = SGSC(model, 5.0)
    sgsc.gamma = gamma  # it may change between steps
    loss_of(model, x, y).backward()
    expected = {name: p.grad * sgsc.consistency()[name] ** gamma for name, p in model.named_parameters()}
    sgsc.scale_gradients_()
    torch.testing.assert_close({name: p.grad for name, p in model.named_parameters()}, expected)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("placement", ["before", "after"])
def test_training_equals_the_definition_by_hand(placement, optimiser):
    gamma, (model, x, y) = 0.3, toy(20)
    by_hand = copy.deepcopy(model)
    sgsc, ours, theirs = SGSC(model, gamma), *(OPTIMISERS[optimiser](m.parameters()) for m in (model, by_hand))
    for x_batch, y_batch in zip(x.split(8), y.split(8), strict=True):  # 8, 8 and 4 samples
        ours.zero_grad()
        loss_of(model, x_batch, y_batch).backward()
        gated_step(sgsc, ours, placement)
        per_sample = per_sample_gradients(by_hand, x_batch, y_batch)
        gates = {name: c**gamma for name, c in consistency_of(per_sample).items()}
        before = {name: p.detach().clone() for name, p in by_hand.named_parameters()}
        for name, p in by_hand.named_parameters():
            p.grad = per_sample[name].mean(0) * (gates[name] if placement == "before" else 1)
        theirs.step()
        for name, p in by_hand.named_parameters() if placement == "after" else ():
            p.data = before[name] + gates[name] * (p.data - before[name])
    assert not torch.equal(model[0].weight, toy()[0][0].weight)
    torch.testing.assert_close(model.state_dict(), by_hand.state_dict(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("placement", ["before", "after"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gamma_0_is_the_plain_optimiser_bit_for_bit(placement, optimiser, dtype):
    model, x, y = toy(dtype=dtype)
    plain = copy.deepcopy(model)
    sgsc, ours, theirs = SGSC(model, 0), *(OPTIMISERS[optimiser](m.parameters()) for m in (model, plain))
    for _ in range(3):
        ours.zero_grad(), theirs.zero_grad()
        loss_of(model, x, y).backward(), loss_of(plain, x, y).backward()
        gated_step(sgsc, ours, placement)
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
        theirs.step()
    assert_equal(model.state_dict(), plain.state_dict())


def test_scaled_update_with_c_1_keeps_infinities_and_negative_zeros():
    model = nn.Linear(1, 3, bias=False)
    sgsc = SGSC(model, gamma=0.0)
    model(torch.ones(2, 1)).sum().backward()
    with torch.no_grad(), sgsc.scaled_update():
        model.weight.copy_(torch.tensor([[math.inf], [-math.inf], [-0.0]]))
    assert str(model.weight.flatten().tolist()) == "[inf, -inf, -0.0]"


def test_scaled_update_of_a_failed_step_changes_nothing_more():
    model, x, y = toy()
    sgsc = SGSC(model, gamma=1.0)
    loss_of(model, x, y).backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ZeroDivisionError), sgsc.scaled_update():
        raise ZeroDivisionError
    assert_equal(model.state_dict(), before)


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


@pytest.mark.parametrize("shapes", [[(3,), (5, 6)], [(5, 6), (3,)]])
def test_parts_may_be_vectors_and_sequences(shapes):
    model = nn.Linear(4, 2).double()
    parts = [(torch.randn(*shape, 4).double(), torch.randn(*shape, 2).double()) for shape in shapes]
    sgsc = SGSC(model, gamma=1.0)
    for part in parts:
        weighted(model, *part).backward()
    c, active_share = sgsc.consistency(), sgsc.summary()["active_share"]
    first, second = (one_by_one(model, *part, weighted) for part in parts)
    assert_consistency(c, {name: torch.cat([first[name], second[name]]) for name in c})
    assert (active_share == 1).all()


def test_parts_without_a_gradient_count_their_samples():
    model, x, _ = toy(4)
    errors = torch.tensor([[0.0], [1.0], [0.0], [1.0]], dtype=torch.float64)  # samples 0 and 2 have no gradient at all
    sgsc = SGSC(model, gamma=1.0)
    for i in range(4):
        weighted(model, x[i : i + 1], errors[i : i + 1]).backward()
    assert_consistency(sgsc.consistency(), one_by_one(copy.deepcopy(model), x, errors, weighted))


@pytest.mark.parametrize("how", ["none", "zeros", "gate"])
def test_clearing_the_gradients_or_using_the_gate_starts_a_new_statistic(how):
    model, x, y = toy()
    sgsc = SGSC(model, gamma=1.0)
    for part in (slice(0, 6), slice(6, 12)):
        loss_of(model, x[part], y[part]).backward()
        if how == "gate":
            sgsc.scale_gradients_()
        assert_consistency(sgsc.consistency(), per_sample_gradients(model, x[part], y[part]))  # readable after the gate
        if how != "gate":
            model.zero_grad(set_to_none=how == "none")


@pytest.mark.parametrize("to_none", [True, False])
def test_a_branch_that_a_batch_does_not_use_has_c_0(to_none):
    model, x, y = inputs.branches()
    sgsc = SGSC(model, gamma=1.0)
    for branch, other in ("ab", "ba", "ab"):
        model.zero_grad(set_to_none=to_none)
        F.cross_entropy(model(x, branch), y).backward()
        c = sgsc.consistency()
        sgsc.scale_gradients_()
        assert (c[f"{other}.weight"] == 0).all()
        assert (c[f"{branch}.weight"] > 0).any()


def test_evaluation_and_functional_calls_between_forward_and_backward_are_harmless():
    model, x, y = toy()
    sgsc = SGSC(model, gamma=1.0)
    loss_of(model, x[:3], y[:3])  # its loss is dropped
    loss = loss_of(model, x, y)
    reference = per_sample_gradients(model, x, y)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    torch.func.grad(lambda q: F.cross_entropy(torch.func.functional_call(model, q, (x,)), y))(parameters)
    for evaluation in (torch.no_grad, torch.inference_mode):
        with evaluation():
            model(x[:3])
    loss.backward()
    assert_consistency(sgsc.consistency(), reference)
    assert (sgsc.summary()["samples"] == len(x)).all()


@pytest.mark.parametrize("build", [toy, inputs.batch_norm])
def test_a_copy_of_the_model_does_not_report_to_its_original(build):
    model, x, y = build()
    sgsc = SGSC(model, gamma=1.0)
    loss = loss_of(model, x, y)
    average = copy.deepcopy(model).train()
    loss_of(average, x[:3], y[:3]).backward()
    loss.backward()
    assert_consistency(sgsc.consistency(), per_sample_gradients(model, x, y))


def test_what_was_measured_stays_after_the_gate_and_once_removed_and_two_instances_do_not_disturb_each_other():
    model, x, y = toy()
    first, second = SGSC(model, gamma=1.0), SGSC(model, gamma=0.5)
    loss_of(model, x, y).backward()
    c = first.consistency()
    first.scale_gradients_()
    first.remove()
    assert_equal(second.consistency(), c)
    loss_of(model, x[:3], y[:3]).backward()
    assert_equal(first.consistency(), c)
    first.remove()  # twice is once


# -- models ------------------------------------------------------------------------------------------------------------

HOOKED, PARTLY_FROZEN = nn.Linear(5, 5), nn.Linear(5, 5)
HOOKED.register_forward_hook(lambda _, args, output: output * args[0][:, :1].sign())
PARTLY_FROZEN.weight.requires_grad_(False)
SERVED = {  # what stands before a last Linear layer
    "a layer alone": [],
    "a layer of one's own, by one line": [inputs.scale(5), nn.ReLU()],
    "batch norm in eval mode": inputs.batch_norm()[0][:3],
    "a hook that replaces an output": [HOOKED, nn.ReLU()],
    "frozen parameters": [PARTLY_FROZEN, nn.ReLU(), nn.Linear(5, 5).requires_grad_(False)],
    "frozen, without a rule": [nn.PReLU().requires_grad_(False)],
    "frozen, tied": [inputs.tied().requires_grad_(False)],
    "frozen, with a parametrisation": [nn.utils.parametrizations.weight_norm(nn.Linear(5, 5)).requires_grad_(False)],
    "frozen, with the older spectral norm": [nn.utils.spectral_norm(nn.Linear(5, 5)).requires_grad_(False)],
}


@pytest.mark.parametrize("layers", SERVED.values(), ids=SERVED)
def test_serves(layers, monkeypatch):
    monkeypatch.setitem(SGSC.rules, Made, per_sample_rule)
    last, (_, x, y) = nn.Linear(5, CLASSES), toy()
    model = (nn.Sequential(*layers, last) if layers else last).double().eval()
    assert_consistency(measured(model, x, y), per_sample_gradients(model, x, y))


def test_inputs_by_keyword_and_in_a_dict():
    def compute(self: nn.Module, batch: dict | None = None, features: Tensor | None = None) -> Tensor:
        return self.head(input=batch["x"] if batch else features)

    _, x, y = toy()
    model = Made(compute, head=nn.Linear(5, CLASSES)).double()
    expected = {f"head.{k}": g for k, g in one_by_one(model.head, x, y).items()}
    for call in (lambda m, x, y: F.cross_entropy(m(features=x), y), lambda m, x, y: F.cross_entropy(m({"x": x}), y)):
        assert_consistency(measured(model, x, y, call), expected)


# -- diagnostics, mixed precision, compilation, memory -----------------------------------------------------------------


@examples(20)
@given(problems())
def test_summary_against_brute_force(problem):
    model, x, y = problem
    sgsc = SGSC(model, gamma=1.0)
    loss_of(model, x, y).backward()
    rows, c, per_sample = sgsc.summary().to_dict("records"), sgsc.consistency(), per_sample_gradients(model, x, y)
    assert [row["parameter"] for row in rows] == list(c)
    largest = max(float(g.abs().max()) for g in per_sample.values())
    for row in rows:
        g, values = per_sample[row["parameter"]], c[row["parameter"]]
        quantiles = {f"q{q:02d}": values.quantile(q / 100).item() for q in (5, 25, 50, 75, 95)}
        shares = {"share_zero": (values == 0).double().mean().item(), "active_share": (g != 0).double().mean().item()}
        expected = {"parameter": row["parameter"], "entries": values.numel(), "samples": len(x), **quantiles, **shares}
        expected |= {"mean": values.mean().item(), "noise_floor": noise_floor(len(x))}
        doubtful = (g.abs() <= 1e-14 * largest).double().mean().item()
        assert row == pytest.approx(expected, abs=doubtful + 1e-9)
        assert row["mean"] <= row["active_share"] + 1e-9  # inactive samples cap c


def test_noise_floor_is_the_mean_of_c_under_random_signs():
    signs = torch.randint(2, (128, 100_000), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    assert noise_floor(128) == pytest.approx(consistency_of(signs).mean().item(), rel=0.01)


def test_autocast_equals_one_backward_a_sample_under_autocast():
    model, x, y = inputs.cnn()
    loss = torch.autocast("cpu", torch.bfloat16)(loss_of)
    c, expected = measured(model, x, y, loss), consistency_of(one_by_one(model, x, y, loss))
    for name in c:  # autograd rounds a gradient to bfloat16, the rules sum in float32: some signs near zero differ
        assert (c[name] - expected[name]).abs().mean() < 0.02, name
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_a_gradient_scaler_leaves_c_unchanged():
    model, x, y = toy(dtype=torch.float32)
    plain = measured(model, x, y)
    model.zero_grad()
    scaler, optimiser = torch.amp.GradScaler("cpu", init_scale=1024.0), torch.optim.SGD(model.parameters(), lr=0.1)
    sgsc = SGSC(model, gamma=0.5)
    scaler.scale(loss_of(model, x, y)).backward()
    assert_equal(sgsc.consistency(), plain)
    scaler.unscale_(optimiser)
    expected = {name: p - 0.1 * p.grad * plain[name] ** 0.5 for name, p in model.named_parameters()}
    sgsc.scale_gradients_()
    scaler.step(optimiser)
    torch.testing.assert_close(dict(model.named_parameters()), expected)


@pytest.mark.parametrize("build", [toy, inputs.language_model, inputs.batch_norm])
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
    sign_sum = sgsc_lib._sign_sum
    monkeypatch.setattr(sgsc_lib, "CHUNK_ELEMENTS", entries)
    monkeypatch.setattr(sgsc_lib, "_sign_sum", lambda g: held.append((g.numel(), g.numel() // len(g))) or sign_sum(g))
    assert_equal(measured(model, x, y), whole)
    built = [total for total, per_sample in held if total > max(entries, per_sample)]
    assert all(total <= 10 * 6 for total in built)  # only the biases of a sequence Linear, [B, out], come whole


def test_a_kept_loss_keeps_no_activations():
    model = mlp((5, 37, 37, CLASSES), seed=0)
    SGSC(model, gamma=1.0)
    loss = loss_of(model, torch.randn(13, 5), torch.randint(CLASSES, (13,)))
    loss.backward()
    gc.collect()
    assert not [t for t in gc.get_objects() if type(t) is Tensor and t.shape == (13, 37)]


def test_two_samples_do_not_need_memory_for_the_vocabulary():
    model, largest = nn.Sequential(nn.Embedding(1000, 4), MeanOverTime(), nn.Linear(4, CLASSES)), []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            largest.append(result.numel() if isinstance(result, Tensor) else 0)
            return result

    sgsc = SGSC(model, gamma=1.0)
    with Sizes():
        loss_of(model, torch.randint(1000, (2, 3)), torch.tensor([0, 1])).backward()
    assert max(largest) == 1000 * 4  # the gradient and the sums; B of them would be 8,000
    assert (sgsc.consistency()["0.weight"] > 0).any()
