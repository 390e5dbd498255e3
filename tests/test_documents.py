from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = LINK.findall(page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_index_names_every_page_of_results() -> None:
    named = {RESULTS / link for link in LINK.findall((RESULTS / "README.md").read_text(encoding="utf-8"))}
    pages = {*RESULTS.glob("20*.md"), *RESULTS.glob("*/README.md")}
    assert len(pages) > 40
    assert pages - named == set()
