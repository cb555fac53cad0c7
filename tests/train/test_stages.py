"""Every stage: with every way of training, in one process and in two, by the names of its flags elsewhere."""
import json

import pytest
from commands import ROOT
from stages import KINDS, RESULTS, SHORT, STAGES, STARTS, cell, first_adapter, quiet, table

from medllm.core import UserError
from medllm.train.arguments import parse
from medllm.train.loop import run


@pytest.fixture(scope="module")
def adapter(tmp_path_factory): return first_adapter(tmp_path_factory.mktemp("adapter")/"sft")


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.smoke if kind == "lora" else ()) for kind in KINDS])
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_runs_is_saved_and_comes_back_equal(stage, kind, start, adapter, tmp_path):
    assert cell(stage, kind, start, adapter, tmp_path/"out") < 1e-4
    assert start in json.loads(RESULTS.read_text())[stage][kind]


def test_the_readmes_have_the_table():
    want = table(json.loads(RESULTS.read_text()))
    for name in ("README.md", "README_zh.md"): assert want in (ROOT/name).read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_8_bit(stage, tmp_path):
    with quiet(): metrics = run(SHORT | STAGES[stage] | dict(stage=stage, finetuning_type="lora", quantization_bit=8,
        output_dir=str(tmp_path)))
    assert metrics["steps"] == 2 and (tmp_path/"adapter_model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes(stage, tmp_path):
    from medllm.experiment.launch import launch
    metrics = launch(SHORT | STAGES[stage] | dict(stage=stage, finetuning_type="lora", output_dir=str(tmp_path)), tmp_path, 2)
    assert metrics["steps"] == 2 and (tmp_path/"adapter_model.safetensors").exists()


@pytest.mark.slow
def test_what_stops_several_processes_is_said(tmp_path):
    from medllm.experiment.launch import launch
    with pytest.raises(UserError, match="unknown dataset 'mn'"):
        launch(SHORT | dict(dataset="mn", stage="sft", output_dir=str(tmp_path)), tmp_path, 2)


@pytest.mark.parametrize("given, stage, want", [
    (dict(stage="rw", dataset="mm_rm"), "rm", {}),
    (dict(stage="dpo", dataset="mm_rm", dpo_beta=0.3, dpo_loss="ipo", dpo_ftx=0.5), "dpo",
        dict(pref_beta=0.3, pref_loss="ipo", pref_ftx=0.5)),
    (dict(stage="orpo", dataset="mm_rm", orpo_beta=0.2), "dpo", dict(pref_loss="orpo", pref_beta=0.2)),
    (dict(stage="dpo", dataset="mm_rm", pref_beta=0.2, pref_loss="hinge", ref_model="tiny"), "dpo", dict(ref_model="tiny")),
    (dict(stage="kto", dataset="mm_rm", kto_chosen_weight=1.5), "kto", {}),
    (dict(stage="ppo", dataset="mm", reward_model="runs/rm", ppo_score_norm=True, ppo_target=3.0, top_p=0.9, do_sample=True,
        max_length=64), "ppo", dict(max_new_tokens=64))])
def test_flags_of_both_eras(given, stage, want):
    with quiet(): args = parse(given)
    resolved = args.resolved()
    assert args.finetuning.stage == stage
    assert {name: resolved[name] for name in want} == want
