"""Layers whose gradient is the sum of their per-sample gradients, on the batches after the first of a kind."""

import copy
import gc
from functools import partial
from types import SimpleNamespace

import inputs
import pytest
import torch
import torch.nn.functional as F
from asserts import assert_consistency, assert_equal, examples, loss_of, one_by_one, weighted
from hypothesis import given
from hypothesis import strategies as st
from inputs import CLASSES, Made, one, problems
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sgsc_core import fused
from sgsc_lib import SGSC, per_sample_gradients

close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)


@pytest.fixture(autouse=True)
def worthwhile(monkeypatch):
    monkeypatch.setattr(fused, "WORTHWHILE", 0)  # for layers as small as these too


def fused_nodes(output: Tensor) -> int:
    """How many layers in an output's graph have the node that makes both."""
    seen, pending = set(), [output.grad_fn]
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            pending += [following for following, _ in node.next_functions]
    return sum(node.name() == "_FusedBackward" for node in seen)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def plain_gradients(model: nn.Module, x: Tensor, y: Tensor, loss=loss_of) -> dict[str, Tensor]:
    return own_gradients(copy.deepcopy(model), x, y, loss)  # without SGSC's hooks


def own_gradients(model: nn.Module, x: Tensor, y: Tensor, loss=loss_of) -> dict[str, Tensor]:
    model.zero_grad()
    loss(model, x, y).backward()
    found = gradients(model)
    model.zero_grad()
    return found


def later(model: nn.Module, x: Tensor, y: Tensor, batches: int = 3, **options: bool) -> tuple[SGSC, Tensor]:
    """SGSC after some batches of one kind, and the last one's output, before its backward pass."""
    sgsc = SGSC(model, gamma=1.0, **options)
    for _ in range(batches - 1):
        output = model(x)
        F.cross_entropy(output, y).backward()
        model.zero_grad()
    return sgsc, model(x)


@examples(60)
@given(problems(least=2), st.randoms(use_true_random=False))
def test_later_batches_give_the_same_c_and_gradient(problem, random):
    model, x, y = problem
    sgsc = SGSC(model, gamma=1.0)
    for _ in range(3):
        order = [random.randrange(len(x)) for _ in x]
        model.zero_grad()
        loss_of(model, x[order], y[order]).backward()
        assert_consistency(sgsc.consistency(), per_sample_gradients(model, x[order], y[order]))
        close(gradients(model), plain_gradients(model, x[order], y[order]))


def folded(layer: nn.Module) -> nn.Module:
    return one(layer, lambda self, x: self.layer(x.flatten(0, 1)).unflatten(0, (len(x), -1)))


LAYERS = {  # a layer and the shape of a sample
    "sequences": (nn.Linear(4, 3), (5, 4)),
    "without a bias": (nn.Linear(4, 3, bias=False), (5, 4)),
    "images of vectors": (nn.Linear(4, 3), (2, 3, 4)),
    "positions folded into the batch": (folded(nn.Linear(4, 3, bias=False)), (5, 4)),
    "positions in front": (one(nn.Linear(4, 3), lambda self, x: self.layer(x.transpose(0, 1)).transpose(0, 1)), (5, 4)),
    "windows in front": (folded(nn.Linear(4, 3)), (5, 2, 4)),
    "films": (folded(nn.Conv2d(4, 6, 2, groups=2)), (5, 4, 3, 2)),
    "films, transposed": (folded(nn.ConvTranspose1d(4, 2, 2, groups=2)), (3, 4, 3)),
    "1d": (nn.Conv1d(4, 2, 3, stride=2, padding=1), (4, 7)),
    "2d": (nn.Conv2d(4, 6, (3, 2), dilation=(1, 2), padding=(0, 1), groups=2), (4, 5, 6)),
    "2d, one position": (nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 1, 1)),
    "2d, pointwise": (nn.Conv2d(4, 2, 1, bias=False), (4, 3, 3)),
    "3d": (nn.Conv3d(2, 2, 2, stride=(1, 2, 1)), (2, 3, 4, 3)),
    "transposed 1d": (nn.ConvTranspose1d(4, 2, 3, stride=2, output_padding=1), (4, 5)),
    "transposed 2d": (nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1, groups=2, bias=False), (4, 3, 4)),
}


@pytest.mark.parametrize("layer, shape", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("first", [True, False])  # the batch's input needs no gradient, or its layer's input does
@pytest.mark.parametrize("in_place", [True, False])
def test_torchs_layers_have_one_product(layer, shape, first, in_place):
    torch.manual_seed(0)
    before = nn.Identity() if first else Made(lambda self, x: x * self.own, own=nn.Parameter(torch.tensor(2.0)))
    model = nn.Sequential(before, copy.deepcopy(layer), nn.ReLU(in_place), nn.Flatten())
    x, y = torch.randn(6, *shape).double(), torch.randint(CLASSES, (6,))
    model.double().append(nn.Linear(model.double()(x).shape[1], CLASSES).double())
    expected, of_samples = plain_gradients(model, x, y), one_by_one(model, x, y)
    sgsc = SGSC(model, gamma=1.0, count_active=True)
    for batch in range(3):
        model.zero_grad()
        output = model(x)
        assert fused_nodes(output) == (batch > 0)
        F.cross_entropy(output, y).backward()
        assert_consistency(sgsc.consistency(), of_samples)
        close(gradients(model), expected)
        shares = sgsc.summary().set_index("parameter")["active_share"]
        for name, g in of_samples.items():
            assert shares[name] == pytest.approx((g != 0).double().mean().item())
    sgsc.remove()
    assert not fused_nodes(model(x))


def test_another_kind_of_batch_is_checked_by_autograds_own_gradient_first():
    model, y = nn.Sequential(nn.Linear(4, CLASSES), Made(lambda self, x: x.mean(1))).double(), torch.arange(3)
    SGSC(model, gamma=1.0)
    for length, expected in ((5, 0), (5, 1), (6, 0), (5, 1), (6, 1)):
        output = model(torch.randn(3, length, 4).double())
        assert fused_nodes(output) == expected
        F.cross_entropy(output, y).backward()
    assert fused_nodes(model(torch.randn(4, 5, 4).double())) == 1
    assert fused_nodes(model(torch.randn(1, 5, 4).double())) == 0


def test_a_product_that_costs_less_than_a_node_stays(monkeypatch):
    monkeypatch.setattr(fused, "WORTHWHILE", 6 * 3 * 4 * 4 + 1)
    model, x, y = sequences()
    assert fused_nodes(later(model, x, y)[1]) == 0
    monkeypatch.setattr(fused, "WORTHWHILE", 6 * 3 * 4 * 4)
    assert fused_nodes(model(x)) == 2


def hooked(layer: nn.Module, register: str, hook=lambda *_: None) -> nn.Module:
    getattr(layer, register)(hook)
    return layer


def with_frozen(layer: nn.Module, key: str) -> nn.Module:
    getattr(layer, key).requires_grad_(False)
    return layer


def twice(self, x):
    return self.layer(self.layer(x).tanh())


def by_hand(self, x):
    return F.linear(self.layer(x), self.layer.weight)


def of_views(self, x):
    return x.view(len(x), -1)


def replaced() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.forward = lambda x, forward=layer.forward: forward(x) * 2
    return layer


UNUSUAL = {  # one layer on [B, 4, 4]
    "a layer used twice": lambda: one(nn.Linear(4, 4), twice),
    "a weight used by hand": lambda: one(nn.Linear(4, 4), by_hand),
    "tied weights": lambda: Made(lambda self, x: self.b(self.a(x).relu()), a=(a := nn.Linear(4, 4)), b=tied_to(a)),
    "a subclass": lambda: type("MyLinear", (nn.Linear,), {})(4, 4),
    "a forward that was replaced": replaced,
    "parametrised": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    "a subclass of parameters": lambda: of_class(type("MyParameter", (nn.Parameter,), {})),
    "a frozen bias": lambda: with_frozen(nn.Linear(4, 4), "bias"),
    "a frozen weight": lambda: with_frozen(nn.Linear(4, 4), "weight"),
    "a forward hook": lambda: hooked(nn.Linear(4, 4), "register_forward_hook"),
    "a forward hook that replaces the output": lambda: hooked(
        nn.Linear(4, 4), "register_forward_hook", lambda _, args, output: output.tanh().view(-1, 4, 4)),
    "a forward pre-hook": lambda: hooked(nn.Linear(4, 4), "register_forward_pre_hook"),
    "a backward hook": lambda: hooked(nn.Linear(4, 4), "register_full_backward_hook"),
    "a keyword": lambda: one(nn.Linear(4, 4), lambda self, x: self.layer(input=x)),
    "checkpointing": lambda: one(nn.Linear(4, 4), lambda self, x: checkpoint(self.layer, x, use_reentrant=False)),
    "reentrant checkpointing": lambda: nn.Sequential(
        nn.LayerNorm(4), one(nn.Linear(4, 4), lambda self, x: checkpoint(self.layer, x, use_reentrant=True))),
    "saved elsewhere": lambda: one(nn.Linear(4, 4), saved_elsewhere),
    "circular padding": lambda: nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"),
    "padding by name": lambda: nn.Conv1d(4, 4, 2, padding="same"),
}  # fmt: skip


def tied_to(layer: nn.Linear) -> nn.Linear:
    other = nn.Linear(4, 4)
    other.weight = layer.weight
    return other


def of_class(kind: type) -> nn.Linear:
    layer = nn.Linear(4, 4)
    layer.weight = kind(layer.weight.detach().double())
    return layer


def saved_elsewhere(self, x):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        return self.layer(x)


@pytest.mark.filterwarnings("ignore:SGSC ")
@pytest.mark.parametrize("build", UNUSUAL.values(), ids=UNUSUAL)
def test_what_is_unusual_keeps_autograds_gradient_bit_for_bit(build):
    torch.manual_seed(0)
    model = nn.Sequential(build(), Made(of_views), nn.Linear(16, CLASSES)).double()
    x, y = torch.randn(6, 4, 4).double(), torch.randint(CLASSES, (6,))
    expected = own_gradients(model, x, y)
    sgsc, output = later(model, x, y)
    assert fused_nodes(output) == 0
    F.cross_entropy(output, y).backward()
    assert_equal(gradients(model), expected)
    c = sgsc.consistency()
    sgsc.remove()
    assert_consistency(c, one_by_one(model, x, y))


def sequences(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Flatten(), nn.Linear(12, CLASSES)).to(dtype)
    return model, torch.randn(6, 3, 4, dtype=dtype), torch.randint(CLASSES, (6,))


def test_an_unchecked_model_bfloat16_and_autocast_keep_autograds_gradient():
    model, x, y = sequences()
    assert fused_nodes(later(model, x, y)[1]) == 2
    assert fused_nodes(later(copy.deepcopy(model), x, y, check=False)[1]) == 0
    assert fused_nodes(later(*sequences(torch.bfloat16))[1]) == 0
    model, x, y = sequences(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert fused_nodes(later(model, x, y)[1]) == 0
    with torch.no_grad():
        assert model(x).grad_fn is None


def test_a_rule_of_ones_own_keeps_autograds_gradient(monkeypatch):
    own = SGSC.rules[nn.Linear]
    monkeypatch.setitem(SGSC.rules, nn.Linear, lambda *given: own(*given))
    model, x, y = sequences()
    assert fused_nodes(later(model, x, y)[1]) == 0


def test_forward_mode_and_vmap_go_round_it():
    model, x, y = sequences()
    later(model, x, y)
    plain = copy.deepcopy(model)
    tangent = torch.randn_like(x)
    with torch.autograd.forward_ad.dual_level():
        found, expected = (torch.autograd.forward_ad.unpack_dual(
            m(torch.autograd.forward_ad.make_dual(x, tangent))).tangent for m in (model, plain))  # fmt: skip
    assert_equal(found, expected)
    assert_equal(per_sample_gradients(model, x, y), per_sample_gradients(plain, x, y))


# -- in the backward pass ----------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch) -> list[str]:
    """The layers whose per-sample gradients a rule has made."""
    built, of_layer = [], fused.Summing.of_layer
    monkeypatch.setattr(fused.Summing, "of_layer", lambda self, call: built.append(call.path) or of_layer(self, call))
    return built


def test_gradients_that_are_not_accumulated_are_torchs_and_do_not_count(counted):
    model, x, y = sequences()
    sgsc, _ = later(model, x, y)
    before = copy.deepcopy(model)
    for pick in (lambda m, x: [x], lambda m, _: [*m.parameters()], lambda m, x: [x, m[0].bias]):
        adversarial, inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
        counted.clear()
        output = model(adversarial)
        assert fused_nodes(output) == 2
        found = torch.autograd.grad(F.cross_entropy(output, y), pick(model, adversarial))
        assert_equal(found, torch.autograd.grad(loss_of(before, inputs, y), pick(before, inputs)))
        assert not counted
    loss_of(model, x, y).backward()
    assert counted == ["4", "2", "0"]  # each once
    assert (sgsc.summary()["samples"] == 6).all()
    assert_consistency(sgsc.consistency(), per_sample_gradients(before, x, y))


def test_backward_with_respect_to_some_counts_them_alone(counted):
    model, x, y = sequences()
    sgsc, output = later(model, x, y)
    expected = plain_gradients(model, x, y)
    F.cross_entropy(output, y).backward(inputs=[model[0].weight])
    assert gradients(model).keys() == {"0.weight"}
    assert_equal(model[0].weight.grad, expected["0.weight"])
    of_samples = per_sample_gradients(copy.deepcopy(model), x, y)
    c = sgsc.consistency()
    assert_consistency({"0.weight": c["0.weight"]}, {"0.weight": of_samples["0.weight"]})
    assert not any(c[name].any() for name in c if name != "0.weight")


@pytest.mark.parametrize("layer, shape", LAYERS.values(), ids=LAYERS)
def test_its_derivatives_are_those_of_the_layer(layer, shape):
    torch.manual_seed(0)
    layer = copy.deepcopy(layer).double()
    shape, layer = (shape, layer) if not isinstance(layer, Made) else (shape[1:], layer.layer)
    call = SimpleNamespace(module=layer)

    def function(x, weight, bias=None):
        made = torch.func.functional_call(layer, {"weight": weight, "bias": bias}, x)
        return fused._Fused.apply(x, weight, bias, call, False, (made.detach(),))

    given = [torch.randn(2, *shape).double().requires_grad_(), *layer.parameters()]
    assert torch.autograd.gradcheck(function, given) and torch.autograd.gradgradcheck(function, given)


def test_create_graph_in_backward_counts_as_ever(counted):
    model, x, y = sequences()
    sgsc, output = later(model, x, y)
    expected = plain_gradients(model, x, y)
    counted.clear()
    with pytest.warns(UserWarning, match="create_graph"):
        F.cross_entropy(output, y).backward(create_graph=True)
    close({name: g.detach() for name, g in gradients(model).items()}, expected)
    assert not any(p.grad.grad_fn is None for p in model.parameters())
    assert_consistency(sgsc.consistency(), per_sample_gradients(copy.deepcopy(model), x, y))


def test_parts_add_up_dropped_passes_do_not_count_and_two_instances_agree():
    model, x, y = sequences()
    first, _ = later(model, x, y)
    second, _ = later(model, x, y)
    model.zero_grad()
    for rows in (slice(0, 2), slice(2, 6)):  # other numbers of samples are the same kind of batch
        assert fused_nodes(model(x[rows])) == 2
        loss_of(model, x[:3], y[:3])
        loss = loss_of(model, x[rows], y[rows], "sum")
        with torch.no_grad():
            model(x[:3])
        loss.backward()
    expected = per_sample_gradients(copy.deepcopy(model), x, y)
    assert_consistency(first.consistency(), expected)
    assert_consistency(second.consistency(), expected)
    close(gradients(model), plain_gradients(model, x, y, partial(loss_of, reduction="sum")))


def test_two_backward_passes_and_two_forward_passes_are_refused_as_on_the_first_batch():
    for refused in (
        lambda loss: (loss() + loss()).backward(),
        lambda loss: [kept.backward(retain_graph=True) for kept in [loss()] * 2],
    ):
        model, x, y = sequences()
        later(model, x, y)
        with pytest.raises(RuntimeError, match=r"torch\.no_grad\(\)"):
            refused(partial(loss_of, model, x, y))


def test_a_layer_that_a_later_batch_uses_twice_has_one_sign_for_both_uses():
    def forward(self, x):
        for _ in range(self.times):
            x = self.layer(x).tanh()
        return x.flatten(1)

    model = Made(forward, layer=nn.Linear(4, 4)).double()
    model.times, (_, x, y) = 1, sequences()
    sgsc, _ = later(model, x, y)
    model.times, y = 2, torch.randn(6, 12).double()
    expected, of_samples = plain_gradients(model, x, y, weighted), one_by_one(copy.deepcopy(model), x, y, weighted)
    weighted(model, x, y).backward()
    assert_consistency(sgsc.consistency(), of_samples)
    close(gradients(model), expected)


def test_a_users_hook_on_the_output_changes_both():
    model, x, y = sequences()
    body, head = model[0], model[1:]
    model = Made(lambda self, x: self.head(scaled(self.body(x))), body=body, head=head)

    def scaled(t):
        if model.scales:
            t.register_hook(lambda g: g * torch.tensor([1.0, -1.0, 0.0, 2.0], dtype=g.dtype))
        return t

    model.scales = True
    expected, of_samples = own_gradients(model, x, y), one_by_one(model, x, y)
    model.scales = False
    sgsc, _ = later(model, x, y)
    model.scales = True
    loss_of(model, x, y).backward()
    close(gradients(model), expected)
    assert_consistency(sgsc.consistency(), of_samples)


def test_an_input_that_was_overwritten_is_an_error():
    model = one(nn.Linear(4, 4), lambda self, x: overwritten(self, x * 1.0)).double()
    model.overwrites, (_, x, y) = False, sequences()
    later(model, x, y)
    model.overwrites = True
    with pytest.raises((RuntimeError, ValueError)):
        loss_of(model, x, y).backward()


def overwritten(self, x):
    y = self.layer(x)
    if self.overwrites:
        x.add_(1)
    return y.flatten(1)


def test_a_later_loss_that_is_kept_keeps_no_activations():
    model = nn.Sequential(nn.Linear(5, 37), nn.ReLU(), nn.Linear(37, 37), nn.Flatten(), nn.Linear(74, CLASSES))
    x, y = torch.randn(13, 2, 5), torch.randint(CLASSES, (13,))
    sgsc, output = later(model, x, y)
    assert fused_nodes(output) == 2
    loss = F.cross_entropy(output, y)
    del output
    loss.backward()
    gc.collect()
    assert not [t for t in gc.get_objects() if type(t) is Tensor and t.shape == (13, 2, 37)]
    assert sgsc.consistency()


@pytest.mark.slow
def test_a_compiled_model_gives_the_same(counted):
    torch._dynamo.reset()
    model, x, y = inputs.cnn()
    expected = plain_gradients(model, x, y)
    SGSC(model, gamma=1.0)
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(3):
        model.zero_grad()
        loss_of(compiled, x, y).backward()
        torch.testing.assert_close(gradients(model), expected)
