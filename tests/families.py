"""Model families as tiny random models: real architectures, their sizes cut down, so that each is made in a moment.

    python tests/families.py            try each of them, and write tests/families.json
    python tests/families.py --table    the READMEs' table of them
"""
import inspect
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SMALL = dict(vocab_size=4160, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=4)
EXPERTS = dict(moe_intermediate_size=48, num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2,
    n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1, shared_expert_intermediate_size=48)
LATENT = dict(num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
    v_head_dim=16, head_dim=8)
VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14,
    depth=1, num_heads=2, out_hidden_size=64)
STATE = dict(mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16)
DELTA = dict(num_hidden_layers=4, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16,
    linear_value_head_dim=16)
WINDOW = dict(sliding_window=16)
SIX = WINDOW | dict(num_hidden_layers=6)                                  # a whole round of windows and one layer without
LAYERED = dict(vocab_size_per_layer_input=4160, hidden_size_per_layer_input=8, global_head_dim=32)
ROPE3 = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=64)


def seeing(**text):
    "The settings of a model with a vision tower."
    return dict(text_config=SMALL | text, vision_config=VISION)


# name -> transformers' model type, and what differs from SMALL; None takes a setting out
FAMILIES = {
    "Llama 3": ("llama", dict(rope_parameters=ROPE3)), "SmolLM2": ("llama", dict(tie_word_embeddings=True)),
    "Llama 4": ("llama4", seeing(**EXPERTS, intermediate_size_mlp=96)),
    "Mistral": ("mistral", WINDOW), "Ministral 3": ("ministral3", {}), "Mixtral": ("mixtral", EXPERTS),
    "Qwen2": ("qwen2", {}), "Qwen2-MoE": ("qwen2_moe", EXPERTS), "Qwen3": ("qwen3", {}), "Qwen3-MoE": ("qwen3_moe", EXPERTS),
    "Qwen3-Next": ("qwen3_next", EXPERTS | DELTA), "Qwen3.5": ("qwen3_5", seeing(**DELTA)),
    "Qwen3.5-MoE": ("qwen3_5_moe", seeing(**EXPERTS, **DELTA)),
    "Gemma": ("gemma", {}), "Gemma 2": ("gemma2", WINDOW), "Gemma 3 text": ("gemma3_text", SIX | dict(query_pre_attn_scalar=16)),
    "MedGemma": ("gemma3", seeing(**SIX, query_pre_attn_scalar=16) | dict(mm_tokens_per_image=4)),
    "Gemma 4": ("gemma4", seeing(**SIX, **LAYERED)), "Gemma 4 text": ("gemma4_text", SIX | LAYERED),
    "Phi-2": ("phi", dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5))),
    "Phi-3": ("phi3", {}), "Phi-3.5-MoE": ("phimoe", EXPERTS),
    "Phi-4-mini": ("phi3", dict(tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.75))),
    "GLM-4": ("glm", {}), "GLM-4-0414": ("glm4", {}), "GLM-4.5": ("glm4_moe", EXPERTS),
    "GLM-4.7-Flash": ("glm4_moe_lite", EXPERTS | LATENT),
    "DeepSeek-V2": ("deepseek_v2", EXPERTS | LATENT), "DeepSeek-V3": ("deepseek_v3", EXPERTS | LATENT),
    "GPT-OSS": ("gpt_oss", EXPERTS | WINDOW), "Pythia": ("gpt_neox", {}),
    "GPT-2": ("gpt2", dict(n_embd=64, n_layer=2, n_head=4, n_positions=512)), "BioGPT": ("biogpt", {}),
    "OPT": ("opt", dict(ffn_dim=96, word_embed_proj_dim=64)),
    "GPT-J": ("gptj", dict(n_embd=64, n_layer=2, n_head=4, rotary_dim=8)),
    "BLOOM": ("bloom", dict(n_layer=2, n_head=4)), "Falcon": ("falcon", dict(head_dim=None)),
    "Falcon-H1": ("falcon_h1", STATE | dict(mamba_d_ssm=64, mamba_n_heads=4)),
    "Falcon Mamba": ("falcon_mamba", dict(state_size=8)),
    "MPT": ("mpt", dict(d_model=64, n_heads=4, n_layers=2)), "StableLM": ("stablelm", {}), "StarCoder2": ("starcoder2", {}),
    "Granite": ("granite", {}), "Granite-MoE": ("granitemoe", EXPERTS),
    "Granite 4": ("granitemoehybrid", EXPERTS | STATE | dict(layer_types=["mamba", "attention"], shared_intermediate_size=96)),
    "Cohere": ("cohere", {}), "Cohere 2": ("cohere2", WINDOW), "OLMo": ("olmo", {}), "OLMo 2": ("olmo2", {}),
    "OLMo 3": ("olmo3", WINDOW), "OLMoE": ("olmoe", EXPERTS), "SmolLM3": ("smollm3", {}), "Nemotron": ("nemotron", {}),
    "EXAONE 4": ("exaone4", WINDOW), "Seed-OSS": ("seed_oss", {}), "ERNIE 4.5": ("ernie4_5", {}),
    "ERNIE 4.5-MoE": ("ernie4_5_moe", EXPERTS | dict(moe_num_experts=4, moe_k=2)), "Hunyuan": ("hunyuan_v1_dense", {}),
    "Hunyuan-MoE": ("hunyuan_v1_moe", EXPERTS), "MiniMax-M2": ("minimax_m2", EXPERTS | dict(rotary_dim=8)),
    "MiniCPM3": ("minicpm3", LATENT), "InternLM3": ("internlm3", {}), "Apertus": ("apertus", {}),
    "LFM2": ("lfm2", dict(layer_types=["conv", "full_attention"])), "Mamba": ("mamba", dict(state_size=8)),
    "Mamba 2": ("mamba2", dict(num_heads=8, head_dim=16, state_size=16, n_groups=1)),
    "Jamba": ("jamba", EXPERTS | dict(num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8)),
    "Bamba": ("bamba", STATE | dict(attn_layer_indices=[1])), "Arcee": ("arcee", {}), "Helium": ("helium", {}),
    "dots.llm1": ("dots1", EXPERTS)}


def config_of(name):
    "The configuration of a family, small."
    kind, more = FAMILIES[name]
    make = CONFIG_MAPPING[kind]
    if "text_config" in more: return make(**more)
    known, usual = set(inspect.signature(make.__init__).parameters), make()
    small = {key: value for key, value in SMALL.items() if key in known or hasattr(usual, key)}
    return make(**{key: value for key, value in (small | more).items() if value is not None})


def model_of(name):
    "A random model of a family, of some hundred thousand parameters; the same on each call."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config_of(name)).eval()


RESULTS = Path(__file__).parent/"families.json"
IDS = torch.arange(24)[None]*7 % 4000 + 5


def logits_of(model): return model(input_ids=IDS, use_cache=False).logits


def loss_of(model): return torch.nn.functional.cross_entropy(logits_of(model)[0, :-1].float(), IDS[0, 1:])


def refused(action, *given):
    "The reason that something is refused for; what there is to say where it is done, mostly nothing."
    from medllm.core import UserError
    try: return action(*given) or ""
    except UserError as e: return str(e)


def in_four_bits(folder):
    "Load a folder in 4 bit, put an adapter on it, and take a gradient."
    from medllm.models.adapters import AdaptPlan, adapt
    from medllm.models.loading import LoadPlan, load_model
    model = load_model(str(folder), LoadPlan(bits=4, frozen=True))
    assert model.is_quantized and any(type(m).__name__ == "Linear4bit" for m in model.modules())
    model = adapt(model, AdaptPlan(rank=2))
    loss_of(model).backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    assert grads and all(g.isfinite().all() for g in grads) and any(g.abs().max() > 0 for g in grads)
    experts = sum(p.numel() for p in model.parameters() if p.ndim == 3)
    return "experts stay" if experts > 0.05*model.num_parameters() else ""


def as_gguf(folder):
    "Write a folder as a GGUF file, and read it back by that file alone to equal logits; so does llama.cpp, if it is here."
    from transformers import AutoConfig
    from medllm.export.equivalence import forward_of
    from medllm.export.gguf import UNREAD, family_of, forward_of_llama_cpp, llama_cpp, write_gguf
    from medllm.models.gguf_model import read_gguf
    from medllm.models.loading import load_model
    file = write_gguf(folder, Path(folder)/"model.gguf", "f16")
    here, alone = load_model(str(folder)), family_of(AutoConfig.from_pretrained(folder)) in UNREAD
    ids = IDS[0, :12 if here.config.model_type == "mistral" else 24].numpy()      # its file's context ends with the window
    due = forward_of(here)(ids)
    if not alone: assert (forward_of(read_gguf(file, "float32")[0])(ids) - due).abs().max() < 1e-2
    if llama := llama_cpp(file, 64):
        assert (forward_of_llama_cpp(llama)(ids) - due).abs().max() < 1e-2
        llama.close()
    return "read by llama.cpp alone" if alone else ""


def found(name, folder):
    "What a family can do beside LoRA, full and freeze, answers and merging, which no family may miss."
    from medllm.models.packed_attention import isolate
    from medllm.models.tiny import tiny_tokenizer
    model_of(name).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    packs = refused(isolate, model_of(name).train())
    return {"4 bit": refused(in_four_bits, folder).replace(str(folder), "FOLDER"),
        "packed": packs.partition("in this model (")[2].partition(");")[0],
        "GGUF": refused(as_gguf, folder).partition("; it knows")[0]}


SHORT = {"experts stay": "all but experts", "layers of a class of its own": "no linear layers",
    "carry something": "not kept apart", "caps attention scores": "caps scores", "sinks": "has sinks",
    "way of its own": "attention of its own", "cannot write a": "no", "by llama.cpp alone": "with llama.cpp"}


def shown(said):
    "What a table says for a refusal."
    return next(short for words, short in SHORT.items() if words in said) if said else "yes"


def lines():
    "The READMEs' table."
    yield "| family | `model_type` | LoRA, full, freeze | answers, merges | 4 bit | packed | GGUF |"
    yield "|---|---|---|---|---|---|---|"
    for name, given in json.loads(RESULTS.read_text(encoding="utf-8")).items():
        rest = " | ".join(shown(given[key]) for key in ("4 bit", "packed", "GGUF"))
        yield f"| {name} | `{FAMILIES[name][0]}` | yes | yes | {rest} |"


def main(table):
    import tempfile
    if table: return print("\n".join(lines()))
    results = {}
    for name in FAMILIES:
        with tempfile.TemporaryDirectory() as folder: results[name] = found(name, Path(folder))
        print(name, results[name], flush=True)
    RESULTS.write_text(json.dumps(results, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__": main("--table" in sys.argv)
