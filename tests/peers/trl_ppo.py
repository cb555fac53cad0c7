"""TRL's PPO on given arrays: `trl_ppo.py in.npz out.npz`.

TRL dropped PPO in 1.13; this is 1.12.0, the last that has it (`make trl` puts it into .trl/ppo, MEDLLM_TRL_PPO names another
place). Its formulas stand inside of `PPOTrainer.train`, so the statements are taken out of that function's source and run as they
are, between the names of the first and the last variable they assign.
"""
import ast
import inspect
import os
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, os.environ.get("MEDLLM_TRL_PPO") or str(Path(__file__).resolve().parents[2]/".trl/ppo"))

import torch
from trl.experimental.ppo import ppo_trainer


def assigned(statement):
    "Names that a statement assigns, subscripts included."
    targets = getattr(statement, "targets", [getattr(statement, "target", None)])
    return {t.value.id if isinstance(t, ast.Subscript) else getattr(t, "id", "") for t in targets}


def statements(first, last):
    "The statements of `PPOTrainer.train` from the first that assigns `first` to the last in its block that assigns `last`."
    tree = ast.parse(textwrap.dedent(inspect.getsource(ppo_trainer.PPOTrainer.train)))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list): continue
        begins, ends = ([i for i, s in enumerate(body) if name in assigned(s)] for name in (first, last))
        if begins and ends: return body[begins[0]:ends[-1] + 1]
    raise LookupError(f"{first} … {last}")


def run(first, last, names):
    code = [s for s in statements(first, last) if "empty_cache" not in ast.unparse(s)]
    exec(compile(ast.Module(code, []), "PPOTrainer.train", "exec"), names)


def compare(given):
    "Rewards, advantages, returns, losses and gradients of one batch."
    t = {name: torch.from_numpy(array) for name, array in given.items() if array.ndim}
    flags = dict(
        gamma="gamma", lam="lam", kl_coef="kl_coef", cliprange="clip", cliprange_value="value_clip", vf_coef="value_weight")
    args = SimpleNamespace(kl_estimator="k1", whiten_rewards=bool(given["whiten_rewards"]),
        **{theirs: float(given[ours]) for theirs, ours in flags.items()})
    names = vars(ppo_trainer) | {
        "args": args, "responses": t["logps"], "scores": t["scores"], "sequence_lengths": t["lengths"] - 1,
        "logprobs": t["logps"].clone(), "ref_logprobs": t["reference"].clone(), "values": t["values"].clone()}
    if given["whole"]: run("response_idxs", "advantages", names)   # answers fill their rows: TRL's places are ours
    else:
        # Elsewhere TRL gives the score one step behind the last token, and ours at it; one place makes the formulas comparable.
        mask = torch.arange(t["logps"].shape[1]) >= t["lengths"][:, None]
        names |= {"padding_mask": mask, "padding_mask_p1": mask, "sequence_lengths_p1": t["lengths"] - 1}
        run("logr", "advantages", names)
    mask, new, values = names["padding_mask"], t["new_logps"].requires_grad_(), t["new_values"].requires_grad_()
    names |= {
        "vpred": values.masked_fill(mask, 0), "new_logprobs": new.masked_fill(mask, ppo_trainer.INVALID_LOGPROB),
        "micro_batch_inds": slice(None), "mb_values": names["values"], "mb_return": names["returns"],
        "mb_advantage": names["advantages"], "mb_logprobs": names["logprobs"].masked_fill(mask, ppo_trainer.INVALID_LOGPROB)}
    run("vpredclipped", "loss", names)
    names["loss"].backward()
    return dict(rewards=names["rewards"], advantages=names["advantages"], returns=names["returns"], loss=names["loss"],
        policy_loss=names["pg_loss"], value_loss=names["vf_loss"], d_logps=new.grad, d_values=values.grad)


loaded, cases = np.load(sys.argv[1]), {}
for name in loaded.files: cases.setdefault(name.split("/")[0], {})[name.split("/")[1]] = loaded[name]
np.savez(sys.argv[2], **{
    f"{case}/{name}": value.detach().numpy() for case, given in cases.items() for name, value in compare(given).items()})
