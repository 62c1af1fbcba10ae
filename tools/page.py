"""Self-contained pages, assembled from the files in tools/pages/."""

import base64
import hashlib
import json
import re
from pathlib import Path
from urllib.parse import quote

PAGES = Path(__file__).resolve().parent / "pages"
ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8"><path d="M1 1h2v6H1zM5 5h2v2H5z" '
    'fill="#6a3df0"/><path d="M5 1h2v3H5z" fill="#999"/></svg>'
)


def assemble(name: str, title: str, data: dict, connect: str = "'none'") -> str:
    """The page `name` (view, demo) as one HTML file with style, scripts and `data` inside.

    Its Content-Security-Policy allows only this style and this script, by their hashes, and
    requests to `connect`. `data` becomes JSON in which no character can end its element.
    """
    style = (PAGES / "page.css").read_text()
    script = (PAGES / "page.js").read_text() + (PAGES / f"{name}.js").read_text()
    parts = {
        "policy": policy(style, script, connect),
        "icon": "data:image/svg+xml," + quote(ICON),
        "title": escape(title),
        "style": style,
        "player": (PAGES / "player.html").read_text(),
        "data": escape_json(data),
        "script": script,
    }
    template = (PAGES / f"{name}.html").read_text()
    template = template.replace("{{head}}", (PAGES / "head.html").read_text())
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def policy(style: str, script: str, connect: str) -> str:
    return (
        f"default-src 'none'; script-src {source(script)}; style-src {source(style)}; "
        f"img-src data:; connect-src {connect}; base-uri 'none'; form-action 'none'"
    )


def policy_of(content: str) -> str:
    """The policy in a page, to be sent as a header, too."""
    return re.search(r'Content-Security-Policy" content="([^"]*)"', content)[1]


def source(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def escape(text: str) -> str:
    """Text for HTML, XML and their attributes, without the characters that XML cannot hold."""
    text = re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)
    names = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;"}
    return re.sub(r"[&<>\"']", lambda match: names[match[0]], text)


def escape_json(data) -> str:
    """JSON that holds no `<`, so that no text in it can end a script element or begin a comment."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
