"""TensorBoard and MLflow beside a record: the same numbers, inside its folder, with no name of a person or a machine."""
import getpass
import importlib.util
import json
import socket
import sqlite3
import sys
from pathlib import Path

import pytest
from commands import losses, run

TRAIN = ("train", "--stage", "sft", "--dataset", "mm", "--model_name_or_path", "tiny", "--max_steps", 3,
    "--max_samples", 24, "--logging_steps", 1, "--seed", 1)


def medllm_after(code, *words):
    "What `medllm` does in a process that has run some code."
    return run(
        sys.executable, "-c", f"{code}\nimport sys\nfrom medllm.cli.main import main\nsys.exit(main(sys.argv[1:]))", *words)


def train(tmp_path, name, before=""):
    "A short training that reports, after some code; everything it wrote, but the weights."
    if importlib.util.find_spec(name) is None: pytest.skip(f"{name} is an extra: pip install 'medllm[{name}]'")
    done = medllm_after(before, *TRAIN, "--output_dir", tmp_path/"out", "--report_to", name)
    assert done.returncode == 0, done.stderr
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    for file in (tmp_path/"out").rglob("*"):
        private = (socket.gethostname(), f"/{getpass.getuser()}\0")
        assert not any(p in file.name for p in private), file
    return tmp_path/"out"


@pytest.mark.smoke
def test_tensorboard(tmp_path):
    folder = train(tmp_path, "tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder/"tensorboard"))
    events.Reload()
    shown = {e.step: e.value for e in events.Scalars("train/loss")}
    assert shown.keys() == losses(folder).keys() and all(abs(shown[s] - v) < 1e-5 for s, v in losses(folder).items())
    assert not any(socket.gethostname().encode() in f.read_bytes() for f in (folder/"tensorboard").iterdir())


@pytest.mark.smoke
def test_mlflow(tmp_path):
    "The network is taken away: nothing may be asked."
    asked = tmp_path.parent/f"{tmp_path.name}-asked"
    folder = train(tmp_path, "mlflow", """
import socket
real = socket.socket.connect
def connect(self, address):
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "localhost"):
        open(%r, "a").write(f"{address}\\n")
        raise OSError("no network here")
    return real(self, address)
socket.socket.connect = connect
""" % str(asked))
    assert not asked.exists(), asked.read_text()
    with sqlite3.connect(folder/"mlflow.db") as db:
        shown = dict(db.execute("select step, value from metrics where key = 'loss'"))
        tags = dict(db.execute("select key, value from tags"))
        (status, user), = db.execute("select status, user_id from runs")
    assert shown == pytest.approx(losses(folder)) and status == "FINISHED"
    assert not tags.get("mlflow.user") and user in ("", None) and socket.gethostname() not in json.dumps(tags)


def test_several_programs_and_an_unknown_one(monkeypatch, tmp_path):
    "A list as one word, as a notebook gives it; a misspelt name is a sentence, not a traceback."
    from medllm.core import UserError
    from medllm.train import reporting
    from medllm.train.arguments import parse
    args = parse(dict(model_name_or_path="tiny", dataset="mm", output_dir=str(tmp_path), report_to="tensorboard, mlflow"))
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
        lambda name, *more: True if name in ("tensorboard", "mlflow") else real(name, *more))
    assert reporting.reporters(args) == ["tensorboard", "mlflow"] == args.training.report_to
    args.training.report_to = ["tensorbord"]
    with pytest.raises(UserError, match="did you mean 'tensorboard'"): reporting.reporters(args)


def test_a_missing_package_is_named(tmp_path):
    hidden = "import sys; sys.modules['mlflow'] = None\nimport importlib.util as u\nreal = u.find_spec\n" \
        "u.find_spec = lambda name, *a: None if name == 'mlflow' else real(name, *a)\n"
    done = medllm_after(hidden, *TRAIN, "--output_dir", tmp_path/"out", "--report_to", "mlflow")
    assert done.returncode == 2 and 'pip install "medllm[mlflow]"' in done.stderr, done.stderr
    assert not Path(tmp_path/"out/model.safetensors").exists()
