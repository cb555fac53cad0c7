"""Pipelines: chained records, taking over what is finished, and the way back from a final policy."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from commands import run
from written_files import write

from medllm.cli.main import parser
from medllm.core import Interrupted
from medllm.train.arguments import read_command

SHORT = dict(max_steps=2, max_samples=12, per_device_train_batch_size=2, logging_steps=1, save_steps=100, cutoff_len=256)


def pipeline(folder, stages, **more):
    "A finished `medllm run pipeline`, and its record."
    file = Path(folder)/"pipeline.yaml"
    file.write_text(yaml.safe_dump({"stages": stages, "reuse": "any", **more}, sort_keys=False, allow_unicode=True))
    done = run("medllm", "run", "pipeline", "-f", file, "--runs", Path(folder)/"runs", OMP_NUM_THREADS="1")
    found = sorted((Path(folder)/"runs/pipeline").glob("*/run.json"))
    return done, json.loads(found[-1].read_text()) if found else {}


def state(stage):
    return json.loads((Path(stage["folder"])/"run.json").read_text())


@pytest.mark.slow
def test_a_failed_stage_leaves_the_others_and_the_next_call_goes_on_there(tmp_path):
    pairs = tmp_path/"pairs.json"
    pairs.write_text('[{"instruction": "Fever?", "output": ["Rest.", "Go."]}, {"instruction": ')
    write(tmp_path/"dataset_info.json", {"pairs": {"file_name": "pairs.json", "ranking": True},
        "talk": {"file_name": "talk.json"}})
    write(tmp_path/"talk.json", [{"instruction": f"What is {n}?", "output": f"It is {n}."} for n in range(12)])
    stages = {"sft": SHORT | dict(dataset="talk", val_size=2), "dpo": SHORT | dict(dataset="pairs", val_size=0)}
    done, record = pipeline(tmp_path, stages, dataset_dir=str(tmp_path))
    assert done.returncode == 1 and record["status"] == "failed"
    assert "stage 'dpo' failed" in record["reason"] and "pairs.json" in record["reason"] and "Traceback" not in done.stderr
    sft, dpo = record["stages"]
    assert state(sft)["status"] == "completed" and state(dpo)["status"] == "failed"
    whole = (Path(sft["folder"])/"run.json").read_bytes()
    write(pairs, [{"instruction": f"Fever {n}?", "output": ["Rest.", "Go."]} for n in range(8)])
    done, record = pipeline(tmp_path, stages, dataset_dir=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert record["status"] == "completed" and record["stages"][0]["folder"] == sft["folder"]
    assert record["stages"][0]["taken_over"] and (Path(sft["folder"])/"run.json").read_bytes() == whole
    consumed = {c["role"]: c for c in state(record["stages"][1])["consumed"]}
    assert consumed["base"]["place"] == sft["folder"] and consumed["base"]["weights"] == state(sft)["weights"]
    shown = run("medllm", "runs", "show", record["stages"][1]["folder"]).stdout
    assert shown.index("dpo [pairs]") < shown.index("base: sft [talk]") and "!" not in shown
    weights = Path(sft["folder"])/"model.safetensors"          # trained over since: not taken over, and shown
    weights.write_bytes(weights.read_bytes()[:-4] + b"abcd")
    assert "its weights were changed since" in run("medllm", "runs", "show", record["stages"][1]["folder"]).stdout
    done, record = pipeline(tmp_path, {"sft": stages["sft"]}, dataset_dir=str(tmp_path))
    assert done.returncode == 0 and not record["stages"][0].get("taken_over")


@pytest.mark.slow
def test_adapters_are_handed_on(tmp_path):
    done, record = pipeline(tmp_path, {"sft": SHORT | dict(dataset="mm"), "ipo": SHORT | dict(stage="dpo", dataset="mm_rm",
        pref_loss="ipo")}, finetuning_type="lora")
    assert done.returncode == 0, done.stderr
    sft, ipo = map(state, record["stages"])
    assert {c["role"]: c["weights"] for c in ipo["consumed"]}["adapter"] == sft["weights"]
    assert ipo["metrics"]["reference"]["policy"] == "start"      # the supervised policy, not the raw base


@pytest.mark.slow
def test_a_stopped_stage_goes_on_from_its_checkpoint(tmp_path):
    file, runs = tmp_path/"pipeline.yaml", tmp_path/"runs"
    file.write_text(yaml.safe_dump({"reuse": "any", "stages": {"sft": SHORT | dict(dataset="mm", max_steps=150, save_steps=5)}}))
    words = ["medllm", "run", "pipeline", "-f", str(file), "--runs", str(runs)]
    first = subprocess.Popen([sys.executable, "-c", "import sys; from medllm.cli.main import main; sys.exit(main())", *words[1:]])
    until = time.monotonic() + 120
    while not list(runs.glob("sft/*/checkpoint-10/COMMIT.json")) and time.monotonic() < until: time.sleep(0.2)
    first.terminate()
    assert first.wait(60) == 75
    record = json.loads(next(runs.glob("pipeline/*/run.json")).read_text())
    folder = Path(record["stages"][0]["folder"])
    assert record["status"] == state(record["stages"][0])["status"] == "interrupted"
    assert run(*words, OMP_NUM_THREADS="1").returncode == 0
    record = json.loads(sorted(runs.glob("pipeline/*/run.json"))[-1].read_text())
    assert record["status"] == "completed" and record["stages"][0]["resumed"] and record["stages"][0]["folder"] == str(folder)
    steps = [line["step"] for line in map(json.loads, (folder/"history.jsonl").read_text().splitlines()) if "loss" in line]
    assert steps == sorted(set(steps)) and steps[-1] == 150 and len(list(runs.glob("sft/*"))) == 1


@pytest.mark.parametrize("stage", ["sft", "pipeline", "evaluate", "predict", "data", None])
def test_who_is_stopped_is_told_what_goes_on(tmp_path, stage):
    "Advice that the command in use takes: a record is gone on with by a verb, a command without one by its flag."
    from medllm.records.record import Run, _listen, _unlisten
    from medllm.interruption import goes_on, stop
    if stage:
        run = Run(tmp_path)
        run.update(stage=stage, status="running")
        _listen(run)
    else: stop.install()
    try:
        with pytest.raises(Interrupted) as e: os.kill(os.getpid(), signal.SIGINT)
    finally: _unlisten()
    told = f"medllm runs resume {tmp_path} goes on" if stage else "the same run with --resume_from_checkpoint auto goes on"
    assert str(e.value).endswith(told) and ("nothing was trained" in str(e.value)) == (stage in ("sft", None))
    assert goes_on(tmp_path) == (told if stage else "the same run with --resume_from_checkpoint true goes on")
    stop.clear()
    words = told.removesuffix(" goes on").split()
    if stage: assert parser().parse_args(words[1:]).record
    else: assert read_command(["--dataset", "mm", *words[-2:]])["resume_from_checkpoint"] == "auto"


def test_a_mistake_in_the_last_stage_is_told_before_the_first_begins(tmp_path):
    done, record = pipeline(tmp_path, {"sft": SHORT | dict(dataset="mm"), "dpo": dict(dataset="mm_rm", pref_los="ipo")})
    assert done.returncode == 2 and "stage 'dpo'" in done.stderr and "did you mean 'pref_loss'" in done.stderr and not record


@pytest.mark.slow
def test_medicalgpt_files(tmp_path, shared):
    place = shared("data/medicalgpt/dpo_zh_500.jsonl").parent
    more = SHORT | dict(max_samples=60, cutoff_len=512, val_size=0.2)
    done, record = pipeline(tmp_path, {"sft": more | dict(dataset=str(place/"medical_sft_1K_format.jsonl")),
        "dpo": more | dict(dataset=str(place/"dpo_zh_500.jsonl"))})
    assert done.returncode == 0, done.stderr
    assert [s["status"] for s in record["stages"]] == ["completed"]*2


@pytest.mark.slow
def test_the_example_rows_of_llamafactory_2023(tmp_path, shared):
    text = next(shared("seed").glob("*.txt")).read_text(encoding="utf-8")
    part = lambda head: text.split(head)[1].split("```")[1].partition("\n")[2]
    (tmp_path/"pt.txt").write_text(part("### PT example data"))
    for name, head in (("one", "### SFT example data 1"), ("two", "### SFT example data 2"), ("rw", "### RW example data")):
        (tmp_path/f"{name}.json").write_text(part(head))
    columns = {"prompt": "instruction", "query": "input", "response": "output", "history": "history"}
    write(tmp_path/"dataset_info.json", {"text": {"file_name": "pt.txt"}, "one": {"file_name": "one.json", "columns": columns},
        "two": {"file_name": "two.json", "columns": columns}, "rw": {"file_name": "rw.json", "ranking": True}})
    more = SHORT | dict(val_size=0, cutoff_len=512)
    done, record = pipeline(tmp_path, {"pt": more | dict(dataset="text"), "sft": more | dict(dataset="one,two"),
        "reward": more | dict(stage="rw", dataset="rw"), "dpo": more | dict(dataset="rw")}, dataset_dir=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert [s["status"] for s in record["stages"]] == ["completed"]*4
