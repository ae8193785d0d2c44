"""The page: executed notebooks in, one self-contained HTML file out, by nbconvert's own extension points.

A preprocessor (`KeepOurs`) decides which outputs a reader sees; two Jinja filters (`markdown`, `number`) turn Markdown
into HTML with MathML and give figures, tables and equations their numbers; report/template/ says how it all looks. The
first figure is one that a notebook made, lifted; the explorer is drawn from a result file, and left out without it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

import nbformat
import pandas as pd
import pypandoc
import yaml
from bs4 import BeautifulSoup
from jinja2 import pass_context
from manifest import BuildError, minutes
from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html_pandoc
from nbconvert.preprocessors import Preprocessor

TEMPLATE = Path(__file__).resolve().parent / "template"
UPLOT = TEMPLATE / "uplot-1.6.32"  # as the npm registry has it: 50 kB with bands and log scales, where others take 200
CITATION = TEMPLATE.parent.parent / "CITATION.cff"
SIZE_LIMIT = 6_000_000  # bytes of one page
PANDOC = ["--mathml", "--shift-heading-level-by=1", "--wrap=none", "--syntax-highlighting=none"]  # # is an h2
TAGGED = re.compile(r"\$\$((?:(?!\$\$).)+?)\\tag\{([^}]+)\}((?:(?!\$\$).)*)\$\$", re.DOTALL)  # $$ ... \tag{2.1} ... $$
NUMBER = re.compile(r"[-+−]?[\d,]+(\.\d+)?(e[-+]?\d+)?|–")  # a cell of a column that is set to the right
REFERENCES = ("", "Figure", "Table", "Equation")  # a link with one of these texts gets the number of what it links to


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


def script_text(path: Path) -> str:
    """Return a script, or a licence as the comment above the script that it belongs to."""
    text = path.read_text(encoding="utf-8")
    return text if path.suffix == ".js" else f"/*\n{text}*/"


def csp_hash(script: str) -> str:
    """Jinja filter: the source expression that lets the page's policy run this inline script and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def name_of(cell_id: str) -> str:
    return "{0}, cell {2}".format(*cell_id.rpartition("-"))


class KeepOurs(Preprocessor):
    """Drop stderr and foreign HTML; refuse errors, and images that did not come through `sgsc_study.figure`."""

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
                    raise BuildError(f"{where}: an image without alternative text. Show it with sgsc_study.figure.")
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
        text = formula.next_sibling if isinstance(formula.next_sibling, str) else ""
        if formula["display"] == "inline" and (closing := re.match(r"[.,;:!?)’”»]+", text)):
            formula.next_sibling.replace_with(text[closing.end() :])
            joined = formula.wrap(soup.new_tag("span", attrs={"class": "joined"}))  # no line starts with a comma
            joined.append(closing[0])
    for widths in soup.find_all("colgroup"):
        widths.decompose()  # pandoc's guess from the source's dashes; the browser knows better
    for table in soup.find_all("table"):
        table.wrap(soup.new_tag("div", attrs={"class": "scroll"}))
    return str(soup)


def number(html: str) -> dict[str, Any]:
    """Jinja filter: number figures, tables and equations, resolve references; return the `html` and its `contents`.

    `html` is the whole of main. BuildError: an image without alternative text, or not an SVG within the page, a label
    used twice, a reference to a label that does not exist.
    """
    soup = BeautifulSoup(html, "html.parser")

    def fail(tag, message):
        cell = tag.find_parent(class_="cell")
        raise BuildError(f"{name_of(cell['id']) if cell else 'report/template'}: {message}")

    def link(target, content, **attrs):
        tag = soup.new_tag("a", href=f"#{target}", attrs=attrs)
        tag.extend(content)
        return tag

    for img in soup.find_all("img"):
        if not img.get("alt", "").strip() or not img.get("src", "").startswith("data:image/svg+xml"):
            fail(img, f"an image should have alternative text and be embedded as SVG. Found {str(img)[:120]}")
        img.wrap(soup.new_tag("div", attrs={"class": "plate"}))
    if (head := soup.find(id="findings")) and (lifted := soup.find(id="fig-findings")):
        head.append(lifted.extract())
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
    for cell in soup.select(".cell:has(details.code):has(figure[id])"):
        made = " and ".join(labels[figure["id"]] for figure in cell.select("figure[id]"))
        what = re.sub(r"^Show the code(: (Figure|Table)(?=: ))?", f"Show the code of {made}", cell.summary.get_text())
        cell.summary.string = what

    contents = []
    for heading in soup.find_all(["h2", "h3", "h4"]):  # the h2 is the title of its section, which has the id
        section = heading.find_parent("section", id=True)["id"]
        target = section if heading.name == "h2" else f"{section.removeprefix('nb-')}-{heading.get('id')}"
        heading["id"] = f"{target}-title" if heading.name == "h2" else target
        entry = {"id": target, "title": heading.decode_contents(), "parts": []}
        if heading.name == "h2":
            contents.append(entry)
        elif heading.name == "h3" and contents:
            contents[-1]["parts"].append(entry)
        heading.append(link(target, list(heading.contents)))
    for table in soup.find_all("table"):
        table.attrs.pop("border", None)  # pandas writes it, HTML no longer has it
        rows = [row.find_all(["th", "td"]) for row in table.select("tbody tr")]
        for k, column in enumerate(zip(*rows, strict=False)):
            if all(NUMBER.fullmatch(cell.get_text().strip()) for cell in column):
                for cell in [*column, *table.select(f"thead tr > :nth-child({k + 1})")]:
                    cell["class"] = "number"
    ids, twice = set(), []
    for tag in soup.find_all(id=True):
        if tag["id"] in ids:
            twice.append(tag)
        ids.add(tag["id"])
    if twice:
        fail(twice[0], f"the page has two of each of these: {', '.join(tag['id'] for tag in twice)}. Rename them here.")
    for a in soup.select('a[href^="#"]'):
        target = a["href"][1:]
        if target not in ids:
            fail(a, f"nothing on the page has the label {target}.")
        if target in labels and a.get_text() in REFERENCES:
            a.string = labels[target]
    return {"html": str(soup), "contents": contents}


def explorer(curves_csv: Path) -> dict[str, Any]:
    """Return what the explorer draws: `rates` of Adam, `seeds` of a cell, and `json` with each placement's values of γ
    and of the learning rate, and every cell's curves by epoch."""
    frame = pd.read_csv(curves_csv)
    cells = {}
    for (placement, gamma, lr), cell in frame.sort_values("epoch").groupby(["placement", "gamma", "lr"]):
        cells[f"{placement} {gamma:g} {lr:g}"] = [
            [float(f"{value:.4g}") if pd.notna(value) else None for value in cell[column]]
            for column in ("train_loss_mean", "train_loss_std", "test_accuracy_mean", "test_accuracy_std")
        ]
    grid = {
        placement: {
            "gammas": [f"{gamma:g}" for gamma in sorted({0.0, *gated["gamma"]})],
            "rates": [f"{lr:g}" for lr in sorted(set(gated["lr"]))],
        }
        for placement, gated in frame[frame["gamma"] > 0].groupby("placement")
    }
    text = json.dumps({"cells": cells, "grid": grid}, separators=(",", ":"), allow_nan=False)
    return {
        "rates": [f"{lr:g}" for lr in sorted(frame.loc[frame["gamma"] == 0, "lr"].unique())],
        "seeds": " to ".join(str(n) for n in sorted({frame["n"].min(), frame["n"].max()})),
        "json": text.replace("<", "\\u003c"),  # nothing in it can end the script element that carries it
    }


def citation(cff: Path) -> dict[str, Any]:
    """Return the fields of a CITATION.cff, with `names` for its authors; empty without the file."""
    if not cff.exists():
        return {}
    fields = yaml.safe_load(cff.read_text(encoding="utf-8")) or {}
    missing = [key for key in ("title", "authors", "version", "date-released", "license") if key not in fields]
    if missing:
        raise BuildError(f"{cff.name} should have {', '.join(missing)}. Found {', '.join(fields)}.")
    people = [author.get("name") or f"{author['given-names']} {author['family-names']}" for author in fields["authors"]]
    return {**fields, "names": people}


def render(executed: dict[str, Path], manifest: dict[str, Any], data: list[Path], findings: str = "") -> str:
    """Return the page: `findings` (Markdown), the executed notebooks as sections, `data` as downloads, the manifest."""
    os.environ["PATH"] = os.pathsep.join([os.path.dirname(pypandoc.get_pandoc_path()), os.environ.get("PATH", "")])
    read = {path.name: path for path in data}
    styles, scripts = [TEMPLATE / "page.css"], [[TEMPLATE / "page.js"]]
    if curves := read.get("bank_curves.csv"):
        styles.insert(0, UPLOT / "uPlot.min.css")
        scripts.append([UPLOT / "LICENSE", UPLOT / "uPlot.iife.min.js", TEMPLATE / "explorer.js"])
    page = {
        "manifest": manifest,
        "findings": findings,
        "explorer": explorer(curves) if curves else {},
        "citation": citation(CITATION),
        "style": "\n".join(path.read_text(encoding="utf-8") for path in styles),
        "scripts": ["\n".join(map(script_text, paths)) for paths in scripts],
        "data": [{"name": path.name, "text": path.read_text(encoding="utf-8")} for path in data],
    }
    exporter = HTMLExporter(
        extra_template_basedirs=[str(TEMPLATE.parent)],
        template_name=TEMPLATE.name,
        preprocessors=[KeepOurs],
        filters={"markdown": markdown, "number": number, "csp_hash": csp_hash, "minutes": minutes, "quote": quote},
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
