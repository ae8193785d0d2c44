"""The cache: what it keeps, and which code, settings and damage its keys and entries tell apart."""

import importlib
import sys
import threading
import warnings
from functools import lru_cache, partial, wraps

import pytest
import torch
from study_inputs import RUNS, assert_same, shortly

from sgsc_study.cache import cached, code_version, function_version
from sgsc_study.engine import evaluate, train_stack


def test_a_key_is_computed_once_and_what_fails_is_not_kept(tmp_path):
    made = iter(range(9))
    found = [cached(tmp_path / "new", key, lambda: next(made)) for key in ("a", "b", "a", "b")]
    assert found == [0, 1, 0, 1] and (tmp_path / "new").stat().st_mode & 0o077 == 0  # pickles are for the owner alone
    with pytest.raises(ZeroDivisionError):
        cached(tmp_path, "c", lambda: 1 / 0)
    assert cached(tmp_path, "c", lambda: 5) == 5


def test_a_damaged_entry_is_trained_again(tmp_path):
    first = shortly(RUNS[:2], cache=tmp_path)
    (entry,) = {path for path in tmp_path.rglob("output.pkl") if path.stat().st_size > 999}
    whole = entry.read_bytes()
    flips = ((len(whole) * k // 20, 1 << k % 8) for k in range(20))  # one bit each, from the first byte on
    damaged = [whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :] for at, bit in flips]
    for content in (b"", whole[: len(whole) // 2], whole[:-1], *damaged):
        entry.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # joblib warns of what it cannot read
            assert_same(shortly(RUNS[:2], cache=tmp_path), first)


# -- the version of code -----------------------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write modules of one's own and import the first of them, anew at each call."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(sources: dict[str, str]):
        for name, source in sources.items():
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(source)
        importlib.invalidate_caches()
        for name in [name for name in sys.modules if name.partition(".")[0] in ("mine", "beside")]:
            del sys.modules[name]
        return importlib.import_module(next(iter(sources)).removesuffix(".py").replace("/", "."))

    yield write
    write({"mine/__init__.py": ""})


PACKAGE = {
    "mine/gate.py": "import beside\nfrom mine.scale import f\nfrom . import plain\nK = f(1) + plain.ONE\n",
    "mine/__init__.py": "",
    "mine/scale.py": 'def f(x):\n    """Words."""\n    if x < 0:\n        raise ValueError(f"{x} < 0")\n    return 2 * x\n',
    "mine/plain.py": "try:\n    import none_such\nexcept ImportError:\n    ONE = 1\n",
    "beside.py": "import numpy\nK = 1\n",
}
REWORDED = '''"""New."""\n# A comment.\ndef f(\n    x,  # of any size\n):
    """Others."""\n    if x < 0:\n        raise ValueError("negative")\n    return 2*x\n'''
CHANGES = {"gate": ("+", "-"), "scale": ("x < 0:", "x < 1:"), "plain": ("ONE = 1", "ONE = 2")}


def test_the_version_of_code_is_that_of_what_it_computes_with_all_that_it_imports(write):
    def version(changes: dict[str, str]) -> str:
        write(PACKAGE | changes)
        return code_version("mine.gate")

    first = version({})
    assert version({"mine/scale.py": REWORDED}) == first == version({})
    changes = {f"mine/{name}.py": change for name, change in CHANGES.items()} | {"beside.py": ("1", "2")}
    others = {version({name: PACKAGE[name].replace(*change)}) for name, change in changes.items()}
    assert len(others | {first}) == 5


@pytest.mark.parametrize("name", ["sgsc_lib", "sgsc_checks", "sgsc_study.gates", "sgsc_study.data", "sgsc_study.runs"])
def test_the_engines_version_covers_every_module_that_training_uses(monkeypatch, name):
    first = code_version("sgsc_study.engine", name)
    spec = sys.modules[name].__spec__
    monkeypatch.setattr(spec, "sgsc_source", spec.sgsc_source + "\nmore = 1\n")
    assert code_version("sgsc_study.engine") != first


def test_a_file_that_was_edited_after_it_was_loaded_counts_only_once_it_is_loaded_again(write, tmp_path):
    module = write({"mine.py": "K = 1\n"})
    first = code_version("mine")
    (tmp_path / "mine.py").write_text("K = 12\n")
    assert code_version("mine") == first
    assert importlib.reload(module).K == 12 and code_version("mine") != first


def test_a_notebooks_version_is_that_of_all_its_cells(write):
    notebook = write({"mine.py": ""})
    notebook.In = ["", "K = 1  # words"]
    first = code_version("mine")
    notebook.In[1] = "K = 1  # other words"
    assert code_version("mine") == first
    for cell in ("K = 2", "from . import nothing", "this is no Python"):
        notebook.In.append(cell)
        assert code_version("mine") != first


# -- the version of a function -----------------------------------------------------------------------------------------

GATE = "from functools import lru_cache\nK = 2\n@lru_cache\ndef table(gamma):\n    return K * gamma\n"
GATE += "def gate(sign, *, batch_size, gamma):\n    return sign * table(1.0)\n"
CHOSEN = "def make(a):\n  if a:\n    def f(x): return x\n  else:\n    def f(x): return 2 * x\n  return f\n"


def test_a_gate_that_calls_a_cached_function_has_another_version_when_that_changes(write):
    def version(source: str) -> str:
        return function_version(write({"mine.py": source}).gate)

    first = version(GATE)
    assert version(GATE.replace("K = 2", "# some\n# more\nK = 2")) == first
    assert len({first, version(GATE.replace("K *", "K +")), version(GATE.replace("K = 2", "K = 3"))}) == 3
    mine = write({"mine.py": GATE})
    assert (
        first == function_version(mine.gate) == function_version(lru_cache(mine.gate)) != function_version(mine.table)
    )


def closure(by):
    return lambda sign: by * sign


def default(by):
    return lambda sign, by=by: by * sign


def method(by):
    class Scale:
        def gate(self, sign):
            return by * sign

    return Scale().gate


def decorated(by):
    @torch.no_grad()
    @lambda gate: wraps(gate)(lambda sign: by * gate(sign))
    def gate(sign):
        return sign

    return gate


@pytest.mark.parametrize("make", [closure, default, method, decorated])
def test_functions_that_hold_other_values_have_other_versions(make):
    assert function_version(make(2)) == function_version(make(2)) != function_version(make(3))


def test_two_lambdas_and_two_functions_of_one_name_have_two_versions(write):
    one_line = [lambda sign: sign * 1, lambda sign: sign * 2]
    another = lambda sign: sign * 1  # noqa: E731
    module = write({"mine.py": CHOSEN})
    functions = [*one_line, another, module.make(0), module.make(1), train_stack, evaluate]
    versions = [[function_version(function) for function in functions] for _ in range(2)]
    assert versions[0] == versions[1] and len(set(versions[0])) == len(functions)


@pytest.mark.parametrize("function", [partial(max, 1), closure(threading.Lock()), closure(closure(1)), abs, dict])
def test_what_cannot_be_told_has_another_version_at_every_call(function):
    assert function_version(function) != function_version(function)
