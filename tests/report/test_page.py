"""The page stands alone, is well formed, and says what was measured."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from flatkern.experiments.claims import NOT_HELD, Claim, InequalityCheck, check_inequalities, judge
from flatkern.experiments.result import Result
from flatkern.report.html import render
from flatkern.report.tables import summary_table

VOID = {"meta", "br", "link", "img", "input", "hr", "path", "use", "rect", "line", "circle"}


class Page(HTMLParser):
    """Collects ids and what the page refers to; checks that tags are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if "id" in values:
            self.ids.append(values["id"] or "")
        self.references += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)


@pytest.fixture(scope="module")
def html(output: Path) -> str:
    return (output / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    parser = Page()
    parser.feed(html)
    return parser


def test_tags_are_closed_and_ids_are_unique(page: Page) -> None:
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))


def test_nothing_is_fetched(page: Page, html: str) -> None:
    outside = [r for r in page.references if not r.startswith("#")]
    assert outside == ["https://arxiv.org/abs/2310.01770"]
    assert {r[1:] for r in page.references if r.startswith("#")} <= set(page.ids)
    assert not re.search(r"@import|url\((?!#)", html)


def test_figures_are_inline_and_take_the_pages_colours(html: str) -> None:
    # 6 panels a sweep, 4 scatters, 5 settings twice, the spectrum
    assert html.count("<svg") == 6 + 6 + 4 + 10 + 1
    figures = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.S))
    assert set(re.findall(r"#[0-9a-f]{6}\b", figures)) <= {"#000000", "#ffffff"}
    assert "prefers-color-scheme: dark" in html


def test_numbers_claims_and_definitions_are_on_the_page(demo: Result, page: Page, html: str) -> None:
    text = " ".join(" ".join(page.text).split())
    for row in summary_table(demo).rows:
        for cell in row:
            assert cell.text in text
    for claim in demo.claims:
        assert claim.statement in text
        assert claim.detail in text
    for heading, definition in summary_table(demo).headings:
        assert heading in text
        assert definition.split(":")[0].replace("'", "&#39;") in html
    assert demo.environment["torch"] in text
    assert f"{demo.wall_seconds:.0f} s wall" in text


def test_all_files_are_there(output: Path) -> None:
    figures = (
        "six-panels-learning-rate",
        "six-panels-batch-size",
        "bounds",
        "flatness-and-volume",
        "hessian-spectrum",
    )
    expected = {f"{name}.{end}" for name in figures for end in ("png", "svg")}
    expected |= {"report.html", "measurements.csv", "correlations.csv", "inequalities.csv", "results.json"}
    expected |= {"final_weights.pt"}
    assert {p.name for p in output.iterdir()} == expected
    assert (output / "bounds.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_says_when_a_claim_fails(demo: Result) -> None:
    failed = Claim("Volume grows on trees", NOT_HELD, "0 of 3 <trees>")
    html = render(replace(demo, claims=[failed], spectrum=None))
    assert "✗ did not hold" in html
    assert "0 of 3 &lt;trees&gt;" in html
    assert "Hessian's spectral density" not in html


def test_a_violated_inequality_is_counted(demo: Result) -> None:
    run = replace(demo.runs[0], rows=[dict(r) for r in demo.runs[0].rows])
    run.rows[0]["status_mls"] = "violated"
    run.rows[1]["status_mls"] = "not applicable"
    check = next(c for c in check_inequalities([run]) if c.name == "mls")
    assert isinstance(check, InequalityCheck)
    assert (check.checked, check.violated, check.not_applicable) == (len(run.rows) - 1, 1, 1)
    claim = next(
        c for c in judge(demo.config, [run, *demo.runs[1:]], demo.correlations) if "A ≤ B" in c.statement
    )
    assert claim.verdict == NOT_HELD


def test_trends_are_judged_by_the_numbers(demo: Result) -> None:
    """Every verdict on a learning rate must be the order of the means, forwards and with the rates swapped."""
    for rates in (demo.config.learning_rates, demo.config.learning_rates[::-1]):
        config = replace(demo.config, learning_rates=rates, last_phase=10.0)
        claims = [c for c in judge(config, demo.runs, []) if "learning rate" in c.statement]
        assert len(claims) == 4
        for claim, key in zip(claims, ("sqrt_sharpness", "log_volume_top3", "mls", "nmls"), strict=True):
            means = [
                sum(r.final(key) for r in demo.runs if r.setting == s) for s in reversed(config.rate_sweep)
            ]
            expected = "held" if means[0] < means[1] < means[2] else "did not hold"
            assert claim.verdict == expected


def test_a_diverged_run_is_said_and_left_out(demo: Result) -> None:
    runs = [
        replace(r, diverged=True, rows=[*r.rows[:-1], {"train_loss": float("nan")}]) for r in demo.runs[:1]
    ]
    runs += demo.runs[1:]
    claims = judge(demo.config, runs, demo.correlations)
    assert "1 diverged" in claims[0].detail
    html = render(replace(demo, runs=runs, claims=claims))
    assert (
        "nan"
        not in re.sub(r"<style>.*?</style>|<script>.*?</script>|<svg.*?</svg>", "", html, flags=re.S).lower()
    )


def test_trends_are_undecided_before_the_last_phase(demo: Result) -> None:
    config = replace(demo.config, last_phase=1e-30)
    claims = judge(config, demo.runs, demo.correlations)
    trends = [c for c in claims if c.statement.startswith(("At the end", "Across runs", "Within"))]
    assert len(trends) == 14
    assert {c.verdict for c in trends} == {"undecided"}
    assert "did not reach the last phase" in trends[0].detail
