"""The cache: what it keeps, and which code, settings and damage its keys and entries tell apart."""

import importlib
import sys
import threading
from functools import partial, wraps
from types import MethodType

import pytest
from conftest import damaged
from study_inputs import RUNS, assert_same, shortly

from sgsc_study.cache import code_version, function_version
from sgsc_study.gates import sign_gate


@pytest.mark.filterwarnings("ignore")  # joblib warns of what it cannot read
def test_a_damaged_entry_is_trained_again(tmp_path):
    first = shortly(RUNS[1::3], cache=tmp_path)
    (entry,) = tmp_path.rglob("output.pkl")
    for content in damaged(entry.read_bytes(), flips=50):
        entry.write_bytes(content)
        assert_same(shortly(RUNS[1::3], cache=tmp_path), first)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write modules of one's own and import the first of them, anew at each call."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "mine").mkdir()

    def write(sources: dict[str, str]):
        for name, source in sources.items():
            (tmp_path / f"{name.replace('.', '/')}.py").write_text(source)
        importlib.invalidate_caches()
        for name in [name for name in sys.modules if name.partition(".")[0] in ("mine", "beside")]:
            del sys.modules[name]
        return importlib.import_module(next(iter(sources)))

    yield write
    write({"beside": ""})


FUNCTION = 'def f(x):\n    """Words."""\n    if x < 0:\n        raise ValueError(f"{x} < 0")\n    return 2 * x\n'
REWORDED = '"""New."""\n# A comment.\ndef f(\n  x\n):\n  if x < 0:\n      raise ValueError("negative")\n  return 2*x\n'
PACKAGE = {"mine.gate": "import beside\nfrom mine.scale import f\nfrom . import plain\nK = f(1) + plain.ONE\n"}
PACKAGE |= {"mine.scale": FUNCTION, "mine.plain": "ONE = 1\n", "beside": "import numpy\nK = 1\n"}


def test_the_version_of_code_is_that_of_what_it_computes_with_all_that_it_imports(write):
    def version(name: str, source: str) -> str:
        write(PACKAGE | {name: source})
        return code_version("mine.gate")

    first = version("mine.scale", FUNCTION)
    assert first == version("mine.scale", FUNCTION) == version("mine.scale", REWORDED)
    others = {version("mine.scale", FUNCTION.replace(*words)) for words in (("2 *", "3 *"), ("x < 0:", "x < 1:"))}
    others |= {version("mine.gate", PACKAGE["mine.gate"].replace("+", "-")), version("mine.plain", "ONE = 2\n")}
    assert len(others | {first, version("beside", "K = 1\n")}) == 6


@pytest.mark.parametrize("name", ["sgsc_core.definition", "sgsc_study.gates", "sgsc_study.data", "sgsc_study.runs"])
def test_the_engines_version_covers_every_module_that_training_uses(monkeypatch, name):
    first, spec = code_version("sgsc_study.engine"), sys.modules[name].__spec__
    monkeypatch.setattr(spec, "sgsc_source", spec.sgsc_source + "\nmore = 1\n")
    assert code_version("sgsc_study.engine") != first


def test_an_edited_file_counts_once_it_is_loaded_again_and_a_notebook_with_each_cell(write, tmp_path):
    module = write({"beside": "K = 1\n"})
    versions = [code_version("beside")]
    (tmp_path / "beside.py").write_text("K = 12\n")
    assert code_version("beside") == versions[0]
    versions.append(importlib.reload(module) and code_version("beside"))
    for cells in (["K = 2"], ["K = 2", "K = 3"], ["K = 2", "from . import none"], ["K = 2", "this is no Python"]):
        module.In = cells
        versions.append(code_version("beside"))
    assert len(set(versions)) == 6


GATE = "from functools import lru_cache\nK = 2\n@lru_cache\ndef table(gamma):\n    return K * gamma\n"
GATE += "def gate(sign, *, batch_size, gamma):\n    return sign * table(1.0)\n"
TWO = "def f(x): return x\nfirst = f\ndef f(x): return 2 * x\n"


HOLDING = [
    lambda by: lambda sign: by * sign,
    lambda by: lambda sign, by=by: by * sign,
    lambda by: wraps(sign_gate)(lambda sign: by * sign),
    lambda by: MethodType(lambda by, sign: by * sign, by),
]


@pytest.mark.parametrize("make", HOLDING, ids=["closure", "default", "decorator", "method"])
def test_functions_that_hold_other_values_have_other_versions(make):
    assert function_version(make(2)) == function_version(make(2)) != function_version(make(3))


def test_each_function_has_one_version_of_its_own_and_a_gate_another_when_what_it_calls_changes(write):
    one_line = [lambda sign: sign * 1, lambda sign: sign * 2]
    another, two = (lambda sign: sign * 1), write({"beside": TWO})
    functions = [*one_line, another, two.first, two.f, sign_gate]
    versions = [[function_version(function) for function in functions] for _ in range(2)]
    assert versions[0] == versions[1] and len(set(versions[0])) == len(functions)
    sources = GATE, GATE.replace("K = 2", "# more\nK = 2"), GATE.replace("K *", "K +"), GATE.replace("K = 2", "K = 3")
    first, reworded, *others = (function_version(write({"beside": source}).gate) for source in sources)
    assert first == reworded and len({first, *others}) == 3


def test_what_cannot_be_told_has_another_version_at_every_call():
    for function in (partial(max, 1), HOLDING[0](threading.Lock()), HOLDING[0](HOLDING[0](1)), abs, dict):
        assert function_version(function) != function_version(function)
