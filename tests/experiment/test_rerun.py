"""Records run again from their folder alone, compared with what was, and gone on with."""
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from commands import losses, made, medllm, named, run, start, wait
from written_files import change, fake, state_of

# from one record folder alone

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


# resume

@pytest.mark.slow
def test_a_killed_run_goes_on(plain, tmp_path):
    "The kernel is killed behind a checkpoint; `resume` comes to the losses of a run that nobody killed."
    words = ["sft", "-p", "max_steps", 40, "-p", "save_steps", 5, "-p", "logging_steps", 1, "-p", "max_samples", 40]
    whole = made(*words, runs=tmp_path/"whole")
    process = start("medllm", "run", *words, "--runs", tmp_path/"runs")
    wait(lambda: list((tmp_path/"runs").glob("sft/*/checkpoint-5/COMMIT.json")), process)
    record, = (tmp_path/"runs/sft").iterdir()
    os.kill(json.loads((record/"heartbeat.json").read_text())["pid"], signal.SIGKILL)      # of the kernel, while it trains
    assert process.wait(120) == 1
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
