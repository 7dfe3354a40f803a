"""What a site must be: all Python runs, drawings have pictures, links and files are there, and no page asks another host."""

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pages
from sphinx.errors import ExtensionError

# Another host's address, in an attribute or a style; two slashes in the middle of a path are none.
OUTSIDE = re.compile(r"(?<![\w/.])(?:(?:https?|wss?):)?//[\w.\[-]+", re.IGNORECASE)
# In a script, two slashes alone begin a comment, and an address only behind a quotation mark.
CALLED = re.compile(r"(?:https?|wss?)://[\w.\[-]+|(?<=[\"'`])//[\w.\[-]+", re.IGNORECASE)
# Hosts that the theme's scripts and styles name, as namespaces and in comments, and do not ask.
NAMED = {"www.w3.org", "developer.mozilla.org", "clipboardjs.com", "snowballstem.org"}
# A picture that stands in the text itself: its letters may have two slashes too.
DATA = re.compile(r"\"data:[^\"]*\"|'data:[^']*'|data:[\w/+.;=-]*,[^\s\"'()]*", re.IGNORECASE)
# Of a link outside, what a reader follows and a browser does not: these attributes, and a <link> of these kinds alone.
TOLD = {"alt", "title", "cite", "placeholder", "itemtype"}
TELLS = {"alternate", "author", "canonical", "help", "index", "license", "me", "next", "prev", "up"}
URLS = ("href", "xlink:href", "src", "poster", "data", "action", "formaction")
HERE = re.compile(r"file:|(?:https?:)?//(?:localhost|127\.[\d.]+|0\.0\.0\.0|\[::1?\])(?![\w.-])", re.IGNORECASE)
DRAWS = re.compile(r"\bsubplots\(|\bpyplot\b|\bplt\.|\bplots\b|\bFigure\(")


class Page(HTMLParser):
    """What a file of the site has: places, links and files of its own site, addresses of other hosts, pictures that its cells made."""

    def __init__(self, file):
        super().__init__()
        self.places, self.links, self.asked, self.pictures, self.output = {"", "top"}, [], [], 0, 0
        {".html": self.feed, ".css": self.style, ".js": self.script}[file.suffix](file.read_text(errors="replace"))

    def handle_starttag(self, tag, attributes):
        given = {name: (value or "").strip() for name, value in attributes}
        self.places |= {given.get("id"), given.get("name") if tag == "a" else None}
        self.links += [given[name] for name in URLS if name in given]
        for name in ("srcset", "imagesrcset"):
            self.links += re.findall(r"(\S*[^,\s])(?:\s[^,]*)?", given.get(name, ""))
        kinds = set(given.get("rel", "").lower().split())
        told = set(TOLD)
        if tag in ("a", "area") or (tag == "link" and kinds and kinds <= TELLS):
            told |= {"href", "xlink:href"}
        if tag == "meta" and "http-equiv" not in given:
            told.add("content")
        for name, value in given.items():
            if name == "style":
                self.style(value)
            elif name not in told and not name.startswith(("xmlns", "aria-")):
                self.asked += OUTSIDE.findall(DATA.sub("", value))
        if self.output or "cell_output" in given.get("class", "").split():
            self.output += tag == "div"
            self.pictures += tag == "img"

    def handle_endtag(self, tag):
        self.output -= tag == "div" and self.output > 0

    def handle_data(self, text):
        if self.cdata_elem == "style":
            self.style(text)
        elif self.cdata_elem == "script":
            self.script(text)

    def style(self, text):
        text = DATA.sub("", re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL))
        self.asked += [url for url in OUTSIDE.findall(text) if url.partition("//")[2].lower() not in NAMED]
        named = re.findall(r"(?:url\(|@import)\s*(?:\"([^\"]+)\"|'([^']+)'|(?!url\()([^'\")\s;]+))", text, re.IGNORECASE)
        self.links += ["".join(each).strip() for each in named]

    def script(self, text):
        self.asked += [url for url in CALLED.findall(text) if url.partition("//")[2].lower() not in NAMED]


def follow(link, file, folder, found):
    """What is wrong with a link of a file, or nothing."""
    if HERE.match(link):
        return "which only the machine has that wrote it"
    if re.match(r"[a-z][a-z0-9+.-]*:|//", link, re.IGNORECASE):
        return None
    path, _, place = link.partition("#")
    path, place = unquote(path.partition("?")[0]), place.partition(":~:")[0]
    target = (file.parent / path).resolve() if path else file
    target = target / "index.html" if target.is_dir() else target
    if not target.is_relative_to(folder) or not target.exists():
        return "which is not there"
    if target.suffix == ".html" and target in found and not {place, unquote(place)} & found[target].places:
        return "which has no such place"
    return None


def verify(folder, source):
    """All that is wrong with the site in a folder, built from the pages of another."""
    # MathJax is a package as it was published; only its menu's speech would ask a host.
    files = [file for file in sorted(folder.rglob("*.*")) if "mathjax" not in file.relative_to(folder).parts]
    wrong, found = [], {file: Page(file) for file in files if file.suffix in (".html", ".css", ".js")}
    for file, page in found.items():
        name = file.relative_to(folder)
        wrong += [f"{name} asks {url} of another host" for url in page.asked]
        wrong += [f"{name} links to {link}, {why}" for link in page.links if (why := follow(link, file, folder, found))]
    for page in pages.sources(source):
        name = page.relative_to(source)
        built = found.get(folder / name.with_suffix(".html"))
        shown = "\n".join(cell["shown"] or "" for cell in pages.CELL.finditer(page.read_text()))
        if not built:
            wrong.append(f"{name} is a page that was not built")
        elif not built.pictures and (DRAWS.search(shown) or (name.parts[0] == "lessons" and name.stem != "index")):
            wrong.append(f"{name} draws, or is a lesson, and its cells made no picture")
    return wrong


def refuse(wrong):
    if wrong:
        raise ExtensionError("The site is not what it must be:\n" + "\n".join(wrong))


def before(app):
    source = Path(app.srcdir)
    refuse([f"{page.relative_to(source)}, {each}" for page in pages.sources(source) for each in pages.complaints(page.read_text())])


def after(app, exception):
    if exception is None and app.builder.name == "html":
        refuse(verify(Path(app.outdir).resolve(), Path(app.srcdir)))


def setup(app):
    # Before anything runs, which takes minutes, and after the static files have been copied.
    app.connect("builder-inited", before)
    app.connect("build-finished", after, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
