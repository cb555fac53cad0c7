"""Every family of models that people fine-tune, tiny: training changes the language model, fused operations nothing."""
import contextlib
import io

import pytest
import torch
from families import FAMILIES, model_of

from medllm.models.adapters import AdaptPlan, adapt, load_adapter
from medllm.models.fused_ops import fewer_passes

IDS = torch.arange(24)[None]*7 % 4000 + 5
FEW = {"MedGemma", "Phi-4-mini", "Qwen3-Next", "Qwen3.5", "GLM-4.5", "Pythia"}      # stopped with a traceback before


def logits(model): return model(input_ids=IDS, use_cache=False).logits


def test_there_are_many(): assert len(FAMILIES) >= 60 and FEW < FAMILIES.keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_it_trains_by_lora_and_loads_to_equal_logits(name, tmp_path):
    "Fused operations, an adapter on the language model alone, one step, and the adapter from its folder on the model anew."
    with contextlib.redirect_stderr(io.StringIO()):
        model = model_of(name)
        with torch.no_grad():
            plain = logits(model)
            with fewer_passes(model): assert (logits(model) - plain).abs().max() < 1e-4
        model = adapt(model, AdaptPlan(rank=2))
        on = [n for n, p in model.named_parameters() if p.requires_grad]
        assert on and not any(part in n for n in on for part in ("vision", "visual", "projector", "router", "experts.")), on[:3]
        with fewer_passes(model):
            loss = torch.nn.functional.cross_entropy(logits(model)[0, :-1], IDS[0, 1:])
            loss.backward()
        assert loss.isfinite()
        moved = [p for p in model.parameters() if p.requires_grad and p.grad is not None]
        assert any(p.grad.abs().max() > 0 for p in moved)
        with torch.no_grad():
            for p in moved: p -= 0.5*p.grad/(p.grad.norm() + 1e-9)
            for n, p in model.named_parameters():
                if "lora_B" in n: p += 0.01
            trained = logits(model)
        model.save_pretrained(tmp_path)
        again = load_adapter(model_of(name), str(tmp_path))
        with torch.no_grad(): assert (logits(again) - trained).abs().max() < 1e-5
        assert (trained - plain).abs().max() > 1e-4
        with torch.no_grad(): assert (logits(again.merge_and_unload()) - trained).abs().max() < 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_it_trains_whole_and_by_its_last_layer(name):
    "Whatever is to train has a gradient, and it is the language model's."
    for plan in (AdaptPlan("full"), AdaptPlan("freeze", layers=1)):
        with contextlib.redirect_stderr(io.StringIO()): model = adapt(model_of(name).train(), plan)
        torch.nn.functional.cross_entropy(logits(model)[0, :-1], IDS[0, 1:]).backward()
        on = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert on and not [n for n in on if any(part in n for part in ("vision", "visual", "projector", "bias_correction"))]
        still = [n for n, grad in on.items() if grad is None and "experts" not in n]
        assert not still, (plan.kind, still)
        assert all(grad.isfinite().all() for grad in on.values() if grad is not None)
