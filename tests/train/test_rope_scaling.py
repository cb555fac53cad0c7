"""Rows longer than the model's positions: the stretch goes with the adapter, through loading, merging and exporting."""
import json

import pytest
import torch
from commands import run

from medllm.models.adapters import load_adapter, merged
from medllm.models.chat import ModelChoice, load_chat_model
from medllm.models.loading import LoadPlan, load_model


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A LoRA run on a model of 1,024 positions, for rows of up to 2,000."
    folder = tmp_path_factory.mktemp("stretched")
    done = run("medllm", "train", "--stage", "sft", "--model_name_or_path", "tiny", "--dataset", "mm", "--finetuning_type",
        "lora", "--max_samples", "16", "--max_steps", "2", "--learning_rate", "1e-2", "--cutoff_len", "2000",
        "--rope_scaling", "linear", "--output_dir", folder/"run")
    assert done.returncode == 0, done.stderr
    return folder/"run"


def test_whatever_loads_the_adapter_stretches_the_model(trained):
    assert json.loads((trained/"rope_scaling.json").read_text())["rope_parameters"]["factor"] == 2.0
    assert json.loads((trained/"adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"     # no machine's cache
    chat = load_chat_model(ModelChoice(str(trained)))
    assert chat.longest == 2048
    ids = torch.arange(1500)[None] % 4000 + 5
    with torch.no_grad():
        due = load_adapter(load_model("tiny", LoadPlan(rope_scaling="linear", longest=2000)), str(trained))(ids).logits
        assert torch.equal(chat.model(ids).logits, due)
        whole = merged(load_model("tiny"), [str(trained)])
        assert (whole(ids).logits - due).abs().max() < 1e-4
    plain = load_model("tiny")
    with torch.no_grad(): assert (plain(ids).logits - due).abs().max() > 1e-2


def test_what_is_exported_says_so_itself(trained, tmp_path):
    done = run("medllm", "export", "--model_name_or_path", trained, "--output", tmp_path/"out", "--answers", "3", "--gguf", "f16")
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path/"out/config.json").read_text())
    assert (config["rope_parameters"]["rope_type"], config["max_position_embeddings"]) == ("linear", 2048)


def test_what_cannot_be_stretched_is_said_before_training(tmp_path):
    done = run("medllm", "train", "--stage", "sft", "--model_name_or_path", "tiny", "--dataset", "mm", "--rope_scaling", "ntk",
        "--output_dir", tmp_path/"out")
    assert done.returncode == 2 and "--rope_scaling ntk: must be one of" in done.stderr, done.stderr
