"""YAML as plain data that is no larger than it looks: what aliases repeat is counted before anything is made of it."""

from __future__ import annotations

from typing import Any

from allocator.errors import MissingPackageError
from allocator.written_out import written_out

MOST_ENTRIES = 100_000
"""Values and keys, with those that aliases stand for: a hundred times what the longest configuration has."""


def parsed(text: str) -> Any:
    """What this YAML says.

    Raises:
        ValueError: nothing, or a key twice; or lists lie too deep in lists, numbers are too long, or aliases stand for
            too much.
        MissingPackageError: there is no reader of YAML.
    """
    yaml = _yaml()
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        written_out(node, _inside, MOST_ENTRIES)
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except RecursionError:
        raise ValueError("lists or sections lie too deep within one another") from None


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise MissingPackageError("configurations are YAML: pip install 'neuron-allocator[train]'") from error
    return yaml


def _inside(node: Any) -> tuple[Any, ...]:
    """The nodes in a list or mapping.

    Raises:
        ValueError: a mapping has a key twice, of which readers would forget the first.
    """
    if isinstance(node.value, str):
        return ()
    if not all(isinstance(item, tuple) for item in node.value):
        return tuple(node.value)
    keys = set()
    for key, _ in node.value:
        said = (key.tag, key.value) if isinstance(key.value, str) else id(key)
        if said in keys:
            raise ValueError(f"the key {key.value!r:.60} comes twice (line {key.start_mark.line + 1})")
        keys.add(said)
    return tuple(each for item in node.value for each in item)
