"""`tune`: the same table however often it was stopped, whatever lies in its way, from the cache where it can."""

import itertools
from functools import partial

import optuna
import pandas as pd
import pytest
from study_inputs import SMALL, SPACE, TRAINED, assert_refused, nobody_trains, search

from sgsc_study import GATES, Run, load_mnist1d, train
from sgsc_study import search as module

same = pd.testing.assert_frame_equal


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> pd.DataFrame:
    """The table of an undisturbed search."""
    return search(tmp_path_factory.mktemp("whole"))


def test_a_search_is_one_tidy_row_a_trial_that_its_own_runs_reproduce(tmp_path, whole):
    assert whole.groupby("arm")["trial"].apply(list).tolist() == [list(range(7))] * 2
    after = whole[whole["arm"] == "after"]
    assert after["lr"].between(1e-3, 1e-1).all() and after["gamma"].between(0, 2).all()
    for table, n_seeds in ((whole, 1), (search(tmp_path, n_seeds=3, n_trials=2), 3)):
        row = table.iloc[-1]
        runs = [Run(10_000 + k, row["lr"], row["gamma"], row["placement"]) for k in range(n_seeds)]
        assert row["valid_accuracy"] == pytest.approx(train(runs, SMALL, **TRAINED).valid_accuracy[:, -1].mean())


@pytest.mark.parametrize("call", ["ask", "tell", "train"])
def test_a_search_stopped_anywhere_ends_with_the_table_of_one_that_was_not(tmp_path, monkeypatch, whole, call):
    owner = module if call == "train" else optuna.Study
    original, left, stops = getattr(owner, call), 0, 0

    def stopping(*args, **kwargs):  # as good as a kill: nothing is tidied up
        nonlocal left
        left -= 1
        if left < 0:
            raise InterruptedError
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, call, stopping)
    for k in itertools.count(1):
        left = k if call == "train" else 5 * k
        try:
            same(search(tmp_path), whole, check_exact=True)
            break
        except InterruptedError:
            stops += 1
    assert stops >= 2


def test_a_second_search_trains_nothing_and_another_does(tmp_path, monkeypatch, whole):
    def gate(factor: float):
        return lambda sign, *, batch_size, gamma: sign.abs().clamp(max=1) * factor

    arms = {"mine": {"lr": SPACE["lr"], "gamma": 0.5, "gate": "mine"}}
    monkeypatch.setitem(GATES, "mine", gate(0.5))
    first = search(tmp_path), search(tmp_path, arms=arms)
    monkeypatch.setattr("sgsc_study.engine.backward", nobody_trains)
    same(first[0], search(tmp_path, study="another name"), check_exact=True)
    same(first[1], search(tmp_path, arms=arms), check_exact=True)
    monkeypatch.setitem(GATES, "mine", gate(0.3))
    for changes in ({"arms": arms}, {"batch_size": 20}):
        with pytest.raises(AssertionError, match="trained"):
            search(tmp_path, **changes)


@pytest.mark.parametrize("left", ["cut", "broken", "empty", "another search's", "locked"])
def test_a_journal_in_the_way_changes_nothing(tmp_path, whole, left):
    search(tmp_path, n_trials=2, first_seed=5 if left.startswith("another") else 10_000)
    (journal,) = tmp_path.rglob("*.journal")
    written = journal.read_bytes()
    journal.write_bytes({"cut": written[:-9], "broken": written.replace(b"{", b"["), "empty": b""}.get(left, written))
    if left == "locked":  # by a search that was killed while it wrote
        journal.with_name(f"{journal.name}.lock").symlink_to("nowhere")
    same(search(tmp_path), whole, check_exact=True)
    storage = module.JournalStorage(module.JournalFileBackend(str(journal)))
    assert len(optuna.get_all_study_names(storage)) == 2


def test_a_database_holds_the_search_and_a_second_one_replaces_it(tmp_path, monkeypatch):
    url = f"sqlite:///{tmp_path / 'trials.db'}"
    first = search(tmp_path, storage=url, n_trials=4)
    monkeypatch.setattr("sgsc_study.engine.backward", nobody_trains)
    for storage in (url, ""):
        same(search(tmp_path, storage=storage, n_trials=4), first, check_exact=True)
    studies = [optuna.load_study(study_name=name, storage=url) for name in optuna.get_all_study_names(url)]
    assert sorted(trial.value for study in studies for trial in study.trials) == sorted(first["valid_accuracy"])


URLS = ["here", "me:hunter2@there/db", "sqlite:////nowhere/at/all.db", "none+such://me:hunter2@there"]
URLS += ["postgresql+psycopg://me:hunter2@127.0.0.1:1/db", "postgresql://me:hunter2@host:port/db"]
URLS += ["postgresql://me:a@hunter2@127.0.0.1:1/db", "postgresql://me/x:hunter2@127.0.0.1:1/db"]


@pytest.mark.parametrize("url", URLS)
def test_a_bad_url_is_refused_by_name_and_its_password_never_shown(tmp_path, monkeypatch, url):
    monkeypatch.setattr("sgsc_study.engine.backward", nobody_trains)
    with pytest.raises(ValueError, match="`storage`") as refused:
        search(tmp_path, storage=url)
    assert "hunter2" not in str(refused.value)
    assert refused.value.__suppress_context__ or not refused.value.__context__  # nor in what led to it


def test_bad_numbers_and_data_without_validation_rows_are_refused_by_name(tmp_path):
    without = load_mnist1d(100, valid_fraction=0.0)
    assert_refused(partial(search, tmp_path), ValueError, data=[without], n_trials=[0], n_seeds=[0])
    assert_refused(partial(search, tmp_path), TypeError, ask_batch=[1.5])
