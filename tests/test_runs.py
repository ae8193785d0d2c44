"""One run as data, and the tables of what many runs left."""

import math
from functools import partial

import numpy as np
from study_inputs import FRESH, RUNS, assert_refused, shortly

from sgsc_study import Run, smoothness


def test_a_bad_field_is_refused_by_name_and_so_are_two_that_do_not_go_together():
    run = partial(Run, **{"seed": 0, "lr": 0.1})
    assert_refused(run, TypeError, seed=[0.5, True], lr=["0.1"], gamma=[True])
    assert_refused(run, ValueError, seed=[-1], lr=[0.0, math.nan], gamma=[-0.1], placement=["during"], gate=["none"])
    assert_refused(run, ValueError, control=["random"], schedule=["linear"], weight_decay=[-1], label_smoothing=[1.1])
    assert_refused(partial(run, gate="and-mask"), ValueError, gamma=[1.5])
    assert_refused(partial(run, gate="vote", gamma=1.0), ValueError, gamma=[0.5], control=["permuted"])
    assert_refused(partial(run, gate="cautious", gamma=1.0), ValueError, placement=["before"])


def test_frame_and_final_are_tidy_and_carry_every_field_of_their_runs():
    curves = shortly([RUNS[0], RUNS[-1]], epochs=4, fresh=FRESH)
    frame, final = curves.frame(), curves.final()
    assert len(frame) == 8 and list(frame["epoch"]) == [1, 2, 3, 4] * 2 and len(final) == 2
    assert frame.loc[3, "test_accuracy"] == final.loc[0, "test_accuracy"] == curves.test_accuracy[0, -1]
    np.testing.assert_allclose(final["late_test_accuracy"], curves.test_accuracy.mean(1), atol=1e-6)
    for kind, loss in (("epoch", curves.train_loss), ("probe", curves.probe_loss)):
        for name, values in smoothness(loss).items():
            np.testing.assert_array_equal(final[f"{kind}_{name}"], values)
    for table in (frame.drop_duplicates("seed"), final):
        assert [Run(**row) for row in table[[*vars(RUNS[0])]].to_dict("records")] == [RUNS[0], RUNS[-1]]


def test_evaluating_seldom_changes_nothing_but_the_rows():
    often, seldom = (shortly(RUNS[:3], evaluate_every=k, epochs=5) for k in (1, 2))
    assert seldom.evaluated.tolist() == [2, 4, 5] and often.evaluated.tolist() == [1, 2, 3, 4, 5]
    assert np.array_equal(seldom.test_loss, often.test_loss[:, [1, 3, 4]])
    assert np.array_equal(seldom.step_loss, often.step_loss) and seldom.frame()["epoch"].tolist() == [2, 4, 5] * 3
    assert "epoch_roughness" not in seldom.final() and "epoch_roughness" in often.final()
