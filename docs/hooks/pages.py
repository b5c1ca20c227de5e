"""What the site takes from outside docs/: the README, the change log, benchmark results, and the command line's help.

Links are written as they work in the repository, and turned into links between pages here.
"""

from __future__ import annotations

import os
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from cli_page import cli_page  # noqa: E402
from figures import diagram  # noqa: E402
from mkdocs.structure.files import File, Files  # noqa: E402
from notebook import notebook_page  # noqa: E402
from options_table import options_table  # noqa: E402

from benchmarks.comparison import TABLES  # noqa: E402

TAKEN = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
"""Pages outside docs/, by their path in the repository."""

_LINK = re.compile(r"""(\]\(|\b(?:src|srcset|href)=")([^)"#\s:]+)""")
_TABLE = re.compile(r"^<!-- table: (\w+) -->$", re.MULTILINE)


def taken() -> dict[str, str]:
    """Path in the repository -> path in the site, of everything that does not lie in docs/."""
    results = (ROOT / "benchmarks" / "results").glob("*.*")
    return TAKEN | {f"benchmarks/results/{p.name}": f"benchmarks/{p.name}" for p in results if p.suffix != ".json"}


def link_code() -> None:
    """Lay adapters/ and recipes/ inside the package, where an installation has them, for the API reference."""
    package = ROOT / "build" / "docs-code" / "allocator"
    package.mkdir(parents=True, exist_ok=True)
    for source in [*(ROOT / "allocator").iterdir(), ROOT / "adapters", ROOT / "recipes"]:
        link = package / source.name
        if not link.is_symlink():
            link.symlink_to(source)


def on_startup(command: str, dirty: bool) -> None:
    """Before the plugins look for the code."""
    link_code()


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from outside docs/, and the one made from the code."""
    for source, page in taken().items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    files.append(File.generated(config, "cli.md", content=cli_page()))
    files.append(File.generated(config, "notebook.md", content=notebook_page(ROOT / "docs" / "notebook.ipynb")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Fill in tables and diagrams, and point links at the site's pages."""
    site = page.file.src_uri
    markdown = _TABLE.sub(lambda found: {**TABLES, "options": options_table}[found[1]](), markdown)
    markdown = diagram(markdown, ROOT / "docs", posixpath.dirname(site))
    return relink(markdown, site)


def relink(markdown: str, site: str) -> str:
    """Turn links between files of the repository into links between pages.

    Args:
        markdown: the page's text.
        site: the page's path in the site, such as `benchmarks/speed.md`.
    """
    moved = taken()
    places = {page: source for source, page in moved.items()}
    folder = posixpath.dirname(places.get(site, f"docs/{site}"))

    def point(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, found[2]))
        page = moved.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else None)
        if page is None:
            return found[0]
        return found[1] + os.path.relpath(page, posixpath.dirname(site) or ".").replace(os.sep, "/")

    return _LINK.sub(point, markdown)
