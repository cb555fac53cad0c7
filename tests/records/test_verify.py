"""Records verified and listed: one change is named and nothing else, torn ones are told, a thousand are read in a second."""
import json
import os
import resource
import shutil

import pytest
from commands import ROOT, made, medllm, named, process
from written_files import edit, fake, state_of, write

"""What became of a record: listed, verified, run again, resumed, freed, promoted (faults R10 to R14 of issue 5)."""


# one change, and verify names exactly that

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
    "The size and the time stay; only a byte is another (nothing goes by the time of a file)."
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
        done = process("medllm", "runs", "list", "--json", "--runs", tmp_path/"runs")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        rows = json.loads(done.stdout)
    assert len(rows) == 1000 and sum(r["status"] == "lost" for r in rows) == 10
    assert all("torn" in r["reason"] for r in rows if r["status"] == "lost")
    assert {r["loss_last"] for r in rows if r["status"] != "lost"} == {whole["metrics"]["loss_last"]}
    assert min(seconds) < 2, seconds                              # half of it on a machine that does nothing else
    some = medllm("runs", "list", "--runs", tmp_path/"runs", "--where", "status=lost", "stage=sft").stdout
    assert some.count("lost") == 10 and "torn" in some
