"""The command line: fast help, one sentence for each mistake."""
import json
import time

import pytest
from commands import process, run

from medllm.cli.main import main


def test_help_is_instant():
    "Best of five, so that a busy machine does not decide."
    def seconds():
        start = time.perf_counter()
        assert process("medllm", "--help").returncode == 0
        return time.perf_counter() - start
    assert min(seconds() for _ in range(5)) < 0.5


@pytest.fixture
def files(tmp_path):
    "Files with one mistake each."
    (tmp_path/"broken.json").write_text(
        '[\n{"instruction": "a", "output": "b"},\n{"instruction": "a" "output": "b"}\n]')
    (tmp_path/"column.json").write_text(json.dumps([{"instruction": "a", "answer": "b"}]))
    (tmp_path/"held").mkdir()
    (tmp_path/"held/adapter_config.json").write_text("{}")
    return tmp_path


MISTAKES = {
    "unknown dataset": (["dataset=mn"], "unknown dataset 'mn' (did you mean 'mm'?)"),
    "missing file": (["dataset={d}/none.json"], "none.json does not exist"),
    "broken JSON": (["dataset={d}/broken.json"], "broken.json, line 3, byte 59: not valid JSON"),
    "missing column": (["dataset={d}/column.json"], "column.json, line 1: no column 'output'"),
    "unknown template": (["dataset=mm", "template=lama2"], "unknown template 'lama2' (did you mean 'llama2'?)"),
    "template that does not fit": (["dataset=mm", "template=llama3"], "needs <|start_header_id|>"),
    "unknown flag": (
        ["dataset=mm", "--learning_rte", "1"], "unknown flag --learning_rte (did you mean 'learning_rate'?)"),
    "wrong type": (["dataset=mm", "max_steps=ten"], "--max_steps: invalid int value: 'ten'"),
    "output folder in use": (["dataset=mm", "output_dir={d}/held"], "already holds a model"),
    "no model": (["dataset=mm", "model_name_or_path=./gone"], "model folder ./gone does not exist"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_one_sentence(what, files, capfd):
    words, says = MISTAKES[what]
    given = [w.format(d=files) for w in words]
    if not any("output_dir" in w for w in given): given.append(f"output_dir={files}/out")
    assert main(["train", *given]) == 2
    said = capfd.readouterr()
    assert (says in said.err and said.out == "" and said.err.startswith("error: ")
        and said.err.count("\n") == 1), said.err
    assert not (files/"out").exists()


def test_an_adapter_for_another_model(files, capfd):
    "Made on one tiny model, offered to one with other shapes."
    from transformers import LlamaConfig, LlamaForCausalLM
    from medllm.models.adapters import AdaptPlan, adapt
    from medllm.models.loading import load_model
    from medllm.models.tiny import tiny_tokenizer
    adapt(load_model("tiny"), AdaptPlan()).save_pretrained(files/"adapter")
    tiny_tokenizer().save_pretrained(files/"other")
    LlamaForCausalLM(LlamaConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2)).save_pretrained(files/"other")
    capfd.readouterr()
    assert main([
        "train", "dataset=mm", f"model_name_or_path={files}/other", "finetuning_type=lora",
        f"adapter_name_or_path={files}/adapter", "max_samples=8", f"output_dir={files}/out"]) == 2
    assert "is for another model" in [
        line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")][0]


def test_a_parameter_of_a_run(files):
    for words, says in ((["-p", "max_step", "5"], "unknown parameter 'max_step' (did you mean 'max_steps'?)"),
                        (["-p", "max_steps", "five"], "parameter max_steps wants int, not 'five'"),
                        (["-p", "dataset", "mn"], "unknown dataset 'mn'")):
        done = run("medllm", "run", "sft", *words, "--runs", files/"runs")
        assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (files/"runs").exists()


def test_no_traceback_reaches_the_user(files):
    "As a process, the way a user sees it."
    done = process("medllm", "train", f"dataset={files}/broken.json", f"output_dir={files}/out")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, done.stderr
