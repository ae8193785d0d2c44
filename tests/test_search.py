"""`tune`: the same table however often it was stopped, whatever lies in its way, from the cache where it can."""

import sqlite3

import optuna
import pandas as pd
import pytest
from study_inputs import SEARCH, SMALL, SPACE, search

from sgsc_study import GATES, Run, load_mnist1d, train, tune
from sgsc_study import search as module
from sgsc_study.search import open_database


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> pd.DataFrame:
    """The table of an undisturbed search."""
    return search(tmp_path_factory.mktemp("whole"))


def assert_same_table(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(found, expected, check_exact=True)


def fail(*_, **__):
    raise AssertionError("something was trained")


def test_a_search_is_one_tidy_row_a_trial_that_its_own_run_reproduces(whole):
    assert whole.groupby(["arm", "study"]).size().tolist() == [7] * 4
    assert whole.groupby(["arm", "study"])["trial"].apply(list).tolist() == [list(range(7))] * 4
    after = whole[whole["arm"] == "after"]
    assert after["lr"].between(1e-3, 1e-1).all() and after["gamma"].between(0, 2).all()
    assert set(after["placement"]) == {"after"} and whole[whole["arm"] == "Adam"]["gamma"].isna().all()
    assert whole.groupby("study")["seed"].unique().map(list).to_dict() == {0: [10_000], 1: [10_100]}
    row = after.iloc[-1]
    run = Run(int(row["seed"]), row["lr"], row["gamma"], row["placement"])
    alone = train([run], SMALL, epochs=1, batch_size=40, widths=(40, 10), n_jobs=1)
    assert alone.valid_accuracy[0, -1] == row["valid_accuracy"]


def test_a_trials_value_is_a_mean_over_seeds(tmp_path):
    table = search(tmp_path, n_seeds=3, n_studies=1, n_trials=2)
    row = table.iloc[-1]
    runs = [Run(10_000 + k, row["lr"], row["gamma"], row["placement"]) for k in range(3)]
    alone = train(runs, SMALL, epochs=1, batch_size=40, widths=(40, 10), n_jobs=1)
    assert row["valid_accuracy"] == pytest.approx(alone.valid_accuracy[:, -1].mean(), rel=1e-12)


class Stop(Exception):
    """As good as a kill: raised in the middle of a call, with nothing tidied up."""


@pytest.mark.parametrize("call", ["ask", "tell", "train"])
def test_a_search_stopped_anywhere_ends_with_the_table_of_one_that_was_not(tmp_path, monkeypatch, whole, call):
    owner = module if call == "train" else optuna.Study
    original, calls, limit, stops = getattr(owner, call), 0, 0, 0

    def stopping(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls > limit:
            raise Stop
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, call, stopping)
    for limit in range(1, 99, 1 if call == "train" else 7):
        calls = 0
        try:
            found = search(tmp_path)
            break
        except Stop:
            stops += 1
    assert stops >= 2
    assert_same_table(found, whole)


def test_a_second_search_trains_nothing(tmp_path, monkeypatch, whole):
    assert_same_table(search(tmp_path), whole)
    monkeypatch.setattr("torch.autograd.grad", fail)
    assert_same_table(search(tmp_path), whole)
    assert_same_table(search(tmp_path, study="another name"), whole)
    with pytest.raises(AssertionError, match="trained"):
        search(tmp_path, batch_size=20)


def test_an_edited_gate_is_searched_anew(tmp_path, monkeypatch):
    arms = {"mine": {"lr": SPACE["lr"], "gamma": 0.5, "gate": "mine"}}
    settings = {"cache": tmp_path, "widths": (40, 10), **SEARCH}
    for factor in (0.5, 0.3):
        gate = lambda sign, *, batch_size, gamma, factor=factor: sign.abs().clamp(max=1) * factor  # noqa: E731
        monkeypatch.setitem(GATES, "mine", gate)
        first = tune(arms, SMALL, **settings)
        with monkeypatch.context() as patch:
            patch.setattr("torch.autograd.grad", fail)
            assert_same_table(tune(arms, SMALL, **settings), first)
    assert len(list((tmp_path / "runs").rglob("output.pkl"))) == 2 * 3


@pytest.mark.parametrize("left", ["cut", "broken", "another search's", "empty", "locked"])
def test_a_journal_in_the_way_changes_nothing(tmp_path, whole, left):
    search(tmp_path, n_trials=2, first_seed=5 if left.startswith("another") else 10_000)
    (journal,) = tmp_path.rglob("*.journal")
    written = journal.read_bytes()
    parts = {"cut": written[:-9], "broken": written.replace(b"{", b"[", 3), "empty": b""}
    journal.write_bytes(parts.get(left, written))
    if left == "locked":  # by a search that was killed while it wrote
        journal.with_name(f"{journal.name}.lock").symlink_to("nowhere")
    assert_same_table(search(tmp_path), whole)
    names = optuna.get_all_study_names(module.JournalStorage(module.JournalFileBackend(str(journal))))
    assert len(names) == 4


def test_a_database_holds_the_search_and_a_second_one_replaces_it(tmp_path, monkeypatch, whole):
    file = tmp_path / "trials.db"
    url = f"sqlite:///{file}"
    assert_same_table(search(tmp_path, storage=url), whole)
    with sqlite3.connect(file) as database:
        database.execute("update trial_values set value = 0.123")
    monkeypatch.setattr("torch.autograd.grad", fail)
    assert_same_table(search(tmp_path, storage=url), whole)
    names = optuna.get_all_study_names(url)
    assert len(names) == 4 and all(name.startswith("test, ") for name in names)
    for name in names:
        values = [trial.value for trial in optuna.load_study(study_name=name, storage=url).trials]
        assert len(values) == 7 and 0.123 not in values
    assert not list(tmp_path.rglob("*.journal"))


URLS = [
    "here",
    "me:hunter2@there/db",
    "sqlite:////nowhere/at/all.db",
    "postgresql+psycopg://me:hunter2@127.0.0.1:1/db",
    "postgresql://me:hunter2@host:port/db",
    "postgresql://me:hun@ter2:hunter2@127.0.0.1:1/db",
    "postgresql://me@hunter2@127.0.0.1:1/db",
    "none+such://me:hunter2@there",
    "sqlite:///there.db?password=hunter2",
]


@pytest.mark.parametrize("url", URLS)
def test_a_bad_url_is_refused_by_name_and_its_password_never_shown(tmp_path, monkeypatch, url):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.autograd.grad", fail)
    for call in (lambda: open_database(url), lambda: search(tmp_path, storage=url)):
        with pytest.raises(ValueError, match="`storage`") as refused:
            call()
        assert "hunter2" not in str(refused.getrepr(style="long", chain=True).reprcrash)
        assert refused.value.__suppress_context__ or refused.value.__context__ is None


@pytest.mark.parametrize("name", ["n_studies", "n_trials", "ask_batch", "n_seeds"])
def test_bad_numbers_are_refused_by_name(tmp_path, name):
    for value, error in ((0, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match=f"`{name}`"):
            search(tmp_path, **{name: value})


def test_trials_without_validation_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`data`"):
        search(tmp_path, load_mnist1d(100, valid_fraction=0.0))
