"""Python's own unpickler with the instructions that ``torch.save`` and ``torch.jit.save`` write, and no others."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

# Those that torch's weights-only unpickler knows. Left out are some that take as much room as the file says, and all
# that call something.
_INSTRUCTIONS = (
    pickle.APPEND, pickle.APPENDS, pickle.BINFLOAT, pickle.BINGET, pickle.BININT, pickle.BININT1, pickle.BININT2,
    pickle.BINPERSID, pickle.BINPUT, pickle.BINUNICODE, pickle.BUILD, pickle.EMPTY_DICT, pickle.EMPTY_LIST,
    pickle.EMPTY_SET, pickle.EMPTY_TUPLE, pickle.GLOBAL, pickle.LONG1, pickle.LONG_BINGET, pickle.LONG_BINPUT,
    pickle.MARK, pickle.NEWFALSE, pickle.NEWOBJ, pickle.NEWTRUE, pickle.NONE, pickle.PROTO, pickle.REDUCE,
    pickle.SETITEM, pickle.SETITEMS, pickle.SHORT_BINSTRING, pickle.STOP, pickle.TUPLE, pickle.TUPLE1,
    pickle.TUPLE2, pickle.TUPLE3,
)  # fmt: skip


class PlainUnpickler(pickle._Unpickler):
    """Base of unpicklers whose `find_class` says what a pickle may name.

    It is the one written in Python, because the one in C allots room for as many entries as an index in the file says.
    """

    stack: list[Any]

    def load_build(self) -> None:
        """Put fields into an object, and never into a class or function, which the whole process shares."""
        if callable(self.stack[-2]):
            raise pickle.UnpicklingError(f"fields are put into {self.stack[-2]!r:.100}")
        pickle._Unpickler.dispatch[pickle.BUILD[0]](self)  # type: ignore[arg-type]

    dispatch: ClassVar[Mapping[int, Callable[[Any], None]]] = {  # type: ignore[assignment]
        **{code[0]: pickle._Unpickler.dispatch[code[0]] for code in _INSTRUCTIONS},
        pickle.BUILD[0]: load_build,
    }
