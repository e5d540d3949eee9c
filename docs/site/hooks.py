"""Hooks of mkdocs: notebooks become pages, links that lead out of docs/ are mended, pages that the menu forgot are listed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
LINK = re.compile(r"\]\(([^):#\s]+)(#[^)]*)?\)")


def on_config(config: Any) -> Any:
    """The notebooks, and pages that the menu does not name, at its end."""
    named = set(re.findall(r"[\w/]+\.md", str(config.nav)))
    docs = Path(config.docs_dir)
    others = sorted({str(path.relative_to(docs)) for path in docs.rglob("*.md")} - named)
    notebooks = {"Notebooks": [f"notebooks/{path.stem}.md" for path in NOTEBOOKS]}
    config.nav = [config.nav[0], notebooks, *config.nav[1:], *([{"More": others}] if others else [])]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Each notebook as a page, with its saved outputs; pictures stand in the page itself."""
    for path in NOTEBOOKS:
        text, resources = MarkdownExporter().from_notebook_node(nbformat.read(path, as_version=4))
        for name, picture in resources["outputs"].items():
            where = f"notebooks/{path.stem}_{name}"
            text = text.replace(f"({name})", f"({Path(where).name})")
            files.append(File.generated(config, where, content=picture))
        text = COLOURS.sub("", text).replace(".ipynb)", ".md)")
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Links out of docs/ lead to a notebook's page; a link to a file that does not exist is an error."""
    if page.file.src_uri.startswith("notebooks/"):
        return markdown.replace("(../docs/", "(../")
    folder = (Path(config.docs_dir) / page.file.src_uri).parent

    def mended(found: re.Match[str]) -> str:
        target = (folder / found[1]).resolve()
        if target.is_relative_to(config.docs_dir):
            return found[0]
        if not target.exists():
            raise ValueError(f"{page.file.src_uri} links to {found[1]}, which does not exist")
        if target.suffix == ".ipynb":
            up = "../" * (len(Path(page.file.src_uri).parts) - 1)
            return f"]({up}notebooks/{target.stem}.md{found[2] or ''})"
        return found[0]

    return LINK.sub(mended, markdown)
