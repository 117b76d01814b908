"""Runs one small program in a process of its own; see `programs`. Standard library alone, and numpy where the program names it.

Reads JSON from standard input, {"program", "seconds", "megabytes"}, and writes {"answer"} or {"error"}.
"""

from __future__ import annotations

import ast
import builtins
import json
import sys
from typing import Any

STATEMENTS = (ast.Assign, ast.AugAssign, ast.Expr, ast.If, ast.For, ast.While, ast.Pass, ast.Break, ast.Continue)
EXPRESSIONS = (
    *(ast.Constant, ast.Name, ast.List, ast.Tuple, ast.Dict, ast.Set, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Call),
    *(ast.IfExp, ast.Subscript, ast.Slice, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Lambda, ast.Attribute),
)
PARTS = (
    *(ast.Module, ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context, ast.keyword, ast.comprehension),
    *(ast.arguments, ast.arg),
)
FUNCTIONS = (
    *("abs", "all", "any", "bool", "dict", "enumerate", "filter", "float", "int", "len", "list", "map", "max", "min", "range"),
    *("reversed", "round", "set", "sorted", "str", "sum", "tuple", "zip"),
)
NUMPY = (
    *("abs", "absolute", "add", "all", "any", "arange", "argmax", "argmin", "argsort", "array", "average", "ceil", "concatenate"),
    *("count_nonzero", "cumsum", "diff", "divide", "equal", "floor", "greater", "greater_equal", "inf", "isclose", "less"),
    *("less_equal", "logical_and", "logical_not", "logical_or", "max", "maximum", "mean", "median", "min", "minimum", "multiply"),
    *("nan", "nonzero", "prod", "round", "sort", "sqrt", "std", "subtract", "sum", "unique", "var", "where"),
)
METHODS = (
    *("all", "any", "append", "argmax", "argmin", "argsort", "astype", "count", "endswith", "extend", "index", "items", "keys"),
    *("lower", "max", "mean", "min", "pop", "replace", "round", "shape", "size", "sort", "split", "startswith", "std", "strip"),
    *("sum", "tolist", "upper", "values"),
)


def check(program: str) -> ast.Module:
    """The parsed program; ValueError with a sentence where it does what no calculation needs."""
    try:
        tree = ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"it is no program: {error}") from error
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            raise ValueError("it imports something; programs have numpy as np and nothing else")
        if not isinstance(node, (*STATEMENTS, *EXPRESSIONS, *PARTS)):
            raise ValueError(f"it has a {type(node).__name__}, which calculations do without")
        if isinstance(node, ast.Name) and node.id.startswith("_"):
            raise ValueError(f"it uses the name {node.id!r}")
        if isinstance(node, ast.Attribute) and node.attr not in {*NUMPY, *METHODS}:
            raise ValueError(f"it uses the attribute {node.attr!r}, which calculations do without")
    return tree


def limit(seconds: float, megabytes: int) -> None:
    """Bound time and memory, and write to no file, where the system can."""
    try:
        import resource
    except ImportError:  # not on Windows: there the caller's clock alone ends a program
        return
    whole = max(1, int(seconds) + 1)
    resource.setrlimit(resource.RLIMIT_CPU, (whole, whole))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    if sys.platform == "linux":
        with open("/proc/self/statm") as stream:
            used = int(stream.read().split()[0]) * resource.getpagesize()
        most = used + megabytes * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def run(program: str, seconds: float, megabytes: int) -> str:
    tree = check(program)
    names: dict[str, Any] = {name: getattr(builtins, name) for name in FUNCTIONS}
    if any(isinstance(node, ast.Name) and node.id in ("np", "numpy") for node in ast.walk(tree)):
        import types

        import numpy

        names["np"] = names["numpy"] = types.SimpleNamespace(**{name: getattr(numpy, name) for name in NUMPY})
    limit(seconds, megabytes)
    space: dict[str, Any] = {"__builtins__": {}, **names}
    exec(compile(tree, "program", "exec"), space)
    if "Answer" not in space:
        raise ValueError("it sets no variable Answer")
    return said(space["Answer"])


def said(answer: Any) -> str:
    """An answer as text: lists of one as their element, longer ones as "a, b and c", truth as Yes or No."""
    if hasattr(answer, "tolist"):
        answer = answer.tolist()
    if isinstance(answer, tuple):
        answer = list(answer)
    if isinstance(answer, list):
        parts = [said(part) for part in answer]
        if not parts:
            raise ValueError("its Answer is empty")
        return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    if isinstance(answer, bool):
        return "Yes" if answer else "No"
    if not isinstance(answer, int | float | str):
        raise ValueError(f"its Answer is a {type(answer).__name__}")
    return str(answer)


def main() -> None:
    asked = json.loads(sys.stdin.read())
    try:
        found = {"answer": run(asked["program"], asked["seconds"], asked["megabytes"])}
    except MemoryError:
        found = {"error": f"it needs more than {asked['megabytes']} MB"}
    except Exception as error:  # whatever a program does wrong is its error
        found = {"error": str(error) or type(error).__name__}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
