"""Rules of the repository: what the notebooks look like, and that the package is what they export."""
import ast
import json
import re
import shutil
import statistics
import subprocess
import sys

import pytest
import shape
from commands import ROOT, run

NOTEBOOKS = sorted(
    p for p in (ROOT/"nbs").rglob("*.ipynb") if not {".ipynb_checkpoints", "_records", "evidence"} & set(p.parts))
EXPORTING = [p for p in NOTEBOOKS if p.parent.name not in ("runs", "tutorials")]
name = lambda p: str(p.relative_to(ROOT/"nbs"))


def cells(path): return json.loads(path.read_text(encoding="utf-8"))["cells"]
def source(cell): return "".join(cell["source"])
def exported(path):
    return [c for c in cells(path) if c["cell_type"] == "code" and source(c).startswith("#| export")]


def test_export_from_scratch_leaves_git_clean(tmp_path):
    "The package is generated: a fresh export of the notebooks must give the very files that are there."
    for part in ("nbs", "medllm", "settings.ini", "README.md", "data", "pyproject.toml", "setup.py"):
        (shutil.copytree if (ROOT/part).is_dir() else shutil.copy)(ROOT/part, tmp_path/part)
    shutil.rmtree(tmp_path/"medllm")
    done = run("nbdev_export", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    files = lambda root: {str(p.relative_to(root)): p.read_text() for p in (root/"medllm").rglob("*.py")}
    ours, fresh = files(ROOT), files(tmp_path)
    assert ours.keys() == fresh.keys()
    assert [f for f in ours if ours[f] != fresh[f]] == []


def test_notebooks_are_clean(tmp_path):
    shutil.copytree(ROOT/"nbs", tmp_path/"nbs")
    for part in ("settings.ini", "pyproject.toml"): shutil.copy(ROOT/part, tmp_path/part)
    assert run("nbdev_clean", cwd=tmp_path).returncode == 0
    assert [name(p) for p in NOTEBOOKS
        if p.read_text() != (tmp_path/"nbs"/p.relative_to(ROOT/"nbs")).read_text()] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_a_notebook_is_well_formed(path):
    own = cells(path)
    first = source(own[0])
    assert re.match(r"# \S.*\n\n> \S", first), "title and one-line purpose"
    ids = [c["id"] for c in own]
    assert len(ids) == len(set(ids)) and all(re.fullmatch(r"[a-z][a-z0-9-]*", i) for i in ids), "cell ids are names"
    assert all(isinstance(c["source"], list) for c in own)
    assert path.stat().st_size < 200_000
    outputs = json.dumps([c.get("outputs", []) for c in own])
    assert '"output_type": "error"' not in outputs and "it/s]" not in outputs


@pytest.mark.parametrize("path", EXPORTING, ids=name)
def test_a_module_keeps_to_the_sizes(path):
    code = [c for c in cells(path) if c["cell_type"] == "code"]
    assert source(code[0]).startswith("#| default_exp ")
    target = source(code[0]).split()[-1].split(".")[-1]
    assert target.strip("_") == re.sub(r"^\d+_", "", path.stem)
    assert sum(len(c["source"]) - 1 for c in exported(path)) <= 350
    for cell in exported(path):
        assert len(cell["source"]) <= 41, cell["id"]        # with the line that says so
        assert not re.search(r"^from \.|import \*", source(cell), re.M), "no relative or star imports"
    hidden = [c for c in code if source(c).startswith("#| hide")]
    assert len(hidden) <= max(3, 0.34*len(code))
    prose = sum(len(source(c).split()) for c in cells(path) if c["cell_type"] == "markdown")
    assert prose >= sum(len(c["source"]) for c in exported(path)), "prose explains the code"


@pytest.mark.parametrize("path", EXPORTING, ids=name)
def test_public_functions_are_documented(path):
    "A docstring, and a comment for each parameter of more than one line's signature."
    for cell in exported(path):
        for node in ast.parse(source(cell)).body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"): continue
            assert ast.get_docstring(node) or len(node.body) == 1, f"{cell['id']}: {node.name} has no docstring"
            if isinstance(node, ast.FunctionDef): assert len(node.args.args) <= 8, node.name


ORDER = ["data", "audit", "medical", "models", "checkpoint", "records", "evaluate", "train", "rl", "serve", "retrieval",
    "predict", "export", "experiment", "cli"]       # over the ground floor, which all share


def module_of(path):
    "Of a notebook: `medllm.data.rows` of nbs/data/12_rows.ipynb."
    return ".".join(["medllm", *path.relative_to(ROOT/"nbs").parts[:-1], re.sub(r"^[0-9]+_", "", path.stem)])


def imported(path):
    "Modules of medllm that a notebook's exported cells import, wherever in them."
    for cell in exported(path):
        for node in ast.walk(ast.parse(source(cell))):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("medllm."):
                yield node.module.replace("__main__", "main")


@pytest.mark.parametrize("path", EXPORTING, ids=name)
def test_imports_go_one_way(path):
    "A notebook imports only from those before it: packages in their order, and within one by number."
    numbers = {module_of(p): int(p.stem.split("_")[0]) for p in EXPORTING}
    package = lambda module: module.split(".")[1] if module.count(".") > 1 else ""
    rank = lambda module: ((ORDER.index(package(module)) if package(module) else -1), numbers[module])
    for module in imported(path): assert rank(module) < rank(module_of(path)), f"{module_of(path)} imports {module}"


def test_the_packages_are_those_of_the_order():
    assert {path.parent.name for path in EXPORTING} == {"nbs", *ORDER}


@pytest.mark.parametrize("package", ["", *ORDER])
def test_numbers_of_notebooks_have_no_gaps(package):
    numbers = [int(p.stem.split("_")[0]) for p in sorted((ROOT/"nbs"/package).glob("*.ipynb"))]
    assert numbers == list(range(len(numbers)))


@pytest.mark.parametrize("package", ["evaluate", "serve", "retrieval", "records"])
def test_what_is_used_without_training_imports_none_of_it(package):
    "Whatever a module of these needs, in whichever cell it asks for it."
    needs = {module_of(path): {*imported(path)} for path in EXPORTING}
    for module in (m for m in needs if m.startswith(f"medllm.{package}.")):
        closure, new = set(), {module}
        while new: closure, new = closure | new, {d for m in new for d in needs[m]} - closure - new
        assert not [m for m in closure if m.split(".")[1] in ("train", "rl")], module


def test_no_public_name_stands_in_two_modules():
    "But for those that `tests/shape.py` gives a reason for."
    assert {n: where for n, where in shape.names_in_two().items() if n not in shape.SHARED} == {}
    assert shape.SHARED.keys() <= shape.names_in_two().keys(), "an exception that nobody needs any more"


def test_half_of_the_exported_cells_have_at_most_twelve_lines():
    assert statistics.median(shape.cell_lines().values()) <= 12


def test_what_is_public_is_shown_before_the_next_export():
    assert {name: share for name, share in shape.shares_shown().items() if share < 0.9} == {}


def test_every_public_parameter_has_a_comment():
    assert [what for path, tree in shape.modules().items() for what in shape.uncommented(path, tree)] == []


def test_a_purpose_names_the_thing():
    assert [str(p) for p, text in shape.purposes().items() if shape.QUESTION.match(text)] == []


def test_nothing_is_folded_into_a_line():
    "No long lines, no four names at once, no body that begins behind a colon and goes on below."
    assert [*shape.long_lines(), *shape.wide_assignments(), *shape.folded_bodies()] == []


def test_a_file_of_tests_stays_with_one_worker(request):
    "pytest-xdist 3.8 forgets the groups under pytest 9.2, and each worker makes all fixtures of a file."
    if request.config.getoption("dist", "no") == "loadgroup" and hasattr(request.config, "workerinput"):
        assert "@" in request.node.nodeid


def test_run_notebooks_define_nothing():
    for path in (ROOT/"nbs/runs").glob("*.ipynb"):
        code = [c for c in cells(path) if c["cell_type"] == "code"]
        tree = ast.parse("\n".join(source(c) for c in code))
        assert not [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.Lambda))]
        assert sum("parameters" in c["metadata"].get("tags", []) for c in code) == 1


def test_every_module_imports_in_a_fresh_process():
    modules = [
        ".".join(p.relative_to(ROOT).with_suffix("").parts) for p in (ROOT/"medllm").rglob("*.py")
        if p.stem not in ("_modidx", "__main__")]
    code = "import importlib\nfor m in %r: importlib.import_module(m.removesuffix('.__init__'))" % modules
    done = subprocess.run(
        [sys.executable, "-W", "error::SyntaxWarning", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_nothing_new_at_the_top():
    allowed = {
        "nbs", "medllm", "data", "tests", "settings.ini", "README.md", "README_zh.md", "setup.py",
        "pyproject.toml", "requirements.txt", "Makefile", "LICENSE", "CITATION.cff", ".ci", ".github", ".gitignore",
        ".gitattributes"}
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    assert {f.split("/")[0] for f in tracked if f} <= allowed
    assert "medllm/data/registry.py" in tracked


def test_pins_are_inside_the_ranges():
    "requirements.txt pins each package that settings.ini names, torch first, inside its range."
    from configparser import ConfigParser
    from packaging.requirements import Requirement
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT/"settings.ini")
    lines = [
        line for line in (ROOT/"requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines)
    assert lines[0].startswith("torch==")
    for wanted in map(Requirement, settings["DEFAULT"]["requirements"].split()):
        assert wanted.specifier.contains(pins[wanted.name.lower()]), wanted


def test_the_samples():
    "Counts and shape of the sample data; halves in Chinese and English."
    rows = lambda file: json.loads((ROOT/"data"/file).read_text(encoding="utf-8"))
    chinese = lambda text: bool(re.search(r"[\u4e00-\u9fff]", text))
    mm, rm, mcq = rows("mm.json"), rows("mm_rm.json"), rows("mm_mcq.json")
    pt = (ROOT/"data/mm_pt.txt").read_text(encoding="utf-8").splitlines()
    assert (len(mm) >= 240 and sum(bool(r["history"]) for r in mm) >= 40
        and {len(r["history"]) for r in mm} == {0, 1, 2, 3})
    assert len(pt) >= 240 and all(pt) and len(rm) >= 120 and len(mcq) >= 80
    assert all(len(r["output"]) == 2 and r["output"][0] != r["output"][1] for r in rm)
    assert all(r["answer"] in r["options"] for r in mcq)
    for texts in ([r["instruction"] for r in mm], pt, [r["instruction"] for r in rm], [r["question"] for r in mcq]):
        assert len(set(texts)) == len(texts) and 0.45 < sum(map(chinese, texts))/len(texts) < 0.55


def test_readmes_tell_the_same():
    "Same commands and links in both languages; every figure of the text stands in the other."
    english, chinese = (
        (ROOT/"README.md").read_text(encoding="utf-8"), (ROOT/"README_zh.md").read_text(encoding="utf-8"))
    blocks = lambda text: [
        re.sub(r"#.*", "", b) for b in re.findall(r"```(?:bash|yaml|json)\n(.*?)```", text, re.S)]
    squeeze = lambda bs: ["\n".join(line.rstrip() for line in b.splitlines() if line.strip()) for b in bs]
    assert squeeze(blocks(english)) == squeeze(blocks(chinese))
    assert english.count("\n## ") == chinese.count("\n## ")


def test_the_memorised_exam_comes_from_its_records():
    "The READMEs' table of an evaluation is tests/memorised_results.json."
    for readme in ("README.md", "README_zh.md"):
        text = (ROOT/readme).read_text(encoding="utf-8")
        for row in json.loads((ROOT/"tests/memorised_results.json").read_text()):
            assert f"| {' | '.join(row)} |" in text, f"{readme}: {row}"


def test_the_demo_on_the_first_screen_comes_from_its_record():
    "The READMEs' answers and losses are those of tests/demo_results.json, which tests/demo.py wrote from a record."
    import demo
    found = json.loads((ROOT/"tests/demo_results.json").read_text(encoding="utf-8"))
    for readme in ("README.md", "README_zh.md"):
        text = (ROOT/readme).read_text(encoding="utf-8")
        for line in demo.lines(found): assert line in text, f"{readme}: {line}"
        assert str(found["train_rows"]) in text


def test_speed_figures_come_from_the_measurement():
    "Each row of the READMEs' tables of speed is of a file that a benchmark wrote: tests/bench/tables.py."
    sys.path.insert(0, str(ROOT/"tests/bench"))
    import tables
    rows = list(tables.rows())
    assert len(rows) == 4 + 5 + 4
    reached = tables.measured("sft_results.json")["limit"]["reached"]["medllm"]
    for readme in ("README.md", "README_zh.md"):
        text = (ROOT/readme).read_text(encoding="utf-8")
        for row in rows: assert row in text, f"{readme}: {row}"
        assert f"{reached:.0%}" in text
