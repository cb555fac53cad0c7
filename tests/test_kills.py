"""`kill -9` in commands that train nothing themselves, and what the next one makes of what it finds."""
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from commands import ROOT, fault, process, run

from medllm.files import write_json
from medllm.processes import process_mark
from medllm.evaluate import benchmarks
from medllm.machine import scratch
from medllm.cli.run_commands import _of_failure
from medllm.experiment.pipeline import attempt_of, find_finished, find_unfinished
from medllm.records.record import status_of

KILLS = os.environ.get("MEDLLM_KILLS", 20)


SLOW = ("evaluate", "evaluate-unkept", "predict", "export", "run-evaluate", "run-predict", "pipeline", "sweep")


@pytest.mark.parametrize("command,kills", [("evaluate-unkept", 2), *(
    pytest.param(name, KILLS, marks=pytest.mark.slow) for name in SLOW)])
def test_killed_again_and_again(command, kills):
    "The same result as undisturbed, nothing that was finished is done anew, nothing is left over, no record says what is not so."
    found = fault("kill.py", command, kills, timeout=3600, run=run if command == "evaluate-unkept" else process)
    assert found["kills"] >= int(kills) and found["left"] == [] and found["slowest_to_go_s"] < 15, found


@pytest.fixture
def gone():
    "The mark of a process that is there no more."
    process = subprocess.Popen(["sleep", "60"])
    mark = process_mark(process.pid)
    process.kill()
    process.wait()
    return mark


@pytest.fixture
def noted(tmp_path, gone):
    "A stage's folder and the record of its pipeline, which was killed; given are what it noted, and the stage's own state."
    def make(note, state=None, name="20260101-000000"):
        stage, folder = tmp_path/"sft"/name, tmp_path/"pipeline"/name
        stage.mkdir(parents=True)
        folder.mkdir(parents=True)
        write_json(folder/"run.json", {"stage": "pipeline", "status": "running", "stages": [
            {"name": "one", "key": "k", "folder": str(stage), "attempt": 0} | note]})
        write_json(folder/"heartbeat.json", {"time": 0} | gone)
        if state is not None:
            (stage/"model.safetensors").write_bytes(b"w")
            from medllm.models.weights import weights
            write_json(stage/"run.json", {"stage": "sft", "weights": weights(stage)} | state)
        return stage, folder
    return make


def test_a_stage_that_ended_after_its_pipeline_was_killed_is_taken_over(noted, tmp_path):
    "By its own record, which is of the attempt that was noted; not one that somebody finished by hand."
    stage, _ = noted({"status": "running"}, {"status": "completed"})
    assert find_finished("k", tmp_path) == stage and find_finished("other", tmp_path) is None
    write_json(stage/"run.json", json.loads((stage/"run.json").read_text()) | {"attempts": [{"status": "lost"}]})
    assert find_finished("k", tmp_path) is None
    (stage/"run.json").write_text("{")
    assert find_finished("k", tmp_path) is None
    failed, _ = noted({"status": "failed"}, {"status": "completed"}, "20260101-000001")
    assert find_finished("k", tmp_path) is None
    write_json(failed/"run.json", json.loads((failed/"run.json").read_text()) | {"seals": True})
    assert status_of(failed) == "lost"


def test_what_was_begun_and_came_to_nothing_is_used(noted, tmp_path):
    "A record that was lost before its first checkpoint, and a folder that was made for one."
    lost, _ = noted({"status": "running"}, {"status": "running"})
    assert find_unfinished("k", tmp_path) == lost and attempt_of(lost) == 1
    empty, pipeline = noted({"status": "running"}, name="20260101-000001")
    assert find_unfinished("k", tmp_path) == empty and attempt_of(empty) == 0
    write_json(pipeline/"heartbeat.json", {"time": 0} | process_mark())                  # it is only about to begin there
    assert find_unfinished("k", tmp_path) == lost and find_unfinished("k", tmp_path, pipeline) == empty


def test_a_run_is_over_when_it_is_sealed(tmp_path, gone):
    "Between the notebook's last cell and the seal it may be killed: then it is lost, and can go on."
    write_json(tmp_path/"run.json", {"status": "completed", "seals": True})
    write_json(tmp_path/"heartbeat.json", {"time": 0} | gone)
    assert status_of(tmp_path) == "lost"
    write_json(tmp_path/"heartbeat.json", {"time": 0} | process_mark())
    assert status_of(tmp_path) == "running"
    (tmp_path/"seal.json").touch()
    assert status_of(tmp_path) == "completed"
    (tmp_path/"seal.json").unlink()
    write_json(tmp_path/"run.json", {"status": "completed"})                             # by hand, or of an earlier version
    assert status_of(tmp_path) == "completed"


def test_a_process_that_nobody_collects_is_gone():
    process = subprocess.Popen(["sleep", "0"])
    mark = process_mark(process.pid)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)                              # it has ended, and is a zombie
    from medllm.processes import is_there
    assert is_there(mark) is False
    process.wait()


@pytest.mark.parametrize("program,where", [
    ("from medllm.machine import scratch; s = scratch(); s.__enter__()", "medllm-tmp-*"),
    ("from medllm.machine import lasting; lasting()", "medllm-tmp-*"),
    ("from medllm.files import whole_file; f = whole_file('a.json'); f.__enter__()", ".a.json.*.part")])
def test_what_a_killed_process_was_writing_goes_with_the_next(program, where, tmp_path, monkeypatch):
    code = f"{program}; import os; os.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"], cwd=tmp_path,
        env=os.environ | {"TMPDIR": str(tmp_path)})
    assert done.returncode == -9 and len(list(tmp_path.glob(where))) == 1
    with scratch(tmp_path): write_json(tmp_path/"b.json", 1)
    assert [f.name for f in tmp_path.iterdir()] == ["b.json"]


def test_old_figures_do_not_stand_beside_new_items(tmp_path, monkeypatch):
    "An evaluation that is killed leaves the items of another model, and no verdict on the one before."
    write_json(tmp_path/"evaluation.json", {"verdict": []})
    def killed(*args): raise SystemExit
    monkeypatch.setattr(benchmarks, "measure_all", killed)
    with pytest.raises(SystemExit): benchmarks.evaluate_models(None, None, [], tmp_path)
    assert not (tmp_path/"evaluation.json").exists()


@pytest.mark.parametrize("reason", ["3 checkpoints in a row could not be written to x, the last at step 8 (full): make room",
    "the trained model could not be written to x (full): make room"])
def test_a_full_disk_in_a_notebook_is_no_fault_of_ours(reason, tmp_path, capsys):
    write_json(tmp_path/"record.ipynb", {"cells": [{"outputs": [{"output_type": "error", "ename": "Unwritable"}]}]})
    assert _of_failure(SimpleNamespace(state={"status": "failed", "reason": reason}, folder=tmp_path)) == 74
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_full_disks_and_whole_checkpoints():
    "Weights fit and the optimiser does not; a record on a disk without room, without a byte, without an inode."
    found = fault("full.py", "full", run=process)
    once, always, disks = found["once"], found["always"], found["disks"]
    assert once["code"] == 0 and once["skipped"] == [4] and once["same"] == [True, True], once
    assert always["code"] == 74 and always["there"] == ["checkpoint-2"] and always["again"] == 0 and always["same"], always
    if isinstance(disks, str): pytest.skip(disks)
    for name, disk in disks.items():
        assert disk["code"] == 74 and disk["said"] and disk["left"] == [] and not disk["report"], (name, disk)
        assert disk["status"] == ("lost" if name == "filled" else "failed") and disk["there"] == [[2, ""]], (name, disk)
        assert disk["held"][0] == (name != "filled") and disk["again"] == 0, (name, disk)
        assert disk["then"] == ["completed", True, True, [], 1], (name, disk)
