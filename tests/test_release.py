"""What a release holds: one version everywhere, files that hosts read, a wheel that works in an empty environment."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest
from test_packaging import clone, source, wheel  # noqa: F401 - fixtures

import allocator

ROOT = Path(__file__).parent.parent


def _yaml(path: str) -> Any:
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def test_the_version_is_the_same_everywhere() -> None:
    assert _yaml("CITATION.cff")["version"] == allocator.__version__
    released = re.findall(r"^## \[(\d[\w.]*)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert released[0] == allocator.__version__


def test_the_release_can_be_read_in_a_minute() -> None:
    """At the usual 240 words: what stands before the lists of all changes."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    section = text.split(f"## [{allocator.__version__}]")[1].split("\n### ")[0]
    assert 80 < len(section.split()) <= 240


@pytest.mark.parametrize("path", [".github/workflows/test.yml", ".gitlab-ci.yml"])
def test_hosts_run_what_a_contributor_runs(path: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"test", "libraries", "oldest", "unit"} == set(re.findall(r"\bmake ([a-z]+)", text)) & targets
    assert len(set(re.findall(r'"3\.\d+"', text))) >= 3
    jobs = _yaml(path)
    assert "gpu" in jobs or "gpu" in jobs["jobs"]


def test_forms_for_issues_ask_for_what_helps() -> None:
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form = _yaml(str(path.relative_to(ROOT)))
        if path.name != "config.yml":
            assert form["name"]
            assert form["description"]
            assert any(field.get("validations", {}).get("required") for field in form["body"])


def test_the_wheel_works_in_an_environment_of_its_own(wheel: Path, tmp_path: Path) -> None:  # noqa: F811
    """Nothing of this project is there but the wheel; what it needs is lent by this environment."""
    home = tmp_path / "environment"
    venv.create(home, with_pip=False)
    python = home / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*command, "--disable-pip-version-check", str(wheel)], check=True, timeout=120)
    packages = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    (Path(packages) / "lent.pth").write_text(sysconfig.get_path("purelib"))
    cli = python.with_name("allocator-cli")

    def run(*words: str) -> str:
        done = subprocess.run([cli, *words], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("--version").strip() == f"neuron-allocator {allocator.__version__}"
    facts = json.loads(run("allocate", "recipe:scalenet-small", "--flops", "60%", "-o", "small.safetensors", "--json"))
    assert facts["certificate"]["ok"]
    assert (tmp_path / "small.safetensors").exists()
