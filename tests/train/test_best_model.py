"""The best checkpoint at the end: by the metric asked for, in its direction; a metric nobody has is known before."""
import contextlib
import io
import json

import pytest

from medllm.core import UserError
from medllm.train.arguments import parse
from medllm.train.inputs import prepare_data
from medllm.json_file import read_log
from medllm.train.loop import run, train

ASKED = ("Gout?", "Scurvy?", "Fever?", "Cough?", "Cold?", "Burn?")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    "Rows of questions and of pairs, to train and to validate on, in a registry."
    folder = tmp_path_factory.mktemp("rows")
    def write(name, answers): (folder/f"{name}.json").write_text(
        json.dumps([{"instruction": q, "output": a} for q, a in zip(ASKED, answers)]))
    write("talk", [f"Rest {n} days." for n in range(6)])
    write("a", ["Walk.", "Eat.", "Drink."])
    write("b", [f"Call {'many '*n}doctors." for n in range(6)])
    for name in ("pairs", "held"): write(name, [[f"Rest {n}.", f"Go far {n}."] for n in range(6)])
    (folder/"dataset_info.json").write_text(json.dumps({name: {"file_name": f"{name}.json"} | (
        {"ranking": True} if name in ("pairs", "held") else {}) for name in ("talk", "a", "b", "pairs", "held")}))
    return folder


def flags(rows, folder, **more):
    return dict(model_name_or_path="tiny", dataset="talk", dataset_dir=str(rows), eval_dataset="a,b", eval_strategy="steps",
        eval_steps=1, save_strategy="steps", save_steps=1, save_total_limit=1, load_best_model_at_end=True, max_steps=4,
        logging_steps=1, per_device_train_batch_size=4, learning_rate=5e-2, cutoff_len=64, template="chatml",
        output_dir=str(folder), disable_tqdm=True, use_cpu=True) | more


def whole(given):
    "What a run said."
    with contextlib.redirect_stderr(io.StringIO()) as said: run(given)
    return said.getvalue()


@pytest.mark.parametrize("metric, more, best", [
    (None, {}, min), ("perplexity", {}, min), ("b_perplexity", {}, min), ("eval_a_loss", dict(finetuning_type="lora"), min),
    ("loss", dict(greater_is_better=True), max),
    ("margin", dict(stage="dpo", dataset="pairs", eval_dataset="held", learning_rate=3e-3), max),
    ("rejected_score", dict(stage="rm", dataset="pairs", eval_dataset="held", learning_rate=3e-3), min)],
    ids=lambda v: v if isinstance(v, str) else None)
def test_the_best_by_what_was_asked(rows, tmp_path, metric, more, best):
    said = whole(flags(rows, tmp_path/"o", metric_for_best_model=metric, **more))
    name = f"eval_{(metric or 'loss').removeprefix('eval_')}"
    seen = {}
    for line in read_log(tmp_path/"o/history.jsonl"):
        if name in line and line["step"]: seen.setdefault(line["step"], line[name])      # the last line is of the best
    step = best(seen, key=seen.get)
    assert len(seen) == 4 and f"the model is that of checkpoint-{step}, the best by {name}" in said, (seen, said)
    for file in (tmp_path/"o").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path/f"o/checkpoint-{step}"/file.name).read_bytes()
    assert read_log(tmp_path/"o/history.jsonl")[-1][name] == pytest.approx(seen[step], rel=1e-4)


@pytest.mark.parametrize("more, says", [
    (dict(metric_for_best_model="accuracy"), "accuracy: unknown; known are loss, perplexity, a_loss, a_perplexity, b_loss"),
    (dict(metric_for_best_model="a_los"), "did you mean 'a_loss'"),
    (dict(metric_for_best_model="a_loss", eval_dataset="a"), "known are loss, perplexity$"),
    (dict(metric_for_best_model="pair_accuracy", stage="rm", dataset="pairs", eval_dataset="held"), "did you mean 'accuracy'"),
    (dict(load_best_model_at_end=False, save_strategy="best", metric_for_best_model="acuracy"), "unknown"),
    (dict(load_best_model_at_end=False, lr_scheduler_type="reduce_lr_on_plateau", metric_for_best_model="x"), "unknown"),
    (dict(eval_steps=2, save_steps=3), "round multiple"), (dict(eval_strategy="no"), "strategy to match")])
def test_what_cannot_be_chosen_by_is_known_before_training(rows, tmp_path, more, says):
    with pytest.raises(UserError, match=says): run(flags(rows, tmp_path/"o", **more))
    assert not (tmp_path/"o").exists()


def test_without_the_command_too(rows, tmp_path):
    "From Python, where nothing was looked at before."
    with contextlib.redirect_stderr(io.StringIO()):
        args = parse(flags(rows, tmp_path/"o", metric_for_best_model="accuracy"))
        data = prepare_data(args)
    with pytest.raises(UserError, match="accuracy: unknown"): train(args, data)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("strategy", ["best", "reduce_lr_on_plateau"])
def test_choices_without_a_metric_go_by_the_loss(rows, tmp_path, strategy):
    more = dict(save_strategy="best") if strategy == "best" else dict(lr_scheduler_type=strategy, load_best_model_at_end=False)
    args = parse(flags(rows, tmp_path/"o", **more))
    assert (args.training.metric_for_best_model, args.training.greater_is_better) == ("loss", False)
    whole(flags(rows, tmp_path/"o", **more))
    assert (tmp_path/"o/model.safetensors").exists()
