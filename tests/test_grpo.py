"""GRPO and its relatives: closed forms, TRL's trainers, invariances, learning, traps."""
import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from medllm.data.rows import TokenRows
from medllm.data.tokens import Renderer
from medllm.models.adapters import AdaptPlan, adapt
from medllm.models.loading import LoadPlan, load_model
from medllm.models.sampling import Sampling
from medllm.train.grpo import GRPO_LOSSES, GrpoLoss, GrpoObjective, group_advantages
from medllm.train.monitor import kl_estimate
from medllm.train.objectives import SelectedHead
from medllm.train.rollouts import Reward, Rollout, RolloutPlan, RolloutTrainer
from medllm.train.units import Prompts

LONGEST, EACH = 9, 4


class Frozen:
    "A reference that is a model of its own."
    def __init__(self, model): self.model, self.head = model.eval(), SelectedHead(model)
    def answering(self, model): return nullcontext(self.model)


def make_trainer(tiny, folder, loss, model=None, reference=None, rewards=(), temperature=1.0, prompts=None, passes=1, **flags):
    "A GRPO trainer of the tiny model, all of it trained."
    args = TrainingArguments(**dict(
        output_dir=str(folder), per_device_train_batch_size=8, report_to="none", disable_tqdm=True, save_strategy="no", use_cpu=True,
        remove_unused_columns=False, logging_steps=1, lr_scheduler_type="constant") | flags)
    model = model or adapt(load_model("tiny", LoadPlan(frozen=False)), AdaptPlan("full"))
    plan = RolloutPlan(Renderer(tiny, "chatml"), Sampling(LONGEST, temperature), reference)
    prompts = prompts or Prompts(TokenRows([(np.arange(300, 305, dtype=np.int32), np.zeros(5, bool))]))
    return RolloutTrainer(model, args, GrpoObjective(loss, list(rewards), EACH, passes), prompts, plan)


def some_rollout(groups=2):
    "Answers of several lengths, each group with the prompt of its own."
    rng = np.random.default_rng(0)
    prompts = [rng.integers(300, 4000, 3 + 4*g) for g in range(groups) for _ in range(EACH)]
    lengths = torch.from_numpy(rng.integers(1, LONGEST + 1, groups*EACH))
    answers = torch.from_numpy(rng.integers(300, 4000, (groups*EACH, LONGEST)))
    n = len(prompts)
    drawn = Rollout(prompts, answers, lengths, torch.zeros(n, dtype=torch.bool), EACH, [""]*n, np.arange(n), [""]*n, [""]*n)
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
        "cases": json.dumps(CASES), "each": EACH, "longest": LONGEST, "rewards": REWARDS.numpy(), "old_shift": SHIFT.numpy(),
        "prompts": np.stack([np.pad(p, (0, width - len(p))) for p in drawn.prompts]),
        "prompt_lengths": np.array([len(p) for p in drawn.prompts]),
        "answers": drawn.answers.numpy(), "lengths": drawn.lengths.numpy(),
        **{f"step/{name}": s for name, s in steps_of(load_model("tiny"), STEPS).items()}})


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: "-".join(map(str, CASES[n].values())))
def test_trl(theirs, tiny, tmp_path, number):
    "Advantages, log-probabilities, entropies, loss and gradients of TRL's trainers, partly off the policy and clipped."
    case, drawn = dict(CASES[number]), some_rollout()
    want = {name.split("/", 1)[1]: value for name, value in theirs.items() if name.startswith(f"{number}/")}
    kind, heat = case["kind"], case.pop("temperature")
    model, reference = (adapt(load_model("tiny", LoadPlan(frozen=False)), AdaptPlan("full")) for _ in range(2))
    trainer = make_trainer(tiny, tmp_path, GrpoLoss(longest=LONGEST, **case), model, Frozen(reference), temperature=heat)
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
    for name, p in model.named_parameters(): np.testing.assert_allclose(p.grad, want[f"grad/{name}"], atol=1e-5, err_msg=name)
