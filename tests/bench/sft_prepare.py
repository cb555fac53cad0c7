"""Make what every tool trains on: one small Llama, one tokenizer, one set of rows.

Run by `sft.py` in a peer's environment as `sft_prepare.py TASK.json`. The files are written by
hand, without transformers, so that they do not depend on which version of it a peer has. Where
the task says that the model is `smol`, that lies in its folder already, and only rows are made.
"""
import json
import math
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)

# how each chat format begins, goes on to the answer, and writes the trained answer
FORMATS = {
    "llama2": (f"{BOS}[INST] ", " [/INST]", f" {{}} {EOS}"),
    "smol": ("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
             "Face<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n",
             "{}<|im_end|>"),
}


def write_json(path, value):
    """Write `value` to `path` as JSON."""
    Path(path).write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")


def read_rows(path, count):
    """The first `count` alpaca rows, edge blanks removed so that no tool's trimming matters."""
    rows = json.loads(Path(path).read_text(encoding="utf-8"))[:count]
    return [{key: row[key].strip() for key in ("instruction", "input", "output")} for row in rows]


def train_tokenizer(texts, size):
    """A byte-level BPE over `texts` with at most `size` entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[PAD, BOS, EOS], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer, folder, max_length):
    """Write the tokenizer files, the chat format included."""
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS,
        "pad_token": PAD, "model_max_length": max_length, "padding_side": "right",
        "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE})
    write_json(folder / "special_tokens_map.json",
               {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD})


def model_config(shape):
    """The `config.json` of a Llama of this shape."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": shape["hidden"], "intermediate_size": shape["intermediate"],
        "num_hidden_layers": shape["layers"], "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["heads"], "head_dim": shape["hidden"] // shape["heads"],
        "vocab_size": shape["vocabulary"], "max_position_embeddings": shape["positions"],
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "attention_bias": False, "mlp_bias": False,
        "tie_word_embeddings": False, "initializer_range": 0.02, "use_cache": True,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32"}


def model_weights(shape, seed=0):
    """Random float32 weights under the names of a Llama checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inner, vocabulary = shape["hidden"], shape["intermediate"], shape["vocabulary"]

    def normal(rows, columns):
        return torch.empty(rows, columns).normal_(0, 0.02, generator=generator)

    weights = {"model.embed_tokens.weight": normal(vocabulary, hidden),
               "lm_head.weight": normal(vocabulary, hidden),
               "model.norm.weight": torch.ones(hidden)}
    for layer in range(shape["layers"]):
        prefix = f"model.layers.{layer}."
        for name in "qkvo":
            weights[f"{prefix}self_attn.{name}_proj.weight"] = normal(hidden, hidden)
        for name in ("gate", "up"):
            weights[f"{prefix}mlp.{name}_proj.weight"] = normal(inner, hidden)
        weights[f"{prefix}mlp.down_proj.weight"] = normal(hidden, inner)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{name}.weight"] = torch.ones(hidden)
    return weights


def save_model(shape, folder):
    """Write configuration and weights; give the number of parameters."""
    write_json(folder / "config.json", model_config(shape))
    write_json(folder / "generation_config.json",
               {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    weights = model_weights(shape)
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return sum(weight.numel() for weight in weights.values())


def row_length(tokenizer, row, chat):
    """`[tokens, trained tokens]` of a row in a chat format."""
    before, after, answer = FORMATS[chat]
    question = "\n".join(part for part in (row["instruction"], row["input"]) if part)
    prompt = tokenizer.encode(f"{before}{question}{after}").ids
    answer = tokenizer.encode(answer.format(row["output"])).ids
    return [len(prompt) + len(answer), len(answer)]


def first_that_fit(tokenizer, everything, task):
    """The first rows that no tool has to cut, and their lengths."""
    rows, lengths = [], []
    for row in everything:
        total, trained = row_length(tokenizer, row, task["chat"])
        if total < task["cutoff"] and trained > 1 and len(rows) < task["rows"]:
            rows.append(row)
            lengths.append([total, trained])
    return rows, lengths


def count_parameters(folder):
    """How many numbers the weights of a folder hold."""
    with safe_open(str(folder / "model.safetensors"), "pt") as weights:
        return sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())


def widen(folder):
    """Rewrite a model in float32: some tools load it in the precision that it is written in."""
    with safe_open(str(folder / "model.safetensors"), "pt") as weights:
        wide = {name: weights.get_tensor(name).float() for name in weights.keys()}
    save_file(wide, str(folder / "model.safetensors"), metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", {**config, "dtype": "float32", "torch_dtype": "float32"})


def save_rows(rows, folder, chat):
    """Write the rows; for LLaMA-Factory with blanks around answers, which its `llama2` does not add."""
    write_json(folder / "rows.json", rows)
    blank = " " if chat == "llama2" else ""
    spaced = [{**row, "output": f"{blank}{row['output']}{blank}"} for row in rows]
    write_json(folder / "rows_spaced.json", spaced)
    write_json(folder / "dataset_info.json", {"bench": {"file_name": "rows_spaced.json"}})


def main():
    """Read the task, write everything into its folders, print what was made."""
    task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    model_dir, data_dir = Path(task["model"]), Path(task["data_dir"])
    for folder in (model_dir, data_dir):
        folder.mkdir(parents=True, exist_ok=True)
    everything = read_rows(task["source"], None)
    shape = task["shape"]
    if task["chat"] == "smol":
        tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
        parameters = count_parameters(model_dir)
        widen(model_dir)
    else:
        tokenizer = train_tokenizer([text for row in everything for text in row.values()],
                                    shape["vocabulary"])
        save_tokenizer(tokenizer, model_dir, shape["positions"])
        parameters = save_model(shape, model_dir)
    rows, lengths = first_that_fit(tokenizer, everything, task)
    save_rows(rows, data_dir, task["chat"])
    print(json.dumps({"parameters": parameters, "tokenizer_size": tokenizer.get_vocab_size(),
                      "rows": len(rows), "lengths": lengths}))


if __name__ == "__main__":
    main()
