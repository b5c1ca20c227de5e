"""The public functions that share results on the hub of Hugging Face."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from allocator.adapters import hub
from allocator.arguments import checked
from allocator.errors import FileError
from allocator.io.models import build_as_asked
from allocator.io.results import load_result, save_result
from allocator.io.shards import SUFFIX

_RESULT = "allocation.safetensors"
_CARD = """\
---
library_name: neuron-allocator
---

A {kind} with fewer neurons, made with neuron-allocator. To load it: `allocator.from_hub("{repository}")`.
"""


@checked
def push_to_hub(
    result: Any, repository: str, *, private: bool = False, revision: str | None = None, token: str | None = None
) -> str:
    """Write a result as `save` does, and put it into a repository of the hub.

    Args:
        result: as for `save`; or the path of a folder with safetensors (of `allocate_folder`, or `save_pretrained`),
            which is put there as it is.
        repository: "USER/NAME"; made where there is none.
        private: of a repository that is made, whether others see it.
        revision: a branch; None for the main one.
        token: of the user; None for that which the client knows.

    Returns:
        The address of the commit.

    Raises:
        MissingPackageError: huggingface_hub is not installed.
        FileError: what cannot be saved, or the hub cannot be reached, or refuses.
    """
    options: dict[str, Any] = {"private": private, "revision": revision, "token": token}
    if isinstance(result, (str, Path)):
        folder = Path(result)
        if not any(folder.glob(f"*{SUFFIX}")):
            raise FileError(f"{folder} is no folder with weights as {SUFFIX}: pass one, or a result")
        return hub.upload(folder, repository, **options)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save_result(result, folder / _RESULT)
        model = result[0] if isinstance(result, tuple) else getattr(result, "model", result)
        card = _CARD.format(kind=type(model).__name__, repository=repository)
        (folder / "README.md").write_text(card, encoding="utf-8")
        return hub.upload(folder, repository, **options)


@checked
def from_hub(
    repository: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    trust: bool = False,
) -> nn.Module:
    """The network in a repository of the hub: what `push_to_hub` put there, or a folder of transformers.

    Args:
        repository: "USER/NAME".
        revision: a branch, tag or commit; None for the newest of the main branch.
        token: of the user, for what is private.
        model, trust: as for `load`.

    Raises:
        MissingPackageError: huggingface_hub is not installed.
        FileError: the hub cannot be reached, has no such repository, or there is no result in it.
        UnsafeFileError, AllocationMismatchError: as for `load`.
    """
    folder = hub.download(repository, revision=revision, token=token)
    if (folder / _RESULT).exists():
        return load_result(folder / _RESULT, model=model, trust=trust)
    if (folder / "config.json").exists() and any(folder.glob(f"*{SUFFIX}")):
        return build_as_asked(f"hf:{folder}", {})
    raise FileError(f"the repository {repository} holds neither {_RESULT} nor a config.json beside weights as {SUFFIX}")
