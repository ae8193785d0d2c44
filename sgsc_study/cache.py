"""Where trained runs are kept, and under which key: the code that computes them, their settings and their data."""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from pickle import PicklingError
from typing import Any

import joblib

ROOT = Path(__file__).resolve().parents[1]
CACHE = Path(os.environ.get("SGSC_CACHE", ROOT / ".cache"))  # of trained runs and of searches; safe to delete
OWN = ("sgsc_lib", "sgsc_checks", "sgsc_study")


class _Meaning(ast.NodeTransformer):
    """Leave out of a syntax tree what no result depends on: docstrings and the words of errors."""

    def _body(self, node: Any) -> Any:
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        return self.generic_visit(node)

    visit_Module = visit_FunctionDef = visit_ClassDef = _body

    def visit_Raise(self, _: ast.Raise) -> ast.Raise:
        return ast.Raise()


def _source(module: str) -> str:
    """A module's source; of a notebook, all that it has run; of what has none, a text that no other call gives."""
    loaded = sys.modules.get(module) or importlib.import_module(module)
    if ran := getattr(loaded, "In", None):
        return "\n".join(ran)
    path = getattr(loaded, "__file__", None)
    return Path(path).read_text(encoding="utf-8") if path and path.endswith(".py") else uuid.uuid4().hex


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def code_version(*modules: str) -> str:
    """SHA-256 of what modules compute: their code, and that of the modules of this project which they import.

    Comments, docstrings, layout and the words of errors are left out, so that rewording them keeps the cache.

    >>> code_version("sgsc_study.data") != code_version("sgsc_study.engine")
    True
    """
    pending, meanings = list(modules), {}
    while pending:
        if (module := pending.pop()) in meanings:
            continue
        source = _source(module)
        try:
            tree = ast.parse(source)
        except SyntaxError:  # a notebook's cell that failed
            meanings[module] = source
            continue
        pending += [name for name in _imported(tree) if name.split(".")[0] in (*OWN, module.split(".")[0])]
        meanings[module] = ast.unparse(_Meaning().visit(tree))
    return hashlib.sha256(repr(sorted(meanings.items())).encode()).hexdigest()


def function_version(function: Callable) -> str:
    """SHA-256 of what a function computes: its module's `code_version`, its place there, its closure and defaults.

    What can't be told so has another one at every call, and nothing is read from the cache for it.

    >>> def scaled(by):
    ...     return lambda value: by * value
    >>> function_version(scaled(2)) == function_version(scaled(3))
    False
    """
    bare: Any = inspect.unwrap(function)
    try:
        cells = [cell.cell_contents for cell in bare.__closure__ or ()]
        place = [bare.__qualname__, *next(bare.__code__.co_positions())]
        given = joblib.hash([cells, bare.__defaults__, bare.__kwdefaults__])
    except (AttributeError, PicklingError):  # an object that is called, or a closure over what can't be compared
        return uuid.uuid4().hex
    return hashlib.sha256(repr([code_version(bare.__module__), place, given]).encode()).hexdigest()


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
