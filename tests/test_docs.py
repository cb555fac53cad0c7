"""What the documents name is there: files, cells, links, extras; and lines have a length to read."""
import json
import re
from configparser import ConfigParser

import pytest
from packaging.requirements import Requirement

from conftest import ROOT
from test_repository import ORDER

PAGES = ["README.md", "README_zh.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT/".github").glob("*.md"))]
TUTORIALS = sorted(str(p.relative_to(ROOT)) for p in (ROOT/"nbs/tutorials").glob("*.ipynb"))


def text_of(name):
    "A page, or the prose of a notebook."
    if not name.endswith(".ipynb"): return (ROOT/name).read_text(encoding="utf-8")
    cells = json.loads((ROOT/name).read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


@pytest.mark.parametrize("name", [*PAGES, *TUTORIALS])
def test_named_files_are_there(name):
    named = set(re.findall(r"`((?:nbs|tests|\.github)/[\w./*]*)`", text_of(name))) - {"nbs/_records"}
    assert [path for path in sorted(named) if not any(ROOT.glob(path))] == []


@pytest.mark.parametrize("name", [*PAGES, *TUTORIALS])
def test_links_lead_somewhere(name):
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(name)):
        if re.match("https?:", link): continue
        path, _, heading = link.partition("#")
        page = (ROOT/name).parent/path if path else ROOT/name
        assert page.exists(), link
        if not heading: continue
        headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert heading in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}, link


@pytest.mark.parametrize("name", TUTORIALS)
def test_named_cells_are_there(name):
    "A how-to says which cell of which notebook is to be edited."
    found = re.findall(r"`(nbs/[\w/]+\.ipynb)`(?:,\s+cell| \|)\s+`([a-z0-9-]+)`", text_of(name))
    assert found or "/add_" not in name
    for notebook, cell in found:
        assert cell in {c["id"] for c in json.loads((ROOT/notebook).read_text(encoding="utf-8"))["cells"]}, notebook


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_the_readme_lists_its_sections_and_the_packages_in_their_order(name):
    text = text_of(name)
    contents, sections = text[:text.index("\n## ")], re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert re.findall(r"\[([^\]]+)\]\(#", contents) == sections
    assert re.findall(r"^\| `nbs/(\w+)/` \|", text, re.MULTILINE) == [*ORDER, "runs", "tutorials"]


@pytest.mark.parametrize("name", [*PAGES, *TUTORIALS])
def test_lines_are_short_enough_to_read(name):
    "A row of a table is one line in Markdown, however long."
    assert [line for line in text_of(name).splitlines() if len(line) > 120 and not line.startswith("|")] == []


def test_extras_that_messages_name_exist_and_tests_take_their_ranges():
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT/"settings.ini", encoding="utf-8")
    extras = {key.removesuffix("_requirements"): [*map(Requirement, value.split())]
        for key, value in settings["DEFAULT"].items() if key.endswith("_requirements")}
    texts = [p.read_text(encoding="utf-8") for p in [*(ROOT/"medllm").rglob("*.py"), ROOT/"README.md"]]
    named = {extra for text in texts for extra in re.findall(r"medllm\[(\w+)\]", text)}
    assert named and named <= extras.keys()
    ours = {r.name: r.specifier for r in extras.pop("dev")}
    for extra, wanted in extras.items():
        for r in wanted: assert ours.get(r.name, r.specifier) == r.specifier, f"{extra}: {r}"
