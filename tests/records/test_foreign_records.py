"""Records that somebody else wrote, or nobody: torn, hostile, of another kind; they are told, and steer no terminal."""
import contextlib
import io
import json
import os
import shutil
from pathlib import Path

import pytest
from commands import ROOT, STEERS, command
from written_files import cell, record

from faults.mutate import both, survives

from medllm.files import write_json

@pytest.fixture
def runs(tmp_path):
    "A folder with a record that is whole."
    record(tmp_path/"runs/sft/whole")
    return tmp_path/"runs"


# 500 mutated files of each kind, through every verb that reads

KINDS = ("run.json", "metrics.json", "seal.json", "fingerprint.json", "heartbeat.json", "events.jsonl", "history.jsonl",
    "record.ipynb", "source.ipynb", "checkpoint-2/COMMIT.json")
PAGES = ("run.json", "seal.json", "events.jsonl", "history.jsonl", "record.ipynb")


def data_of(page):
    "The text that a page holds its figures in."
    return page.read_text().partition('id="data">')[2].partition("</script>")[0]


def through_every_verb(runs, name):
    "Reads a record whose file `name` is what it is given: listed, shown, compared, verified, exported, freed, run."
    folder, other = runs/"sft/whole", runs/"sft/other"
    def read(what, data):
        (folder/name).write_bytes(data)
        at = ("--runs", runs)
        command("runs", "list", *at)
        command("runs", "list", "--json", *at)
        command("runs", "show", folder)
        command("runs", "compare", other, folder, *(["--notebooks"] if name.endswith("ipynb") else []))
        command("runs", "verify", folder)
        command("runs", "gc", "--failed", 0, *at)
        if name in PAGES:
            command("runs", "export", folder, "--output", runs.parent/"pages")
            for page in (runs.parent/"pages").iterdir(): json.loads(data_of(page))
        if name == "run.json":
            for kind in ("rocrate", "modelcard"):
                shutil.rmtree(runs.parent/"pages", ignore_errors=True)
                command("runs", "export", folder, "--as", kind, "--output", runs.parent/"pages")
            shutil.rmtree(runs.parent/"pages", ignore_errors=True)
        if name in ("run.json", "source.ipynb"):
            command("runs", "rerun", folder, "--runs", runs.parent/"again", "-p", "seed", "none")
    return read


def walk(runs, name, n, seed):
    shutil.copytree(runs/"sft/whole", runs/"sft/other")
    good = (runs/"sft/whole"/name).read_bytes()
    read = through_every_verb(runs, name)
    read("as it is", good)
    found = survives(read, both(good, seed, n), allowed=())
    assert not found, f"{len(found)} of {n}: " + "\n".join(found[:6])


@pytest.mark.parametrize("name", KINDS)
def test_some_mutated_files_of_a_record(runs, name):
    "No traceback, no hang, no flood, and nothing that steers a terminal."
    walk(runs, name, 12, "some")


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_500_mutated_files_of_a_record(runs, name): walk(runs, name, 500, "all")


def notebook_to_run(tmp_path, monkeypatch):
    "Reads a notebook that is given to `medllm run`, up to the kernel: checked, copied into a record, parameters put in."
    from papermill.engines import papermill_engines
    monkeypatch.setattr(papermill_engines, "execute_notebook_with_engine", lambda engine, nb, *a, **k: nb)
    file = tmp_path/"data.ipynb"
    def read(what, data):
        file.write_bytes(data)
        code, _, err = command("run", file, "-p", "dataset", "mm", "-p", "output_dir", tmp_path/"out")
        assert code == 1 or f"{file}" in err, (code, err)          # begun, or refused with its name
        shutil.rmtree(tmp_path/"out", ignore_errors=True)
    return read


def run_mutated(tmp_path, monkeypatch, n, seed):
    good, read = (ROOT/"nbs/runs/data.ipynb").read_bytes(), notebook_to_run(tmp_path, monkeypatch)
    read("as it is", good)
    found = survives(read, both(good, seed, n))
    assert not found, f"{len(found)} of {n}: " + "\n".join(found[:6])


def test_some_mutated_notebooks_that_are_to_be_run(tmp_path, monkeypatch): run_mutated(tmp_path, monkeypatch, 24, "some")


@pytest.mark.slow
def test_500_mutated_notebooks_that_are_to_be_run(tmp_path, monkeypatch): run_mutated(tmp_path, monkeypatch, 500, "all")


@pytest.mark.parametrize("text", ["["*100_000, '{"files":'*50_000, "[" + "{},"*100_000 + "{}]"])
@pytest.mark.parametrize("name", ["seal.json", "run.json", "record.ipynb"])
def test_a_depth_that_no_file_has_is_said(runs, name, text):
    (runs/"sft/whole"/name).write_text(text)
    code, out, err = command("runs", "verify", runs/"sft/whole")
    assert code in (1, 2) and name in out + err
    command("runs", "show", runs/"sft/whole")


def test_a_fault_of_our_own_keeps_its_traceback(runs, monkeypatch):
    "And says where it is reported; it is not called a broken file."
    from medllm.cli.main import main
    from medllm.records import listing
    def broken(*a, **k): raise ZeroDivisionError("ours\x1b[2J")
    monkeypatch.setattr(listing, "find_record", broken)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
        assert main(["runs", "show", str(runs/"sft/whole")]) == 1
    for part in ("Traceback", "ZeroDivisionError: ours\\u001b", "a fault of medllm", "/issues"): assert part in err.getvalue()


# whose code runs

@pytest.fixture
def sent(tmp_path):
    "A record with medllm's own notebook that can be changed: `sent(change)`; what would be executed is noted instead."
    notebook = json.loads((ROOT/"nbs/runs/sft.ipynb").read_text(encoding="utf-8"))
    def make(change=lambda nb: None, **state):
        folder = record(tmp_path/f"runs/sft/{len(list(tmp_path.glob('runs/sft/*')))}", consumed=[], inputs={}, **state)
        theirs = json.loads(json.dumps(notebook))
        change(theirs)
        write_json(folder/"source.ipynb", theirs)
        return folder
    return make


@pytest.fixture
def executed(monkeypatch):
    "What `rerun` and `resume` execute: the notebook's text, or the stage, and the parameters."
    from medllm.experiment import rerun as module
    calls = []
    def execute(notebook, given, **more):
        text = Path(notebook).read_text(encoding="utf-8") if notebook.endswith(".ipynb") else notebook
        calls.append((text, given, dict(os.environ)))
        raise module.UserError("executed")
    monkeypatch.setattr(module, "execute", execute)
    return calls


def source_of(notebook, name): return next(c for c in notebook["cells"] if c["id"] == name)
def add(cell): return lambda nb: nb["cells"].insert(2, cell)


EVIL = {
    "another cell": (lambda nb: source_of(nb, "train").update(source=["import os\n", "os.system('id')"]),
        "cell 'train' is another"),
    "one more cell": (add(cell("evil", "import os")), "cell 'evil' was added"),
    "one of the same name": (add(cell("train", "import os")), "was added"),
    "one without a name": (add({k: v for k, v in cell("x", "import os").items() if k != "id"}), "was added"),
    "a magic": (lambda nb: source_of(nb, "imports")["source"].insert(0, "%run /tmp/evil.py\n"), "cell 'imports' is another"),
    "the parameters": (lambda nb: source_of(nb, "parameters")["source"].append("\n__import__('os').system('id')"),
        "cell 'parameters' is another"),
    "a word": (lambda nb: source_of(nb, "train")["source"].append(" # x"), "cell 'train' is another"),
    "a cell of an unknown kind": (add(cell("evil", "x") | {"cell_type": "kode"}), "cell 'evil' was added"),
    "one cell less": (lambda nb: nb["cells"].remove(source_of(nb, "verdict")), "cell 'verdict' is not in it"),
    "another order": (lambda nb: nb["cells"].reverse(), "in another order")}


@pytest.mark.parametrize("how", EVIL)
def test_code_that_is_not_ours_is_not_run_unasked(sent, executed, how):
    change, why = EVIL[how]
    folder = sent(change)
    for words in (("rerun", folder), ("verify", folder, "--record-only", "--rerun")):
        if words[0] == "verify":
            from medllm.records.seal import seal
            text = (folder/"run.json").read_text().replace('"cells"', '"was"').replace('"stages"', '"were"')
            (folder/"run.json").write_text(text)
            seal(folder)
        code, _, err = command("runs", *words)
        assert code == 2 and "--trust" in err and why in err, err
    (folder/"run.json").write_text((folder/"run.json").read_text().replace('"completed"', '"interrupted"'))
    code, _, err = command("runs", "resume", folder)
    assert code == 2 and "--trust" in err and why in err and executed == []
    code, _, err = command("runs", "resume", folder, "--trust")
    assert "executed" in err and executed[0][0] == (folder/"source.ipynb").read_text()          # it was read, and is meant


def test_what_differs_is_said_cell_by_cell(sent, executed):
    def change(nb):
        source_of(nb, "train")["source"] = ["++evil()\n", "x = '\x1b[2J'\n", "long = '" + "a"*5000 + "'\n"] + ["pass\n"]*40
        nb["cells"].append(cell("more", "print(1)"))
    _, _, err = command("runs", "rerun", sent(change))
    for part in ("+++evil()", "\\u001b[2J", "(5010 characters)", "more lines", "cell 'more' was added"): assert part in err
    cells = err[err.index("  cell 'train'"):]
    assert "-metrics = job.train()" in cells and len(cells.splitlines()) < 25


OURS = {
    "as it is": lambda nb: None,
    "another kernel": lambda nb: nb["metadata"].update(kernelspec={"name": "evil", "language": "bash", "display_name": "x"}),
    "another language": lambda nb: nb["metadata"].update(language_info={"name": "r"}),
    "text that was added": lambda nb: nb["cells"].insert(0, {"cell_type": "markdown", "source": "x", "metadata": {}}),
    "the parameters marked elsewhere": lambda nb: (source_of(nb, "parameters").update(metadata={}),
        source_of(nb, "train").update(metadata={"tags": ["parameters"]})),
    "one piece for a list of lines": lambda nb: [c.update(source="".join(c["source"])) for c in nb["cells"]]}


@pytest.mark.parametrize("how", OURS)
def test_of_a_notebook_that_is_ours_nothing_but_ours_is_run(sent, executed, how):
    "Neither metadata nor marks of the sent file reach the kernel: the notebook that comes with medllm is executed."
    code, _, err = command("runs", "rerun", sent(OURS[how]))
    assert "error: executed" in err and executed[0][0] == "sft"
    assert executed[0][2]["PYTHONSAFEPATH"] == "1"                 # and no module that lies about in the working directory


@pytest.mark.parametrize("verb", ["rerun", "resume"])
def test_rows_that_somebody_has_tokenised_are_not_trained_on(sent, executed, verb):
    "A cache sent beside a record may hold any rows under the right name; they are read from the data again."
    folder = sent(status="failed", parameters={"dataset": "mm", "extra": {"tokenized_path": "theirs", "weight_decay": 0.1},
        "stages": {"sft": {"tokenized_path": "theirs"}}})
    assert "error: executed" in command("runs", verb, folder)[2]
    assert executed[0][1]["extra"]["weight_decay"] == 0.1 and "tokenized_path" not in str(executed[0][1])


def test_the_notebook_of_an_earlier_commit_is_ours_too(sent, executed, tmp_path, monkeypatch):
    "In a checkout, if the commit is one of this branch's; what somebody else had fetched into it is not."
    import subprocess
    from medllm.experiment import trust
    repo = tmp_path/"repo"
    (repo/"nbs/runs").mkdir(parents=True)
    git = lambda *words: subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *words], cwd=repo,
        capture_output=True, text=True, check=True).stdout.strip()
    git("init", "-q", "-b", "main")
    old = json.loads((ROOT/"nbs/runs/sft.ipynb").read_text())
    commits = {}
    for branch, text in (("main", "old()"), ("other", "evil()")):
        if branch == "other": git("checkout", "-q", "-b", "other")
        source_of(old, "train")["source"] = [text]
        write_json(repo/"nbs/runs/sft.ipynb", old)
        git("add", "-A")
        git("commit", "-q", "-m", branch)
        commits[branch] = git("rev-parse", "HEAD")
    git("checkout", "-q", "main")
    (repo/"nbs/runs/sft.ipynb").write_text("{}")
    git("commit", "-q", "-a", "-m", "new")
    monkeypatch.setattr(trust, "project_root", lambda: repo)
    made = lambda branch, text: sent(lambda nb: source_of(nb, "train").update(source=text),
        provenance={"code": {"commit": commits[branch]}})
    assert "error: executed" in command("runs", "rerun", made("main", "old()"))[2] and "old()" in executed[0][0]
    for branch, text in (("main", "evil()"), ("other", "evil()")):
        assert "--trust" in command("runs", "rerun", made(branch, text))[2]
    for commit in ("--output=/tmp/x", "HEAD", "../../x"):
        assert "--trust" in command("runs", "rerun", sent(lambda nb: source_of(nb, "train").update(source="x()"),
            provenance={"code": {"commit": commit}}))[2]
    assert len(executed) == 1


@pytest.mark.parametrize("parameters, why", [
    ({"extra": {"trust_remote_code": True}}, "extra.trust_remote_code runs code"),
    ({"trust_remote_code": True}, "trust_remote_code runs code"),
    ({"extra": {"push_to_hub": "true"}}, "push_to_hub sends the model"),
    ({"tasks": {"a": {"judge": "os:system"}}}, "tasks.a.judge imports a module"),
    ({"stages": {"sft": {"trust_remote_code": 1}}}, "stages.sft.trust_remote_code")])
def test_parameters_that_reach_out_are_asked_for(sent, executed, parameters, why):
    folder = sent(parameters=parameters)
    code, _, err = command("runs", "rerun", folder)
    assert code == 2 and why in err and "--trust" in err and executed == [], err
    assert "error: executed" in command("runs", "rerun", folder, "--trust")[2]


def test_what_the_user_asks_for_is_not_the_records(sent, executed):
    folder = sent(parameters={"extra": {"trust_remote_code": True}}, status="interrupted")
    for verb in ("rerun", "resume"):
        assert "error: executed" in command("runs", verb, folder, "-p", "trust_remote_code", "true")[2]
        assert "error: executed" in command("runs", verb, folder, "-p", "extra", '{"trust_remote_code": true}')[2]


def test_a_record_writes_no_file_of_ours(sent, executed, tmp_path):
    "A rerun writes into a new record; a resumed run that would write elsewhere, or through a link, is asked about."
    folder = sent(parameters={"output": str(tmp_path/"mine.txt")}, stage="predict", status="interrupted")
    shutil.copyfile(ROOT/"nbs/runs/predict.ipynb", folder/"source.ipynb")
    assert "error: executed" in command("runs", "rerun", folder)[2] and "output" not in executed[0][1]
    _, _, err = command("runs", "resume", folder)
    assert "parameter output writes a file outside the record" in err and len(executed) == 1
    linked = sent(status="interrupted")
    (linked/"history.jsonl").unlink()
    (linked/"history.jsonl").symlink_to(tmp_path/"mine.txt")
    assert "history.jsonl is a link" in command("runs", "resume", linked)[2] and len(executed) == 1


def test_a_parameter_name_is_no_code(sent, executed, tmp_path):
    "Names of papermill's parameters become source text: only names that medllm knows get so far."
    folder = sent(parameters={f"lr=1\nopen({str(tmp_path/'pwned')!r},'w')\nz": 1})
    from medllm.experiment import rerun as module
    from medllm.experiment.execute import execute
    module.execute = execute
    code, _, err = command("runs", "rerun", folder, "--runs", tmp_path/"new")
    assert code == 2 and "unknown parameter" in err and not (tmp_path/"pwned").exists()


def test_a_record_names_its_stage_and_nothing_else(sent, executed, tmp_path):
    "run.json names another notebook, or a path."
    for stage in ("../../evil", str(tmp_path/"evil.ipynb"), "sweep", "evil"):
        code, _, err = command("runs", "rerun", sent(stage=stage))
        assert code == 2 and executed == [], err
    assert "cell 'data' is another" in command("runs", "rerun", sent(stage="dpo"))[2] or executed == []
    missing = sent()
    (missing/"source.ipynb").unlink()
    assert "the notebook that comes with medllm is run" in command("runs", "rerun", missing)[2] and executed[0][0] == "sft"


def test_a_pipeline_and_a_sweep_go_on_by_the_same_command(sent, executed, tmp_path):
    from medllm.experiment.sweep import run_point
    folder = sent(EVIL["another cell"][0], status="interrupted")
    file = write_json(tmp_path/"p01.json", {"stage": "sft", "given": {}, "folder": str(folder), "resume": True, "sweep": ""})
    with contextlib.redirect_stderr(io.StringIO()) as said: assert run_point(file) == 2
    assert "--trust" in said.getvalue() and executed == []


def test_nothing_of_a_folder_is_run_to_compare_it(runs, tmp_path, monkeypatch):
    "git would run the program that the configuration of the working directory names."
    canary = tmp_path/"canary"
    (tmp_path/"evil.sh").write_text(f"#!/bin/sh\ntouch {canary}\n")
    (tmp_path/"evil.sh").chmod(0o755)
    import subprocess
    subprocess.run(["git", "init", "-q", str(tmp_path/"here")], check=True)
    subprocess.run(["git", "config", "diff.external", str(tmp_path/"evil.sh")], cwd=tmp_path/"here", check=True)
    monkeypatch.chdir(tmp_path/"here")
    other = record(tmp_path/"runs/sft/other")
    (other/"record.ipynb").write_text((other/"record.ipynb").read_text().replace("f()", "g()\\nh()"))
    _, out, _ = command("runs", "compare", runs/"sft/whole", other, "--notebooks")
    assert "g()" in out and not canary.exists()


# what reaches a terminal, and a page

ESCAPES = "\x1b]0;owned\x07\x1b[2J\x1b[31mred\rover\x9b1m\u202edlo\u2066x\x7f\nsft completed forged"


def spoilt(value):
    "Every text of a JSON value, and every key, with sequences in it."
    if isinstance(value, str): return value + ESCAPES
    if isinstance(value, list): return [spoilt(v) for v in value]
    return {k: spoilt(v) for k, v in value.items()} if isinstance(value, dict) else value


def test_no_field_of_a_record_steers_a_terminal(runs, tmp_path):
    "Fields, keys of metrics, events, names of files and of the record itself; and none begins a line of its own."
    state = json.loads((runs/"sft/whole/run.json").read_text())
    keep = ("stage", "status", "started", "ended")
    state = {k: v if k in keep else spoilt(v) for k, v in state.items()}
    state["metrics"] |= {f"m{ESCAPES}": 1.5}
    state["verdict"] = [{"what": ESCAPES, "target": ESCAPES, "measured": ESCAPES, "met": False}]
    state["consumed"] = [{"role": ESCAPES, "name": ESCAPES, "place": f"/nowhere{ESCAPES}", "weights": {ESCAPES: "ab"*32}}]
    evil = shutil.copytree(runs/"sft/whole", runs/f"sft/evil{ESCAPES}")
    write_json(evil/"run.json", state)
    (evil/f"file{ESCAPES}").write_text("x")
    with open(evil/"events.jsonl", "a") as f: f.write(json.dumps({"event": "promoted", "names": [ESCAPES]}) + "\n")
    at = ("--runs", runs)
    for words in (("list", *at), ("list", "--json", *at), ("show", evil), ("show", evil, "--json"),
            ("compare", runs/"sft/whole", evil, "--notebooks"), ("verify", evil), ("verify", evil, "--json"),
            ("gc", "--failed", 0, *at), ("rerun", evil), ("promote", evil), ("show", "nowhere" + ESCAPES, *at),
            ("compare", runs/"sft/whole", evil, "--plot", tmp_path/"ab.png")):
        _, out, err = command("runs", *words)
        assert not any(line.startswith("sft completed forged") for line in (out + err).splitlines()), words
    command("runs", "export", *[f for f in (runs/"sft").iterdir() if f.is_dir()], "--output", tmp_path/"pages")
    for page in (tmp_path/"pages").iterdir(): assert not STEERS.search(page.read_text()), page
    for kind in ("rocrate", "modelcard"):
        command("runs", "export", evil, "--as", kind, "--output", tmp_path/kind)
        file = next(f for f in (tmp_path/kind).rglob("*") if f.name in ("README.md", "ro-crate-metadata.json"))
        assert not STEERS.search(file.read_text())


def test_a_table_of_a_sweep_and_a_chat_are_told_too(tmp_path, monkeypatch):
    "What else is printed of others' words."
    from medllm.core import spelled, terminal
    with contextlib.redirect_stdout(io.StringIO()) as out:
        with spelled():
            print(f"| {ESCAPES} |")
            print("\x1b[32mours\x1b[0m", file=terminal())
    assert "\\u001b]0;owned" in out.getvalue() and "\x1b[32mours" in out.getvalue() and "\x1b]" not in out.getvalue()
    from medllm.serve import chat
    class Talk:
        sources = ESCAPES
        def say(self, question): yield ESCAPES
    with contextlib.redirect_stdout(io.StringIO()) as out: chat._print_answer(Talk(), "x")
    assert not STEERS.search(out.getvalue())


# figures that are none

@pytest.mark.parametrize("file, old, new", [
    ("history.jsonl", '"loss": 3.0', '"loss": 1e400'), ("history.jsonl", '"loss": 3.0', '"loss": NaN'),
    ("history.jsonl", '"step": 1', '"step": -Infinity'), ("history.jsonl", '"loss": 3.0', f'"loss": {"9"*400}'),
    ("run.json", '"loss_last": 2.0', '"loss_last": NaN'), ("run.json", '"loss_first": 3.0', '"loss_first": 1e400'),
    ("run.json", '"duration_s": 60.0', '"duration_s": -Infinity'), ("run.json", '"seed": 42', f'"seed": {"9"*4000}')])
def test_one_broken_figure_costs_no_other_record_its_page(runs, tmp_path, file, old, new):
    odd = shutil.copytree(runs/"sft/whole", runs/"sft/odd")
    text = (odd/file).read_text()
    assert old in text
    (odd/file).write_text(text.replace(old, new, 1))
    code, _, err = command("runs", "export", "--runs", runs, "--output", tmp_path/"pages")
    assert code == 0
    for page in ("index", "sft-odd", "sft-whole"):
        text = (tmp_path/f"pages/{page}.html").read_text()
        json.loads(data_of(tmp_path/f"pages/{page}.html"), parse_constant=pytest.fail)      # as a browser reads it
        assert "Traceback" not in text and ("whole" in text or page == "sft-odd")
    for kind in ("rocrate", "modelcard"):
        assert command("runs", "export", odd, runs/"sft/whole", "--as", kind, "--output", tmp_path/kind)[0] == 0
    json.loads((tmp_path/"rocrate/odd-crate/ro-crate-metadata.json").read_text(), parse_constant=pytest.fail)
    for row in json.loads(command("runs", "list", "--json", "--runs", runs)[1]): assert row["status"] == "completed"


def test_a_record_that_breaks_everything_is_named_and_the_others_are_exported(runs, tmp_path, monkeypatch):
    "An error that nobody thought of, in one of two records."
    from medllm.records import page
    shutil.copytree(runs/"sft/whole", runs/"sft/odd")
    summary = page._summary
    def broken(state):
        if state["parameters"]["note"] == "odd": raise ZeroDivisionError
        return summary(state)
    (runs/"sft/odd/run.json").write_text((runs/"sft/odd/run.json").read_text().replace('"note": "a test"', '"note": "odd"'))
    monkeypatch.setattr(page, "_summary", broken)
    code, _, err = command("runs", "export", "--runs", runs, "--output", tmp_path/"pages")
    assert "odd: its page cannot be made (ZeroDivisionError)" in err
    assert "cannot be shown" in (tmp_path/"pages/sft-odd.html").read_text()
    index = (tmp_path/"pages/index.html").read_text()
    assert "sft-odd.html" in index and "cannot be shown: ZeroDivisionError" in index and "sft-whole.html" in index


def test_one_record_that_gives_no_card_stops_no_other(runs, tmp_path):
    (runs/"sft/torn").mkdir()
    (runs/"sft/torn/run.json").write_text('{"stage": "sf')
    code, out, err = command("runs", "export", runs/"sft/torn", runs/"sft/whole", "--as", "modelcard",
        "--output", tmp_path/"cards")
    assert code == 2 and "torn" in err and "whole-card" in out


def test_a_pipe_and_a_hole_hold_nobody_up(runs, tmp_path):
    "Files that have no end, or whose end is far away."
    kinds = {"pipe": os.mkfifo, "hole": lambda f: open(f, "wb").truncate(10**12),
        "zero": lambda f: Path(f).symlink_to("/dev/zero")}
    for name, make in kinds.items():
        for file in ("run.json", "history.jsonl", "seal.json", "record.ipynb", "events.jsonl"):
            folder = shutil.copytree(runs/"sft/whole", runs/f"sft/{name}-{file}")
            (folder/file).unlink()
            make(folder/file)
            for words in (("show",), ("verify",), ("export", "--output", tmp_path/"pages"), ("rerun",)):
                command("runs", words[0], folder, *words[1:])
    command("runs", "list", "--runs", runs)


def test_gc_keeps_what_a_torn_record_came_from(runs, tmp_path):
    from medllm.records.retention import waste
    parent = runs/"sft/whole"
    shutil.copytree(parent/"checkpoint-2", parent/"checkpoint-1")              # no whole one: it says that it is another
    assert [w.name for w in waste(runs)] == ["checkpoint-1"]
    child = shutil.copytree(parent, runs/"sft/child", ignore=shutil.ignore_patterns("checkpoint-*"))
    write_json(child/"run.json", {"status": 3, "consumed": [{"place": str(parent/"checkpoint-1")}]})
    assert waste(runs) == []
