"""README.md and docs/: links and anchors resolve, and every script, configuration and test that they name exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```.*?^```\s*?$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)")
README_LINES = 150


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose(page: Path) -> str:
    """The page without its fenced code, where `#` starts a comment and brackets are no links."""
    return FENCE.sub("", read(page))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?) *$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        number = next(n for n in range(len(found) + 1) if (f"{slug}-{n}" if n else slug) not in found)
        found.add(f"{slug}-{number}" if number else slug)
    return found


def function_exists(path: str, function: str) -> bool:
    """Whether the test is in the file; while the file does not exist under this path, in any file of tests/."""
    files = [ROOT / path] if (ROOT / path).is_file() else sorted((ROOT / "tests").rglob("test_*.py"))
    return any(re.search(rf"^def {function}\(", read(file), re.MULTILINE) for file in files)


@pytest.fixture(params=PAGES, ids=[page.name for page in PAGES])
def page(request):
    return request.param


def test_relative_links_and_anchors_resolve(page):
    broken = []
    for target in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        if not place.exists() or (anchor and anchor not in anchors(place)):
            broken.append(target)
    assert not broken


def test_named_scripts_and_configurations_exist(page):
    named = re.findall(r"(?<![\w/.-])(?:scripts|configs)/[\w./-]*\w", read(page))
    missing = sorted({name for name in named if not (ROOT / name).exists()})
    assert not missing


def test_named_tests_exist(page):
    named = re.findall(r"(tests/[\w/]+\.py)::(\w+)", read(page))
    missing = sorted({f"{path}::{function}" for path, function in named if not function_exists(path, function)})
    assert not missing


def test_the_promises_name_their_tests():
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", read(ROOT / "docs" / "promises.md"))
    assert len(named) > 15


def test_the_index_links_every_page():
    linked = set(LINK.findall(prose(ROOT / "docs" / "index.md")))
    assert {page.name for page in PAGES[1:]} - {"index.md"} <= linked


def test_the_readme_is_a_front_page():
    assert len(read(ROOT / "README.md").splitlines()) <= README_LINES
