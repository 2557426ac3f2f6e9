"""The built-in page: one answer with its style and script inside, and headers that let nothing else run."""

import base64
import hashlib
from pathlib import Path

STATIC = Path(__file__).with_name("static")

_PARTS = (
    ("style", '<link rel="stylesheet" href="page.css">', "page.css"),
    ("script", '<script src="page.js"></script>', "page.js"),
)


def make_page(static: Path = STATIC, *, fine_tuning: bool = False) -> tuple[bytes, dict[str, str]]:
    """Return the page and its headers; ``fine_tuning``: whether it asks for fine-tuning jobs.

    The Content-Security-Policy names the one style and the one script by their hashes and lets the page talk to this
    server only; text can become neither HTML nor script (Trusted Types), wherever it comes from.

    Raises:
        ValueError: if ``index.html`` does not have each part exactly once, or a part would end its own element.
    """
    page = (static / "index.html").read_text("utf-8")
    policy = {"default-src": "'none'", "connect-src": "'self'", "img-src": "data:"}
    for tag, place, name in _PARTS:
        content = (static / name).read_text("utf-8")
        if page.count(place) != 1 or f"</{tag}" in content.lower():
            raise ValueError(f"index.html must hold {place} once, and {name} no </{tag}")
        page = page.replace(place, f"<{tag}>{content}</{tag}>")
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        policy[f"{tag}-src"] = f"'sha256-{digest}'"
    if fine_tuning:
        page = page.replace("<body>", "<body data-fine-tuning>", 1)
    policy |= {
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    headers = {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return page.encode(), headers
