"""The blocks of Python on the pages, run; and where their links lead."""

import re
from pathlib import Path

import pytest
from lectures.__main__ import anchor
from mktestdocs import check_md_file

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md")])
WITH_CODE = [page for page in PAGES if "```python" in page.read_text()]
LINK = re.compile(r'(?:\]\(|src=")([^)"]+)')


def name(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", WITH_CODE, ids=name)
def test_the_blocks_of_a_page_run_one_after_the_other(page):
    check_md_file(fpath=page, memory=True)


def anchors(page):
    """Those of its headings."""
    return set(map(anchor, re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for link in LINK.findall(page.read_text()):
        if "://" in link:
            continue
        path, _, part = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not part or part in anchors(target), link


def test_there_are_pages_with_code_and_links():
    assert {"README.md", "docs/guide.md", "docs/extras.md"} <= {name(page) for page in WITH_CODE}
    assert any(LINK.search(page.read_text()) for page in PAGES)
