"""The findings: sentences that a person wrote for the committed results, and the guard that keeps them honest.

report/findings.md.j2 is the text, in parts that begin with a line `# name`: the page's first screen, the table of the
card's claims, the answer of each notebook, the use that the README recommends. Each sentence names the claims that it
rests on and the verdicts that it assumes, of all seeds and of both halves. For what it calls undecided that is the one
of all seeds, or, in a list, those of all seeds and of either half. Where a claim no longer says so, the build fails and
names the sentence. Numbers come from results alone.
"""

from __future__ import annotations

import base64
import html
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from bs4 import BeautifulSoup
from manifest import BuildError, minutes

from sgsc_study.cache import ROOT
from sgsc_study.figures import with_interval
from sgsc_study.results import write_text

TEMPLATE, FIGURE = "report/findings.md.j2", "report/findings.svg"  # from the project's root


def shown(claim: Mapping[str, Any]) -> str:
    """A claim's estimate and 95 % interval in the unit that a reader thinks in."""
    values, measure = [claim["estimate"], claim["ci_low"], claim["ci_high"]], claim["measure"]
    pattern, unit = "{:.2f}", ""
    if "accuracy" in measure:
        pattern, unit, values = "{:+.2f}", " points", [100 * value for value in values]
    elif "share" in measure:
        pattern, unit, values = "{:.0f}", " %", [100 * value for value in values]
    elif "log of the ratio" in measure:
        pattern, values = "× {:.2f}", [math.exp(value) for value in values]
    elif "log10" in measure:
        pattern, values = "× {:.2f}", [10**value for value in values]
    estimate, _, interval = with_interval(pattern, *values).partition(" [")
    text = f"{estimate}{unit} [{interval}".replace("[× ", "[").replace(", × ", ", ")
    return re.sub(r"(?<=×) |(?<=\d,) (?=[\d+−])", "\N{NO-BREAK SPACE}", re.sub(r"-(?=\d)", "−", text))


def findings(results: Path) -> dict[str, str]:
    """Markdown by the name of a part, from a folder of results; BuildError names a sentence that no longer holds."""
    claims = pd.read_csv(results / "claims.csv").set_index("id", drop=False).to_dict("index")
    tuned = pd.read_csv(results / "contest_tuned.csv").drop_duplicates("arm").set_index("arm").to_dict("index")

    def given(
        verdicts: Mapping[str, str], caller: Callable[[], str], undecided: Mapping[str, str | list[str]] | None = None
    ) -> str:
        sentence = " ".join(caller().strip().splitlines())
        expected = {identity: [verdict] * 3 for identity, verdict in verdicts.items()}
        expected |= {k: [told] if isinstance(told, str) else told for k, told in (undecided or {}).items()}
        for identity, told in expected.items():
            for column, verdict in zip(("verdict", "half_a", "half_b"), told, strict=False):
                if (found := claims[identity][column]) != verdict:
                    where = {"half_a": " in half A", "half_b": " in half B"}.get(column, "")
                    raise BuildError(
                        f"{TEMPLATE} assumes that {identity} is {verdict}. Found {found}{where}. Rewrite: {sentence}"
                    )
        return sentence

    def cell(identity: str) -> str:
        claim = claims[identity]
        same = claim["verdict"] == claim["half_a"] == claim["half_b"]
        return f"**{claim['verdict']}**{'' if same else ' (not in both halves)'} | {shown(claim)}"

    source = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)
    text = source.from_string((ROOT / TEMPLATE).read_text(encoding="utf-8"))
    numbers = {identity: shown(claim) for identity, claim in claims.items()}
    try:
        said = text.render(given=given, cell=cell, shown=numbers, claims=claims, tuned=tuned)
    except (KeyError, jinja2.UndefinedError) as error:
        raise BuildError(f"{TEMPLATE} names something that {results} does not have: {error}") from None
    parts = re.split(r"^# (\S+)$", said, flags=re.MULTILINE)[1:]
    return {name: part.strip() for name, part in zip(parts[::2], parts[1::2], strict=True)}


def readme(text: str, manifest: dict[str, Any], said: dict[str, str], page: str) -> tuple[str, str]:
    """The README with findings, recommended use and the time it all took between its marks; its figure, the page's
    first. `said` are the `findings`, `page` is the page's HTML.
    """
    image = BeautifulSoup(page, "html.parser").select_one("#fig-findings img")
    if image is None:
        raise BuildError("the findings have no figure: a notebook should make one with the label `findings`.")
    svg = base64.b64decode(image["src"].partition(",")[2]).decode()
    svg = re.sub(r"(<svg[^>]*>)", r'\1<rect width="100%" height="100%" fill="white"/>', svg, count=1)  # on a dark page
    picture = f'<img src="{FIGURE}" alt="{html.escape(image["alt"])}">'
    training = [entry["training"] for entry in manifest["notebooks"].values()]
    machines = " and ".join(sorted({trained["machine"] for trained in training}))
    took = minutes(sum(trained["seconds"] for trained in training))
    each = ", ".join(f"{k[:2]} {minutes(t['seconds'])}" for k, t in zip(manifest["notebooks"], training, strict=True))
    for name, content in {
        "findings": f"{said['abstract']}\n\n{picture}",
        "use": said["use"],
        "time": f"With an empty cache, the notebooks of `make report` took {took} in all on {machines}. "
        f"By notebook: {each}.",
    }.items():
        marked = re.search(f"<!-- {name}: .*? -->\n(.*?)<!-- /{name} -->", text, re.DOTALL)
        if marked is None:
            raise BuildError(f"README.md should have <!-- {name}: ... --> and <!-- /{name} --> on lines of their own.")
        text = f"{text[: marked.start(1)]}{content}\n{text[marked.end(1) :]}"
    return text, svg


def update_readme(root: Path, manifest: dict[str, Any], said: dict[str, str], page: str) -> None:
    """Put what the results say into the README and its figure."""
    text, svg = readme((root / "README.md").read_text(encoding="utf-8"), manifest, said, page)
    write_text(text, root / "README.md")
    write_text(svg, root / FIGURE)
