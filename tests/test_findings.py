"""report/findings.py: sentences that hold or stop the build, numbers in a reader's units, the README's copy of both."""

import re

import build
import findings
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from conftest import FIGURE, ROOT, code, parameters, write_notebook, write_profile
from manifest import BuildError

TEMPLATE = (ROOT / findings.TEMPLATE).read_text(encoding="utf-8")
ASSUMED = re.findall(r'"([\w-]+)": "([a-z]+)"', TEMPLATE)
README = "# T\n<!-- findings: by -->\nold\n<!-- /findings -->\nkept\n<!-- time: by -->\nold\n<!-- /time -->\nend\n"


@pytest.fixture
def claims(tmp_path):
    """The committed claims as if all verdicts were those that the sentences assume, and a way to say otherwise."""
    table = pd.read_csv(ROOT / "report/results/full/claims.csv").set_index("id")
    for identity, verdict in ASSUMED:
        table.loc[identity, "verdict"] = verdict

    def said(changed: pd.DataFrame = table) -> str:
        changed.reset_index().to_csv(tmp_path / "claims.csv", index=False)
        return findings.findings(tmp_path)

    return table, said


def test_a_sentence_whose_verdict_changed_stops_the_build_and_is_named(claims):
    table, said = claims
    assert len(ASSUMED) >= 8 and said().count("\n\n") >= 5
    for identity, verdict in ASSUMED:
        changed = table.copy()
        changed.loc[identity, "verdict"] = "worse"
        with pytest.raises(BuildError, match=rf"{findings.TEMPLATE}.*{identity} is {verdict}\.") as refused:
            said(changed)
        sentence = re.search(rf'call given\(\{{[^}}]*"{identity}".*?%}}\s+(\S+ \S+)', TEMPLATE, re.DOTALL)[1]
        assert sentence in str(refused.value)
        with pytest.raises(BuildError, match=identity):
            said(table.drop(index=identity))


def test_the_committed_results_say_what_the_sentences_say(claims):
    table, said = claims
    committed = findings.findings(ROOT / "report/results/full")
    assert committed == said() and "{" not in committed
    for identity in re.findall(r'(?:shown\[|cell\()"([\w-]+)"', TEMPLATE):
        assert findings.shown(table.loc[identity].to_dict()) in committed


@pytest.mark.parametrize(
    ("measure", "numbers", "text"),
    [
        ("difference in test accuracy", (-0.0123, -0.02, 0.001), "−1.23 points [−2.00, +0.10]"),
        ("difference in smoothness (-log roughness)", (-0.6931472, -1.0986123, 0.0), "× 2.00 [1.00, 3.00]"),
        ("log roughness", (0.6931472, 0.0, 1.0986123), "× 2.00 [1.00, 3.00]"),
        ("log10 learning rate", (-1.0, -2.0, 0.0), "× 0.10 [0.01, 1.00]"),
        ("difference in total rise", (0.1, -0.05, 0.25), "−0.100 nats [−0.250, +0.050]"),
        ("gamma", (0.21, -0.04, 0.38), "0.21 [−0.04, 0.38]"),
    ],
)
def test_numbers_are_in_a_readers_units(measure, numbers, text):
    claim = dict(zip(("estimate", "ci_low", "ci_high"), numbers, strict=True)) | {"measure": measure}
    assert findings.shown(claim).replace("\N{NO-BREAK SPACE}", " ") == text


def entry(seconds: float, machine: str = "2 cores (Z80)") -> dict:
    return {"training": {"seconds": seconds, "stacks": 1, "machine": machine}}


def test_the_readme_gets_findings_figure_and_time_between_its_marks_and_keeps_the_rest():
    page = f'<section id="findings">{FIGURE}</section>'.replace("fig-a", "fig-findings").replace("A dot.", "A &lt; B.")
    manifest = {"notebooks": {"01": entry(60), "02": entry(540)}}
    text, svg = findings.readme(README, manifest, "Said \\1.\n\n| a |\n|---|", page)
    picture = f'<img src="{findings.FIGURE}" alt="A &lt; B.">'
    assert f"by -->\nSaid \\1.\n\n{picture}\n\n| a |\n|---|\n<!-- /findings -->\nkept\n" in text
    assert text.startswith("# T\n") and text.endswith("\n<!-- /time -->\nend\n") and "old" not in text
    assert "10 min" in text and "2 cores (Z80)" in text
    assert svg.startswith("<svg") and 'fill="white"' in svg  # readable on a dark page
    assert findings.readme(text, manifest, "Said \\1.\n\n| a |\n|---|", page) == (text, svg)
    with pytest.raises(BuildError, match=r"README.*time"):
        findings.readme(README.replace("/time", ""), manifest, "Said.", page)
    with pytest.raises(BuildError, match="`findings`"):
        findings.readme(README, manifest, "Said.", "<p>no figure</p>")


def test_only_the_full_profile_has_findings_and_lifts_its_figure_into_them(claims, tmp_path, capsys):
    claims[1]()
    (tmp_path / "README.md").write_text(README)
    figure = f"from IPython.display import HTML\nHTML({FIGURE.replace('fig-a', 'fig-findings')!r})"
    copy = f"import shutil\n_ = shutil.copy({str(tmp_path / 'claims.csv')!r}, results)"
    cells = parameters('results: str = "."'), code(copy), "See [](#fig-findings).", code(figure)
    write_notebook(tmp_path / "notebooks" / "03_evaluation.ipynb", "# Evaluation", *cells)
    for name in ("full", "toy"):
        write_profile(tmp_path, "03_evaluation:", name)
        assert build.main(["--profile", name], tmp_path) == 0
    pages = [tmp_path / "report" / name for name in ("sgsc.html", "sgsc-toy.html")]
    full, other = (BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser") for page in pages)
    assert len(full.select("header > section#findings > figure#fig-findings")) == 1 and full.select("#findings table")
    assert len(full.select("#fig-findings")) == 1 and not full.select(".banner")
    assert not other.select("#findings") and other.select(".cell figure#fig-findings") and other.select(".banner")
    readme, svg = (tmp_path / "README.md").read_text(encoding="utf-8"), tmp_path / findings.FIGURE
    assert "**With the card's own settings**" in readme and "kept" in readme and svg.exists()
    before = pages[0].read_bytes(), readme
    changed = claims[0].copy()
    changed.loc[ASSUMED[0][0], "verdict"] = "worse"
    changed.reset_index().to_csv(tmp_path / "claims.csv", index=False)
    assert build.main(["--profile", "full"], tmp_path) == 1 and ASSUMED[0][0] in capsys.readouterr().err
    assert (pages[0].read_bytes(), (tmp_path / "README.md").read_text(encoding="utf-8")) == before
