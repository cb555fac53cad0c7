"""What only a GPU can show: half precision, 4 bit, gradient checkpointing and memory of the selected loss."""
import json

import pytest
import torch

from medllm.train.arguments import parse
from medllm.train.inputs import prepare_data
from medllm.train.loop import read_history, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

FLAGS = dict(
    model_name_or_path="tiny", dataset="mm", max_samples=128, max_steps=20, logging_steps=1, learning_rate=1e-3,
    save_strategy="no", per_device_train_batch_size=8, disable_tqdm=True)


def curve(folder, **flags):
    args = parse(FLAGS | flags | {"output_dir": str(folder)})
    train(args, prepare_data(args))
    return [h["loss"] for h in read_history(folder/"history.jsonl") if "loss" in h]


@pytest.mark.parametrize("flags", [
    dict(finetuning_type="full"), dict(finetuning_type="full", bf16=True),
    dict(finetuning_type="full", fp16=True), dict(finetuning_type="lora"),
    dict(finetuning_type="lora", quantization_bit=4, bf16=True),
    dict(finetuning_type="lora", quantization_bit=8, bf16=True)], ids=str)
def test_it_learns(flags, tmp_path):
    losses = curve(tmp_path, **flags)
    assert losses[-1] < losses[0]
    metrics = json.loads((tmp_path/"metrics.json").read_text())
    print(flags, f"{losses[0]:.3f} -> {losses[-1]:.3f}, "
        f"{metrics['trained_tokens_per_second']:.0f} trained tokens/s, {metrics['peak_memory_gib']:.3f} GiB")


def test_checkpointing_changes_memory_not_losses(tmp_path):
    plain = curve(tmp_path/"a", finetuning_type="full")
    saved = curve(tmp_path/"b", finetuning_type="full", gradient_checkpointing=True)
    assert max(abs(a - b) for a, b in zip(plain, saved)) < 1e-3


def test_head_loss_equals_full_logits():
    from medllm.train.objectives import head_loss
    h = torch.randn(3000, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(32000, 256, device="cuda", dtype=torch.bfloat16)
    y = torch.randint(0, 32000, (3000,), device="cuda")
    want = torch.nn.functional.cross_entropy(h.float() @ w.float().T, y, reduction="sum")
    got = head_loss(h, w, y)
    assert abs(got/want - 1) < 5e-3
    a, b = (torch.autograd.grad(loss, h)[0].float() for loss in (got, want))
    assert (a - b).norm() < 0.02*b.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("window", [None, 40])
def test_packed_attention_kernels_agree(dtype, window):
    "The kernel for all lengths (half precision) or a call for each length (float32), against float64."
    from medllm.models.documents import Documents, attend_each, pick_kernel
    documents, (q, k, v) = Documents((0, 200, 264, 328, 400, 401)), (
        torch.randn(1, heads, 401, 64, device="cuda", dtype=dtype, requires_grad=True) for heads in (8, 2, 2))
    kernel = pick_kernel(q, v, 0.0)
    assert (kernel is not None) == (dtype != torch.float32)
    got = attend_each(q, k, v, documents, window) if kernel is None else kernel(
        *(x[0].transpose(0, 1) for x in (q, k, v)), documents, window, None, 0.0)[None]
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want, up = attend_each(*exact, documents, window), torch.randn_like(got)
    far = lambda a, b: ((a.double() - b).norm()/b.norm()).item()
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    assert far(got, want) < tolerance
    for a, b in zip(torch.autograd.grad(got, (q, k, v), up), torch.autograd.grad(want, exact, up.double())):
        assert far(a, b) < tolerance


@pytest.mark.parametrize("flags", [
    dict(finetuning_type="full"), dict(finetuning_type="full", bf16=True),
    dict(finetuning_type="lora", quantization_bit=4, bf16=True, gradient_checkpointing=True)], ids=str)
def test_packing_learns(flags, tmp_path):
    losses = curve(tmp_path, packing=True, cutoff_len=512, per_device_train_batch_size=2, max_samples=200, **flags)
    assert losses[-1] < losses[0]
