"""Every notebook, executed as `nbdev_test` does it: its cells, its flags, its working directory.

A run notebook runs on few steps, given as papermill gives them: below its parameters; whole behind the marker `slow`."""
import json
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
WITH_PARAMETERS = """
import json, os, sys
from pathlib import Path
from execnb.nbio import read_nb
from execnb.shell import CaptureShell
path, given = Path(sys.argv[1]), json.loads(sys.argv[2])
notebook, shell = read_nb(path), CaptureShell(path)
parameters, = (cell for cell in notebook.cells if cell.id == "parameters")
parameters.source += "".join(f"\\n{name} = {value!r}" for name, value in given.items())
os.chdir(path.parent)
try: shell.run_all(notebook, exc_stop=True)
except BaseException: sys.exit(shell.prettytb(fname=path))
"""
FEW = dict(max_steps=4, logging_steps=2)
SHORT = {
    **{f"runs/{stage}.ipynb": FEW | dict(max_samples=48, memorisation=4) for stage in ("pt", "sft", "dpo", "kto")},
    "runs/rm.ipynb": FEW, "runs/ppo.ipynb": FEW | dict(max_steps=2), "runs/predict.ipynb": dict(max_new_tokens=16),
    "runs/grpo.ipynb": FEW | dict(max_steps=2, per_device_train_batch_size=16)}
LONG = {*SHORT, "runs/pipeline.ipynb"}       # the tests of pipelines have fewer rows


def name_of(path): return str(path.relative_to(ROOT/"nbs"))


@pytest.mark.parametrize("path", [
    pytest.param(p, id=name_of(p), marks=[pytest.mark.slow] if name_of(p) in LONG else []) for p in NOTEBOOKS])
def test_a_notebook_runs(path):
    done = run(sys.executable, "-c", EXECUTE, path, cwd=ROOT/"nbs")
    assert done.returncode == 0, done.stderr[-5000:]


@pytest.mark.parametrize("path", [pytest.param(ROOT/"nbs"/name, id=name) for name in SHORT])
def test_a_run_notebook_of_few_steps(path):
    done = run(sys.executable, "-c", WITH_PARAMETERS, path, json.dumps(SHORT[name_of(path)]), cwd=ROOT/"nbs")
    assert done.returncode == 0, done.stderr[-5000:]


def test_these_are_the_notebooks_of_nbdev():
    from nbdev.config import get_config
    from nbdev.doclinks import nbglob
    assert [str(p) for p in NOTEBOOKS] == sorted(str(p.absolute()) for p in nbglob(get_config().nbs_path, as_path=True))
