"""The page: executed notebooks in, one self-contained HTML file out, by nbconvert's own extension points.

A preprocessor (`KeepOurs`) decides which outputs a reader sees; two Jinja filters (`markdown`, `number`) turn Markdown
into HTML with MathML and give figures, tables and equations their numbers; report/template/ says how it all looks.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

import nbformat
import pypandoc
from bs4 import BeautifulSoup
from jinja2 import pass_context
from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html_pandoc
from nbconvert.preprocessors import Preprocessor

TEMPLATE = Path(__file__).resolve().parent / "template"
SIZE_LIMIT = 6_000_000  # bytes of one page
PANDOC = ["--mathml", "--shift-heading-level-by=1", "--wrap=none", "--syntax-highlighting=none"]  # # is an h2
TAGGED = re.compile(r"\$\$((?:(?!\$\$).)+?)\\tag\{([^}]+)\}((?:(?!\$\$).)*)\$\$", re.DOTALL)  # $$ ... \tag{2.1} ... $$
REFERENCES = ("", "Figure", "Table", "Equation")  # a link with one of these texts gets the number of what it links to


class BuildError(Exception):
    """A build that cannot go on, worded for the person who can mend it."""


def duration(seconds: float) -> str:
    """Return e.g. '48 s' or '3 min 20 s'."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def merge(executed: dict[str, Path]) -> nbformat.NotebookNode:
    """Return the executed notebooks as one; a cell's id is `STEM-NUMBER`, and each first cell carries its stem.

    papermill's cell with the values of this run, which the source does not have, joins the defaults before it.
    """
    merged = nbformat.v4.new_notebook(metadata={"language_info": {"name": "python", "pygments_lexer": "ipython3"}})
    for stem, path in executed.items():
        number = 0
        for cell in nbformat.read(path, as_version=4).cells:
            if number and "injected-parameters" in cell.metadata.get("tags", []):
                merged.cells[-1].source += f"\n\n{cell.source.replace('# Parameters', '# in this run', 1)}"
                continue
            number += 1
            cell.id, cell.metadata["starts"] = f"{stem}-{number}", stem if number == 1 else ""
            merged.cells.append(cell)
    return merged


def name_of(cell_id: str) -> str:
    return "{0}, cell {2}".format(*cell_id.rpartition("-"))


class KeepOurs(Preprocessor):
    """Drop stderr and foreign HTML; refuse errors, and images that did not come through `sgsc_lib.figure`."""

    def preprocess_cell(self, cell, resources, index):
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if output.output_type == "error":
                raise BuildError(f"{name_of(cell.id)}: {output.ename}: {output.evalue}")
            if not data.get("text/html", "").startswith(('<figure id="fig-', '<figure id="tbl-')):
                data.pop("text/html", None)
                if any(kind.startswith("image/") for kind in data):
                    where = name_of(cell.id)
                    raise BuildError(f"{where}: an image without alternative text. Show it with sgsc_lib.figure.")
        return cell, resources


@pass_context
def markdown(context, source: str) -> str:
    r"""Jinja filter: pandoc's HTML with MathML; `$$ ... \tag{2.1} $$` becomes an equation with the id eq-2.1."""
    source = TAGGED.sub(r"[$$\1\3$$]{#eq-\2 .equation}", source)
    soup = BeautifulSoup(markdown2html_pandoc(source, PANDOC), "html.parser")
    for formula in soup.select("span.math"):  # what pandoc could not convert
        where = name_of(context["cell"].id) if "cell" in context else "report/template"
        raise BuildError(f"{where}: pandoc does not understand the formula {formula.get_text()}")
    for formula in soup.find_all("math"):
        formula.annotation.decompose()  # pandoc's copy of the TeX
        formula.semantics.unwrap()
        if formula["display"] == "block" and "equation" not in formula.parent.get("class", []):
            formula.wrap(soup.new_tag("span", attrs={"class": "equation"}))
    for table in soup.find_all("table"):
        table.wrap(soup.new_tag("div", attrs={"class": "scroll"}))
    return str(soup)


def number(html: str, known: list[str]) -> dict[str, Any]:
    """Jinja filter: number figures, tables and equations, resolve references; return the `html` and its `contents`.

    `known` are the ids that the rest of the page has. BuildError: an image without alternative text or kept elsewhere,
    a label used twice, a reference to a label that does not exist.
    """
    soup = BeautifulSoup(html, "html.parser")

    def fail(tag, message):
        raise BuildError(f"{name_of(tag.find_parent(class_='cell')['id'])}: {message}")

    def link(target, content, **attrs):
        tag = soup.new_tag("a", href=f"#{target}", attrs=attrs)
        tag.extend(content)
        return tag

    for img in soup.find_all("img"):
        if not img.get("alt", "").strip() or not img.get("src", "").startswith("data:"):
            fail(img, f"an image should have alternative text and be embedded. Found {str(img)[:120]}")
        img.wrap(soup.new_tag("div", attrs={"class": "plate"}))
    labels = {}
    for prefix, word in ("fig", "Figure"), ("tbl", "Table"):
        for n, figure in enumerate(soup.select(f'figure[id^="{prefix}-"]'), 1):
            labels[figure["id"]] = f"{word}\N{NO-BREAK SPACE}{n}"
            label = link(figure["id"], [labels[figure["id"]] + "."], **{"class": "label"})
            figure.figcaption.insert(0, label)
            label.insert_after(" ")
    for equation in soup.select(".equation[id]"):
        n = equation["id"].removeprefix("eq-")
        labels[equation["id"]] = f"Equation\N{NO-BREAK SPACE}{n}"
        equation.append(link(equation["id"], [f"({n})"], **{"class": "label"}))

    contents, ids = [], set(known)
    for heading in soup.find_all(["h2", "h3", "h4"]):  # the h2 is the title of its section, which has the id
        stem = heading.find_parent("section")["id"].removeprefix("nb-")
        target = f"nb-{stem}" if heading.name == "h2" else f"{stem}-{heading.get('id')}"
        heading["id"] = f"{target}-title" if heading.name == "h2" else target
        entry = {"id": target, "title": heading.decode_contents(), "parts": []}
        if heading.name == "h2":
            contents.append(entry)
        elif heading.name == "h3" and contents:
            contents[-1]["parts"].append(entry)
        heading.append(link(target, list(heading.contents)))
    for table in soup.find_all("table"):
        table.attrs.pop("border", None)  # pandas writes it, HTML no longer has it
    for tag in soup.find_all(id=True):
        if tag["id"] in ids:
            fail(tag, f"there is a second {tag['id']} on the page. Rename one of the two.")
        ids.add(tag["id"])
    for a in soup.select('a[href^="#"]'):
        target = a["href"][1:]
        if target not in ids:
            fail(a, f"nothing on the page has the label {target}.")
        if target in labels and a.get_text() in REFERENCES:
            a.string = labels[target]
    return {"html": str(soup), "contents": contents}


def render(executed: dict[str, Path], manifest: dict[str, Any], data: list[Path], findings: str = "") -> str:
    """Return the page: `findings` (Markdown), the executed notebooks as sections, `data` as downloads, the manifest."""
    os.environ["PATH"] = os.pathsep.join([os.path.dirname(pypandoc.get_pandoc_path()), os.environ.get("PATH", "")])
    script = (TEMPLATE / "page.js").read_text(encoding="utf-8")
    digest = hashlib.sha256(script.encode()).digest()
    page = {
        "manifest": manifest,
        "findings": findings,
        "style": (TEMPLATE / "page.css").read_text(encoding="utf-8"),
        "script": script,
        "script_hash": base64.b64encode(digest).decode(),  # the only script that the page lets run
        "data": [{"name": path.name, "text": path.read_text(encoding="utf-8")} for path in data],
    }
    exporter = HTMLExporter(
        extra_template_basedirs=[str(TEMPLATE.parent)],
        template_name=TEMPLATE.name,
        preprocessors=[KeepOurs],
        filters={"markdown": markdown, "number": number, "duration": duration, "quote": quote},
        config={"NbConvertBase": {"display_data_priority": ["text/html", "text/markdown", "text/plain"]}},
    )
    html, _ = exporter.from_notebook_node(merge(executed), {"page": page})
    if len(html.encode()) > SIZE_LIMIT:
        soup = BeautifulSoup(html, "html.parser")
        parts = [(len(a["href"]), a["download"]) for a in soup.select("a[download]")]
        parts += [(len(img["src"]), img.find_parent("figure", id=True)["id"]) for img in soup.select("figure img")]
        biggest = ", ".join(f"{name} {size / 1e6:.2f} MB" for size, name in sorted(parts, reverse=True)[:5])
        found = f"{len(html.encode()) / 1e6:.2f} MB, with {biggest}"
        raise BuildError(f"The page should be under {SIZE_LIMIT / 1e6:g} MB. Found {found}.")
    return html
