"""What the site needs beyond mkdocs and its plugins.

- Navigation: the lists of ``docs/index.md`` and its twins, so that it is said once per language.
- Links that leave ``docs/`` lead to pages of the site, which show the file or list the folder.
- Formulas become MathML, which browsers draw without a script.
- Chinese texts are cut into words for the search, by the segmenter that BM25 uses too.

The Markdown itself stays as a Git host shows it.
"""

import html
import posixpath
import re
import unicodedata
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import rjieba
from latex2mathml.converter import convert
from material.plugins.search import plugin as search
from mkdocs.plugins import event_priority, get_plugin_logger
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
log = get_plugin_logger(__name__)
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
LANGUAGE_LINK = re.compile(r"^\[(?:English|简体中文)\]\([^)]*\)(?: · )?", re.MULTILINE)
HEAD_LINES = re.compile(
    r"^(?:\[(?:English|简体中文)\]|\[?!\[[^]]*\]\(https?:).*\n", re.MULTILINE
)  # links and badges at the top of README
ITEM = re.compile(r"^- \[([^]]+)\]\(([^)]+)\)", re.MULTILINE)
OPENING_ENDS = re.compile(r"^(?:## |<!-- opening ends -->)", re.MULTILINE)
PICTURE = re.compile(r'\b(src|srcset)="(?!\w+:|/)([^"]+)"')  # HTML, which mkdocs leaves alone
FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL
)  # as arithmatex leaves it
outside: dict[str, Path] = {}
"""Pages of files that lie outside docs/: from the page's name to the file or folder, from ROOT."""


def on_config(config: Any) -> None:
    """The navigation of the language that is built next."""
    search.jieba = SimpleNamespace(cut=lambda text: rjieba.cut(text.decode()))
    language = config.plugins["i18n"].current_language or "en"
    index = "index.md" if language == "en" else f"index.{language}.md"
    config.nav = [index]
    for section in listed(index).split("\n## ")[1:]:
        pages = [{title: name_of(Path("docs") / target)} for title, target in ITEM.findall(section)]
        config.nav.append({section.split("\n")[0]: pages})


def listed(index: str) -> str:
    """The sections of an index, without its head."""
    text = (ROOT / "docs" / index).read_text(encoding="utf-8")
    return text[text.index("\n## ") :]


@event_priority(50)  # before i18n sorts the files by language
def on_files(files: Files, config: Any) -> Files:
    """Add a page for every file outside docs/ that a page links to, and for what that links to."""
    outside.clear()
    waiting = [Path("docs") / file.src_uri for file in files.documentation_pages()]
    while waiting:
        source = waiting.pop()
        for target, _ in LINK.findall(text_of(source)):
            path = clean(folder_of(source) / target)
            name = name_of(path)
            if name in outside or not needs_page(path):
                continue
            outside[name] = path
            waiting.append(path)
            file = File(name, config.docs_dir, config.site_dir, config.use_directory_urls)
            file.inclusion = InclusionLevel.NOT_IN_NAV
            files.append(file)
    return files


def on_page_read_source(page: Page, config: Any) -> str | None:
    path = outside.get(page.file.src_uri)
    return text_of(path) if path else None


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    name = page.file.src_uri
    source = outside.get(name, Path("docs") / name)
    if re.fullmatch(r"index(\.[\w-]+)?\.md", name):
        markdown = with_opening(markdown, name)
    if name.startswith("configuration."):
        row = r"^\| `([\w.]+)` \|(?=.*\|.*\|)"
        anchor = r'| <a id="\1" href="#\1">`\1`</a> |'
        markdown = re.sub(row, anchor, markdown, flags=re.MULTILINE)
    markdown = LANGUAGE_LINK.sub("", markdown)
    markdown = re.sub(r"<!-- (::: [\w.]+) -->", r"\1", markdown)  # for mkdocstrings
    file: Any = page.file  # static-i18n gives it its locale
    own = file.locale == file.locale_alternate_of  # else English, for want of another
    markdown = relinked(markdown, source, name, anchors=own)

    def picture(found: re.Match[str]) -> str:
        folder = "" if found[2].startswith("docs/") else posixpath.dirname(name)
        uri = posixpath.normpath(posixpath.join(folder, found[2].removeprefix("docs/")))
        drawn = files.get_file_from_path(uri)
        if drawn is None:
            log.warning(f"{source}: no such picture: {found[2]}")
            return found[0]
        return f'{found[1]}="{drawn.url_relative_to(page.file)}"'

    return PICTURE.sub(picture, markdown)


def on_page_content(content: str, page: Page, config: Any, files: Files) -> str:
    if page.file.src_uri.startswith("configuration."):
        content = f'<div class="configuration">{content}</div>'
    return FORMULA.sub(lambda found: mathml(found, page), content)


def mathml(found: re.Match[str], page: Page) -> str:
    """A formula as MathML, left out of the search's index."""
    tag, formula = found[1], html.unescape(found[2]).replace(r"\arg", r"\mathrm{arg}\,")
    shown = convert(formula, display="block" if tag == "div" else "inline")
    if unknown := re.findall(r"\\[A-Za-z]+", shown):
        log.warning(f"{page.file.src_uri}: {unknown} of a formula has no MathML: {formula}")
    shown = re.sub(r'<mi mathvariant="script">([A-Z])</mi>', script_letter, shown)
    wide = ' class="formula" tabindex="0"' if tag == "div" else ""  # it may have to be scrolled
    return f"<{tag} data-search-exclude{wide}>{shown}</{tag}>"


def script_letter(found: re.Match[str]) -> str:
    """As a character of its own: browsers draw no ``mathvariant`` but ``normal``."""
    for kind in ("MATHEMATICAL SCRIPT CAPITAL", "SCRIPT CAPITAL"):
        with suppress(KeyError):
            return f"<mi>{unicodedata.lookup(f'{kind} {found[1]}')}</mi>"
    raise AssertionError(found[1])


def with_opening(markdown: str, name: str) -> str:
    """The landing page: README up to its first section, then the list of pages."""
    readme = Path(name.replace("index", "README"))
    opening = OPENING_ENDS.split((ROOT / readme).read_text(encoding="utf-8"), maxsplit=1)[0]
    return relinked(HEAD_LINES.sub("", opening), readme, name) + listed(name)


def relinked(markdown: str, source: Path, name: str, anchors: bool = True) -> str:
    """Links of a text that lies at ``source``, as links of the page ``name``.

    Args:
        anchors: false for a text in another language than the site's; headings are translated.
    """

    def link(found: re.Match[str]) -> str:
        path = clean(folder_of(source) / found[1])
        if not (ROOT / path).exists():
            return found[0]  # mkdocs names it
        target = name_of(path)
        anchor = found[2] or ""
        if anchor.startswith("#L") or not (anchors or (name in outside and target in outside)):
            anchor = ""  # the first is a line of a source file
        return posixpath.relpath(target, posixpath.dirname(name) or ".") + anchor

    return LINK.sub(link, markdown)


def folder_of(path: Path) -> Path:
    return path if (ROOT / path).is_dir() else path.parent


def clean(path: Path) -> Path:
    return Path(posixpath.normpath(path.as_posix()))


def needs_page(path: Path) -> bool:
    """Whether mkdocs has no page of it by itself."""
    if path.parts[:1] == ("docs",) and not (ROOT / path).is_dir():
        return False
    return (ROOT / path).exists() and not re.fullmatch(r"README(\.[\w-]+)?\.md", path.as_posix())


def name_of(path: Path) -> str:
    """The page that shows a file or folder, as mkdocs names pages."""
    path = clean(path)
    if (ROOT / path).is_dir():
        path /= "README.md" if (ROOT / path / "README.md").is_file() else "files.md"
    name = path.as_posix()
    if name.startswith("docs/"):
        return name.removeprefix("docs/")
    if re.fullmatch(r"README(\.[\w-]+)?\.md", name):
        return name.replace("README", "index")
    return name if path.suffix == ".md" else f"{name.replace('.', '-')}.md"  # .py is no language


def text_of(path: Path) -> str:
    """The Markdown that shows a file of the repository, or lists a folder."""
    file = ROOT / path
    if file.is_dir() and (file / "README.md").is_file():
        return (file / "README.md").read_text(encoding="utf-8")
    if file.is_dir():
        names = sorted(each.name for each in file.iterdir() if each.is_file())
        return "\n".join([f"# `{path}`", "", *(f"- [{name}]({name})" for name in names)])
    text = file.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    kinds = {".py": "python", ".sh": "bash", ".sbatch": "bash", ".yml": "yaml"}
    return f"# `{path}`\n\n````{kinds.get(path.suffix, path.suffix[1:])}\n{text}\n````\n"
