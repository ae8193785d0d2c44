"""`assert_rule` and `assert_gate`, which users try a rule or a gate of their own with: they pass what is right only."""

import math

import pytest
import torch
from inputs import Made, scale
from torch import Tensor, nn

from sgsc_lib import SGSC, per_sample_rule
from sgsc_study import GATES, align_runs
from sgsc_study.testing import assert_gate, assert_rule

# -- rules -------------------------------------------------------------------------------------------------------------

SERVED = {
    "vectors": (nn.Linear(4, 3), (6, 4)),
    "sequences": (nn.Linear(4, 3, bias=False), (6, 5, 4)),
    "convolution": (nn.Conv2d(2, 4, 3, groups=2), (6, 2, 5, 5)),
    "layer norm": (nn.LayerNorm(4), (6, 4)),
    "tokens": (nn.Embedding(5, 4, padding_idx=0), (6, 7)),
    "partly frozen": (nn.Linear(4, 3), (6, 4)),
    "a layer of one's own": (scale(4), (6, 4)),
}
SERVED["partly frozen"][0].bias.requires_grad_(False)


@pytest.mark.parametrize("module, shape", SERVED.values(), ids=SERVED)
def test_the_rules_in_the_table_pass(module, shape, monkeypatch):
    monkeypatch.setitem(SGSC.rules, Made, per_sample_rule)
    inputs = torch.randint(5, shape) if isinstance(module, nn.Embedding) else torch.randn(shape, dtype=torch.float64)
    assert_rule(SGSC.rules[type(module)], module.double(), inputs)


def by_hand(make) -> dict[str, tuple[Tensor, Tensor]]:
    """A rule for a Linear layer that makes its sums and counts of all per-sample gradients [B, *shape]."""

    def rule(module: nn.Linear, inputs: Tensor, errors: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        return {"weight": make(torch.einsum("bo,bi->boi", errors, inputs)), "bias": make(errors)}

    return rule


MISTAKEN_RULES = {
    "mean for sum": lambda g: (g.sign().mean(0), g.count_nonzero()),
    "no sign": lambda g: (g.sum(0), g.count_nonzero()),
    "sign of the sum": lambda g: (g.sum(0).sign(), g.count_nonzero()),
    "half the batch": lambda g: (g[::2].sign().sum(0), g.count_nonzero()),
    "nan": lambda g: (g.sum(0) * math.nan, g.count_nonzero()),
    "no count": lambda g: (g.sign().sum(0), torch.tensor(0)),
    "count of samples": lambda g: (g.sign().sum(0), torch.tensor(len(g))),
    "count with the zeros": lambda g: (g.sign().sum(0), torch.tensor(g.numel())),
    "count that is no whole number": lambda g: (g.sign().sum(0), g.count_nonzero() + 0.5),
}


@pytest.mark.parametrize("mistaken", MISTAKEN_RULES.values(), ids=MISTAKEN_RULES)
def test_a_mistaken_rule_fails_where_the_right_one_passes(mistaken):
    module, inputs = nn.Linear(4, 3).double(), torch.randn(6, 4, dtype=torch.float64).relu()  # with zeros
    inputs[0] = torch.tensor([1.0, 2.0, 0.0, 3.0])
    assert_rule(by_hand(lambda g: (g.sign().sum(0), g.count_nonzero())), module, inputs)
    with pytest.raises(AssertionError):
        assert_rule(by_hand(mistaken), module, inputs)


NO_SUMS = {
    "no dict": (lambda *_: None, TypeError),
    "a parameter forgotten": (lambda *_: {}, KeyError),
    "no count": (by_hand(lambda g: g.sign().sum(0)), ValueError),
    "another shape": (by_hand(lambda g: (g.sign(), g.count_nonzero())), ValueError),
}


@pytest.mark.parametrize("rule, error", NO_SUMS.values(), ids=NO_SUMS)
def test_what_sgsc_refuses_in_training_is_refused_here_too(rule, error):
    with pytest.raises(error, match=r"\(Linear\)"):
        assert_rule(rule, nn.Linear(4, 3).double(), torch.randn(6, 4, dtype=torch.float64))


# -- gates -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
def test_the_gates_in_the_table_pass(gate):
    assert_gate(gate)


def c_of(sign: Tensor, batch_size: int) -> Tensor:
    return sign.abs() / batch_size


MISTAKEN_GATES = {
    "mixes runs": lambda sign, *, batch_size, gamma: c_of(sign, batch_size) / c_of(sign, batch_size).mean(),
    "one γ for all runs": lambda sign, *, batch_size, gamma: (c_of(sign, batch_size) ** gamma[0]).to(sign.dtype),
    "random": lambda sign, *, batch_size, gamma: c_of(sign, batch_size) * torch.rand_like(sign),
    "changes its sums": lambda sign, *, batch_size, gamma: sign.abs_() / batch_size,
    "negative factors": lambda sign, *, batch_size, gamma: sign / batch_size,
    "mixes runs in biases alone": lambda sign, *, batch_size, gamma: (
        c_of(sign, batch_size) / (sign.abs().mean() if sign.ndim == 2 else 1)
    ),
}


@pytest.mark.parametrize("gate", MISTAKEN_GATES.values(), ids=MISTAKEN_GATES)
def test_a_mistaken_gate_fails(gate):
    assert_gate(lambda sign, *, batch_size, gamma: c_of(sign, batch_size) ** align_runs(gamma, sign))
    with pytest.raises(AssertionError):
        assert_gate(gate)


@pytest.mark.parametrize("gate, error", [
    (lambda sign: sign.abs(), TypeError),
    (lambda signs, *, batch_size, gamma: signs.abs(), ValueError),
    (lambda sign, *, batch_size, gamma: sign.abs()[0], ValueError),
    (lambda sign, *, batch_size, gamma: batch_size / sign.abs(), ValueError),
])  # fmt: skip
def test_what_train_refuses_is_refused_here_too(gate, error):
    with pytest.raises(error, match="'mine'"):
        assert_gate(gate)
