"""
What mkdocs does beyond its settings: the whole repository can be linked.

The pages are written for two places, a file viewer of the repository and the site, so their links are paths in the
repository. Files outside `docs/` that a page links become part of the site: Markdown as pages, pictures as they are,
code and the rest as pages that show them. One section of a page can be a page of its own (`SECTIONS`), so that it is
written once. Pages that the navigation does not name come last in the section of their folder (`FOLDERS`).
"""

import logging
import posixpath
import re
import runpy
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File


ROOT = Path(__file__).resolve().parent.parent
DOCS = "docs/"
# sections of the navigation, and the folder of their pages
FOLDERS = {"How to": "howto", "Results": "results"}
# shown or downloaded as they are
FILES = {".png", ".svg", ".jpg", ".ipynb"}
# pages from outside `docs/` that the navigation names
PAGES = ("ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "MIGRATION.md", "examples/README.md")
# a README would be taken for the index of its folder
RENAMED = {"README.md": "overview.md"}
SECTIONS = {"glossary.md": ("ARCHITECTURE.md", "Glossary")}
LANGUAGES = {".py": "python", ".toml": "toml", ".json": "json", ".cff": "yaml", ".yml": "yaml", ".yaml": "yaml"}

LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
FENCE = re.compile(r"^\s*(`{3,}|~{3,})")

log = logging.getLogger("mkdocs.hooks.repository")
# page of the site -> file of the repository; filled by `on_files`
_origins: dict[str, str] = {}
_folder: tempfile.TemporaryDirectory | None = None


def prose(markdown: str) -> Iterator[tuple[str, bool]]:
    """The lines of a page, each with whether it is text (and not code)."""
    fence = ""
    for line in markdown.splitlines(keepends=True):
        found = FENCE.match(line)
        if fence:
            yield line, False
            if found and line.strip().startswith(fence):
                fence = ""
        else:
            yield line, not found
            fence = found[1] if found else ""


def section(markdown: str, title: str) -> str:
    """A second-level section of a page, as a page: without what is around it, its title at the first level."""
    lines, inside = [], False
    for line, is_text in prose(markdown):
        if is_text and line.startswith("## "):
            inside = line[3:].strip() == title
            line = line[1:]
        if inside:
            lines.append(line)
    if not lines:
        raise ValueError(f"There is no section {title!r}. Change SECTIONS in docs/hooks.py.")
    return "".join(lines)


def target_of(origin: str, link: str) -> str | None:
    """The file of the repository that a link of file `origin` means; None for an address or a file that is not."""
    if "://" in link or link.startswith(("/", "mailto:")):
        return None
    target = posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))
    return target if (ROOT / target).is_file() else None


def place(target: str) -> str:
    """Where a file of the repository is on the site."""
    path = PurePosixPath(target)
    if target.startswith(DOCS) and path.suffix != ".py":
        return target.removeprefix(DOCS)
    if path.suffix in FILES | {".md"}:
        return RENAMED.get(target, target)
    return f"source/{target}.md"


def content(target: str) -> str | None:
    """The Markdown of a file that is shown as a page; None where the file itself is what the site takes."""
    if not place(target).startswith("source/"):
        return None
    text = (ROOT / target).read_text(encoding="utf-8")
    language = LANGUAGES.get(PurePosixPath(target).suffix, "text")
    # pages of code would drown all others in the search
    head = f"---\ntitle: {target}\nhide: [toc]\nsearch:\n  exclude: true\n---\n\n# `{target}`\n\n"
    return f"{head}~~~~~~{language}\n{text}\n~~~~~~\n"


def links(origin: str) -> Iterator[str]:
    """The files of the repository that a page links."""
    for line, is_text in prose((ROOT / origin).read_text(encoding="utf-8")):
        for found in LINK.finditer(line) if is_text else ():
            if target := target_of(origin, found[2]):
                yield target


@event_priority(100)  # before mkdocstrings reads its settings
def on_config(config: Any) -> Any:
    """Lets mkdocstrings find the package: the checkout's folder may have any name, and holds more than the package."""
    global _folder
    setup = runpy.run_path(str(ROOT / "setup.py"))
    _folder = tempfile.TemporaryDirectory(prefix="ebt_docs_")
    package = Path(_folder.name) / setup["PACKAGE"]
    package.mkdir()
    for name in (*(f"{module}.py" for module in setup["ROOT_MODULES"]), *setup["SUBPACKAGES"]):
        if "." not in name.removesuffix(".py"):  # the others lie in those without a dot
            (package / name).symlink_to(ROOT / name)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [_folder.name]
    _complete(config.nav)
    return config


def _complete(navigation: list[Any]) -> None:
    """Adds the pages of a folder that the navigation does not name to the end of its section."""
    sections = {title: pages for entry in navigation if isinstance(entry, dict) for title, pages in entry.items()}
    for title, folder in FOLDERS.items():
        found = (f"{folder}/{file.name}" for file in sorted((ROOT / DOCS / folder).glob("*.md")))
        sections[title] += [page for page in found if page not in str(sections[title])]


def on_files(files: Any, *, config: Any) -> Any:
    """Adds the files outside `docs/` that pages link, and what those link."""
    _origins.clear()
    _origins.update({file.src_uri: DOCS + file.src_uri for file in files.documentation_pages()})
    waiting = [*_origins.values(), *PAGES]
    seen = set(_origins.values())
    while waiting:
        origin = waiting.pop()
        if origin not in seen:
            seen.add(origin)
            text = content(origin)
            file = File.generated(config, place(origin), content=text or (ROOT / origin).read_bytes())
            files.append(file)
            _origins[place(origin)] = origin
        if origin.endswith(".md"):
            waiting += [target for target in links(origin) if target not in seen and not _is_in_docs(target)]
    for page, (origin, title) in SECTIONS.items():
        text = section((ROOT / origin).read_text(encoding="utf-8"), title)
        files.append(File.generated(config, page, content=text))
        _origins[page] = origin
    return files


def _is_in_docs(target: str) -> bool:
    return target.startswith(DOCS) and not target.endswith(".py")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Turns links between files of the repository into links between pages of the site."""
    origin = _origins[page.file.src_uri]
    folder = posixpath.dirname(page.file.src_uri) or "."

    def relinked(found: re.Match[str]) -> str:
        target = target_of(origin, found[2])
        if target is None:
            return found[0]
        return f"{found[1]}{posixpath.relpath(place(target), folder)}{found[3] or ''}{found[4]}"

    return "".join(LINK.sub(relinked, line) if is_text else line for line, is_text in prose(markdown))


def on_post_build(*, config: Any) -> None:
    """Removes the links made for mkdocstrings."""
    if _folder is not None:
        _folder.cleanup()
