"""What a distribution holds, and that it can be imported from anywhere, a clone's root included."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Folders of a clone, each with the package that an installation makes of it.
PACKAGES = {"allocator": "allocator", "adapters": "allocator/adapters", "recipes": "allocator/recipes"}
BESIDE = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")

# The backend's own calls (PEP 517), those that pip makes: no network, and no environment to be built first.
BUILD = """
import sys, warnings
from setuptools import build_meta
warnings.simplefilter("error")
getattr(build_meta, sys.argv[1])(sys.argv[2])
"""
IMPORT = """
import allocator, allocator.adapters, allocator.recipes
for module in (allocator, allocator.adapters, allocator.recipes):
    print(module.__file__)
"""


def _files(folder: Path) -> set[str]:
    """Paths of the files under a folder, relative to it."""
    paths = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix() for path in paths}


def _run(code: str, *args: str, cwd: Path, path: tuple[Path, ...] = ()) -> str:
    """What `python -c` prints in a folder, with these folders first on its path.

    `-S` reads no `.pth` file, so that an editable installation of this project puts its finder nowhere.
    """
    libraries = [entry for entry in sys.path if Path(entry).resolve() not in (Path.cwd(), ROOT, ROOT / "tests")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, path), *libraries])}
    command = [sys.executable, "-S", "-c", code, *args]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh clone, as far as a build looks at it."""
    root = tmp_path_factory.mktemp("clone")
    for folder in (*PACKAGES, "tests"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in BESIDE:
        shutil.copy(ROOT / name, root)
    return root


@pytest.fixture(scope="module")
def source(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution."""
    folder = tmp_path_factory.mktemp("source")
    _run(BUILD, "build_sdist", str(folder), cwd=clone)
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution, as `pip` builds it from an index."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(source) as archive:
        archive.extractall(folder, filter="data")
    _run(BUILD, "build_wheel", str(folder), cwd=folder / source.name.removesuffix(".tar.gz"))
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel is installed, and nothing else."""
    target = tmp_path_factory.mktemp("installed")
    options = ["--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(wheel)]
    subprocess.run(command, check=True, timeout=120)
    return target


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
    assert names == {f"{package}/{path}" for folder, package in PACKAGES.items() for path in _files(ROOT / folder)}
    assert {Path(name).suffix for name in names} == {".py", ".typed", ".json", ".css", ".js", ".html", ".yaml"}


def test_the_source_distribution_holds_the_packages_and_no_tests(source: Path) -> None:
    with tarfile.open(source) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    packaged = {f"{folder}/{path}" for folder in PACKAGES for path in _files(ROOT / folder)}
    assert packaged <= names
    assert {name for name in names - packaged if ".egg-info/" not in name} == {*BESIDE, "PKG-INFO", "setup.cfg"}


def test_in_a_clones_root_the_clone_is_imported_though_another_copy_is_installed(clone: Path, installed: Path) -> None:
    lines = _run(IMPORT, cwd=clone, path=(installed,)).splitlines()
    assert [Path(line).parent for line in lines] == [clone / folder for folder in PACKAGES]


@pytest.mark.parametrize("where", ["elsewhere", "in the clone, which is off the path"])
def test_the_installed_package_is_imported(where: str, clone: Path, installed: Path, tmp_path: Path) -> None:
    if where == "elsewhere":
        printed = _run(IMPORT, cwd=tmp_path, path=(installed,))
    else:
        printed = _run("import sys; sys.path.remove('')" + IMPORT, cwd=clone, path=(installed,))
    assert [Path(line).parent for line in printed.splitlines()] == [installed / path for path in PACKAGES.values()]
