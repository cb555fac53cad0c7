"""Preference training where only a GPU can show it: the kernel for two answers behind one prompt, half precision, 4 bit."""
import math

import pytest
import torch
from packed_kernels import agrees_with_float64

from medllm.train.arguments import parse
from medllm.train.inputs import prepare_data
from medllm.json_file import read_log
from medllm.train.loop import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("window", [None, 40])
def test_branched_attention_kernels_agree(dtype, window):
    "Keys longer than queries, aligned at the end: one kernel (half precision) or a call for each piece, against float64."
    from medllm.models.packed_attention import SharedPrefixes
    prefixes = SharedPrefixes(((0, 150, 200, 264), (264, 300, 301, 390), (390, 390, 401, 401)))
    agrees_with_float64(prefixes, lambda *qkv: prefixes.attend(*qkv, window), window, dtype)


@pytest.mark.parametrize("flags", [
    dict(finetuning_type="full"), dict(finetuning_type="full", bf16=True),
    dict(finetuning_type="lora", bf16=True, quantization_bit=4),
    dict(finetuning_type="lora", bf16=True, gradient_checkpointing=True, precompute_ref_log_probs=True)], ids=str)
@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_it_learns(stage, flags, tmp_path):
    args = parse(dict(stage=stage, model_name_or_path="tiny", dataset="mm_rm", val_size=16, max_steps=20, logging_steps=1,
        learning_rate=1e-3, save_strategy="no", per_device_train_batch_size=8, disable_tqdm=True, output_dir=str(tmp_path),
        tokenized_path=str(tmp_path)) | flags)
    metrics = train(args, prepare_data(args))
    losses = [h["loss"] for h in read_log(tmp_path/"history.jsonl") if "loss" in h]
    start = math.log(2) if stage == "dpo" else 0.5
    assert abs(losses[0] - start) < (1e-4 if not flags.get("bf16") else 2e-2)       # policy and reference begin as one
    assert metrics["eval_margin"] > 0 and min(losses[-5:]) < start
