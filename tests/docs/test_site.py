"""`make docs`: the site builds without a warning, its links lead somewhere, and it needs nothing from elsewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests import ROOT, cases

LOADED = {("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src")}  # by a browser, unasked


class Page(HTMLParser):
    """The links of a page, the files it loads, and its ids."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.ids: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.ids.add(value)
            elif tag == "a" and name == "href" and value:
                self.links.append(value)
            elif value and ((tag, name) in LOADED or ((tag, name) == ("link", "href") and not is_navigation(attrs))):
                self.loaded.append(value)


def is_navigation(attrs: list[tuple[str, str | None]]) -> bool:
    """Return whether a link in the head names another page, which no browser loads."""
    return dict(attrs).get("rel") in {"next", "prev", "index", "search", "canonical"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site as the Makefile does, with its options, in another folder."""
    for package in ("furo", "myst_parser", "sphinx_design", "sphinx_copybutton"):
        pytest.importorskip(package, reason=f"{package} is missing: pip install -r requirements-dev.txt")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    command = re.search(r"\$\(BIN\)/python (-m sphinx .*)", makefile)
    assert command is not None and {"--fail-on-warning", "--keep-going"} <= set(command[1].split())
    folder = tmp_path_factory.mktemp("site")
    arguments = (
        command[1].replace("build/doctrees", str(folder / "doctrees")).replace("build/docs", str(folder / "html"))
    )
    result = subprocess.run(
        [sys.executable, *arguments.split()],
        cwd=ROOT,
        **{"capture_output": True, "text": True, "timeout": cases.PATIENCE},
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return folder / "html"


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html") if "_static" not in path.parts}


def test_every_internal_link_leads_to_a_page_and_to_a_place_in_it(pages: dict[Path, Page]) -> None:
    broken = defaultdict(list)
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or link == "#":  # "#" is a button
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            found = pages.get(target)
            if not target.exists() or (parts.fragment and found and unquote(parts.fragment) not in found.ids):
                broken[path.name].append(link)
    assert len(pages) > 80 and sum(len(page.links) for page in pages.values()) > 1000
    assert dict(broken) == {}


def test_no_page_loads_anything_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    assert {
        link for page in pages.values() for link in page.loaded if urlsplit(link).scheme not in ("", "data")
    } == set()
    for path in site.rglob("*.css"):
        urls = re.findall(r"(?:url\(|@import )['\"]?(https?:[^)'\"]*)", path.read_text(encoding="utf-8"))
        assert urls == [], path.name


def test_the_site_has_the_parts_that_readers_look_for(site: Path) -> None:
    names = {path.relative_to(site).as_posix().removesuffix(".html") for path in site.rglob("*.html")}
    assert {"getting_started", "guides", "concepts", "examples/index", "troubleshooting", "command_line"} <= names
    assert {"benchmarks", "results", "architecture", "contributing", "changelog", "search"} <= names
    assert {"api/generated/delfast.localize", "api/generated/delfast.unlearning.Scrub"} <= names


def test_every_option_of_the_command_line_is_there(site: Path) -> None:
    text = re.sub(r"<[^>]*>", "", (site / "command_line.html").read_text(encoding="utf-8"))
    for words in ("delfast verify", "--stop-when-stable", "--cuda-graphs", "--held-out", "Default: 0.1.", "Required."):
        assert words in text, words
    assert "[default" not in text


def test_search_finds_words_of_every_kind_of_page(site: Path) -> None:
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    for word in ("batchnorm", "oracl", "torchrun"):  # stems
        assert f'"{word}"' in index or f"{word}:" in index, word


WIDE = ("index.html", "benchmarks.html", "command_line.html", "api/index.html", "api/generated/delfast.html")
MEASURE = """<html><body><pre id="found"></pre><script>
async function measure() {
  const found = [];
  for (const width of [1280, 390]) for (const page of PAGES) {
    const frame = document.createElement("iframe");
    frame.style.cssText = `width: ${width}px; height: 900px; border: 0`;
    frame.src = page;
    document.body.appendChild(frame);
    await new Promise(resolve => { frame.onload = resolve; });
    const shown = frame.contentDocument, root = shown.documentElement;
    found.push(`${page} at ${width}: ${root.scrollWidth - root.clientWidth} px too wide`);
    for (const name of shown.querySelectorAll("table.autosummary td:first-child code"))
      if (name.getClientRects().length !== 1) found.push(`${page} at ${width}: '${name.textContent}' breaks`);
    frame.remove();
  }
  document.getElementById("found").textContent = found.join("\\n");
}
measure();
</script></body></html>
"""


def test_no_page_scrolls_sideways_and_no_name_of_the_api_breaks(site: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("expected chromium or google-chrome to measure pages with; install one")
    (site / "measure.html").write_text(MEASURE.replace("PAGES", str(list(WIDE))), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=30000", "--window-size=1400,1000"]
    local = ["--allow-file-access-from-files", "--disable-web-security", f"--user-data-dir={tmp_path}"]  # reads iframes
    done = subprocess.run(
        [browser, *options, *local, "--dump-dom", (site / "measure.html").as_uri()],
        **{"capture_output": True, "text": True, "timeout": cases.PATIENCE},
    )
    (site / "measure.html").unlink()
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    assert found is not None, done.stderr
    assert found[1].splitlines() == [f"{page} at {width}: 0 px too wide" for width in (1280, 390) for page in WIDE]
