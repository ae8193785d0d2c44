"""report/findings.py: sentences that hold or stop the build, numbers in a reader's units, the README's copy of both."""

import collections
import re
import shutil

import build
import findings
import jinja2
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from conftest import FIGURE, ROOT, code, parameters, write_notebook, write_profile
from manifest import BuildError

TEMPLATE = (ROOT / findings.TEMPLATE).read_text(encoding="utf-8")
FULL, VERDICTS = ROOT / "report/results/full", ["verdict", "half_a", "half_b"]
LIFTED = FIGURE.replace("fig-a", "fig-findings").replace("A dot.", "A &lt; B.")
README = "# T\n" + "".join(
    f"<!-- {name}: by -->\nold\n<!-- /{name} -->\n{after}\n"
    for name, after in (("findings", "kept"), ("use", "too"), ("time", "end"))
)


def assumed() -> list[tuple[str, list[str]]]:
    """What the sentences assume, in order: claims, each with its verdict of all seeds or with all three."""
    found: list[tuple[str, list[str]]] = []

    def given(verdicts, caller, undecided=None):
        found.extend((identity, [verdict] * 3) for identity, verdict in verdicts.items())
        found.extend((k, [told] if isinstance(told, str) else told) for k, told in (undecided or {}).items())
        return ""

    anything = collections.defaultdict(lambda: collections.defaultdict(lambda: 1.0))
    claims = pd.read_csv(FULL / "claims.csv").set_index("id").to_dict("index")
    jinja2.Environment().from_string(TEMPLATE).render(
        given=given, cell=str, shown=anything, claims=claims, tuned=anything
    )
    return found


ASSUMED = assumed()


@pytest.fixture
def claims(tmp_path):
    """The committed claims with all verdicts that the sentences assume, and a way to write others to tmp_path."""
    table = pd.read_csv(FULL / "claims.csv").set_index("id")
    shutil.copy(FULL / "contest_tuned.csv", tmp_path)
    for identity, told in ASSUMED:
        table.loc[identity, VERDICTS[: len(told)]] = told

    def written(changed: pd.DataFrame):
        changed.reset_index().to_csv(tmp_path / "claims.csv", index=False)
        return tmp_path

    return table, written


def test_a_sentence_whose_verdict_changed_stops_the_build_and_is_named(claims):
    table, written = claims
    assert len(ASSUMED) >= 5 and findings.findings(written(table))
    for identity, (verdict, *_) in ASSUMED:
        changed = table.copy()
        changed.loc[identity, "verdict"] = "other"
        start = rf'call given\((?:(?!%}}).)*?"{identity}".*?%}}\s+(\S+ \S+)'
        sentence = re.search(start, TEMPLATE, re.DOTALL)[1]
        named = rf"{findings.TEMPLATE}.*{identity} is {verdict}\. .*{re.escape(sentence)}"
        with pytest.raises(BuildError, match=named):
            findings.findings(written(changed))
        with pytest.raises(BuildError, match=identity):
            findings.findings(written(table.drop(index=identity)))


def test_a_sentence_holds_in_both_halves_unless_it_names_the_claim_as_undecided(claims):
    table, written = claims
    by_halves = {identity for identity, told in ASSUMED if len(told) == 3}
    assert len(by_halves) >= 5 and any(len(set(told)) > 1 for _, told in ASSUMED)
    for identity in dict(ASSUMED):
        changed = table.copy()
        changed.loc[identity, "half_b"] = "other"
        if identity not in by_halves:
            assert findings.findings(written(changed))
        else:
            with pytest.raises(BuildError, match=rf"{identity} .* other in half B"):
                findings.findings(written(changed))


def test_the_committed_results_say_what_the_sentences_say(claims):
    parts = findings.findings(FULL)
    stems = [path.stem for path in (ROOT / "notebooks").glob("0*.ipynb")]
    assert {"abstract", "claims", "gate", "use", *stems} == parts.keys() and "\n|" in parts["claims"]
    committed = "\n".join(parts.values())
    for identity in re.findall(r'(?:shown\[|cell\()"([\w-]+)"', TEMPLATE):
        assert findings.shown(claims[0].loc[identity].to_dict()) in committed


@pytest.mark.parametrize(("measure", "numbers", "text"), [
    ("difference in test accuracy", (-0.0123, -0.02, 0.001), "−1.23 points [−2.00, +0.10]"),
    ("log of the ratio of roughness", (0.6931472, 0.0, 1.0986123), "× 2.00 [1.00, 3.00]"),
    ("share of studies", (0.378, 0.348, 0.409), "38 % [35, 41]"),
    ("log10 learning rate", (-1.0, -2.0, 0.0), "× 0.10 [0.01, 1.00]"),
    ("gamma", (0.21, -0.04, 0.38), "0.21 [−0.04, 0.38]"),
])  # fmt: skip
def test_numbers_are_in_a_readers_units(measure, numbers, text):
    claim = dict(zip(("estimate", "ci_low", "ci_high"), numbers, strict=True)) | {"measure": measure}
    assert findings.shown(claim).replace("\N{NO-BREAK SPACE}", " ") == text


def test_the_readme_gets_findings_figure_and_time_between_its_marks_and_keeps_the_rest():
    said, page = {"abstract": "Said \\1.", "use": "Use."}, f'<section id="findings">{LIFTED}</section>'
    training = [{"training": {"seconds": seconds, "machine": "2 cores (Z80)"}} for seconds in (60, 540)]
    made = {"notebooks": dict(zip(("01_one", "02_two"), training, strict=True))}
    text, svg = findings.readme(README, made, said, page)
    picture = f'<img src="{findings.FIGURE}" alt="A &lt; B.">'
    assert f"by -->\nSaid \\1.\n\n{picture}\n<!-- /findings -->\nkept\n" in text and "by -->\nUse.\n<!-- /use" in text
    assert text.startswith("# T\n") and text.endswith("\n<!-- /time -->\nend\n") and "old" not in text
    assert "10 min" in text and "2 cores (Z80). By notebook: 01 60 s, 02 9 min." in text
    assert svg.startswith("<svg") and 'fill="white"' in svg  # readable on a dark page
    assert findings.readme(text, made, said, page) == (text, svg)
    for readme, html, name in (README.replace("/time", ""), page, "README.*time"), (README, "", "`findings`"):
        with pytest.raises(BuildError, match=name):
            findings.readme(readme, made, said, html)


def test_only_the_full_profile_has_findings_and_a_changed_verdict_leaves_page_and_readme(
    claims, tmp_path, capsys, monkeypatch
):
    table, written = claims
    links = re.compile(r"\[(Figure|Table)\]\(#[^)]*\)")  # to what the toy's page does not have
    said = findings.findings
    monkeypatch.setattr(build, "findings", lambda path: {k: links.sub(r"\1", v) for k, v in said(path).items()})
    made = [str(written(table) / name) for name in ("claims.csv", "contest_tuned.csv")]
    copy = f"import shutil\nfor path in {made!r}:\n    _ = shutil.copy(path, results)"
    shown = code(f"from IPython.display import HTML\nHTML({LIFTED!r})")
    cells = parameters('results: str = "."'), code(copy), "See [](#fig-findings).", shown
    write_notebook(tmp_path / "notebooks/03_evaluation.ipynb", "# Evaluation", *cells)
    readme = tmp_path / "README.md"
    readme.write_text(README)
    for name in ("toy", "full"):
        assert readme.read_text() == README
        write_profile(tmp_path, "03_evaluation:", name)
        assert build.main(["--profile", name], tmp_path) == 0
    paths = [tmp_path / "report" / name for name in ("sgsc.html", "sgsc-toy.html")]
    full, other = (BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser") for path in paths)
    assert full.select("header > section#findings > figure#fig-findings") and full.select("#findings table")
    assert len(full.select("#fig-findings")) == 1 and not full.select(".banner")
    assert not other.select("#findings") and other.select(".cell figure#fig-findings") and other.select(".banner")
    assert "kept" in readme.read_text(encoding="utf-8") and (tmp_path / findings.FIGURE).exists()
    before = paths[0].read_bytes(), readme.read_bytes()
    table.loc[ASSUMED[0][0], "verdict"] = "other"
    written(table)
    assert build.main([], tmp_path) == 1 and ASSUMED[0][0] in capsys.readouterr().err
    assert (paths[0].read_bytes(), readme.read_bytes()) == before
