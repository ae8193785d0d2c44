"""One run as data, and the tables of what many runs left."""

import math

import numpy as np
import pytest
from study_inputs import FRESH, RELATED, RUNS, mistakes, shortly

from sgsc_study import GATES, Run, smoothness

BAD = {TypeError: {"seed": [0.5, True], "lr": ["0.1"], "gamma": [True]}}
BAD |= {ValueError: {"seed": [-1], "lr": [0.0, math.nan], "gamma": [-0.1], "placement": ["during"]}}
BAD[ValueError] |= {"control": ["random"], "gate": ["none"], "schedule": ["linear"]}
BAD[ValueError] |= {"weight_decay": [-0.1], "label_smoothing": [1.1]}


@pytest.mark.parametrize(("error", "name", "value"), mistakes(BAD))
def test_a_bad_field_is_refused_by_name(error, name, value):
    with pytest.raises(error, match=f"`{name}`"):
        Run(**{"seed": 0, "lr": 0.1, name: value})


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("gamma", {"gamma": 1.5, "gate": "and-mask"}),
        ("gamma", {"gamma": 0.5, "gate": "vote"}),
        ("control", {"gamma": 1.0, "gate": "vote", "control": "permuted"}),
        ("placement", {"gamma": 1.0, "gate": "cautious", "placement": "before"}),
    ],
)
def test_fields_that_do_not_go_together_are_refused_by_name(name, fields):
    with pytest.raises(ValueError, match=f"`{name}`"):
        Run(0, 0.1, **fields)


def test_a_gate_of_ones_own_is_a_runs_gate_once_it_is_in_the_table(monkeypatch):
    with pytest.raises(ValueError, match="`gate`"):
        Run(0, 0.1, 0.5, gate="mine")
    monkeypatch.setitem(GATES, "mine", lambda sign, *, batch_size, gamma: sign * 0)
    assert Run(0, 0.1, 0.5, gate="mine").gate == "mine"


def test_frame_and_final_are_tidy():
    curves = shortly(RUNS[:2], epochs=4, fresh=FRESH)
    frame, final = curves.frame(), curves.final()
    assert len(frame) == 8 and list(frame["epoch"]) == [1, 2, 3, 4] * 2 and len(final) == 2
    assert frame.loc[3, "test_accuracy"] == final.loc[0, "final_test_accuracy"] == curves.test_accuracy[0, -1]
    assert final["best_test_accuracy"].tolist() == curves.test_accuracy.max(1).tolist()
    for kind, loss in (("epoch", curves.train_loss), ("probe", curves.probe_loss)):
        for name, values in smoothness(loss).items():
            np.testing.assert_array_equal(final[f"{kind}_{name}"], values)


def test_tables_show_the_fields_in_which_runs_differ_from_the_usual():
    always = ["seed", "lr", "gamma", "placement"]
    assert list(shortly(RUNS[:2]).frame().columns[:5]) == [*always, "epoch"]
    columns = list(shortly([RELATED[0], RELATED[-1]]).final().columns)
    assert columns[:7] == [*always, "gate", "schedule", "label_smoothing"] and "weight_decay" not in columns


def test_evaluating_seldom_changes_nothing_but_the_rows():
    often, seldom = (shortly(RUNS[:3], evaluate_every=k, epochs=5) for k in (1, 2))
    assert seldom.evaluated.tolist() == [2, 4, 5] and often.evaluated.tolist() == [1, 2, 3, 4, 5]
    assert np.array_equal(seldom.test_loss, often.test_loss[:, [1, 3, 4]])
    assert np.array_equal(seldom.step_loss, often.step_loss) and seldom.frame()["epoch"].tolist() == [2, 4, 5] * 3
    assert "epoch_roughness" not in seldom.final() and "epoch_roughness" in often.final()
