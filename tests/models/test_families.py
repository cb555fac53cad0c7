"""Every family of models that people fine-tune, tiny: training changes the language model, fused operations nothing."""
import contextlib
import io
import json

import numpy as np
import pytest
import torch
from families import FAMILIES, IDS, RESULTS, found, lines, model_of
from families import logits_of as logits

from medllm.core import UserError
from medllm.evaluate.likelihood import TokenisedRequest, batch_logprobs
from medllm.models.adapters import AdaptPlan, adapt, load_adapter, merged
from medllm.models.fused_ops import fewer_passes
from medllm.models.rope_scaling import stretch, stretched
from medllm.models.sampling import Sampling, sample_answers, uniform_table

FEW = {"MedGemma", "Phi-4-mini", "Qwen3-Next", "Qwen3.5", "GLM-4.5", "Pythia"}      # stopped with a traceback before


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


MIXTURES = ["Llama 4", "Mixtral", "Qwen2-MoE", "Qwen3-MoE", "Qwen3-Next", "Qwen3.5-MoE", "Phi-3.5-MoE", "GLM-4.5",
    "GLM-4.7-Flash", "DeepSeek-V2", "DeepSeek-V3", "GPT-OSS", "Granite-MoE", "Granite 4", "OLMoE", "ERNIE 4.5-MoE", "Hunyuan-MoE",
    "MiniMax-M2", "Jamba", "dots.llm1"]


@pytest.mark.parametrize("name", MIXTURES)
def test_lora_on_experts(name, tmp_path):
    "Each array of experts has factors that train; the adapter is loaded to equal logits, and merged to the same."
    with contextlib.redirect_stderr(io.StringIO()):
        model = adapt(model_of(name), AdaptPlan(rank=2, target="all,experts"))
        with fewer_passes(model): torch.nn.functional.cross_entropy(logits(model)[0, :-1], IDS[0, 1:]).backward()
        arrays = [n for n, p in model.named_parameters() if p.ndim == 3 and ".experts." in n]
        factors = {n: p for n, p in model.named_parameters() if ".experts." in n and "lora_B" in n}
        assert len(factors) == len(arrays) > 0 and any(p.grad.abs().max() > 0 for p in factors.values())
        with torch.no_grad():
            for p in factors.values(): p += 0.01*torch.randn_like(p)
            model.save_pretrained(tmp_path)
            tuned, again = logits(model.eval()), logits(load_adapter(model_of(name), str(tmp_path)))
            assert torch.equal(tuned, again) and (tuned - logits(model_of(name).eval())).abs().max() > 1e-3
            assert (logits(merged(model_of(name), [str(tmp_path)]).eval()) - tuned).abs().max() < 1e-4


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


PROMPTS = [np.arange(n)*7 % 4000 + 5 for n in (3, 17, 9)]


def whole(model, ids):
    "Log-probabilities of the token behind each, nothing read before and nothing beside it."
    return torch.log_softmax(model(input_ids=torch.tensor([list(map(int, ids))]), use_cache=False).logits[0].double(), -1)


@pytest.mark.parametrize("name", FAMILIES)
def test_its_answers_are_those_of_reading_everything_anew(name):
    "Prompts padded beside one another, read once for two answers each, whatever a model keeps of them."
    with contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
        model, due = model_of(name), []
        for prompt in PROMPTS:
            ids = list(map(int, prompt))
            for _ in range(8): ids.append(int(whole(model, ids)[-1].argmax()))
            due += [ids[len(prompt):]]*2
        drawn, _, _ = sample_answers(model, PROMPTS, uniform_table(6, 8, 1), Sampling(8, 0.0), [], 0)
    assert drawn.tolist() == due


@pytest.mark.parametrize("name", FAMILIES)
def test_its_likelihoods_are_those_of_reading_everything_anew(name):
    "Continuations of several tokens behind prompts of several lengths; Mamba begins anew when it is given several at once."
    ends = [[9, 30, 77], [1000]], [[5, 6], [7, 8, 9, 11]], [[3000, 12], [14]]
    with contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
        model = model_of(name)
        scored = batch_logprobs(model, [TokenisedRequest(list(map(int, p)), e, False) for p, e in zip(PROMPTS, ends)])
        for prompt, both, got in zip(PROMPTS, ends, scored):
            for end, value in zip(both, got):
                right = whole(model, [*prompt, *end])
                assert abs(sum(float(right[len(prompt) - 1 + n, token]) for n, token in enumerate(end)) - value) < 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_its_positions_are_stretched_or_that_is_refused(name):
    "A stretched model computes what one made with these settings does; nothing is left as it was without a word."
    with contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
        model = model_of(name)
        try: stretch(model, stretched(model.config, "linear", 1000))
        except UserError: return
        anew = type(model)(model.config).eval()
        anew.load_state_dict(model.state_dict())
        assert torch.equal(logits(model), logits(anew)) and (logits(model) != logits(model_of(name))).any()


@pytest.mark.parametrize("name", ("Mamba", "Falcon Mamba", "Jamba", "Qwen3.5", "LFM2", "Granite 4", "Qwen2"))
def test_a_server_answers_as_the_model_alone(name):
    "Prompts longer than a chunk, several at once: behind a state several tokens would be read as if nothing came before."
    from medllm.data.tokens import Renderer
    from medllm.models.chat import ChatModel
    from medllm.models.tiny import tiny_tokenizer
    from medllm.serve.queue import AnswerQueue
    with contextlib.redirect_stderr(io.StringIO()):
        chat = ChatModel(model_of(name), Renderer(tiny_tokenizer(), "chatml"))
        due = [answer.text for answer in chat.answers(PROMPTS, Sampling(6, 0.0))]
        queue = AnswerQueue(chat, rows=4, chunk=4)
        said = queue.answers(PROMPTS, [Sampling(6, 0.0)]*len(PROMPTS))
        queue.close()
    assert [chat.read(answer.tokens).text for answer in said] == due


@pytest.mark.parametrize("name", FAMILIES)
def test_what_it_can_do_is_what_the_table_says(name, tmp_path):
    "4 bit, packing and GGUF: done and held to equal numbers, or refused with a reason, as `python tests/families.py` found."
    with contextlib.redirect_stderr(io.StringIO()): assert found(name, tmp_path) == json.loads(RESULTS.read_text())[name]


def test_the_readmes_have_the_table():
    from pathlib import Path
    for readme in ("README.md", "README_zh.md"):
        text = (Path(__file__).parents[2]/readme).read_text(encoding="utf-8")
        missing = [line for line in lines() if line not in text]
        assert not missing, missing[:3]
