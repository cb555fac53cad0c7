"""Exactness: a run that was stopped and gone on with, and a run that was done again, end in the very same weights."""
import hashlib
import json
import sys
from pathlib import Path

import pytest
from commands import ROOT, process

from medllm.profiles import launch_environment

SHORT = dict(model_name_or_path="tiny", dataset_dir=str(ROOT/"data"), per_device_train_batch_size=4, max_samples=24,
    cutoff_len=128, max_steps=6, logging_steps=2, learning_rate=1e-3, save_strategy="no",
    report_to="none", disable_tqdm=True, seed=3)
LORA = dict(finetuning_type="lora", lora_dropout=0.1)
DRAWN = dict(dataset="mm_choice", max_new_tokens=6, reward_funcs="length", finetuning_type="lora", lora_dropout=0.0)
# every stage; packing, replay, dropout, 4 bit, accumulation and loader workers are each in one of them
RUNS = {
    "pt": dict(stage="pt", dataset="mm_pt", replay_dataset="mm_pt", replay_share=0.3, finetuning_type="full"),
    "sft": dict(stage="sft", dataset="mm", gradient_accumulation_steps=2, dataloader_num_workers=1) | LORA,
    "sft, 4 bit": dict(stage="sft", dataset="mm", packing=True, quantization_bit=4) | LORA,
    "rm": dict(stage="rm", dataset="mm_rm", val_size=4) | LORA,
    "dpo": dict(stage="dpo", dataset="mm_rm", precompute_ref_log_probs=True) | LORA,
    "kto": dict(stage="kto", dataset="mm_rm", finetuning_type="full"),
    "ppo": DRAWN | dict(stage="ppo", ppo_epochs=2, ppo_buffer_size=2, ppo_score_norm=True),
    "grpo": DRAWN | dict(stage="grpo", num_generations=2, num_iterations=4)}
STAGES = [name for name in RUNS if "," not in name]
SEEDED = ("sft", "grpo")
CLOCK = ("runtime", "per_second", "memory", "rollout_share", "seconds")     # what a clock or the system says
CHILD = """
import json, sys, traceback
from pathlib import Path
from medllm.medical.rewards import REWARDS, Rule
# an untrained model never answers right, and where all rewards are equal nothing is learnt
REWARDS["length"] = lambda option: Rule("length", "any", lambda gold, prompt: "any", lambda text, gold, prompt: len(text) % 5/5)
from medllm.interruption import stop
from medllm.train.loop import run
from medllm.train.trainer import StageTrainer
plain = StageTrainer.compute_loss
for given, at in json.loads(Path(sys.argv[1]).read_text()):
    def asked(self, *args, **kwargs):
        if self.is_in_train and self.state.global_step == at - 1: stop.asked = 15
        return plain(self, *args, **kwargs)
    if at: StageTrainer.compute_loss = asked       # somebody asks it to stop in the middle of a step
    try: run(given)
    except Exception as e:
        said = str(e) if "asked to stop" in str(e) else traceback.format_exc()
        Path(given["output_dir"], "said").write_text(said)
    StageTrainer.compute_loss = plain
    stop.clear()
"""


def train(folder, runs, profile="exact", **env):
    "One process that trains these runs one after the other, each given as flags and the step to stop at."
    file = folder/f"runs-{len(list(folder.glob('runs-*')))}.json"
    file.write_text(json.dumps([(SHORT | given | dict(profile=profile), at) for given, at in runs]))
    own = {"PYTHONPATH": str(ROOT), "MEDLLM_CACHE": str(folder/"cache")}      # empty for the first process, full for the others
    done = process(sys.executable, "-c", CHILD, file, cwd=folder, **own | launch_environment(profile) | env)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Each run whole; stopped at step 3 of 6, inside a rollout and between two logs; gone on with in another process, which
    does some of them again."""
    d = tmp_path_factory.mktemp("exact")
    runs = lambda kind, at=0, names=RUNS, **more: [
        (RUNS[name] | dict(output_dir=str(d/kind/name)) | more, at) for name in names]
    train(d, runs("whole") + runs("part", 3))
    said = {name: (d/"part"/name/"said").read_text() for name in RUNS}
    assert all("checkpoint-3 holds it" in words for words in said.values()), said
    for name in RUNS: (d/"part"/name/"said").unlink()
    train(d, runs("part", resume_from_checkpoint="true") + runs("again", names=SEEDED) + runs("seed", names=SEEDED, seed=4))
    return d


def weights(folder):
    "SHA-256 of what was trained."
    if (Path(folder)/"said").exists(): pytest.fail((Path(folder)/"said").read_text())
    files = sorted(Path(folder).glob("*.safetensors"))
    assert files, folder
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def timeless(value):
    "Without what a clock says."
    if not isinstance(value, dict): return value
    return {k: timeless(v) for k, v in value.items() if not any(word in k for word in CLOCK)}


def metrics(folder): return timeless(json.loads((folder/"metrics.json").read_text()))


def history(folder):
    "Logged steps; the last line is Trainer's summary of one attempt."
    lines = [json.loads(line) for line in (folder/"history.jsonl").read_text().splitlines()]
    return [timeless(line) for line in lines if "train_runtime" not in line]


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_the_uninterrupted_one(trained, name):
    "Weights, curve, metrics and rollouts, to the last bit."
    whole, part = trained/"whole"/name, trained/"part"/name
    assert weights(whole) == weights(part)
    assert history(whole) == history(part)
    assert metrics(whole) == metrics(part)
    if "reward_funcs" in RUNS[name]: assert (whole/"rollouts.jsonl").read_text() == (part/"rollouts.jsonl").read_text()


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in SEEDED else pytest.mark.slow) for name in STAGES])
def test_two_exact_runs_end_in_the_same_weights(trained, name):
    whole, again = trained/"whole"/name, trained/"again"/name
    if name not in SEEDED: train(trained, [(RUNS[name] | dict(output_dir=str(again)), 0)])
    assert weights(whole) == weights(again) and history(whole) == history(again) and metrics(whole) == metrics(again)
    held = metrics(again)["determinism"]
    assert (held["profile"], held["strict"], held["hash_seed_fixed"]) == ("exact", True, True)


@pytest.mark.parametrize("name", SEEDED)
def test_another_seed_ends_in_other_weights(trained, name):
    assert weights(trained/"whole"/name) != weights(trained/"seed"/name)
