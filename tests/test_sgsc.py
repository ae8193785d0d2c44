"""SGSC on any model, against the per-sample gradients that define it: exact, or refused by name."""

import copy
import gc
import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sgsc_lib
from sgsc_lib import SGSC, factored_sums, mlp, noise_floor, per_sample_gradients, per_sample_rule, power_gate
from sgsc_lib import sign_consistency as consistency_of

CLASSES = 3
OPTIMISERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def examples(number: int) -> settings:
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=number, deadline=None, derandomize=True, database=None, suppress_health_check=slow)


# ----------------------------------------------------------------------------------------------------------------------
# Random architectures
# ----------------------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*inner)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class MeanOverTime(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def activation(draw) -> nn.Module:
    return draw(st.sampled_from([nn.ReLU, lambda: nn.ReLU(inplace=True), nn.Tanh, nn.GELU]))()


def some_width(draw) -> int:
    return draw(st.integers(2, 6))


def dense(draw, batch: int) -> tuple[list[nn.Module], Tensor]:
    width = some_width(draw)
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(0, 2))):
        block = [nn.Linear(width, width, bias=draw(st.booleans())), activation(draw)]
        layers += [Residual(*block)] if draw(st.booleans()) else block
        layers += [nn.LayerNorm(width)] if draw(st.booleans()) else []
    return layers, torch.randn(batch, width)


def sequence(draw, batch: int) -> tuple[list[nn.Module], Tensor]:
    width, length = some_width(draw), draw(st.integers(1, 4))
    layers = [
        nn.Linear(width, width, bias=draw(st.booleans())),
        nn.LayerNorm(draw(st.sampled_from([(width,), (length, width)]))),
        Residual(nn.Linear(width, width), activation(draw), nn.Linear(width, width)),
        draw(st.sampled_from([MeanOverTime, nn.Flatten]))(),
    ]
    return layers, torch.randn(batch, length, width)


def convolution(draw, batch: int) -> tuple[list[nn.Module], Tensor]:
    layer, axes = draw(st.sampled_from([(nn.Conv1d, 1), (nn.Conv2d, 2)]))
    groups = draw(st.integers(1, 2))
    channels = groups * draw(st.integers(1, 2))
    layers = [
        layer(
            channels, 4, kernel_size=draw(st.integers(1, 3)), stride=draw(st.integers(1, 2)), groups=groups,
            padding=draw(st.integers(0, 2)), dilation=draw(st.integers(1, 2)), bias=draw(st.booleans()),
            padding_mode=draw(st.sampled_from(["zeros", "circular", "replicate"])),
        ),
        nn.GroupNorm(draw(st.sampled_from([1, 2])), 4),
        activation(draw),
        layer(4, 2, kernel_size=3, padding="same"),
        nn.Flatten(),
    ]  # fmt: skip
    return layers, torch.randn(batch, channels, *[draw(st.integers(5, 7)) for _ in range(axes)])


def tokens(draw, batch: int) -> tuple[list[nn.Module], Tensor]:
    size, width = draw(st.integers(2, 5)), some_width(draw)  # so few tokens that a sample repeats some
    shape = draw(st.sampled_from([(), (1,), (4,), (2, 3)]))
    embedding = nn.Embedding(size, width, padding_idx=draw(st.sampled_from([None, 0, -1])))
    layers = [embedding, nn.Linear(width, width), activation(draw), nn.Flatten()]
    return layers, torch.randint(size, (batch, *shape))


@st.composite
def problems(draw, dtype=torch.float64, least: int = 1, most: int = 9) -> tuple[nn.Module, Tensor, Tensor]:
    """A random model with a batch of `least` to `most` samples for it: (model, x, y)."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    family = draw(st.sampled_from([dense, sequence, convolution, tokens]))
    layers, x = family(draw, draw(st.integers(least, most)))
    model = nn.Sequential(*layers)
    with torch.no_grad():
        features = model(x.clone()).shape[-1]
    model = model.append(nn.Linear(features, CLASSES)).to(dtype)
    return model, x.to(dtype) if x.is_floating_point() else x, torch.randint(CLASSES, (len(x),))


# ----------------------------------------------------------------------------------------------------------------------
# Helpers
# ----------------------------------------------------------------------------------------------------------------------


def loss_of(model: nn.Module, x: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(model(x), y, reduction=reduction)


def measured(model: nn.Module, x: Tensor, y: Tensor, loss=loss_of) -> dict[str, Tensor]:
    """c of one batch by SGSC."""
    model.zero_grad()
    with SGSC(model, gamma=1.0) as sgsc:
        loss(model, x, y).backward()
        return sgsc.consistency()


def assert_consistency(c: dict[str, Tensor], per_sample: dict[str, Tensor]) -> int:
    """Assert c is that of the per-sample gradients, but for signs of gradients within rounding of zero; count those."""
    assert c.keys() == per_sample.keys()
    largest = max(float(g.abs().max()) for g in per_sample.values())
    flips = 0
    for name, g in per_sample.items():
        assert c[name].shape == g.shape[1:]
        assert ((c[name] >= 0) & (c[name] <= 1)).all(), name
        off = ((c[name] - consistency_of(g)).abs() * len(g)).round()
        doubtful = ((g != 0) & (g.abs() <= 100 * torch.finfo(g.dtype).eps * largest)).sum(0)
        assert (off <= 2 * doubtful).all(), f"{name}: c differs where no per-sample gradient is near zero"
        flips += int((off > 0).sum())
    return flips


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def one_by_one(model: nn.Module, x: Tensor, y: Tensor, loss=loss_of) -> dict[str, Tensor]:
    """Per-sample gradients by one ordinary backward pass a sample: the oracle where vmap can't go."""
    rows = []
    for i in range(len(x)):
        model.zero_grad()
        loss(model, x[i : i + 1], y[i : i + 1]).backward()
        rows.append({name: p.grad for name, p in model.named_parameters()})
    model.zero_grad()
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def hooks_on(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def toy(batch: int = 12, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 5, generator=generator, dtype=dtype)
    return mlp((5, 7, 6, CLASSES), seed=0).to(dtype), x, torch.randint(CLASSES, (batch,), generator=generator)


def small_cnn() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.GroupNorm(2, 4), nn.Flatten(1, 2),
        nn.Linear(4, 6), nn.LayerNorm(6), nn.Flatten(), nn.Linear(96, CLASSES),
    )  # fmt: skip
    return model, torch.randn(10, 2, 6, 6), torch.randint(CLASSES, (10,))


# ----------------------------------------------------------------------------------------------------------------------
# Truth
# ----------------------------------------------------------------------------------------------------------------------


@examples(60)
@given(problems())
def test_equals_per_sample_gradients_in_float64(problem):
    model, x, y = problem
    assert_consistency(measured(model, x, y), per_sample_gradients(model, x, y))


@examples(30)
@given(problems(torch.float32))
def test_float32_flips_few_signs_and_only_of_gradients_within_rounding_of_zero(problem):
    model, x, y = problem
    c = measured(model, x, y)
    flips = assert_consistency(c, per_sample_gradients(model, x, y))
    assert flips <= 0.02 * sum(tensor.numel() for tensor in c.values()) + 2


@examples(15)
@given(problems(torch.bfloat16), st.sampled_from(["before", "after"]))
def test_bfloat16_counts_exactly_and_keeps_its_dtype(problem, placement):
    model, x, y = problem
    sgsc = SGSC(model, gamma=0.5)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of(model, x, y).backward()
    for name, c in sgsc.consistency().items():
        assert c.dtype == torch.float32, name
        assert ((c >= 0) & (c <= 1)).all(), name
        torch.testing.assert_close(c * len(x), (c * len(x)).round())  # whole numbers of samples
    if placement == "before":
        sgsc.scale_gradients_()
        optimiser.step()
    else:
        with sgsc.scaled_update():
            optimiser.step()
    assert all(p.dtype == p.grad.dtype == torch.bfloat16 and p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("layer, shape", [(nn.Linear(2, 2), (2,)), (nn.Linear(2, 2), (3, 2)), (nn.LayerNorm(2), (2,))])
def test_bfloat16_sums_beyond_256_samples(layer, shape):
    torch.manual_seed(0)
    model = nn.Sequential(layer, nn.Flatten()).bfloat16()
    x, y = torch.rand(1, *shape).bfloat16().expand(1001, *shape), torch.zeros(1001, dtype=torch.int64)
    assert all((c == 1).all() for c in measured(model, x, y).values())  # 1001 is no bfloat16


@examples(20)
@given(problems(), st.randoms(use_true_random=False))
def test_permuting_the_samples_changes_nothing(problem, random):
    model, x, y = problem
    order = list(range(len(x)))
    random.shuffle(order)
    assert_consistency(measured(model, x[order], y[order]), per_sample_gradients(model, x, y))


@examples(20)
@given(problems(), st.floats(1e-3, 1e3), st.sampled_from(["mean", "sum"]))
def test_rescaling_the_loss_changes_nothing(problem, factor, reduction):
    model, x, y = problem
    c = measured(model, x, y, lambda *batch: factor * loss_of(*batch, reduction))
    assert_consistency(c, per_sample_gradients(model, x, y))


@examples(20)
@given(problems(most=1), st.integers(2, 5))
def test_a_unanimous_batch_has_c_1_where_there_is_a_gradient(problem, copies):
    model, x, y = problem
    per_sample = per_sample_gradients(model, x, y)
    largest = max(float(g.abs().max()) for g in per_sample.values())
    repeated = measured(model, x.repeat_interleave(copies, 0), y.repeat_interleave(copies, 0))
    for name, c in repeated.items():
        clear = per_sample[name][0].abs() > 1e-12 * largest
        assert (c[clear] == 1).all(), name


@examples(20)
@given(problems(most=1))
def test_one_sample_has_c_0_or_1(problem):
    assert all(((c == 0) | (c == 1)).all() for c in measured(*problem).values())


def test_an_inactive_unit_caps_c():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, CLASSES)).double()
    nn.init.ones_(model[0].weight)
    x, y = torch.tensor([[1.0], [2.0], [3.0], [-1.0]], dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    assert measured(model, x, y)["0.weight"].item() == 0.75


def test_the_uses_of_a_token_add_up_before_the_sign_and_padding_has_none():
    model = nn.Sequential(nn.Embedding(4, 1, padding_idx=0), nn.Flatten())
    tokens = torch.tensor([[1, 1, 0], [1, 2, 0]])
    errors = torch.tensor([[3.0, -1.0, 1.0], [-1.0, 5.0, 1.0]])  # token 1: 3 - 1 > 0 in sample 0, -1 < 0 in sample 1
    c = measured(model, tokens, errors, lambda model, x, y: (model(x) * y).sum())
    assert c["0.weight"].flatten().tolist() == [0, 0, 0.5, 0]


def test_nan_gradients_count_as_sign_zero():
    assert torch.tensor([math.nan, -math.nan]).sign().tolist() == [0, 0]  # what all rules rely on
    model, x, y = toy()
    x[3] = math.nan
    sgsc = SGSC(model, gamma=0.5)
    loss_of(model, x, y, "sum").backward()
    kept = [i for i in range(len(x)) if i != 3]
    expected = {name: consistency_of(g) * 11 / 12 for name, g in per_sample_gradients(model, x[kept], y[kept]).items()}
    for name, c in sgsc.consistency().items():
        torch.testing.assert_close(c, expected[name])
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


# ----------------------------------------------------------------------------------------------------------------------
# The gate and its two placements
# ----------------------------------------------------------------------------------------------------------------------


@examples(30)
@given(st.integers(1, 300), st.floats(0, 5, allow_subnormal=False), st.integers(0, 999))
def test_power_gate_is_c_to_the_gamma(batch, gamma, seed):
    sums = torch.randint(-batch, batch + 1, (3, 4), generator=torch.Generator().manual_seed(seed)).double()
    expected = (sums.abs() / batch) ** gamma
    torch.testing.assert_close(power_gate(sums, batch, gamma), expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(power_gate(sums.float(), batch, gamma), expected.float(), rtol=1e-6, atol=1e-37)


def test_power_gate_takes_a_gamma_for_each_run_of_a_stack():
    sums = torch.arange(-6, 6, dtype=torch.float32).view(3, 2, 2)
    gammas = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)
    together = power_gate(sums, 6, gammas)
    for run, gamma in enumerate(gammas.tolist()):
        assert torch.equal(together[run], power_gate(sums[run], 6, gamma))
    assert (together[0] == 1).all()  # 0 ** 0 = 1


@examples(20)
@given(problems(), st.floats(0, 3))
def test_scale_gradients_multiplies_the_mean_gradient_by_the_gate(problem, gamma):
    model, x, y = problem
    sgsc = SGSC(model, gamma)
    loss_of(model, x, y).backward()
    expected = {name: p.grad * sgsc.consistency()[name] ** gamma for name, p in model.named_parameters()}
    sgsc.scale_gradients_()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("placement", ["before", "after"])
def test_training_equals_the_definition_by_hand(placement, optimiser):
    gamma, (model, x, y) = 0.3, toy(20)
    by_hand = copy.deepcopy(model)
    sgsc, ours, theirs = SGSC(model, gamma), *(OPTIMISERS[optimiser](m.parameters()) for m in (model, by_hand))
    for x_batch, y_batch in zip(x.split(8), y.split(8), strict=True):  # 8, 8 and 4 samples
        ours.zero_grad()
        loss_of(model, x_batch, y_batch).backward()
        per_sample = per_sample_gradients(by_hand, x_batch, y_batch)
        gates = {name: consistency_of(g) ** gamma for name, g in per_sample.items()}
        before = {name: p.detach().clone() for name, p in by_hand.named_parameters()}
        for name, p in by_hand.named_parameters():
            p.grad = per_sample[name].mean(0)
        if placement == "before":
            sgsc.scale_gradients_()
            ours.step()
            for name, p in by_hand.named_parameters():
                p.grad *= gates[name]
            theirs.step()
        else:
            with sgsc.scaled_update():
                ours.step()
            theirs.step()
            with torch.no_grad():
                for name, p in by_hand.named_parameters():
                    p.copy_(before[name] + gates[name] * (p - before[name]))
    assert not torch.equal(model[0].weight, mlp((5, 7, 6, CLASSES), seed=0)[0].weight.double())
    for p, q in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


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
        if placement == "before":
            sgsc.scale_gradients_()
            assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
            ours.step()
        else:
            with sgsc.scaled_update():
                ours.step()
        theirs.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


def test_scaled_update_with_c_1_keeps_infinities_and_negative_zeros():
    model = nn.Linear(1, 3, bias=False)
    sgsc = SGSC(model, gamma=0.0)
    model(torch.ones(2, 1)).sum().backward()
    with torch.no_grad(), sgsc.scaled_update():
        model.weight.copy_(torch.tensor([[math.inf], [-math.inf], [-0.0]]))
    assert model.weight.flatten().tolist()[:2] == [math.inf, -math.inf]
    assert model.weight[2].signbit()


def test_scaled_update_of_a_failed_step_changes_nothing_more():
    model, x, y = toy()
    sgsc = SGSC(model, gamma=1.0)
    loss_of(model, x, y).backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ZeroDivisionError), sgsc.scaled_update():
        raise ZeroDivisionError
    assert_equal(dict(model.state_dict()), dict(before))


def test_a_scaled_update_that_no_with_entered_is_refused_in_the_next_forward_pass_once():
    model, x, y = toy()
    sgsc = SGSC(model, gamma=1.0)
    loss_of(model, x, y).backward()
    sgsc.scaled_update()
    with torch.no_grad():
        model(x)  # evaluation goes on
    with pytest.raises(RuntimeError, match=r"called but not entered.* Write: with sgsc.scaled_update\(\):"):
        model(x)
    loss_of(model, x, y).backward()
    with sgsc.scaled_update():
        pass
    model(x)


def test_gamma_can_be_changed_between_steps():
    model, x, y = toy()
    sgsc = SGSC(model, gamma=1.0)
    sgsc.gamma = 0.0
    loss_of(model, x, y).backward()
    before = model[0].weight.grad.clone()
    sgsc.scale_gradients_()
    assert torch.equal(model[0].weight.grad, before)


# ----------------------------------------------------------------------------------------------------------------------
# Which samples a statistic covers
# ----------------------------------------------------------------------------------------------------------------------


@examples(20)
@given(problems(least=2), st.integers(1, 4))
def test_a_batch_in_parts_equals_one_pass(problem, size):
    model, x, y = problem
    sgsc = SGSC(model, gamma=1.0)
    for x_part, y_part in zip(x.split(size), y.split(size), strict=True):
        loss_of(model, x_part, y_part).backward()
        sgsc.consistency()  # reading it in between changes nothing
    assert_consistency(sgsc.consistency(), per_sample_gradients(model, x, y))
    assert (sgsc.summary()["samples"] == len(x)).all()


def test_parts_without_a_gradient_count_their_samples():
    model, x, _ = toy(4)

    def hinge(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return (model(x).sum(1) * y).sum()

    y = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64)  # samples 0 and 2 have no gradient at all
    sgsc = SGSC(model, gamma=1.0)
    for i in range(4):
        hinge(model, x[i : i + 1], y[i : i + 1]).backward()
    assert_consistency(sgsc.consistency(), one_by_one(copy.deepcopy(model), x, y, hinge))


@pytest.mark.parametrize("to_none", [True, False])
def test_clearing_the_gradients_starts_a_new_statistic(to_none):
    model, x, y = toy()
    sgsc = SGSC(model, gamma=1.0)
    for part in (slice(0, 6), slice(6, 12)):
        model.zero_grad(set_to_none=to_none)
        loss_of(model, x[part], y[part]).backward()
        assert_consistency(sgsc.consistency(), per_sample_gradients(model, x[part], y[part]))


def test_a_gate_starts_a_new_statistic_even_without_clearing():
    model, x, y = toy()
    sgsc = SGSC(model, gamma=1.0)
    loss_of(model, x[:6], y[:6]).backward()
    sgsc.scale_gradients_()
    assert_consistency(sgsc.consistency(), per_sample_gradients(model, x[:6], y[:6]))  # still readable
    loss_of(model, x[6:], y[6:]).backward()
    assert_consistency(sgsc.consistency(), per_sample_gradients(model, x[6:], y[6:]))


def test_an_empty_batch_adds_nothing():
    model, x, y = toy()
    sgsc = SGSC(model, gamma=1.0)
    for part in (slice(0, 12), slice(0, 0)):
        loss_of(model, x[part], y[part], "sum").backward()
    assert_consistency(sgsc.consistency(), per_sample_gradients(model, x, y))


@pytest.mark.parametrize("to_none", [True, False])
def test_a_branch_that_a_batch_does_not_use_has_c_0(to_none):
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, CLASSES), nn.Linear(5, CLASSES)

        def forward(self, x: Tensor, branch: str) -> Tensor:
            return getattr(self, branch)(x)

    _, x, y = toy()
    model = Branches().double()
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
    loss = loss_of(model, x, y)
    reference = per_sample_gradients(model, x, y)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    torch.func.grad(lambda q: F.cross_entropy(torch.func.functional_call(model, q, (x,)), y))(parameters)
    with torch.no_grad():
        model(x[:3])
    with torch.inference_mode():
        model(x[:3])
    loss.backward()
    assert_consistency(sgsc.consistency(), reference)
    assert (sgsc.summary()["samples"] == len(x)).all()


def test_an_evaluation_whose_loss_is_dropped_is_harmless():
    model, x, y = toy()
    sgsc = SGSC(model, gamma=1.0)
    loss_of(model, x[:3], y[:3])  # forgot torch.no_grad()
    loss_of(model, x, y).backward()
    assert_consistency(sgsc.consistency(), per_sample_gradients(model, x, y))


def test_a_copy_of_the_model_does_not_report_to_its_original():
    model, x, y = toy()
    sgsc = SGSC(model, gamma=1.0)
    loss = loss_of(model, x, y)
    average = copy.deepcopy(model)
    loss_of(average, x[:3], y[:3]).backward()
    loss.backward()
    assert_consistency(sgsc.consistency(), per_sample_gradients(model, x, y))


def test_removing_takes_every_hook_off():
    model, x, y = toy()
    with SGSC(model, gamma=1.0) as sgsc:
        assert hooks_on(model) > 0
        loss_of(model, x, y).backward()
    assert hooks_on(model) == 0
    c = sgsc.consistency()
    loss_of(model, x[:3], y[:3]).backward()
    assert_equal(sgsc.consistency(), c)  # what was measured stays readable, and nothing is added
    sgsc.remove()  # twice is once


def test_two_instances_on_one_model_do_not_disturb_each_other():
    model, x, y = toy()
    first, second = SGSC(model, gamma=1.0), SGSC(model, gamma=0.5)
    loss_of(model, x, y).backward()
    first.scale_gradients_()
    assert_equal(first.consistency(), second.consistency())


# ----------------------------------------------------------------------------------------------------------------------
# Models
# ----------------------------------------------------------------------------------------------------------------------


def test_a_single_layer_is_a_model():
    model, (_, x, y) = nn.Linear(5, CLASSES).double(), toy()
    assert_consistency(measured(model, x, y), per_sample_gradients(model, x, y))


def test_inputs_by_keyword_and_in_a_dict():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(5, CLASSES)

        def forward(self, batch: dict | None = None, features: Tensor | None = None) -> Tensor:
            return self.head(input=batch["x"] if batch else features)

    _, x, y = toy()
    model = Named().double()
    expected = {f"head.{k}": g for k, g in one_by_one(model.head, x, y).items()}
    for call in (lambda m, x, y: F.cross_entropy(m(features=x), y), lambda m, x, y: F.cross_entropy(m({"x": x}), y)):
        assert_consistency(measured(model, x, y, call), expected)


def test_frozen_parameters_are_skipped():
    model, x, y = toy()
    model[0].requires_grad_(False)
    model[2].weight.requires_grad_(False)
    c = measured(model, x, y)
    assert list(c) == ["2.bias", "4.weight", "4.bias"]
    assert_consistency(c, per_sample_gradients(model, x, y))


def test_unsupported_layers_may_be_there_frozen_and_tied_ones_too():
    _, x, y = toy()
    layers = [nn.Linear(5, 5), nn.Linear(5, 5), nn.PReLU(), nn.Linear(5, CLASSES)]
    layers[1].weight = layers[0].weight
    model = nn.Sequential(*layers).double()
    model[:3].requires_grad_(False)
    assert_consistency(measured(model, x, y), per_sample_gradients(model, x, y))


def test_a_layer_frozen_at_first_can_be_trained_later():
    model, x, y = toy()
    model[0].requires_grad_(False)
    sgsc = SGSC(model, gamma=1.0)
    model[0].requires_grad_(True)
    loss_of(model, x, y).backward()
    assert_consistency(sgsc.consistency(), per_sample_gradients(model, x, y))


def test_batch_norm_is_served_in_eval_mode():
    _, x, y = toy()
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, CLASSES)).double()
    model[1](torch.randn(20, 4, dtype=torch.float64))
    model.eval()
    assert_consistency(measured(model, x, y), per_sample_gradients(model, x, y))


def test_a_hook_that_replaces_an_output_is_seen_through():
    model, x, y = toy()
    model[0].register_forward_hook(lambda _, args, output: output * args[0][:, :1].sign())
    assert_consistency(measured(model, x, y), per_sample_gradients(model, x, y))


class Scale(nn.Module):
    """A layer of a user's own, with a layer inside and a parameter used twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(width))
        self.inner = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * self.scale) * self.scale


def test_a_layer_of_ones_own_is_served_by_one_line(monkeypatch):
    torch.manual_seed(0)
    _, x, y = toy()
    model = nn.Sequential(nn.Linear(5, 4), Scale(4), nn.ReLU(), nn.Linear(4, CLASSES)).double()
    with pytest.raises(ValueError, match=re.escape("SGSC.rules[Scale] = per_sample_rule")):
        SGSC(model, gamma=1.0)
    monkeypatch.setitem(SGSC.rules, Scale, per_sample_rule)
    assert_consistency(measured(model, x, y), per_sample_gradients(model, x, y))


@pytest.mark.parametrize("rule", [lambda module, inputs: {}, lambda: {}, None], ids=["two", "none", "no function"])
def test_what_cannot_be_called_as_a_rule_is_refused_before_training(monkeypatch, rule):
    monkeypatch.setitem(SGSC.rules, nn.Linear, rule)
    with pytest.raises(TypeError, match=r"The rule for '0' \(Linear\) should be a function of the module, its input"):
        SGSC(mlp((4, 2), seed=0), gamma=1.0)


def test_a_rule_that_forgets_a_parameter_is_named(monkeypatch):
    model, x, y = toy()
    monkeypatch.setitem(SGSC.rules, nn.Linear, lambda module, inputs, errors: {})
    with pytest.raises(KeyError, match=r"'4' \(Linear\) should cover 'weight'"):
        measured(model, x, y)


@pytest.mark.parametrize(
    ("returned", "error"),
    [
        (lambda bias: ("bias", bias), TypeError),
        (lambda bias: {"weight": bias, "bias": bias}, ValueError),
        (lambda bias: {"weight": (bias, torch.tensor(1)), "bias": (bias, torch.tensor(1))}, ValueError),
        (lambda bias: {"weight": (torch.zeros(3, 6), 1), "bias": (bias, torch.tensor(1))}, ValueError),
    ],
)
def test_what_is_no_sum_and_count_is_refused_by_the_rules_name(monkeypatch, returned, error):
    model, x, y = toy()
    monkeypatch.setitem(SGSC.rules, nn.Linear, lambda module, inputs, errors: returned(torch.zeros(len(module.bias))))
    with pytest.raises(error, match=r"The rule for '4' \(Linear\) should (return|give for 'weight')"):
        measured(model, x, y)


def signs_and_counts(module, inputs, errors):
    gradients = {"weight": torch.einsum("bo,bi->boi", errors, inputs), "bias": errors}
    return {name: (g.sign().sum(0), g.count_nonzero()) for name, g in gradients.items()}


@pytest.mark.parametrize(
    ("mistaken", "message"),
    [
        (lambda total, count: (total / 16, count), "whole numbers from -16 to 16"),  # .mean(0) for .sum(0)
        (lambda total, count: (total * 17, count), "whole numbers from -16 to 16"),
        (lambda total, count: (total * math.nan, count), "Found nan to nan"),
        (lambda total, count: (total, torch.tensor(0)), "a whole number, here from"),
        (lambda total, count: (total, count * 100), "a whole number, here from"),
        (lambda total, count: (total, count - 0.5), "a whole number, here from"),
        (lambda total, count: total, "Found Tensor of"),
    ],
)
def test_the_numbers_of_another_s_rule_are_checked(monkeypatch, mistaken, message):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 8), nn.ReLU(), nn.Linear(8, 10))
    x, y = torch.randn(16, 40), torch.arange(16) % 10

    def rule(module, inputs, errors):
        return {name: mistaken(*found) for name, found in signs_and_counts(module, inputs, errors).items()}

    monkeypatch.setitem(SGSC.rules, nn.Linear, signs_and_counts)
    assert_consistency(measured(model, x, y), per_sample_gradients(model, x, y))
    monkeypatch.setitem(SGSC.rules, nn.Linear, rule)
    with pytest.raises(ValueError, match=rf"The rule for '2' \(Linear\) should give for 'weight' .*{message}"):
        measured(model, x, y)
    monkeypatch.setitem(SGSC.rules, nn.Linear, lambda *given: signs_and_counts(*given) | {"wieght": (x, y)})
    with pytest.raises(ValueError, match=r"should cover \['bias', 'weight'\] and no more. Found \['wieght'\]"):
        measured(model, x, y)


# ----------------------------------------------------------------------------------------------------------------------
# Refusals: the module's name, the reason and the way out
# ----------------------------------------------------------------------------------------------------------------------


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5))
    model[2].weight = model[0].weight
    return model


class MyLinear(nn.Linear):
    pass


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(5))


WEIGHT_NORM = nn.utils.parametrizations.weight_norm
REFUSED_MODELS = {
    "batch norm in training": (lambda: nn.BatchNorm1d(5), "'0' (BatchNorm1d)", "couples the samples", "eval()"),
    "batch norm without statistics": (
        lambda: nn.BatchNorm2d(5, track_running_stats=False).eval(), "'0' (BatchNorm2d)", "couples", "GroupNorm"),
    "batch norm without parameters": (lambda: nn.BatchNorm1d(5, affine=False), "'0' (BatchNorm1d)", "couples", "eval"),
    "tied weights": (tied, "'0.2' (Linear)", "shares a parameter with '0.0'", "per_sample_gradients"),
    "LSTM": (lambda: nn.LSTM(5, 5), "'0' (LSTM)", "no rule", "per_sample_gradients"),
    "attention": (lambda: nn.MultiheadAttention(4, 2), "'0' (MultiheadAttention)", "no rule", "per_sample_gradients"),
    "transformer": (lambda: nn.TransformerEncoderLayer(4, 2), "'0.self_attn' (MultiheadAttention)", "no rule", "reeze"),
    "custom module": (Bare, "'0' (Bare)", "no rule for it, and it owns ['offset']", "SGSC.rules[Bare] ="),
    "subclass": (lambda: MyLinear(5, 5), "'0' (MyLinear)", "no rule", "SGSC.rules[MyLinear] ="),
    "parametrisation": (
        lambda: WEIGHT_NORM(nn.Linear(5, 5)), "'0' (ParametrizedLinear)", "computed from other", "Remove the param"),
    "parametrised convolution": (
        lambda: WEIGHT_NORM(nn.Conv1d(5, 5, 1, bias=False)), "'0' (Param", "computed from other", "Remove the param"),
    "older spectral norm": (
        lambda: nn.utils.spectral_norm(nn.Conv1d(5, 5, 1)), "'0' (Conv1d)", "computed from other", "Remove the param"),
    "lazy": (lambda: nn.LazyLinear(5), "'0' (LazyLinear)", "not initialised", "Run the model once"),
    "data parallel": (lambda: nn.DataParallel(nn.Linear(5, 5)), "'0' (DataParallel)", "copies", "DistributedData"),
    "compiled": (lambda: torch.compile(nn.Linear(5, 5)), "'0' (OptimizedModule)", "not run", "Build SGSC first"),
    "complex": (lambda: nn.Linear(5, 5, dtype=torch.complex64), "'0' (Linear)", "not real", "per_sample_gradients"),
    "sparse embedding": (lambda: nn.Embedding(5, 5, sparse=True), "'0' (Embedding)", "sparse", "sparse=False"),
    "embedding with max_norm": (lambda: nn.Embedding(5, 5, max_norm=1.0), "'0' (Embedding)", "max_norm", "=None"),
}  # fmt: skip


@pytest.mark.parametrize("build, words", [(b, w) for b, *w in REFUSED_MODELS.values()], ids=list(REFUSED_MODELS))
def test_refuses_at_construction(build, words):
    model = nn.Sequential(build())
    before = hooks_on(model)
    with pytest.raises(ValueError) as refusal:
        SGSC(model, gamma=0.5)
    for word in words:
        assert word in str(refusal.value)
    assert hooks_on(model) == before


@pytest.mark.parametrize(
    "gamma, error",
    [(-0.1, ValueError), (math.nan, ValueError), (math.inf, ValueError), ("1", TypeError), (True, TypeError),
     (None, TypeError)],
)  # fmt: skip
def test_refuses_a_bad_gamma(gamma, error):
    model, x, y = toy()
    with pytest.raises(error, match=r"`gamma` should be .* Found"):
        SGSC(model, gamma=gamma)
    sgsc = SGSC(model, gamma=1.0)
    sgsc.gamma = gamma
    loss_of(model, x, y).backward()
    with pytest.raises(error, match=r"`gamma` should be .* Found"):
        sgsc.scale_gradients_()


def test_refuses_what_is_no_module():
    with pytest.raises(TypeError, match=r"`model` should be a torch.nn.Module. Found function"):
        SGSC(lambda x: x, gamma=0.5)


class UsedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x))


class TiedByHand(UsedTwice):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.layer(x), self.layer.weight)


class TimeInFront(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, 5]
        return self.layer(x.flatten(0, 1)).view_as(x)


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Embedding(3, 5)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, 5]
        return x + self.layer(torch.arange(3))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Bilinear(5, 5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x)


REFUSED_PASSES = {
    "layer used twice": (UsedTwice, (4, 5), "'layer' (Linear)", "second use", "a layer of its own"),
    "weight used again by hand": (TiedByHand, (4, 5), "'layer' (Linear)", "second time", "a layer of its own"),
    "batch folded into time": (TimeInFront, (4, 3, 5), "'layer' (Linear)", "4 samples", "(12, 5)", "Keep the batch in"),
    "input shared by all samples": (Positions, (4, 3, 5), "'layer' (Embedding)", "4 samples", "(3,)", "expand"),
    "unbatched vector": (lambda: nn.Sequential(nn.Linear(5, 5)), (5,), "'0' (Linear)", "samples", "Keep the batch"),
    "unbatched image": (lambda: nn.Sequential(nn.Conv2d(2, 5, 3)), (2, 5, 5), "'0' (Conv2d)", "samples", "Keep the"),
    "two inputs": (TwoInputs, (4, 5), "'layer' (Bilinear)", "one tensor to one tensor"),
}  # fmt: skip


@pytest.mark.parametrize("build, shape, words", [(b, s, w) for b, s, *w in REFUSED_PASSES.values()], ids=REFUSED_PASSES)
def test_refuses_in_the_forward_pass(build, shape, words, monkeypatch):
    monkeypatch.setitem(SGSC.rules, nn.Bilinear, per_sample_rule)
    model = build()
    SGSC(model, gamma=0.5)
    with pytest.raises(ValueError) as refusal:
        model(torch.randn(shape))
    for word in words:
        assert word in str(refusal.value)


def test_refuses_batch_norm_put_back_into_training():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).eval()
    SGSC(model, gamma=0.5)
    model.train()
    with pytest.raises(ValueError, match=r"'1' \(BatchNorm1d\) in training mode: it couples.*eval\(\)"):
        model(torch.randn(6, 5))


@pytest.mark.parametrize("reentrant", [True, False])
def test_refuses_activation_checkpointing(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5)), nn.Linear(5, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(checkpoint(self.body, x, use_reentrant=reentrant))

    model, (_, x, y) = Checkpointed(), toy(dtype=torch.float32)
    SGSC(model, gamma=0.5)
    loss = loss_of(model, x.requires_grad_(), y)
    with pytest.raises(ValueError, match=r"'body\.0' \(Linear\).*activation checkpointing.*per_sample_gradients"):
        loss.backward()


def test_refuses_two_forward_passes_before_a_backward_pass():
    model, x, y = toy()
    SGSC(model, gamma=0.5)
    loss = loss_of(model, x, y) + loss_of(model, x, y)
    with pytest.raises(RuntimeError, match=r"one backward pass for each forward pass.*no_grad"):
        loss.backward()


def test_refuses_a_second_backward_pass_through_one_graph():
    model, x, y = toy()
    SGSC(model, gamma=0.5)
    loss = loss_of(model, x, y)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass for each forward pass"):
        loss.backward()


def test_refuses_a_gate_before_a_backward_pass():
    model, *_ = toy()
    sgsc = SGSC(model, gamma=0.5)
    for use in (sgsc.consistency, sgsc.summary, sgsc.scale_gradients_, lambda: sgsc.scaled_update().__enter__()):
        with pytest.raises(RuntimeError, match=r"No statistic yet: call loss.backward\(\) first"):
            use()
    sgsc.remove()
    with pytest.raises(RuntimeError, match=r"No statistic: remove\(\) took the hooks off the model"):
        sgsc.scale_gradients_()


def test_an_optimizer_that_calls_backward_itself_is_not_served_and_told_so():
    model, x, y = toy()
    sgsc, optimizer = SGSC(model, gamma=0.5), torch.optim.LBFGS(model.parameters())
    with pytest.raises(RuntimeError, match="calls backward itself, such as LBFGS"), sgsc.scaled_update():
        optimizer.step(lambda: loss_of(model, x, y).backward())


@pytest.mark.parametrize("first", ["before", "after"])
@pytest.mark.parametrize("second", ["before", "after"])
def test_refuses_a_second_gate(first, second):
    model, x, y = toy()
    sgsc = SGSC(model, gamma=0.5)
    gates = {"before": sgsc.scale_gradients_, "after": lambda: sgsc.scaled_update().__enter__()}
    loss_of(model, x, y).backward()
    gates[first]()
    with pytest.raises(RuntimeError, match=r"used already: call loss.backward\(\) again"):
        gates[second]()


def test_refuses_a_parameter_it_has_not_seen():
    _, x, y = toy()
    model = nn.Sequential(Bare(), nn.Linear(5, CLASSES)).double()
    model[0].forward = lambda x: x + model[0].offset
    model[0].requires_grad_(False)
    sgsc = SGSC(model, gamma=0.5)
    model[0].requires_grad_(True)  # thawed: SGSC would have refused it
    loss_of(model, x, y).backward()
    with pytest.raises(RuntimeError, match=r"'0.offset' has a gradient, but its module's forward was not seen"):
        sgsc.scale_gradients_()


def test_the_reference_refuses_coupled_samples_and_unequal_rows():
    model, x, y = toy()
    with pytest.raises(ValueError, match=r"Found '1' \(BatchNorm1d, training mode\): call model.eval\(\)"):
        per_sample_gradients(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)), x, y)
    with pytest.raises(ValueError, match=r"`y` should have as many rows as `x`, 12. Found 3"):
        per_sample_gradients(model, x, y[:3])
    with pytest.raises(ValueError, match="B ≥ 1"):
        consistency_of(torch.zeros(0, 3))


# ----------------------------------------------------------------------------------------------------------------------
# Diagnostics, mixed precision, compilation, memory
# ----------------------------------------------------------------------------------------------------------------------


@examples(20)
@given(problems())
def test_summary_against_brute_force(problem):
    model, x, y = problem
    sgsc = SGSC(model, gamma=1.0)
    loss_of(model, x, y).backward()
    summary, c, per_sample = sgsc.summary(), sgsc.consistency(), per_sample_gradients(model, x, y)
    assert list(summary) == ["parameter", "entries", "samples", "mean", "q05", "q25", "q50", "q75", "q95", "share_zero",
                             "active_share", "noise_floor"]  # fmt: skip
    assert summary["parameter"].tolist() == list(c)
    largest = max(float(g.abs().max()) for g in per_sample.values())
    for row in summary.itertuples():
        g, values = per_sample[row.parameter], c[row.parameter]
        doubtful = (g.abs() <= 1e-14 * largest).double().mean().item()
        assert row.entries == values.numel()
        assert row.samples == len(x)
        assert row.mean == pytest.approx(values.mean().item())
        assert row.q25 == pytest.approx(values.quantile(0.25).item())
        assert row.share_zero == pytest.approx((values == 0).double().mean().item())
        assert row.active_share == pytest.approx((g != 0).double().mean().item(), abs=doubtful + 1e-9)
        assert row.mean <= row.active_share + 1e-9  # inactive samples cap c
        assert row.noise_floor == noise_floor(len(x))


def test_noise_floor_is_the_mean_of_c_under_random_signs():
    signs = torch.randint(2, (128, 100_000), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    assert noise_floor(128) == pytest.approx(consistency_of(signs).mean().item(), rel=0.01)


def test_autocast_equals_one_backward_a_sample_under_autocast():
    model, x, y = small_cnn()

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(model, x, y)

    c = measured(model, x, y, loss)
    expected = {name: consistency_of(g) for name, g in one_by_one(model, x, y, loss).items()}
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
    expected = [p - 0.1 * p.grad * plain[name] ** 0.5 for name, p in model.named_parameters()]
    sgsc.scale_gradients_()
    scaler.step(optimiser)
    for p, q in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p, q)


def small_language_model() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(5)
    body = [nn.Embedding(9, 4), nn.LayerNorm(4), Residual(nn.Linear(4, 4), nn.ReLU(inplace=True)), MeanOverTime()]
    model = nn.Sequential(*body, nn.Linear(4, CLASSES)).double()
    return model, torch.randint(9, (6, 5)), torch.randint(CLASSES, (6,))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("build", [toy, small_language_model])
def test_a_model_compiled_after_sgsc_was_built_gives_the_same_c(build, backend, in_place):
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


def test_a_model_compiled_and_run_before_sgsc_was_built_is_not_silent():
    torch._dynamo.reset()
    model, x, y = toy()
    compiled = torch.compile(model, backend="eager")
    loss_of(compiled, x, y).backward()
    with pytest.raises(ValueError, match=r"'model' .OptimizedModule.*Build SGSC first, then compile"):
        SGSC(compiled, gamma=1.0)
    sgsc = SGSC(model, gamma=1.0)
    loss_of(compiled, x, y).backward()
    with pytest.raises(RuntimeError, match="build SGSC first, then compile"):
        sgsc.scale_gradients_()


@pytest.mark.parametrize("entries", [1, 200, 5000])
def test_chunks_bound_the_gradients_held_at_once_and_change_nothing(entries, monkeypatch):
    model, x, y = small_cnn()
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
    model = nn.Sequential(nn.Embedding(1000, 4), MeanOverTime(), nn.Linear(4, CLASSES))
    x, y = torch.randint(1000, (2, 3)), torch.tensor([0, 1])
    largest = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            largest.append(result.numel() if isinstance(result, Tensor) else 0)
            return result

    sgsc = SGSC(model, gamma=1.0)
    with Sizes():
        loss_of(model, x, y).backward()
    assert max(largest) == 1000 * 4  # the gradient and the sums; B of them would be 8,000
    assert (sgsc.consistency()["0.weight"] > 0).any()


@pytest.mark.parametrize("layer", [nn.LSTM(4, 4), nn.GRUCell(4, 4), nn.MultiheadAttention(4, 1)])
def test_layers_that_no_rule_can_serve_say_so(layer):
    with pytest.raises(ValueError, match=r"so that no rule can serve it\. Freeze its parameters"):
        SGSC(nn.Sequential(layer), gamma=0.5)


def test_a_bare_parameter_beside_layers_is_sent_into_a_layer_of_its_own():
    model = nn.Sequential(nn.Linear(4, 4))
    model.scale = nn.Parameter(torch.ones(4))
    with pytest.raises(ValueError, match="move them into a layer of their own"):
        SGSC(model, gamma=0.5)


def test_a_random_layer_is_refused_by_the_per_sample_rule(monkeypatch):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return x * self.scale * (torch.rand_like(x) > 0.5)

    monkeypatch.setitem(SGSC.rules, Noisy, sgsc_lib.per_sample_rule)
    model = nn.Sequential(nn.Linear(4, 4), Noisy())
    with SGSC(model, gamma=0.5), pytest.raises(ValueError, match="Noisy should compute the same whenever it is run"):
        model(torch.ones(3, 4)).sum().backward()
