"""Links from a page to a file of the repository that has a page of its own in the site.

The pages are also read in the repository, where they link to ``../CONTRIBUTING.md`` or ``../examples/``. In the site
these links lead to the page that shows the file. A link to any other file outside docs/ becomes a download.
"""

from __future__ import annotations

import posixpath
import re

from sphinx.application import Sphinx

PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples": "examples/index.md",
    "experiments/results/cifar10-small/README.md": "results_cifar10_small.md",
}
LINK = re.compile(r"(?<=\]\()([^)#\s:]+)(?=[)#])")


def page_of(target: str, docname: str) -> str:
    """Return the target of a link of the page ``docname``, a file of the repository replaced by the page that shows it."""
    inside = posixpath.normpath(posixpath.join("docs", posixpath.dirname(docname), target))
    name, _, suffix = inside.rpartition("/")
    page = f"examples/{suffix.removesuffix('.py')}.md" if name == "examples" and suffix.endswith(".py") else None
    page = PAGES.get(inside, page)
    if page is not None:
        return posixpath.relpath(page, posixpath.dirname(docname) or ".")
    is_outside = not inside.startswith("docs/") and inside.endswith(".md")
    return f"path:{target}" if is_outside else target  # MyST takes any .md for a page


def rewrite(app: Sphinx, docname: str, content: list[str]) -> None:
    """Replace the links of a page before it is parsed."""
    content[0] = LINK.sub(lambda match: page_of(match[1], docname), content[0])


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect the event."""
    app.connect("source-read", rewrite)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
