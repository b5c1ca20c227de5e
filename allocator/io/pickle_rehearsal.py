"""A pickle read once with stand-ins for all that it names, to see what it would call.

``torch.load(weights_only=True)`` lets a pickle call anything on its allow-list with arguments of the file's choice.
Some dozen bytes make a ``Linear(10**5, 10**5)`` of 40 GB that way, or have ``torch.relu`` write out a billion numbers
of a tensor that has one. What ``torch.save`` writes does neither: a module comes back as an empty object into which
its fields are put. So nothing may be called but what puts tensors and plain containers together, and that is found
here before torch reads the file.
"""

from __future__ import annotations

import collections
import io
import zipfile
from collections.abc import Collection, Iterator, Mapping
from typing import Any, BinaryIO, cast

import torch

from allocator.errors import FileError
from allocator.io.plain_unpickler import PlainUnpickler

LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The pickled magic number that files of torch before 1.6 begin with."""
LEGACY_PICKLES = 5
"""Magic number, protocol, system, object, storage keys; raw bytes follow."""

# Their results take no more room than their arguments. Missing on purpose is `_rebuild_device_tensor_from_cpu_tensor`:
# it converts, and so writes out, a tensor that may show one number a billion times.
_REBUILDS = frozenset(
    f"torch._utils._rebuild_{what}"
    for what in (
        "meta_tensor_no_storage",
        "nested_tensor",
        "parameter",
        "parameter_with_state",
        "qtensor",
        "sparse_tensor",
        "tensor",
        "tensor_v2",
        "tensor_v3",
        "wrapper_subclass",
    )
)
_REBUILD_OTHER_TYPE = "torch._tensor._rebuild_from_type_v2"
_ENCODE, _BYTE_ARRAY = "_codecs.encode", "builtins.bytearray"
_PARAMETER = "torch.nn.parameter.Parameter"
# An enumeration: each of its members is one object for the whole process.
_FORMAT = "timm.layers.format.Format"
_CALLED = _REBUILDS | {
    _ENCODE,
    _FORMAT,
    "builtins.complex",
    "functools.partial",
    "torch.Size",
    "torch.device",
    "torch.serialization._get_layout",
}
# There are instructions that put entries into them, so that nothing can stand in for them.
_CONTAINERS = {
    "builtins.set": set,
    "collections.Counter": collections.Counter,
    "collections.OrderedDict": collections.OrderedDict,
}
_MOST_RECURRENT_LAYERS = 1_000
# An object takes some thousand bytes once it has the fields of a module. Its share of a file by `torch.save` is far
# more than this; a pickle made by hand puts the same fields into new objects by ten bytes each.
_BYTES_PER_OBJECT, _FREE_OBJECTS = 100, 20_000


def refused_calls(file: BinaryIO, recurrent: Collection[str] = ()) -> list[str]:
    """What a file as ``torch.save`` writes it would call and may not, in words; nothing of it is done.

    Args:
        file: opened; read from its beginning.
        recurrent: the classes it names that are recurrent layers.

    Raises:
        Exception: nearly any, where the file is damaged.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    for stream, records in _pickles(file):
        rehearsal = _Rehearsal(stream, recurrent, records, objects=size // _BYTES_PER_OBJECT + _FREE_OBJECTS)
        try:
            rehearsal.load()
        except Exception:  # what follows a refused call need not make sense
            if not rehearsal.refused:
                raise
        if rehearsal.refused:
            return sorted(rehearsal.refused)
    return []


def _pickles(file: BinaryIO) -> Iterator[tuple[BinaryIO, Mapping[str, int] | None]]:
    """Each pickle that torch would read, and how many bytes there are for each storage where these are records."""
    start = file.read(len(LEGACY_START))
    file.seek(0)
    if start.startswith(b"PK\x03\x04"):
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            wanted = f"{names[0].partition('/')[0]}/data.pkl".lower()
            # As torch does: in the folder of the first entry, in any case. Of two, it might read the other one.
            (name,) = (name for name in names if name.lower() == wanted)
            data = f"{names[0].partition('/')[0]}/data/"
            sizes = {item.filename.removeprefix(data): item.file_size for item in archive.infolist()}
            yield io.BytesIO(archive.read(name)), sizes
    elif start == LEGACY_START:
        for _ in range(LEGACY_PICKLES):  # each begins where the one before it ends
            yield file, None


class _StandInType(type):
    """The type of what stands in for a function or a class: a call is noted, and gives an empty object."""

    path: str
    rehearsal: _Rehearsal

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        cls.rehearsal.check_call(cls.path, args)
        return object.__new__(cast("type[Any]", cls))


class _StandIn(metaclass=_StandInType):
    """Something named by a pickle, or an object made of it."""

    path = ""
    rehearsal: _Rehearsal

    def __new__(cls, *args: Any) -> Any:
        """What a pickle makes objects by where it does not call; torch gives the arguments to the class's own."""
        if args and cls.path != _PARAMETER:
            cls.rehearsal.check_call(cls.path, args)
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.rehearsal.check_state(self.path, state)


class _Rehearsal(PlainUnpickler):
    """One pickle read with nothing real in it.

    Attributes:
        refused: what it would do and may not.
    """

    def __init__(
        self, stream: BinaryIO, recurrent: Collection[str], records: Mapping[str, int] | None, objects: int
    ) -> None:
        super().__init__(stream, encoding="latin1")
        self.recurrent, self.records, self.objects = recurrent, records, objects
        self.refused: set[str] = set()
        self.stand_ins: dict[str, Any] = dict(_CONTAINERS)

    def find_class(self, module: str, name: str) -> Any:
        """What stands in for a global; the same one each time."""
        path = f"{module.replace('__builtin__', 'builtins')}.{name}"
        if path not in self.stand_ins:
            self.stand_ins[path] = _StandInType(name, (_StandIn,), {"path": path, "rehearsal": self})
        return self.stand_ins[path]

    def persistent_load(self, pid: Any) -> Any:
        """A storage: its size is compared with the bytes in the file, which not all releases of torch do.

        Raises:
            FileError: it says to be longer than they are.
        """
        if self.records is not None:
            _, kind, key, _, length = pid
            known: Any = getattr(torch, getattr(kind, "path", "").rpartition(".")[2], None)
            each = getattr(getattr(known, "dtype", None), "itemsize", 1)
            if length * each > self.records.get(key, 0):
                raise FileError(f"storage {key!r:.40} says to be longer than its data")
        return object()

    def check_call(self, path: str, args: tuple[Any, ...]) -> None:
        """Note a call that may not be made."""
        if path == _REBUILD_OTHER_TYPE:  # calls its first argument
            allowed = bool(args) and getattr(args[0], "path", "") in _REBUILDS
        elif path == _BYTE_ARRAY:  # given a number, it is that long
            allowed = all(isinstance(given, str) or getattr(given, "path", "") == _ENCODE for given in args)
        else:
            allowed = path in _CALLED
        if not allowed:
            self.refused.add(f"a call of {path}")

    def check_state(self, path: str, state: Any) -> None:
        """Note fields that would do harm once they are put into an object.

        Raises:
            FileError: there are more objects with fields than a file of this size can hold.
        """
        self.objects -= 1
        if self.objects < 0:
            raise FileError("it makes more objects than a file of its size can hold")
        if path == _FORMAT:
            self.refused.add(f"a change of {path}")
        if path in self.recurrent:  # some of them name the weights of as many layers as they say to have
            layers = state.get("num_layers") if isinstance(state, dict) else None
            if type(layers) is not int or layers > _MOST_RECURRENT_LAYERS:
                self.refused.add(f"{path} of {layers!r:.40} layers")
