"""The code of a TorchScript archive as a straight line of ATen calls.

TorchScript's serialised code is a small part of Python. It is walked with the module's numbers at hand: what is
known is worked out, a call on tensors becomes a `Step`, and an `if` or a loop must be decided by what is known.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from allocator.errors import FileError
from allocator.io.programs.program import Program, Step, function_of
from allocator.io.programs.torchscript_source import Code, Function, Record, Value, unsupported
from allocator.torch_private import overload_for, schema_of

_MOST_STATEMENTS = 500_000
_DEEPEST = 100  # calls within calls
_LARGEST = 2**62
_DROPPED = ("device", "layout", "pin_memory", "memory_format")  # the defaults serve
_ROOTS = ("torch", "ops", "__torch__", "CONSTANTS")


def straighten(program: Program, top: Record, code: Code) -> None:
    """Fill a program, which holds the module's tensors, with the calls of its forward in eval mode.

    Raises:
        UnsupportedModelError: the forward branches on its input, or does more than call operators.
        UnsafeFileError: an operator does more than compute with tensors.
    """
    walk = _Walk(program, code)
    forward = walk.attribute(top, "forward")
    if not isinstance(forward, Function):
        raise FileError("the archive's module has no forward")
    arguments = forward.body.args.args[1:]
    required = arguments[: len(arguments) - len(forward.body.args.defaults)]
    for argument in required:
        if argument.annotation is None or ast.unparse(argument.annotation) != "Tensor":
            raise unsupported(f"takes {ast.unparse(argument)}, which is not a tensor")
        program.takes.append(f"${argument.arg}")
    given = walk.call(forward, [Value(name, "Tensor") for name in program.takes], {})
    program.gives = list(_outputs(given))
    walk.finish()


def _outputs(given: Any) -> Iterator[str]:
    """The tensors among what a forward gives, in order."""
    if isinstance(given, Value) and given.kind == "Tensor":
        yield given.name
    elif isinstance(given, (list, tuple)):
        for each in given:
            yield from _outputs(each)
    elif isinstance(given, dict):
        yield from _outputs(list(given.values()))
    elif given is not None:
        raise unsupported(f"gives {given!r:.80}, which is not a tensor")


def _both_numbers(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def apply(a: Any, b: Any) -> Any:
        if not isinstance(a, (int, float)) or not isinstance(b, (int, float)):
            raise unsupported(f"works out {function.__name__} of {a!r:.40} and {b!r:.40}")
        return function(a, b)

    return apply


def _add(a: Any, b: Any) -> Any:
    return [*a, *b] if isinstance(a, list) and isinstance(b, list) else _both_numbers(operator.add)(a, b)


_KNOWN: dict[str, Callable[..., Any]] = {
    "__and__": _both_numbers(operator.and_),
    "__contains__": lambda items, item: item in items,
    "__derive_index": lambda index, start, step: start + index * step,
    "__is__": operator.is_,
    "__isnot__": operator.is_not,
    "__not__": operator.not_,
    "__or__": _both_numbers(operator.or_),
    "__range_length": lambda low, high, step: len(range(low, high, step)),
    "add": _add,
    "copy": list,
    "div": _both_numbers(operator.truediv),
    "eq": operator.eq,
    "floordiv": _both_numbers(operator.floordiv),
    "ge": _both_numbers(operator.ge),
    "gt": _both_numbers(operator.gt),
    "le": _both_numbers(operator.le),
    "len": len,
    "lt": _both_numbers(operator.lt),
    "mul": _both_numbers(operator.mul),
    "ne": operator.ne,
    "neg": operator.neg,
    "remainder": _both_numbers(operator.mod),
    "sub": _both_numbers(operator.sub),
}
_COMPUTED = {name: name for name in ("add", "sub", "mul", "floordiv", "neg", "eq", "ne", "ge", "gt", "le", "lt")}
_COMPUTED |= {"floor_divide": "floordiv", "remainder": "mod"}
_NUMBERS = ("int", "float", "number", "bool")
_SAMPLES = {
    "Tensor": torch.empty(1, device="meta"),
    "List[Tensor]": [torch.empty(1, device="meta")],
    "List[int]": [1],
    "float": 1.0,
    "bool": True,
}
_CONVERSIONS: dict[str, Callable[[Any], Any]] = {"int": int, "float": float, "bool": bool}


class _Walk:
    """A forward being followed."""

    def __init__(self, program: Program, code: Code) -> None:
        self.program, self.code = program, code
        self.steps: list[Step] = []
        self.statements = self.depth = self.made = self.undecided = 0

    def finish(self) -> None:
        """Give the program its calls, without those that nothing needs."""
        needed = set(self.program.gives)
        kept = []
        for step in reversed(self.steps):
            made = {step.results} if isinstance(step.results, str) else set(step.results)
            if made & needed or step.target.split(".")[-2].endswith("_"):
                kept.append(step)
                for name in step.names.values():
                    needed.update(name if isinstance(name, list) else [name])
        self.program.aten.extend(reversed(kept))

    # -------------------------------------------------------------------------------------- statements

    def call(self, function: Function, args: Sequence[Any], keywords: dict[str, Any]) -> Any:
        """What a function of the archive gives for these arguments."""
        said = function.body.args
        names = [each.arg for each in said.args]
        scope = {name: self._eval(each, {}) for name, each in zip(names[::-1], said.defaults[::-1])}
        scope |= dict(zip(names, args if function.owner is None else (function.owner, *args))) | keywords
        if set(scope) != set(names):
            raise FileError(f"the archive's code calls {function.body.name} with other arguments than it takes")
        self.depth += 1
        if self.depth > _DEEPEST:
            raise unsupported(f"calls itself, or calls more than {_DEEPEST} functions deep")
        done = self._run(function.body.body, scope)
        self.depth -= 1
        return done[0] if done else None

    def _run(self, statements: Sequence[ast.stmt], scope: dict[str, Any]) -> tuple[Any] | None:
        """Follow statements; what they return, in a tuple, where they do."""
        for each in statements:
            self.statements += 1
            if self.statements > _MOST_STATEMENTS:
                raise unsupported(f"runs more than {_MOST_STATEMENTS:,} statements")
            done = None
            match each:
                case (
                    ast.Assign(targets=[target], value=value) | ast.AnnAssign(target=target, value=ast.expr() as value)
                ):
                    self._bind(target, self._eval(value, scope), scope)
                case ast.Expr(value=value):
                    self._eval(value, scope)
                case ast.Return(value=value):
                    return (self._eval(value, scope) if value is not None else None,)
                case ast.If():
                    done = self._if(each, scope)
                case ast.For(target=target, iter=source, body=body):
                    for item in self._known(source, scope, (list, tuple, range)):
                        self._bind(target, item, scope)
                        done = done or self._run(body, scope)
                case ast.While(test=test, body=body):
                    while done is None and self._known(test, scope, (bool, int)):
                        done = self._run(body, scope)
                case ast.Pass() | ast.AnnAssign():
                    pass
                case _:
                    raise unsupported(f"has the statement `{ast.unparse(each)[:80]}`")
            if done is not None:
                return done
        return None

    def _if(self, node: ast.If, scope: dict[str, Any]) -> tuple[Any] | None:
        """Follow the branch that is taken; where the input decides, neither may do more than decide further.

        Where it decides whether to raise an error, the branch that does not is followed.
        """
        found = self._eval(node.test, scope)
        if not isinstance(found, Value):
            return self._run(node.body if found else node.orelse, scope)
        arms = (node.body, node.orelse)
        going_on = [arm for arm in arms if not any("RaiseException" in ast.unparse(each) for each in arm)]
        if len(going_on) == 1:
            return self._run(going_on[0], scope)
        steps, scopes = len(self.steps), (dict(scope), dict(scope))
        self.undecided += 1
        done = [self._run(arm, each) for arm, each in zip(arms, scopes)]
        self.undecided -= 1
        if any(done) or len(self.steps) > steps:
            raise unsupported(f"branches on its input: `if {ast.unparse(node.test)[:80]}`")
        for name in scopes[0].keys() & scopes[1].keys():
            one, other = scopes[0][name], scopes[1][name]
            same = one is other or (isinstance(one, (int, float, str)) and one == other)
            scope[name] = one if same else Value("", "number")
        return None

    def _known(self, node: ast.expr, scope: dict[str, Any], kinds: tuple[type, ...]) -> Any:
        found = self._eval(node, scope)
        if not isinstance(found, kinds):
            raise unsupported(f"runs a loop on its input: `{ast.unparse(node)[:80]}`")
        return found

    def _bind(self, target: ast.expr, value: Any, scope: dict[str, Any]) -> None:
        match target:
            case ast.Name(id=name):
                scope[name] = value
            case ast.Tuple(elts=targets):
                parts = [self._item(value, i) for i in range(len(targets))]
                for each, part in zip(targets, parts):
                    self._bind(each, part, scope)
            case _:
                raise unsupported(f"changes its own state: `{ast.unparse(target)[:80]}`")

    # -------------------------------------------------------------------------------------- expressions

    def _eval(self, node: ast.expr, scope: dict[str, Any]) -> Any:
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name) if name in scope:
                return scope[name]
            case ast.Name(id="inf" | "nan" as name):
                return float(name)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return self._operator("neg", [self._eval(operand, scope)], {})
            case ast.List(elts=items):
                return [self._eval(each, scope) for each in items]
            case ast.Tuple(elts=items):
                return tuple(self._eval(each, scope) for each in items)
            case ast.Dict(keys=keys, values=values):
                return {self._eval(k, scope): self._eval(v, scope) for k, v in zip(keys, values) if k is not None}
            case ast.Subscript(value=value, slice=index):
                return self._item(self._eval(value, scope), self._eval(index, scope))
            case ast.Attribute(value=value, attr=name):
                dotted = _dotted(node, scope)
                return self._global(dotted) if dotted else self.attribute(self._eval(value, scope), name)
            case ast.Call(func=func, args=args, keywords=keywords):
                named = {each.arg: self._eval(each.value, scope) for each in keywords if each.arg}
                return self._call(func, args, named, scope)
        raise unsupported(f"has the expression `{ast.unparse(node)[:80]}`")

    def _global(self, dotted: str) -> Any:
        root, _, rest = dotted.partition(".")
        if root == "CONSTANTS":
            return self.code.constants[int(rest.removeprefix("c"))]
        found = self.code.find(dotted)
        return Function(found, dotted) if isinstance(found, ast.FunctionDef) else found

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
        found = dict(self.code.members(owner.path)).get(name)
        if isinstance(found, ast.FunctionDef):
            return Function(found, owner.path, owner)
        if isinstance(found, ast.AnnAssign) and found.value is not None:
            return self._eval(found.value, {})
        raise FileError(f"the archive's {owner.path} has no {name}")

    def _item(self, value: Any, index: Any) -> Any:
        """One of several values."""
        if isinstance(value, Value) and value.kind.startswith("List[") and isinstance(index, int):
            return self._step("_operator.getitem", {"a": value, "b": index}, [], value.kind[5:-1])
        if isinstance(value, Value) or isinstance(index, Value):
            raise unsupported(f"takes item {index!r:.40} of {value!r:.40}")
        return value[index]

    def _call(self, func: ast.expr, nodes: list[ast.expr], keywords: dict[str, Any], scope: dict[str, Any]) -> Any:
        dotted = _dotted(func, scope)
        if isinstance(func, ast.Name) and func.id not in scope:
            return self._builtin(func.id, nodes, scope)
        args = [self._eval(each, scope) for each in nodes]
        if dotted is not None and not dotted.startswith("__torch__."):
            return self._operator(dotted, args, keywords)
        found = self._global(dotted) if dotted else self._eval(func, scope)
        if isinstance(found, Function):
            return self.call(found, args, keywords)
        if isinstance(found, ast.ClassDef) and [ast.unparse(base) for base in found.bases] == ["NamedTuple"]:
            return tuple(args)
        raise unsupported(f"calls `{ast.unparse(func)[:80]}`")

    def _builtin(self, name: str, nodes: list[ast.expr], scope: dict[str, Any]) -> Any:
        if name in ("annotate", "unchecked_cast"):
            return self._eval(nodes[1], scope)
        if name == "uninitialized":
            return None
        args = [self._eval(each, scope) for each in nodes]
        if name == "getattr":
            return self.attribute(*args)
        if name == "range" and all(isinstance(each, int) for each in args):
            return range(*args)
        if name in _CONVERSIONS and isinstance(args[0], (bool, int, float, str)):
            return _CONVERSIONS[name](args[0])
        if name in _CONVERSIONS and isinstance(args[0], Value) and args[0].kind in _NUMBERS:
            return args[0]
        raise unsupported(f"makes a number or list of its input: {name}({ast.unparse(nodes[0])[:80] if nodes else ''})")

    # -------------------------------------------------------------------------------------- operators

    def _operator(self, dotted: str, args: list[Any], keywords: dict[str, Any]) -> Any:
        """An operator on what is known is worked out, and else becomes a step."""
        name = dotted.rpartition(".")[2]
        if dotted == "ops.prim.RaiseException":
            raise unsupported(f"raises {args[1:]}")
        if dotted in ("torch.format", "torch.warn"):
            return ""
        if dotted in ("ops.prim.NumToTensor", "torch.device"):
            return args[0]
        if name in ("dim", "len") and isinstance(args[0], Value):
            return Value("", "int")
        if dotted == "ops.prim.dtype":
            return Value("", "dtype")
        if name == "to" and Value("", "dtype") in args[1:]:  # the input is of the weights' type
            return args[0]
        if name in ("__is__", "__isnot__") and isinstance(args[0], Value) and args[1] is None:
            return name == "__isnot__"
        if name == "append" and isinstance(args[0], list) and not self.undecided:
            return args[0].append(args[1])
        if name in _KNOWN and not any(map(_is_computed, [*args, *keywords.values()])):
            return _bounded(_KNOWN[name](*args))
        if name == "rsub":
            name, args = "sub", [args[1], args[0], *args[2:]]
        if name in _KNOWN and any(map(_is_undecided, args)) and not any(map(_is_followed, args)):
            return Value("", "number")
        if name in _COMPUTED and all(map(_is_number, args[:2])) and args[2:] in ([], [1]):
            return self._number(_COMPUTED[name], args[:2])
        if dotted.rpartition(".")[0] not in ("torch", "ops.aten"):
            raise unsupported(f"calls {dotted:.80}, which is no ATen operator")
        if name == "_convolution":  # the same with flags for the choice of a kernel
            return self._aten("convolution", args[:9], keywords)
        return self._aten("sym_size" if name == "size" else name, args, keywords)

    def _number(self, name: str, args: list[Any]) -> Any:
        """Arithmetic on numbers that the input decides, such as its size."""
        if any(map(_is_undecided, args)):
            return Value("", "number")
        args = [each.item() if isinstance(each, torch.Tensor) else each for each in args]
        return self._step(f"_operator.{name}", dict(zip("ab", args)), [], "int")

    def _aten(self, name: str, args: list[Any], keywords: dict[str, Any]) -> Any:
        keywords = {key: value for key, value in keywords.items() if key not in _DROPPED}
        samples = [_sample(each) for each in args]
        named = {key: _sample(each) for key, each in keywords.items()}
        try:
            overload = overload_for(name, samples, named)
        except RuntimeError as error:
            raise unsupported(f"calls torch.{name:.80} in a way that this torch does not know") from error
        target = f"torch.ops.aten.{name}.{overload}"
        function_of(target)
        schema = schema_of(getattr(getattr(torch.ops.aten, name), overload))
        given = {schema.arguments[i].name: value for i, value in enumerate(args)} | keywords
        if given.get("train") is True or (name == "batch_norm" and given.get("training") is True):
            raise unsupported("was traced in training mode (call .eval() before torch.jit.trace)")
        kinds = [str(each.type) for each in schema.returns]
        if len(kinds) == 1:
            return self._step(target, given, list(keywords), kinds[0])
        return self._step(target, given, list(keywords), tuple(kinds))

    def _step(self, target: str, given: dict[str, Any], keywords: list[str], kind: str | tuple[str, ...]) -> Any:
        """A call in the program; what it gives."""
        names = [self._fresh() for _ in kind] if isinstance(kind, tuple) else self._fresh()
        step = Step(target, names)
        step.keywords = keywords
        for name, value in given.items():
            step.order.append(name)
            if _is_computed(value):
                step.names[name] = (
                    [self._name(each) for each in value] if isinstance(value, (list, tuple)) else self._name(value)
                )
            else:
                setattr(step, f"arg_{name}", list(value) if isinstance(value, tuple) else value)
        self.steps.append(step)
        if isinstance(kind, tuple):
            return tuple(Value(name, each) for name, each in zip(names, kind))
        return Value(str(names), kind)

    def _fresh(self) -> str:
        self.made += 1
        return f"#{self.made}"

    def _name(self, value: Any) -> Any:
        """How a step refers to a value: by its name where it is computed."""
        if isinstance(value, torch.Tensor):
            number = next(i for i, each in enumerate(self.code.constants) if each is value)
            if f"%constants.c{number}" not in self.program.held:
                self.program.hold(f"%constants.c{number}", f"constants.c{number}", value, persistent=False)
            return f"%constants.c{number}"
        if isinstance(value, Value) and not value.name:
            raise unsupported("computes with its input's number of dims")
        return value.name if isinstance(value, Value) else value


def _dotted(node: ast.expr, scope: dict[str, Any]) -> str | None:
    """The whole name of something global, such as ``torch.add``."""
    if isinstance(node, ast.Attribute):
        owner = _dotted(node.value, scope)
        return f"{owner}.{node.attr}" if owner else None
    return node.id if isinstance(node, ast.Name) and node.id in _ROOTS and node.id not in scope else None


def _is_computed(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_is_computed, value))
    return isinstance(value, (Value, torch.Tensor))


def _is_undecided(value: Any) -> bool:
    return isinstance(value, Value) and not value.name


def _is_followed(value: Any) -> bool:
    """Whether this is a tensor, or a list, that the forward computes."""
    return isinstance(value, Value) and bool(value.name) and value.kind not in _NUMBERS


def _is_number(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.dim() == 0
    return value.kind in _NUMBERS if isinstance(value, Value) else isinstance(value, (int, float))


def _bounded(value: Any) -> Any:
    """A number or list that was worked out; a file may ask for huge ones."""
    if (isinstance(value, int) and abs(value) > _LARGEST) or (isinstance(value, list) and len(value) > 10_000):
        raise unsupported("works out a number or a list beyond all bounds")
    return value


def _sample(value: Any) -> Any:
    """A value of the same kind, to choose an operator's overload by."""
    if isinstance(value, (list, tuple)):
        return [_sample(each) for each in value]
    return _SAMPLES.get(value.kind, 1) if isinstance(value, Value) else value
