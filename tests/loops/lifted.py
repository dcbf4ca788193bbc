"""Functions of an installed package, without importing what its module imports.

Trainers import their engines (vLLM, DeepSpeed, flash-attention) with the module that has
their advantages, and those need a GPU. The definitions wanted are taken from the file as
they are and run by themselves.
"""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from typing import Any


def lift(package: str, file: str, *wanted: str, **given: Any) -> dict[str, Any]:
    """Return top-level definitions of a package's file, by name.

    Args:
        package: an installed top-level package, which is not imported.
        file: path within it.
        wanted: functions and classes.
        given: what they use of their module.
    """
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} is not installed"
    assert spec.submodule_search_locations is not None
    path = Path(next(iter(spec.submodule_search_locations))) / file
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in wanted
    ]
    assert {node.name for node in found} == set(wanted), f"{path} has not all of {wanted}"
    for node in found:
        # Registers, which are their module's.
        node.decorator_list = []
    future = ast.parse("from __future__ import annotations").body
    names: dict[str, Any] = dict(given)
    exec(compile(ast.Module([*future, *found], []), str(path), "exec"), names)
    return {name: names[name] for name in wanted}
