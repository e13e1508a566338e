"""Texts that try to be more than text, and what they become in Markdown and on a terminal."""

import re

from markdown_it import MarkdownIt

SCRIPT = "<script>alert(31337)</script>"
TEXTS = [
    SCRIPT,
    "<img src=x onerror=alert(31337)>",
    "![x](https://evil.example/pixel.png)",
    "[click](https://evil.example) [script](javascript:alert(31337))",
    "a\r# A heading\r\r| a | b |\r|---|---|\r| ![x](https://evil.example/p) | c |",
    "a\n\n<iframe src=https://evil.example></iframe>\n\n```\n",
    "`code` ~~struck~~ **bold** <https://evil.example> | cell | end",
    "\x1b[2J\x1b]8;;https://evil.example\x07click\x1b]8;;\x07\x1b]52;c;ZXZpbA==\x07\x9b31m",
    "safe\u202egnp.exe\u202c \u2066x\u2069 \u2028line",
    '=HYPERLINK("https://evil.example","x")',
    "$x$ :red[x] :material/close: $$y$$",
    "[/] [bold]x[/bold] [link=https://evil.example]x[/link] \\[",
]
HOSTILE = " ".join(TEXTS)
STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def active_parts(markdown: str) -> list[str]:
    """Return what of a Markdown text is a picture, a link or HTML, as a renderer that lets HTML through sees it."""
    found = []
    for token in MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(markdown):
        for part in (token, *(token.children or [])):
            if part.type in ("image", "link_open", "html_block", "html_inline", "s_open"):
                found.append(part.content or str(part.attrs))
    return found
