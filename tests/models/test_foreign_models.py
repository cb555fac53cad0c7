"""What a model, an adapter or a template of somebody else may do here: answer, or be refused in a sentence."""
import itertools
import json
import os
import re
import shutil
import socket
import sys
import time
from pathlib import Path

import pytest
from commands import ROOT, run
from fastcore.test import test_fail as fails

from medllm.core import UserError

@pytest.fixture(scope="module")
def tensors():
    from safetensors.torch import load_file
    from medllm.models.tiny import tiny_folder
    return load_file(tiny_folder()/"model.safetensors")


@pytest.fixture
def model(tmp_path):
    "A copy of the tiny model, in a folder beside nothing else."
    from medllm.models.tiny import tiny_folder
    return Path(shutil.copytree(tiny_folder(), tmp_path/"model"))


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    "An adapter on the tiny model whose file names nobody's model."
    from medllm.models.adapters import AdaptPlan, adapt
    from medllm.models.loading import load_model
    folder = tmp_path_factory.mktemp("lora")
    adapt(load_model("tiny"), AdaptPlan(target="q_proj,v_proj", rank=2)).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(lora, tmp_path): return Path(shutil.copytree(lora, tmp_path/"adapter"))


@pytest.fixture
def no_network(monkeypatch):
    "Whoever asks for an address fails the test."
    asked = []
    def refuse(*address, **more):
        asked.append(address)
        raise OSError("no network")
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY", True)     # as medllm.core has it, if it comes first
    yield
    assert not asked, f"the network was asked for {asked[0]}"


def edit(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def loads(folder, says):
    from medllm.models.loading import load_model
    fails(lambda: load_model(str(folder)), contains=says, exc=UserError)


def tokenizer_of(folder, says):
    from medllm.models.loading import load_tokenizer
    fails(lambda: load_tokenizer(str(folder)), contains=says, exc=UserError)


@pytest.mark.parametrize("named", ["../other.safetensors", "{}/other.safetensors", "sub/other.safetensors", "other.bin",
    "pytorch_model.bin", "..", "", "other.safetensors/", ".safetensors", "file://{}/other.safetensors", 3, None, ["a"]])
def test_an_index_names_weights_in_its_own_folder(named, model, tensors):
    import torch
    shutil.move(model/"model.safetensors", model.parent/"other.safetensors")
    (model/"sub").mkdir()
    shutil.copy(model.parent/"other.safetensors", model/"sub")
    for name in ("other.bin", "pytorch_model.bin"): torch.save(tensors, model/name)
    named = named.format(model.parent) if isinstance(named, str) else named
    (model/"model.safetensors.index.json").write_text(json.dumps(
        {"metadata": {}, "weight_map": dict.fromkeys(tensors, named)}))
    loads(model, "not the plain name of a .safetensors file")


def test_an_index_of_parts_is_taken_and_each_part_has_a_hash(model, tensors):
    from safetensors.torch import save_file
    from medllm.models.loading import load_model
    from medllm.models.weights import weights
    (model/"model.safetensors").unlink()
    names, parts = sorted(tensors), ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    index = {name: parts[n % 2] for n, name in enumerate(names)}
    for part in parts: save_file({n: tensors[n] for n in names if index[n] == part}, model/part, {"format": "pt"})
    (model/"model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert load_model(str(model)).lm_head.weight.equal(tensors["lm_head.weight"])
    assert list(weights(model)) == list(parts)
    (model/parts[1]).unlink()
    loads(model, f"not there: {parts[1]}")


def test_a_configuration_names_weights_in_its_own_folder(model):
    shutil.move(model/"model.safetensors", model.parent/"other.safetensors")
    (model/"sub").mkdir()
    shutil.copy(model.parent/"other.safetensors", model/"sub")
    for named in ("../other.safetensors", str(model.parent/"other.safetensors"), "sub/other.safetensors", "adapter_model.bin"):
        edit(model/"config.json", transformers_weights=named)
        loads(model, "not the plain name of a .safetensors file")
    edit(model/"config.json", transformers_weights=["other.safetensors"])
    loads(model, "transformers_weights must be text")


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/tools.jinja", "config.json", "tokenizer.json",
    "tokenizer_config.json", "generation_config.json", "vocab.txt", "added_tokens.json"])
def test_a_link_in_a_model_shows_no_file_of_mine(name, model):
    (model.parent/"key").write_text('{"secret": "key"}')
    (model/name).parent.mkdir(exist_ok=True)
    (model/name).unlink(missing_ok=True)
    (model/name).symlink_to(model.parent/"key")
    tokenizer_of(model, "not part of the model")
    loads(model, "not part of the model")


def test_what_is_no_file_is_not_waited_for(model):
    (model/"tokenizer.json").unlink()
    os.mkfifo(model/"tokenizer.json")
    tokenizer_of(model, "no file that can be read")
    (model/"tokenizer.json").unlink()
    (model/"tokenizer.json").symlink_to("gone.json")
    tokenizer_of(model, "no file that can be read")
    (model/"tokenizer.json").unlink()
    (model/"model.safetensors").unlink()
    (model/"model.safetensors").symlink_to("/dev/zero")
    loads(model, "no file that can be read")


def test_weights_may_be_links_and_keep_their_hash(model):
    from medllm.files import sha256
    from medllm.models.loading import load_model
    from medllm.models.weights import weights
    shutil.move(model/"model.safetensors", model.parent/"large.safetensors")
    (model/"model.safetensors").symlink_to(model.parent/"large.safetensors")
    load_model(str(model))
    assert weights(model) == {"model.safetensors": sha256(model.parent/"large.safetensors")}


def hub_cache(place, folder, name="clinic/base"):
    "A folder as the hub's cache keeps it: links to blobs."
    own = place/f"models--{name.replace('/', '--')}"
    (own/"blobs").mkdir(parents=True)
    (own/"refs").mkdir()
    (own/"refs/main").write_text("a"*40)
    (own/"snapshots"/("a"*40)).mkdir(parents=True)
    for n, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, own/f"blobs/{n:040x}")
        (own/"snapshots"/("a"*40)/file.name).symlink_to(f"../../blobs/{n:040x}")
    return own/"snapshots"/("a"*40)


def test_the_links_of_the_hubs_cache_are_its_own(model, tmp_path):
    from medllm.models.loading import load_model, load_tokenizer
    folder = str(hub_cache(tmp_path/"hub", model))
    load_model(folder), load_tokenizer(folder)


def test_no_file_of_a_model_is_run(model, tmp_path):
    "Code named by auto_map, and the custom_generate that generation would import."
    from medllm.models.chat import ModelChoice, load_chat_model
    for name in ("own.py", "custom_generate/generate.py"):
        (model/name).parent.mkdir(exist_ok=True)
        (model/name).write_text(f"open({str(tmp_path/'ran')!r}, 'w')\ndef generate(*a, **k): pass\nclass C: pass\n")
    edit(model/"config.json", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.C"})
    edit(model/"tokenizer_config.json", auto_map={"AutoTokenizer": ["own.C", "own.C"]})
    load_chat_model(ModelChoice(str(model)))                     # a known architecture: its own code is left alone
    edit(model/"config.json", model_type="theirs")
    loads(model, "wants to run code of its own")
    edit(model/"tokenizer_config.json", tokenizer_class="Theirs")
    tokenizer_of(model, "wants to run code of its own")
    assert not (tmp_path/"ran").exists()


def test_a_tokenizer_reads_no_file_that_its_configuration_names(model):
    from medllm.models.loading import load_tokenizer
    own = load_tokenizer(str(model)).get_vocab()
    (model.parent/"mine.txt").write_text("secret\nwords\n")
    edit(model/"tokenizer_config.json", **dict.fromkeys(
        ("tokenizer_file", "vocab_file", "merges_file", "gguf_file", "added_tokens_file"), str(model.parent/"mine.txt")))
    assert load_tokenizer(str(model)).get_vocab() == own
    (model/"tokenizer.json").unlink()
    tokenizer_of(model, "cannot be used")


def test_a_folder_with_a_model_and_an_adapter_is_neither(model, adapter):
    for name in ("adapter_config.json", "adapter_model.safetensors"): shutil.copy(adapter/name, model/name)
    from medllm.models.chat import ModelChoice, load_chat_model
    loads(model, "holds a model and an adapter")
    fails(lambda: load_chat_model(ModelChoice(str(model))), contains="holds a model and an adapter", exc=UserError)


def test_an_adapter_asks_the_network_for_nothing(adapter, model, tmp_path, no_network, monkeypatch, capsys):
    "Its file names a hub model: taken from the cache where it is, and named where it is not."
    from medllm.models.chat import ModelChoice, load_chat_model
    from medllm.models.reward_model import load_reward_model
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path/"hub"))
    edit(adapter/"adapter_config.json", base_model_name_or_path="clinic/base")
    for base in ("clinic/base", "https://x.org/base", "a/b/c", "../../model", ""):
        edit(adapter/"adapter_config.json", base_model_name_or_path=base)
        with pytest.raises(UserError): load_chat_model(ModelChoice(str(adapter)))
    edit(adapter/"adapter_config.json", base_model_name_or_path="clinic/base")
    fails(lambda: load_chat_model(ModelChoice(str(adapter))), contains="clinic/base, which is not on this machine", exc=UserError)
    edit(adapter/"adapter_config.json", task_type="SEQ_CLS")
    fails(lambda: load_reward_model(str(adapter)), contains="clinic/base, which is not on this machine", exc=UserError)
    edit(adapter/"adapter_config.json", task_type="CAUSAL_LM")
    hub_cache(tmp_path/"hub", model)
    load_chat_model(ModelChoice(str(adapter)))
    assert f"{adapter} is an adapter of clinic/base, as it says" in capsys.readouterr().err


def test_adapters_that_are_merged_below_are_named(adapter, tmp_path, capsys):
    from medllm.models.chat import ModelChoice, load_chat_model
    below = Path(shutil.copytree(adapter, tmp_path/"below"))
    (adapter/"merged_adapters.json").write_text(json.dumps([str(below)]))
    load_chat_model(ModelChoice(str(adapter)))
    assert f"with {below} merged into it" in capsys.readouterr().err


@pytest.mark.parametrize("text", ['[{"a": 1}]', '[1]', '{"a": 1}', '"x"', "[", "null", "["*100_000, '["owner/name"]', '[""]'])
def test_a_note_of_merged_adapters_is_a_list_of_folders(text, adapter):
    from medllm.models.chat import ModelChoice, load_chat_model
    (adapter/"merged_adapters.json").write_text(text)
    with pytest.raises(UserError): load_chat_model(ModelChoice(str(adapter)))


ADAPTERS = [
    ({"r": 10**9}, "a rank of 1000000000"), ({"r": 0}, "a rank of 0"), ({"r": -1}, "a rank of -1"),
    ({"r": "2"}, "r must be int"), ({"r": True}, "r must be int"), ({"r": [2]}, "r must be int"),
    ({"r": None}, "a rank of None"), ({"r": 4}, "a rank of 4"),
    ({"rank_pattern": {"q_proj": 10**9}}, "a rank of 1000000000"),
    ({"rank_pattern": [1]}, "rank_pattern must be dict"), ({"rank_pattern": {"(a+)+$": 2}}, "regular expression"),
    ({"exclude_modules": "(.*)*x"}, "regular expression"),
    ({"layers_pattern": "(a|aa)+$", "layers_to_transform": [0]}, "regular expression"),
    ({"lora_alpha": "x"}, "lora_alpha must be"), ({"lora_dropout": 7}, "probability"),
    ({"peft_type": "PROMPT_TUNING"}, "kind PROMPT_TUNING"), ({"peft_type": "x"}, "kind x"),
    ({"peft_type": None}, "kind None"), ({"peft_type": ["LORA"]}, "of the kind"),
    ({"init_lora_weights": "pissa"}, "base model's weights"),
    ({"init_lora_weights": "corda", "corda_config": {"cache_file": "/etc/passwd"}}, "is set"),
    ({"eva_config": {"rho": 1}}, "is set"), ({"layer_replication": [[0, 10**6]]}, "is set"),
    ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "is set"),
    ({"auto_mapping": {"base_model_class": "x"}}, "is set"), ({"use_qalora": True}, "is set"),
    ({"arrow_config": {"top_k": 1}}, "is set"), ({"trainable_token_indices": [0]*1000}, "is set"),
    ({"theirs": 1}, "theirs is set"), ({"target_modules": ["nothing"]}, "another model"),
    ({"target_modules": 3}, "target_modules must be"), ({"target_modules": [["q_proj"]]}, "must hold names"),
    ({"bias": "x"}, "cannot be used"), ({"modules_to_save": ["lm_head"]}, "another model"),
    ({"modules_to_save": "lm_head"}, "modules_to_save must be list"),
    ({"base_model_name_or_path": 3}, "must be text"), ({"task_type": "SEQ_CLS"}, "a reward model's adapter"),
    ({"use_dora": True}, "another model"), ({"use_rslora": "yes"}, "use_rslora must be bool")]


@pytest.mark.parametrize("fields, says", ADAPTERS, ids=[str(fields)[:60] for fields, _ in ADAPTERS])
def test_an_adapter_that_is_not_what_it_says(fields, says, adapter):
    from medllm.models.adapters import load_adapter
    from medllm.models.chat import ModelChoice, load_chat_model
    from medllm.models.loading import load_model
    edit(adapter/"adapter_config.json", **fields)
    def load():
        load_chat_model(ModelChoice(str(adapter)))
        load_adapter(load_model("tiny"), str(adapter))
    fails(load, contains=says, exc=UserError)


def test_layers_named_by_a_pattern_come_from_the_tensors(adapter):
    "A pattern that would be tried for ever is never tried."
    from medllm.models.adapters import load_adapter
    from medllm.models.loading import load_model
    edit(adapter/"adapter_config.json", target_modules="(.*.*.*.*.*.*.*.*.*.*)*[qv]_proj")
    model = load_adapter(load_model("tiny"), str(adapter))
    assert sum(".lora_A." in name for name, _ in model.named_parameters()) == 8


def broken_headers(whole):
    "Safetensors files whose header lies."
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:8 + size])
    name = next(n for n in header if n != "__metadata__")
    def made(**fields):
        text = json.dumps(header | {name: header[name] | fields}).encode()
        return len(text).to_bytes(8, "little") + text + whole[8 + size:]
    begin, end = header[name]["data_offsets"]
    return {"empty": b"", "seven bytes": whole[:7], "a header of 2^62": (2**62).to_bytes(8, "little") + whole[8:],
        "a header of 2^64": b"\xff"*8 + whole[8:], "no JSON": whole[:8] + b"["*size + whole[8 + size:], "cut": whole[:-1000],
        "cut in the header": whole[:200], "overlap": made(data_offsets=[begin + 4, end + 4]),
        "behind the end": made(data_offsets=[begin, 2**60]), "backwards": made(data_offsets=[end, begin]),
        "another shape": made(shape=[2**40, 2**40]), "a minus": made(shape=[-1]),
        "another type": made(dtype="F7"), "no list": made(shape="x"), "long": whole + b"x"}


def test_weights_with_a_broken_header(model, adapter):
    from medllm.models.adapters import load_adapter
    from medllm.models.loading import load_model
    base, weights, file = load_model("tiny"), model/"model.safetensors", adapter/"adapter_model.safetensors"
    for data in broken_headers(weights.read_bytes()).values():
        weights.write_bytes(data)
        loads(model, "cannot be used")
    for data in broken_headers(file.read_bytes()).values():
        file.write_bytes(data)
        fails(lambda: load_adapter(base, str(adapter)), contains="cannot be used", exc=UserError)


CONFIGS = [
    {"num_attention_heads": 0}, {"hidden_size": "64"}, {"num_hidden_layers": 10**9}, {"num_hidden_layers": -1},
    {"num_hidden_layers": 1e400}, {"model_type": "mixtral"}, {"model_type": "mixtral", "num_local_experts": 10**9},
    {"model_type": "gpt2"}, {"model_type": []}, {"model_type": "deepseek_v3"}, {"vocab_size": 10**12},
    {"hidden_size": 2**62}, {"intermediate_size": 10**12}, {"head_dim": 10**9}, {"hidden_act": "x"},
    {"hidden_act": None}, {"rope_parameters": {"rope_type": "x"}}, {"rope_parameters": 3}, {"dtype": "float1"},
    {"num_key_value_heads": 0}, {"quantization_config": {"quant_method": "x"}}, {"quantization_config": 3},
    {"architectures": 3}, {"text_config": {"num_hidden_layers": 10**9}}, {"rms_norm_eps": "x"},
    {"layer_types": ["x"]*10**6}, {"torch_dtype": "float64; x"}]


@pytest.mark.parametrize("fields", CONFIGS, ids=[str(fields)[:60] for fields in CONFIGS])
def test_a_configuration_that_fits_no_weights(fields, model):
    "In words, at once, and without the memory that it describes."
    from medllm.models.loading import load_model
    edit(model/"config.json", **fields)
    began = time.monotonic()
    try: load_model(str(model))
    except UserError as e: assert "\n" not in str(e)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("fields", [{"_attn_implementation": "owner/kernel"}, {"attn_implementation": "owner/kernel@v1:f"},
    {"attn_implementation": {"": "owner/kernel"}}, {"_attn_implementation": "paged|owner/kernel"}], ids=range(4))
def test_a_configuration_has_no_kernel_fetched(fields, model, monkeypatch):
    from transformers.integrations import hub_kernels
    monkeypatch.setattr(hub_kernels, "load_and_register_attn_kernel", lambda *args, **options: pytest.fail("fetched"))
    edit(model/"config.json", **fields)
    loads(model, "code from elsewhere and is not run")


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_that_are_not_quantised_are_not_said_to_be(bits, model):
    pytest.importorskip("bitsandbytes")
    edit(model/"config.json", quantization_config={"quant_method": "bitsandbytes", f"load_in_{bits}bit": True})
    loads(model, "take quantization_config out")


TORN = {"cut off": '{"eos_token_id": 4', "no JSON": "x", "empty": "", "another encoding": '{"é": 1}'.encode("latin-1"),
    "too deep": "["*100_000, "a zero behind": "{}\0"}


@pytest.mark.parametrize("how", TORN)
@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_a_settings_file_is_read_or_named(name, how, model):
    "transformers passes over a torn generation_config.json, and the model would not know where its answers end."
    (model/name).write_bytes(data if isinstance(data := TORN[how], bytes) else data.encode())
    loads(model, f"{model/name}")
    tokenizer_of(model, f"{model/name}")


@pytest.mark.parametrize("name, text", [("generation_config.json", text) for text in (
    "[]", '{"eos_token_id": ' + "9"*5000 + "}", '{"eos_token_id": "4"}', '{"eos_token_id": [4, 0.5]}', '{"temperature": "hot"}',
    '{"eos_token_id": 1e400}', '{"pad_token_id": {"a": 1}}', '{"do_sample": 3}')] + [("tokenizer_config.json", text) for text in (
    "[]", '{"eos_token": 4}', '{"bos_token": ["a"]}', '{"model_max_length": "long"}', '{"tokenizer_class": {"a": 1}}')])
def test_a_field_of_settings_is_of_its_kind_or_named(name, text, model):
    (model/name).write_text(text)
    loads(model, f"{model/name}: a field is of another kind")


TOKENIZERS = {
    "two of one id": (lambda t: t["model"]["vocab"].update(dict.fromkeys(list(t["model"]["vocab"])[-2:], 300)), "the same id"),
    "a far id": (lambda t: t["model"]["vocab"].update(dict.fromkeys(list(t["model"]["vocab"])[-1:], 2**31)), "an id is"),
    "lost merges": (lambda t: t["model"].update(merges=[["a", "nowhere"]]), "out of vocabulary"),
    "a long normaliser": (lambda t: t.update(
        normalizer={"type": "Replace", "pattern": {"String": "a"}, "content": "a"*1000}), "far longer"),
    "a long prefix": (lambda t: t.update(normalizer={"type": "Prepend", "prepend": "a"*1000}), "its normaliser makes"),
    "a long decoder": (lambda t: t.update(decoder={"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "a"}, "content": "a"*1000}]}), "its decoder makes"),
    "a long frame": (lambda t: t.update(post_processor={"type": "TemplateProcessing", "pair": [],
        "single": [{"SpecialToken": {"id": "A", "type_id": 0}}]*10_000 + [{"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"A": {"id": "A", "ids": [0]*10_000, "tokens": ["x"]*10_000}}}), "more than 64 control tokens"),
    "no pattern": (lambda t: t.update(
        pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a|"}, "behavior": "Isolated", "invert": False}), ""),
    "empty": (lambda t: t.clear(), ""), "no model": (lambda t: t.pop("model"), "")}


@pytest.mark.parametrize("how", TOKENIZERS)
def test_a_tokenizer_that_cannot_be_one(how, model):
    text, (change, says) = json.loads((model/"tokenizer.json").read_text()), TOKENIZERS[how]
    change(text)
    (model/"tokenizer.json").write_text(json.dumps(text))
    tokenizer_of(model, says)


def test_a_pattern_that_panics_is_a_sentence_without_the_text(model):
    "The regular expressions of tokenizers end in a PanicException, which is no Exception, when they are tried too long."
    from medllm.data.formats import Example, Turn
    from medllm.data.tokens import Renderer
    from medllm.models.loading import load_tokenizer
    text = json.loads((model/"tokenizer.json").read_text())
    step = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
    text["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [step, text["pre_tokenizer"]]}
    (model/"tokenizer.json").write_text(json.dumps(text))
    renderer = Renderer(load_tokenizer(str(model)), "auto")
    with pytest.raises(UserError) as refused: renderer.encode([Example((Turn("user", "x"*40 + "!"), Turn("assistant", "b")))])
    assert "tokenizer.json" in str(refused.value) and "xxx" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "[", "{", '{"model": ' + "["*100_000, "\0", "null"])
def test_a_tokenizer_that_is_no_json_is_named(text, model):
    (model/"tokenizer.json").write_text(text)
    tokenizer_of(model, "tokenizer.json")


@pytest.mark.parametrize("name", ["x"*300, "x"*300 + "/y", "a/"*3000, "x\0y", "~nobody-of-this-name/x"])
def test_a_model_has_a_name_that_the_system_knows(name, adapter):
    from medllm.models.chat import ModelChoice, load_chat_model
    from medllm.models.loading import load_model
    with pytest.raises(UserError): load_model(name)
    edit(adapter/"adapter_config.json", base_model_name_or_path=name)
    with pytest.raises(UserError): load_chat_model(ModelChoice(str(adapter)))


def test_a_configuration_says_which_field_is_wrong(model):
    edit(model/"config.json", hidden_size="64")
    loads(model, "'hidden_size' expected int, got str")
    edit(model/"config.json", hidden_size=64)
    loads(model, "shapes that config.json describes")


def test_the_record_names_what_a_run_starts_from_by_its_hash(model, tmp_path):
    from medllm.experiment.launch import consumed
    from medllm.train.arguments import parse
    args = parse({"model_name_or_path": str(model), "dataset": "mm", "output_dir": str(tmp_path/"out")})
    assert len(consumed(args)[0]["weights"]["model.safetensors"]) == 64
    shutil.move(model/"model.safetensors", model/"weights.bin")
    fails(lambda: consumed(args), contains="holds no .safetensors file", exc=UserError)


# ---- chat templates

CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
LOOP = "{% for x in range(99999) %}"
END = "{% endfor %}"
HOSTILE = {
    "nested loops": LOOP*3 + "x" + END*3, "loops without output": LOOP*2 + END*2, "a long text": "{{ 'a'*10**10 }}",
    "a long list": "{{ [0]*10**10 }}", "a power": "{{ 9**(9**9) }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "macros in macros": "{% macro m0() %}x{% endmacro %}" + "".join(
        f"{{% macro m{n} () %}}{{{{ m{n - 1}() }}}}{{{{ m{n - 1}() }}}}{{% endmacro %}}" for n in range(1, 40)) + "{{ m39() }}",
    "doubling": "{% set ns = namespace(s='a') %}" + LOOP + "{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s|length }}",
    "blocks in blocks": "{% set a %}x{% endset %}" + "{% set a %}{{ a }}{{ a }}{% endset %}"*40 + "{{ a|length }}",
    "a huge range": "{{ range(10**9)|list|length }}", "format": "{{ '%1000000000000d' % 1 }}",
    "filter format": "{{ '%*d'|format(10**12, 1) }}", "method format": "{{ '{:>1000000000000}'.format(1) }}",
    "center": "{{ 'a'|center(10**12) }}", "ljust": "{{ 'a'.ljust(10**12) }}",
    "batch": "{{ [1]|batch(10**9, 'x')|list|length }}", "slice": "{{ [1]|slice(10**9)|list|length }}",
    "indent": "{{ 'a\n'*999|indent(10**9) }}", "tojson": "{{ {'a': [1]*999}|tojson(indent=10**8) }}",
    "join": "{{ ('x'*10**5)|list|join('y'*10**5)|length }}",
    "replace": "{{ ('x'*10**5).replace('', 'y'*10**5)|length }}", "lipsum": "{{ lipsum(n=10**7) }}",
    "expandtabs": "{{ '\t'.expandtabs(10**12) }}", "deep": "{{ " + "("*3000 + "1" + ")"*3000 + " }}",
    "deep loops": "{% for x in [1] %}"*400 + END*400, "deep lists": "{{ " + "["*5000 + "]"*5000 + " }}",
    "output": LOOP + "{{ 'a'*1000 }}" + END, "header": "{% if add_generation_prompt %}{{ '\n'*10**6 }}{% endif %}",
    "an odd conversation": "{% if messages|length > 1 %}{{ messages[9].content }}{% endif %}{{ 1/0 }}",
    "no template": "{% for", "a file": "{% include '/etc/passwd' %}{% import '/etc/passwd' as x %}",
    "insides": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "words": "{{ ('a '*30000 + '!')|urlize|length }}{{ ('a'*10**5)|wordwrap(1)|length }}" + LOOP*2 + END*2}


@pytest.fixture
def bounded(model):
    "Loads the model's tokenizer with a template, and binds it."
    from medllm.data.tokens import Renderer
    from medllm.models.loading import load_tokenizer
    def bind(template):
        (model/"chat_template.jinja").write_text(template)
        return Renderer(load_tokenizer(str(model)), "auto")
    return bind


SLOW = ("loops without output", "macros in macros", "slice", "words")    # a second of computing each, as two others


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow) if k in SLOW else k for k in HOSTILE])
def test_a_hostile_template_is_refused_while_it_is_loaded(kind, bounded):
    "In words, soon, and in the memory that this process has anyway."
    def kib(): return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    began, before = time.process_time(), kib()
    fails(lambda: bounded(CHATML + HOSTILE[kind]), contains="template", exc=UserError)
    assert time.process_time() - began < 5 and kib() - before < 2**18


def test_a_template_that_is_hostile_to_one_conversation_only(bounded):
    "It passes while it is loaded, and is stopped later: once, not for each row."
    from medllm.data.formats import Example, Turn
    renderer = bounded(CHATML + "{% if messages|length > 4 %}" + LOOP*2 + END*2 + "{% endif %}")
    turns = [Turn(role, "Fever?") for role in ("user", "assistant")*3]
    assert len(renderer.encode([Example(tuple(turns[:4]))])) == 1
    for _ in range(50): fails(lambda: renderer.encode([Example(tuple(turns))]), contains="takes too long", exc=UserError)


def test_a_template_sees_no_environment_and_no_files(bounded, monkeypatch):
    from medllm.data.jinja import _end, write_bounded
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    _end()
    shown = "{% for name in self.__init__.__globals__ if false %}{% endfor %}{{ cycler.__init__.__globals__ }}"
    with pytest.raises(ValueError): write_bounded(shown, {"messages": []})
    from medllm.data.jinja import _writer
    assert b"hf_secret" not in Path(f"/proc/{_writer().process.pid}/environ").read_bytes()


def test_the_process_that_writes_templates_ends_with_its_parent(tmp_path):
    "Killed, too."
    code = ("from medllm.data.jinja import _writer, write_bounded\nimport os, signal\nprint(write_bounded('{{ 1 + 1 }}', {}), "
        "_writer().process.pid, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)")
    done = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT))
    two, pid = done.stdout.split()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline: time.sleep(.05)
    assert two == "2" and not Path(f"/proc/{pid}").exists()


def test_a_process_that_was_forked_has_a_writer_of_its_own():
    from medllm.data.jinja import _writer, write_bounded
    assert write_bounded("{{ 1 + 1 }}", {}) == "2"
    mine, (near, far) = _writer().process.pid, os.pipe()
    if not (child := os.fork()):
        os.write(far, f"{write_bounded('{{ 2 + 2 }}', {})} {_writer().process.pid}".encode())
        os._exit(0)
    os.waitpid(child, 0)
    four, other = os.read(near, 100).decode().split()
    assert four == "4" and int(other) != mine and write_bounded("{{ 3 + 3 }}", {}) == "6" and _writer().process.pid == mine


def test_a_published_template_is_written_as_transformers_writes_it(shared, tiny):
    "Every text and every refusal, with system texts, thoughts, tools and calls."
    from medllm.data.jinja import write_bounded
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1, "b": [None, True, "é\u2028"]}}}
    said = lambda role, content, **more: {"role": role, "content": content, **more}
    chat = [said("system", "S"), said("user", " U\n"), said("assistant", "A"), said("user", "V"),
        said("assistant", "", tool_calls=[call]), said("tool", "T"), said("assistant", "end")]
    function = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
    tools = [{"type": "function", "function": function}]
    def told(write):
        try: return write()
        except Exception: return None
    files = sorted(shared("chat_templates").glob("*.jinja"))
    for text in [f.read_text(encoding="utf-8") for f in files]:
        for messages, given, generate in itertools.product((chat, chat[1:3], chat[:2]), (None, tools), (False, True)):
            theirs = told(lambda: tiny.apply_chat_template(messages, tools=given, chat_template=text, tokenize=False,
                add_generation_prompt=generate))
            ours = told(lambda: write_bounded(text, {"messages": messages, "tools": given, "documents": None,
                "add_generation_prompt": generate} | tiny.special_tokens_map))
            assert ours == theirs
    assert len(files) > 10


@pytest.mark.parametrize("template, says", [({"a": "x", "b": "y"}, "several chat templates"), (3, ""), ([3], ""), (["x"], ""),
    ([{"name": "a", "template": 3}], ""), ({"default": 3}, "no text")], ids=str)
def test_a_template_that_is_no_text(template, says, model):
    from medllm.data.tokens import Renderer
    from medllm.models.loading import load_tokenizer
    (model/"chat_template.jinja").unlink(missing_ok=True)
    edit(model/"tokenizer_config.json", chat_template=template)
    fails(lambda: Renderer(load_tokenizer(str(model)), "auto"), contains=says, exc=UserError)
