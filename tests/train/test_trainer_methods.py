"""The methods of `transformers.Trainer` that are overridden: the table in the notebook names them, and none has changed.

    python tests/train/test_trainer_methods.py     note the installed release, once its changes were read
"""
import ast
import hashlib
import inspect
import json
import re
import textwrap
from pathlib import Path

import pytest
import transformers
from packaging.version import parse

import medllm.rl.ppo as last
from medllm.checkpoint.resumable import ResumableTrainer

ROOT = Path(__file__).resolve().parent.parent.parent
READ = Path(__file__).with_name("trainer_methods.json")
TRAINER = transformers.Trainer


assert last.PpoTrainer            # so that all subclasses are there


def overridden(base=ResumableTrainer):
    "Method of `Trainer` -> our classes that override it, by the first word of their names."
    found, classes = {}, [base]
    while classes:
        kind = classes.pop(0)
        classes += kind.__subclasses__()
        for name, value in vars(kind).items():
            if inspect.isfunction(value) and name in vars(TRAINER) and not name.startswith("__"):
                found.setdefault(name, []).append(kind.__name__.removesuffix("Trainer"))
    return found


def cell():
    "The table's cell in the notebook."
    file, = (ROOT/"nbs/train").glob("*_trainer.ipynb")
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    return next("".join(c["source"]) for c in cells if c["id"] == "overridden")


def table():
    "Method -> classes, why, what breaks; as the table has them."
    rows = re.findall(r"^\| `(\w+)` \| ([\w, ]+) \| (.+?) \| (.+?) \|$", cell(), re.M)
    return {name: (classes.split(", "), why, breaks) for name, classes, why, breaks in rows}


def called():
    "Private methods and attributes below the table."
    methods, attributes = cell().split("They call")[1].split("read and")
    return re.findall(r"`(\w+)`", methods), re.findall(r"`(\w+)`", attributes)


def read(trainer=TRAINER):
    "Method -> its parameters, and a hash of its source."
    def known(name):
        method = inspect.getattr_static(trainer, name, None)
        if method is None: return ["", ""]
        source = textwrap.dedent(inspect.getsource(method))
        return [str(inspect.signature(method)), hashlib.sha256(source.encode()).hexdigest()[:16]]
    return {name: known(name) for name in sorted([n for n in table() if n.startswith("_")] + called()[0])}


def changes(now, versions, version):
    "A sentence for each method that is not as it was in the release it was last read in."
    if not versions: return []
    last = version if version in versions else max(versions, key=parse)
    rows, out = table(), []
    for name in now:
        if now[name] == versions[last].get(name): continue
        same = now[name][0] == versions[last].get(name, [""])[0]
        what = "took away" if not now[name][0] else "changed the body of" if same else "changed the parameters of"
        who = "it is called"
        if name in rows: who = f"{' and '.join(f'{c}Trainer' for c in rows[name][0])} override it: {rows[name][1]}"
        out.append(f"transformers {version} {what} Trainer.{name} since {last} ({who}): read "
            f"what it does now, then run {Path(__file__).name}")
    return out


def test_the_table_names_what_is_overridden():
    assert {name: sorted(classes) for name, (classes, *_) in table().items()} == {
        name: sorted(classes) for name, classes in overridden().items()}


def test_what_is_called_and_set_is_there():
    methods, attributes = called()
    names = {n.attr for n in ast.walk(ast.parse(inspect.getsource(TRAINER))) if isinstance(n, ast.Attribute)}
    assert [name for name in methods if not hasattr(TRAINER, name)] + [name for name in attributes if name not in names] == []


@pytest.mark.smoke
def test_no_method_has_changed():
    assert "\n".join(changes(read(), json.loads(READ.read_text()), transformers.__version__)) == ""


def test_a_method_that_changed_is_named():
    class Another(TRAINER):
        def _save(self, folder): pass
    versions = json.loads(READ.read_text())
    said, = changes(read(Another), versions, "99.0.0")
    assert "transformers 99.0.0 changed the parameters of Trainer._save" in said and table()["_save"][1] in said
    assert changes(versions["5.23.0"] | {"_save_scaler": ["", ""]}, versions, "5.23.0") == [
        "transformers 5.23.0 took away Trainer._save_scaler since 5.23.0 (it is called): read what it does now, then run "
        "test_trainer_methods.py"]


if __name__ == "__main__":
    versions = json.loads(READ.read_text()) if READ.exists() else {}
    READ.write_text(json.dumps(versions | {transformers.__version__: read()}, indent=1) + "\n")
