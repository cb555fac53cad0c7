"""What the tests share: where things are, and how a command is run."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent/"shared"
BIN = Path(sys.executable).parent


def run(*words, cwd=ROOT, timeout=600, **env):
    "A finished process, with its output as text."
    words = [str(BIN/words[0]) if (BIN/words[0]).exists() else words[0], *map(str, words[1:])]
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", **env}
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=timeout, env=environment,
        stdin=subprocess.DEVNULL)


def losses(folder):
    "Step -> logged loss of a run."
    from medllm.train.loop import read_history
    return {h["step"]: h["loss"] for h in read_history(Path(folder)/"history.jsonl") if "loss" in h}


@pytest.fixture
def shared():
    "Finds a file beside the project, or skips with the reason."
    def find(path):
        file = SHARED/path
        if not file.exists(): pytest.skip(f"needs {path} in the folder shared/ beside the project")
        return file
    return find


@pytest.fixture(scope="session")
def tiny():
    "The tokenizer of the tiny model."
    from medllm.models.tiny import tiny_tokenizer
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def trl(tmp_path_factory):
    "Runs a script of tests/peers beside TRL, in a process of its own: arrays in, arrays out. Skips where TRL is missing."
    place = Path(os.environ.get("MEDLLM_TRL", ROOT/".trl"))
    if not (place/"trl").is_dir(): pytest.skip("TRL is not here: make trl")
    def call(script, arrays):
        folder = tmp_path_factory.mktemp("trl")
        np.savez(folder/"in.npz", **arrays)
        done = run(sys.executable, ROOT/"tests/peers"/script, folder/"in.npz", folder/"out.npz", cwd=folder,
            PYTHONPATH=f"{place}{os.pathsep}{ROOT}")
        assert done.returncode == 0, done.stderr[-2000:]
        with np.load(folder/"out.npz", allow_pickle=False) as out: return dict(out)
    return call
