"""PPO: closed forms, TRL on the same batch, invariances, learning, what is refused, what is saved."""
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ROOT, run

from medllm.rl.ppo import PpoLoss, gae, token_rewards, whiten

SETTINGS = dict(gamma=0.98, lam=0.9, kl_coef=0.15, clip=0.2, value_clip=0.2, value_weight=0.1)


def batch_of(dtype, whole=False, n=6, width=9):
    "A rollout of random numbers, far enough from the policy that drew it for every clip to hold somewhere."
    rng = np.random.default_rng(5)
    lengths = np.full(n, width) if whole else np.array([1, 9, 4, 6, 9, 2])
    inside = np.arange(width) < lengths[:, None]
    some = lambda scale: (rng.normal(size=(n, width))*scale*inside).astype(dtype)
    logps = -np.abs(some(2))
    return dict(
        logps=logps, reference=logps + some(.3), values=some(1), scores=rng.normal(size=n).astype(dtype), lengths=lengths,
        new_logps=logps + some(.3), new_values=some(1))


def ours(batch, whiten_rewards=False):
    "Advantages, losses and gradients of the batch by medllm.rl.ppo."
    t = {name: torch.from_numpy(array) for name, array in batch.items()}
    mask = torch.arange(t["logps"].shape[1]) < t["lengths"][:, None]
    rewards = token_rewards(t["scores"], t["logps"] - t["reference"], t["lengths"], SETTINGS["kl_coef"])
    if whiten_rewards: rewards = whiten(rewards, mask, shift_mean=False)
    advantages, returns = gae(rewards, t["values"], SETTINGS["gamma"], SETTINGS["lam"])
    advantages = whiten(advantages, mask)
    loss = PpoLoss(SETTINGS["clip"], SETTINGS["value_clip"], SETTINGS["value_weight"])
    new, values = t["new_logps"].requires_grad_(), t["new_values"].requires_grad_()
    policy, held = loss.policy(new[mask], t["logps"][mask], advantages[mask])
    value, still = loss.value(values[mask], t["values"][mask], returns[mask])
    total = (policy + SETTINGS["value_weight"]*value).mean()
    total.backward()
    assert held.any() and still.any() and not held.all() and not still.all()
    return dict(rewards=rewards, advantages=advantages, returns=returns, loss=total, policy_loss=policy.mean(),
        value_loss=value.mean(), d_logps=new.grad, d_values=values.grad)


def by_hand(batch, whiten_rewards=False):
    "The same, written out a number at a time in float64."
    s, n = SETTINGS, len(batch["lengths"])
    T = batch["lengths"].tolist()
    rewards = [[-s["kl_coef"]*(batch["logps"][i, t] - batch["reference"][i, t]) for t in range(T[i])] for i in range(n)]
    for i in range(n): rewards[i][-1] += batch["scores"][i]
    def scaled(rows, keep_mean):
        flat = [x for row in rows for x in row]
        mean = sum(flat)/len(flat)
        deviation = (sum((x - mean)**2 for x in flat)/(len(flat) - 1) + 1e-8)**.5
        return [[(x - mean)/deviation + mean*keep_mean for x in row] for row in rows]
    if whiten_rewards: rewards = scaled(rewards, True)
    V = [batch["values"][i, :T[i]].tolist() + [0.0] for i in range(n)]
    delta = [[rewards[i][t] + s["gamma"]*V[i][t + 1] - V[i][t] for t in range(T[i])] for i in range(n)]
    A = [[sum((s["gamma"]*s["lam"])**k*delta[i][t + k] for k in range(T[i] - t)) for t in range(T[i])] for i in range(n)]
    R = [[A[i][t] + V[i][t] for t in range(T[i])] for i in range(n)]
    white, M = scaled(A, False), sum(T)
    out = {name: np.zeros_like(batch["logps"]) for name in ("rewards", "advantages", "returns", "d_logps", "d_values")}
    policy = value = 0.0
    for i in range(n):
        for t in range(T[i]):
            ratio, a = np.exp(batch["new_logps"][i, t] - batch["logps"][i, t]), white[i][t]
            bounded = min(max(ratio, 1 - s["clip"]), 1 + s["clip"])
            policy += max(-ratio*a, -bounded*a)
            v, old, r = batch["new_values"][i, t], V[i][t], R[i][t]
            near = min(max(v, old - s["value_clip"]), old + s["value_clip"])
            value += max((v - r)**2, (near - r)**2)/2
            out["rewards"][i, t], out["advantages"][i, t], out["returns"][i, t] = rewards[i][t], a, r
            out["d_logps"][i, t] = -ratio*a/M if -ratio*a >= -bounded*a else 0
            out["d_values"][i, t] = s["value_weight"]*(v - r)/M if (v - r)**2 >= (near - r)**2 else 0
    return out | {"policy_loss": policy/M, "value_loss": value/M, "loss": (policy + s["value_weight"]*value)/M}


@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_closed_forms(whiten_rewards):
    "Rewards of tokens, GAE, whitening, clipped losses and their gradients in float64."
    batch = batch_of(np.float64)
    got, want = ours(batch, whiten_rewards), by_hand(batch, whiten_rewards)
    for name in want: np.testing.assert_allclose(got[name].detach().numpy(), want[name], rtol=0, atol=1e-10, err_msg=name)


def test_trl_on_the_same_batch(trl):
    "TRL 1.12's own statements, in float32: rewards, advantages, returns, losses, gradients."
    place = Path(os.environ.get("MEDLLM_TRL_PPO", ROOT/".trl/ppo"))
    if not (place/"trl").is_dir(): pytest.skip("TRL 1.12, the last with PPO, is not here: make trl")
    cases = [dict(whole=whole, whiten_rewards=scaled) for whole in (True, False) for scaled in (True, False)]
    given = [batch_of(np.float32, case["whole"]) | SETTINGS | case for case in cases]
    theirs = trl("trl_ppo.py", {f"{i}/{name}": value for i, case in enumerate(given) for name, value in case.items()})
    assert len(theirs) == 8*len(cases)
    for i, case in enumerate(cases):
        got = ours(batch_of(np.float32, case["whole"]), case["whiten_rewards"])
        for name, value in got.items():
            np.testing.assert_allclose(
                value.detach().numpy(), theirs[f"{i}/{name}"], rtol=1e-5, atol=1e-5, err_msg=f"{name} {case}")


# ---- on the tiny model ----

QUESTIONS = ("Gout?", "Scurvy?", "Fever?", "Cough?", "痛风？", "贫血？", "发热？", "咳嗽？")
COMMON = dict(use_cpu=True, disable_tqdm=True, save_strategy="no", template="chatml")


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    "A tiny model that gives one of four short answers, a quarter of them with a citation; and a file of its questions."
    from medllm.train.arguments import parse
    from medllm.train.inputs import prepare_data
    from medllm.train.loop import train
    place, answers = tmp_path_factory.mktemp("warm"), ("Rest.", "Rest [1].", "Walk.", "Walk more.")
    (place/"sft.json").write_text(json.dumps([{"instruction": q, "output": a} for q in QUESTIONS for a in answers]))
    (place/"asked.json").write_text(json.dumps([{"instruction": q, "output": "any"} for q in QUESTIONS]*4))
    args = parse(COMMON | dict(
        dataset=str(place/"sft.json"), finetuning_type="full", per_device_train_batch_size=32, max_steps=60, learning_rate=2e-3,
        output_dir=str(place/"model")))
    train(args, prepare_data(args))
    return place


def make(warm, folder, **given):
    "A PPO trainer on the warm model."
    from medllm.train.arguments import parse
    from medllm.train.inputs import prepare_data
    from medllm.rl.ppo import make_trainer
    args = parse(COMMON | dict(
        stage="ppo", model_name_or_path=str(warm/"model"), dataset=str(warm/"asked.json"), finetuning_type="lora",
        reward_funcs="citation", max_new_tokens=8, per_device_train_batch_size=16, logging_steps=1, learning_rate=1e-3,
        lr_scheduler_type="constant", max_steps=4, output_dir=str(folder)) | given)
    torch.manual_seed(0)
    return make_trainer(args, prepare_data(args))


def rollouts(trainer):
    "The logged steps at which answers were drawn."
    return [h for h in map(json.loads, open(trainer.history)) if "reward" in h]


def trained(trainer):
    "The first mean reward of a run, by how much it rose to the last four rollouts, and the highest KL on the way."
    trainer.train()
    drawn = rollouts(trainer)
    first, last = drawn[0]["reward"], np.mean([h["reward"] for h in drawn[-4:]])
    return first, last - first, max(h["kl"] for h in drawn)


def test_learns_to_cite(warm, tmp_path):
    "The mean reward, which can be 0 to 1, rises by more than half of that; the KL stays under its bound."
    first, gained, kl = trained(make(
        warm, tmp_path, finetuning_type="full", per_device_train_batch_size=48, max_steps=44, ppo_epochs=2, kl_limit=8))
    assert first < 0.3 and gained >= 0.5 and 0 < kl < 8, (gained, kl)


@pytest.mark.slow
def test_without_learning_nothing_rises(warm, tmp_path):
    "The measure above can fail: with a learning rate of 0 the reward stays where it is, and the KL at 0."
    idle = make(warm, tmp_path, finetuning_type="full", per_device_train_batch_size=32, max_steps=12, learning_rate=0.0,
        ppo_epochs=1)
    _, gained, kl = trained(idle)
    assert abs(gained) < 0.25 and kl < 1e-5


@pytest.mark.slow
def test_learns_with_every_role_on_one_base(warm, tmp_path):
    "The same with LoRA: policy and value model are adapters on one frozen base, the reference is the base."
    trainer = make(
        warm, tmp_path, per_device_train_batch_size=64, max_steps=64, learning_rate=2e-3, kl_coef=0.05, ppo_epochs=2, kl_limit=15)
    base = {name: p.clone() for name, p in trainer.model.named_parameters() if "lora_" not in name and "critic" not in name}
    _, gained, kl = trained(trainer)
    assert gained >= 0.5 and 0 < kl < 15, (gained, kl)
    for name, p in trainer.model.named_parameters():
        if name in base: assert torch.equal(p, base[name])


def test_micro_batches_and_accumulation_change_nothing(warm, tmp_path):
    histories = []
    for rows, steps in ((16, 1), (4, 4), (2, 8)):
        trainer = make(
            warm, tmp_path/str(rows), per_device_train_batch_size=rows, gradient_accumulation_steps=steps, max_steps=6,
            ppo_epochs=3)
        trainer.train()
        histories.append([json.loads(line) for line in open(trainer.history)])
    for name in ("loss", "policy_loss", "value_loss", "grad_norm"):
        whole, *parts = ([h[name] for h in history if "loss" in h] for history in histories)
        for part in parts: np.testing.assert_allclose(part, whole, rtol=0, atol=2e-4, err_msg=name)
    assert rollouts(trainer)[-1]["kl"] > 0


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_values_of_ragged_rows(warm, tmp_path, kind):
    "The value before each token is what the value model says of the row alone, cut there."
    from medllm.models.adapter_roles import active_adapter
    from medllm.models.reward_model import score_rows
    trainer = make(warm, tmp_path, finetuning_type=kind)
    for name, p in trainer.model.named_parameters():
        if "critic" in name.split(".") and p.requires_grad: p.data += 0.05*torch.randn_like(p)
    drawn = trainer.sample([trainer.train_dataset[i] for i in range(8)])
    assert len(set(drawn.lengths.tolist())) > 1
    values, = trainer.token_logps(drawn, lambda batch: (trainer.model.critic(trainer, batch),))
    trainer.model.eval()
    for i in range(8):
        answer = drawn.answers[i, :drawn.lengths[i]].numpy()
        rows = [np.concatenate([drawn.prompts[i], answer[:t]]) for t in range(len(answer))]
        if kind == "full": want = score_rows(trainer.model.critic.scorer, rows)
        else:
            alone = lambda row: trainer.model(torch.from_numpy(row)[None], output_hidden_states=True).hidden_states[-1][0, -1]
            with torch.no_grad(), active_adapter(trainer.model, "critic"): states = torch.stack([alone(row) for row in rows])
            want = states @ trainer.model.critic.head.weight[0]
        torch.testing.assert_close(values[i, :len(answer)], want.detach(), atol=1e-4, rtol=1e-4)
        assert (values[i, len(answer):] == 0).all()


# ---- roles, reward models, what is refused ----

@pytest.fixture(scope="module")
def judges(warm, tmp_path_factory):
    "Reward models on the warm model, an adapter and a whole one, with report cards that say 80%."
    from medllm.models.adapters import AdaptPlan, adapt
    from medllm.models.reward_model import load_scorer
    from medllm.models.loading import load_tokenizer
    from medllm.train.report_card import head_hash, saved_head
    place = tmp_path_factory.mktemp("judges")
    for kind in ("lora", "full"):
        torch.manual_seed(3)
        model = adapt(load_scorer(str(warm/"model")), AdaptPlan(kind))
        for p in model.parameters():
            if p.requires_grad: p.data += 0.02*torch.randn_like(p)
        model.save_pretrained(place/kind)
        load_tokenizer(str(warm/"model")).save_pretrained(place/kind)
        card(place/kind, 0.8, head_hash(saved_head(place/kind)))
    return place


def card(folder, accuracy, head):
    "A report card of the given accuracy on 200 pairs."
    from medllm.intervals import wilson
    low, high = wilson(accuracy, 200)
    facts = {"value": accuracy, "low": low, "high": high, "pairs": 200, "questions": 200, "ties": 0}
    (folder/"report_card.json").write_text(json.dumps({"accuracy": facts, "head": head, "pairs": 200}))


@pytest.mark.parametrize("kind, judge, bits", [
    ("lora", "lora", None), ("lora", "lora", 4), ("lora", "full", None), ("freeze", "lora", None), ("full", "full", None),
    ("full", "lora", None)])
def test_every_role_has_its_place(warm, judges, tmp_path, kind, judge, bits):
    "Who trains and who does not; what is saved is the policy alone, and reloads to the same outputs."
    from medllm.models.adapters import AdaptPlan, adapt
    from medllm.models.loading import LoadPlan, load_model
    trainer = make(
        warm, tmp_path, finetuning_type=kind, quantization_bit=bits, reward_model=str(judges/judge), reward_weights="1,0.1",
        max_steps=2, ppo_epochs=2, save_strategy="steps", save_steps=2,
        **({"freeze_trainable_layers": 1} if kind == "freeze" else {}))
    role = kind == judge == "lora"
    assert trainer.made["rewards"]["reward_model"]["role"] is role
    drawn = trainer.sample([trainer.train_dataset[0]])
    values, = trainer.token_logps(drawn, lambda batch: (trainer.model.critic(trainer, batch),))
    assert (values.abs().sum() > 1e-3) == (role or kind != "lora")           # the value model begins as the reward model
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert not any(np.isnan(h["loss"]) for h in map(json.loads, open(trainer.history)) if "loss" in h)
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert {"critic" in name.split(".") for name in moved} == {True, False}
    if kind == "lora":
        assert all(".default." in name or "critic" in name.split(".") for name in moved)
        assert ("reward" in trainer.model.peft_config) is role
    trainer.save_model()
    checkpoint = tmp_path/"checkpoint-2"
    held = {file.name for file in tmp_path.iterdir()} | {file.name for file in checkpoint.iterdir() if file.is_dir()}
    assert not {"critic", "reward", "reference", "critic.safetensors"} & held and (checkpoint/"critic.safetensors").exists()
    if kind == "lora":
        again = adapt(load_model(str(warm/"model"), LoadPlan(bits=bits)), AdaptPlan(adapters=(str(tmp_path),)))
    else: again = load_model(str(tmp_path))
    again.eval()
    ids = torch.arange(300, 330)[None]
    with torch.no_grad(): torch.testing.assert_close(again(ids).logits, trainer.model.eval()(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def tuned(warm, tmp_path_factory):
    "An adapter of the warm model that PPO has moved far from it."
    folder = tmp_path_factory.mktemp("tuned")
    trainer = make(warm, folder, learning_rate=5e-3)
    trainer.train()
    trainer.save_model()
    return folder


@pytest.mark.parametrize("kind, more", [
    ("lora", {}), ("lora", {"quantization_bit": 4}), ("lora", {"create_new_adapter": True}),
    ("freeze", {"freeze_trainable_layers": 1}), ("full", {})])
def test_going_on_from_an_adapter(warm, tuned, tmp_path, kind, more):
    "PPO that goes on from an adapter begins as that adapter and compares with it, not with the raw base."
    trainer = make(warm, tmp_path, finetuning_type=kind, adapter_name_or_path=str(tuned), max_steps=2, ppo_epochs=1, **more)
    drawn = trainer.sample([trainer.train_dataset[i] for i in range(8)])
    assert trainer.made["reference"]["policy"] == "start"
    torch.testing.assert_close(drawn.reference, drawn.logps, atol=1e-5, rtol=1e-5)
    raw = make(warm, tmp_path, finetuning_type=kind, **{n: value for n, value in more.items() if n != "create_new_adapter"})
    base, = raw.token_logps(drawn, lambda batch: (raw.logps(raw.model, batch),))
    assert (base - drawn.logps).abs().max() > 0.01
    trainer.train()
    torch.testing.assert_close(trainer.token_logps(drawn, lambda batch: (trainer.reference_logps(batch),))[0], drawn.reference)
    assert (trainer.token_logps(drawn, lambda batch: (trainer.logps(trainer.model, batch),))[0] - drawn.logps).abs().max() > 1e-3


@pytest.mark.parametrize("judge", ["lora", "full"])
def test_a_reward_model_at_chance_is_refused(warm, judges, tmp_path, judge):
    import shutil
    from medllm.core import UserError
    from medllm.train.report_card import head_hash, saved_head
    shutil.copytree(judges/judge, tmp_path/"rm")
    card(tmp_path/"rm", 0.5, head_hash(saved_head(tmp_path/"rm")))
    given = dict(reward_model=str(tmp_path/"rm"), reward_funcs=None)
    with pytest.raises(UserError, match="below --min_reward_accuracy 0.5"): make(warm, tmp_path/"o", **given)
    (tmp_path/"rm/report_card.json").unlink()
    with pytest.raises(UserError, match="has no report_card.json"): make(warm, tmp_path/"o", **given)
    make(warm, tmp_path/"o", allow_weak_reward_model=True, **given)


def test_a_kl_below_zero_halts(warm, tmp_path):
    "Answers that were not drawn from the policy: the run stops and says so, and no negative KL was reported."
    from medllm.rl.monitor import Halted
    trainer = make(warm, tmp_path, max_steps=20)
    sample = trainer.sample
    def wrong(prompts):
        drawn = sample(prompts)
        drawn.reference = drawn.reference + (0.2 + 0.1*torch.rand_like(drawn.reference))*drawn.mask
        return drawn
    trainer.sample = wrong
    with pytest.raises(Halted, match="below zero by more than chance"): trainer.train()
    assert trainer.noted and all(h["kl"] >= 0 for h in trainer.noted + (rollouts(trainer) if trainer.history.exists() else []))


def test_an_exploding_kl_halts(warm, tmp_path):
    from medllm.rl.monitor import Halted
    trainer = make(warm, tmp_path, max_steps=20, learning_rate=2e-2, kl_limit=0.5)
    with pytest.raises(Halted, match="over --kl_limit 0.5"): trainer.train()


@pytest.mark.parametrize("flag, value, why", [
    ("ppo_clip", 0, "above 0"), ("ppo_epochs", 0, "at least 1"), ("ppo_lambda", 2, "from 0 to 1"), ("kl_coef", -1, "at least 0"),
    ("reward_funcs", "leter", "did you mean 'letter'"), ("reward_funcs", "number", "none of the 32 rows"),
    ("temperature", 0, "--temperature")])
def test_what_cannot_work_is_refused(warm, tmp_path, flag, value, why):
    from medllm.core import UserError
    with pytest.raises(UserError, match=why): make(warm, tmp_path, **{flag: value})


@pytest.mark.slow
def test_two_processes(warm, tmp_path):
    "Two processes share the answers out; what is logged is over both."
    done = run(
        "torchrun", "--nproc_per_node", 2, "-m", "medllm.train", "--stage", "ppo", "--model_name_or_path", warm/"model",
        "--dataset", warm/"asked.json", "--finetuning_type", "lora", "--reward_funcs", "citation", "--max_new_tokens", 8,
        "--max_steps", 4, "--per_device_train_batch_size", 8, "--output_dir", tmp_path, "--template", "chatml",
        "--save_strategy", "no", cwd=ROOT, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in open(tmp_path/"rollouts.jsonl")]
    assert len(lines) == 1 and len(lines[0]["lengths"]) == 16 and len(set(lines[0]["prompts"])) > 8
