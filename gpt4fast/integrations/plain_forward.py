"""Which forwards torch.fx may trace: those whose every statement the trace keeps.

A trace records the operations on tensors and nothing else. It would lose a ``with torch.no_grad():`` and a ``print``,
and keep for good one branch of ``if skip is None:`` and the one noise that ``torch.randn(8)`` drew. So a forward is
read first, and taken only if it has nothing but plain statements. What they branch on are attributes of the module,
whose values are noted down.
"""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import textwrap
from types import CodeType, FunctionType, ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Plain = int | float | bool | str | tuple | None

_NODES = (
    ast.Assign, ast.AugAssign, ast.Return, ast.Expr, ast.Pass, ast.For, ast.If, ast.Name, ast.Attribute, ast.Call,
    ast.keyword, ast.Constant, ast.BinOp, ast.UnaryOp, ast.Tuple, ast.List, ast.Subscript, ast.Slice, ast.Starred,
    ast.operator, ast.unaryop, ast.expr_context,
)  # fmt: skip
_IN_CONDITIONS = (ast.BoolOp, ast.boolop, ast.Compare, ast.cmpop)
_BUILTINS = ("range", "enumerate", "zip", "len", "reversed")


class NotPlain(Exception):
    """Why a forward can't be traced."""


class PlainForward(ast.NodeVisitor):
    """The forward of a module, read.

    ``arguments`` are those without a default. ``read`` has what was noted down of attributes (``noted``): of those with
    plain values, and of all that decide which branch is taken, where ``flags`` names the plain ones.

    Raises:
        NotPlain: it can't be traced; the message says why.
    """

    def __init__(self, module: nn.Module) -> None:
        function = type(module).forward
        if not isinstance(function, FunctionType) or hasattr(function, "__wrapped__"):
            raise NotPlain("it is decorated")
        definition = _definition(function)
        if definition.decorator_list or function.__closure__:
            raise NotPlain("it is decorated, or uses super() or variables of an outer function")
        arguments = definition.args
        if arguments.vararg or arguments.kwarg or arguments.kwonlyargs or arguments.posonlyargs:
            raise NotPlain("it takes *args, **kwargs, or arguments by position or by name only")
        self.read: dict[str, Plain] = {}
        self.flags: set[str] = set()
        names = [argument.arg for argument in arguments.args]
        self.arguments = names[1 : len(names) - len(arguments.defaults)]
        self._module, self._globals, self._self = module, function.__globals__, names[0]
        self._locals = {n.id for n in ast.walk(definition) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        self._locals |= set(names[1:])
        self._in_condition = False
        for statement in definition.body:
            self.visit(statement)

    def generic_visit(self, node: ast.AST) -> None:
        if not isinstance(node, _NODES + (_IN_CONDITIONS if self._in_condition else ())):
            raise NotPlain(f"{type(node).__name__} in line {getattr(node, 'lineno', '?')} of it")
        super().generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            _check_target(target)
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        _check_target(node.target)
        self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        _check_target(node.target)
        self._visit_condition(node.iter)
        for statement in (*node.body, *node.orelse):
            self.visit(statement)

    def visit_If(self, node: ast.If) -> None:
        """Only the branch that is taken now."""
        self._visit_condition(node.test)
        names = {n.attr for n in ast.walk(node.test) if isinstance(n, ast.Attribute)}
        self.flags |= {name for name in names if _is_plain(flag := getattr(self._module, name)) and flag is not None}
        condition = compile(ast.Expression(node.test), "<condition>", "eval")
        for statement in node.body if eval(condition, {self._self: self._module}) else node.orelse:
            self.visit(statement)

    def _visit_condition(self, node: ast.expr) -> None:
        """What statements depend on: nothing but attributes and constants."""
        self._in_condition = True
        self.visit(node)
        self._in_condition = False

    def visit_Name(self, node: ast.Name) -> None:
        if node.id in self._locals and not self._in_condition:
            return
        if node.id in _BUILTINS and node.id not in self._globals:
            return
        value = self._globals.get(node.id, self)
        if self._in_condition or not (_is_plain(value) or _is_recorded(value)):
            raise NotPlain(f"{node.id!r} in line {node.lineno} of it")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """``self.name``, ``F.name`` or ``torch.name``, or a method or property of a tensor."""
        library = self._library(node.value)
        if isinstance(node.value, ast.Name) and node.value.id == self._self:
            self._read(node.attr)
        elif library is not None:
            if not _is_recorded(getattr(library, node.attr, None)):
                raise NotPlain(f"{library.__name__}.{node.attr} in line {node.lineno} of it")
        elif hasattr(Tensor, node.attr):
            self.visit(node.value)
        else:
            raise NotPlain(f".{node.attr} in line {node.lineno} of it")

    def _library(self, node: ast.expr) -> ModuleType | None:
        """The Python module of torch that an expression names: ``torch``, ``F``, ``nn.functional``."""
        if isinstance(node, ast.Name) and node.id not in self._locals:
            value = self._globals.get(node.id)
        elif isinstance(node, ast.Attribute) and self._library(node.value) is not None:
            value = getattr(self._library(node.value), node.attr, None)
        else:
            return None
        return value if isinstance(value, ModuleType) and value.__name__.partition(".")[0] == "torch" else None

    def _read(self, name: str) -> None:
        value = getattr(self._module, name, self)
        if value is self or not (_is_plain(value) or isinstance(value, (nn.Module, Tensor))):
            raise NotPlain(f"self.{name} is neither a module nor a tensor nor a plain value")
        if _is_plain(value) or self._in_condition:
            self.read[name] = noted(value)


def _check_target(target: ast.expr) -> None:
    targets = target.elts if isinstance(target, ast.Tuple) else [target]
    if not all(isinstance(t, ast.Name) for t in targets):
        raise NotPlain(f"line {target.lineno} of it writes to more than a variable")


def noted(value: object) -> Plain:
    """What is compared with later values: a plain value, the length of a list of modules, or else the type."""
    if _is_plain(value):
        return value
    return f"{len(value)} modules" if isinstance(value, (nn.ModuleList, nn.Sequential)) else type(value).__name__


def _is_plain(value: object) -> bool:
    if type(value) is tuple:
        return all(map(_is_plain, value))
    return value is None or type(value) in (int, float, bool, str)


def _is_recorded(value: object) -> bool:
    return callable(value) and value in _recorded()


@functools.cache
def _recorded() -> frozenset:
    """Torch's functions of tensors: called on what is traced, they are recorded instead."""
    overridable = torch.overrides.get_overridable_functions()
    return frozenset((*overridable[torch], *overridable[F], F.tanh, F.sigmoid))  # those two call methods


@functools.cache
def _definition(function: FunctionType) -> ast.FunctionDef:
    try:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, SyntaxError):
        raise NotPlain("its source can't be read") from None
    if not isinstance(definition, ast.FunctionDef):
        raise NotPlain("its source can't be read")
    compiled = compile(ast.Module([definition], []), "<forward>", "exec").co_consts
    if not any(isinstance(code, CodeType) and _names(code) == _names(function.__code__) for code in compiled):
        raise NotPlain("its source is not that of its code")  # a file that was edited since
    return definition


def _names(code: CodeType) -> list[object]:
    """What code reads and writes, in order."""
    return [step.argval for step in dis.get_instructions(code) if step.opname.startswith(("LOAD_", "STORE_"))]
