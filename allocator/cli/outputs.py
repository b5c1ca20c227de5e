"""Files that subcommands write: refused before any work is done where they cannot be, written in one piece."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allocator.cli.arguments import UsageError
from allocator.cli.talk import Talk
from allocator.disk import check_new_folder, check_writable
from allocator.errors import FileError, UnknownNameError

if TYPE_CHECKING:
    from torch import nn

MODEL_SUFFIXES = (".pt", ".pth", ".safetensors")


def check_outputs(args: argparse.Namespace, *paths: str | None) -> None:
    """Refuse, before any work is done, outputs that could not be written or would overwrite a file."""
    given = [path for path in paths if path is not None]
    for path in given:
        folder = folder_named(path)
        if folder is not None:
            check_new_folder(folder)
            continue
        check_writable(path)
        if os.path.exists(path) and not args.force:
            raise FileError(f"{path} exists; use --force to overwrite it")
    if len({os.path.realpath(path) for path in given}) < len(given):
        raise UsageError("two outputs have the same name")


def folder_named(path: str | None) -> str | None:
    """The folder in `hf:FOLDER`, into which weights are written tensor by tensor; None for a file."""
    return path.removeprefix("hf:") if path is not None and path.startswith("hf:") else None


def source_folder(args: argparse.Namespace, *unfit: str) -> str:
    """The folder that is read where the output is one.

    Args:
        args: of the command line.
        unfit: destinations of options by which weights would have to be in memory.

    Raises:
        UsageError: the model lies in no folder, or such an option is given.
    """
    folder = folder_named(args.model)
    if folder is None or not os.path.isdir(folder):
        raise UsageError("-o hf:OUT writes weights from folder to folder: MODEL must be hf:FOLDER, or OUT a file")
    parser = args.parsers[args.command]
    given = [name for name in unfit if getattr(args, name) != parser.get_default(name)]
    if given:
        flag = "--" + given[0].replace("_", "-")
        raise UsageError(f"{flag} needs the weights in memory, and -o hf:OUT leaves them in their folder")
    return folder


def without_weights(args: argparse.Namespace, talk: Talk) -> nn.Module:
    """The network that a folder's configuration names, on the meta device."""
    import torch

    from allocator.io.models import build_as_asked

    with talk.stage(f"building {args.model}"), torch.device("meta"):
        return build_as_asked(args.model, dict(args.set)).eval()


def check_model_output(path: str | None) -> None:
    """Usage error where this is neither a file's name for a model nor `hf:FOLDER`."""
    if folder_named(path) is None:
        check_suffix(path, MODEL_SUFFIXES, "the model (-o)")


def check_suffix(path: str | None, suffixes: tuple[str, ...], what: str) -> None:
    """Usage error where a name does not end as its content asks."""
    if path is not None and Path(path).suffix not in suffixes:
        raise UsageError(f"{what} must end in {' or '.join(suffixes)}, not {Path(path).name!r}")


def write_model(result: Any, path: str) -> None:
    """Write a model that came out of an allocation, or a result, as pickle or as safetensors by the path's suffix."""
    from torch import nn

    from allocator.io.files import RESULT_SUFFIX, save_model, save_result

    if Path(path).suffix == RESULT_SUFFIX:
        save_result(result, path)
    else:
        save_model(result if isinstance(result, nn.Module) else result.model, path)


def check_report(report: str | None, plot: str | None) -> None:
    """Usage error, before any work is done, where the name of a report or a picture does not say its format."""
    if report is None and plot is None:
        return
    from allocator.reporting import format_of
    from allocator.reporting.pictures import picture_format

    try:
        if report is not None:
            format_of(report)
        if plot is not None:
            picture_format(plot)
    except UnknownNameError as error:
        raise UsageError(str(error)) from error


def asked_format(args: argparse.Namespace) -> str:
    """The format of a report: by name (`--json`, `--format`), else by the suffix of `-o`, else "rich"."""
    if args.json and args.format not in (None, "json"):
        raise UsageError(f"--json and --format {args.format} do not go together")
    try:
        format = _named_format("json" if args.json else args.format, args.output)
    except UnknownNameError as error:
        raise UsageError(str(error)) from error
    if format == "html" and args.output is None and sys.stdout.isatty():
        raise UsageError("HTML is not for a terminal: give -o FILE.html")
    return format


def _named_format(name: str | None, path: str | None) -> str:
    if name is None and path is None:
        return "rich"
    from allocator.reporting.render import check_format, format_of

    return format_of(path) if name is None and path is not None else check_format(str(name))
