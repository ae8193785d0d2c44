"""What SGSC can't compute exactly is refused, by the names in the error; most of it before any training."""

import functools
import itertools
import math
import re

import numpy
import pytest
import torch
from asserts import hooks_on, loss_of, measured
from inputs import Made, batch_norm, one, toy
from torch import nn
from torch.utils.checkpoint import checkpoint

from sgsc_core.checks import check
from sgsc_core.rules import linear_rule
from sgsc_lib import SGSC, per_sample_gradients, sign_consistency


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


REFUSED_MODELS = {  # within an nn.Sequential: the model, and the names in the error
    "batch norm in training": (lambda: nn.BatchNorm1d(5), "'0' (BatchNorm1d)"),
    "batch norm without statistics": (lambda: nn.BatchNorm2d(5, track_running_stats=False).eval(), "'0' (BatchNorm2d)"),
    "lazy": (lambda: nn.LazyLinear(5), "'0' (LazyLinear)"),
    "data parallel": (lambda: nn.DataParallel(nn.Linear(5, 5)), "'0' (DataParallel)"),
    "compiled": (lambda: torch.compile(nn.Linear(5, 5)), "'0' (OptimizedModule)"),
    "complex": (lambda: nn.Linear(5, 5, dtype=torch.complex64), "'0' (Linear)"),
    "embedding with max_norm": (lambda: nn.Embedding(5, 5, max_norm=1.0), "'0' (Embedding)"),
    "sparse bags": (lambda: nn.EmbeddingBag(5, 5, sparse=True), "'0' (EmbeddingBag)"),
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


@pytest.mark.parametrize("rule", [lambda module, inputs: {}, dict])
def test_a_rule_that_cannot_serve_its_layer_is_refused_before_training(rule, monkeypatch):
    monkeypatch.setitem(SGSC.rules, nn.Linear, rule)
    with pytest.raises(ValueError, match=re.escape("'0' (Linear)")):
        SGSC(nn.Sequential(nn.Linear(4, 4)), gamma=1.0)


def test_explain_lists_every_problem_at_once_and_the_constructor_raises_them_all(monkeypatch):
    monkeypatch.setitem(SGSC.rules, nn.LayerNorm, functools.partial(linear_rule))
    own = Made(lambda self, x: x + self.offset, offset=nn.Parameter(torch.zeros(5)))
    refused = nn.BatchNorm1d(5, affine=False), nn.Embedding(5, 5, sparse=True)
    model = nn.Sequential(nn.Linear(5, 5), *refused, nn.LayerNorm(5, bias=False), own, nn.MultiheadAttention(2, 1))
    model[0].bias.requires_grad_(False)
    found = SGSC.explain(model)
    again = "recomputed in '5' (MultiheadAttention)"
    assert [(*row[:3], bool(row.problem)) for row in found] == [
        ("0.weight", "0 (Linear)", "linear_rule", False), ("0.bias", "0 (Linear)", "frozen", False),
        ("", "1 (BatchNorm1d)", "", True), ("2.weight", "2 (Embedding)", "embedding_rule", True),
        ("3.weight", "3 (LayerNorm)", "partial", False), ("4.offset", "4 (Made)", "recomputed in '4' (Made)", False),
        ("5.in_proj_weight", "5 (MultiheadAttention)", again, False),
        ("5.in_proj_bias", "5 (MultiheadAttention)", again, False),
        ("5.out_proj.weight", "5.out_proj (NonDynamicallyQuantizableLinear)", again, False),
        ("5.out_proj.bias", "5.out_proj (NonDynamicallyQuantizableLinear)", again, False),
    ]  # fmt: skip
    assert all(row.cost for row in found if row.rule not in ("", "frozen")) and "recomputed" in str(found)
    problems = list(dict.fromkeys(row.problem for row in found if row.problem))
    with pytest.raises(ValueError) as refusal:
        SGSC(model, gamma=0.5)
    assert str(refusal.value).splitlines() == problems
    assert [row.module for row in SGSC.explain(nn.Linear(1, 1))] == ["model (Linear)"] * 2


def test_a_model_over_processes_needs_a_group(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="`process_group`"):
        SGSC(nn.Linear(1, 1), gamma=0.5)


# -- a pass, and what a rule may not return ----------------------------------------------------------------------------


def in_place(self, x):
    x = x * 1.0
    y = self.layer(x).float()
    return x.add_(y)


REFUSED_PASSES = {  # the model, the shape of its input, the error and the name in it
    "a penalty in the loss": (nn.Linear(5, 5), (4, 5), RuntimeError, "'weight'"),
    "unbatched vector": (nn.Linear(5, 5), (5,), RuntimeError, "'model' (Linear)"),
    "unbatched image": (one(nn.Conv2d(2, 5, 3)), (2, 5, 5), RuntimeError, "'layer' (Conv2d)"),
    "batch norm put back into training": (one(nn.BatchNorm1d(5)), (4, 5), ValueError, "'layer' (BatchNorm1d)"),
    "samples that are mixed": (
        one(nn.Linear(5, 5), lambda self, x: self.layer(x - x.mean(0))), (4, 5), ValueError, "'layer' (Linear)"),
    "the loss of pairs": (one(nn.Linear(5, 5), lambda self, x: self.layer(x) @ self.layer(x.flip(0)).T), (4, 5),
                          ValueError, "'model' (Made)"),
    "time in front": (nn.Sequential(nn.TransformerEncoderLayer(4, 1, 4)), (3, 4, 4), ValueError, "'0.self_attn'"),
    "a layer used twice in reentrant checkpoints": (
        one(nn.Linear(5, 5), lambda self, x: checkpoint(self.layer, checkpoint(self.layer, x, use_reentrant=True),
                                                        use_reentrant=True)), (4, 5), RuntimeError, "'layer."),
    "an input that was overwritten": (one(nn.Linear(5, 5), in_place), (4, 5), ValueError, "'layer' (Linear)"),
    "other random numbers": (
        Made(lambda self, x: x * self.own * torch.from_numpy(numpy.random.rand(*x.shape)).float() * torch.rand(1),
             own=nn.Parameter(torch.ones(5))), (4, 5), RuntimeError, "'own'"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:SGSC ")
@pytest.mark.parametrize("case", REFUSED_PASSES.values(), ids=REFUSED_PASSES)
def test_refuses_in_a_pass(case):
    model, shape, error, named = case
    SGSC(model.eval(), gamma=0.5)
    model.train()
    x = torch.randn(shape, requires_grad=True)
    with torch.no_grad():
        model(x)  # an evaluation goes on
    penalty = 0.1 * model.weight.square().sum() if named == "'weight'" else 0
    autocast = torch.autocast("cpu", enabled=vars(model).get("compute") is in_place)
    with pytest.raises(error, match=re.escape(named)), autocast:
        (model(x).square().sum() + penalty).backward()


@pytest.mark.parametrize("mistake, error, named", [
    (lambda found: tuple(found.items()), TypeError, ""),
    (lambda found: {"bias": found["bias"]}, KeyError, "weight"),
    (lambda found: found | {"wieght": found["weight"]}, ValueError, "wieght"),
    (lambda found: found | {"bias": 1}, TypeError, "bias"),
    (lambda found: found | {"weight": found["bias"]}, ValueError, "weight"),  # gradients of another shape
    (lambda found: found | {"bias": found["bias"].sum(0)}, ValueError, "bias"),  # their sum
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


def test_a_model_compiled_and_run_before_sgsc_was_built_is_not_silent():
    torch._dynamo.reset()
    model, x, y = toy()
    compiled = torch.compile(model, backend="eager")
    loss_of(compiled, x, y).backward()
    sgsc = SGSC(model, gamma=1.0)
    loss_of(compiled, x, y).backward()
    with pytest.raises(RuntimeError, match="compile"):
        sgsc.scale_gradients_()


def test_a_module_that_does_something_else_when_it_runs_again_is_refused_in_any_batch():
    model = Made(lambda self, x: x * self.own.sin() * self.by, own=nn.Parameter(torch.ones(5)))
    model.by = 1.0
    SGSC(model, gamma=0.5)
    x = torch.randn(4, 5)
    model(x).square().sum().backward()
    output = model(x)
    model.by = 2.0  # between the forward and the backward pass
    with pytest.raises(RuntimeError, match="'own'"):
        output.square().sum().backward()


def test_the_reference_refuses_coupled_samples_unequal_rows_and_no_samples():
    model, x, y = toy()
    with pytest.raises(ValueError, match=r"'1' \(BatchNorm1d\)"):
        per_sample_gradients(batch_norm()[0].train(), x, y)
    with pytest.raises(ValueError, match=r"`y`.*`x`"):
        per_sample_gradients(model, x, y[:3])
    for empty in (torch.zeros(0, 3), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="`per_sample`"):
            sign_consistency(empty)
