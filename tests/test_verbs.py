"""What became of a record: listed, verified, run again, resumed, freed, promoted (faults R10 to R14 of issue 5)."""
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import BIN, ROOT, losses, run

SMALL = ["-p", "max_steps", 4, "-p", "max_samples", 40, "-p", "logging_steps", 1]


def medllm(*words, **env): return run("medllm", *words, **env)
def state_of(folder): return json.loads((Path(folder)/"run.json").read_text())
def write(file, value): Path(file).write_text(json.dumps(value))


def made(*words, runs, **env):
    "Folder of a run that completed."
    done = medllm("run", *words, "--runs", runs, **env)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip().splitlines()[-1].removeprefix("record: "))


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    "A record of sample rows and the tiny model, which are on every machine."
    return made("sft", *SMALL, runs=tmp_path_factory.mktemp("plain"))


@pytest.fixture
def copy(own, tmp_path):
    "A copy of the record, to be spoilt."
    return Path(shutil.copytree(own[1], tmp_path/own[1].name))


# R10 and acceptance 2: one change, and verify names exactly that

def named(folder, *words, **env):
    "Exit code and sentences of verify, but for what it says of the seal itself."
    done = medllm("runs", "verify", folder, *words, **env)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, [line for line in done.stdout.splitlines() if not line.startswith("  ")]


def change(file, old, new):
    "Replace the first of a text in a file."
    text = file.read_text(encoding="utf-8")
    assert old in text, old
    file.write_text(text.replace(old, new, 1), encoding="utf-8")


def edit(folder, path, value):
    "Another value in run.json."
    state = state_of(folder)
    table = state
    *way, last = path.split(".")
    for part in way: table = table[part]
    assert table[last] != value
    table[last] = value
    (folder/"run.json").write_text(json.dumps(state, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def test_an_untouched_record_holds(own):
    code, said = named(own[1])
    assert code == 0 and len(said) == 1
    for part in ("seal", "status", "cells in order", "metrics", "data files (1)", "models (1)", "packages"):
        assert part in said[0]


@pytest.mark.parametrize("path, value", [
    ("metrics.loss_last", 0.5), ("metrics.rows.0.kept", 41), ("parameters.seed", 43), ("provenance.packages.torch", "2.12.0"),
    ("provenance.python", "3.12.1"), ("inputs.data.0.name", "other"), ("status", "failed"), ("started", "2020-01-01")])
def test_a_changed_value_is_named(copy, path, value):
    state = state_of(copy)
    if "metrics.rows" in path: state["metrics"]["rows"][0]["kept"] = value
    elif "inputs.data" in path: state["inputs"]["data"][0]["name"] = value
    else: state = None
    if state: (copy/"run.json").write_text(json.dumps(state, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    else: edit(copy, path, value)
    assert named(copy) == (1, [f"run.json: {path} was changed since the record was sealed"])


def test_a_changed_cell_is_named(copy):
    record = json.loads((copy/"record.ipynb").read_text())
    cell = next(c for c in record["cells"] if c["id"] == "train")
    cell["source"] = ["metrics = train_in(run, args, data, 2)"]
    write(copy/"record.ipynb", record)
    assert named(copy, "--record-only") == (1, ["record.ipynb: cell 'train' was changed"])


def test_a_changed_output_is_named(copy):
    record = json.loads((copy/"record.ipynb").read_text())
    cell = next(c for c in record["cells"] if c["id"] == "metrics")
    cell["outputs"][0]["data"]["text/plain"] = ["{'loss_last': 0.1}"]
    write(copy/"record.ipynb", record)
    assert named(copy, "--record-only") == (1, ["record.ipynb: cell 'metrics' was changed (what it showed, not its code)"])


@pytest.mark.parametrize("name", ["model.safetensors", "history.jsonl", "loss.png", "source.ipynb"])
def test_one_changed_byte_is_named(copy, name):
    data = bytearray((copy/name).read_bytes())
    at = len(data)//2
    data[at] ^= 1
    (copy/name).write_bytes(data)
    code, said = named(copy, "--record-only")
    assert code == 1 and len(said) == 1 and said[0].startswith(name), said


def test_what_was_taken_or_put_there_is_named(copy):
    (copy/"loss.png").unlink()
    (copy/"better.png").write_bytes(b"x")
    assert named(copy, "--record-only") == (1, ["loss.png was removed since the record was sealed",
        "better.png was added since the record was sealed"])


def test_a_notebook_of_another_run_is_named(copy, plain):
    shutil.copyfile(plain/"record.ipynb", copy/"record.ipynb")
    code, said = named(copy, "--record-only")
    assert code == 1 and all(line.startswith("record.ipynb: cell '") for line in said) and len(said) > 3


def test_one_data_byte_is_named(own):
    "The size and the time stay; only a byte is another (R14: nothing goes by the time of a file)."
    rows, before = own[0]/"rows.json", (own[0]/"rows.json").read_bytes()
    times = (rows.stat().st_atime_ns, rows.stat().st_mtime_ns)
    at = before.index(b"instruction", len(before)//2) + 20
    try:
        rows.write_bytes(before[:at] + bytes([before[at] ^ 1]) + before[at + 1:])
        os.utime(rows, ns=times)
        code, said = named(own[1])
        assert code == 1 and len(said) == 1 and said[0].startswith(f"data file {rows} was changed: sha256 "), said
        assert named(own[1], "--record-only")[0] == 0
    finally: rows.write_bytes(before)


def test_one_byte_of_the_base_model_is_named(own):
    weights, before = own[0]/"base/model.safetensors", (own[0]/"base/model.safetensors").read_bytes()
    try:
        weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        code, said = named(own[1])
        assert code == 1 and len(said) == 1 and said[0].startswith(f"base model {weights} was changed: sha256 "), said
    finally: weights.write_bytes(before)


def test_another_package_here_is_named(own, tmp_path):
    fake = tmp_path/"accelerate-9.9.dist-info"
    fake.mkdir()
    (fake/"METADATA").write_text("Metadata-Version: 2.1\nName: accelerate\nVersion: 9.9\n")
    then = state_of(own[1])["provenance"]["packages"]["accelerate"]
    code, said = named(own[1], PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert (code, said) == (1, [f"accelerate is 9.9 here, and {then} in the record"])


def test_figures_in_a_text(own, tmp_path):
    loss = state_of(own[1])["metrics"]["loss_last"]
    text = tmp_path/"TABLE.md"
    text.write_text(f"| ours | {loss:.2f} <!-- record: {own[1]} metrics.loss_last --> |\n")
    assert medllm("runs", "verify", "--tables", text).returncode == 0
    text.write_text(f"| ours | {loss - .02:.2f} <!-- record: {own[1]} metrics.loss_last --> |\n")
    done = medllm("runs", "verify", "--tables", text)
    assert done.returncode == 1 and f"{text}:1: metrics.loss_last is written as {loss - .02:.2f}, and {loss:.6g}" in done.stdout


def test_a_mark_that_is_none_is_no_silence(own, tmp_path):
    "A number whose mark cannot be read has not been compared."
    shutil.copytree(own[1], tmp_path/"my run")
    good, text = f"{state_of(own[1])['metrics']['loss_last']:.2f}", tmp_path/"TABLE.md"
    for mark, code in (("my run metrics.loss_last", 0), ("my run", 1), ("", 1)):
        text.write_text(f"{good} <!-- record: {own[1]} metrics.loss_last --> and {good} <!-- record: {mark} -->\n")
        done = medllm("runs", "verify", "--tables", text)
        assert done.returncode == code, (mark, done.stdout, done.stderr)
    text.write_text(f"{good} <!-- record: {own[1]} metrics.loss_last --> and 99.9 <!-- record: my run metrics.loss_last -->\n")
    assert medllm("runs", "verify", "--tables", text).returncode == 1


@pytest.mark.parametrize("event", ["freed", "promoted"])
def test_no_event_explains_away_the_evidence(copy, event):
    names = ["record.ipynb", "metrics.json", "history.jsonl"]
    for name in names: (copy/name).unlink()
    with open(copy/"events.jsonl", "a") as f: f.write(json.dumps({"event": event, "names": names}) + "\n")
    code, said = named(copy, "--record-only")
    assert code == 1 and {line.split()[0] for line in said} == set(names), said


# acceptance 5 and R13: from one record folder alone

def test_a_reader_runs_it_again(plain, tmp_path):
    "One folder, another working directory, the runs it came from out of sight."
    (tmp_path/"reader").mkdir()
    record = Path(shutil.copytree(plain, tmp_path/"reader/record"))
    done = run("medllm", "runs", "rerun", "record", cwd=tmp_path/"reader")
    assert done.returncode == 0, done.stderr
    assert "exact as record" in done.stdout
    again, = (tmp_path/"reader/runs/sft").iterdir()
    assert losses(again) == losses(plain) and len(losses(plain)) == 4
    assert state_of(again)["parent"] == {"rerun": str(record)}
    assert state_of(again)["metrics"]["loss_last"] == state_of(plain)["metrics"]["loss_last"]
    changed = run("medllm", "runs", "rerun", "record", "-p", "learning_rate", "5e-3", cwd=tmp_path/"reader")
    assert changed.returncode == 0 and "different from record" in changed.stdout, changed.stderr
    compared = run("medllm", "runs", "compare", "record", "last", "--same-fingerprint", "--plot", "ab.png", cwd=tmp_path/"reader")
    assert compared.returncode == 1 and "learning_rate" in compared.stdout, compared.stderr
    assert (tmp_path/"reader/ab.png").stat().st_size > 5000


def test_verify_by_running_again(plain, tmp_path):
    done = medllm("runs", "verify", plain, "--rerun", "--runs", tmp_path)
    assert done.returncode == 0 and "exact: the weights have the same hashes" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("gone, word", [("rows.json", "data file"), ("base", "base model")])
def test_missing_inputs_are_named_by_hash(own, tmp_path, gone, word):
    (own[0]/gone).rename(own[0]/"elsewhere")
    try: done = medllm("runs", "rerun", own[1], "--runs", tmp_path/"runs")
    finally: (own[0]/"elsewhere").rename(own[0]/gone)
    state = state_of(own[1])
    digest = (next(iter(state["inputs"]["data"][0]["sha256"].values())) if gone == "rows.json"
        else state["consumed"][0]["weights"]["model.safetensors"])
    assert done.returncode == 2 and word in done.stderr and f"is not here (sha256 {digest})" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path/"runs").exists()


@pytest.mark.slow
def test_moved_data_may_be_named(own, tmp_path):
    shutil.copyfile(own[0]/"rows.json", tmp_path/"moved.json")
    (own[0]/"rows.json").rename(own[0]/"elsewhere")
    try: done = medllm("runs", "rerun", own[1], "-p", "dataset", tmp_path/"moved.json", "--runs", tmp_path/"runs")
    finally: (own[0]/"elsewhere").rename(own[0]/"rows.json")
    assert done.returncode == 0 and "exact as" in done.stdout, done.stderr


def test_a_record_of_the_data_gate(tmp_path):
    "Verified, shown and run again like any other."
    record = made("data", "-p", "max_samples", 10, "-p", "near", "false", runs=tmp_path)
    code, said = named(record)
    assert code == 0 and "data files (1)" in said[0], said
    assert len(state_of(record)["inputs"]["data"][0]["sha256"]) == 1
    done = medllm("runs", "verify", record, "--rerun", "--runs", tmp_path)
    assert done.returncode == 0 and "exact: the metrics are the same" in done.stdout, done.stderr
    state = state_of(record)
    state["inputs"]["data"][0]["sha256"] = "ab"*32                # as such records were before
    write(record/"run.json", state | {"status": "failed"})
    assert medllm("runs", "show", record).returncode == 0 and named(record)[0] == 1
    done = medllm("runs", "resume", record)
    assert done.returncode == 0, done.stderr


def test_a_pipeline_is_compared_stage_by_stage_and_nothing_is_taken_over(tmp_path, monkeypatch):
    from medllm.experiment import rerun as module
    from medllm.experiment.rerun import likeness, rerun, resume
    digest = {"model.safetensors": "ab"*32}
    for name, weights in (("one", digest), ("same", digest), ("other", {"model.safetensors": "cd"*32})):
        stage = fake(tmp_path, f"{name}-stage", weights=weights)
        fake(tmp_path, name, stage="pipeline", metrics={"stages": 1}, parameters={"reuse": "same", "extra": {}},
            stages=[{"name": "sft", "folder": str(stage), "status": "completed"}])
    place = lambda name: tmp_path/"pipeline"/name
    assert likeness(place("one"), place("same")).verdict == "exact"
    assert likeness(place("one"), place("other")).verdict == "different"
    assert "taken over" in likeness(place("one"), place("one")).sentence
    asked = []
    monkeypatch.setattr(module, "execute", lambda name, given, **more: asked.append(given))
    rerun(place("one"))
    change(place("one")/"run.json", '"completed"', '"interrupted"')
    resume(place("one"))
    assert asked[0]["reuse"] == "none" and asked[1]["reuse"] == "same"
    assert not asked[1].get("extra")                              # with another flag each stage would be another one
    from medllm.core import UserError
    sweep = fake(tmp_path, "s", stage="sweep", status="interrupted", parameters={})
    for verb in (rerun, resume):
        with pytest.raises(UserError, match="the same medllm sweep command"): verb(sweep)


def test_a_spoilt_stage_is_named_by_its_pipeline(tmp_path):
    stage = fake(tmp_path, "stage", loss=1)
    whole = fake(tmp_path, "whole", stage="pipeline", stages=[{"name": "first", "folder": str(stage), "status": "completed"}])
    code, said = named(whole)
    assert code == 0 and "records of stages (1)" in said[0]
    edit(stage, "loss", 0)
    assert named(whole) == (1, ["first: run.json: loss was changed since the record was sealed"])
    shutil.rmtree(stage)
    assert named(whole) == (1, [f"first: its record {stage} is not here"])


# torn records

@pytest.mark.parametrize("text", [b'{"stage": "sf', b'{"stage": "\xff', b"[1]",
    b'{"stage": "sft", "status": "completed", "metrics": "x"}', b'{"stage": "sft", "status": "completed", "parameters": 3}',
    b'{"status": "failed", "consumed": [7], "inputs": null}'])
def test_no_verb_stumbles_over_a_torn_record(tmp_path, capsys, text):
    from medllm.cli.main import main
    fake(tmp_path, "whole")
    torn = fake(tmp_path, "torn")
    (torn/"run.json").write_bytes(text)
    (torn/"history.jsonl").write_bytes(b'{"step": 1, "loss": 2.0}\n{"step": 2, "lo\n\xff\n3\n')
    (torn/"events.jsonl").write_bytes(b'{"event": "sta\n{"event": "status", "status": "failed"}\n')
    runs = ["--runs", str(tmp_path)]
    for words, codes in ((["list", *runs], (0,)), (["show", str(torn)], (0,)), (["verify", str(torn)], (1,)),
            (["export", *runs, "--output", str(tmp_path/"pages")], (0,)), (["gc", "--failed", "0", *runs], (0,)),
            (["compare", str(torn), str(torn)], (2,)), (["rerun", str(torn), *runs], (2,)),
            (["resume", str(torn)], (2,)), (["promote", str(torn), "--to", str(tmp_path/"to")], (2,))):
        assert main(["runs", *words]) in codes, words
    assert main(["run", "data", "-p", "output_dir", str(torn)]) == 2
    assert "already holds a record" in capsys.readouterr().err


def test_a_torn_event_is_not_glued_to_the_next(tmp_path):
    from medllm.files import append_event
    from medllm.records.record import read_events
    for name in "ab": append_event(tmp_path, name)
    file = tmp_path/"events.jsonl"
    file.write_bytes(file.read_bytes()[:-9])                      # a crash in the middle of a line
    append_event(tmp_path, "c")
    assert [e["event"] for e in read_events(tmp_path, strict=True)] == ["a", "c"]


# R14: code or data changed, and the rows are made anew

KEY = """
from medllm.data.cache import Recipe, cache_key, source_files
from medllm.data.registry import find_sources
from medllm.data.tokens import Renderer
from medllm.models.loading import LoadPlan, load_tokenizer
import sys
source, = find_sources([sys.argv[1]], "data")
print(cache_key(source, Renderer(load_tokenizer("tiny", LoadPlan()), "auto"), Recipe(), source_files(source)))
"""


def test_changed_code_and_data_find_no_stale_rows(tmp_path):
    rows = tmp_path/"rows.json"
    write(rows, [{"instruction": "a?", "output": "b"}])
    shutil.copytree(ROOT/"medllm", tmp_path/"code/medllm", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("settings.ini", "nbs", "data"): (tmp_path/"code"/name).symlink_to(ROOT/name)
    def key():
        done = run(sys.executable, "-c", KEY, rows, cwd=tmp_path, PYTHONPATH=tmp_path/"code")
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()
    first, times = key(), (rows.stat().st_atime_ns, rows.stat().st_mtime_ns)
    assert key() == first
    write(rows, [{"instruction": "a?", "output": "c"}])
    os.utime(rows, ns=times)
    second = key()
    with open(tmp_path/"code/medllm/data/formats.py", "a") as f: f.write("# changed\n")
    assert len({first, second, key()}) == 3


# resume

def test_a_killed_run_goes_on(plain, tmp_path):
    "The kernel is killed behind a checkpoint; `resume` comes to the losses of a run that nobody killed."
    words = ["sft", "-p", "max_steps", 40, "-p", "save_steps", 5, "-p", "logging_steps", 1, "-p", "max_samples", 40]
    whole = made(*words, runs=tmp_path/"whole")
    process = subprocess.Popen([str(BIN/"medllm"), "run", *map(str, words), "--runs", str(tmp_path/"runs")], cwd=ROOT,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not list((tmp_path/"runs").glob("sft/*/checkpoint-5/COMMIT.json")) and time.monotonic() < until: time.sleep(.02)
    for kernel in psutil.Process(process.pid).children():
        if any("ipykernel" in word for word in kernel.cmdline()): kernel.send_signal(signal.SIGKILL)
    assert process.wait(120) == 1
    record, = (tmp_path/"runs/sft").iterdir()
    assert state_of(record)["status"] == "killed" and len(losses(record)) < 40
    done = medllm("runs", "resume", "last", "--runs", tmp_path/"runs")
    assert done.returncode == 0, done.stderr
    state = state_of(record)
    assert "goes on from checkpoint-" in done.stderr and state["status"] == "completed"
    assert [a["status"] for a in state["attempts"]] == ["killed"] and (record/"record.1.ipynb").exists()
    assert losses(record)[40] == losses(whole)[40] and state["weights"] == state_of(whole)["weights"]
    assert named(record)[0] == 0, named(record)
    done = medllm("runs", "resume", record)
    assert done.returncode == 2 and "nothing to go on with" in done.stderr


# R11: a thousand runs

def fake(runs, name, status="completed", stage="sft", checkpoints=(), days=0, sealed=True, **state):
    "A record that never ran."
    from datetime import datetime, timezone
    from medllm.records.seal import seal
    folder = Path(runs)/stage/name
    folder.mkdir(parents=True)
    ended = datetime.fromtimestamp(time.time() - 86400*days, timezone.utc).isoformat()
    write(folder/"run.json", {"stage": stage, "status": status, "started": ended, "ended": ended} | state)
    (folder/"events.jsonl").write_text(json.dumps({"time": ended, "event": "status", "status": status}) + "\n")
    for step in checkpoints:
        (folder/f"checkpoint-{step}").mkdir()
        for n in range(3): (folder/f"checkpoint-{step}/part-{n}.safetensors").write_bytes(bytes(5000))
        commit(folder/f"checkpoint-{step}", step)
    if sealed: seal(folder)
    return folder


def commit(folder, step):
    try: from medllm.checkpoint.commit import commit
    except ImportError: return write(folder/"COMMIT.json", {"step": step})
    commit(folder, step, {})


def test_a_thousand_runs_in_a_second(plain, tmp_path):
    whole = state_of(plain)
    for i in range(1000):
        text = (plain/"run.json").read_text() if i % 100 else (plain/"run.json").read_text()[:700]
        folder = tmp_path/"runs"/("sft", "dpo")[i % 2]/f"202611{1 + i % 28:02}-{i:06}-abc1234"
        folder.mkdir(parents=True)
        (folder/"run.json").write_text(text)
        shutil.copy(plain/"seal.json", folder)                    # without it, a run that was to be sealed is not over
    seconds, rows = [], []
    for _ in range(3):                                            # of the processor: other tests run beside this one
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = medllm("runs", "list", "--json", "--runs", tmp_path/"runs")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        rows = json.loads(done.stdout)
    assert len(rows) == 1000 and sum(r["status"] == "lost" for r in rows) == 10
    assert all("torn" in r["reason"] for r in rows if r["status"] == "lost")
    assert {r["loss_last"] for r in rows if r["status"] != "lost"} == {whole["metrics"]["loss_last"]}
    assert min(seconds) < 1, seconds
    some = medllm("runs", "list", "--runs", tmp_path/"runs", "--where", "status=lost", "stage=sft").stdout
    assert some.count("lost") == 10 and "torn" in some


# R12: gc

def size(place): return sum(f.stat().st_size for f in Path(place).rglob("*") if f.is_file())


def a_month_of_runs(runs):
    "Runs of which a failed one and four checkpoints can go, and all else must stay."
    best = fake(runs, "best", checkpoints=(5, 10, 15), sealed=False)
    write(best/"trainer_state.json", {"best_model_checkpoint": str(best/"checkpoint-5")})
    fake(runs, "finished", checkpoints=(2, 4, 6, 8))
    parent = fake(runs, "parent", checkpoints=(2, 4))
    fake(runs, "child", stage="dpo", consumed=[{"place": str(parent/"checkpoint-2"), "weights": {}}])
    fake(runs, "stopped", "interrupted", checkpoints=(2, 4), days=99)
    fake(runs, "failed-lately", "failed", checkpoints=(2,), days=1)
    fake(runs, "failed-long-ago", "failed", checkpoints=(2, 4), days=30)
    live = fake(runs, "live", "running", checkpoints=(2, 4), days=30, sealed=False)
    torn = fake(runs, "live-but-torn", "running", checkpoints=(2, 4), days=30, sealed=False)
    (torn/"run.json").write_text('{"stage": "sf')
    from medllm.processes import boot_id                                  # of this process: it lives as long as the test
    beat = {"time": time.time(), "pid": os.getpid(), "begun": psutil.Process().create_time(), "boot": boot_id()}
    for folder in (live, torn): write(folder/"heartbeat.json", beat)
    promoted = fake(runs, "promoted", checkpoints=(2, 4))
    with open(promoted/"events.jsonl", "a") as f: f.write('{"event": "promoted", "names": []}\n')


GOES = {"sft/best/checkpoint-10", "sft/finished/checkpoint-2", "sft/finished/checkpoint-4", "sft/finished/checkpoint-6",
    "sft/failed-long-ago"}


def places(runs): return {p.relative_to(runs).as_posix() for p in Path(runs).rglob("*")}
def stays(before): return {p for p in before if not any(p == g or p.startswith(f"{g}/") for g in GOES)}


def test_gc_frees_what_it_says_and_nothing_else(tmp_path):
    a_month_of_runs(tmp_path)
    before, bytes_before = places(tmp_path), size(tmp_path)
    shown = medllm("runs", "gc", "--failed", 14, "--json", "--runs", tmp_path)
    assert {Path(w["place"]).relative_to(tmp_path).as_posix() for w in json.loads(shown.stdout)} == GOES
    assert places(tmp_path) == before and "--yes does it" in shown.stderr
    said = sum(w["bytes"] for w in json.loads(shown.stdout))
    done = medllm("runs", "gc", "--failed", 14, "--yes", "--runs", tmp_path)
    assert done.returncode == 0 and places(tmp_path) == stays(before)
    events = sum(len(line) + 1 for f in tmp_path.rglob("events.jsonl") for line in f.read_text().split("\n") if '"freed"' in line)
    assert bytes_before - size(tmp_path) + events >= said > 60_000
    code, lines = named(tmp_path/"sft/finished", "--record-only")
    assert code == 0, lines                                       # its events explain what is gone
    assert "nothing to free" in medllm("runs", "gc", "--failed", 14, "--runs", tmp_path).stderr


def crash_at(k, runs):
    "gc in a process of its own that dies before its k-th change of the disk; whether it got that far."
    pid = os.fork()
    if pid: return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    try:
        from medllm.records.retention import collect, waste
        left, found = [k], waste(runs, 14)
        def dying(real):
            def call(*a, **kw):
                left[0] -= 1
                if not left[0]: os._exit(9)
                return real(*a, **kw)
            return call
        for name in ("unlink", "rmdir", "rename", "replace", "fsync"): setattr(os, name, dying(getattr(os, name)))
        collect(found)
        os._exit(0)
    except BaseException: os._exit(1)


def test_fifty_crashes_within_gc(tmp_path):
    "After each crash nothing that has to stay is touched, and a second gc comes to the same end."
    from medllm.records.retention import collect, waste
    a_month_of_runs(tmp_path/"first")
    before, crashed = places(tmp_path/"first"), 0
    for k in range(1, 51):
        runs = tmp_path/f"runs-{k}"
        shutil.copytree(tmp_path/"first", runs)
        for file in (runs/"sft").glob("*/trainer_state.json"): change(file, str(tmp_path/"first"), str(runs))
        for file in (runs/"dpo").glob("*/run.json"): change(file, str(tmp_path/"first"), str(runs))
        crashed += crash_at(k, runs)
        assert stays(before) <= places(runs), k
        for half in (runs/"sft").glob("[!.]*/checkpoint-*"):      # what lost a file is no checkpoint any more
            if len(list(half.glob("part-*"))) < 3: assert not (half/"COMMIT.json").exists(), (k, half)
        collect(waste(runs, 14))
        assert places(runs) == stays(before), k
        shutil.rmtree(runs)
    assert crashed >= 20, crashed


def test_the_model_of_a_run_that_prepares_its_rows_stays(tmp_path):
    "What it consumes is noted when training begins; until then its parameters say it."
    from medllm.records.retention import waste
    parent = fake(tmp_path, "a", checkpoints=(2, 4))
    assert len(waste(tmp_path)) == 1
    child = fake(tmp_path, "b", "running", sealed=False, parameters={"model_name_or_path": str(parent/"checkpoint-2")})
    write(child/"heartbeat.json", {"time": time.time(), "pid": 1, "begun": 0, "boot": ""})
    assert waste(tmp_path) == []


def test_a_locked_folder_is_left_alone(tmp_path):
    from filelock import FileLock
    from medllm.records.retention import waste
    folder = fake(tmp_path, "a", checkpoints=(2, 4))
    assert len(waste(tmp_path)) == 1
    with FileLock(folder/".lock"):
        done = medllm("runs", "gc", "--yes", "--runs", tmp_path)
        assert "nothing to free" in done.stderr and (folder/"checkpoint-2").exists()


# promote

def test_a_promoted_record_is_small_and_holds(own, tmp_path):
    done = medllm("runs", "promote", own[1], "--to", tmp_path/"nbs/_records")
    assert done.returncode == 0, done.stderr
    kept = tmp_path/"nbs/_records/sft"/own[1].name
    there = {f.name for f in kept.iterdir()}
    assert {"run.json", "record.ipynb", "source.ipynb", "history.jsonl", "metrics.json", "seal.json"} <= there
    assert not list(kept.rglob("*.safetensors")) and not list(kept.glob("checkpoint-*")) and size(kept) < 500_000
    assert named(kept, "--record-only")[0] == 0
    weights = json.loads((kept/"seal.json").read_text())["files"]["model.safetensors"]["sha256"]
    assert weights == state_of(own[1])["weights"]["model.safetensors"]
    edit(kept, "metrics.loss_last", 0.1)
    assert named(kept, "--record-only") == (1, ["run.json: metrics.loss_last was changed since the record was sealed"])


def test_a_large_notebook_is_promoted_too(copy, tmp_path):
    "It is the record; weights are not."
    from medllm.records.seal import seal
    record = json.loads((copy/"record.ipynb").read_text())
    next(c for c in record["cells"] if c["id"] == "train")["outputs"] = [
        {"output_type": "stream", "name": "stdout", "text": "x"*600_000}]
    write(copy/"record.ipynb", record)
    seal(copy)
    assert medllm("runs", "promote", copy, "--to", tmp_path/"kept").returncode == 0
    kept, = (tmp_path/"kept/sft").iterdir()
    assert (kept/"record.ipynb").exists() and named(kept, "--record-only")[0] == 0


def test_nbdev_passes_promoted_records_by(own, tmp_path):
    for name in ("settings.ini", "pyproject.toml"): shutil.copy(ROOT/name, tmp_path/name)
    (tmp_path/"nbs").mkdir()
    cells = [{"cell_type": "code", "id": f"c{n}", "source": [text], "outputs": [], "metadata": {}, "execution_count": None}
        for n, text in enumerate(("#| default_exp core", "#| export\none = 1"))]
    write(tmp_path/"nbs/00_core.ipynb", {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
    assert medllm("runs", "promote", own[1], "--to", tmp_path/"nbs/_records").returncode == 0
    record, = (tmp_path/"nbs/_records").rglob("record.ipynb")
    before = record.read_bytes()
    for command in ("nbdev_export", "nbdev_clean"):
        done = run(command, cwd=tmp_path, PYTHONPATH=tmp_path)
        assert done.returncode == 0, done.stderr
    assert record.read_bytes() == before
    done = run("nbdev_test", "--n_workers", 0, "--do_print", cwd=tmp_path, PYTHONPATH=ROOT)
    assert done.returncode == 0 and "record.ipynb" not in done.stdout + done.stderr, done.stdout + done.stderr
