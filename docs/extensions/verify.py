"""What a built site must be: every page that draws has its picture, every link inside leads somewhere, and no page asks another host."""

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pages
from sphinx.errors import ExtensionError

OUTSIDE = re.compile(r"^(https?:)?//", re.IGNORECASE)
LOADED = {"script": ["src"], "img": ["src", "srcset"], "iframe": ["src"], "source": ["src", "srcset"], "video": ["src"], "embed": ["src"]}
# What a browser fetches of a <link>; others, such as rel="canonical", only tell.
FETCHED = {"stylesheet", "icon", "preload", "prefetch", "preconnect", "dns-prefetch", "manifest", "shortcut"}


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.asked, self.pictures = set(), [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = {name: value or "" for name, value in attributes}
        self.ids |= {attributes[name] for name in ("id", "name") if name in attributes}
        if tag == "a" and "href" in attributes:
            self.links.append(attributes["href"])
        self.pictures += tag == "img" and "logo" not in attributes.get("class", "")
        given = [attributes[name] for name in LOADED.get(tag, ()) if name in attributes]
        if tag == "link" and FETCHED & set(attributes.get("rel", "").split()):
            given.append(attributes.get("href", ""))
        self.asked += [url for url in given if OUTSIDE.match(url)]
        self.asked += [url for url in re.findall(r"url\(['\"]?([^'\")]+)", attributes.get("style", "")) if OUTSIDE.match(url)]


def draws(source):
    """Whether a page's own programs make pictures."""
    return any(word in found[0] for found in pages.CELL.finditer(source) for word in ("plt.", "plots.", "Figure("))


def verify(folder, source):
    """All that is wrong with the site in a folder, built from the pages of another."""
    wrong, found = [], {file: Page(file.read_text()) for file in sorted(folder.rglob("*.html"))}
    for file, page in found.items():
        name = file.relative_to(folder)
        wrong += [f"{name} asks {url} of another host" for url in page.asked]
        for link in page.links:
            if re.match(r"[a-z][a-z0-9+.-]*:", link, re.IGNORECASE):
                continue
            place, _, fragment = unquote(link).partition("#")
            target = (file.parent / place).resolve() if place else file
            target = target / "index.html" if target.is_dir() else target
            if not target.is_relative_to(folder) or not target.exists():
                wrong.append(f"{name} links to {link}, which is not there")
            elif fragment and target in found and fragment not in found[target].ids:
                wrong.append(f"{name} links to {link}, which has no such place")
        page_source = source / name.with_suffix(".md")
        if page_source.exists():
            text = page_source.read_text()
            if draws(text) and not page.pictures:
                wrong.append(f"{name} draws, but has no picture")
            if name.parts[0] == "lessons" and name.stem != "index" and not page.pictures:
                wrong.append(f"{name} is a lesson without a picture")
    for file in sorted(folder.rglob("*.css")):
        urls = re.findall(r"(?:url\(|@import )\s*['\"]?([^'\")\s;]+)", file.read_text(errors="replace"))
        wrong += [f"{file.relative_to(folder)} asks {url} of another host" for url in urls if OUTSIDE.match(url)]
    return wrong


def after(app, exception):
    if exception is None and app.builder.name == "html":
        wrong = verify(Path(app.outdir).resolve(), Path(app.srcdir))
        if wrong:
            raise ExtensionError("The site is not what it must be:\n" + "\n".join(wrong))


def setup(app):
    # After the static files have been copied.
    app.connect("build-finished", after, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
