"""The page on the command line, made from its argument parsers."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from allocator.cli import make_parser


def cli_page() -> str:
    """Every command with its usage, its options and its examples, as Markdown."""
    parser = make_parser()
    description, _, models = (parser.description or "").partition("\n\n")
    parts = ["# Command line", description, models, *_examples(parser)]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                parts += _command(name, command)
    return "\n\n".join(parts) + "\n"


def _command(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    yield f"## {name}"
    yield parser.description or ""
    yield f"```text\n{parser.format_usage().strip()}\n```"
    for group in parser._action_groups:
        rows = [_row(parser, action) for action in group._group_actions if not isinstance(action, argparse._HelpAction)]
        if rows:
            title = (group.title or "").capitalize()
            yield "\n".join([f"| {title} | |", "| --- | --- |", *rows])
    yield from _examples(parser)


def _examples(parser: argparse.ArgumentParser) -> Iterator[str]:
    """The indented lines of the epilog, without the heading before and the words after."""
    lines = [line.strip() for line in (parser.epilog or "").splitlines() if line.startswith("  ")]
    if lines:
        yield "```sh\n" + "\n".join(lines) + "\n```"


def _row(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """One option: how it is written, and its help with what argparse fills in."""
    formatter = parser._get_formatter()
    written = formatter._format_action_invocation(action)
    said = formatter._expand_help(action) if action.help else ""
    cells = [text.replace("|", "\\|") for text in (f"`{written}`", said)]
    return f"| {cells[0]} | {cells[1]} |"
