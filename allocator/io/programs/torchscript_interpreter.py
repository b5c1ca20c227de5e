"""The code of a TorchScript archive as a straight line of ATen calls.

TorchScript's serialised code is a small part of Python. It is walked with the module's numbers at hand, and nothing
of it is run: what is known is worked out, a call on tensors becomes a `Step`, and an `if` or a loop must be decided by
what is known. The file decides how long that takes, so everything is counted.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from allocator.errors import FileError
from allocator.io.programs.program import Program
from allocator.io.programs.torchscript_operators import Operators
from allocator.io.programs.torchscript_source import Code, Function, Record, unsupported
from allocator.io.programs.torchscript_values import Effort, Value, is_number, undecided

Scope = dict[str, Any]
"""Local variables of a function."""
Returned = tuple[Any] | None
"""What a statement returns from its function, in a tuple; None where the function goes on."""

_MOST_STATEMENTS = 500_000
_DEEPEST = 100  # calls within calls
_ROOTS = ("torch", "ops", "__torch__", "CONSTANTS")
_CONVERSIONS: dict[str, Callable[[Any], Any]] = {"int": int, "float": float, "bool": bool}


def interpret(program: Program, top: Record, code: Code) -> None:
    """Fill a program, which holds the module's tensors, with the calls of its forward in eval mode.

    Raises:
        UnsupportedModelError: the forward branches on its input, or does more than call operators.
        UnsafeFileError: an operator does more than compute with tensors.
        FileError: the module has no forward, or names what is not there.
    """
    interpreter = _Interpreter(program, code)
    forward = interpreter.attribute(top, "forward")
    if not isinstance(forward, Function):
        raise FileError("the archive's module has no forward")
    arguments = forward.body.args.args[1:]
    required = arguments[: len(arguments) - len(forward.body.args.defaults)]
    for argument in required:
        if argument.annotation is None or ast.unparse(argument.annotation) != "Tensor":
            raise unsupported(f"takes {ast.unparse(argument)}, which is not a tensor")
        program.takes.append(f"${argument.arg}")
    outputs = interpreter.call(forward, [Value(name, "Tensor") for name in program.takes], {})
    interpreter.effort.weigh(outputs)
    program.gives = list(_tensors_of(outputs))
    program.aten.extend(interpreter.needed_steps())


def _tensors_of(outputs: Any) -> Iterator[str]:
    """The tensors among what a forward gives, in order."""
    if isinstance(outputs, Value) and outputs.kind == "Tensor":
        yield outputs.name
    elif isinstance(outputs, (list, tuple)):
        for output in outputs:
            yield from _tensors_of(output)
    elif isinstance(outputs, dict):
        yield from _tensors_of(list(outputs.values()))
    elif outputs is not None:
        raise unsupported(f"gives {outputs!r:.80}, which is not a tensor")


class _Interpreter:
    """A forward being followed."""

    def __init__(self, program: Program, code: Code) -> None:
        self.program, self.code, self.effort = program, code, Effort()
        self.operators = Operators(program, code.constants, self.effort)
        self.statements = self.depth = 0

    def needed_steps(self) -> list[Any]:
        """The calls that the outputs need, and those that change a tensor in place."""
        needed = set(self.program.gives)
        kept = []
        for step in reversed(self.operators.steps):
            results = {step.results} if isinstance(step.results, str) else set(step.results)
            if results & needed or step.target.split(".")[-2].endswith("_"):
                kept.append(step)
                for name in step.names.values():
                    needed.update(name if isinstance(name, list) else [name])
        return kept[::-1]

    def call(self, function: Function, args: Sequence[Any], keywords: dict[str, Any]) -> Any:
        """What a function of the archive gives for these arguments."""
        names = [argument.arg for argument in function.body.args.args]
        defaults = function.body.args.defaults
        given = args if function.owner is None else (function.owner, *args)
        scope: Scope = {}
        for name, default in zip(names[len(names) - len(defaults) :], defaults):
            scope[name] = self._eval(default, {})
        scope |= dict(zip(names, given)) | keywords
        if len(given) > len(names) or set(scope) != set(names):
            raise FileError(f"the archive's code calls {function.body.name} with other arguments than it takes")
        self.depth += 1
        if self.depth > _DEEPEST:
            raise unsupported(f"calls itself, or calls more than {_DEEPEST} functions deep")
        returned = self._run(function.body.body, scope)
        self.depth -= 1
        return returned[0] if returned else None

    def attribute(self, owner: Any, name: str) -> Any:
        """An attribute of a module: a tensor, a number that is the same in every call, a module or a method."""
        if not isinstance(owner, Record):
            raise unsupported(f"reads the attribute {name} of {owner!r:.40}")
        if name == "training":
            return False
        if name in owner.values:
            return Value(owner.values[name], "Tensor")
        if name in owner.fields:
            return owner.fields[name]
        member = self.code.members(owner.path).get(name)
        if isinstance(member, ast.FunctionDef):
            return Function(member, owner.path, owner)
        if isinstance(member, ast.AnnAssign) and member.value is not None:
            return self._eval(member.value, {})
        raise FileError(f"the archive's {owner.path} has no {name}")

    # -------------------------------------------------------------------------------------- statements

    def _run(self, statements: Sequence[ast.stmt], scope: Scope) -> Returned:
        """Follow statements up to the one that returns."""
        for statement in statements:
            self.statements += 1
            if self.statements > _MOST_STATEMENTS:
                raise unsupported(f"runs more than {_MOST_STATEMENTS:,} statements")
            returned = self._follow(statement, scope)
            if returned is not None:
                return returned
        return None

    def _follow(self, statement: ast.stmt, scope: Scope) -> Returned:
        match statement:
            case ast.Assign(targets=[target], value=value) | ast.AnnAssign(target=target, value=ast.expr() as value):
                self._bind(target, self._eval(value, scope), scope)
            case ast.Expr(value=value):
                self._eval(value, scope)
            case ast.Return(value=None):
                return (None,)
            case ast.Return(value=ast.expr() as value):
                return (self._eval(value, scope),)
            case ast.If():
                return self._if(statement, scope)
            case ast.For(target=target, iter=source, body=body):
                return self._for(target, self._known(source, scope, (list, tuple, range)), body, scope)
            case ast.While(test=test, body=body):
                return self._while(test, body, scope)
            case ast.Pass() | ast.AnnAssign():
                pass
            case _:
                raise unsupported(f"has the statement `{ast.unparse(statement)[:80]}`")
        return None

    def _for(self, target: ast.expr, items: Sequence[Any], body: Sequence[ast.stmt], scope: Scope) -> Returned:
        for item in items:
            self._bind(target, item, scope)
            returned = self._run(body, scope)
            if returned is not None:
                return returned
        return None

    def _while(self, test: ast.expr, body: Sequence[ast.stmt], scope: Scope) -> Returned:
        while self._known(test, scope, (bool, int)):
            returned = self._run(body, scope)
            if returned is not None:
                return returned
        return None

    def _if(self, node: ast.If, scope: Scope) -> Returned:
        """Follow the branch that is taken; where the input decides, neither may do more than decide further.

        Where it decides whether to raise an error, the branch that does not is followed.
        """
        test = self._eval(node.test, scope)
        if not isinstance(test, Value):
            return self._run(node.body if test else node.orelse, scope)
        going_on = [branch for branch in (node.body, node.orelse) if not self._raises(branch)]
        if len(going_on) == 1:
            return self._run(going_on[0], scope)
        self._follow_both(node, scope)
        return None

    def _raises(self, branch: Sequence[ast.stmt]) -> bool:
        """Whether a branch raises an error somewhere."""
        for statement in branch:
            for node in ast.walk(statement):
                self.effort.spend()
                if isinstance(node, ast.Attribute) and node.attr == "RaiseException":
                    return True
        return False

    def _follow_both(self, node: ast.If, scope: Scope) -> None:
        """Neither branch may call or return anything; a number that they leave different is undecided."""
        steps = len(self.operators.steps)
        self.effort.spend(2 * len(scope))
        one, other = dict(scope), dict(scope)
        self.operators.branches += 1
        returned = [self._run(node.body, one), self._run(node.orelse, other)]
        self.operators.branches -= 1
        if any(returned) or len(self.operators.steps) > steps:
            raise unsupported(f"branches on its input: `if {ast.unparse(node.test)[:80]}`")
        for name in one.keys() & other.keys():
            a, b = one[name], other[name]
            same = a is b or (isinstance(a, (int, float, str)) and a == b)
            scope[name] = a if same else undecided("number")

    def _known(self, node: ast.expr, scope: Scope, kinds: tuple[type, ...]) -> Any:
        """What a loop goes by."""
        value = self._eval(node, scope)
        if not isinstance(value, kinds):
            raise unsupported(f"runs a loop on its input: `{ast.unparse(node)[:80]}`")
        return value

    def _bind(self, target: ast.expr, value: Any, scope: Scope) -> None:
        match target:
            case ast.Name(id=name):
                scope[name] = value
            case ast.Tuple(elts=targets):
                parts = [self._item(value, i) for i in range(len(targets))]
                for inner, part in zip(targets, parts):
                    self._bind(inner, part, scope)
            case _:
                raise unsupported(f"changes its own state: `{ast.unparse(target)[:80]}`")

    # -------------------------------------------------------------------------------------- expressions

    def _eval(self, node: ast.expr, scope: Scope) -> Any:
        self.effort.spend()
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name) if name in scope:
                return scope[name]
            case ast.Name(id="inf" | "nan" as name):
                return float(name)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return self.operators.call("neg", [self._eval(operand, scope)], {})
            case ast.List(elts=items):
                return [self._eval(item, scope) for item in items]
            case ast.Tuple(elts=items):
                return tuple(self._eval(item, scope) for item in items)
            case ast.Dict(keys=keys, values=values):
                return self._dict(keys, values, scope)
            case ast.Subscript(value=value, slice=index):
                return self._item(self._eval(value, scope), self._eval(index, scope))
            case ast.Attribute(value=value, attr=name):
                dotted = _dotted(node, scope)
                return self._global(dotted) if dotted else self.attribute(self._eval(value, scope), name)
            case ast.Call():
                return self._call(node, scope)
        raise unsupported(f"has the expression `{ast.unparse(node)[:80]}`")

    def _dict(self, keys: Sequence[ast.expr | None], values: Sequence[ast.expr], scope: Scope) -> dict[Any, Any]:
        items = {}
        for key, value in zip(keys, values):
            if key is not None:
                items[self._eval(key, scope)] = self._eval(value, scope)
        return items

    def _global(self, dotted: str) -> Any:
        """A tensor of the code's own, or a class or function of the archive."""
        root, _, name = dotted.partition(".")
        if root == "CONSTANTS":
            return self.code.constants[int(name.removeprefix("c"))]
        definition = self.code.find(dotted)
        return Function(definition, dotted) if isinstance(definition, ast.FunctionDef) else definition

    def _item(self, value: Any, index: Any) -> Any:
        """One of several values."""
        if isinstance(value, Value) and value.kind.startswith("List[") and isinstance(index, int):
            return self.operators.step("_operator.getitem", {"a": value, "b": index}, [], value.kind[5:-1])
        if isinstance(value, Value) or isinstance(index, Value):
            raise unsupported(f"takes item {index!r:.40} of {value!r:.40}")
        return value[index]

    # -------------------------------------------------------------------------------------- calls

    def _call(self, node: ast.Call, scope: Scope) -> Any:
        if isinstance(node.func, ast.Name) and node.func.id not in scope:
            return self._builtin(node.func.id, node.args, scope)
        keywords = {keyword.arg: self._eval(keyword.value, scope) for keyword in node.keywords if keyword.arg}
        args = [self._eval(arg, scope) for arg in node.args]
        dotted = _dotted(node.func, scope)
        if dotted is not None and not dotted.startswith("__torch__."):
            return self.operators.call(dotted, args, keywords)
        called = self._global(dotted) if dotted else self._eval(node.func, scope)
        if isinstance(called, Function):
            return self.call(called, args, keywords)
        if isinstance(called, ast.ClassDef) and [ast.unparse(base) for base in called.bases] == ["NamedTuple"]:
            return tuple(args)
        raise unsupported(f"calls `{ast.unparse(node.func)[:80]}`")

    def _builtin(self, name: str, nodes: Sequence[ast.expr], scope: Scope) -> Any:
        """A call of one of the few functions that TorchScript's code has without a module."""
        if name in ("annotate", "unchecked_cast"):  # (type, value)
            return self._eval(nodes[1], scope)
        if name == "uninitialized":
            return None
        args = [self._eval(node, scope) for node in nodes]
        if name == "getattr":
            return self.attribute(*args)
        if name == "range" and all(isinstance(arg, int) for arg in args):
            return range(*args)
        if name in _CONVERSIONS:
            if isinstance(args[0], (bool, int, float, str)):
                return _CONVERSIONS[name](args[0])
            if isinstance(args[0], Value) and is_number(args[0]):
                return args[0]
        raise unsupported(f"makes a number or list of its input: {name}({ast.unparse(nodes[0])[:80] if nodes else ''})")


def _dotted(node: ast.expr, scope: Scope) -> str | None:
    """The whole name of something global, such as ``torch.add``."""
    if isinstance(node, ast.Attribute):
        owner = _dotted(node.value, scope)
        return f"{owner}.{node.attr}" if owner else None
    return node.id if isinstance(node, ast.Name) and node.id in _ROOTS and node.id not in scope else None
