"""What a TorchScript archive is made of: modules as records, and its source as syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
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
class Function:
    """A function of the archive, or a method of a record."""

    body: ast.FunctionDef
    home: str
    owner: Record | None = None


@dataclass
class Code:
    """The archive's source files, read when something of them is asked for.

    Attributes:
        parse: the syntax tree of a file under ``code/``.
        constants: tensors that the code refers to by number.
    """

    parse: Callable[[str], ast.Module]
    constants: Sequence[Any] = ()
    _files: dict[str, dict[str, Any]] = field(default_factory=dict)
    _members: dict[str, dict[str, ast.AST]] = field(default_factory=dict)
    _classes: dict[str, type[Record]] = field(default_factory=dict)

    def find(self, path: str) -> Any:
        """The class or function of a qualified name.

        Raises:
            FileError: there is none.
        """
        home, _, name = path.rpartition(".")
        if home not in self._files:
            tree = self.parse(home.replace(".", "/") + ".py")
            self._files[home] = {
                node.name: node for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))
            }
        if name not in self._files[home]:
            raise FileError(f"the archive's code has no {path:.200}")
        return self._files[home][name]

    def record_class(self, path: str) -> type[Record]:
        """A class for the records of one class of the archive.

        Raises:
            UnsupportedModelError: it is made of something else than attributes.
        """
        if path not in self._classes:
            bases = [ast.unparse(base) for base in self.find(path).bases]
            if bases != ["Module"]:
                raise unsupported(f"holds {path}, which is no module but {', '.join(bases) or 'an object'}")
            self._classes[path] = type(path.rpartition(".")[2], (Record,), {"path": path})
        return self._classes[path]

    def members(self, path: str) -> dict[str, ast.AST]:
        """What a class defines: by name a function, an annotated value, or the value of a plain assignment."""
        if path not in self._members:
            members: dict[str, ast.AST] = {}
            for node in self.find(path).body:
                if isinstance(node, ast.FunctionDef):
                    members[node.name] = node
                elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    members[node.target.id] = node
                elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    members[node.targets[0].id] = node.value
            self._members[path] = members
        return self._members[path]

    def listed(self, path: str, name: str) -> list[str]:
        """A class's list of names, such as ``__parameters__``."""
        names = self.members(path).get(name)
        return list(ast.literal_eval(names)) if isinstance(names, ast.List) else []


def unsupported(what: str) -> UnsupportedModelError:
    """The error for a program that cannot be followed; says what to give instead."""
    return UnsupportedModelError(
        f"the TorchScript program {what}: give the Python model it was made from (a pickled module, or a state_dict "
        "with an architecture name)"
    )
