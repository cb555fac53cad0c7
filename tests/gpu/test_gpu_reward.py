"""Reward models on a GPU: half precision, 4 bit, packing; the head stays float32 and scores do not depend on the batch."""
import pytest
import torch

from medllm.models.loading import LoadPlan
from medllm.models.reward_model import load_reward_model
from medllm.train.arguments import parse
from medllm.train.inputs import prepare_data
from medllm.train.loop import train
from medllm.train.report_card import ReportCard

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("flags", [
    dict(finetuning_type="full"), dict(finetuning_type="full", bf16=True), dict(finetuning_type="full", bf16=True, packing=True),
    dict(finetuning_type="lora", bf16=True), dict(finetuning_type="lora", quantization_bit=4, bf16=True),
    dict(finetuning_type="lora", quantization_bit=4, bf16=True, packing=True, gradient_checkpointing=True)], ids=str)
def test_learns_and_scores_alike(flags, tmp_path):
    args = parse(dict(
        stage="rm", model_name_or_path="tiny", dataset="mm_rm", val_size=24, num_train_epochs=4, learning_rate=1e-3,
        per_device_train_batch_size=8, save_strategy="no", disable_tqdm=True, output_dir=str(tmp_path)) | flags)
    metrics = train(args, prepare_data(args))
    assert metrics["loss_last"] < metrics["loss_first"]
    facts = ReportCard.read(tmp_path).facts
    assert facts["padding"]["largest"] < 0.05
    reward = load_reward_model(str(tmp_path), plan=LoadPlan(bits=flags.get("quantization_bit")))
    assert reward.score.weight.dtype == torch.float32 and reward.score.weight.is_cuda
    print(flags, f"{metrics['loss_first']:.3f} -> {metrics['loss_last']:.3f}, {metrics['peak_memory_gib']:.3f} GiB, "
        f"padding {facts['padding']['largest']:.1e} sd")
