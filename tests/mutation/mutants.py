"""Small faults put into a source file, one at a time."""

from __future__ import annotations

import ast
import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

_SWAPPED = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt},
    **{ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is},
    **{ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult},
    **{ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult},
    **{ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitAnd},
    **{ast.LShift: ast.RShift, ast.RShift: ast.LShift},
}
# Calls of these methods are left out: x.detach() becomes x.
_DROPPED = {
    *("detach", "to", "float", "double", "clamp", "contiguous", "clone", "flatten", "reshape"),
    *("resolve_neg", "sqrt", "square", "abs", "mean", "sum", "zero_", "fill_diagonal_", "sign"),
    *("resolve", "lower", "strip", "copy", "sort"),
}


class Mutant(NamedTuple):
    """One fault.

    Attributes:
        key: The function and line it is in, what it does, and its number among equal ones; no line
            numbers, so that it outlives changes elsewhere in the file.
        first: The first line changed.
        last: The last one.
        source: The whole file with the fault.
    """

    key: str
    first: int
    last: int
    source: str


def mutants(source: str) -> Iterator[Mutant]:
    """Yields every fault for a file; texts of errors, annotations and decorators are left alone.

    Examples:
        >>> for mutant in mutants("def f(x):\\n    return x + 1"):
        ...     print(mutant.key)
        f: return x + 1 | x + 1 -> x - 1
        f: return x + 1 | 1 -> 2
    """
    data, starts = source.encode(), [0]
    for line in data.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    seen: Counter[str] = Counter()
    for place, node, new in _faults(ast.parse(source), ()):
        start = starts[node.lineno - 1] + node.col_offset
        stop = starts[node.end_lineno - 1] + node.end_col_offset
        text = ast.unparse(ast.fix_missing_locations(new))
        said, done = (" ".join(t.split()) for t in (data[start:stop].decode(), text))
        line = source.splitlines()[node.lineno - 1].strip()
        key = f"{'.'.join(place) or '<module>'}: {line} | {said} -> {done}"
        seen[key] += 1
        if seen[key] > 1:
            key = f"{key} [{seen[key]}]"
        text = text if isinstance(node, ast.stmt) else f"({text})"
        mutated = (data[:start] + text.encode() + data[stop:]).decode()
        yield Mutant(key, node.lineno, node.end_lineno, mutated)


def _faults(
    node: ast.AST, place: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Any, ast.AST]]:
    """Yields the function, the node to be replaced and what replaces it."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        place = (*place, node.name)
    for old, new in _variants(node):
        yield place, old, new
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "bases"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not _is_left_alone(child, place):
                yield from _faults(child, place)


def _is_left_alone(node: ast.AST, place: tuple[str, ...]) -> bool:
    """Tells whether a node is a text for people or a type."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True
    if isinstance(node, ast.JoinedStr):  # its parts have no positions before Python 3.12
        return True
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.func.id in ("TypeVar", "cast"):
            return True
        if node.func.id.endswith("Error"):
            return True
    if isinstance(node, ast.Assign) and not place:
        target = node.targets[0]
        types = any(
            isinstance(n, ast.BinOp) and isinstance(n.op, ast.BitOr) for n in ast.walk(node)
        )
        return types or (isinstance(target, ast.Name) and target.id == "__all__")
    return isinstance(node, ast.Subscript) and getattr(node.value, "id", "") == "Literal"


def _variants(node: Any) -> Iterator[tuple[ast.AST, ast.AST]]:
    def changed(**fields: object) -> tuple[ast.AST, ast.AST]:
        new = copy.copy(node)
        for name, value in fields.items():
            setattr(new, name, value)
        return node, new

    if isinstance(node, (ast.If, ast.IfExp, ast.While, ast.comprehension)):
        for test in node.ifs if isinstance(node, ast.comprehension) else [node.test]:
            # Comparisons and negations are turned round by themselves.
            negation = isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)
            if not negation and not (isinstance(test, ast.Compare) and len(test.ops) == 1):
                yield test, ast.UnaryOp(ast.Not(), test)
    elif isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            yield changed(ops=[*node.ops[:i], _SWAPPED[type(op)](), *node.ops[i + 1 :]])
    elif isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign)) and type(node.op) in _SWAPPED:
        yield changed(op=_SWAPPED[type(node.op)]())
    elif isinstance(node, ast.UnaryOp):
        yield node, node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float, str)):
        yield node, ast.Constant(_other(node.value))
    elif isinstance(node, ast.Call):
        method = (
            isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") != "torch"
        )
        if method and node.func.attr in _DROPPED:
            yield node, node.func.value
        for i, keyword in enumerate(node.keywords):
            if keyword.arg:
                yield changed(keywords=[*node.keywords[:i], *node.keywords[i + 1 :]])
    elif isinstance(node, ast.Raise) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ):
        yield node, ast.Pass()
    elif isinstance(node, (ast.Break, ast.Continue)):
        yield node, ast.Continue() if isinstance(node, ast.Break) else ast.Break()


def _other(value: float | str) -> float | str:
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return value + "XX"
    if isinstance(value, int):
        return value + 1
    return 2 * value if value else 1.0
