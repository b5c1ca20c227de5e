"""What a TorchScript archive is made of: modules as records, and its source as syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from allocator.errors import FileError, UnsupportedModelError


class Record:
    """A module of the archive.

    Attributes:
        path: the qualified name of its class.
        fields: its attributes.
        values: the names in the program of those that are tensors.
    """

    path = ""
    fields: dict[str, Any]
    values: dict[str, str]

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise unsupported(f"restores {self.path} by code of its own")
        self.fields, self.values = state, {}


@dataclass(frozen=True)
class Value:
    """What a forward computes.

    Attributes:
        name: in the program; "" for a number that only decides something, and is not followed.
        kind: its type in the operator's schema, such as "Tensor", "List[Tensor]" or "int".
    """

    name: str
    kind: str


@dataclass(frozen=True)
class Function:
    """A function of the archive, or a method of a record."""

    body: ast.FunctionDef
    home: str
    owner: Record | None = None


@dataclass
class Code:
    """The archive's source files.

    Attributes:
        parse: the syntax tree of a file under ``code/``.
        constants: tensors that the code refers to by number.
    """

    parse: Callable[[str], ast.Module]
    constants: Sequence[Any] = ()
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    def find(self, path: str) -> Any:
        """The class or function of a qualified name.

        Raises:
            FileError: there is none.
        """
        home, _, name = path.rpartition(".")
        if home not in self.files:
            tree = self.parse(home.replace(".", "/") + ".py")
            self.files[home] = {
                each.name: each for each in tree.body if isinstance(each, (ast.ClassDef, ast.FunctionDef))
            }
        if name not in self.files[home]:
            raise FileError(f"the archive's code has no {path:.200}")
        return self.files[home][name]

    def record_class(self, path: str) -> type[Record]:
        """A class for the records of one class of the archive.

        Raises:
            UnsupportedModelError: it is made of something else than attributes.
        """
        bases = [ast.unparse(base) for base in self.find(path).bases]
        if bases != ["Module"]:
            raise unsupported(f"holds {path}, which is no module but {', '.join(bases) or 'an object'}")
        return type(path.rpartition(".")[2], (Record,), {"path": path})

    def members(self, path: str) -> Iterator[tuple[str, ast.AST]]:
        """(name, value or function) of what a class defines."""
        for each in self.find(path).body:
            if isinstance(each, ast.FunctionDef):
                yield each.name, each
            elif isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
                yield each.target.id, each
            elif isinstance(each, ast.Assign) and isinstance(each.targets[0], ast.Name):
                yield each.targets[0].id, each.value

    def listed(self, path: str, name: str) -> list[str]:
        """A class's list of names, such as ``__parameters__``."""
        found = dict(self.members(path)).get(name)
        return list(ast.literal_eval(found)) if isinstance(found, ast.List) else []


def unsupported(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the TorchScript program {what}: give the Python model it was made from (a pickled module, or a state_dict "
        "with an architecture name)"
    )
