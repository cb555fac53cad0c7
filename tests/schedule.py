"""Which tests run, and in which order: the longest first, so that all workers end together; `--quick` takes the short ones."""
import gc
import json
import subprocess
from collections import Counter

import pytest
from commands import ROOT

DURATIONS = ROOT/"tests/durations.json"    # measured seconds of each file of tests, and of each notebook
NOTEBOOKS, ALWAYS = "tests/test_notebooks.py", ("tests/test_repository.py",)
BUDGET = 45                                # of all that `--quick` runs beside the changed notebooks [s]
_spent = Counter()


def pytest_addoption(parser):
    group = parser.getgroup("medllm")
    group.addoption("--quick", action="store_true", help="the files that take a few seconds, and the notebooks that were changed")
    group.addoption("--measure", action="store_true", help=f"write what each file took into {DURATIONS.name}")


def unit_of(nodeid):
    "What is run in one piece: a file of tests, whose fixtures are made once; a notebook."
    file, _, name = nodeid.partition("::")
    return f"{NOTEBOOKS}[{name.split('[')[1].split(']')[0]}]" if file == NOTEBOOKS and "[" in name else file


def measured():
    return json.loads(DURATIONS.read_text()) if DURATIONS.exists() else {}


def quick_files():
    "The shortest files that fit into `BUDGET`; a new one counts as short."
    chosen, left = set(ALWAYS), BUDGET
    known = {name: took for name, took in measured().items() if "[" not in name and name not in ALWAYS}
    for name, took in sorted(known.items(), key=lambda one: one[1]):
        left -= took
        if left < 0: break
        chosen.add(name)
    return chosen, known.keys() - chosen


def changed_notebooks():
    "Paths below nbs/ that differ from main, or are not in git."
    git = lambda *words: subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    bases = (git("merge-base", "HEAD", name) for name in ("origin/main", "main", "HEAD"))
    base = next((done.stdout.strip() for done in bases if not done.returncode), "HEAD")
    names = git("diff", "--name-only", base, "--", "nbs").stdout + git("ls-files", "-o", "--exclude-standard", "nbs").stdout
    return {name.removeprefix("nbs/") for name in names.splitlines()}


def pytest_ignore_collect(collection_path, config):
    if config.getoption("--quick") and collection_path.suffix == ".py":
        if str(collection_path.relative_to(ROOT)) in quick_files()[1]: return True


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    took, place = measured(), {}
    for item in items:
        unit = unit_of(item.nodeid)
        item.add_marker(pytest.mark.xdist_group(unit))
        place[item] = -took.get(unit, 5), unit
    items.sort(key=place.get)
    if config.getoption("--quick"):
        changed = changed_notebooks()
        left_out = [i for i in items if "path" in getattr(i, "fixturenames", ()) and unit_of(i.nodeid).startswith(f"{NOTEBOOKS}[")
            and unit_of(i.nodeid)[len(NOTEBOOKS) + 1:-1] not in changed]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [i for i in items if i not in set(left_out)]


def pytest_collection_finish():
    "What was imported stays: a collection, of which each training asks for some, need not look at all of it again."
    gc.collect()
    gc.freeze()


def pytest_runtest_logreport(report): _spent[unit_of(report.nodeid)] += report.duration


def pytest_sessionfinish(session):
    config = session.config
    if config.getoption("--measure") and not hasattr(config, "workerinput"):
        found = {name.split("@")[0]: round(took, 1) for name, took in _spent.items()}
        DURATIONS.write_text(json.dumps(measured() | found, indent=0, sort_keys=True, ensure_ascii=False) + "\n")
