"""Open thousands of damaged files: each must open or be refused by name, without code run or memory taken.

`python tests/fuzz.py --count 4000 --write benchmarks/results/fuzz.md` makes the committed table.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MEMORY = 3 * 2**30  # bytes of address space beyond what the libraries take
HERE = Path(__file__).parent


# ------------------------------------------------------------------------------------------ files and damage


def write_subjects(folder: Path) -> list[Path]:
    """One small, whole file of every kind that is read."""
    import torch
    from torch import nn

    import allocator

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    model = allocator.build("recipe:scalenet-small-seed", planes=[4, 6], blocks=[1, 1], num_classes=5).eval()
    result = allocator.allocate(model, "50%", example_inputs=torch.zeros(1, 1, 32, 32), certify=False)
    allocator.save_model(net, folder / "module.pt")
    torch.save(net.state_dict(), folder / "weights.pt")
    torch.save(net.state_dict(), folder / "legacy.pt", _use_new_zipfile_serialization=False)
    allocator.save(result, folder / "result.safetensors")
    (folder / "version1.safetensors").write_bytes((HERE / "files/version1/recipe.safetensors").read_bytes())
    result.allocation.save(folder / "allocation.json")
    (folder / "version1.json").write_bytes((HERE / "files/version1/own.json").read_bytes())
    torch.export.save(torch.export.export(net, (torch.zeros(1, 3, 8, 8),)), folder / "program.pt2")
    torch.jit.script(net).save(folder / "script.ts")
    return sorted(folder.iterdir())


def _flip(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _flip_early(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(min(len(data), 400))] ^= 1 << rng.randrange(8)


def _flip_late(data: bytearray, rng: random.Random) -> None:
    data[-1 - rng.randrange(min(len(data), 400))] ^= 1 << rng.randrange(8)


def _cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def _remove(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    del data[start : start + rng.randrange(1, 64)]


def _repeat(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    data[start:start] = data[start : start + rng.randrange(1, 256)]


def _noise(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    piece = data[start : start + rng.randrange(1, 32)]
    data[start : start + len(piece)] = rng.randbytes(len(piece))


def _huge(data: bytearray, rng: random.Random) -> None:
    """A large number where a length may be."""
    start, size = rng.randrange(len(data)), rng.choice((4, 8))
    data[start : start + size] = rng.choice((2**31 - 1, 2**32 - 1, 2**24)).to_bytes(size, "little")


def _digits(data: bytearray, rng: random.Random) -> None:
    """Other digits in the place of digits: sizes, offsets and indices of text headers."""
    places = [i for i, byte in enumerate(data) if 48 <= byte <= 57]
    for _ in range(rng.choice((1, 3))):
        data[rng.choice(places or [0])] = rng.choice(b"0123456789-e")


DAMAGE: tuple[Callable[[bytearray, random.Random], None], ...] = (
    _flip,
    _flip_early,
    _flip_late,
    _cut,
    _remove,
    _repeat,
    _noise,
    _huge,
    _digits,
)


def damaged(whole: bytes, number: int) -> tuple[str, bytes]:
    """The name of the damage and the damaged bytes; the same for the same number."""
    rng = random.Random(number)
    do = rng.choice(DAMAGE)
    data = bytearray(whole)
    do(data, rng)
    return do.__name__.strip("_"), bytes(data)


# ------------------------------------------------------------------------------------------ the opening process

FORBIDDEN = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "pty.spawn", "socket.connect")
TOUCHING = ("os.remove", "os.rename", "os.rmdir", "shutil.rmtree", "os.chmod")


def _watch(alarms: list[str]) -> None:
    """Note every event by which code out of a file could do something."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[1], str) and bool(set(arguments[1]) & set("wax+"))
        if event.startswith(FORBIDDEN) or event in TOUCHING or writes:
            alarms.append(f"{event} {arguments!r:.200}")

    sys.addaudithook(hook)


def _open(path: Path) -> None:
    import allocator

    if path.suffix == ".json":
        allocator.Allocation.load(path)
        return
    model = allocator.load_model(path, arch=None)
    model.state_dict()


def serve() -> None:
    """Open the files that stdin names, one line each, and say what happened; the limits hold for this process."""
    import torch

    import allocator
    from allocator.recipes import scalenet

    assert scalenet
    assert torch
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    alarms: list[str] = []
    _watch(alarms)
    for line in sys.stdin:
        path = Path(line.strip())
        try:
            _open(path)
            said = "opened"
        except allocator.AllocatorError as error:
            said = type(error).__name__ if str(error).strip() else "an error without a message"
            said = "weights alone" if "weights alone" in str(error) else said
        except BaseException as error:
            said = f"FAILED {type(error).__name__}: {error!s:.200}"
        if alarms:
            said = f"FAILED ran {alarms.pop()}"
            alarms.clear()
        sys.stdout.write(json.dumps(said) + "\n")
        sys.stdout.flush()


@dataclass
class Outcome:
    """What became of the damaged files.

    Attributes:
        counts: by kind of file, how often each thing happened.
        failures: what should not have been, with the number that makes it again.
        memory: most resident memory of the process, in MiB.
    """

    counts: dict[str, collections.Counter[str]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    memory: int = 0


def fuzz(count: int, first: int = 0) -> Outcome:
    """Damage and open `count` files, all kinds in turn, in a process of its own that is started again if it dies."""
    outcome = Outcome()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subjects = write_subjects(folder)
        server = _start()
        for number in range(first, first + count):
            subject = subjects[number % len(subjects)]
            damage, data = damaged(subject.read_bytes(), number)
            target = folder / f"damaged{subject.suffix}"
            target.write_bytes(data)
            said = _ask(server, target)
            if said is None:
                said = f"FAILED the process died with status {server.wait(30)}"
                server = _start()
            outcome.memory = max(outcome.memory, peak(server))
            if said.startswith("FAILED"):
                outcome.failures.append(f"{subject.name}, {damage}, number {number}: {said}")
                said = "FAILED"
            outcome.counts.setdefault(subject.name, collections.Counter())[said] += 1
        assert server.stdin is not None
        server.stdin.close()
        server.wait(30)
    return outcome


def peak(server: subprocess.Popen[str]) -> int:
    """Most resident memory of the process so far, in MiB."""
    status = Path(f"/proc/{server.pid}/status").read_text()
    return int(re.findall(r"VmHWM:\s*(\d+) kB", status)[0]) // 1024


def _start() -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(__file__).resolve()), "--serve"]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def _ask(server: subprocess.Popen[str], path: Path) -> str | None:
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(f"{path}\n")
    server.stdin.flush()
    line = server.stdout.readline()
    return str(json.loads(line)) if line else None


# ------------------------------------------------------------------------------------------ the table


def table(outcome: Outcome, count: int, first: int) -> str:
    """The outcome as Markdown."""
    said = sorted({key for counts in outcome.counts.values() for key in counts})
    lines = [
        "# Damaged files",
        "",
        f"Made by `python tests/fuzz.py --count {count} --first {first} --write benchmarks/results/fuzz.md`.",
        f"{count:,} files, damaged by flipped bits, cuts, removed, repeated and random pieces, huge numbers and other",
        "digits, were opened in a process with an audit hook that notes every command, connection and write, and a",
        f"limit of {MEMORY // 2**30} GiB of address space beyond the libraries. The process used at most",
        f"{outcome.memory:,} MiB, the libraries included.",
        "",
        f"| file | {' | '.join(said)} |",
        f"|---|{'---|' * len(said)}",
    ]
    lines += [
        f"| {name} | {' | '.join(str(counts[key]) for key in said)} |"
        for name, counts in sorted(outcome.counts.items())
    ]
    lines += [
        "",
        "`opened` is right where the damage meets bytes that carry no meaning, or data that has no checksum (an",
        "allocation or result of version 1). `weights alone` are state_dicts that were read and need `--arch`.",
        "",
        f"Failures: {len(outcome.failures)}.",
        *(f"- {each}" for each in outcome.failures),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=4000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve()
        return
    outcome = fuzz(args.count, args.first)
    text = table(outcome, args.count, args.first)
    print(text)
    if args.write:
        args.write.write_text(text, encoding="utf-8")
    sys.exit(1 if outcome.failures else 0)


if __name__ == "__main__":
    main()
