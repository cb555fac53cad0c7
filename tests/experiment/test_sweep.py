"""A grid of notebooks: a failed point ends no other, a second call takes over what is finished, a stop stops all."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from commands import run, wait, ROOT
from written_files import state_of

from medllm.core import UserError
from medllm.experiment.sweep import read_sweep, sweep
from medllm.records.verify import verify
from medllm.train.runs import SftRun

COMMON = "max_steps: 3, max_samples: 24, val_size: 4, logging_steps: 1"


def newest(runs): return max((Path(runs)/"sweep").iterdir())


@pytest.mark.slow
def test_a_sweep_and_its_second_call(tmp_path):
    "One point runs and one fails in its kernel; then only the failed one is run again."
    bad = tmp_path/"bad.json"
    bad.write_text(json.dumps([{"instruction": "a", "output": ""}]*8))
    file = tmp_path/"grid.yaml"
    file.write_text(f"parameters: {{{COMMON}}}\neach: [{{learning_rate: 1.0e-3}}, {{dataset: {bad}}}]\n")
    words = ("medllm", "sweep", "sft", "-f", file, "--jobs", 2, "--runs", tmp_path/"runs")
    done = run(*words)
    assert done.returncode == 1 and "1 of 2 points: p02 failed" in done.stderr, done.stderr
    folder = newest(tmp_path/"runs")
    state = state_of(folder)
    assert state["status"] == "failed" and [s["status"] for s in state["stages"]] == ["completed", "failed"]
    assert "no row is left" in state["stages"][1]["reason"] and state["metrics"]["best"]["point"] == "p01"
    assert (folder/"table.md").read_text() in done.stdout and (folder/"sweep.png").stat().st_size > 5000
    child = state_of(state["stages"][0]["folder"])
    assert child["parent"] == {"sweep": str(folder.resolve())} and child["provenance"]["threads"] == max(1, os.cpu_count()//2)
    assert verify(folder, record_only=True)
    time.sleep(1)                                                                    # names have seconds in them
    done = run(*words, PYTHONHASHSEED="7")                                           # a set's order is no difference
    again = state_of(newest(tmp_path/"runs"))
    assert [s.get("taken_over", False) for s in again["stages"]] == [True, False], done.stderr
    assert again["stages"][0]["folder"] == state["stages"][0]["folder"]


def test_a_wrong_point_starts_nothing(tmp_path):
    file = tmp_path/"grid.yaml"
    file.write_text("grid: {seed: [1, 2]}\neach: [{}, {learning_rat: 0.1}]\n")
    with pytest.raises(UserError, match="point 3.*learning_rate"): sweep("sft", str(file), str(tmp_path/"runs"))
    assert not (tmp_path/"runs").exists()


def test_points_are_checked_with_folders_of_their_own(tmp_path, monkeypatch):
    "A model that an earlier `medllm train` left in output is no matter of a sweep's, nor of a run's that makes a record."
    monkeypatch.chdir(tmp_path)
    Path("output").mkdir()
    Path("output/adapter_config.json").touch()
    Path("grid.yaml").write_text(f"parameters: {{{COMMON}}}\ngrid: {{seed: [1, 2]}}\n")
    assert len(read_sweep("sft", "grid.yaml").points) == 2
    SftRun().preflight()
    with pytest.raises(UserError, match="already holds a model"): SftRun(output_dir="output").preflight()
    for name in ("output_dir", "runs_dir", "tag"):
        Path("grid.yaml").write_text(f"grid: {{seed: [1], {name}: [output]}}\n")
        with pytest.raises(UserError, match=f"{name} is not for a grid"): read_sweep("sft", "grid.yaml")


def test_a_point_that_cannot_be_begun_fails_the_sweep(tmp_path, monkeypatch):
    "Those before it being finished is no success; the record is closed all the same."
    from medllm.experiment import sweep as module
    file = tmp_path/"grid.yaml"
    file.write_text("grid: {seed: [1, 2]}\n")
    def begin(run, wanted, name, sets, runs):
        if name == "p02": raise OSError(5, "Input/output error")
        (tmp_path/"done").mkdir()
        (tmp_path/"done/run.json").write_text('{"metrics": {"loss_last": 1.0}}')
        module.note_stage(run, name, stage="sft", sets=sets, folder=str(tmp_path/"done"), status="completed")
    monkeypatch.setattr(module, "_begin", begin)
    with pytest.raises(OSError): sweep("sft", str(file), str(tmp_path/"runs"))
    state = state_of(newest(tmp_path/"runs"))
    assert state["status"] == "failed" and verify(newest(tmp_path/"runs"), record_only=True)
    monkeypatch.setattr(module, "_begin", lambda run, wanted, name, sets, runs: module.note_stage(run, name, stage="sft", sets=sets,
        folder=str(tmp_path/"done"), status="completed"))
    file.write_text("grid: {seed: [1]}\n")                                          # one value: nothing to draw
    time.sleep(1)
    assert sweep("sft", str(file), str(tmp_path/"runs")).state["status"] == "completed"


@pytest.mark.slow
def test_a_stopped_sweep_stops_its_points_and_goes_on(tmp_path):
    "SIGTERM: exit code 75, no process left; the same command goes on from the checkpoint."
    file = tmp_path/"grid.yaml"
    common = "max_steps: 1500, max_samples: 24, val_size: 4, save_steps: 5, save_total_limit: 2"
    file.write_text(f"parameters: {{{common}}}\ngrid: {{seed: [1]}}\n")
    words = [sys.executable, "-c", "import sys; from medllm.cli.main import main; sys.exit(main())", "sweep", "sft", "-f",
        str(file), "--runs", str(tmp_path/"runs")]
    began = lambda: subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = began()
    wait(lambda: list(tmp_path.glob("runs/sft/*/checkpoint-*/trainer_state.json")), process)
    below = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert not psutil.wait_procs(below, timeout=10)[1]
    first = state_of(newest(tmp_path/"runs"))
    assert first["status"] == "interrupted" and first["stages"][0]["status"] != "completed"
    time.sleep(1)
    process = began()
    try:
        stages = lambda: state_of(newest(tmp_path/"runs")).get("stages", [])
        wait(lambda: stages() and stages()[0].get("resumed"), process)
        assert stages()[0]["folder"] == first["stages"][0]["folder"]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def test_on_ray(tmp_path):
    "Ray on this machine, as a cluster of one."
    pytest.importorskip("ray", reason="Ray is an extra: pip install 'medllm[ray]'")
    file = tmp_path/"grid.yaml"
    file.write_text(f"parameters: {{{COMMON}}}\ngrid: {{seed: [1, 2]}}\n")
    done = run("medllm", "sweep", "sft", "-f", file, "--jobs", 2, "--ray", "--runs", tmp_path/"runs")
    assert done.returncode == 0, done.stderr
    assert [s["status"] for s in state_of(newest(tmp_path/"runs"))["stages"]] == ["completed"]*2
