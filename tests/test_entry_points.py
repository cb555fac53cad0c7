("Four entry points: Jupyter, the plain papermill command, an installed wheel; "
    "the fourth, nbdev_test, is a target of the Makefile.")
import json
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import nbformat
import papermill
import pytest
from commands import ROOT, process, run

from medllm.parameters import parameters_cell
from medllm.train.runs import SftRun


def test_from_jupyters_working_directory(tmp_path, forked_kernels):
    "Jupyter starts a notebook in its own folder; relative names still mean the project's."
    out = tmp_path/"out.ipynb"
    papermill.execute_notebook(
        str(ROOT/"nbs/runs/sft.ipynb"), str(out),
        dict(max_steps=5, runs_dir=str(tmp_path/"runs"), dataset="data/mm.json"),
        cwd=str(ROOT/"nbs/runs"), kernel_name="python3", progress_bar=False)
    folder, = (tmp_path/"runs/sft").iterdir()
    assert json.loads((folder/"run.json").read_text())["status"] == "completed"


@pytest.mark.smoke
def test_plain_papermill(tmp_path):
    done = run(
        "papermill", "nbs/runs/sft.ipynb", tmp_path/"out.ipynb", "-p", "max_steps", 5,
        "-p", "runs_dir", tmp_path/"runs", "--no-progress-bar")
    assert done.returncode == 0, done.stderr[-2000:]
    folder, = (tmp_path/"runs/sft").iterdir()
    state = json.loads((folder/"run.json").read_text())
    assert (state["status"], state["metrics"]["steps"]) == ("completed", 5)


def test_papermill_knows_the_parameters():
    "`papermill --help-notebook` is the documentation of the dataclass: same names, defaults and help."
    found = papermill.inspect_notebook(str(ROOT/"nbs/runs/sft.ipynb"))
    assert list(found) == list(SftRun.__dataclass_fields__)
    for name, field in SftRun.__dataclass_fields__.items():
        assert found[name]["help"] == field.metadata["help"]
        if name != "extra": assert found[name]["default"] == repr(field.default), name


def test_the_cell_is_the_dataclass():
    cells = nbformat.read(ROOT/"nbs/runs/sft.ipynb", 4).cells
    tagged = [c.source for c in cells if "parameters" in c.metadata.get("tags", [])]
    assert tagged == [parameters_cell(SftRun)]


def build_wheel(folder):
    "The project's wheel, from a copy of what git tracks, so that nothing else can slip in."
    source = folder/"source"
    for name in subprocess.run(
            ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        (source/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT/name, source/name)
    done = process("python", "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, source)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("medllm-*.whl"))


def use_wheel(python, folder):
    "Import, list and run from an environment that holds the wheel, somewhere else."
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    there = lambda *words: subprocess.run(
        [str(w) for w in words], cwd=folder, capture_output=True, text=True, env=env)
    where = there(python, "-c", "import medllm.train.loop, medllm.core as c; "
        "print(c.__file__, c.bundled('runs'), c.project_root())").stdout.split()
    assert str(ROOT) not in " ".join(where) and where[-1] == "None", where
    done = there(Path(python).parent/"medllm", "run", "sft", "-p", "max_steps", 3)
    assert done.returncode == 0, done.stderr
    record, = (folder/"runs/sft").iterdir()
    assert {"record.ipynb", "run.json", "model.safetensors", "loss.png"} <= {f.name for f in record.iterdir()}


@pytest.mark.slow
def test_from_a_wheel(tmp_path):
    "An environment of its own with the wheel; the libraries are lent from this one, since they are large."
    process("python", "-m", "venv", "--without-pip", tmp_path/"env")
    python = tmp_path/"env/bin/python"
    lent = Path(sysconfig.get_path("purelib", vars={"base": tmp_path/"env", "platbase": tmp_path/"env"}))/"lent.pth"
    lent.write_text(sysconfig.get_path("purelib") + "\n")
    wheel = build_wheel(tmp_path)
    done = process("python", "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    assert done.returncode == 0, done.stderr
    (tmp_path/"elsewhere").mkdir()
    use_wheel(python, tmp_path/"elsewhere")


@pytest.mark.slow
def test_from_a_wheel_with_everything_installed(tmp_path):
    "Nothing lent: pip installs the pinned libraries and the wheel."
    process("python", "-m", "venv", tmp_path/"env")
    python = tmp_path/"env/bin/python"
    for words in (["-r", ROOT/"requirements.txt"], [build_wheel(tmp_path)]):
        done = subprocess.run(
            [python, "-m", "pip", "install", "--quiet", *map(str, words)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    (tmp_path/"elsewhere").mkdir()
    use_wheel(python, tmp_path/"elsewhere")
