"""Mutation testing of what proves a result: are the tests told when the proof itself is wrong?

Mutants are made by cosmic-ray's operators, one at a place, and a seeded sample of the places of each file is tried. One
process imports the tests once and forks for every mutant; the fork takes over the mutant's code and runs the tests that
execute the changed line, the quickest first, until one fails. Which these are, a first pass under coverage.py says.

Needs `pip install cosmic-ray coverage`, Linux and Python 3.11.
"""

from __future__ import annotations

import argparse
import ast
import gc
import hashlib
import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import coverage
import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

from .common import ROOT, read
from .mutants_report import write_page

ROOMS = ("verifying", "fitting")
# Tests of these rooms and of what stands on them; the whole suite takes too long under coverage.
TESTS = (
    "attention",
    "certificate",
    "certificate_checks",
    "certificate_growth",
    "comparison",
    "contradictions",
    "copies",
    "counted",
    "draws",
    "elsewhere",
    "exchange",
    "fitting",
    "fitting_configuration",
    "float64",
    "floors",
    "graph",
    "group_norms",
    "growing",
    "image",
    "index_buffers",
    "index_map",
    "isolation",
    "kinds",
    "local_repairs",
    "masks",
    "mends",
    "outcome",
    "random_findings",
    "reachable",
    "refusals",
    "repair",
    "rewriting",
    "sharing",
    "shown",
    "smaller",
    "structure",
    "torch_attention",
    "unusual_layers",
    "unusual_operators",
    "widening",
    "widening_norms",
    "widening_unusual",
    "written_by_hand",
)
# Which tests execute which line, and where mutants can be made: it takes minutes to find out.
MAP, MADE = ROOT / "build" / "mutants_lines.json", ROOT / "build" / "mutants_made.json"
# CPU seconds of tests that a mutant has to survive, and after how many times as many it is taken to run for ever.
SECONDS, ENDLESS = 10.0, 2
BYTES = 8 << 30


class Mutant(NamedTuple):
    """One change of one line."""

    file: str
    line: int
    column: int
    operator: str
    source: str

    def row(self) -> dict[str, Any]:
        """What the result says of it."""
        old, new = ((ROOT / self.file).read_text().splitlines(), self.source.splitlines())
        changed = next((i for i, (a, b) in enumerate(zip(old, new)) if a != b), min(len(old), len(new)) - 1)
        row = {"file": self.file, "line": self.line, "column": self.column, "operator": self.operator}
        return {**row, "old": old[changed].strip(), "new": new[changed].strip()}


# Mutants ----------------------------------------------------------------------------------------------


class _Plain(ast.NodeTransformer):
    """What a change of does not count: types, text that is only shown, and assertions of ours that nothing reaches."""

    def visit_arguments(self, node: ast.arguments) -> ast.AST:  # which of them may go by place is no matter either
        names = [ast.arg(each.arg) for each in (*node.posonlyargs, *node.args, *node.kwonlyargs)]
        defaults = [each for each in (*node.defaults, *node.kw_defaults) if each is not None]
        return ast.arguments([], names, node.vararg, [], [], node.kwarg, defaults)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        return ast.Constant("")

    def visit_keyword(self, node: ast.keyword) -> ast.AST:
        return node if node.arg not in ("strict", "frozen") else ast.keyword(node.arg, ast.Constant(True))


def _meaning(source: str) -> str:
    return ast.dump(_Plain().visit(ast.parse(source)))


def mutants_of(path: Path, most: int, seed: int) -> tuple[list[Mutant], int]:
    """A sample of the mutants of a file, one at each place, and at how many places there is one."""
    source, file = path.read_text(), str(path.relative_to(ROOT))
    made = json.loads(MADE.read_text()) if MADE.exists() else {}
    key = f"{file} {seed} {hashlib.sha256(source.encode()).hexdigest()}"
    if key not in made:
        made[key] = list(_places(source, f"{seed} {file}"))
        MADE.parent.mkdir(exist_ok=True)
        MADE.write_text(json.dumps(made))
    chosen = [
        Mutant(file, *where, name.removeprefix("core/"), _changed(source, name, occurrence))
        for *where, name, occurrence in made[key][:most]
    ]
    return sorted(chosen), len(made[key])


def _changed(source: str, name: str, occurrence: int) -> str:
    changed: str = mutate_code(source, get_operator(name)(), occurrence)
    return changed


def _places(source: str, seed: str) -> Iterator[tuple[int, int, str, int]]:
    """Line, column, operator and its occurrence of one mutant at each place, in an order drawn from the seed."""
    places: dict[tuple[int, int], list[tuple[str, int]]] = {}
    nodes = list(ast_nodes(get_ast(source)))
    for name in operator_names():
        if not get_operator(name).arguments():
            starts = (start for node in nodes for start, _ in get_operator(name)().mutation_positions(node))
            for occurrence, start in enumerate(starts):
                places.setdefault(start, []).append((name, occurrence))
    meaning = _meaning(source)
    for line, column in sorted(places, key=lambda place: random.Random(f"{seed} {place}").random()):
        choices = places[line, column]
        random.Random(f"{seed} {line} {column}").shuffle(choices)
        for name, occurrence in choices:
            try:
                counts = _meaning(_changed(source, name, occurrence)) != meaning
            except SyntaxError:
                continue
            if counts:
                yield line, column, name, occurrence
                break


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def take_over(mutant: Mutant, functions: Sequence[FunctionType]) -> None:
    """Let this process run a mutant's code in place of its module's, whoever holds one of these functions of it."""
    path = str(ROOT / mutant.file)
    whole = compile(mutant.source, path, "exec", dont_inherit=True)
    codes = {(code.co_qualname, code.co_firstlineno): code for code in _codes(whole)}
    for function in functions:
        own = function.__code__
        code = codes.get((own.co_qualname, own.co_firstlineno)) if own.co_filename == path else None
        if code is not None and code.co_freevars == own.co_freevars:
            function.__code__ = code
    tree = ast.parse((ROOT / mutant.file).read_text())  # a decorator that is gone moves the lines
    bodies = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.body[0].lineno <= mutant.line]
    if not any(mutant.line <= (node.end_lineno or 0) for node in bodies):  # a constant, a default, a decorator
        _replace_names(path, whole)


def _replace_names(path: str, whole: CodeType) -> None:
    module = next(m for m in list(sys.modules.values()) if getattr(m, "__file__", None) == path)
    old = dict(vars(module))
    fresh = {name: old[name] for name in ("__name__", "__file__", "__package__", "__spec__")}
    exec(whole, fresh)
    for name, value in fresh.items():
        if isinstance(value, type) and isinstance(old.get(name), type) and value.__module__ == old["__name__"]:
            for key in vars(value).keys() - {"__dict__", "__weakref__"}:  # of instances that tests hold already
                setattr(old[name], key, vars(value)[key])
    for holder in list(sys.modules.values()):
        for name, value in list(getattr(holder, "__dict__", {}).items()):
            if name in fresh and name in old and value is old[name] and not name.startswith("__"):
                holder.__dict__[name] = fresh[name]


# Tests ------------------------------------------------------------------------------------------------


def forked(seconds: float, work: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """What `work` returns in a process of its own, None where that dies or takes too long; its CPU seconds."""
    receive, send = os.pipe()
    child = os.fork()
    if not child:
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1,) * 2)
        resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        try:
            os.write(send, json.dumps(work(*args)).encode())
        finally:
            os.kill(os.getpid(), signal.SIGKILL)  # no clean-up of what the parent still has
    os.close(send)
    with os.fdopen(receive) as pipe:
        said = pipe.read()
    usage = os.wait4(child, 0)[2]
    return json.loads(said) if said else None, usage.ru_utime + usage.ru_stime


class Trial:
    """As a plugin of pytest: has the tests collected, and runs them in forks in place of its own loop."""

    def __init__(self, work: Callable[[Trial], None]) -> None:
        self.work, self.failed = work, False

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.items = {item.nodeid: item for item in session.items}
        gc.collect()
        rooms = tuple(str(ROOT / "allocator" / room) for room in ROOMS)
        functions = (each for each in gc.get_objects() if isinstance(each, FunctionType))
        self.functions = [each for each in functions if each.__code__.co_filename.startswith(rooms)]
        gc.freeze()
        self.work(self)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed |= report.failed

    def passes(self, name: str, following: str | None = None) -> bool:
        """Run one test, here."""
        self.failed = False
        item, after = self.items[name], None if following is None else self.items[following]
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
        return not self.failed

    def catcher(self, mutant: Mutant | None, names: Sequence[str]) -> str:
        """The first test that a mutant fails, "" where it passes all."""
        if mutant is not None:
            try:
                take_over(mutant, self.functions)
            except Exception:
                return "import"
        for name, following in zip(names, [*names[1:], None]):
            if not self.passes(name, following):
                return name
        return ""

    def lines(self, names: Sequence[str], files: Sequence[str]) -> dict[str, Any]:
        """Per test that passes its CPU seconds, and which lines it executes of which file."""
        cover = coverage.Coverage(data_file=None, config_file=False, include=files)
        seconds = {}
        cover.start()
        for name, following in zip(names, [*names[1:], None]):
            cover.switch_context(name)
            start = time.process_time()
            if self.passes(name, following):
                seconds[name] = time.process_time() - start
        cover.stop()
        found: dict[str, Any] = {name: {"seconds": spent, "lines": {}} for name, spent in seconds.items()}
        for file in cover.get_data().measured_files():
            for line, contexts in cover.get_data().contexts_by_lineno(file).items():
                for name in found.keys() & set(contexts):
                    found[name]["lines"].setdefault(os.path.relpath(file, ROOT), []).append(line)
        return found


def lines_of(trial: Trial, files: Sequence[str]) -> dict[str, Any]:
    """As `Trial.lines` of all tests, file by file; what was found before is read."""
    known: dict[str, Any] = json.loads(MAP.read_text()) if MAP.exists() else {}
    by_file: dict[str, list[str]] = {}
    for name in trial.items:
        by_file.setdefault(name.partition("::")[0], []).append(name)
    for file, names in by_file.items():
        fresh = [name for name in names if name not in known]
        if fresh:
            found, spent = forked(3600, trial.lines, fresh, files)
            print(f"{file}: {len(fresh)} tests, {spent:.0f} s", flush=True)
            known.update(dict.fromkeys(fresh) | (found or {}))  # None: does not pass, not to be used
            MAP.parent.mkdir(exist_ok=True)
            MAP.write_text(json.dumps(known))
    return {name: each for name, each in known.items() if each is not None and name in trial.items}


def _chosen(known: dict[str, Any], covering: list[str], file: str, most: float) -> tuple[list[str], float]:
    """Of these tests as many as take so long, and how long: half of it those most about a file, then quick ones."""

    def elsewhere(name: str) -> float:
        lines = known[name]["lines"]
        return sum(map(len, lines.values())) / len(lines[file])

    names, total = [], 0.0
    for limit, order in ((most / 2, elsewhere), (most, lambda name: known[name]["seconds"])):
        for name in sorted(covering, key=order):
            seconds = known[name]["seconds"]
            if name not in names and total + seconds <= limit:
                names.append(name)
                total += seconds
    return names, total


def judge(trial: Trial, known: dict[str, Any], mutant: Mutant, most: float, trusted: set[str]) -> dict[str, Any]:
    """Whether a mutant is caught, and by which test."""
    covering = [name for name, each in known.items() if mutant.line in each["lines"].get(mutant.file, ())]
    if not covering:  # a line that runs at import alone
        covering = [name for name, each in known.items() if mutant.file in each["lines"]]
    names, total = _chosen(known, covering, mutant.file, most)
    while True:
        test, spent = forked(ENDLESS * total + 5, trial.catcher, mutant, names)
        if test in ("", "import", *trusted):
            break
        alone = names if test is None else [test]  # what fails without the mutant too says nothing of it
        if forked(ENDLESS * total + 5, trial.catcher, None, alone)[0] == "":
            trusted.update(alone)
            break
        names = [name for name in names if name not in alone]
    outcome = {"caught": test != "", "by": test if test is not None else "it died, or ran for ever"}
    return {**mutant.row(), **outcome, "tests": len(names), "of": len(covering), "cpu": round(spent, 1)}


def main() -> None:
    """Try the mutants that no earlier run tried, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--most", type=int, default=24, help="mutants per file (default 24)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="CPU seconds of tests per mutant")
    parser.add_argument("--tests", nargs="*", default=TESTS, help="names of test files, without test_")
    parser.add_argument("--files", nargs="*", help="only these, as structure.py")
    parser.add_argument("--survivors", action="store_true", help="try those again that no test caught before")
    parser.add_argument("--anew", action="store_true", help="try all again")
    args = parser.parse_args()
    paths = [path for room in ROOMS for path in sorted((ROOT / "allocator" / room).glob("*.py"))]
    paths = [path for path in paths if path.name != "__init__.py"]

    def work(trial: Trial) -> None:
        known = lines_of(trial, [str(path) for path in paths])
        data = read("mutants")
        places, before = data.get("places", {}), {} if args.anew else data.get("mutants", {})
        rows, trusted = dict(before), set[str]()
        for path in paths:
            if args.files and path.name not in args.files:
                continue
            found, places[str(path.relative_to(ROOT))] = mutants_of(path, args.most, args.seed)
            own = {f"{m.file}:{m.line}:{m.column} {m.operator}": m for m in found}
            rows = {key: row for key, row in rows.items() if row["file"] != str(path.relative_to(ROOT)) or key in own}
            for key, mutant in own.items():
                row = before.get(key)
                same = row is not None and {**row, **mutant.row()} == row
                if not same or (args.survivors and not row["caught"]):
                    rows[key] = judge(trial, known, mutant, args.seconds, trusted)
                    print({**rows[key], "by": rows[key]["by"].rpartition("/")[2]}, flush=True)
            write_page({"seed": args.seed, "places": places, "mutants": dict(sorted(rows.items()))})

    tests = [f"tests/test_{name}.py" for name in args.tests]
    os.chdir(ROOT)
    options = ["-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", f"--basetemp={ROOT / 'build' / 'mutants_tmp'}"]
    pytest.main([*options, *tests], plugins=[Trial(work)])


if __name__ == "__main__":
    main()
