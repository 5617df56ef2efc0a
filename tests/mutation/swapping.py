"""Puts a fault into functions that live already: no import, no collection of tests again."""

from __future__ import annotations

import ast
import gc
import types
from typing import Any

Functions = list[types.FunctionType]


def living(file: str) -> Functions:
    """Returns all functions of a file, but for those that ``gc.freeze`` has put out of sight."""
    return [
        found
        for found in gc.get_objects()
        if type(found) is types.FunctionType and found.__code__.co_filename == file
    ]


def swap(original: str, mutated: str, module: types.ModuleType, functions: Functions) -> bool:
    """Changes a module's functions and plain assignments to what they are in the mutated source.

    Args:
        original: The source that the module was imported from.
        mutated: The source with a fault.
        module: The module.
        functions: All that are of its file.

    Returns:
        Whether everything that differs could be changed: not so what is computed at the import, as
        a default value.
    """
    file = str(module.__file__)
    old, new = compile(original, file, "exec"), compile(mutated, file, "exec")
    codes = dict(zip(_codes(old), _codes(new), strict=True))
    if any(not _is_function(a) and _plain(a) != _plain(b) for a, b in codes.items()):
        return _assign(original, mutated, module)
    changed = {_place(a): b for a, b in codes.items() if _is_function(a) and _all(a) != _all(b)}
    done = set()
    for function in functions:
        place = _place(function.__code__)
        if place in changed:
            function.__code__ = changed[place]
            done.add(place)
    # What lives within another function is made anew with it.
    return bool(done) and all(place in done or "<locals>" in place[0] for place in changed)


def _assign(original: str, mutated: str, module: types.ModuleType) -> bool:
    """Does an assignment to a name of the module, if that is all that differs."""
    pairs = zip(ast.parse(original).body, ast.parse(mutated).body, strict=True)
    differing = [b for a, b in pairs if ast.dump(a) != ast.dump(b)]
    if len(differing) != 1 or not isinstance(differing[0], ast.Assign):
        return False
    target = differing[0].targets[0]
    if not isinstance(target, ast.Name) or not isinstance(
        getattr(module, target.id), (int, float, str, tuple, dict)
    ):
        return False
    exec(compile(ast.Module([differing[0]], []), "<mutant>", "exec"), module.__dict__)
    return True


def _codes(code: types.CodeType) -> list[types.CodeType]:
    nested = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return [code, *(inner for c in nested for inner in _codes(c))]


def _is_function(code: types.CodeType) -> bool:
    return bool(code.co_flags & 2)  # CO_NEWLOCALS: neither a module nor a class


def _place(code: types.CodeType) -> tuple[str, int]:
    return code.co_qualname, code.co_firstlineno


def _plain(code: types.CodeType) -> tuple[Any, ...]:
    """Returns what a piece of code does, without what is nested in it and the lines it is at."""
    constants = [repr(c) for c in code.co_consts if not isinstance(c, types.CodeType)]
    return code.co_code, constants, code.co_names, code.co_varnames, code.co_freevars


def _all(code: types.CodeType) -> list[tuple[Any, ...]]:
    return [_plain(c) for c in _codes(code)]
