"""Files that the tests write: rows, and records of no run; how they are read and changed."""
import json
import time
from dataclasses import asdict
from pathlib import Path

from medllm.checkpoint.commit import commit
from medllm.files import write_json


def state_of(folder): return json.loads((Path(folder)/"run.json").read_text())
def write(file, value): Path(file).write_text(json.dumps(value))
def write_lines(file, rows): Path(file).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
def size(place): return sum(f.stat().st_size for f in Path(place).rglob("*") if f.is_file())


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


def fake(runs, name, status="completed", stage="sft", checkpoints=(), days=0, sealed=True, **state):
    "A record that never ran: a status and checkpoints."
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
        commit(folder/f"checkpoint-{step}", step, {})
    if sealed: seal(folder)
    return folder


def cell(name, source, *outputs, count=1):
    return {"cell_type": "code", "id": name, "source": [source], "outputs": list(outputs), "execution_count": count,
        "metadata": {}}


def record(folder, **state):
    "A record with every file that one can have, small, and sealed."
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
        "ended": "2026-11-22T10:01:00+00:00", "duration_s": 60.0,
        "parameters": asdict(SftRun(note="a test", extra={"weight_decay": 0.1})),
        "effective": {"seed": 42}, "arguments": {"dataset": "mm", "model_name_or_path": "tiny"}, "provenance": provenance(),
        "inputs": {"data": [{"name": "mm", "place": "mm", "sha256": {str(folder.parent/"rows.json"): "ab"*32},
            "licence": "Apache-2.0", "private": False, "revision": ""}], "rows": metrics["rows"], "template_sha256": "cd"*32,
            "model": {"sha256": {"model.safetensors": "ef"*32}}},
        "consumed": [{"role": "base", "name": "tiny", "place": "/nowhere/tiny", "weights": {"model.safetensors": "ef"*32}}],
        "weights": {"model.safetensors": "12"*32}, "fingerprint": {"sha256": "34"*32, "parts": {"stage": "sft", "seed": 42}},
        "metrics": metrics, "verdict": [{"what": "training loss", "target": "below 3", "measured": "2.0", "met": True}],
        "cells": [{"id": "train", "source_sha256": "56"*32, "status": "completed", "execution_count": 1, "duration_s": 1.0}],
        "attempts": [{"status": "killed", "reason": "the kernel died"}], "parent": {"rerun": "/nowhere/run"},
        "stages": [{"name": "first", "folder": "/nowhere/stage", "status": "completed", "sets": {"seed": 1}}],
        "privacy": {"scrubbed": {}, "private": False}} | state)
    write_json(folder/"metrics.json", metrics)
    write_json(folder/"fingerprint.json", {"stage": "sft", "seed": 42, "model": "0"*16, "adapters": []})
    write_json(folder/"heartbeat.json", {"time": 1.7e9, "pid": 1, "begun": 1.7e9, "boot": "x"})
    (folder/"history.jsonl").write_text("".join(json.dumps({"step": n, "loss": 3.5 - n/2, "learning_rate": 1e-3, "progress": n/3,
        "tokens_per_second": 10.0}) + "\n" for n in range(1, 4)))
    (folder/"events.jsonl").write_text(
        '{"time": "2026-11-22T10:00:00+00:00", "event": "status", "status": "running", "reason": ""}\n'
        '{"time": "2026-11-22T10:01:00+00:00", "event": "status", "status": "completed", "reason": ""}\n')
    stream = {"output_type": "stream", "name": "stdout", "text": ["a\n", "b\n"]}
    shown = {"output_type": "display_data", "data": {"text/html": "<b>x</b>", "text/plain": ["x"]}, "metadata": {}}
    notebook = {"cells": [{"cell_type": "markdown", "id": "title", "source": ["# A run\n", "\n", "> x"], "metadata": {}},
        cell("parameters", "seed:int = 42") | {"metadata": {"tags": ["parameters"]}},
        cell("train", "f()", stream, shown, count=2)], "nbformat": 4, "nbformat_minor": 5,
        "metadata": {"kernelspec": {"name": "python3", "language": "python", "display_name": "p"}}}
    for name in ("record.ipynb", "source.ipynb"): write_json(folder/name, notebook)
    (folder/"checkpoint-2").mkdir()
    write_json(folder/"checkpoint-2/trainer_state.json", {"global_step": 2, "log_history": [], "stateful_callbacks": {}})
    commit(folder/"checkpoint-2", 2, {"stage": "sft"})
    seal(folder)
    return folder
