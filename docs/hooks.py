"""What mkdocs has to know of the tree around docs/.

README and its neighbours are pages of the site, and plots are its pictures. A link to any other
file of the tree becomes the file's path. A link to a file that is not there fails
`mkdocs build --strict`.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
# files outside docs/ that are pages -> their names in the site
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "kernels/README.md": "kernels.md",
}
PLOTS = "benches/plots"
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
WORD = re.compile(r"<code>([^\s<]{1,24})</code>")  # site.css keeps it on one line
PERCENT = re.compile(r"(<pre.*?</pre>)|(?<=\d) %", re.S)  # a number and its sign, outside of code
FENCE = re.compile(r"(^```.*?^```$)", re.M | re.S)
FILE = re.compile(r"\A(```\w+) .+")  # a fence that names a file, as tests read it
log = logging.getLogger("mkdocs.hooks")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, name in PAGES.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    for plot in sorted((ROOT / PLOTS).glob("*.png")):
        files.append(File.generated(config, f"plots/{plot.name}", abs_src_path=str(plot)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    places = {name: source for source, name in PAGES.items()}
    source = places.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    parts = FENCE.split(markdown)
    return "".join(
        FILE.sub(r"\1", p) if p.startswith("```") else _relinked(p, source) for p in parts
    )


def on_page_content(html: str, **_: Any) -> str:
    html = WORD.sub(r'<code class="word">\1</code>', html)
    return PERCENT.sub(lambda found: found[1] or "&nbsp;%", html)


def _relinked(text: str, source: str) -> str:
    """The text of a page of the tree with its links as the site has them."""

    def new(link: re.Match[str]) -> str:
        mark, words, target = link.groups()
        if re.match(r"[a-z]+:|#", target):
            return link[0]
        path, _, anchor = target.partition("#")
        place = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if not (ROOT / place).exists():
            log.warning("%s links to %s, which is not there", source, target)
            return link[0]
        if place in PAGES:
            name = PAGES[place]
        elif place.startswith(f"{PLOTS}/"):
            name = f"plots/{posixpath.basename(place)}"
        elif place.startswith("docs/"):
            name = place.removeprefix("docs/")
            if words == name:  # a reader of the site sees no file names
                words = name.removesuffix(".md").replace("-", " ")
        else:
            return f"{words} (`{place}`)"
        return f"{mark}[{words}]({name}{'#' + anchor if anchor else ''})"

    return LINK.sub(new, text)
