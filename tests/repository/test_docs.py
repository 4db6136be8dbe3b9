"""The pages: their links and paths lead somewhere, and the table of settings is up to date."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import prmoe_jax
from prmoe_jax.config.schema import Config, leaves

ROOT = Path(prmoe_jax.__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    ROOT / "experiments" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```|^ {4}.*?$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
FOLDERS = "prmoe_jax|configs|docs|experiments|notebooks|tests"
# A file by its extension, or a folder between backticks.
NAMED = re.compile(
    rf"\b(?:{FOLDERS})/[\w./-]*\.(?:py|md|jsonl?|sh|npz|svg|png)\b"
    rf"|(?<=`)(?:{FOLDERS})/[\w./-]*(?=`)"
)
# What a reader makes, or a report draws.
MADE = re.compile(r"experiments/(?:mine|NAME)/")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def anchors(text: str) -> set[str]:
    """The names by which a page's headings are linked to, as forges and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    words = [re.sub(r"[^\w\- ]", "", heading).strip().lower() for heading in headings]
    return {heading.replace(" ", "-") for heading in words}


def broken_links(page: Path, root: Path) -> list[str]:
    """The relative links of a page that lead to no file, or to no heading of one, below `root`."""
    broken = []
    for link in LINK.findall(CODE.sub("", page.read_text())):
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        outside = not target.resolve().is_relative_to(root)
        lost = not target.exists() or (anchor and anchor not in anchors(target.read_text()))
        if outside or lost:
            broken.append(link)
    return broken


def missing_files(text: str) -> list[str]:
    """The files and folders of the repository that a text names and that are not there."""
    named = [name for name in NAMED.findall(text) if not MADE.match(f"{name}/")]
    return [name for name in named if not (ROOT / name).exists()]


@each_page
def test_links_lead_somewhere(page):
    # The site holds the pages of docs/ alone, so their links must stay there.
    docs = ROOT / "docs"
    assert not broken_links(page, docs if page.parent == docs else ROOT)


@each_page
def test_named_files_exist(page):
    assert not missing_files(page.read_text())


def test_the_checks_see_mistakes(tmp_path):
    page = tmp_path / "page.md"
    code = "`a[1](b)`\n\n    a[2](c)\n\n```python\na[3](d)\n```\n"
    links = "[a](page.md) [b](#a-page) [c](no.md) [d](#no) [e](https://x.y/z)"
    page.write_text(f"# A page\n\n{links}\n{code}")
    assert broken_links(page, tmp_path) == ["no.md", "#no"]
    assert broken_links(page, tmp_path / "docs") == ["page.md", "#a-page", "no.md", "#no"]
    text = "`prmoe_jax/train.py`, `prmoe_jax/files.py`, `experiments/mine`, `configs/`, `docs/no/`"
    assert missing_files(text) == ["prmoe_jax/train.py", "docs/no/"]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_every_page_is_in_the_site_and_in_the_readme():
    site, readme = (ROOT / "mkdocs.yml").read_text(), (ROOT / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f": {page.name}\n" in site
        assert page.name == "index.md" or f"(docs/{page.name})" in readme


def test_the_map_is_that_of_the_package():
    """Each folder has its row, and the files in the row are in the folder."""
    text, package = (ROOT / "docs" / "architecture.md").read_text(), ROOT / "prmoe_jax"
    rows = dict(re.findall(r"^\| `(\w+)/` \|[^|]+\| (.*) \|$", text, re.MULTILINE))
    assert rows.keys() == {file.parent.name for file in package.glob("*/__init__.py")}
    for folder, row in rows.items():
        for name in re.findall(r"\w+\.py", row):
            assert (package / folder / name).exists(), f"prmoe_jax/{folder}/{name}"


def test_settings_are_up_to_date():
    command = [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_setting_is_described():
    text = (ROOT / "docs" / "configuration.md").read_text()
    text = text.split("### Parameters")[0]
    described = dict(re.findall(r"^\| `([\w.]+)` \| [^|]+ \| (\S.*) \|$", text, re.MULTILINE))
    assert described.keys() == leaves(Config()).keys()


def test_the_citation_has_the_version():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {prmoe_jax.__version__}\n" in citation


def test_figures_are_drawn_from_the_records(tmp_path):
    """Each is one that a page shows."""
    figures = runpy.run_path(str(ROOT / "docs" / "figures.py"))
    figures["main"](tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {"multipliers.svg", "pod_plans.png"}
    shown = (ROOT / "docs" / "results.md").read_text()
    assert all(f"](images/{name})" in shown for name in drawn)


@pytest.mark.parametrize(
    ("page", "ends"), [("README.md", "## Two commands"), ("experiments/README.md", "### Where")]
)
def test_the_claims_have_the_intervals_of_the_records(page, ends):
    """Each that a table of the claims has; experiments/claims/pooled.py makes them."""
    pooled = runpy.run_path(str(ROOT / "experiments" / "claims" / "pooled.py"))
    _, contrasts = pooled["contrasts"]()
    made = {
        pooled["shown"](apart).lstrip("+-")
        for one in contrasts
        for apart in (one.apart, one.at_equal_compute)
    }
    _, _, text = (ROOT / page).read_text().partition("## The paper's claims")
    text, found, _ = text.partition(ends)
    stated = set(re.findall(r"\d\.\d{3} ± \d\.\d{3}", text))
    assert found and len(stated) >= 5
    assert stated <= made
