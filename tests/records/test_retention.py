"""What records are freed of, what must stay whatever crashes, and what is promoted."""
import json
import os
import shutil
import time
from pathlib import Path

import psutil
import pytest
from commands import ROOT, medllm, named, run
from written_files import change, edit, fake, size, state_of, write

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


@pytest.mark.parametrize("crashes", [range(1, 51, 4), pytest.param(range(1, 51), marks=pytest.mark.slow)], ids=["some", "fifty"])
def test_crashes_within_gc(crashes, tmp_path):
    "After each crash nothing that has to stay is touched, and a second gc comes to the same end."
    from medllm.records.retention import collect, waste
    a_month_of_runs(tmp_path/"first")
    before, crashed = places(tmp_path/"first"), 0
    for k in crashes:
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
    assert crashed >= 0.4*len(crashes), crashed


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
