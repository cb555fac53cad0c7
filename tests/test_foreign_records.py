"""Records that somebody else wrote, or nobody: torn, hostile, of another kind; they are told, and they tell nothing to a terminal."""
import contextlib
import io
import json
import os
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT/"tests/faults"))
from mutate import both, survives

from medllm.core import write_json

STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def command(*words):
    "Exit code of `medllm …` in this process, and what it printed; a traceback or a character that steers a terminal fails."
    from medllm.cli import main
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): code = main([str(w) for w in words])
    said = out.getvalue() + err.getvalue()
    assert "Traceback" not in said, said[-2000:]
    assert not STEERS.search(said), repr(STEERS.search(said)[0])
    assert code in (0, 1, 2), (code, said)
    return code, out.getvalue(), err.getvalue()


def cell(name, source, *outputs, count=1):
    return {"cell_type": "code", "id": name, "source": [source], "outputs": list(outputs), "execution_count": count, "metadata": {}}


def record(folder, **state):
    "A record with every file that one can have, small, and sealed."
    from medllm.models.tiny import write_tiny
    from medllm.records.record import provenance
    from medllm.records.seal import seal
    from medllm.train.runs import SftRun
    folder = Path(folder)
    folder.mkdir(parents=True)
    metrics = {"loss_first": 3.0, "loss_last": 2.0, "steps": 3, "train_runtime": 1.5, "eval_loss": 2.1, "eval_loss_before": 3.1,
        "rows": [{"name": "mm", "read": 10, "kept": 9, "rejected": {"empty_answer": 1}, "truncated": {}}], "tokens": 100,
        "parameters": {"trainable": 10, "total": 100, "share": 0.1}, "reference": {"policy": "base"}}
    (folder.parent/"rows.json").write_text("[]")
    write_json(folder/"run.json", {"schema": 1, "stage": "sft", "status": "completed", "started": "2026-11-22T10:00:00+00:00",
        "ended": "2026-11-22T10:01:00+00:00", "duration_s": 60.0, "parameters": asdict(SftRun(note="a test", extra={"weight_decay": 0.1})),
        "effective": {"seed": 42}, "arguments": {"dataset": "mm", "model_name_or_path": "tiny"}, "provenance": provenance(),
        "inputs": {"data": [{"name": "mm", "place": "mm", "sha256": {str(folder.parent/"rows.json"): "ab"*32}, "licence": "Apache-2.0",
            "private": False, "revision": ""}], "rows": metrics["rows"], "template_sha256": "cd"*32,
            "model": {"sha256": {"model.safetensors": "ef"*32}}},
        "consumed": [{"role": "base", "name": "tiny", "place": "/nowhere/tiny", "weights": {"model.safetensors": "ef"*32}}],
        "weights": {"model.safetensors": "12"*32}, "contract": {"sha256": "34"*32, "parts": {"stage": "sft", "seed": 42}},
        "metrics": metrics, "verdict": [{"what": "training loss", "target": "below 3", "measured": "2.0", "met": True}],
        "cells": [{"id": "train", "source_sha256": "56"*32, "status": "completed", "execution_count": 1, "duration_s": 1.0}],
        "attempts": [{"status": "killed", "reason": "the kernel died"}], "parent": {"rerun": "/nowhere/run"},
        "stages": [{"name": "first", "folder": "/nowhere/stage", "status": "completed", "sets": {"seed": 1}}],
        "privacy": {"scrubbed": {}, "private": False}} | state)
    write_json(folder/"metrics.json", metrics)
    write_json(folder/"contract.json", {"stage": "sft", "seed": 42, "model": "0"*16, "adapters": []})
    write_json(folder/"heartbeat.json", {"time": 1.7e9, "pid": 1, "begun": 1.7e9, "boot": "x"})
    (folder/"history.jsonl").write_text("".join(json.dumps({"step": n, "loss": 3.5 - n/2, "learning_rate": 1e-3, "progress": n/3,
        "tokens_per_second": 10.0}) + "\n" for n in range(1, 4)))
    (folder/"events.jsonl").write_text('{"time": "2026-11-22T10:00:00+00:00", "event": "status", "status": "running", "reason": ""}\n'
        '{"time": "2026-11-22T10:01:00+00:00", "event": "status", "status": "completed", "reason": ""}\n')
    stream = {"output_type": "stream", "name": "stdout", "text": ["a\n", "b\n"]}
    shown = {"output_type": "display_data", "data": {"text/html": "<b>x</b>", "text/plain": ["x"]}, "metadata": {}}
    notebook = {"cells": [{"cell_type": "markdown", "id": "title", "source": ["# A run\n", "\n", "> x"], "metadata": {}},
        cell("parameters", "seed:int = 42") | {"metadata": {"tags": ["parameters"]}}, cell("train", "f()", stream, shown, count=2)],
        "metadata": {"kernelspec": {"name": "python3", "language": "python", "display_name": "p"}}, "nbformat": 4, "nbformat_minor": 5}
    for name in ("record.ipynb", "source.ipynb"): write_json(folder/name, notebook)
    (folder/"checkpoint-2").mkdir()
    (folder/"checkpoint-2/trainer_state.json").write_text("{}")
    from medllm.train.checkpoints import commit
    commit(folder/"checkpoint-2", 2, {"stage": "sft"})
    seal(folder)
    return folder


@pytest.fixture
def runs(tmp_path):
    "A folder with a record that is whole."
    record(tmp_path/"runs/sft/whole")
    return tmp_path/"runs"


# 500 mutated files of each kind, through every verb that reads

KINDS = ("run.json", "metrics.json", "seal.json", "contract.json", "heartbeat.json", "events.jsonl", "history.jsonl", "record.ipynb",
    "source.ipynb", "checkpoint-2/COMMIT.json")
PAGES = ("run.json", "seal.json", "events.jsonl", "history.jsonl", "record.ipynb")


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
            for page in (runs.parent/"pages").iterdir(): json.loads(page.read_text().partition('id="data">')[2].partition("</script>")[0])
        if name == "run.json":
            for kind in ("rocrate", "modelcard"):
                shutil.rmtree(runs.parent/"pages", ignore_errors=True)
                command("runs", "export", folder, "--as", kind, "--output", runs.parent/"pages")
            shutil.rmtree(runs.parent/"pages", ignore_errors=True)
        if name in ("run.json", "source.ipynb"): command("runs", "rerun", folder, "--runs", runs.parent/"again", "-p", "seed", "none")
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
    walk(runs, name, 24, "some")


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_500_mutated_files_of_a_record(runs, name): walk(runs, name, 500, "all")
