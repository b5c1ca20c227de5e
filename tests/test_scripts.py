"""TorchScript archives: the same numbers, names and allocation as the module they were made from, and nothing runs."""

from __future__ import annotations

import enum
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz
import pytest
import torch
from subjects import IMAGE, trained, untouched
from torch import nn

import allocator
from allocator.cli import main
from allocator.errors import AllocatorError, FileError, UnsafeFileError, UnsupportedModelError
from allocator.io.files import load_model

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
SMALL, LARGE = torch.zeros(1, 1, 32, 32), torch.zeros(1, 3, 64, 64)
WAYS: dict[str, Callable[[nn.Module, torch.Tensor], Any]] = {
    "scripted": lambda model, _: torch.jit.script(model),
    "traced": torch.jit.trace,
}
LONG = (
    "torchvision:resnet18",
    "torchvision:mobilenet_v3_small",
    "torchvision:googlenet",
    "torchvision:resnext50_32x4d",
    "torchvision:densenet121",
    "timm:res2net50_26w_4s",
    "timm:skresnet18",
)
NETWORKS = [
    ("recipe:scalenet-small-seed", SMALL, "traced"),
    ("recipe:res2net-small", SMALL, "traced"),
    ("torchvision:shufflenet_v2_x0_5", LARGE, "scripted"),
    *(pytest.param(name, LARGE, way, marks=pytest.mark.sweep) for name in LONG for way in WAYS),
]


def _first(outputs: Any) -> Any:
    """The logits, where a scripted network gives those of its auxiliary heads beside them."""
    return outputs if isinstance(outputs, torch.Tensor) else outputs[0]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scripts") / "m.pt"
    torch.jit.script(trained()).save(path)
    return path


@pytest.mark.parametrize(("name", "image", "way"), NETWORKS)
def test_an_archive_is_allocated_like_its_module(tmp_path: Path, name: str, image: torch.Tensor, way: str) -> None:
    model = trained(allocator.build(name))
    script = WAYS[way](model, image)
    script.save(tmp_path / "m.ts")
    program = load_model(tmp_path / "m.ts")
    given = torch.randn(3, *image.shape[1:])
    torch.testing.assert_close(program(given), _first(script(given)), atol=1e-6, rtol=1e-6)
    assert program.state_dict().keys() == model.state_dict().keys()
    assert {n for n, _ in program.named_parameters()} == {n for n, _ in model.named_parameters()}
    with untouched(program):
        result = allocator.allocate(program, "60%", example_inputs=image)
    assert result.certificate.ok
    assert result.flops_before == allocator.trace(model, image).flops
    assert 0.58 * result.flops_before < result.flops_after <= 0.6 * result.flops_before
    assert result.model(given).shape == _first(model(given)).shape


def test_what_was_traced_says_its_size(tmp_path: Path) -> None:
    torch.jit.trace(trained(), IMAGE).save(tmp_path / "m.pt")
    assert allocator.trace(load_model(tmp_path / "m.pt")).flops == allocator.trace(trained(), IMAGE).flops


def test_report_allocate_and_export_an_archive(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    size = ["--input-size", "x".join(map(str, IMAGE.shape))]
    assert main(["report", str(written), "--json", *size]) == 0
    assert json.loads(capsys.readouterr().out)["blocks"]
    assert main(["allocate", str(written), "--flops", "60%", "-o", "s.pt", *size]) == 0
    assert main(["export", "s.pt", "-o", "s.pt2"]) == 0
    small, again = load_model("s.pt"), load_model("s.pt2")
    given = torch.randn(2, *IMAGE.shape[1:])
    torch.testing.assert_close(small(given), again(given))


def test_a_result_of_an_archive_says_its_size(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(written)]) == 1
    assert "--input-size" in capsys.readouterr().err
    size = ["--input-size", "x".join(map(str, IMAGE.shape))]
    assert main(["allocate", str(written), "--flops", "60%", "-o", "s.safetensors", *size]) == 0
    capsys.readouterr()
    assert main(["report", "s.safetensors", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["inputs"] == [list(IMAGE.shape)]


def test_tied_weights_stay_one(tmp_path: Path) -> None:
    model = trained()
    model.other = model.stem
    torch.jit.script(model).save(tmp_path / "m.pt")
    program = load_model(tmp_path / "m.pt")
    names = dict(program.named_parameters(remove_duplicate=False))
    assert names["other.weight"] is names["stem.weight"]
    assert len(list(program.parameters())) == len(list(model.parameters()))


# ------------------------------------------------------------------------------------------ what is followed


class Follows(nn.Module):
    """Decisions, loops and arithmetic that do not depend on what comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.drop = nn.Dropout(0.5)
        self.names = [1, 2]
        self.skip = None
        self.shift = nn.Parameter(torch.arange(4.0).reshape(4, 1, 1))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        assert x.dim() == 4
        found: list[torch.Tensor] = []
        for i, conv in enumerate(self.convs):
            x = conv(x) + self.shift * (i + 1)
            if i % 2 == 0 and self.skip is None:
                found.append(x)
        a, b = x.chunk(2, dim=1)
        n = len(self.names)
        while n > 0:
            a = a * 2
            n -= 1
        high, _ = torch.max(self.drop(a), dim=1, keepdim=True)
        return torch.cat([a, b, high], 1).reshape(x.shape[0], -1, x.shape[2] * x.shape[3]), found


def test_what_does_not_depend_on_the_input_is_worked_out(tmp_path: Path) -> None:
    model = Follows().eval()
    torch.jit.script(model).save(tmp_path / "m.pt")
    program = load_model(tmp_path / "m.pt")
    given = torch.randn(2, 4, 5, 6)
    out, found = model(given)
    for mine, its in zip(program(given), [out, *found], strict=True):
        torch.testing.assert_close(mine, its)


class Decides(nn.Module):
    """Decisions on the input that lead to nothing but errors, and a cast to its type."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 2 and x.dim() != 3:
            raise ValueError("two or three dims")
        return torch.nn.functional.linear(x, self.weight.to(x.dtype))


def test_decisions_that_only_raise_are_passed_by(tmp_path: Path) -> None:
    torch.jit.script(Decides()).save(tmp_path / "m.pt")
    given = torch.randn(2, 3)
    torch.testing.assert_close(load_model(tmp_path / "m.pt")(given), Decides()(given))


class Kind(enum.Enum):
    ONE = 1


class Enumerates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kind = Kind.ONE

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if self.kind == Kind.ONE else x


class Appends(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = [x]
        if x.shape[0] > 3:
            found.append(x)
        return torch.cat(found)


class Chooses(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        times = 2 if x.shape[0] > 3 else 3
        return x * times


class Branches(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool(x.sum() > 0):
            return x + 1
        return x - 1


class Sizes(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu() if x.shape[0] > 3 else x


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return x


class Loops(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(x.shape[0]):
            x = x + 1
        return x


class Takes(nn.Module):
    def forward(self, x: torch.Tensor, times: int) -> torch.Tensor:
        return x * times


class Endless(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = 0
        while n >= 0:
            n += 1
        return x


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Branches(), r"number or list of its input: bool\("),
        (Sizes(), "branches on its input: `if torch.gt"),
        (Counts(), "changes its own state: `self.seen`"),
        (Enumerates(), "holds .*Kind, which is no module but Enum"),
        (Appends(), "torch.append"),
        (Chooses(), "number of dims"),
        (Loops(), r"makes a number or list of its input: range\("),
        (Takes(), "takes times: int, which is not a tensor"),
    ],
)
def test_what_cannot_be_followed_is_named(tmp_path: Path, model: nn.Module, said: str) -> None:
    torch.jit.script(model).save(tmp_path / "m.pt")
    with pytest.raises(UnsupportedModelError, match=rf"m\.pt: the TorchScript program.*{said}.*give the Python model"):
        load_model(tmp_path / "m.pt")
    assert main(["report", str(tmp_path / "m.pt")]) == 1


def test_what_never_ends_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("allocator.io.programs.torchscript_interpreter._MOST_STATEMENTS", 1000)
    torch.jit.script(Endless()).save(tmp_path / "m.pt")
    with pytest.raises(UnsupportedModelError, match="more than 1,000 statements"):
        load_model(tmp_path / "m.pt")


def test_what_was_traced_in_training_is_refused(tmp_path: Path) -> None:
    torch.jit.trace(trained().train(), torch.randn(4, *IMAGE.shape[1:])).save(tmp_path / "m.pt")
    with pytest.raises(UnsupportedModelError, match="training mode"):
        load_model(tmp_path / "m.pt")


# ------------------------------------------------------------------------------------------ hostile archives


def _forge(source: Path, target: Path, entry: str, change: Callable[[bytes], bytes]) -> None:
    """The archive with one of its entries changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for item in old.infolist():
            data = old.read(item)
            new.writestr(item.filename, change(data) if item.filename.endswith(entry) else data)


class Plain(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "m.pt"
    torch.jit.script(Plain()).save(path)
    return path


def _forge_call(source: Path, target: Path, call: str) -> None:
    with zipfile.ZipFile(source) as archive:
        entry = next(name for name in archive.namelist() if name.endswith(".py"))
    _forge(source, target, entry, lambda text: text.replace(b"torch.relu(x)", call.encode()))


@pytest.mark.parametrize(
    "call",
    [
        'torch.from_file("ran", True, 10)',
        'torch.save(x, "ran")',
        'ops.aten.from_file("ran", True, 10)',
        'ops.profiler._record_function_enter("a")',
        '__import__("os").system("touch ran")',
        'open("ran", "w")',
        "().__class__.__bases__[0].__subclasses__()",
        "self.__class__.__init__.__globals__",
        "torch.os.system('touch ran')",
        "(lambda: x)()",
        "[x for _ in range(3)]",
        "torch.__class__",
        "CONSTANTS.c7",
        "torch.mul(9223372036854775807, 9223372036854775807)",
        "(self).forward(x, )",
        "x" + "[0]" * 20_000,
        "-" * 20_000 + "1",
    ],
)
def test_code_is_not_run(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    monkeypatch.chdir(tmp_path)
    _forge_call(plain, tmp_path / "m.pt", call)
    with pytest.raises((FileError, UnsupportedModelError)):
        load_model(tmp_path / "m.pt")
    assert not Path("ran").exists()


def _forge_body(source: Path, target: Path, *lines: str) -> None:
    """The forward, with other statements before what it returns."""
    with zipfile.ZipFile(source) as archive:
        entry = next(name for name in archive.namelist() if name.endswith(".py"))
    text = "".join(f"    {line}\n" for line in lines).encode()
    _forge(source, target, entry, lambda code: code.replace(b"    return torch.relu(x)\n", text))


DOUBLED = [f"a{i} = [a{i - 1}, a{i - 1}]" for i in range(1, 60)]


@pytest.mark.parametrize(
    "lines",
    [
        ["a0 = [1]", *DOUBLED, "b = torch.neg(a59)", "return x"],
        ["a0 = [1]", *DOUBLED, "return a59"],
        ["a0 = [x]", *DOUBLED, "return torch.cat(a59)"],
        ["a = [x]", "_0 = torch.append(a, a)", "return torch.cat(a)"],
        ["a = ops.aten.copy(range(1000000000000))", "return x"],
        ["n = 1", "while n:", f"  n = {' + '.join(['torch.add(n, n)'])}", "return x"],
        ["for i in range(400000):", f"  a = [{'i, ' * 100}]", "return x"],
        ["a = [1]", "for i in range(60):", "  a = torch.add(a, a)", "return x"],
        ["for i in range(400000):", "  x = torch.relu(x)", "return x"],
    ],
)
def test_what_takes_for_ever_is_stopped(plain: Path, tmp_path: Path, lines: list[str]) -> None:
    _forge_body(plain, tmp_path / "m.pt", *lines)
    with pytest.raises((FileError, UnsupportedModelError)):
        load_model(tmp_path / "m.pt")


@pytest.mark.parametrize(
    "lines",
    [
        ["for i in range(1000000000000):", "  return torch.relu(x)", "return x"],
        ["n = 3", "while n:", "  return torch.relu(x)", "return x"],
        ["a = {'k': x, 'l': inf}", "return torch.relu(a['k'])"],
        ["a = torch.add([1], [2])", "return torch.relu([x, x][torch.sub(a[torch.neg(1)], 1)])"],
        ["n = torch.add(torch.size(x, 0), 1)", "return torch.relu(torch.add(x, torch.sub(n, n)))"],
    ],
)
def test_what_ends_is_followed(plain: Path, tmp_path: Path, lines: list[str]) -> None:
    _forge_body(plain, tmp_path / "m.pt", *lines)
    given = torch.randn(2, 3)
    torch.testing.assert_close(load_model(tmp_path / "m.pt")(given), given.relu())


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["raise x"], "has the statement `raise x`"),
        (["return 3"], "gives 3, which is not a tensor"),
        (["ops.prim.RaiseException('no', 'E')", "return x"], "raises"),
        (["return torch.relu(x, x, x)"], "in a way that this torch does not know"),
        (["return x[0]"], "takes item 0 of"),
        (["a = torch.add([1], 2)", "return x"], "works out add of"),
        (["return x.nothing"], "reads the attribute nothing"),
        (["return torch.relu(x)(x)"], "calls `torch.relu"),
        (["return self.forward(x, x)"], "with other arguments than it takes"),
        (["return self.nothing"], "has no nothing"),
    ],
)
def test_what_cannot_be_followed_says_why(plain: Path, tmp_path: Path, lines: list[str], said: str) -> None:
    _forge_body(plain, tmp_path / "m.pt", *lines)
    with pytest.raises((FileError, UnsupportedModelError), match=said):
        load_model(tmp_path / "m.pt")


def test_torchs_own_reader_runs_default_arguments(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why it is not used: this archive writes a file when it is opened."""
    monkeypatch.chdir(tmp_path)

    def change(text: bytes) -> bytes:
        return text.replace(b"x: Tensor)", b'x: Tensor,\n    y: Tensor=torch.from_file("ran", True, 10))')

    _forge(plain, tmp_path / "m.pt", "test_scripts.py", change)
    with pytest.raises(UnsafeFileError, match="from_file"):
        load_model("m.pt")
    assert not Path("ran").exists()
    torch.jit.load("m.pt")
    assert Path("ran").exists()


class Runs:
    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


@pytest.mark.parametrize("entry", ["data.pkl", "constants.pkl"])
def test_a_pickle_is_not_obeyed(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str) -> None:
    monkeypatch.chdir(tmp_path)
    _forge(plain, tmp_path / "m.pt", entry, lambda _: pickle.dumps(Runs(), protocol=2))
    with pytest.raises(UnsafeFileError, match="system"):
        load_model("m.pt")
    assert not Path("ran").exists()


def test_a_memo_index_beyond_the_file_costs_no_memory(plain: Path, tmp_path: Path) -> None:
    _forge(plain, tmp_path / "m.pt", "data.pkl", lambda _: b"\x80\x02Nr\xff\xff\xff\x7f.")
    with pytest.raises(FileError, match="not a module"):
        load_model(tmp_path / "m.pt")


@pytest.mark.parametrize(("entry", "piece"), [("test_scripts.py", b"x=1\n"), ("data.pkl", b"]")])
def test_source_and_objects_beyond_all_bounds(plain: Path, tmp_path: Path, entry: str, piece: bytes) -> None:
    _forge(plain, tmp_path / "m.pt", entry, lambda data: data + piece * (5 * 2**20 // len(piece)))
    with pytest.raises(FileError, match="more than the"):
        load_model(tmp_path / "m.pt")


def test_tensors_that_share_their_bytes_over_and_over(tmp_path: Path) -> None:
    model, whole = Plain(), torch.zeros(2**20)
    for i in range(40):
        model.register_buffer(f"b{i}", whole[i:])
    torch.jit.script(model).save(tmp_path / "m.pt")
    assert (tmp_path / "m.pt").stat().st_size < 5 * 2**20
    with pytest.raises(FileError, match="over and over"):
        load_model(tmp_path / "m.pt")


def test_damaged_entries_are_told(written: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(written) as archive:
        entries = [name for name in archive.namelist() if name.endswith("data.pkl") or "/data/" in name]
    for entry in entries:
        _forge(written, tmp_path / "m.pt", entry, lambda data: data[: len(data) // 2])
        with pytest.raises(AllocatorError):
            load_model(tmp_path / "m.pt")


@pytest.mark.parametrize("count", [150, pytest.param(4000, marks=pytest.mark.sweep)])
@pytest.mark.parametrize("entry", ["data.pkl", ".py"])
def test_damage_that_its_checksums_do_not_show(written: Path, tmp_path: Path, entry: str, count: int) -> None:
    """Each opens or is refused by name: the code and the objects themselves are damaged, not the archive."""
    seen: set[type] = set()
    for number in range(count):

        def change(data: bytes, number: int = number) -> bytes:
            return fuzz.damaged(data, number)[1]

        _forge(written, tmp_path / "m.pt", entry, change)
        try:
            seen.add(type(load_model(tmp_path / "m.pt")))
        except AllocatorError as error:
            seen.add(type(error))
    assert FileError in seen


def test_a_script_read_before_anything_else_was_loaded_is_counted_alike(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3))
    torch.jit.script(network.eval()).save(tmp_path / "m.ts")
    command = ["allocate", "m.ts", "--flops", "60%", "--input-size", "1x1x12x12", "--json", "-q"]
    # A process of its own: this one has declared the operators long ago.
    line = [sys.executable, "-m", "allocator.cli", *command]
    ran = subprocess.run(
        line, cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    expected = allocator.trace(network, torch.zeros(1, 1, 12, 12)).flops
    assert json.loads(ran.stdout)["flops"]["before"] == expected
