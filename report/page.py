"""The page: executed notebooks in, one self-contained HTML file out, by nbconvert's own extension points.

A preprocessor (`KeepOurs`) decides which outputs a reader sees; two Jinja filters (`markdown`, `number`) turn Markdown
into HTML with MathML and give figures, tables and equations their numbers; report/template/ says how it all looks.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
from collections import Counter
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
from nbconvert.preprocessors import Preprocessor

TEMPLATE = Path(__file__).resolve().parent / "template"
UPLOT = TEMPLATE / "uplot-1.6.32"  # as the npm registry has it: 50 kB with bands and log scales, where others take 200
CITATION = TEMPLATE.parent.parent / "CITATION.cff"
SIZE_LIMIT = 6_000_000  # bytes of one page
os.environ["PYPANDOC_PANDOC"] = str(Path(pypandoc.__file__).with_name("files") / "pandoc")  # none of the user's own
PANDOC = ["--mathml", "--shift-heading-level-by=1", "--wrap=none", "--syntax-highlighting=none"]  # # is an h2
# GitHub's dialect, as JupyterLab reads a cell: it knows no YAML block, no footnotes, no emoji by name and no alerts.
READER = "gfm+tex_math_dollars+smart-tex_math_gfm-yaml_metadata_block-footnotes-emoji-alerts"
# What JupyterLab takes for a formula or a table and pandoc does not; code is found first, so that it stays as it is.
AS_JUPYTER = re.compile(
    r"""(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`) | ^[ ]*(?P<fence>~{3,}).+?(?:^[ ]*(?P=fence)|\Z)
    | \$\$(?P<display>.+?)\$\$ | (?<![\\$])\$(?!\$)(?P<inline>(?:(?!\n\s*\n)[^$`])+?)\$(?![$\d])
    | \\begin\{(?P<name>[a-z]+\*?)\}(?P<body>.*?)\\end\{(?P=name)\}
    | \\\\\((?P<round>.+?)\\\\\) | \\\\\[(?P<square>.+?)\\\\\]
    | (?P<table>(?<=[^\n]\n)(?=(?P<quote>[> ]*)[^\n]*\|[^\n]*\n[> \t|]*:?-+:?[ \t]*(?:\|[ \t:-]*)+$))""",
    re.DOTALL | re.MULTILINE | re.VERBOSE,
)
NUMBER = re.compile(r"[-+−]?[\d,]+(\.\d+)?(e[-+]?\d+)?|–")  # a cell of a column that is set to the right


def merge(executed: dict[str, Path]) -> nbformat.NotebookNode:
    """Return the executed notebooks as one; a cell's id is `STEM-NUMBER`, and each first cell carries its stem."""
    merged = nbformat.v4.new_notebook(metadata={"language_info": {"name": "python", "pygments_lexer": "ipython3"}})
    for stem, path in executed.items():
        number = 0
        for cell in nbformat.read(path, as_version=4).cells:
            if number and "injected-parameters" in cell.metadata.get("tags", []):  # papermill's: below the defaults
                merged.cells[-1].source += f"\n\n{cell.source.replace('# Parameters', '# in this run', 1)}"
                continue
            number += 1
            cell.id, cell.metadata["starts"] = f"{stem}-{number}", stem if number == 1 else ""
            merged.cells.append(cell)
    return merged


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def csp_hash(script: str) -> str:
    """Jinja filter: the source expression that lets the page's policy run this inline script and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def name_of(cell_id: str) -> str:
    return "{0}, cell {2}".format(*cell_id.rpartition("-"))


class KeepOurs(Preprocessor):
    """Drop stderr and foreign HTML; refuse raw cells, and images that did not come through `sgsc_study.figure`."""

    def preprocess_cell(self, cell, resources, index):
        if cell.cell_type == "raw":
            raise BuildError(f"{name_of(cell.id)}: a raw cell would not be shown. Make it Markdown.")
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if not data.get("text/html", "").startswith(('<figure id="fig-', '<figure id="tbl-')):
                data.pop("text/html", None)
                if any(kind.startswith("image/") for kind in data):
                    raise BuildError(f"{name_of(cell.id)}: an image without alt text. Show it with sgsc_study.figure.")
        return cell, resources


def for_pandoc(found: re.Match) -> str:
    """What `AS_JUPYTER` found, so that pandoc takes it for the same; a display formula with a \\tag becomes eq-TAG."""
    part = {kind: text for kind, text in found.groupdict().items() if text is not None}
    if inline := (part.get("inline") or part.get("round", "")).strip():
        if found.string[: found.start()].rpartition("\n")[2].lstrip("> ").startswith("|"):  # a row, which | would cut
            inline = inline.replace("\\|", "\\Vert ").replace("|", "\\vert ")
        return f"${inline.strip()}$"
    if name := part.get("name", "").rstrip("*"):
        inner = {"equation": ""}.get(name, "aligned" if name in ("align", "eqnarray", "gather", "multline") else name)
        part["display"] = f"\\begin{{{inner}}}{part['body']}\\end{{{inner}}}" if inner else part["body"]
    if display := part.get("display") or part.get("square"):
        if tag := re.search(r"\\tag\{([^}]+)\}", display):
            return f'<span id="eq-{tag[1]}" class="equation">$${display.replace(tag[0], "")}$$</span>'
        return f"$${display}$$"
    return f"{part['quote'].rstrip()}\n" if "table" in part else found[0]


@pass_context
def markdown(context, source: str) -> str:
    r"""Jinja filter: pandoc's HTML with MathML; `$$ ... \tag{2.1} $$` becomes an equation with the id eq-2.1."""
    source = AS_JUPYTER.sub(for_pandoc, source)
    html = pypandoc.convert_text(source, "html", READER, PANDOC, verify_format=False)
    soup = BeautifulSoup(html.rstrip("\n"), "html.parser")
    if formula := soup.select_one("span.math"):  # what pandoc could not convert
        where = name_of(context["cell"].id) if "cell" in context else "report/template"
        raise BuildError(f"{where}: pandoc does not understand the formula {formula.get_text()}")
    for formula in soup.select("math:has(annotation)"):
        formula.annotation.decompose()  # pandoc's copy of the TeX
        formula.semantics.unwrap()
        if formula["display"] == "block" and "equation" not in formula.parent.get("class", []):
            formula.wrap(soup.new_tag("span", attrs={"class": "equation"}))
        text = formula.next_sibling if isinstance(formula.next_sibling, str) else ""
        if formula["display"] == "inline" and (closing := re.match(r"[.,;:!?)’”»]+", text)):
            formula.next_sibling.replace_with(text[closing.end() :])
            formula.wrap(soup.new_tag("span", attrs={"class": "joined"})).append(closing[0])  # no line starts with it
    for widths in soup.find_all("colgroup"):
        widths.decompose()  # pandoc's guess from the source's dashes; the browser knows better
    for table in soup.find_all("table"):
        table.wrap(soup.new_tag("div", attrs={"class": "scroll"}))
    return str(soup)


def number(html: str) -> dict[str, Any]:
    """Jinja filter: number main's figures, tables and equations, resolve references; its new `html` and `contents`."""
    soup = BeautifulSoup(html, "html.parser")

    def fail(tag, message):
        cell = tag.find_parent(class_="cell")
        raise BuildError(f"{name_of(cell['id']) if cell else 'report/template'}: {message}")

    def link(target, *content, **attrs):
        tag = soup.new_tag("a", href=f"#{target}", attrs=attrs)
        tag.extend(content)
        return tag

    for img in soup.find_all("img"):
        if not img.get("alt", "").strip() or not img.get("src", "").startswith("data:image/svg+xml"):
            fail(img, f"an image should have alternative text and be embedded as SVG. Found {str(img)[:120]}")
        img.wrap(soup.new_tag("div", attrs={"class": "plate"}))
    for place in soup.select("[data-figure]"):  # a figure that the first screens show
        if lifted := soup.find(id=place["data-figure"]):
            place.replace_with(lifted.extract())
        else:
            place.decompose()
    labels = {}
    for prefix, word in ("fig", "Figure"), ("tbl", "Table"):
        for n, figure in enumerate(soup.select(f'figure[id^="{prefix}-"]'), 1):
            label = labels[figure["id"]] = f"{word}\N{NO-BREAK SPACE}{n}"
            figure.figcaption.insert(0, link(figure["id"], f"{label}.", **{"class": "label"}), " ")
    for equation in soup.select(".equation[id]"):
        n = equation["id"].removeprefix("eq-")
        labels[equation["id"]] = f"Equation\N{NO-BREAK SPACE}{n}"
        equation.append(link(equation["id"], f"({n})", **{"class": "label"}))
    for cell in soup.select(".cell:has(details.code):has(figure[id])"):
        made = " and ".join(labels[figure["id"]] for figure in cell.select("figure[id]"))
        said = cell.summary.get_text()
        cell.summary.string = re.sub(r"^Show the code(: (Figure|Table)(?=: ))?", f"Show the code of {made}", said)

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
        heading.append(link(target, *heading.contents))
    for table in soup.find_all("table"):
        table.attrs.pop("border", None)  # pandas writes it, HTML no longer has it
        rows = [row.find_all(["th", "td"]) for row in table.select("tbody tr")]
        for k, column in enumerate(zip(*rows, strict=False)):
            if all(NUMBER.fullmatch(cell.get_text().strip()) for cell in column):
                for cell in [*column, *table.select(f"thead tr > :nth-child({k + 1})")]:
                    cell["class"] = "number"
    ids = Counter(tag["id"] for tag in soup.find_all(id=True))
    if twice := [name for name, count in ids.items() if count > 1]:
        fail(soup.find_all(id=twice[0])[1], f"the page has two of each of {', '.join(twice)}. Rename them here.")
    for a in soup.select('a[href^="#"]'):
        target = a["href"][1:]
        if target not in ids:
            fail(a, f"nothing on the page has the label {target}.")
        if target in labels and a.get_text() in ("", "Figure", "Table", "Equation"):  # other texts stay
            a.string = labels[target]
    return {"html": str(soup), "contents": contents}


CARD = 0.0494, 0.004503, 0.007618  # γ, SGSC's learning rate and Adam's


def explorer(curves_csv: Path, tuned_csv: Path | None = None) -> dict[str, Any]:
    """Return what the explorer draws: `rates` of Adam, `seeds` of a cell, `presets` to start from, and `json` with
    those, each placement's values of γ and of the learning rate, and every cell's curves by epoch."""
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
    rates = [f"{lr:g}" for lr in sorted(frame.loc[frame["gamma"] == 0, "lr"].unique())]

    def preset(name: str, look: str, placement: str, *values: float) -> dict[str, str]:
        """The cells nearest to γ, SGSC's learning rate and Adam's; left out, that is SGSC's."""
        own = grid[placement]["gammas"], grid[placement]["rates"], rates
        near = [
            min(some, key=lambda v: abs(math.log((float(v) or 1e-9) / value)))
            for some, value in zip(own, values, strict=False)
        ]
        said = dict(zip(("gamma", "rate", "adam"), [*near, ""], strict=False))
        return {"name": name, "look": look, "placement": placement, **said}

    presets = []
    if "before" in grid:
        presets = [
            preset("The card", "Two things differ, γ and the learning rate. Which curve is smoother?", "before", *CARD),
            preset("One learning rate", "Now γ alone differs. What is left of the difference?", "before", *CARD[:2]),
        ]
    if tuned_csv and "after" in grid:
        best = pd.read_csv(tuned_csv).drop_duplicates("arm").set_index("arm")
        values = *best.loc["SGSC after", ["gamma", "lr"]], best.loc["Adam", "lr"]
        if values[0]:
            look = "Each is at its own best learning rate. Which ends more accurate?"
            presets.append(preset("The gate after Adam, tuned", look, "after", *values))
    shown = {"cells": cells, "grid": grid, "presets": presets}
    text = json.dumps(shown, separators=(",", ":"), allow_nan=False)
    return {
        "rates": rates,
        "presets": presets,
        "seeds": " to ".join(str(n) for n in sorted({frame["n"].min(), frame["n"].max()})),
        "json": text.replace("<", "\\u003c"),  # nothing in it can end the script element that carries it
    }


def render(
    executed: dict[str, Path], manifest: dict[str, Any], data: list[Path], findings: dict[str, str] | None = None
) -> str:
    """Return the page: `findings` (Markdown by part), the executed notebooks as sections, `data` as downloads, and what
    the manifest says."""
    styles, scripts, shown = [TEMPLATE / "page.css"], [text_of(TEMPLATE / "page.js")], {}
    if curves := next((path for path in data if path.name == "bank_curves.csv"), None):
        styles.insert(0, UPLOT / "uPlot.min.css")
        tuned = next((path for path in data if path.name == "tuned.csv"), None)
        licence, shown = f"/*\n{text_of(UPLOT / 'LICENSE')}*/", explorer(curves, tuned)
        scripts.append("\n".join([licence, text_of(UPLOT / "uPlot.iife.min.js"), text_of(TEMPLATE / "explorer.js")]))
    cite = yaml.safe_load(text_of(CITATION))
    people = [author.get("name") or f"{author['given-names']} {author['family-names']}" for author in cite["authors"]]
    page = {
        "manifest": manifest,
        "findings": findings or {},
        "explorer": shown,
        "citation": {**cite, "names": people},
        "style": "\n".join(map(text_of, styles)),
        "scripts": scripts,
        "data": [{"name": path.name, "text": text_of(path)} for path in data],
    }
    exporter = HTMLExporter(
        extra_template_basedirs=[str(TEMPLATE.parent)],
        template_name=TEMPLATE.name,
        preprocessors=[KeepOurs],
        filters={"markdown": markdown, "number": number, "csp_hash": csp_hash, "minutes": minutes, "quote": quote},
        config={
            "NbConvertBase": {"display_data_priority": ["text/html", "text/markdown", "text/plain"]},
            "TagRemovePreprocessor": {"enabled": True, "remove_cell_tags": ["notebook-only"]},  # links to the page
        },
    )
    html, _ = exporter.from_notebook_node(merge(executed), {"page": page})
    if (size := len(html.encode())) > SIZE_LIMIT:
        biggest = max(data, key=lambda path: path.stat().st_size).name
        raise BuildError(f"The page should be under {SIZE_LIMIT:,} bytes. Found {size:,}; the biggest is {biggest}.")
    return html
