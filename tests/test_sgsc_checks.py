"""What SGSC can't compute exactly is refused, by the names in the error; most of it before any training."""

import functools
import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from asserts import assert_consistency, hooks_on, loss_of, measured
from inputs import CLASSES, Made, batch_norm, tied, toy
from torch import nn
from torch.utils.checkpoint import checkpoint

from sgsc_core.checks import check
from sgsc_lib import SGSC, linear_rule, mlp, per_sample_gradients, per_sample_rule, sign_consistency


@pytest.mark.parametrize("value, kind, error", [
    (-0.1, float, ValueError), (11, int, ValueError), (math.nan, float, ValueError), (math.inf, float, ValueError),
    ("1", float, TypeError), (True, float, TypeError), (None, float, TypeError), (1.0, int, TypeError),
    (True, int, TypeError), (torch.tensor(1), int, TypeError), (1, str, TypeError), (1, bool, TypeError),
])  # fmt: skip
def test_check_names_the_parameter(value, kind, error):
    with pytest.raises(error, match="`mine`"):
        check("mine", value, kind, low=0, high=10)


def test_a_bad_gamma_is_refused_at_construction_and_at_the_gate_and_a_bad_model_by_its_name():
    model, x, y = toy()
    sgsc = SGSC(model, gamma=1.0)
    loss_of(model, x, y).backward()
    for sgsc.gamma, error in ((-0.1, ValueError), (math.nan, ValueError), ("1", TypeError)):
        for use in (sgsc.scale_gradients_, lambda: SGSC(model, gamma=sgsc.gamma)):
            with pytest.raises(error, match="`gamma`"):
                use()
    for use in (SGSC.explain, lambda model: SGSC(model, gamma=0.5)):
        with pytest.raises(TypeError, match="`model`"):
            use(lambda x: x)


# -- a model, before any training --------------------------------------------------------------------------------------


def one(layer: nn.Module, compute=lambda self, x: self.layer(x)) -> nn.Module:
    return Made(compute, layer=layer)


def offset() -> nn.Module:
    return Made(lambda self, x: x + self.offset, offset=nn.Parameter(torch.zeros(5)))


MyLinear = type("MyLinear", (nn.Linear,), {})
REFUSED_MODELS = {  # within an nn.Sequential: the model, and the names in the error
    "batch norm in training": (lambda: nn.BatchNorm1d(5), "'0' (BatchNorm1d)"),
    "batch norm without statistics": (lambda: nn.BatchNorm2d(5, track_running_stats=False).eval(), "'0' (BatchNorm2d)"),
    "tied weights": (tied, "'0.2' (Linear)", "'0.0'"),
    "one parameter under two names": (
        lambda: (norm := nn.LayerNorm(4)).register_parameter("bias", norm.weight) or norm, "'0' (LayerNorm)"),
    "LSTM": (lambda: nn.LSTM(5, 5), "'0' (LSTM)"),
    "transformer": (lambda: nn.TransformerEncoderLayer(4, 2), "'0.self_attn' (MultiheadAttention)"),
    "custom module": (offset, "'0' (Made)", "['offset']"),
    "parametrisation": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(5, 5)), "'0' (ParametrizedLinear)"),
    "older spectral norm": (lambda: nn.utils.spectral_norm(nn.Conv1d(5, 5, 1)), "'0' (Conv1d)"),
    "lazy": (lambda: nn.LazyLinear(5), "'0' (LazyLinear)"),
    "data parallel": (lambda: nn.DataParallel(nn.Linear(5, 5)), "'0' (DataParallel)"),
    "compiled": (lambda: torch.compile(nn.Linear(5, 5)), "'0' (OptimizedModule)"),
    "complex": (lambda: nn.Linear(5, 5, dtype=torch.complex64), "'0' (Linear)"),
    "embedding with max_norm": (lambda: nn.Embedding(5, 5, max_norm=1.0), "'0' (Embedding)"),
}  # fmt: skip


@pytest.mark.parametrize("row", REFUSED_MODELS.values(), ids=REFUSED_MODELS)
def test_refuses_at_construction_what_explain_finds(row):
    build, *names = row
    model = nn.Sequential(build())
    before = hooks_on(model)
    with pytest.raises(ValueError) as refusal:
        SGSC(model, gamma=0.5)
    assert all(name in str(refusal.value) for name in names) and hooks_on(model) == before
    assert {row.problem for row in SGSC.explain(model)} - {""} == {str(refusal.value)}  # one, for all its parameters
    assert len({row.problem for row in SGSC.explain(model[0])} - {""}) == 1  # the same layer as the whole model


@pytest.mark.parametrize("layer, rule", [
    (nn.Linear(4, 4), lambda module, inputs: {}), (nn.Linear(4, 4), None), (nn.Linear(4, 4), dict),
    *((layer, per_sample_rule) for layer in (nn.LSTM(4, 4), nn.GRUCell(4, 4), nn.MultiheadAttention(4, 1))),
])  # fmt: skip
def test_a_rule_that_cannot_serve_its_layer_is_refused_before_training(layer, rule, monkeypatch):
    monkeypatch.setitem(SGSC.rules, type(layer), rule)
    with pytest.raises(ValueError, match=re.escape(f"'0' ({type(layer).__name__})")):
        SGSC(nn.Sequential(layer), gamma=1.0)


def test_explain_lists_every_problem_at_once_and_the_constructor_raises_them_all(monkeypatch):
    monkeypatch.setitem(SGSC.rules, nn.LayerNorm, functools.partial(per_sample_rule))
    refused = nn.BatchNorm1d(5, affine=False), MyLinear(5, 5, bias=False), nn.Embedding(5, 5, sparse=True)
    model = nn.Sequential(nn.Linear(5, 5), *refused, nn.LayerNorm(5, bias=False), offset().requires_grad_(False))
    model[0].bias.requires_grad_(False)
    found = SGSC.explain(model)
    assert [(*row[:3], bool(row.problem)) for row in found] == [
        ("0.weight", "0 (Linear)", "linear_rule", False), ("0.bias", "0 (Linear)", "frozen", False),
        ("", "1 (BatchNorm1d)", "", True), ("2.weight", "2 (MyLinear)", "", True),
        ("3.weight", "3 (Embedding)", "", True), ("4.weight", "4 (LayerNorm)", "partial", False),
        ("5.offset", "5 (Made)", "frozen", False),
    ]  # fmt: skip
    problems = list(dict.fromkeys(row.problem for row in found if row.problem))
    with pytest.raises(ValueError) as refusal:
        SGSC(model, gamma=0.5)
    assert str(refusal.value).splitlines() == problems
    assert [row.module for row in SGSC.explain(nn.Linear(1, 1))] == ["model (Linear)"] * 2


# -- a pass, and what a rule may not return ----------------------------------------------------------------------------

REFUSED_PASSES = {  # the model, the shape of its input, the module that is named
    "layer used twice": (one(nn.Linear(5, 5), lambda self, x: self.layer(self.layer(x))), (4, 5), "'layer' (Linear)"),
    "weight used again by hand": (
        one(nn.Linear(5, 5), lambda self, x: F.linear(self.layer(x), self.layer.weight)), (4, 5), "'layer' (Linear)"),
    "batch folded into time": (
        one(nn.Linear(5, 5), lambda self, x: self.layer(x.flatten(0, 1))), (4, 3, 5), "'layer' (Linear)"),
    "input shared by all samples": (
        one(nn.Embedding(3, 5), lambda self, x: x + self.layer(torch.arange(3))), (4, 3, 5), "'layer' (Embedding)"),
    "unbatched vector": (nn.Linear(5, 5), (5,), "'model' (Linear)"),
    "unbatched image": (one(nn.Conv2d(2, 5, 3)), (2, 5, 5), "'layer' (Conv2d)"),
    "batch norm put back into training": (one(nn.BatchNorm1d(5)), (4, 5), "'layer' (BatchNorm1d)"),
    "two inputs": (one(nn.Bilinear(5, 5, 5), lambda self, x: self.layer(x, x)), (4, 5), "'layer' (Bilinear)"),
    **{f"activation checkpointing, {reentrant}": (
        one(mlp((5, 5, 5), seed=0), lambda self, x, how=reentrant: checkpoint(self.layer, x, use_reentrant=how)),
        (4, 5), "'layer.0' (Linear)") for reentrant in (True, False)},
    "random layer": (
        Made(lambda self, x: x * self.own * torch.rand_like(x), own=nn.Parameter(torch.ones(5))), (4, 5), "Made"),
}  # fmt: skip


@pytest.mark.parametrize("model, shape, named", REFUSED_PASSES.values(), ids=REFUSED_PASSES)
def test_refuses_in_a_pass(model, shape, named, monkeypatch):
    for kind in (nn.Bilinear, Made):
        monkeypatch.setitem(SGSC.rules, kind, per_sample_rule)
    SGSC(model.eval(), gamma=0.5)
    model.train()
    x = torch.randn(shape, requires_grad=True)
    with torch.no_grad():
        model(x)  # an evaluation goes on
    with pytest.raises(ValueError, match=re.escape(named)):
        model(x).sum().backward()


@pytest.mark.parametrize("mistake, error, named", [
    (lambda found: tuple(found.items()), TypeError, ""),
    (lambda found: {"bias": found["bias"]}, KeyError, "weight"),
    (lambda found: found | {"wieght": found["weight"]}, ValueError, "wieght"),
    (lambda found: found | {"weight": found["weight"][0]}, ValueError, "weight"),  # no count
    (lambda found: found | {"bias": (found["bias"][0], 1)}, ValueError, "bias"),  # a count that is no tensor
    (lambda found: found | {"weight": found["bias"]}, ValueError, "weight"),  # sums of another shape
])  # fmt: skip
def test_a_rules_mistake_is_refused_by_the_module_and_the_parameter(mistake, error, named, monkeypatch):
    monkeypatch.setitem(SGSC.rules, nn.Linear, lambda *given: mistake(linear_rule(*given)))
    with pytest.raises(error, match=rf"'4' \(Linear\).*{named}"):
        measured(*toy())


# -- calls out of order ------------------------------------------------------------------------------------------------

# Each is called with (sgsc, loss), where loss() makes a forward pass.
BACKWARD, REMOVE = lambda _, loss: loss().backward(), lambda sgsc, _: sgsc.remove()
GATES = [lambda sgsc, _: sgsc.scale_gradients_(), lambda sgsc, _: sgsc.scaled_update().__enter__()]
USES = [*GATES, lambda sgsc, _: sgsc.consistency(), lambda sgsc, _: sgsc.summary()]


@pytest.mark.parametrize("named, calls", [  # the last call is refused
    *((r"loss\.backward\(\)", [use]) for use in USES),
    *((r"loss\.backward\(\)", [BACKWARD, first, second]) for first, second in itertools.product(GATES, GATES)),
    *((r"remove\(\)", [REMOVE, use]) for use in USES),
    (r"torch\.no_grad\(\)", [lambda _, loss: (loss() + loss()).backward()]),
    (r"torch\.no_grad\(\)", [lambda _, loss: [kept.backward(retain_graph=True) for kept in [loss()] * 2]]),
])  # fmt: skip
def test_refuses_calls_out_of_order(named, calls):
    model, x, y = toy()
    sgsc, (*before, refused) = SGSC(model, gamma=0.5), calls
    for call in before:
        call(sgsc, lambda: loss_of(model, x, y))
    with pytest.raises(RuntimeError, match=named):
        refused(sgsc, lambda: loss_of(model, x, y))


def test_a_scaled_update_that_no_with_entered_is_refused_in_the_next_forward_pass_once():
    model, x, y = toy()
    sgsc = SGSC(model, gamma=1.0)
    loss_of(model, x, y).backward()
    sgsc.scaled_update()
    with torch.no_grad():
        model(x)  # evaluation goes on
    with pytest.raises(RuntimeError, match=r"scaled_update\(\)"):
        model(x)
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
