"""What MkDocs is told beside its settings: pages from other files, links, formulas."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from notebook_page import as_page
from places import MADE, REPOSITORY, linked_on_site, place_of, slug, targets

LANGUAGES = {".py": "python", ".cc": "cpp", ".h": "cpp", ".cu": "cuda", ".md": "markdown"}
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Give headings the anchors that GitHub gives them."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = slug
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made from files outside docs/, and of the files that are linked."""
    texts = {f"docs/{page.src_uri}": page.content_string for page in files.documentation_pages()}
    for file, place in MADE.items():
        path = REPOSITORY / file
        if path.suffix == ".ipynb":
            texts[file], pictures = as_page(path)
            for name, content in pictures.items():
                uri = f"{Path(place).parent}/{name}"
                files.append(File.generated(config, uri, content=content))
        else:
            texts[file] = path.read_text("utf-8")
        front = "---\nhide: [navigation]\n---\n" if place == "index.md" else ""
        text = front + linked_on_site(texts[file], file)
        files.append(File.generated(config, place, content=text))
    linked = {target for file, text in texts.items() for _, target, _ in targets(text, file)}
    for target in sorted(linked):
        _add_source(target, files, config)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite the links of the pages in docs/, and give the widest table room."""
    if page.file.src_uri == "builtin-defects.md":
        page.meta["hide"] = ["toc"]
    if page.file.generated_by is not None:
        return markdown
    return linked_on_site(markdown, f"docs/{page.file.src_uri}")


def on_page_content(content: str, **_: Any) -> str:
    """Write formulas in MathML, which browsers draw by themselves."""

    def drawn(match: re.Match[str]) -> str:
        formula = html.unescape(match[2]).strip().replace("{aligned}", "{align*}")
        display = "inline" if match[1] == "span" else "block"
        return f'<{match[1]} class="formula">{convert(formula, display=display)}</{match[1]}>'

    return FORMULA.sub(drawn, content)


def _add_source(target: str, files: Files, config: MkDocsConfig) -> None:
    """Add a page with the source of a file, or with the files of a folder."""
    path, place = REPOSITORY / target, place_of(target)
    if not place.startswith("source/") or files.get_file_from_path(place):
        return
    if path.is_dir():
        inside = sorted(p for p in path.iterdir() if p.suffix in LANGUAGES)
        text = "\n".join(f"- [`{p.name}`]({p.name}.md)" for p in inside)
        for p in inside:
            _add_source(f"{target}/{p.name}", files, config)
    else:
        language = LANGUAGES.get(path.suffix, "text")
        text = f"~~~~~~ {language}\n{path.read_text('utf-8')}~~~~~~"
    page = File.generated(
        config,
        place,
        content=f"---\nsearch:\n  exclude: true\n---\n# `{target}`\n\n{text}\n",
        inclusion=InclusionLevel.NOT_IN_NAV,
    )
    files.append(page)
