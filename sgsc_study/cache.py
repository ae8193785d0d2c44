"""Where trained runs are kept, and under which key: the code that computes them, their settings and their data."""

import ast
import hashlib
import importlib.util
import inspect
import os
import re
import sys
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from pickle import PicklingError
from typing import Any

import joblib

ROOT = Path(__file__).resolve().parents[1]
CACHE = Path(os.environ.get("SGSC_CACHE", ROOT / ".cache"))  # of trained runs and of searches; safe to delete
OWN = ("sgsc_lib", "sgsc_core", "sgsc_study")


class _Meaning(ast.NodeTransformer):
    """Leave out of a syntax tree what no result depends on: docstrings and the words of errors."""

    def _body(self, node: Any) -> Any:
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        return self.generic_visit(node)

    visit_Module = visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = _body

    def visit_Raise(self, _: ast.Raise) -> ast.Raise:
        return ast.Raise()


def _source(module: str) -> str:
    """A module's source when it was loaded; of a notebook, all that it has run; else a text that no other call gives.

    It is read once, and kept where a reload forgets it: a file that was edited since is not what runs.
    """
    loaded: Any = sys.modules.get(module)
    if ran := getattr(loaded, "In", None):
        return "\n".join(ran)
    spec: Any = loaded.__spec__ if loaded else importlib.util.find_spec(module)
    path, keeper = (spec.origin, spec) if spec else (getattr(loaded, "__file__", ""), loaded)
    if not str(path).endswith(".py"):
        return uuid.uuid4().hex
    if not hasattr(keeper, "sgsc_source"):
        keeper.sgsc_source = Path(path).read_text(encoding="utf-8")
    return keeper.sgsc_source


def _counts(name: str, importer: str) -> bool:
    """Whether `name` is a module whose code is its importer's too: of this project, of one package, not installed.

    sgsc_core.checks is not: it refuses, and makes no result.
    """
    root = name.partition(".")[0]
    if root in sys.stdlib_module_names or name.startswith("sgsc_core.checks"):
        return False
    with suppress(ImportError, ValueError, AttributeError):  # it is something in a module, or it is missing
        home: Any = importlib.util.find_spec(root)
        installed = re.search(r"(site|dist)-packages", f"{home.origin} {home.submodule_search_locations}")
        if not installed or root in (*OWN, importer.partition(".")[0]):
            found: Any = importlib.util.find_spec(name)
            return found.origin.endswith(".py")
    return False


@lru_cache(maxsize=256)
def _meaning(source: str, module: str) -> tuple[str, list[str]]:
    """What a module's source computes, as text, and which other modules' code counts with it."""
    names, package = [], getattr(sys.modules.get(module), "__package__", "") or module.rpartition(".")[0]
    try:
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
                names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    except (SyntaxError, ImportError):  # a notebook's cell that failed
        return uuid.uuid4().hex, []
    return ast.unparse(_Meaning().visit(tree)), [name for name in names if _counts(name, module)]


def code_version(*modules: str) -> str:
    """SHA-256 of what modules compute: their code, and that of what they import and is not installed beside Python.

    Comments, docstrings, layout and the words of errors are left out, so that rewording them keeps the cache.

    >>> code_version("sgsc_study.data") != code_version("sgsc_study.engine")
    True
    """
    pending, meanings = list(modules), {}
    while pending:
        if (module := pending.pop()) not in meanings:
            meanings[module], imported = _meaning(_source(module), module)
            pending += imported
    return hashlib.sha256(repr(sorted(meanings.items())).encode()).hexdigest()


def function_version(function: Callable) -> str:
    """SHA-256 of what a function computes: the `code_version` of its module, its place there, and the values it holds.

    It holds those of its closure and its defaults. What can't be told so, as where a decorator holds something, has
    another version at every call, and nothing is read from the cache for it.

    >>> def scaled(by):
    ...     return lambda value: by * value
    >>> function_version(scaled(2)) == function_version(scaled(3))
    False
    """
    bare: Any = function if hasattr(function, "__code__") else inspect.unwrap(function)  # an lru_cache has none
    try:
        home, code = bare.__globals__["__name__"], bare.__code__
        named = getattr(sys.modules[home], code.co_name, None) in (function, bare)
        place = code.co_name if named else [Path(code.co_filename).name, *code.co_positions()]  # a lambda, say
        cells = [cell.cell_contents for cell in bare.__closure__ or ()]
        given = joblib.hash([cells, bare.__defaults__, bare.__kwdefaults__, getattr(bare, "__self__", None)])
        return hashlib.sha256(repr([code_version(home), place, given]).encode()).hexdigest()
    except (AttributeError, ImportError, KeyError, PicklingError, TypeError, ValueError):
        return uuid.uuid4().hex


def cached(folder: str | os.PathLike, key: str, compute: Callable[[], Any]) -> Any:
    """Return what `compute` returns, read from `folder` where the same `key` was computed before.

    `key` has to say all that it depends on: code (`code_version`), data, settings. An entry is compressed, whose
    checksum tells a damaged one, which is computed again.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     first = cached(folder, "two zeros", lambda: [0, 0])
    ...     cached(folder, "two zeros", lambda: [1, 1])  # not called
    [0, 0]
    """
    os.makedirs(folder, mode=0o700, exist_ok=True)
    return joblib.Memory(folder, verbose=0, compress=True).cache(_entry, ignore=["compute"])(key, compute)


def _entry(key: str, compute: Callable[[], Any]) -> Any:
    return compute()
