"""Links of a page, or of a file that it includes, to a file of the repository.

The pages are also read in the repository, where they link to ``../CONTRIBUTING.md`` or ``../examples``. In the site
these links lead to the page that shows the file. A link to another file outside docs/ becomes a download.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from sphinx.application import Sphinx

DOCS = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples": "examples/index.md",
}
TARGET = re.compile(r"(?<=\]\()([^)#\s:]+)(?=[)#])")


def page_of(file: str) -> str | None:
    """Return the page below docs/ that shows a file of the repository, if there is one."""
    page = PAGES.get(file)
    if example := re.fullmatch(r"examples/(\w+)\.py", file):
        page = f"examples/{example[1]}.md"
    elif result := re.fullmatch(r"experiments/results/([\w-]+)/(README|report)\.md", file):
        page = f"results_{result[1].replace('-', '_')}{'_report' if result[2] == 'report' else ''}.md"
    return page if page and (DOCS / page).exists() else None


def target_in_site(target: str, folder: str, docname: str) -> str:
    """Return a link's target as the page ``docname`` needs it. In the repository the link is in ``folder``."""
    file = posixpath.normpath(posixpath.join(folder, target))
    page = page_of(file)
    path = posixpath.relpath(file if page is None else f"docs/{page}", f"docs/{docname}/..")
    is_outside = path.startswith("../") and not posixpath.normpath(f"docs/{docname}/../{path}").startswith("docs/")
    return f"path:{path}" if is_outside and path.endswith(".md") else path  # MyST takes any other .md for a page


def rewrite(content: list[str], folder: str, docname: str) -> None:
    """Replace the targets of links in a text before it is parsed."""
    content[0] = TARGET.sub(lambda match: target_in_site(match[1], folder, docname), content[0])


def rewrite_page(app: Sphinx, docname: str, content: list[str]) -> None:
    """Rewrite a page."""
    rewrite(content, posixpath.dirname(f"docs/{docname}"), docname)


def rewrite_included(app: Sphinx, path: Path, parent: str, content: list[str]) -> None:
    """Rewrite a file that the page ``parent`` includes. ``path`` is relative to docs/."""
    rewrite(content, posixpath.dirname(posixpath.normpath(f"docs/{path.as_posix()}")), parent)


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect the events."""
    app.connect("source-read", rewrite_page)
    app.connect("include-read", rewrite_included)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
