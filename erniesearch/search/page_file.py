"""The page: markup, style, script and texts of the package as one document."""

import base64
import hashlib
import json
from importlib import resources


def load_page() -> tuple[str, dict[str, str]]:
    """The document, and headers under which only its own script and style run."""
    folder = resources.files("erniesearch.search").joinpath("page")
    markup, style, script, texts = (
        folder.joinpath(name).read_text("utf-8")
        for name in ("page.html", "page.css", "page.js", "texts.json")
    )
    # No text can end the element that it stands in.
    texts = json.dumps(json.loads(texts), ensure_ascii=False).replace("<", "\\u003c")
    content = markup
    for name, part in (("STYLE", style), ("TEXTS", texts), ("SCRIPT", script)):
        content = content.replace(f"/*{name}*/", part, 1)
    policy = (
        "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none';"
        " form-action 'self'; frame-ancestors 'none';"
        f" script-src {_source(script)}; style-src {_source(style)}"
    )
    return content, {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}


def _source(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
