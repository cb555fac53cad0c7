"""What only a GPU can show: half precision, 4 bit, gradient checkpointing and memory of the selected loss."""
import json

import pytest
import torch
from packed_kernels import agrees_with_float64

from medllm.train.arguments import parse
from medllm.train.inputs import prepare_data
from medllm.json_file import read_log
from medllm.train.loop import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

FLAGS = dict(
    model_name_or_path="tiny", dataset="mm", max_samples=128, max_steps=20, logging_steps=1, learning_rate=1e-3,
    save_strategy="no", per_device_train_batch_size=8, disable_tqdm=True)


def curve(folder, **flags):
    args = parse(FLAGS | flags | {"output_dir": str(folder)})
    train(args, prepare_data(args))
    return [h["loss"] for h in read_log(folder/"history.jsonl") if "loss" in h]


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
    from medllm.models.packed_attention import Documents, attend_each
    documents = Documents((0, 200, 264, 328, 400, 401))
    fused = agrees_with_float64(documents, lambda *qkv: attend_each(*qkv, documents, window), window, dtype)
    assert fused == (dtype != torch.float32)


@pytest.mark.parametrize("flags", [
    dict(finetuning_type="full"), dict(finetuning_type="full", bf16=True),
    dict(finetuning_type="lora", quantization_bit=4, bf16=True, gradient_checkpointing=True)], ids=str)
def test_packing_learns(flags, tmp_path):
    losses = curve(tmp_path, packing=True, cutoff_len=512, per_device_train_batch_size=2, max_samples=200, **flags)
    assert losses[-1] < losses[0]


@pytest.fixture(scope="module")
def llama_1b(tmp_path_factory):
    "A random Llama of about 1.2 billion parameters in bfloat16, with the tiny model's tokenizer."
    from transformers import LlamaConfig, LlamaForCausalLM

    from medllm.models.tiny import tiny_tokenizer
    folder, tokenizer = tmp_path_factory.mktemp("llama")/"1b", tiny_tokenizer()
    config = LlamaConfig(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=24, num_attention_heads=16,
        num_key_value_heads=16, max_position_embeddings=4096, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("stage", ["sft", "rm", "dpo", "grpo"])
def test_fifty_steps_of_a_1b_llama(stage, bits, llama_1b, tmp_path):
    own = {"rm": dict(dataset="mm_rm"), "dpo": dict(dataset="mm_rm"),
        "grpo": dict(dataset="mm_choice", reward_funcs="letter", num_generations=4, max_new_tokens=32)}.get(stage, {})
    flags = dict(model_name_or_path=llama_1b, stage=stage, finetuning_type="lora", bf16=True, max_steps=50, max_samples=None,
        learning_rate=1e-4, cutoff_len=1024, per_device_train_batch_size=4, **own)
    if bits: flags["quantization_bit"] = bits
    args = parse(FLAGS | flags | {"output_dir": str(tmp_path)})
    metrics = train(args, prepare_data(args))
    assert metrics["steps"] == 50
    print(f"{stage}, {'bf16' if bits is None else '4 bit'}: {metrics['tokens_per_second']:.0f} tokens/s, "
        f"{metrics['peak_memory_gib']:.2f} GiB")
