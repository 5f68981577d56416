"""Checks while the site is built; MkDocs calls them. What they find is a warning, and `make docs` fails."""

import logging
import re
from pathlib import Path
from typing import Any

log = logging.getLogger("mkdocs.hooks.docs")


def commands_in(markdown: str) -> set[str]:
    """The subcommands of crossdiff that a page's code speaks of: fenced, indented, or between backquotes."""
    fenced = re.findall(r"```[a-z]*\n(.*?)```", markdown, re.DOTALL)
    indented = re.findall(r"^ {4}(\S.*)$", markdown, re.MULTILINE)
    inline = re.findall(r"`([^`\n]+)`", markdown)
    lines = (line for block in [*fenced, *indented, *inline] for line in block.splitlines())
    found = (re.match(r"\s*(?:\S*/)?crossdiff ([a-z]+)\b", line) for line in lines)
    return {match[1] for match in found if match}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> None:
    """Every command that a page names exists."""
    from crossdiff.cli import command_line

    for command in sorted(commands_in(markdown) - set(command_line([])[1].names)):
        log.warning("%s names the command `crossdiff %s`, which does not exist", page.file.src_uri, command)


def on_post_build(config: Any, **_: Any) -> None:
    """No page of the site refers to another host for what it shows: it can be read without a network."""
    for page in sorted(Path(config["site_dir"]).rglob("*.html")):
        for tag in re.findall(r"<(?:script|link|img)\b[^>]*>", page.read_text(encoding="utf-8")):
            if (host := re.search(r"(?:src|href)=[\"']?(https?://[^\"' >]+)", tag)) and "canonical" not in tag:
                log.warning("%s fetches %s", page, host[1])
