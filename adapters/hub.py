"""The hub of Hugging Face, through its own client: repositories of files, by name."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from allocator.errors import FileError, MissingPackageError, first_line

_READ = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
"""Weights that run no code, and what lies beside them; other forms of weights stay where they are."""


def _client() -> ModuleType:
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingPackageError("the hub needs its client: pip install 'neuron-allocator[hub]'") from error
    return huggingface_hub


def upload(folder: Path, repository: str, *, private: bool, revision: str | None, token: str | None) -> str:
    """Put what lies in a folder into a repository, which is made where there is none; gives the commit's address.

    Raises:
        MissingPackageError: the client is not installed.
        FileError: the hub cannot be reached, or refuses.
    """
    api = _client().HfApi(token=token)
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        done = api.upload_folder(
            folder_path=folder, repo_id=repository, revision=revision, commit_message="Upload with neuron-allocator"
        )
    except Exception as error:  # the client's own kinds, and those of what it sends by
        raise FileError(f"cannot write to the repository {repository}: {first_line(error)}") from error
    return str(done)


def download(repository: str, *, revision: str | None, token: str | None) -> Path:
    """The folder in the client's cache that a repository's files are in, fetched where they are not there yet.

    Raises:
        MissingPackageError: the client is not installed.
        FileError: the hub cannot be reached, or has no such repository.
    """
    client = _client()
    try:
        return Path(client.snapshot_download(repository, revision=revision, token=token, allow_patterns=list(_READ)))
    except Exception as error:  # see `upload`
        raise FileError(f"cannot read the repository {repository}: {first_line(error)}") from error
