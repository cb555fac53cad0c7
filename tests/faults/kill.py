"""Killed again and again, and started again by the same words: the same result as undisturbed, and nothing left over.

    python tests/faults/kill.py [kills]             a training
    python tests/faults/kill.py COMMAND [kills]     evaluate, predict, export, run-evaluate, run-predict, pipeline or sweep

A training is killed at random moments. The other commands lead a session of their own that is killed with SIGKILL as a whole:
every second time at a moment of their duration, else before or after an operation on the disk, each as likely as any other.
"""
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from forks import SFT, curve, ended, fork, main, train, weights, words

from medllm.cli.main import main as medllm
from medllm.evaluate import benchmarks  # noqa: F401  (what a child would import)
from medllm.records import engine; from medllm.export import release; from medllm.experiment import execute as run, sweep  # noqa: F401
from medllm.records.listing import list_runs, read_run_json, record_folders
from medllm.records.record import RUNNING, status_of
from medllm.records.verify import verify
from medllm.checkpoint.commit import checkpoint_fault, checkpoints_in
from medllm.predict import predict  # noqa: F401

FLAGS = SFT | dict(max_steps=24, save_steps=1, save_total_limit=2, eval_strategy="no", eval_steps=None, val_size=0)
GONE = 15    # longest time until what a killed command had started is gone too [s]


def lost(folder):
    "Steps that were logged and are in no checkpoint."
    history = Path(folder)/"history.jsonl"
    lines = history.read_text().split("\n")[:-1] if history.exists() else []
    last = max((json.loads(line)["step"] for line in lines), default=0)
    return last - max((step for step, f in checkpoints_in(folder) if not checkpoint_fault(f)), default=0)


def attempts(folder, kills, rng, longest):
    "Kill a run at random moments until it has ended by itself or been killed often enough; (kills, most steps lost)."
    done, most = 0, 0
    while True:
        pid = fork(lambda: main(words(folder, FLAGS)), f"{folder}.log")
        code = ended(pid, rng.uniform(0, longest) if done < kills else None)
        if code is None:
            os.kill(pid, signal.SIGKILL)
            ended(pid)
            done, most = done + 1, max(most, lost(folder))
        elif code: raise SystemExit(Path(f"{folder}.log").read_text()[-3000:])
        else: return done, most


def training(kills):
    "The weights and the curve of trainings that were killed are those of one that was not."
    rng, start = random.Random(5), time.monotonic()
    with tempfile.TemporaryDirectory() as d:
        begun = time.monotonic()
        if train(f"{d}/whole", FLAGS): raise SystemExit(Path(f"{d}/whole.log").read_text()[-3000:])
        took, done, most, runs = time.monotonic() - begun, 0, 0, 0
        while done < kills:
            more, worst = attempts(f"{d}/{runs}", kills - done, rng, took/2)
            done, most, runs = done + more, max(most, worst), runs + 1
            assert weights(f"{d}/{runs - 1}") == weights(f"{d}/whole"), "other weights"
            assert curve(f"{d}/{runs - 1}") == curve(f"{d}/whole"), "another curve"
        return {"kills": done, "runs": runs, "steps_lost_at_most": most, "one_run_s": round(took, 1),
            "seconds": round(time.monotonic() - start, 1)}


def lines(file):
    "The whole lines of a JSONL file, each parsed."
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").split("\n")[:-1]] if Path(file).exists() else []


def table(file): return json.loads(Path(file).read_text(encoding="utf-8"))


@dataclass
class Command:
    "What is killed, and how it is looked at. A folder is the one that it works in."
    words:Callable    # Folder -> the words that begin it, or go on with it; none where it is done
    result:Callable   # Folder -> what must come out the same, once it is finished
    kept:Callable     # Folder -> what is finished, each part by a name: never less than after the kill before
    prepare:Callable = lambda folder: None # Make the folder ready
    apart:bool = False # Processes of its own do the work: it is killed at moments only


def _words_of_run(folder, stage, *parameters):
    "Begin a record, or go on with it."
    given = [w for name, value in parameters for w in ("-p", name, str(value))]
    if read_run_json(folder/"r").get("status") == "completed" and status_of(folder/"r") == "completed": return []
    if not (folder/"r/run.json").exists(): return ["run", stage, *given, "-p", "output_dir", f"{folder}/r"]
    return ["runs", "resume", f"{folder}/r"]


def _evaluated(folder):
    "Figures and items of an evaluation, those of the base model too."
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.rglob("*"))
        if f.parent.name in ("tuned", "base") or f.name == "evaluation.json"}


def _answers(folder, name):
    "Rows that are answered."
    part, whole = folder/f"{name}.part", folder/name
    rows = [line for file in (part, whole) for line in lines(file) if "row" in line]
    return {json.dumps(line, sort_keys=True) for line in rows}


def _metrics(folder):
    "What a record says came out."
    state = read_run_json(folder)
    assert state["status"] == "completed", state
    return state["metrics"], state["verdict"]


def _records(folder):
    "Finished stages and points, and checkpoints of those that are not."
    done, some = set(), record_folders(folder/"runs")
    for record in (r for r in some if r.parent.name not in ("pipeline", "sweep")):
        if read_run_json(record).get("status") == "completed": done.add(str(record))
        done |= {str(f) for _, f in checkpoints_in(record) if not checkpoint_fault(f)}
    return done


def _stages(folder):
    "Weights by stage or point, of the newest pipeline or sweep; each was trained once."
    newest = max(r for r in record_folders(folder/"runs") if r.parent.name in ("pipeline", "sweep"))
    state = read_run_json(newest)
    assert state["status"] == "completed" and verify(newest), (state, str(verify(newest)))
    for record in record_folders(folder/"runs"):
        if record.parent.name == "sft" and str(record) not in [s["folder"] for s in state["stages"]]: raise AssertionError(
            f"{record} ({status_of(record)}) was begun and is of no use: {read_run_json(record).get('reason')}")
    return {s["name"]: (read_run_json(s["folder"])["weights"], curve(s["folder"])) for s in state["stages"]}


SHORT = dict(max_samples=16, val_size=0, cutoff_len=256, per_device_train_batch_size=2, max_steps=8, save_steps=2,
    logging_steps=1)
EVALUATE = (("limit", 12), ("dataset", "mm_mcq"), ("tasks", '{"more": {"kind": "choice", "dataset": "mm_mcq", "limit": 9, '
    '"scorer": "generate", "orders": "own", "max_new_tokens": 4}}'), ("base_model", "tiny"))
PREDICT = dict(dataset="mm", max_samples=48, max_new_tokens=24, temperature=0.8, batch_size=4)


def _plan(folder):
    (folder/"plan.json").write_text(json.dumps({"reuse": "same", "stages": {"one": SHORT | dict(stage="sft", dataset="mm"),
        "two": SHORT | dict(stage="sft", dataset="mm", seed=7)}}))


def _grid(folder):
    (folder/"grid.json").write_text(json.dumps({"parameters": SHORT | dict(dataset="mm"), "grid": {"seed": [1, 2]}}))


def _exported(folder):
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted((folder/"model").rglob("*")) if f.is_file()}


def _export_is_whole(folder):
    "A folder that is there holds all that its report names."
    if not (folder/"model").exists(): return set()
    from medllm.models.weights import weights
    held = weights(folder/"model", whole=True, below=True)
    assert table(folder/"model/equivalence.json")["weights"] == held, "half of a model"
    assert (folder/"model/README.md").exists()
    return {"model"}


COMMANDS = {
    "evaluate": Command(
        lambda folder: ["evaluate", *(w for pair in EVALUATE for w in ("-p", *map(str, pair))), "--output", f"{folder}/out"],
        lambda folder: _evaluated(folder/"out"), lambda folder: {f.name for f in folder.glob("out/*/[!.]*")}),
    "evaluate-unkept": Command(
        lambda folder: ["evaluate", "mm_mcq", "--limit", "12"], lambda folder: "", lambda folder: set()),
    "predict": Command(
        lambda folder: ["predict", *(f"--{n}={v}" for n, v in PREDICT.items()), "--output", f"{folder}/answers.jsonl"],
        lambda folder: (folder/"answers.jsonl").read_bytes(), lambda folder: _answers(folder, "answers.jsonl")),
    "export": Command(
        lambda folder: ["export", "--output", f"{folder}/model", "--answers", "2", "--max_new_tokens", "4",
            "--max_shard_size", "1MB", *["--overwrite"]*bool([*folder.glob("model"), *folder.glob(".model.old-*")])],
        _exported, _export_is_whole),
    "run-evaluate": Command(
        lambda folder: _words_of_run(folder, "evaluate", *EVALUATE),
        lambda folder: (_evaluated(folder/"r"), _metrics(folder/"r")), lambda folder: set()),
    "run-predict": Command(
        lambda folder: _words_of_run(folder, "predict", *PREDICT.items()),
        lambda folder: ((folder/"r/predictions.jsonl").read_bytes(), _metrics(folder/"r")),
        lambda folder: _answers(folder/"r", "predictions.jsonl")),
    "pipeline": Command(
        lambda folder: ["run", "pipeline", "-f", f"{folder}/plan.json", "--runs", f"{folder}/runs"],
        _stages, _records, _plan, True),
    "sweep": Command(
        lambda folder: ["sweep", "sft", "-f", f"{folder}/grid.json", "--runs", f"{folder}/runs"], _stages, _records, _grid, True),
}


def counted(at, note=None):
    "Have the operations on the disk counted, and this process's session killed before or after one of them."
    import shutil
    count = [0]
    def hit():
        count[0] += 1
        if count[0] == at: os.killpg(0, signal.SIGKILL)
        if note: note.write_text(str(count[0]))
    for owner, name in ((os, "fsync"), (os, "replace"), (os, "rename"), (os, "unlink"), (os, "mkdir"), (shutil, "rmtree")):
        def changed(*args, _original=getattr(owner, name), **kwargs):
            hit()
            try: return _original(*args, **kwargs)
            finally: hit()
        setattr(owner, name, changed)


def begun(command, folder, at=0, note=None):
    "Number of the child that does a command's work, in a session and with a place for temporary files of its own."
    said = command.words(folder)
    def work():
        os.setsid()
        os.environ.update(TMPDIR=f"{folder}/tmp", MEDLLM_CACHE=f"{folder.parent}/cache", MEDLLM_MARK=str(folder))
        tempfile.tempdir = None
        if at or note: counted(at, note)
        return medllm(said) if said else 0
    return fork(work, folder.with_suffix(".log"))


def descendants(folder):
    "Processes that a command started, however far from it they are by now."
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("MEDLLM_MARK") == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error: continue
    return found


def killed(command, folder, within, at):
    "Whether a command was killed, after some seconds or at an operation on the disk; else it has ended by itself."
    pid = begun(command, folder, at)
    code = ended(pid, within)
    if code is None:
        try: os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError: os.kill(pid, signal.SIGKILL)             # it does not lead a session yet
        ended(pid)
    elif code not in (0, -signal.SIGKILL): raise SystemExit(folder.with_suffix(".log").read_text()[-3000:])
    return code != 0


def records(folder):
    "Folders of records below it."
    return [r for below in (folder, folder/"runs") for r in record_folders(below)]


def all_gone(folder):
    "Seconds until what a killed command had started has gone by itself, and no record is said to be running."
    start = time.monotonic()
    while (left := descendants(folder)) or any(status_of(r) in RUNNING for r in records(folder)):
        assert time.monotonic() - start < GONE, f"still there: {[p.cmdline() for p in left] or records(folder)}"
        time.sleep(0.05)
    return time.monotonic() - start


def true_and_whole(folder):
    "No file is half, and no record claims what is not so."
    for file in folder.rglob("*"):
        if file.name.startswith(".") or not file.is_file(): continue
        if file.suffix in (".json", ".ipynb"): table(file)
        elif file.suffix == ".jsonl": lines(file)
    for record in records(folder):
        status = status_of(record)
        assert read_run_json(record), f"{record}: run.json is torn"
        held = verify(record)
        assert held if status == "completed" else any("lost" in d for d in held.defects), f"{record} is {status}: {held}"
    if (folder/"runs").is_dir(): list_runs(folder/"runs")


def leftovers(folder):
    "What nobody will ever take away."
    places = (*folder.rglob("*"), *(folder.parent/"cache").rglob("*"))
    named = [f for f in places if f.name.endswith(".part") or ".part-" in f.name or ".old-" in f.name
        or f.is_dir() and f.parent.parent == folder/"runs" and not (f/"run.json").exists()]
    tried = lambda f: f.is_file() and f.read_bytes() in (b"", b"blat")      # by Python itself, to find out where it can write
    return [f.relative_to(folder.parent).as_posix() for f in (*named, *(f for f in (folder/"tmp").iterdir() if not tried(f)))]


def undisturbed(command, folder, note=None):
    "Run a command to its end; its result."
    code = ended(begun(command, folder, note=note))
    if code: raise SystemExit(folder.with_suffix(".log").read_text()[-3000:])
    all_gone(folder)
    true_and_whole(folder)
    return command.result(folder)


def made(command, folder):
    "A new folder for a command."
    (folder/"tmp").mkdir(parents=True)
    command.prepare(folder)
    return folder


def commands(name, kills):
    "A command's result after kills is the one without."
    command, rng, start, done, left, slowest = COMMANDS[name], random.Random(5), time.monotonic(), 0, [], 0.0
    with tempfile.TemporaryDirectory() as d:
        note, runs = Path(d)/"operations", 0
        begin = time.monotonic()
        whole = undisturbed(command, made(command, Path(d)/"whole"), note)
        took, operations = time.monotonic() - begin, int(note.read_text())
        while done < kills:
            folder, before = made(command, Path(d)/str(runs)), set()
            while done < kills:
                moment, at = (rng.uniform(0, took), 0) if done % 2 or command.apart else (None, rng.randint(1, operations))
                if not killed(command, folder, moment, at): break
                done, slowest = done + 1, max(slowest, all_gone(folder))
                true_and_whole(folder)
                kept = command.kept(folder)
                assert before <= kept, f"lost: {before - kept}"
                before = kept
                print(f"{name}: kill {done}", f"at {moment:.1f} s" if moment else f"at operation {at} of {operations}",
                    f"{len(kept)} parts are there", file=sys.stderr, flush=True)
            again = undisturbed(command, folder)
            assert again == whole, "another result"
            left += leftovers(folder)
            runs += 1
        return {"command": name, "kills": done, "runs": runs, "left": left, "one_run_s": round(took, 1), "operations": operations,
            "slowest_to_go_s": round(slowest, 1), "seconds": round(time.monotonic() - start, 1)}


if __name__ == "__main__":
    named = sys.argv[1:2] if sys.argv[1:] and not sys.argv[1].isdigit() else []
    many = int(sys.argv[1 + len(named)]) if len(sys.argv) > 1 + len(named) else 20
    print(json.dumps(commands(named[0], many) if named else training(many)))
