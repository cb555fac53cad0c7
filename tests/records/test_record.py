"""Records tell the truth: failures, several processes, private rows."""
import json

import nbformat
import pytest
from commands import ROOT, losses, run
from written_files import state_of


def test_a_failing_run_says_so(tmp_path):
    "The rows turn out unusable in the kernel, after the record has begun."
    rows = tmp_path/"rows.json"
    rows.write_text(json.dumps([{"instruction": "a", "output": ""}]*3))
    done = run("medllm", "run", "sft", "-p", "dataset", rows, "-p", "output_dir", tmp_path/"r")
    assert (done.returncode == 2 and "3 rejected (empty_answer)" in done.stderr
        and "Traceback" not in done.stderr), done.stderr
    state = state_of(tmp_path/"r")
    assert state["status"] == "failed" and "no row is left to train on" in state["reason"]


@pytest.mark.slow
def test_a_failing_run_under_plain_papermill(tmp_path):
    rows = tmp_path/"rows.json"
    rows.write_text(json.dumps([{"instruction": "a", "output": ""}]*3))
    done = run(
        "papermill", "nbs/runs/sft.ipynb", tmp_path/"out.ipynb", "-p", "dataset", rows,
        "-p", "output_dir", tmp_path/"r", "--no-progress-bar")
    assert done.returncode == 1
    assert state_of(tmp_path/"r")["status"] == "failed"


@pytest.mark.slow
def test_a_killed_kernel_is_not_completed(tmp_path):
    "papermill alone would store that every cell completed."
    notebook = nbformat.read(ROOT/"nbs/runs/sft.ipynb", 4)
    at = next(i for i, c in enumerate(notebook.cells) if c.id == "data")
    notebook.cells.insert(at, nbformat.v4.new_code_cell("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"))
    nbformat.write(notebook, tmp_path/"sft.ipynb")
    done = run("medllm", "run", tmp_path/"sft.ipynb", "-p", "output_dir", tmp_path/"r")
    assert done.returncode == 1 and "the kernel died" in done.stderr, done.stderr
    assert state_of(tmp_path/"r")["status"] == "killed"


@pytest.mark.slow
def test_two_processes_from_the_notebook(tmp_path):
    "Children of the kernel train; the curve is that of one process with the same rows a step."
    common = ["-p", "max_steps", 4, "-p", "max_samples", 64, "-p", "logging_steps", 1]
    one = run(
        "medllm", "run", "sft", *common, "-p", "gradient_accumulation_steps", 2, "-p", "output_dir", tmp_path/"one")
    two = run("medllm", "run", "sft", *common, "-p", "num_processes", 2, "-p", "output_dir", tmp_path/"two")
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    a, b = losses(tmp_path/"one"), losses(tmp_path/"two")
    assert list(a) == list(b) == [1, 2, 3, 4] and max(abs(a[s] - b[s]) for s in a) < 1e-3
    assert (state_of(tmp_path/"two")["metrics"]["trained_tokens"]
        == state_of(tmp_path/"one")["metrics"]["trained_tokens"])


CANARY = "zebrafish pericardial"


@pytest.mark.slow
def test_private_rows_stay_out_of_the_record(tmp_path):
    "Every row carries a phrase; no file of the record but the weights may hold it, unless asked."
    rows = tmp_path/"rows.json"
    rows.write_text(json.dumps([
        {"instruction": f"{CANARY} question {i}?", "output": f"{CANARY} answer {i}."} for i in range(24)]))
    words = [
        "medllm", "run", "sft", "-p", "dataset", rows, "-p", "max_steps", 60, "-p", "logging_steps", 20,
        "-p", "val_size", 4]
    done = run(*words, "-p", "output_dir", tmp_path/"hidden")
    assert done.returncode == 0, done.stderr
    texts = [done.stdout, done.stderr, *(
        f.read_text(errors="replace") for f in (tmp_path/"hidden").rglob("*")
        if f.suffix in (".ipynb", ".json", ".jsonl"))]
    assert not any("zebrafish" in t or "pericardial" in t for t in texts)
    done = run(*words, "-p", "reveal", "true", "-p", "output_dir", tmp_path/"shown")
    assert done.returncode == 0, done.stderr
    assert CANARY in (tmp_path/"shown/record.ipynb").read_text()


def test_a_record_names_what_it_used(tmp_path):
    done = run(
        "medllm", "run", "sft", "-p", "max_steps", 3, "-p", "max_samples", 16, "--runs", tmp_path,
        "--tag", "named", "-p", "note", "a test")
    assert done.returncode == 0, done.stderr
    folder, = (tmp_path/"sft").iterdir()
    state = state_of(folder)
    assert folder.name.endswith("named") and state["parameters"]["note"] == "a test"
    assert (state["inputs"]["data"][0]["sha256"] and state["inputs"]["template_sha256"]
        and state["inputs"]["model"]["sha256"]["model.safetensors"])
    assert state["provenance"]["packages"]["torch"] and state["arguments"]["learning_rate"] == 1e-3
    assert [row["what"] for row in state["verdict"]][:2] == ["training loss", "validation loss"]
    record = nbformat.read(folder/"record.ipynb", 4)
    assert all(c.execution_count for c in record.cells if c.cell_type == "code")
    assert not any(
        "tqdm" in json.dumps(c.get("outputs", [])) or "Loading weights" in json.dumps(c.get("outputs", []))
        for c in record.cells)
