"""GRPO and its relatives: closed forms, TRL's trainers, invariances, learning, traps."""
import json
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from medllm.json_file import read_log
from medllm.core import UserError
from medllm.data.rows import TokenRows
from medllm.data.tokens import Renderer
from medllm.models.adapters import AdaptPlan, adapt
from medllm.models.fused_ops import fewer_passes
from medllm.models.loading import LoadPlan, load_model
from medllm.models.sampling import Sampling
from medllm.rl import grpo; from medllm.train import loop
from medllm.rl.rollout import Reward, Rollout
from medllm.train.arguments import parse
from medllm.rl.grpo import GRPO_LOSSES, GrpoLoss, GrpoObjective, group_advantages
from medllm.train.inputs import prepare_data
from medllm.rl.monitor import Halted, kl_estimate
from medllm.train.objectives import SelectedHead
from medllm.rl.rollout import RolloutPlan
from medllm.rl.sampling_trainer import RolloutTrainer
from medllm.train.examples import Prompts

LONGEST, EACH = 9, 4


class Frozen:
    "A reference that is a model of its own."
    def __init__(self, model): self.other, self.head = model.eval(), SelectedHead(model)
    def answering(self, model): return nullcontext(self.other)


def whole_model(dtype=torch.float32):
    "The tiny model, all of it trained."
    return adapt(load_model("tiny", LoadPlan(frozen=False)), AdaptPlan("full")).to(dtype)


def make_trainer(tiny, folder, loss, model=None, reference=None, rewards=(), how=None, passes=1, **flags):
    "A GRPO trainer over sixteen prompts of several lengths."
    args = TrainingArguments(**dict(
        output_dir=str(folder), per_device_train_batch_size=8, report_to="none", disable_tqdm=True, save_strategy="no",
        use_cpu=True, remove_unused_columns=False, logging_steps=1, lr_scheduler_type="constant",
        weight_decay=0.0) | flags)
    rng = np.random.default_rng(5)
    prompts = [rng.integers(300, 4000, n).astype(np.int32) for n in rng.integers(3, 12, 16)]
    plan = RolloutPlan(Renderer(tiny, "chatml"), how or Sampling(LONGEST), reference)
    return RolloutTrainer(
        model or whole_model(), args, GrpoObjective(loss, list(rewards), EACH, passes),
        Prompts(TokenRows([(ids, np.zeros(len(ids), bool)) for ids in prompts])), plan)


def some_rollout(groups=2):
    "Answers of several lengths, each group with the prompt of its own."
    rng = np.random.default_rng(0)
    prompts = [prompt for g in range(groups) for prompt in [rng.integers(300, 4000, 3 + 4*g)]*EACH]
    lengths = torch.from_numpy(rng.integers(1, LONGEST + 1, groups*EACH))
    answers = torch.from_numpy(rng.integers(300, 4000, (groups*EACH, LONGEST)))
    n = len(prompts)
    nothing = [""]*n
    drawn = Rollout(
        prompts, answers, lengths, torch.zeros(n, dtype=torch.bool), EACH, nothing, np.arange(n), nothing, nothing)
    drawn.answers[~drawn.mask] = 0
    return drawn


def steps_of(model, size):
    "A step for every weight, the same in every process."
    rng = np.random.default_rng(7)
    return {name: (size*rng.standard_normal(p.shape)).astype(np.float32) for name, p in model.named_parameters()}


CASES = [dict(kl_coef=0.1, epsilon=0.2, epsilon_high=0.2, temperature=1.0) | case for case in (
    dict(kind="grpo"), dict(kind="grpo", epsilon_high=0.4, unbiased=False, temperature=0.7), dict(kind="dr_grpo"),
    dict(kind="dr_grpo", kl_coef=0.0), dict(kind="rloo"), dict(kind="rloo", kl_coef=0.0, epsilon=0.1, temperature=1.3))]
REWARDS = torch.tensor([1., 0, .5, 0, .2, .2, .2, .9])
STEPS = 1e-3                                                            # from the reference to the policy
SHIFT = 0.3*torch.randn(8, LONGEST, generator=torch.Generator().manual_seed(3))   # from the policy to the one that drew


@pytest.fixture(scope="module")
def theirs(trl):
    "What TRL's trainers make of one batch, case by case."
    drawn, width = some_rollout(), max(len(p) for p in some_rollout().prompts)
    return trl("trl_grpo.py", {
        "cases": json.dumps(CASES), "each": EACH, "longest": LONGEST, "rewards": REWARDS.numpy(),
        "old_shift": SHIFT.numpy(), "prompts": np.stack([np.pad(p, (0, width - len(p))) for p in drawn.prompts]),
        "prompt_lengths": np.array([len(p) for p in drawn.prompts]),
        "answers": drawn.answers.numpy(), "lengths": drawn.lengths.numpy(),
        **{f"step/{name}": s for name, s in steps_of(load_model("tiny"), STEPS).items()}})


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: "-".join(map(str, CASES[n].values())))
def test_trl(theirs, tiny, tmp_path, number):
    "Advantages, log-probabilities, entropies, loss and gradients of TRL's trainers, partly off the policy and clipped."
    case, drawn = dict(CASES[number]), some_rollout()
    want = {name.split("/", 1)[1]: value for name, value in theirs.items() if name.startswith(f"{number}/")}
    kind, heat = case["kind"], case.pop("temperature")
    model = whole_model()
    trainer = make_trainer(
        tiny, tmp_path, GrpoLoss(longest=LONGEST, **case), model, Frozen(whole_model()), how=Sampling(LONGEST, heat))
    with torch.no_grad():
        for name, step in steps_of(model, STEPS).items(): model.get_parameter(name).add_(torch.from_numpy(step))
    drawn.logps, drawn.entropy = trainer.token_logps(drawn, lambda b: trainer.logps(model, b, heat, entropy=True))
    drawn.reference, = trainer.token_logps(drawn, lambda b: (trainer.reference_logps(b, heat),))
    for name in {"logps", "entropy", "reference"} & want.keys():
        np.testing.assert_allclose(getattr(drawn, name)[:, :want[name].shape[1]], want[name], atol=1e-5, err_msg=name)
    rewards = REWARDS - (kind == "rloo")*case["kl_coef"]*drawn.sums(kl_estimate(drawn.logps, drawn.reference, "k1"))
    advantages = group_advantages(rewards, EACH, kind)
    np.testing.assert_allclose(advantages, want["advantages"], atol=1e-5)
    batch, = trainer.micro_batches(
        drawn, old=(drawn.logps + SHIFT)*drawn.mask, reference=drawn.reference, advantages=advantages)
    loss, sums = trainer.objective(trainer, model, batch)
    assert sums["clipped"] > 0
    np.testing.assert_allclose(loss.item()/8, want["loss"], atol=1e-5)
    (loss/8).backward()
    for name, p in model.named_parameters():
        np.testing.assert_allclose(p.grad, want[f"grad/{name}"], atol=1e-5, err_msg=name)


def plain_loss(loss, model, drawn, old, reference, advantages, temperature):
    "The mean loss written out: full logits, one answer after the other, one token after the other."
    total, low = 0, 1 - loss.epsilon
    high = 1 + (loss.epsilon if loss.epsilon_high is None else loss.epsilon_high)
    clip = lambda ratio: torch.clamp(ratio, low, high)
    for i in range(len(drawn)):
        n, prompt = int(drawn.lengths[i]), torch.from_numpy(drawn.prompts[i])
        ids = torch.cat([prompt, drawn.answers[i, :n]])
        z = model(ids[None]).logits[0, len(prompt) - 1:-1]/temperature
        logps = (z - z.logsumexp(-1, keepdim=True))[torch.arange(n), drawn.answers[i, :n]]
        gain = advantages[i]
        if loss.kind == "rloo":
            ratio = (logps.sum() - old[i, :n].sum()).exp()
            total = total - torch.min(ratio*gain, clip(ratio)*gain)
            continue
        tokens = 0
        for t in range(n):
            ratio, rho = (logps[t] - old[i, t]).exp(), (reference[i, t] - logps[t]).exp()
            k3 = rho - 1 - rho.log()
            tokens = tokens - torch.min(ratio*gain, clip(ratio)*gain) + loss.kl_coef*k3*(ratio if loss.unbiased else 1)
        total = total + tokens/(n if loss.kind == "grpo" else loss.longest)
    return total/len(drawn)


@pytest.mark.parametrize("settings", [
    dict(kind="grpo"), dict(kind="grpo", unbiased=False, epsilon_high=0.4), dict(kind="dr_grpo"),
    dict(kind="rloo")], ids=str)
def test_closed_form(tiny, tmp_path, settings):
    "Loss and gradients in float64 equal the formula written out on full logits, within 1e-10."
    loss, drawn, heat = GrpoLoss(kl_coef=0.1, longest=LONGEST, **settings), some_rollout(), 0.8
    model = whole_model(torch.float64)
    trainer = make_trainer(tiny, tmp_path, loss, model, Frozen(whole_model(torch.float64)), how=Sampling(LONGEST, heat))
    with torch.no_grad():
        for name, step in steps_of(model, STEPS).items(): model.get_parameter(name).add_(torch.from_numpy(step))
    logps, = trainer.token_logps(drawn, lambda b: (trainer.logps(model, b, heat),))
    reference, = trainer.token_logps(drawn, lambda b: (trainer.reference_logps(b, heat),))
    old, gains = (logps + SHIFT)*drawn.mask, group_advantages(REWARDS.double(), EACH, loss.kind)
    batch, = trainer.micro_batches(drawn, old=old, reference=reference, advantages=gains)
    assert "cu_seqlens" in batch                                  # each prompt is computed once
    with fewer_passes(model):                                  # norms in float64 too; the model's own are float32
        ours = trainer.objective(trainer, model, batch)[0]/len(drawn)
        want = plain_loss(loss, model, drawn, old, reference, gains, heat)
    assert abs(ours.item() - want.item()) < 1e-10
    names = [name for name, _ in model.named_parameters()]
    for name, a, b in zip(names, *(torch.autograd.grad(x, list(model.parameters())) for x in (ours, want))):
        assert (a - b).abs().max() < 1e-10, name


def test_advantages_in_closed_form():
    rewards = torch.randn(5*EACH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for kind in GRPO_LOSSES:
        ours = group_advantages(rewards, EACH, kind)
        for i, r in enumerate(rewards):
            group = rewards[i//EACH*EACH:][:EACH]
            mean, others = sum(group)/EACH, (sum(group) - r)/(EACH - 1)
            deviation = (sum((x - mean)**2 for x in group)/(EACH - 1))**0.5
            want = {"grpo": (r - mean)/(deviation + 1e-4), "dr_grpo": r - mean, "rloo": r - others}[kind]
            assert abs(ours[i] - want) < 1e-10, kind


longer = Reward.of_text("longer", lambda answers, golds, prompts: [len(a)/50 for a in answers])


@pytest.mark.parametrize("passes", [1, 2])
def test_micro_batches_and_accumulation_do_not_matter(tiny, tmp_path, passes):
    "Two rollouts of sixteen answers, in micro-batches of 16, 8, 4 and 2: the same weights."
    after, losses = [], []
    for batch in (16, 8, 4, 2):
        trainer = make_trainer(
            tiny, tmp_path/str(batch), GrpoLoss(longest=LONGEST, kl_coef=0.1), reference=Frozen(whole_model()),
            rewards=[longer], passes=passes, per_device_train_batch_size=batch, gradient_accumulation_steps=16//batch,
            max_steps=2*passes, learning_rate=1e-3)
        trainer.train()
        losses.append([h["loss"] for h in map(json.loads, open(trainer.history)) if "loss" in h])
        after.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
        assert trainer.state.global_step == 2*passes and trainer.totals["rollouts"] == 2
    start = torch.cat([p.detach().flatten() for p in whole_model().parameters()])
    assert (after[0] - start).abs().max() > 1e-3
    for weights, curve in zip(after[1:], losses[1:]):
        assert np.allclose(curve, losses[0], atol=1e-5)
        assert (weights - after[0]).abs().mean() < 1e-6      # Adam makes a whole step of a sign that rounding decides


def test_padding_does_not_matter(tiny, tmp_path):
    "Log-probabilities of a rollout equal a fresh forward pass with the padding on the left, whatever the pads are."
    trainer = make_trainer(tiny, tmp_path, GrpoLoss())
    drawn = trainer.sample([trainer.train_dataset[i] for i in (3, 0, 7)])
    ids = [np.concatenate([p, a[:n]]) for p, a, n in zip(drawn.prompts, drawn.answers.numpy(), drawn.lengths)]
    for pad in (0, 4000):
        width = max(map(len, ids))
        left = torch.tensor(np.stack([np.pad(row, (width - len(row), 0), constant_values=pad) for row in ids]))
        mask = torch.tensor(np.stack([np.pad(np.ones(len(row), int), (width - len(row), 0)) for row in ids]))
        with torch.no_grad():
            z = trainer.model.eval()(left, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        fresh = z[:, :-1].log_softmax(-1).gather(2, left[:, 1:, None])[..., 0]
        for i, n in enumerate(drawn.lengths.tolist()):
            assert (fresh[i, -n:] - drawn.logps[i, :n]).abs().max() < 1e-4


# ---- learning ----

QUESTIONS = [
    ("Malaria? A louse B tick C mosquito D fly", "C"),
    ("Plague? A flea B louse C bug D fly", "A"),
    ("Scurvy lacks? A iron B zinc C iodine D vitamin C", "D"),
    ("Insulin comes from? A liver B pancreas C spleen D thyroid", "B"),
    ("Bile comes from? A liver B pancreas C spleen D lung", "A"),
    ("Warfarin antidote? A iron B naloxone C vitamin K D zinc", "C"),
    ("Goitre lacks? A iron B iodine C zinc D salt", "B"),
    ("Opioid antidote? A iron B zinc C salt D naloxone", "D")]
START = dict(
    model_name_or_path="tiny", finetuning_type="full", template="chatml", disable_tqdm=True, save_strategy="no",
    use_cpu=True, overwrite_output_dir=True)


@pytest.fixture(scope="module")
def guesser(tmp_path_factory):
    "A model that answers every question with some letter."
    folder, rng = tmp_path_factory.mktemp("guesser"), np.random.default_rng(0)
    rows = [{"instruction": q, "output": "ABCD"[rng.integers(4)]} for q, _ in QUESTIONS for _ in range(100)]
    (folder/"any.json").write_text(json.dumps(rows))
    (folder/"right.json").write_text(json.dumps([{"instruction": q, "output": a} for q, a in QUESTIONS]))
    args = parse(START | dict(
        dataset=str(folder/"any.json"), output_dir=str(folder/"sft"), max_steps=100, learning_rate=2e-3,
        per_device_train_batch_size=16, logging_steps=50))
    loop.train(args, prepare_data(args))
    return folder


def learn(guesser, folder, **more):
    "Metrics of a GRPO run, and mean reward and KL of its last ten rollouts."
    args = parse(START | dict(
        stage="grpo", model_name_or_path=str(guesser/"sft"), dataset=str(guesser/"right.json"), reward_funcs="letter",
        output_dir=str(folder), max_new_tokens=4, per_device_train_batch_size=64, num_generations=8, learning_rate=5e-4,
        lr_scheduler_type="constant", warmup_steps=10, max_steps=110, logging_steps=1, kl_limit=8.0) | more)
    metrics = loop.train(args, prepare_data(args))
    history = [h for h in read_log(folder/"history.jsonl") if "reward" in h]
    mean = lambda name: float(np.mean([h[name] for h in history[-10:]]))
    return metrics, mean("reward"), mean("kl")


def test_learns_the_right_letters(guesser, tmp_path):
    "The mean reward rises by half of its range and more; the KL stays under its bound."
    metrics, reward, kl = learn(guesser, tmp_path)
    first = metrics["first_rollout"]["reward"]
    print(f"reward {first:.3f} -> {reward:.3f}, KL {kl:.3f} nat/answer, {metrics['train_runtime']:.0f} s")
    assert first < 0.45 and reward - first >= 0.5
    assert 0 < kl < 4 and metrics["rewards"]["weights"] == {"letter": 1.0}
    lines = [json.loads(line) for line in open(tmp_path/"rollouts.jsonl")]
    assert len(lines) == 110 and set(lines[0]) == {"step", "prompts", "rewards", "lengths", "ended"}


@pytest.mark.slow
def test_does_not_learn_from_chance(guesser, tmp_path, monkeypatch):
    "The same run with rewards that have nothing to do with the answers does not pass."
    rng = np.random.default_rng(0)
    rule = Reward("letter", lambda drawn: rng.random(len(drawn)) < 0.25)
    right = lambda answers, golds, prompts: [float(a.strip() == g) for a, g in zip(answers, golds)]
    real = grpo.reward_parts
    def shuffled(*given):
        parts = real(*given)
        parts.rewards = [rule, Reward.of_text("right", right, 0.0)]
        return parts
    monkeypatch.setattr(grpo, "reward_parts", shuffled)
    learn(guesser, tmp_path, max_steps=60)
    history = [h for h in read_log(tmp_path/"history.jsonl") if "reward" in h]
    assert np.mean([h["reward_right"] for h in history[-10:]]) < 0.5


@pytest.mark.parametrize("kind", ["dr_grpo", "rloo"])
@pytest.mark.slow
def test_the_others_learn_too(guesser, tmp_path, kind):
    metrics, reward, kl = learn(guesser, tmp_path, grpo_loss=kind, max_steps=160)
    assert reward - metrics["first_rollout"]["reward"] >= 0.5 and 0 < kl < 4


# ---- traps ----

def test_equal_rewards(tiny, tmp_path, capsys):
    "A batch whose rewards are all the same: no NaN, no step, an alarm, a count; many of them in a row end the run."
    same = Reward.of_text("same", lambda answers, golds, prompts: [0.3]*len(answers))
    trainer = make_trainer(tiny, tmp_path, GrpoLoss(kl_coef=0.0), rewards=[same], max_steps=3, learning_rate=1e-2)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert all((a == b).all() for a, b in zip(before, trainer.model.parameters()))
    assert "no group of answers has different rewards (0.300 on average)" in capsys.readouterr().err
    history = [h for h in map(json.loads, open(trainer.history)) if "loss" in h]
    assert [h["loss"] for h in history] == [0, 0, 0] and [h["flat_batches"] for h in history] == [1, 2, 3]
    assert trainer.summary()["flat_batches"] == 3 and history[0]["flat_groups"] == 1
    trainer = make_trainer(tiny, tmp_path, GrpoLoss(), rewards=[same], max_steps=40)
    with pytest.raises(Halted, match="in 20 batches no group of answers had different rewards"): trainer.train()


def test_all_learnt_ends_the_run(tiny, tmp_path, capsys):
    "When every answer has the best reward for long, after there were others, the run ends and has not failed."
    calls = []
    def reward(answers, golds, prompts):
        calls.append(len(answers))
        return [1.0 if len(calls) > 2 else i % 2 for i in range(len(answers))]
    trainer = make_trainer(tiny, tmp_path, GrpoLoss(), rewards=[Reward.of_text("late", reward)], max_steps=40)
    trainer.monitor.patience = 3
    trainer.train()
    assert trainer.state.global_step == 5 and "training ends here" in capsys.readouterr().err


def test_a_negative_kl_halts(tiny, tmp_path):
    "Answers that were not drawn from the policy: here their tail is cut off, and the reference is surer of the rest."
    sure = whole_model()
    with torch.no_grad(): sure.lm_head.weight.mul_(8)
    cut = make_trainer(
        tiny, tmp_path, GrpoLoss(), reference=Frozen(sure), rewards=[longer], how=Sampling(LONGEST, top_k=1),
        max_steps=40)
    with pytest.raises(Halted, match="below zero by more than chance"): cut.train()
    assert cut.state.global_step == 0 and cut.ends[1]["kl"] >= 0
    far = make_trainer(tiny, tmp_path, GrpoLoss(), reference=Frozen(sure), rewards=[longer], max_steps=40)
    far.monitor.kl_limit = 0.5
    with pytest.raises(Halted, match="over --kl_limit 0.5"): far.train()


def test_the_reference_is_what_training_starts_from(tmp_path):
    "From an adapter: at the first rollout the KL is zero, although the base is another policy."
    given = dict(START, finetuning_type="lora", dataset="mm_choice", max_steps=3, learning_rate=3e-2, logging_steps=1)
    args = parse(given | dict(stage="sft", output_dir=str(tmp_path/"sft")))
    loop.train(args, prepare_data(args))
    args = parse(given | dict(
        stage="grpo", adapter_name_or_path=str(tmp_path/"sft"), output_dir=str(tmp_path/"grpo"), reward_funcs="letter",
        max_new_tokens=6, max_steps=1))
    trainer = grpo.make_trainer(args, prepare_data(args))
    drawn = trainer.sample([trainer.train_dataset[i] for i in range(4)])
    assert (drawn.logps == drawn.reference).all()
    trainer.plan.reference.adapter = None                      # the trap: adapters off
    drawn = trainer.sample([trainer.train_dataset[i] for i in range(4)])
    assert (drawn.logps - drawn.reference).abs().max() > 0.1


def test_without_a_pull_to_the_reference(tmp_path):
    "--kl_coef 0: whole weights are then not copied, and no KL is reported; with LoRA it is measured all the same."
    for kind, measured in (("full", False), ("lora", True)):
        args = parse(START | dict(
            stage="grpo", finetuning_type=kind, dataset="mm_choice", reward_funcs="letter", kl_coef=0.0, max_new_tokens=4,
            max_steps=1, logging_steps=1, output_dir=str(tmp_path/kind)))
        metrics = loop.train(args, prepare_data(args))
        assert (metrics["reference"] is not None, "kl" in metrics["last_rollout"]) == (measured, measured)


def test_texts_stay_out_of_the_record(tmp_path):
    "Answers are written where they are asked for, and never those to a private dataset."
    for private, asked, shown in ((False, True, True), (False, False, False), (True, True, False)):
        args = parse(START | dict(
            stage="grpo", dataset="mm_choice", reward_funcs="letter", max_new_tokens=4, max_steps=1,
            log_completions=asked, output_dir=str(tmp_path/f"{private}{asked}")))
        data = prepare_data(args)
        data.sources[0] = replace(data.sources[0], private=private)
        trainer = grpo.make_trainer(args, data)
        trainer.train()
        line = json.loads(open(trainer.rollouts).readline())
        assert ("answers" in line and "questions" in line) == shown


def test_what_cannot_work_is_refused(tmp_path):
    given = dict(START, stage="grpo", dataset="mm_choice", reward_funcs="letter", output_dir=str(tmp_path))
    for flags, says in (
            (dict(per_device_train_batch_size=6), "must be a multiple of the 8 answers"),
            (dict(grpo_loss="ppo"), "--grpo_loss ppo: must be one of"), (dict(epsilon=1.0), "--epsilon 1.0"),
            (dict(num_iterations=0), "--num_iterations 0"), (dict(top_p=0.0), "--top_p 0.0")):
        args = parse(given | flags)
        with pytest.raises(UserError, match=says.replace("(", r"\(")): grpo.make_trainer(args, prepare_data(args))


def test_validation_counts_a_rule_where_it_applies():
    "Of four answers two have a number to check, both right: the rule's mean is 1, as in the log of training."
    from types import SimpleNamespace

    from medllm.rl.sampling_trainer import RolloutTrainer
    trainer = SimpleNamespace(objective=SimpleNamespace(rewards=[SimpleNamespace(name="number")]))
    found = RolloutTrainer._named(trainer, "eval", torch.tensor([2., 8, 4, 2, 2, 4]))
    assert found["eval_reward_number"] == 1 and found["eval_reward"] == 0.5 and found["eval_length"] == 2
