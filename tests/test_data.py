"""MNIST-1D and its splits."""

import numpy as np
import pytest
import torch
from study_inputs import DATA, assert_refused

from sgsc_study import data, draw_mnist1d, load_mnist1d
from sgsc_study.data import DATA_SHA256, sha256_of


def test_data_have_the_published_hash_shapes_and_types():
    assert sha256_of(*draw_mnist1d()) == DATA_SHA256 != sha256_of(*draw_mnist1d()[::-1])
    assert [tuple(part.shape) for part in DATA] == [(3200, 40), (3200,), (800, 40), (800,), (1000, 40), (1000,)]
    assert [part.dtype for part in DATA] == [torch.float32, torch.int64] * 3


def test_validation_is_cut_from_training_and_test_stays():
    whole = load_mnist1d(valid_fraction=0.0)
    assert torch.equal(torch.cat([DATA.x_train, DATA.x_valid]), whole.x_train)
    assert torch.equal(DATA.x_test, whole.x_test) and len(whole.x_valid) == 0


@pytest.mark.parametrize("noise", [0.1, 0.5, 1.0])
def test_label_noise_is_exact_and_touches_training_labels_only(noise):
    noisy = load_mnist1d(label_noise=noise)
    assert int((noisy.y_train != DATA.y_train).sum()) == round(noise * 3200)
    assert torch.equal(noisy.y_valid, DATA.y_valid) and torch.equal(noisy.y_test, DATA.y_test)
    assert torch.equal(noisy.x_train, DATA.x_train) and noisy.y_train.min() >= 0 and noisy.y_train.max() <= 9


def test_loading_keeps_numpys_global_state_and_protects_the_cached_draw():
    before = np.random.get_state()[1].copy()
    assert not torch.equal(draw_mnist1d.__wrapped__(100, seed=7)[0], draw_mnist1d(100, seed=8)[0])
    assert np.array_equal(before, np.random.get_state()[1])
    load_mnist1d().x_train.zero_()
    assert torch.equal(load_mnist1d().x_train, DATA.x_train)


def test_another_data_set_under_the_default_seed_is_refused(monkeypatch):
    monkeypatch.setattr(data, "DATA_SHA256", "0" * 64)
    with pytest.raises(RuntimeError, match="SHA-256"):
        draw_mnist1d.__wrapped__(5000, seed=42)


def test_bad_arguments_are_refused_by_name():
    bad = {"num_samples": [4999, 0], "seed": [-1], "valid_fraction": [1.0], "label_noise": [-0.1]}
    assert_refused(load_mnist1d, ValueError, **bad)
    assert_refused(load_mnist1d, TypeError, num_samples=[100.0], label_noise=["0.1"])


def test_a_number_of_another_type_is_refused_also_after_its_equal_was_drawn():
    draw_mnist1d(200)
    with pytest.raises(TypeError, match="`num_samples`"):
        draw_mnist1d(200.0)
