"""Machines without a home, without UTF-8, without a network, and notebooks that were made elsewhere."""
import json
import os
import re
import shutil
import stat

import nbformat
import pytest
from commands import BIN, ROOT, process, run

from medllm.cli.main import main
from medllm.core import UserError

ROWS = [{"instruction": f"Gout, case {n}?", "output": "Rest and drink."} for n in range(8)]


@pytest.fixture
def read_only(tmp_path):
    "A folder that nobody may write into; taken away at the end like any other."
    folder = tmp_path/"read only"
    folder.mkdir(mode=0o555)
    yield folder
    folder.chmod(0o755)


@pytest.fixture
def place(tmp_path, monkeypatch):
    for name in ("MEDLLM_CACHE", "HF_HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR"): monkeypatch.delenv(name, raising=False)
    (tmp_path/"rows.json").write_text(json.dumps(ROWS))
    (tmp_path/"t").mkdir()
    return tmp_path


def plain_user():
    "Words before a command that take from root what other users do not have: to write where it is forbidden."
    if os.geteuid(): return []
    if not shutil.which("setpriv"): pytest.skip("this test is for a user who is not root, or needs setpriv")
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]


def train(place, output, **env):
    words = ["train", "--model_name_or_path", "tiny", "--dataset", "rows.json", "--max_steps", 1, "--template", "chatml",
        "--output_dir", output]
    return run(*plain_user(), BIN/"medllm", *words, cwd=place, TMPDIR=str(place/"t"), **env)


def test_a_home_that_cannot_be_written(place, read_only):
    "As in a container with a user of its own: what can be made again goes to a temporary folder, with a word."
    done = train(place, place/"out", HOME=str(read_only))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("there is no home folder that can be written") == 1 and "MEDLLM_CACHE" in done.stderr
    assert list((place/"out").rglob("*.safetensors")) and not list(read_only.iterdir())
    kept, = (place/"t").glob("medllm-*")
    assert (kept/"cache").is_dir() and stat.S_IMODE(kept.stat().st_mode) == 0o700


def test_an_output_folder_that_cannot_be_written(place, read_only):
    done = train(place, read_only/"out", HOME=str(place))
    assert done.returncode == 2 and done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr, done.stderr
    assert str(read_only) in done.stderr and "not writable" in done.stderr


@pytest.mark.parametrize("kept", ["relative", "missing", None])
def test_a_home_that_leads_nowhere(kept, tmp_path, monkeypatch, capsys):
    from medllm import machine
    monkeypatch.delenv("MEDLLM_CACHE", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(machine.tempfile, "tempdir", None)
    if kept: monkeypatch.setenv("HOME", {"relative": "somewhere", "missing": str(tmp_path/"never")}[kept])
    else:
        monkeypatch.delenv("HOME")
        def nobody(uid): raise KeyError(uid)
        monkeypatch.setattr("pwd.getpwuid", nobody)
    for made in (machine.substitute, machine._log_once): made.cache_clear()
    assert machine.home() is None and machine.cache_home().is_relative_to(tmp_path)
    machine.settle_home()
    assert os.environ["HOME"].startswith(str(tmp_path)) and capsys.readouterr().err.count("no home folder") == 1
    for made in (machine.substitute, machine._log_once): made.cache_clear()


@pytest.mark.parametrize("words", [("train", "--help"), ("data", "preview", "mm", "--reveal")], ids="help preview".split())
def test_a_console_of_ascii_letters(words):
    done = process("medllm", *words, PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", LC_ALL="C")
    assert done.returncode == 0 and not done.stderr.count("Traceback"), done.stderr
    assert done.stdout.isascii() and len(done.stdout) > 500


NAMELESS, FOREIGN = {}, {"kernelspec": {"name": "conda-env-med-py", "display_name": "Med", "language": "python"}}


@pytest.mark.parametrize("metadata, tag, said", [
    (NAMELESS, True, "does not say which kernel it is for: give one with -k python3"),
    (FOREIGN, True, "no kernel 'conda-env-med-py'.* -k python3"),
    (None, False, "unknown parameter 'dose'"),
    ({"kernelspec": {"name": "ir", "display_name": "R", "language": "R"}}, True, "no kernel .ir.")],
    ids="nameless foreign untagged R".split())
def test_notebooks_that_were_made_elsewhere(metadata, tag, said, tmp_path):
    cell = nbformat.v4.new_code_cell("dose = 1", metadata={"tags": ["parameters"]} if tag else {})
    own = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    cells = [cell, nbformat.v4.new_code_cell("print(dose)")]
    nb = nbformat.v4.new_notebook(cells=cells, metadata=own if metadata is None else metadata)
    nbformat.write(nb, tmp_path/"in.ipynb")
    done = run("papermill", "--engine", "medllm", "in.ipynb", "out.ipynb", "-p", "dose", 5, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert re.search(said, done.stderr), done.stderr


@pytest.fixture
def offline(monkeypatch):
    "A machine from which the hub cannot be reached; how often it was asked."
    from huggingface_hub import constants
    from medllm import machine
    asked = []
    class Session:
        def head(self, address, timeout):
            asked.append(timeout)
            raise OSError("no route")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_session", Session)
    machine.hub_answers.cache_clear()
    yield asked
    machine.hub_answers.cache_clear()


@pytest.mark.parametrize("words", ["export --model_name_or_path o/never_made --output x",
    "train --model_name_or_path o/never_made --dataset mm --output_dir x", "chat --model_name_or_path o/never_made",
    "evaluate mm --model_name_or_path o/never_made", "data preview mm --model o/never_made",
    "train --model_name_or_path tiny --dataset mm_rm --stage dpo --ref_model o/never_made --output_dir x",
    "export --model_name_or_path ./never_made --output x", "export --model_name_or_path o/p/never_made --output x"])
def test_a_model_that_is_nowhere(words, offline, tmp_path, monkeypatch, capsys):
    "At once, and asked for once at most."
    (tmp_path/"data").symlink_to(ROOT/"data")
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    said = capsys.readouterr().err
    assert said.count("error: ") == 1 and len(offline) <= 1 and "Retry" not in said, said
    assert "never_made is not on this machine" in said or "never_made does not exist" in said, said


def test_a_set_of_the_hub_without_a_network(offline, tmp_path):
    from medllm.data.readers import read_rows
    from medllm.data.registry import parse_entry
    with pytest.raises(UserError, match="dataset 'hosted': the hub set someone/rows is not on this machine.*cannot be reached"):
        list(read_rows(parse_entry("hosted", {"hf_hub_url": "someone/rows"}, tmp_path)))
    assert offline == [5]


def test_a_model_in_the_cache_is_opened_without_the_network(offline, tmp_path):
    from medllm.models.loading import LoadPlan, load_model, load_tokenizer
    from medllm.models.tiny import tiny_folder
    hub = tmp_path/"models--owner--name"
    (hub/"refs").mkdir(parents=True)
    (hub/"refs/main").write_text("0"*40)
    shutil.copytree(tiny_folder(), hub/"snapshots"/("0"*40))
    plan = LoadPlan(cache_dir=str(tmp_path))
    assert len(load_tokenizer("owner/name", plan)) and load_model("owner/name", plan) is not None and offline == [5]
    with pytest.raises(UserError, match="owner/other is not on this machine"): load_tokenizer("owner/other", plan)


def test_a_working_directory_that_was_removed(tmp_path, monkeypatch, capfd):
    from medllm.exits import exit_code
    (tmp_path/"gone").mkdir()
    monkeypatch.chdir(tmp_path/"gone")
    (tmp_path/"gone").rmdir()
    assert exit_code(lambda: pytest.fail("was begun")) == 2
    assert capfd.readouterr().err == "error: the working directory was removed; change to one that is there\n"


def test_an_output_that_is_a_link_to_nowhere_is_one_sentence(tmp_path, monkeypatch):
    "`mkdir` calls such a place an existing file; as the folder of all records it was looked for 99 times."
    from medllm.machine import can_write
    from medllm.records.record import new_folder
    from medllm.experiment.execute import _new
    for name, target in (("lost", "nowhere/x"), ("round", "round")):
        link = tmp_path/name
        link.symlink_to(target)
        why = f"{link} is a link that leads nowhere"
        assert can_write(link) == can_write(link/"deeper") == why
        for made in (lambda: new_folder("sft", str(link)), lambda: _new(link)):
            with pytest.raises(UserError, match=why): made()
