"""What the tests share: files beside the project, models and libraries that are made or found once."""
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from commands import ROOT, SHARED, made, run
import fork_server
from fork_server import FOLDER, IMPORTED
from schedule import (  # noqa: F401  (pytest looks for them here)
    pytest_addoption, pytest_collection_finish, pytest_collection_modifyitems, pytest_ignore_collect, pytest_runtest_logreport,
    pytest_sessionfinish)

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
SMALL = ["-p", "max_steps", 4, "-p", "max_samples", 40, "-p", "logging_steps", 1]
TRL = """torch datasets transformers trl.trainer.dpo_trainer trl.trainer.grpo_trainer trl.trainer.kto_trainer
    trl.trainer.reward_trainer trl.trainer.rloo_trainer trl.experimental.cpo trl.experimental.orpo"""
settings.register_profile("medllm", max_examples=int(os.environ.get("MEDLLM_EXAMPLES", 300)), deadline=None)
settings.load_profile("medllm")
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --window-size=1200,900""".split()


def pytest_configure(config):
    "The folder of the fork servers; they end with this process, which holds the pipe `alive` open."
    if hasattr(config, "workerinput") or not hasattr(os, "pidfd_open") or os.environ.get(FOLDER) == "": return
    folder = os.environ[FOLDER] = tempfile.mkdtemp(prefix="medllm-forks-")
    os.mkfifo(f"{folder}/alive")
    alive = os.open(f"{folder}/alive", os.O_RDWR)
    @config.add_cleanup
    def end():
        os.close(alive)
        shutil.rmtree(folder, ignore_errors=True)


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
        held = {} if script == "trl_ppo.py" else {IMPORTED: " ".join(TRL.split())}         # PPO is of another release
        done = run(sys.executable, ROOT/"tests/peers"/script, folder/"in.npz", folder/"out.npz", cwd=folder,
            PYTHONPATH=f"{place}{os.pathsep}{ROOT}", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", **held)
        assert done.returncode == 0, done.stderr[-2000:]
        with np.load(folder/"out.npz", allow_pickle=False) as out: return dict(out)
    return call


@pytest.fixture
def forked_kernels():
    "Kernels that the test itself starts are forked, see `fork_server`."
    with fork_server.forked_kernels(): yield


@pytest.fixture(scope="session")
def chat():
    "The tiny model, to talk to."
    from medllm.models.chat import load_chat_model
    return load_chat_model()


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    "Chromium without a window; skips where it is not installed."
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not here: see dev_requirements")
    if not CHROMIUM or not DRIVER: pytest.skip("chromium and chromium-driver are not here: make browser")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"): options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="session")
def own(tmp_path_factory):
    "A record with rows and a base model of its own, beside the record."
    from medllm.models.tiny import write_tiny
    place = tmp_path_factory.mktemp("own")
    rows = json.loads((ROOT/"data/mm.json").read_text(encoding="utf-8"))[:40]
    (place/"rows.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1))
    write_tiny(place/"base")
    record = made("sft", *SMALL, "-p", "dataset", place/"rows.json", "-p", "model_name_or_path", place/"base",
        "-p", "finetuning_type", "full", runs=place/"runs")
    return place, record


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    "A record of sample rows and the tiny model, which are on every machine."
    return made("sft", *SMALL, runs=tmp_path_factory.mktemp("plain"))


@pytest.fixture
def copy(own, tmp_path):
    "A copy of the record, to be spoilt."
    return Path(shutil.copytree(own[1], tmp_path/own[1].name))
