"""Every notebook, executed as `nbdev_test` does it: its cells, its flags, its working directory."""
import sys

import pytest
from commands import ROOT, run

NOTEBOOKS = sorted(
    p for p in (ROOT/"nbs").rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in p.relative_to(ROOT).parts))
EXECUTE = """
import sys
from pathlib import Path
from nbdev.config import get_config
from nbdev.test import test_nb
passed, _ = test_nb(Path(sys.argv[1]), skip_flags=get_config().tst_flags.split(), basepath=get_config().config_path)
sys.exit(not passed)
"""


LONG = {"runs/pipeline.ipynb"}       # four trainings of their own, which the tests of pipelines have on fewer rows


@pytest.mark.parametrize("path", [pytest.param(p, id=name, marks=[pytest.mark.slow] if name in LONG else [])
    for p in NOTEBOOKS for name in [str(p.relative_to(ROOT/"nbs"))]])
def test_a_notebook_runs(path):
    done = run(sys.executable, "-c", EXECUTE, path, cwd=ROOT/"nbs")
    assert done.returncode == 0, done.stderr[-5000:]


def test_these_are_the_notebooks_of_nbdev():
    from nbdev.config import get_config
    from nbdev.doclinks import nbglob
    assert [str(p) for p in NOTEBOOKS] == sorted(str(p.absolute()) for p in nbglob(get_config().nbs_path, as_path=True))
