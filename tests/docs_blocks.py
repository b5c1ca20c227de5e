"""Runs the code blocks of a documentation page, in order, as a reader would.

- `python` blocks share one namespace per page; `pycon` blocks are doctests in it.
- `sh` blocks are run line by line: `allocator-cli` in this process, everything else as `_CHECKS` says.
- A `text` block right after one of these is what it printed; `...` stands for anything,
  and rounding errors such as 2.8e-16 for each other.
- A block with `title="NAME"` is a file of that name.
- `<!-- skip: next "reason" -->` leaves the next block out; `next if(quick, reason="...")` where it is run quickly, and
  `start if(not installed("NAME"), reason="...")` all up to `<!-- skip: end -->` where a package is missing.
- `<!-- quick: OLD -> NEW -->` changes a later block where the page is run quickly. What follows rests on training or
  is changed, so that figures in printed text may differ, and the criterion that a trial chose; other words may not.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import shlex
from collections.abc import Callable, Sequence
from importlib.metadata import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import SkipTest

from sybil import Document, Example, Region
from sybil.evaluators.doctest import DocTestEvaluator
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.abstract.doctest import DocTestStringParser
from sybil.parsers.markdown import SkipParser
from sybil.parsers.markdown.lexers import DirectiveInHTMLCommentLexer, RawFencedCodeBlockLexer

from allocator.cli import main, make_parser

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").rglob("*.md") if "api" not in p.parts)]

_OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
_INFO = re.compile(r'(?P<language>\w+)(?: title="(?P<title>[^"]+)")?[^\n]*\n')
_ROUNDING = re.compile(r"\d\.\de[-+]\d\d")  # float64 errors: other on another processor
_CHOICE = "fisher|activation|group_norm|priced|global"  # which suits a network, a trial decides
_FIGURE = re.compile(rf"\d[\d,.]*(?:e[-+]\d+)?(?: → \d[\d,.]*)?|[━─]+|\b(?:{_CHOICE})\b")  # "8", "8 → 6"


class Page:
    """One page and what running it needs.

    Attributes:
        skipped: reasons of the blocks that were left out.
        ran: how many blocks were run or written.
    """

    def __init__(self, path: Path, quick: bool):
        self.path = path
        self.quick = quick
        self.changes: list[tuple[str, str]] = []
        self.loose = False
        self.printed: str | None = None
        self.after = 0
        self.ran = 0
        self.skipped: list[str] = []
        self.python = PythonEvaluator()
        self.document = Document.parse(str(path), SkipParser(), self._parse, self._quick_changes)
        self.document.namespace["quick"] = quick
        self.document.namespace["installed"] = lambda name: find_spec(name) is not None

    def run(self) -> None:
        """Run every block; the first that fails ends the page."""
        for example in self.document.examples():
            try:
                example.evaluate()
            except SkipTest as reason:
                self.skipped.append(str(reason))
        assert not self.changes, f"{self.path.name}: {self.changes} fit no block after them"

    def _parse(self, document: Document) -> list[Region]:
        regions: list[Region] = []
        doctests = DocTestStringParser(DocTestEvaluator(_OPTIONS))
        for region in RawFencedCodeBlockLexer(_INFO)(document):
            language, source = region.lexemes["language"], region.lexemes["source"]
            region.parsed = source
            if language == "pycon":
                for each in doctests(source, document.path):
                    each.adjust(region, source)
                    regions.append(each)
                continue
            region.evaluator = self._file if region.lexemes["title"] else self._evaluator(language)
            if region.evaluator is not None:
                regions.append(region)
        return regions

    def _evaluator(self, language: str) -> Callable[[Example], str | None] | None:
        return {"python": self._python, "sh": self._shell, "text": self._text}.get(language)

    def _quick_changes(self, document: Document) -> list[Region]:
        found = []
        for region in DirectiveInHTMLCommentLexer("quick")(document):
            region.parsed = region.lexemes["arguments"]
            region.evaluator = self._change
            found.append(region)
        return found

    def _change(self, example: Example) -> None:
        old, _, new = example.parsed.partition(" -> ")
        self.loose = True
        if self.quick:
            self.changes.append((old, new))

    def _changed(self, source: str) -> str:
        """The block with the changes that fit it; each fits once."""
        for change in list(self.changes):
            if change[0] in source:
                source = source.replace(*change)
                self.changes.remove(change)
        return source

    def _file(self, example: Example) -> None:
        Path(example.region.lexemes["title"]).write_text(self._changed(example.parsed), encoding="utf-8")
        self._ran(example, None)

    def _python(self, example: Example) -> None:
        changed = self._changed(example.parsed)
        example.parsed = type(example.parsed)(changed, example.parsed.offset, example.parsed.line_offset)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            self.python(example)
        self._ran(example, printed.getvalue())

    def _shell(self, example: Example) -> str | None:
        printed = io.StringIO()
        for line in self._changed(example.parsed).replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if not words:
                continue
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()) as errors:
                problem = run_command(words)
            if problem:
                return f"{line}\n{problem}\n{errors.getvalue()}"
        self._ran(example, printed.getvalue())
        return None

    def _ran(self, example: Example, printed: str | None) -> None:
        self.ran += 1
        self.printed, self.after = printed, example.end

    def _text(self, example: Example) -> str | None:
        """Compare with what the block before printed, if there is nothing between the two."""
        between = self.document.text[self.after : example.start].removeprefix("```")
        if self.printed is None or between.strip():
            return None
        figures = _FIGURE if self.loose else _ROUNDING
        want, got = (figures.sub("0", text).strip("\n") + "\n" for text in (example.parsed, self.printed))
        if doctest.OutputChecker().check_output(want, got, _OPTIONS):
            return None
        return f"expected:\n{want}\nprinted:\n{self.printed}"


def run_command(words: Sequence[str]) -> str | None:
    """Run or check one command; what went wrong, if something did."""
    for start, check in _CHECKS.items():
        if list(words[: len(start)]) == list(start):
            return check(list(words[len(start) :]))
    return f"no way to check {words[0]!r}: skip the block, with a reason"


def _cli(arguments: list[str]) -> str | None:
    if arguments[0] == "train":
        from allocator.recipes.configuration import load_config

        parsed = make_parser().parse_args(arguments)
        if load_config(parsed.config, parsed.set).data.dataset != "digits":
            return None  # ImageNet and COCO are not here: the command and its configuration are read
        arguments = [*arguments, "--quiet"]
    try:
        status: Any = main(arguments)
    except SystemExit as left:  # of --help and --version
        status = left.code
    return f"exit status {status}" if status else None


def _launched(arguments: list[str]) -> str | None:
    """torchrun and accelerate: what they start is looked at, as one process would."""
    return _cli(arguments[arguments.index("allocator.cli") + 1 :])


def _pip(arguments: list[str]) -> str | None:
    extras = metadata("neuron-allocator").get_all("Provides-Extra") or []
    for wanted in re.findall(r"\[([\w,]+)\]", " ".join(arguments)):
        unknown = set(wanted.split(",")) - set(extras)
        if unknown:
            return f"no such extra: {', '.join(unknown)}"
    return None


def _make(arguments: list[str]) -> str | None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    unknown = {word for word in arguments if "=" not in word} - set(targets)
    return f"no such target: {', '.join(unknown)}" if unknown else None


_CHECKS: dict[tuple[str, ...], Callable[[list[str]], str | None]] = {
    ("allocator-cli",): _cli,
    ("torchrun",): _launched,
    ("accelerate", "launch"): _launched,
    ("pip", "install"): _pip,
    ("make",): _make,
}
