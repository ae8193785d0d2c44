"""What SGSC can't compute exactly is refused, by the names in the error; most of it before any training."""

import functools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from asserts import assert_consistency, hooks_on, loss_of, measured
from inputs import CLASSES, Made, batch_norm, offset, tied, toy
from torch import nn
from torch.utils.checkpoint import checkpoint

from sgsc_checks import check
from sgsc_lib import SGSC, linear_rule, per_sample_gradients, per_sample_rule, sign_consistency

# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value, kind, error", [
    (-0.1, float, ValueError), (11, int, ValueError), (math.nan, float, ValueError), (math.inf, float, ValueError),
    ("1", float, TypeError), (True, float, TypeError), (None, float, TypeError), (1.0, int, TypeError),
    (True, int, TypeError), (torch.tensor(1), int, TypeError), (1, str, TypeError), (1, bool, TypeError),
])  # fmt: skip
def test_check_names_the_parameter(value, kind, error):
    with pytest.raises(error, match="`mine`"):
        check("mine", value, kind, low=0, high=10)


@pytest.mark.parametrize("gamma, error", [(-0.1, ValueError), (math.nan, ValueError), ("1", TypeError)])
def test_a_bad_gamma_is_refused_at_construction_and_at_the_gate(gamma, error):
    model, x, y = toy()
    with pytest.raises(error, match="`gamma`"):
        SGSC(model, gamma=gamma)
    sgsc = SGSC(model, gamma=1.0)
    sgsc.gamma = gamma
    loss_of(model, x, y).backward()
    with pytest.raises(error, match="`gamma`"):
        sgsc.scale_gradients_()


# -- a model, before any training --------------------------------------------------------------------------------------


def one(layer: nn.Module, compute=lambda self, x: self.layer(x)) -> nn.Module:
    return Made(compute, layer=layer)


MyLinear, SCALE = type("MyLinear", (nn.Linear,), {}), nn.Parameter(torch.ones(4))
WEIGHT_NORM = nn.utils.parametrizations.weight_norm
REFUSED_MODELS = {  # within an nn.Sequential: the model, and the names in the error
    "batch norm in training": (lambda: nn.BatchNorm1d(5), "'0' (BatchNorm1d)"),
    "batch norm without statistics": (lambda: nn.BatchNorm2d(5, track_running_stats=False).eval(), "'0' (BatchNorm2d)"),
    "batch norm without parameters": (lambda: nn.BatchNorm1d(5, affine=False), "'0' (BatchNorm1d)"),
    "tied weights": (tied, "'0.2' (Linear)", "'0.0'"),
    "one parameter under two names": (
        lambda: (norm := nn.LayerNorm(4)).register_parameter("bias", norm.weight) or norm, "'0' (LayerNorm)"),
    "LSTM": (lambda: nn.LSTM(5, 5), "'0' (LSTM)"),
    "GRU cell": (lambda: nn.GRUCell(4, 4), "'0' (GRUCell)"),
    "attention": (lambda: nn.MultiheadAttention(4, 2), "'0' (MultiheadAttention)"),
    "transformer": (lambda: nn.TransformerEncoderLayer(4, 2), "'0.self_attn' (MultiheadAttention)"),
    "custom module": (lambda: Made(None, own=SCALE, layer=nn.Linear(4, 4)), "'0' (Made)", "['own']"),
    "subclass": (lambda: MyLinear(5, 5), "'0' (MyLinear)"),
    "parametrisation": (lambda: WEIGHT_NORM(nn.Linear(5, 5)), "'0' (ParametrizedLinear)"),
    "parametrised convolution": (lambda: WEIGHT_NORM(nn.Conv1d(5, 5, 1, bias=False)), "'0' (ParametrizedConv1d)"),
    "older spectral norm": (lambda: nn.utils.spectral_norm(nn.Conv1d(5, 5, 1)), "'0' (Conv1d)"),
    "lazy": (lambda: nn.LazyLinear(5), "'0' (LazyLinear)"),
    "data parallel": (lambda: nn.DataParallel(nn.Linear(5, 5)), "'0' (DataParallel)"),
    "compiled": (lambda: torch.compile(nn.Linear(5, 5)), "'0' (OptimizedModule)"),
    "complex": (lambda: nn.Linear(5, 5, dtype=torch.complex64), "'0' (Linear)"),
    "sparse embedding": (lambda: nn.Embedding(5, 5, sparse=True), "'0' (Embedding)"),
    "embedding with max_norm": (lambda: nn.Embedding(5, 5, max_norm=1.0), "'0' (Embedding)"),
}  # fmt: skip


@pytest.mark.parametrize(
    "build, names", [(build, names) for build, *names in REFUSED_MODELS.values()], ids=REFUSED_MODELS
)
def test_refuses_at_construction_what_explain_finds(build, names):
    model = nn.Sequential(build())
    before = hooks_on(model)
    with pytest.raises(ValueError) as refusal:
        SGSC(model, gamma=0.5)
    assert all(name in str(refusal.value) for name in names) and hooks_on(model) == before
    assert {row.problem for row in SGSC.explain(model)} - {""} == {str(refusal.value)}  # one, for all its parameters
    assert len({row.problem for row in SGSC.explain(model[0])} - {""}) == 1  # the same layer as the whole model


@pytest.mark.parametrize("layer, rule", [
    *((nn.Linear(4, 4), rule) for rule in (lambda module, inputs: {}, lambda: {}, None, dict)),
    *((layer, per_sample_rule) for layer in (nn.LSTM(4, 4), nn.GRUCell(4, 4), nn.MultiheadAttention(4, 1))),
])  # fmt: skip
def test_a_rule_that_cannot_serve_its_layer_is_refused_before_training(layer, rule, monkeypatch):
    monkeypatch.setitem(SGSC.rules, type(layer), rule)
    with pytest.raises(ValueError, match=re.escape(f"'0' ({type(layer).__name__})")):
        SGSC(nn.Sequential(layer), gamma=1.0)


@pytest.mark.parametrize("use", [SGSC.explain, lambda model: SGSC(model, gamma=0.5)])
def test_refuses_what_is_no_module(use):
    with pytest.raises(TypeError, match="`model`"):
        use(lambda x: x)


def test_explain_lists_every_problem_at_once_and_the_constructor_raises_them_all(monkeypatch):
    monkeypatch.setitem(SGSC.rules, nn.LayerNorm, functools.partial(per_sample_rule))
    refused = nn.BatchNorm1d(5, affine=False), MyLinear(5, 5, bias=False), nn.Embedding(5, 5, sparse=True)
    model = nn.Sequential(nn.Linear(5, 5), *refused, nn.LayerNorm(5, bias=False), offset().requires_grad_(False))
    model[0].bias.requires_grad_(False)
    found = SGSC.explain(model)
    assert [(*row[:3], bool(row.problem)) for row in found] == [
        ("0.weight", "0 (Linear)", "linear_rule", False),
        ("0.bias", "0 (Linear)", "frozen", False),
        ("", "1 (BatchNorm1d)", "", True),
        ("2.weight", "2 (MyLinear)", "", True),
        ("3.weight", "3 (Embedding)", "", True),
        ("4.weight", "4 (LayerNorm)", "partial", False),
        ("5.offset", "5 (Made)", "frozen", False),
    ]
    problems = list(dict.fromkeys(row.problem for row in found if row.problem))
    for problem, module in zip(problems, ("'1' (BatchNorm1d)", "'2' (MyLinear)", "'3' (Embedding)"), strict=True):
        assert module in problem
    with pytest.raises(ValueError) as refusal:
        SGSC(model, gamma=0.5)
    assert str(refusal.value).splitlines() == problems
    assert [row.module for row in SGSC.explain(nn.Linear(1, 1))] == ["model (Linear)"] * 2


def test_explain_prints_as_a_table():
    rows = SGSC.explain(nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5)))
    head, *lines = str(rows).splitlines()
    starts = [head.index(name) for name in ("parameter", "module", "rule", "problem")]
    assert head.split() == list(rows[0]._fields) and len(lines) == len(rows) == 4
    for line, row in zip(lines, rows, strict=True):
        cells = [line[start:end].strip() for start, end in zip(starts, [*starts[1:], None], strict=True)]
        assert cells == list(row)


# -- a forward pass ----------------------------------------------------------------------------------------------------

REFUSED_PASSES = {  # the model, the shape of its input, the module that is named
    "layer used twice": (one(nn.Linear(5, 5), lambda self, x: self.layer(self.layer(x))), (4, 5), "'layer' (Linear)"),
    "weight used again by hand": (
        one(nn.Linear(5, 5), lambda self, x: F.linear(self.layer(x), self.layer.weight)), (4, 5), "'layer' (Linear)"),
    "batch folded into time": (
        one(nn.Linear(5, 5), lambda self, x: self.layer(x.flatten(0, 1))), (4, 3, 5), "'layer' (Linear)"),
    "input shared by all samples": (
        one(nn.Embedding(3, 5), lambda self, x: x + self.layer(torch.arange(3))), (4, 3, 5), "'layer' (Embedding)"),
    "input without any axis": (
        one(nn.Embedding(3, 5), lambda self, x: x + self.layer(torch.tensor(1))), (), "'layer' (Embedding)"),
    "unbatched vector": (nn.Linear(5, 5), (5,), "'model' (Linear)"),
    "unbatched image": (one(nn.Conv2d(2, 5, 3)), (2, 5, 5), "'layer' (Conv2d)"),
    "batch norm put back into training": (one(nn.BatchNorm1d(5)), (4, 5), "'layer' (BatchNorm1d)"),
    "two inputs": (one(nn.Bilinear(5, 5, 5), lambda self, x: self.layer(x, x)), (4, 5), "'layer' (Bilinear)"),
}  # fmt: skip


@pytest.mark.parametrize("model, shape, named", REFUSED_PASSES.values(), ids=REFUSED_PASSES)
def test_refuses_in_the_forward_pass(model, shape, named, monkeypatch):
    monkeypatch.setitem(SGSC.rules, nn.Bilinear, per_sample_rule)
    SGSC(model.eval(), gamma=0.5)
    model.train()
    with torch.no_grad():
        model(torch.randn(shape))  # an evaluation goes on
    with pytest.raises(ValueError, match=re.escape(named)):
        model(torch.randn(shape))


@pytest.mark.parametrize("reentrant", [True, False])
def test_refuses_activation_checkpointing(reentrant):
    _, x, y = toy(dtype=torch.float32)
    body = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, CLASSES))
    model = Made(lambda self, x: checkpoint(self.body, x, use_reentrant=reentrant), body=body)
    SGSC(model, gamma=0.5)
    loss = loss_of(model, x.requires_grad_(), y)
    with pytest.raises(ValueError, match=r"'body\.0' \(Linear\)"):
        loss.backward()


# -- what a rule may not return ----------------------------------------------------------------------------------------

MISTAKEN = {  # what the rule makes of a right answer, the error, the parameter that is named
    "no dict": (lambda found: tuple(found.items()), TypeError, ""),
    "a parameter forgotten": (lambda found: {"bias": found["bias"]}, KeyError, "weight"),
    "an unknown parameter": (lambda found: found | {"wieght": found["weight"]}, ValueError, "wieght"),
    "no count": (lambda found: found | {"weight": found["weight"][0]}, ValueError, "weight"),
    "a count of another shape": (lambda found: found | {"bias": found["bias"][:1] * 2}, ValueError, "bias"),
    "a count that is no tensor": (lambda found: found | {"bias": (found["bias"][0], 1)}, ValueError, "bias"),
    "sums of another shape": (lambda found: found | {"weight": found["bias"]}, ValueError, "weight"),
}


@pytest.mark.parametrize("mistake, error, named", MISTAKEN.values(), ids=MISTAKEN)
def test_a_rules_mistake_is_refused_by_the_module_and_the_parameter(mistake, error, named, monkeypatch):
    monkeypatch.setitem(SGSC.rules, nn.Linear, lambda *given: mistake(linear_rule(*given)))
    with pytest.raises(error, match=rf"'4' \(Linear\).*{named}"):
        measured(*toy())


def test_a_random_layer_is_refused_by_the_per_sample_rule(monkeypatch):
    monkeypatch.setitem(SGSC.rules, Made, per_sample_rule)
    noisy = Made(lambda self, x: x * self.scale * (torch.rand_like(x) > 0.5), scale=nn.Parameter(torch.ones(4)))
    model = nn.Sequential(nn.Linear(4, 4), noisy)
    with SGSC(model, gamma=0.5), pytest.raises(ValueError, match="Made"):
        model(torch.ones(3, 4)).sum().backward()


# -- calls out of order ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forward, backward", [(2, 1), (1, 2)])
def test_refuses_another_number_of_backward_passes_than_of_forward_passes(forward, backward):
    model, x, y = toy()
    SGSC(model, gamma=0.5)
    loss = sum(loss_of(model, x, y) for _ in range(forward))
    with pytest.raises(RuntimeError, match=r"torch\.no_grad\(\)"):
        for _ in range(backward):
            loss.backward(retain_graph=True)


def test_refuses_a_gate_before_a_backward_pass():
    model, x, y = toy()
    sgsc, optimizer = SGSC(model, gamma=0.5), torch.optim.LBFGS(model.parameters())
    with pytest.raises(RuntimeError, match="LBFGS"), sgsc.scaled_update():  # it calls backward itself
        optimizer.step(lambda: loss_of(model, x, y).backward())
    for hooked in (True, False):
        for use in (sgsc.consistency, sgsc.summary, sgsc.scale_gradients_, lambda: sgsc.scaled_update().__enter__()):
            with pytest.raises(RuntimeError, match=r"loss.backward\(\)" if hooked else r"remove\(\)"):
                use()
        sgsc.remove()


@pytest.mark.parametrize("first", ["before", "after"])
@pytest.mark.parametrize("second", ["before", "after"])
def test_refuses_a_second_gate(first, second):
    model, x, y = toy()
    sgsc = SGSC(model, gamma=0.5)
    gates = {"before": sgsc.scale_gradients_, "after": lambda: sgsc.scaled_update().__enter__()}
    loss_of(model, x, y).backward()
    gates[first]()
    with pytest.raises(RuntimeError, match=r"loss.backward\(\)"):
        gates[second]()
    sgsc.consistency()  # still readable


def test_a_scaled_update_that_no_with_entered_is_refused_in_the_next_forward_pass_once():
    model, x, y = toy()
    sgsc = SGSC(model, gamma=1.0)
    loss_of(model, x, y).backward()
    sgsc.scaled_update()
    with torch.no_grad():
        model(x)  # evaluation goes on
    with pytest.raises(RuntimeError, match=r"scaled_update\(\)"):
        model(x)
    loss_of(model, x, y).backward()
    with sgsc.scaled_update():
        pass
    model(x)


def test_a_layer_frozen_at_first_can_be_trained_later_unless_no_rule_serves_it():
    _, x, y = toy()
    model = nn.Sequential(offset(), nn.Linear(5, CLASSES)).double().requires_grad_(False)
    sgsc = SGSC(model, gamma=0.5)
    model[1].requires_grad_(True)
    loss_of(model, x, y).backward()
    assert_consistency(sgsc.consistency(), per_sample_gradients(model, x, y))
    model.requires_grad_(True)
    loss_of(model, x, y).backward()
    with pytest.raises(RuntimeError, match=r"'0\.offset'"):
        sgsc.scale_gradients_()


def test_a_model_compiled_and_run_before_sgsc_was_built_is_not_silent():
    torch._dynamo.reset()
    model, x, y = toy()
    compiled = torch.compile(model, backend="eager")
    loss_of(compiled, x, y).backward()
    sgsc = SGSC(model, gamma=1.0)
    loss_of(compiled, x, y).backward()
    with pytest.raises(RuntimeError, match="compile"):
        sgsc.scale_gradients_()


def test_the_reference_refuses_coupled_samples_unequal_rows_and_no_samples():
    model, x, y = toy()
    with pytest.raises(ValueError, match=r"'1' \(BatchNorm1d\)"):
        per_sample_gradients(batch_norm()[0].train(), x, y)
    with pytest.raises(ValueError, match=r"`y`.*`x`"):
        per_sample_gradients(model, x, y[:3])
    for empty in (torch.zeros(0, 3), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="`per_sample`"):
            sign_consistency(empty)
