"""Checkpoints under faults; what plain Trainer does stands beside it where it is quick."""
import contextlib
import io
import json
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from commands import fault
from transformers import Trainer, TrainingArguments

from medllm.core import UserError
from medllm.checkpoint import commit as checkpoints, resumable, state
from medllm.train.__main__ import main
from medllm.train.arguments import parse
from medllm.checkpoint.commit import COMMIT, checkpoint_fault, commit, committed, digest, drop, newest, rotate
from medllm.train.inputs import prepare_data
from medllm.json_file import read_log
from medllm.train.loop import train

SHORT = dict(
    model_name_or_path="tiny", dataset="mm", max_samples=32, cutoff_len=256, per_device_train_batch_size=4, max_steps=6,
    logging_steps=1, save_steps=2, learning_rate=1e-3, disable_tqdm=True, finetuning_type="lora", lora_rank=4)


def _given(**more):
    "Flags of a short run: the others are left out where a flag says that they do not belong to it."
    full = more.get("finetuning_type", "lora") != "lora"
    return {k: v for k, v in (SHORT | more).items() if not (full and k.startswith("lora_"))}


def whole_run(folder, **more):
    "Metrics of a run in this process, and what it said."
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        args = parse(_given(**more, output_dir=str(folder)))
        metrics = train(args, prepare_data(args))
    return metrics, said.getvalue()


def weights(folder): return b"".join(f.read_bytes() for f in sorted(Path(folder).glob("*.safetensors")))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A run with checkpoints at steps 2, 4 and 6; copy it before you break it."
    folder = tmp_path_factory.mktemp("finished")/"run"
    whole_run(folder)
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished, tmp_path/"run")
    return tmp_path/"run"


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.zeros(64))
    def forward(self, x, y): return {"loss": ((self.a*x - y)**2).mean()}


def plain(folder, resume=None, steps=4, **more):
    "Plain Trainer on a line."
    args = TrainingArguments(output_dir=str(folder), max_steps=steps, save_steps=2, per_device_train_batch_size=2,
        report_to="none", disable_tqdm=True, use_cpu=True, **more)
    trainer = Trainer(Line(), args, train_dataset=[{"x": torch.rand(64), "y": torch.rand(64)} for _ in range(8)])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("kills", [3, pytest.param(int(os.environ.get("MEDLLM_KILLS", 20)), marks=pytest.mark.slow)])
def test_killed_again_and_again(kills):
    "kill -9 at random moments: the same weights and the same curve as without, and never a step by hand."
    found = fault("kill.py", kills)
    assert found["kills"] >= kills and found["steps_lost_at_most"] <= 1, found


def _steps_of_a_save(monkeypatch, fail):
    "Have the disk operations of a save counted, and the one with a given number fail."
    count = [0]
    def counted(owner, name):
        original = getattr(owner, name)
        def changed(*args, **kwargs):
            count[0] += 1
            if count[0] == fail[0]: raise OSError(5, "Input/output error")
            return original(*args, **kwargs)
        monkeypatch.setattr(owner, name, changed)
    for owner, name in ((os, "fsync"), (os, "replace"), (os, "open"), (torch, "save"), (state, "save_file"),
            (state, "write_json"), (resumable, "write_json")):
        counted(owner, name)
    import peft.utils.save_and_load
    import peft.peft_model
    for module in (peft.peft_model, peft.utils.save_and_load):
        if hasattr(module, "safe_save_file"): counted(module, "safe_save_file")
    return count


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_every_write_may_fail(copy, monkeypatch, every):
    "Each write, fsync and rename of a save fails once, or every fifth: the commit before stays, and what is found is whole."
    args = parse(SHORT | dict(output_dir=str(copy), resume_from_checkpoint="true"))
    with contextlib.redirect_stderr(io.StringIO()):
        from medllm.train.loop import stage_module
        trainer = stage_module("sft").make_trainer(args, prepare_data(args))
        trainer.train(str(copy/"checkpoint-6"))
        fail, results = [0], []
        count = _steps_of_a_save(monkeypatch, fail)
        for number in range(1, 200, every):
            trainer.state.global_step, trainer.failures, count[0], fail[0] = 6 + number, 0, 0, number
            before = newest(copy)
            trainer._save_checkpoint(trainer.model, None)
            trainer.settle()
            done, fail[0] = count[0], 0
            good = newest(copy, pytest.fail)               # nothing half-written is left
            results.append(good.name == f"checkpoint-{6 + number}")
            assert results[-1] or good == before
            if done < number: break
    assert results.count(False) > 20//every and results[-1], results      # what may fail without harm: tidying up
    skipped = [json.loads(line) for line in (copy/"events.jsonl").read_text().splitlines() if "save_skipped" in line]
    assert skipped and {e["reason"] for e in skipped} == {"Input/output error"}


def test_a_full_disk_and_two_runs_in_one_folder():
    found = fault("full.py")
    once, always, two = found["once"], found["always"], found["together"]
    assert once["code"] == 0 and once["skipped"] == [4] and once["same"] == [True, True], once
    assert once["there"] == ["checkpoint-2", "checkpoint-6", "checkpoint-8"]          # no half of a folder
    assert always["code"] == 74 and always["skipped"] == [4, 6, 8] and always["there"] == ["checkpoint-2"], always
    assert "3 checkpoints in a row could not be written" in always["said"] and always["again"] == 0 and always["same"]
    assert two["second"] == 2 and "is trained into by process" in two["said"], two
    assert two["third"] == 0 and two["taken"] and two["same"], two


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_disk_without_room_for_a_name(kind, tmp_path, monkeypatch):
    "No inode is left: tokenizers raises a bare Exception, which is a save left out like any other."
    from transformers import PreTrainedTokenizerFast
    real, calls = PreTrainedTokenizerFast._save_pretrained, []
    def save(*args, **more):
        calls.append(1)
        if len(calls) == 2: raise Exception("No space left on device (os error 28)")
        return real(*args, **more)
    monkeypatch.setattr(PreTrainedTokenizerFast, "_save_pretrained", save)
    metrics, said = whole_run(tmp_path/"run", finetuning_type=kind)
    assert metrics["steps"] == 6 and "step 4: the checkpoint is left out (No space left" in said
    assert [f.name for _, f in committed(tmp_path/"run")] == ["checkpoint-6", "checkpoint-2"]


def test_a_result_is_whole_or_not_there(finished, tmp_path, monkeypatch):
    "The disk is full when the model itself is written: exit code 74, no half of a model, and the same command goes on."
    words = [f"--{k}={v}" for k, v in (SHORT | dict(output_dir=tmp_path/"run")).items()]
    def full(self): raise OSError(28, "No space left on device")
    with monkeypatch.context() as patched:
        patched.setattr(resumable.ResumableTrainer, "save_state", full)
        said = io.StringIO()
        with contextlib.redirect_stderr(said): assert main(words) == 74
    assert "the trained model could not be written" in said.getvalue() and "goes on from checkpoint-6" in said.getvalue()
    left = {f.name for f in (tmp_path/"run").iterdir() if f.is_file()} - {".lock"}
    assert left == {"fingerprint.json", "events.jsonl", "history.jsonl"}, left
    assert main([*words, "--resume_from_checkpoint=true"]) == 0 and weights(tmp_path/"run") == weights(finished)


def _at_step_3(monkeypatch, do):
    real = resumable.ResumableTrainer._maybe_log_save_evaluate
    def changed(self, *args, **more):
        if self.state.global_step == 3: do()
        return real(self, *args, **more)
    monkeypatch.setattr(resumable.ResumableTrainer, "_maybe_log_save_evaluate", changed)


def test_a_folder_removed_during_training_is_made_anew_with_a_word(finished, tmp_path, monkeypatch):
    _at_step_3(monkeypatch, lambda: shutil.rmtree(tmp_path/"run"))
    metrics, said = whole_run(tmp_path/"run")
    assert said.count("was removed while it was trained into; it is made anew") == 1 and metrics["steps"] == 6
    assert "folder_removed" in (tmp_path/"run/events.jsonl").read_text()
    assert [f.name for _, f in committed(tmp_path/"run")] == ["checkpoint-6", "checkpoint-4"]
    assert weights(tmp_path/"run") == weights(finished)


def test_a_folder_taken_over_by_another_run_is_left_alone(tmp_path, monkeypatch):
    "Somebody removed the folder and began again there: the first run ends, and writes nothing into it."
    import fcntl
    held = []
    def take():
        while (tmp_path/"run").exists(): shutil.rmtree(tmp_path/"run", ignore_errors=True)     # while a checkpoint is written
        (tmp_path/"run").mkdir()
        held.append(open(tmp_path/"run/.lock", "w"))
        fcntl.flock(held[0], fcntl.LOCK_EX)
    _at_step_3(monkeypatch, take)
    with pytest.raises(UserError, match="another run has begun there"): whole_run(tmp_path/"run")
    assert [f.name for f in (tmp_path/"run").iterdir()] == [".lock"]
    held[0].close()


def test_no_room_is_seen_before(copy, monkeypatch):
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    shutil.rmtree(copy/"checkpoint-6")
    metrics, said = whole_run(copy, resume_from_checkpoint="true", save_steps=6)
    assert "step 6: the checkpoint is left out (0 MiB are free" in said and metrics["steps"] == 6


FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "progress.json",
    "fingerprint.json", COMMIT)


def broken(file, how):
    "Damage a file."
    data = file.read_bytes()
    if how == "missing": return file.unlink()
    if how == "flipped":
        at = len(data)//2
        data = data[:at] + bytes([data[at] ^ 4]) + data[at + 1:]
    file.write_bytes({"empty": b"", "half": data[:len(data)//2], "flipped": data}[how])


@pytest.mark.parametrize("how", ["missing", "empty", "half", "flipped"])
def test_a_damaged_file_is_named_and_the_older_checkpoint_taken(copy, how):
    for name in FILES:
        file = copy/"checkpoint-6"/name
        whole = file.read_bytes()
        broken(file, how)
        said = []
        assert newest(copy, said.append).name == "checkpoint-4"
        assert len(said) == 1 and said[0].startswith("checkpoint-6 is left out: ") and name in said[0], said
        file.write_bytes(whole)
    assert newest(copy).name == "checkpoint-6"


def test_plain_trainer_loads_a_flipped_bit_without_a_word(tmp_path):
    plain(tmp_path)
    file = tmp_path/"checkpoint-4"/"model.safetensors"
    data = bytearray(file.read_bytes())
    data[-6] ^= 0x40
    file.write_bytes(data)
    (tmp_path/"checkpoint-4"/"optimizer.pt").unlink()
    trainer = plain(tmp_path, resume=True, steps=5)
    assert trainer.state.global_step == 5


@pytest.mark.smoke
def test_a_resumed_run_takes_the_older_one_and_ends_the_same(copy, finished):
    broken(copy/"checkpoint-6"/"optimizer.pt", "flipped")
    metrics, said = whole_run(copy, resume_from_checkpoint="true")
    assert "checkpoint-6 is left out: optimizer.pt was changed" in said and "going on from checkpoint-4" in said
    assert weights(copy) == weights(finished) and checkpoint_fault(copy/"checkpoint-6") == ""
    assert [h["step"] for h in read_log(copy/"history.jsonl") if "loss" in h] == [1, 2, 3, 4, 5, 6]


def test_an_empty_newest_folder(copy, tmp_path):
    (copy/"checkpoint-99").mkdir()
    (copy/"checkpoint-6"/COMMIT).unlink()
    said = []
    assert newest(copy, said.append).name == "checkpoint-4" and [s.split()[0] for s in said] == ["checkpoint-99", "checkpoint-6"]
    plain(tmp_path/"plain")
    (tmp_path/"plain"/"checkpoint-99").mkdir()
    with pytest.raises(Exception): plain(tmp_path/"plain", resume=True, steps=5)       # and an older good one lies beside it


def test_a_file_too_many(copy):
    shutil.copy(copy/"checkpoint-4"/"optimizer.pt", copy/"checkpoint-6"/"optimizer_1.pt")
    assert checkpoint_fault(copy/"checkpoint-6") == "optimizer_1.pt does not belong to it"


@pytest.mark.slow
def test_signals_at_any_moment():
    "SIGTERM in each part of a run: 75 within 30 s, nothing done behind the training, and the same run afterwards."
    found = fault("signalled.py")
    assert found.pop("twice") == [143, 130]
    assert found.pop("left") == ["checkpoint-3", "checkpoint-3"]
    for place, f in found.items():
        assert f["code"] == 75 and f["seconds"] < 30 and not f["finished"], (place, f)
        assert f["again"] == 0 and f["same"] == [True, True], (place, f)
    assert "while nothing was trained" in found["mapping"]["said"] and "checkpoint-5 holds it" in found["validation"]["said"]


@pytest.mark.parametrize("changed, word", [
    (dict(max_samples=30), "dataset_rows was"), (dict(template="llama2"), "template was"),
    (dict(cutoff_len=128), "cutoff_len was"), (dict(lora_rank=8), "adapter.rank was 4, is 8"),
    (dict(packing=True), "packing was false, is true"),
    (dict(finetuning_type="full"), "adapter.kind")])
def test_another_run_is_refused(copy, changed, word):
    with pytest.raises(UserError, match=word): whole_run(copy, resume_from_checkpoint="true", **changed)
    assert weights(copy) and newest(copy, pytest.fail)                                # nothing was touched


def test_other_base_weights_and_exit_code(copy, tmp_path):
    from safetensors.torch import load_file, save_file
    from medllm.models.tiny import write_tiny
    base = Path(write_tiny(tmp_path/"base"))
    state = load_file(base/"model.safetensors")
    state["model.norm.weight"][3] += 1e-3
    save_file(state, base/"model.safetensors", {"format": "pt"})
    said = io.StringIO()
    flags = SHORT | dict(model_name_or_path=str(base), output_dir=str(copy), resume_from_checkpoint="true")
    with contextlib.redirect_stderr(said): assert main([f"--{k}={v}" for k, v in flags.items()]) == 2
    assert "model was" in said.getvalue() and "is of another run" in said.getvalue()


def test_another_tokenizer(copy, tmp_path):
    from medllm.models.tiny import write_tiny
    file = Path(write_tiny(tmp_path/"base"))/"tokenizer.json"
    told = json.loads(file.read_text())
    file.write_text(json.dumps(told | {"normalizer": {"type": "Lowercase"}}))
    with pytest.raises(UserError, match="tokenizer was"):
        whole_run(copy, resume_from_checkpoint="true", model_name_or_path=str(file.parent))


@pytest.mark.parametrize("changed, name", [
    (dict(learning_rate=5e-4), "lr"), (dict(seed=1), "seed"), (dict(per_device_train_batch_size=2), "batch")])
def test_other_flags_need_a_word(copy, changed, name):
    shutil.rmtree(copy/"checkpoint-6")
    with pytest.raises(UserError, match=f"--allow {name} goes on"): whole_run(copy, resume_from_checkpoint="true", **changed)
    _, said = whole_run(copy, resume_from_checkpoint="true", allow=name, **changed)
    assert "not as it was" in said
    event, = [e for e in map(json.loads, (copy/"events.jsonl").read_text().splitlines()) if e["event"] == "resumed"]
    assert [d["name"].split(".")[0] for d in event["differences"]] == [name]


@pytest.mark.parametrize("flags", [
    pytest.param(dict(packing=True, quantization_bit=4, lora_dropout=0.1, dataloader_num_workers=1,
        per_device_train_batch_size=1, max_samples=16), id="packed-4bit", marks=pytest.mark.slow),
    pytest.param(dict(lora_dropout=0.1, dataloader_num_workers=2, gradient_accumulation_steps=2,
        lr_scheduler_type="cosine"), id="grouped"),
    pytest.param(dict(finetuning_type="full", group_by_length=False, neftune_noise_alpha=5.0, optim="adafactor"),
        id="random-neftune", marks=pytest.mark.slow)])
def test_in_the_third_epoch(tmp_path, flags):
    "A run that ends in its third epoch and goes on there is bit-equal to one that was not interrupted."
    flags = _given(**dict(max_steps=-1, num_train_epochs=4) | flags)
    args = parse(flags | dict(output_dir="unused"))
    whole_run(tmp_path/"whole", **flags)
    steps = max(h["step"] for h in read_log(tmp_path/"whole"/"history.jsonl"))
    at = steps*5//8
    half = flags | dict(save_strategy="steps", save_steps=at, save_total_limit=1)
    from medllm.interruption import stop
    from medllm.train.objectives import TokenLoss
    original = TokenLoss.__call__
    def stopping(self, trainer, model, batch):
        if trainer.state.global_step == at - 1: stop.asked = 15
        return original(self, trainer, model, batch)
    TokenLoss.__call__ = stopping
    try:
        with pytest.raises(UserError, match=f"asked to stop .* at step {at} of {steps}"): whole_run(tmp_path/"half", **half)
    finally: TokenLoss.__call__, stop.asked = original, 0
    assert int(2*steps/4) < at < steps and args
    whole_run(tmp_path/"half", **half | dict(resume_from_checkpoint="auto"))
    assert weights(tmp_path/"half") == weights(tmp_path/"whole")
    logged = lambda d: [(h["step"], h["loss"], h["padding_share"])
        for h in read_log(tmp_path/d/"history.jsonl") if "loss" in h]
    assert logged("half") == logged("whole")


def small(folder, step):
    folder = Path(folder)/f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in ("weights", "optimizer"): (folder/name).write_text(f"{name} {step}")
    commit(folder, step, {})
    return folder


class Crash(BaseException): pass


def test_a_crash_while_old_ones_go(tmp_path, monkeypatch):
    "Wherever it happens, a whole checkpoint is there; the next rotation finishes the work."
    for at in range(12):
        run_folder, count = tmp_path/str(at), [0]
        for step in (1, 2, 3): small(run_folder, step)
        with monkeypatch.context() as m:
            for owner, name in ((os, "unlink"), (os, "rmdir"), (os, "fsync")):
                def changed(*args, original=getattr(owner, name), **kwargs):
                    count[0] += 1
                    if count[0] > at: raise Crash
                    return original(*args, **kwargs)
                m.setattr(owner, name, changed)
            with contextlib.suppress(Crash): rotate(run_folder, 1)
        assert newest(run_folder, lambda _: None).name == "checkpoint-3"
        rotate(run_folder, 1)
        assert [f.name for f in run_folder.iterdir()] == ["checkpoint-3"]


def test_a_half_deleted_checkpoint_is_none(copy):
    (copy/"checkpoint-6"/COMMIT).unlink()
    assert [step for step, _ in committed(copy)] == [4, 2]
    drop(copy/"checkpoint-4")
    assert not (copy/"checkpoint-4").exists()


class Canary:
    def __init__(self, file): self.file = file
    def __reduce__(self): return (Path.touch, (self.file,))


def test_code_in_a_checkpoint_does_not_run(copy, tmp_path):
    shutil.rmtree(copy/"checkpoint-6")
    checkpoint = copy/"checkpoint-4"
    for name in ("optimizer.pt", "rng_state.pth"):
        kept = (checkpoint/name).read_bytes()
        torch.save({"state": Canary(tmp_path/"canary")}, checkpoint/name)
        assert checkpoint_fault(checkpoint) != ""                                    # changed behind the commit
        commit(checkpoint, 4, json.loads((checkpoint/"fingerprint.json").read_text()))    # and by somebody who knows of it
        with pytest.raises(UserError, match="holds more than tensors and numbers, which may be code"):
            whole_run(copy, resume_from_checkpoint="true")
        (checkpoint/name).write_bytes(kept)
        assert not (tmp_path/"canary").exists()
    pickle.loads(pickle.dumps(Canary(tmp_path/"canary")))                 # it would have
    assert (tmp_path/"canary").exists()


@pytest.mark.parametrize("asked", ["true", "auto"])
def test_a_newer_schema(copy, asked):
    note = json.loads((copy/"checkpoint-6"/COMMIT).read_text())
    note |= {"schema": 2}
    note["sha256"] = digest({k: v for k, v in note.items() if k != "sha256"})
    (copy/"checkpoint-6"/COMMIT).write_text(json.dumps(note))
    with pytest.raises(UserError, match="written by a newer medllm"): whole_run(copy, resume_from_checkpoint=asked)
    assert (copy/"checkpoint-6"/COMMIT).exists()


def test_what_is_not_finite_stops_within_three_steps(tmp_path, monkeypatch):
    from medllm.train.objectives import TokenLoss
    original = TokenLoss.__call__
    def poisoned(self, trainer, model, batch):
        loss, sums = original(self, trainer, model, batch)
        return (loss*float("nan") if trainer.state.global_step == 3 else loss), sums
    monkeypatch.setattr(TokenLoss, "__call__", poisoned)
    with pytest.raises(UserError, match="the loss is not finite at step 4"):
        whole_run(tmp_path, max_steps=40, logging_steps=100, save_steps=3, logging_first_step=False)
    assert [step for step, _ in committed(tmp_path)] == [3] and not (tmp_path/"history.jsonl").exists()
    monkeypatch.setattr(TokenLoss, "__call__", lambda self, trainer, model, batch: (
        original(self, trainer, model, batch)[0]*0, {}) if trainer.state.global_step != 2 else (_ for _ in ()).throw(Crash))
    with pytest.raises(Crash): whole_run(tmp_path/"steps", max_steps=40, logging_steps=100)       # it was three steps, not forty


def test_clocks_do_not_count(copy):
    for file in copy.rglob("*"): os.utime(file, (0, 0))
    os.utime(copy/"checkpoint-2", (4e9, 4e9))
    assert newest(copy, pytest.fail).name == "checkpoint-6"
    rotate(copy, 1)
    assert [step for step, _ in committed(copy)] == [6]


def test_no_pickled_arguments_and_no_token(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")                 # what a run puts there is taken away again
    whole_run(tmp_path, hub_token="hf_" + "x"*34, save_total_limit=1)
    assert not list(tmp_path.rglob("training_args.bin"))
    for file in tmp_path.rglob("*"):
        if file.is_file(): assert b"hf_xxxx" not in file.read_bytes(), file


def test_auto_needs_no_second_command(tmp_path):
    "Begins where there is nothing, goes on where there is something, and leaves a finished model of another run alone."
    _, said = whole_run(tmp_path/"a", resume_from_checkpoint="auto")
    assert "going on" not in said
    before = weights(tmp_path/"a")
    _, said = whole_run(tmp_path/"a", resume_from_checkpoint="auto")
    assert "going on from checkpoint-6" in said and weights(tmp_path/"a") == before
    for step in (2, 4, 6): shutil.rmtree(tmp_path/"a"/f"checkpoint-{step}")
    with pytest.raises(UserError, match="already holds a model"): whole_run(tmp_path/"a", resume_from_checkpoint="auto")


@pytest.mark.smoke
def test_early_stopping_keeps_its_patience(tmp_path):
    "A callback's state comes back, once; plain Trainer forgets it unless told, and keeps a copy a save of the second of a kind."
    from transformers import EarlyStoppingCallback
    from medllm.train.loop import stage_module
    def trainer(**more):
        args = parse(SHORT | dict(val_size=8, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, save_steps=1,
            metric_for_best_model="eval_loss", greater_is_better=True, learning_rate=1e-3, output_dir=str(tmp_path)) | more)
        with contextlib.redirect_stderr(io.StringIO()):
            made = stage_module("sft").make_trainer(args, prepare_data(args))
            for patience in (30, 50): made.add_callback(EarlyStoppingCallback(patience))
        return made
    with contextlib.redirect_stderr(io.StringIO()): trainer().train()
    state = json.loads((tmp_path/"checkpoint-4"/"trainer_state.json").read_text())
    kept = state["stateful_callbacks"]["EarlyStoppingCallback"]
    assert len(kept) == 2 and [k["args"]["early_stopping_patience"] for k in kept] == [30, 50]
    counted = kept[0]["attributes"]["early_stopping_patience_counter"]
    again = trainer()
    with contextlib.redirect_stderr(io.StringIO()): again.train(str(tmp_path/"checkpoint-4"))
    stoppers = [c for c in again.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]
    assert counted > 0 and stoppers[0].early_stopping_patience_counter == counted + 2


def test_random_damage_is_never_resumed_from(copy):
    "A hundred random changes of one byte anywhere in a checkpoint."
    rng, files = random.Random(3), [f for f in (copy/"checkpoint-6").iterdir() if f.is_file()]
    for _ in range(100):
        file = rng.choice(files)
        data = bytearray(file.read_bytes())
        at = rng.randrange(len(data))
        kept, data[at] = data[at], data[at] ^ (1 << rng.randrange(8))
        file.write_bytes(data)
        assert checkpoint_fault(copy/"checkpoint-6") != "", (file, at)
        data[at] = kept
        file.write_bytes(data)
    assert checkpoint_fault(copy/"checkpoint-6") == ""


@pytest.mark.slow
def test_two_processes_stop_and_go_on_together():
    "One of two processes gets the signal: both save in the same step and end with 75; another number of them is refused."
    found = fault("ranks.py")
    assert found["codes"] >= 2 and found["stopped"] == 1 and len(found["left"]) == 1, found
    assert found["again"] == 0 and found["same"] == [True, True], found
    assert found["one"][0] == 2 and "processes was 2, is 1" in found["one"][1], found


@pytest.mark.parametrize("name", ["fingerprint.json", "progress.json", "trainer_state.json"])
@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[]"])
def test_a_checkpoint_that_somebody_committed_is_told_apart(name, text, tmp_path):
    folder = tmp_path/"checkpoint-1"
    folder.mkdir()
    (folder/name).write_text(text)
    commit(folder, 1, {})
    assert checkpoint_fault(folder) == f"its {name} is no JSON object"
