"""Exported models answer as the trained one does: merged, quantised, as GGUF; and what does not is not exported."""
import importlib
import json
import os
import shutil
import signal
import sys
import subprocess
import time

import pytest
import torch
from commands import BIN, ROOT, run, start, wait

from medllm.cli.main import main
from medllm.core import UserError
from medllm.data.formats import Turn
from medllm.data.tokens import Renderer
from medllm.models.adapters import AdaptPlan, adapt
from medllm.models.chat import ChatModel, ModelChoice, load_chat_model
from medllm.models.loading import load_model
from medllm.models.sampling import Sampling
from medllm.export import export as exporting
from medllm.export.equivalence import distance, fixed_questions, forward_of, reference_of
from medllm.export.export import ExportPlan, export
from medllm.export.gguf import write_gguf
from medllm.models.gguf_model import read_gguf, word_splitter
from medllm.export.merge import merge, stored_dtype, write_model
from medllm.export.ollama import modelfile

QUIET = lambda text: None
NASTY = ("12345678 mg/dL, 3.5×10⁹/L", "  two  blanks\n\n\tand a tab ", "高血压患者平时应该注意什么？100毫克",
    "naïve café — “quoted”", "مرحبا ١٢٣", "don't we'll I'VE", "👩‍⚕️🩺 e\u0301", "a" * 40, "<|im_end|>", "x<s>y")


def adapter(folder, seed=0, std=0.3, base="tiny", **how):
    "Save an adapter that changes what a model says."
    torch.manual_seed(seed)
    tuned = adapt(load_model(str(base)), AdaptPlan("lora", **how))
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "lora_B" in name: torch.nn.init.normal_(p, std=std)
            if "magnitude" in name: p.mul_(1 + 0.1*torch.randn_like(p))
    tuned.save_pretrained(folder)
    return str(folder)


def made_folder(folder):
    folder.mkdir()
    return folder


def verdicts(report): return {v["artefact"]: v for v in report["verdicts"]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "An adapter trained on a base in 4 bit."
    from medllm.train.arguments import parse
    from medllm.train.inputs import prepare_data
    from medllm.train.loop import train
    folder = tmp_path_factory.mktemp("trained")/"adapter"
    args = parse(dict(model_name_or_path="tiny", dataset="mm", finetuning_type="lora", quantization_bit=4, max_samples=48,
        max_steps=30, learning_rate=5e-3, output_dir=str(folder), per_device_train_batch_size=8, cutoff_len=192))
    train(args, prepare_data(args))
    return folder


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    "Everything that can be made of it, as the command makes it."
    folder = tmp_path_factory.mktemp("exported")/"model"
    code = main(["export", "--model_name_or_path", str(trained), "--quantization_bit", "4", "--output", str(folder),
        "--max_shard_size", "4MB", "--bits", "8", "4", "--gguf", "f16", "q8_0", "--max_new_tokens", "12"])
    assert code == 0
    return folder


@pytest.mark.smoke
def test_a_merge_gives_the_same_logits_and_answers(exported):
    "float32: logits within 1e-4, all tokens of 50 greedy answers, after training in 4 bit."
    report = json.loads((exported/"equivalence.json").read_text())
    merged = verdicts(report)["merged"]["measures"]
    assert report["passed"] and report["made"]["answers"] == 50
    assert merged["logit"] <= 1e-4 and merged["agreement"] == merged["answers"] == 1.0
    assert merged["kept"] > 0.999, "the adapter is in it"
    assert verdicts(report)["base without the adapter"]["measures"]["kl"] > 1e-3, "and it did something"


def test_training_in_4_bit_is_merged_onto_16_bit(trained, exported, tmp_path):
    "The base that the adapter was trained on is reported; the merge is onto the whole weights, in 16 bit too."
    found = verdicts(json.loads((exported/"equivalence.json").read_text()))
    seen = found["adapter on the base in 4 bit"]
    assert not seen["limits"] and 0 < seen["measures"]["kl"] < found["base without the adapter"]["measures"]["kl"]
    chat = merge(load_chat_model(ModelChoice("tiny", str(trained))))
    there = load_chat_model(ModelChoice(str(exported)))
    for (name, a), (other, b) in zip(chat.model.named_parameters(), there.model.named_parameters()):
        assert name == other and torch.equal(a, b)
    choice = ModelChoice(str(trained), quantization_bit=4)
    report = export(ExportPlan(tmp_path/"half", choice, "bfloat16", answers=6, max_new_tokens=8), log=QUIET)
    assert report["passed"] and stored_dtype(str(tmp_path/"half")) == "bfloat16"
    assert verdicts(report)["merged"]["measures"]["kept"] > 0.9


@pytest.mark.smoke
def test_gguf_keeps_the_tokens(exported):
    "f16: at least 99% of the tokens, read back by transformers; token ids of the questions are the same."
    found = verdicts(json.loads((exported/"equivalence.json").read_text()))
    assert found["gguf-f16"]["measures"]["agreement"] >= 0.99 and found["gguf-f16"]["measures"]["tokens"] >= 400
    assert found["gguf-q8_0"]["measures"]["kl"] < 1e-3
    for kind in ("f16", "q8_0"): assert found[f"gguf-{kind}, tokens"]["measures"]["agreement"] == 1.0
    small, large = ((exported/f"gguf/model-{kind}.gguf").stat().st_size for kind in ("q8_0", "f16"))
    assert small < 0.65*large


def test_llama_cpp_runs_it(exported):
    "llama.cpp gives the same logits, cuts text into the same tokens and asks through the same template."
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: it is built from source")
    found = verdicts(json.loads((exported/"equivalence.json").read_text()))
    assert found["gguf-f16, llama.cpp"]["measures"]["agreement"] >= 0.99
    llama = llama_cpp.Llama(str(exported/"gguf/model-f16.gguf"), n_ctx=256, verbose=False)
    chat = load_chat_model(ModelChoice(str(exported)))
    for text in (*NASTY, *fixed_questions(20)):
        ours = chat.tokenizer(text, add_special_tokens=False).input_ids
        assert llama.tokenize(text.encode(), add_bos=False, special=True) == ours, text
    for question in fixed_questions(4):
        said = llama.create_chat_completion([{"role": "user", "content": question}], max_tokens=8, temperature=0.0)
        prompt = chat.prompt([Turn("user", question)])
        assert said["usage"]["prompt_tokens"] == len(prompt)
        assert said["choices"][0]["message"]["content"].strip() == chat.answers([prompt], Sampling(8, 0.0))[0].text


def test_others_open_the_folder(exported):
    "transformers alone, as vLLM and transformers serve do: shards, template, stop tokens; and the quantised folders."
    from transformers import AutoModelForCausalLM, AutoTokenizer
    assert len(list(exported.glob("model-*.safetensors"))) > 1 and (exported/"chat_template.jinja").exists()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    chat = load_chat_model(ModelChoice(str(exported)))
    for question in fixed_questions(3):
        turns = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
        assert ids["input_ids"][0].tolist() == chat.prompt([Turn("user", question)]).tolist()
        out = model.generate(**ids, max_new_tokens=8)[0, ids["input_ids"].shape[1]:].tolist()
        assert out == chat.answers([ids["input_ids"][0].numpy()], Sampling(8, 0.0))[0].tokens
    assert model.generation_config.eos_token_id in (chat.renderer.stop_ids, chat.renderer.stop_ids[0])
    for bits in (8, 4):
        small = load_chat_model(ModelChoice(str(exported/f"bnb-{bits}bit")))
        assert small.model.is_quantized and small.answers([chat.prompt([Turn("user", "?")])], Sampling(4, 0.0))


def test_the_card_says_what_was_found(exported):
    from huggingface_hub import ModelCard
    card = ModelCard.load(exported/"README.md")
    assert card.data.library_name == "transformers" and "no medical advice" in card.text
    for artefact in ("merged", "bnb-4bit", "gguf-q8_0"): assert f"| {artefact} | within the limit" in card.text
    assert "equivalent" not in card.text
    assert str(exported.parent) not in card.content + (exported/"equivalence.json").read_text(), "no folder of this machine"


@pytest.mark.parametrize("how", [dict(rslora=True), dict(dora=True), dict(extra="lm_head"), dict(target="q_proj,down_proj")],
    ids=str)
def test_every_kind_of_adapter_is_merged(how, tmp_path):
    choice = ModelChoice("tiny", adapter(tmp_path/"adapter", **how))
    found = verdicts(export(ExportPlan(tmp_path/"model", choice, answers=4, max_new_tokens=8), log=QUIET))
    merged = found["merged"]["measures"]
    assert found["merged"]["passed"] and merged["logit"] <= 1e-4 and merged["answers"] == 1 and merged["kept"] > 0.999
    assert found["base without the adapter"]["measures"]["kl"] > 1e-3


def test_a_chain_of_adapters_is_merged(tmp_path):
    "The second adapter was trained on the base with the first; leaving out the first is another model."
    first = adapter(tmp_path/"first", seed=1)
    base = merge(load_chat_model(ModelChoice("tiny", first)))
    write_model(base, made_folder(tmp_path/"base"))
    second = adapter(tmp_path/"second", seed=2, base=tmp_path/"base")
    wanted = load_chat_model(ModelChoice(str(tmp_path/"base"), second))
    chain = ModelChoice("tiny", f"{first},{second}")
    report = export(ExportPlan(tmp_path/"model", chain, answers=4, max_new_tokens=8), log=QUIET)
    assert report["passed"] and [a["name"] for a in report["made"]["adapters"]] == ["first", "second"]
    said = reference_of(wanted, fixed_questions(4), 8)
    assert distance(said, forward_of(load_model(str(tmp_path/"model"))))["logit"] <= 1e-4
    export(ExportPlan(tmp_path/"other", ModelChoice("tiny", second), answers=1, max_new_tokens=2), log=QUIET)
    assert distance(said, forward_of(load_model(str(tmp_path/"other"))))["logit"] > 1e-2


def _left_out(model): model.load_state_dict(load_model("tiny").state_dict())
def _up(model): return model.model.layers[2].mlp.up_proj.weight.data
def _keys(model): return model.model.layers[1].self_attn.k_proj.weight.data
def _one_layer(model): _up(model).copy_(_up(load_model("tiny")))
def _scaled(model): model.model.layers[0].self_attn.v_proj.weight.data.mul_(1.02)
def _swapped(model): _keys(model).copy_(_keys(model).flip(0))
def _shifted(model): model.lm_head.weight.data.copy_(model.lm_head.weight.roll(1, 0))


@pytest.mark.parametrize("dtype,harm", [("float32", h) for h in (_left_out, _one_layer, _scaled, _swapped)] + [
    ("bfloat16", h) for h in (_left_out, _shifted)], ids=lambda x: getattr(x, "__name__", x).strip("_"))
def test_a_corrupted_merge_fails(dtype, harm, tmp_path, monkeypatch, capsys):
    "Exit code 1, no folder, a report that says which measure broke; the folder that was there stays."
    choice, real = adapter(tmp_path/"adapter", std=0.05 if harm is _left_out else 0.3), merge
    words = ["export", "--adapter_name_or_path", choice, "--output", str(tmp_path/"model"), "--answers", "3",
        "--max_new_tokens", "6", "--dtype", dtype]
    before = b'{"of": "an earlier export"}'
    (made_folder(tmp_path/"model")/"equivalence.json").write_bytes(before)

    def corrupted(chat):
        made = real(chat)
        harm(made.model)
        return made
    monkeypatch.setattr(exporting, "merge", corrupted)
    assert main([*words, "--overwrite"]) == 1
    assert (tmp_path/"model/equivalence.json").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "model", "model.failed"]
    assert sorted(p.name for p in (tmp_path/"model.failed").iterdir()) == ["equivalence.json", "equivalence.md"]
    report = json.loads((tmp_path/"model.failed/equivalence.json").read_text())
    assert not report["passed"] and verdicts(report)["merged"]["broken"]
    assert "is not within its limits of the trained model" in capsys.readouterr().err


def test_within_the_limit_is_not_called_the_same(tmp_path, monkeypatch, capsys):
    "Quantised weights within their limit of KL that choose other words in most answers: limit, figure, share."
    real = exporting.greedy
    def other_words(chat, prompts, tokens):
        said = real(chat, prompts, tokens)
        return said[:1] + [[7, *answer] for answer in said[1:]] if getattr(chat.model, "is_quantized", False) else said
    monkeypatch.setattr(exporting, "greedy", other_words)
    folder = tmp_path/"model"
    assert main(["export", "--output", str(folder), "--bits", "8", "--answers", "4", "--max_new_tokens", "4"]) == 0
    terminal, report = capsys.readouterr(), json.loads((folder/"equivalence.json").read_text())
    kl = verdicts(report)["bnb-8bit"]["measures"]["kl"]
    assert f"bnb-8bit: within the limit: kl {kl:.2g} (at most 0.05); 25.0% of the answers are the same" in terminal.err
    for text in (terminal.out, (folder/"README.md").read_text()):
        assert "| bnb-8bit | within the limit (kl ≤ 0.05) |" in text and "| 25.0% |" in text
        assert "of the greedy answers, word for word the trained model's are 25% (bnb-8bit)." in text
        assert "equivalent" not in text + terminal.err


def test_a_lost_file_format_fails(tmp_path, monkeypatch):
    "A GGUF file with queries in the wrong order loads and talks; the check says no."
    from medllm.export import gguf_families
    monkeypatch.setattr(gguf_families, "_interleaved", lambda rows, heads: rows)
    choice = ModelChoice("tiny", adapter(tmp_path/"adapter"))
    plan = ExportPlan(tmp_path/"model", choice, gguf=("f16",), answers=3, max_new_tokens=6)
    report = export(plan, log=QUIET)
    assert not report["passed"] and verdicts(report)["merged"]["passed"] and verdicts(report)["gguf-f16"]["broken"]
    assert not plan.place.exists()


def test_a_wrong_template_fails(tmp_path, monkeypatch):
    from medllm.export import merge as merging
    monkeypatch.setattr(merging, "template_text", lambda renderer: renderer.jinja.replace("assistant\\n", "assistant"))
    report = export(ExportPlan(tmp_path/"model", ModelChoice("tiny"), answers=2, max_new_tokens=2), log=QUIET)
    assert verdicts(report)["prompts"]["broken"] == ["agreement"] and not (tmp_path/"model").exists()


def test_options_of_the_template_travel(tmp_path):
    choice = ModelChoice("tiny", template="qwen3", default_system="Answer in one sentence.", enable_thinking=False)
    report = export(ExportPlan(tmp_path/"model", choice, gguf=("q8_0",), answers=2, max_new_tokens=2), log=QUIET)
    assert verdicts(report)["prompts"]["passed"]
    text = (tmp_path/"model/gguf/Modelfile").read_text()
    assert "Answer in one sentence." in text and "</think>" in text and 'PARAMETER stop "<|im_end|>"' in text


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, id="term"),
    pytest.param(signal.SIGKILL, id="kill", marks=pytest.mark.slow)])
def test_stopped_in_the_middle_there_is_no_folder(number, tmp_path):
    process, told = start("medllm", "export", "--output", tmp_path/"out/model", "--answers", "100", "--max_new_tokens", "200",
        err=tmp_path/"told"), tmp_path/"told"
    wait(lambda: "asking" in told.read_text(), process)
    time.sleep(0.5)
    process.send_signal(number)
    code, left = process.wait(60), [p.name for p in (tmp_path/"out").iterdir()]
    if number == signal.SIGTERM: assert code == 75 and "nothing was exported" in told.read_text() and left == []
    else: assert code == -9 and "model" not in left


@pytest.fixture
def small_files():
    "Lets no file grow beyond a number of bytes: the system refuses the write in the middle of it, as a full disk does."
    import resource
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size,more", [(1000, ()), (300_000, ()), (3_000_000, ("--gguf", "f16", "--max_shard_size", "2MB"))])
def test_a_full_disk_is_one_sentence(size, more, tmp_path, small_files, capfd):
    "Whoever was writing, Python, safetensors or gguf: nothing is left, and what was there before stays."
    words = ["export", "--output", str(tmp_path/"model"), "--answers", "1", "--max_new_tokens", "2", *more]
    assert main(words[:7]) == 0
    before = {f.name: f.read_bytes() for f in (tmp_path/"model").iterdir()}
    capfd.readouterr()
    small_files(size)
    assert main([*words, "--overwrite"]) == 2
    small_files(2**40)
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert len(told) == 1 and "nothing was exported" in told[0] and "make room" in told[0], told
    assert [f.name for f in tmp_path.iterdir()] == ["model"]
    assert {f.name: f.read_bytes() for f in (tmp_path/"model").iterdir()} == before


def test_what_a_killed_export_left_is_taken_away(tmp_path):
    "Its hidden copy goes with the next export to that place; a folder it had just moved aside comes back first."
    plan = dict(choice=ModelChoice("tiny"), answers=1, max_new_tokens=2)
    export(ExportPlan(str(tmp_path/"model"), **plan), log=QUIET)
    for name in (".model.part-abcd1234", ".model.part-abcd1235/gguf"): (tmp_path/name).mkdir(parents=True)
    (tmp_path/".model.part-abcd1234/model.safetensors").write_bytes(bytes(1000))
    mine = [tmp_path/".model-backup", tmp_path/".models.part-abcd1234"]
    for folder in mine: folder.mkdir()
    (tmp_path/"model").rename(tmp_path/".model.old-abcd1234")
    with pytest.raises(UserError, match="exists already"): export(ExportPlan(str(tmp_path/"model"), **plan), log=QUIET)
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted(["model", *(f.name for f in mine)])
    (tmp_path/".model.part-abcd1236").mkdir()
    assert export(ExportPlan(str(tmp_path/"model"), overwrite=True, **plan), log=QUIET)["passed"]
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted(["model", *(f.name for f in mine)])


@pytest.mark.parametrize("words,said", [
    (["--output", "{there}"], "exists already"),
    (["--output", "{there}", "--overwrite"], "was not written by medllm export"),
    (["--output", "{new}", "--gguf", "q4"], "must be one of f16, q8_0"),
    (["--output", "{new}", "--limit", "merged=1"], "no such artefact"),
    (["--output", "{new}", "--max_shard_size", "5"], "--max_shard_size 5"),
    (["--output", "{new}", "--dtype", "int4"], "--dtype int4"),
    (["--output", "{new}", "--adapter_name_or_path", "{there}"], "is not an adapter"),
    (["--output", "{new}", "--record", "{there}"], "no run.json"),
    (["--output", "{new}", "--evaluation", "{there}"], "no result of an evaluation"),
    (["--output", "{new}", "--answers", "1000"], "ask for fewer")])
def test_mistakes_are_one_sentence(words, said, tmp_path, capsys):
    there = tmp_path/"there"
    there.mkdir()
    (there/"notes.txt").write_text("mine")
    assert main(["export", *(w.format(there=there, new=tmp_path/"new") for w in words)]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(error) == 1 and said in error[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["there"] and (there/"notes.txt").read_text() == "mine"


def test_help_teaches():
    done = run("medllm", "export", "--help")
    assert done.returncode == 0 and all(text in done.stdout for text in ("examples", "what is checked", "ollama create"))


def test_k_quants_need_llama_cpp_and_say_so_first(tmp_path, monkeypatch):
    import shutil
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="put its llama-quantize on the PATH"): ExportPlan(tmp_path/"x", gguf=("q4_k_m",))


@pytest.mark.slow
def test_a_tuned_smol_in_four_bits_runs_in_llama_cpp(tmp_path):
    "Trained, exported as q4_k_m, and asked ten questions; the prompt of each way is ours token for token."
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make llama_cpp builds it")
    from medllm.export.ollama import slots_of
    done = run("medllm", "train", "--stage", "sft", "--model_name_or_path", "smol", "--dataset", "mm_english", "--learning_rate",
        "5e-4", "--max_steps", "20", "--output_dir", tmp_path/"tuned", timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    done = run("medllm", "export", "--model_name_or_path", tmp_path/"tuned", "--output", tmp_path/"model", "--gguf", "q4_k_m",
        "--answers", "10", "--max_new_tokens", "16", timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    file, chat = tmp_path/"model/gguf/model-q4_k_m.gguf", load_chat_model(ModelChoice(str(tmp_path/"tuned")))
    assert file.stat().st_size < 120e6 and not list(file.parent.glob("*.16-bit"))
    llama, slots = llama_cpp.Llama(str(file), n_ctx=512, verbose=False), slots_of(chat.renderer)
    questions = [q for q in fixed_questions(40) if q.isascii()][:10]
    for question in questions:
        prompt = chat.prompt([Turn("user", question)]).tolist()
        text = slots[" ", "u"] + question + slots["u", ">"]                      # what the Modelfile's template writes
        assert llama.tokenize(text.encode(), add_bos=False, special=True) == prompt
        said = llama.create_chat_completion([{"role": "user", "content": question}], max_tokens=40, temperature=0.0)
        assert said["usage"]["prompt_tokens"] == len(prompt)                     # what the file's own template writes
        assert len(said["choices"][0]["message"]["content"].split()) > 3
    assert len(questions) == 10


# Families and tokenizers of GGUF files

def pieces(blank=True):
    "A tokenizer of the Llama-2 kind, or Gemma's, without a blank in front: BPE over SentencePiece's blanks, and single bytes."
    from tokenizers import Tokenizer, models, normalizers, decoders, processors, trainers
    from transformers import PreTrainedTokenizerFast
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([*[normalizers.Prepend("▁")]*blank, normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        *[decoders.Strip(" ", 1, 0)]*blank])
    control = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "<|im_start|>", "<|im_end|>"]
    texts = json.loads((ROOT/"data/mm.json").read_text(encoding="utf-8"))
    backend.train_from_iterator([w for t in texts for w in (t["instruction"] + " " + t["output"]).split()], trainers.BpeTrainer(
        vocab_size=3000, special_tokens=control, show_progress=False))
    spec = json.loads(backend.to_str())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if not t["content"].startswith("<0x")]
    backend = Tokenizer.from_str(json.dumps(spec))
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def words_like(name):
    "Byte-level BPE with the rule for words of a family."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = word_splitter(name, "a test")
    backend.decoder = decoders.ByteLevel()
    texts = json.loads((ROOT/"data/mm.json").read_text(encoding="utf-8"))
    backend.train_from_iterator([t["instruction"] + " " + t["output"] for t in texts], trainers.BpeTrainer(vocab_size=3000,
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def some_model(family, tokenizer):
    "A small random model of a family."
    from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
    sizes = dict(vocab_size=len(tokenizer) + 5, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.eos_token_id)
    scaled = dict(rope_theta=10000.0, factor=4.0, original_max_position_embeddings=64)
    config = {"llama": LlamaConfig(**sizes, rms_norm_eps=1e-5), "wide": LlamaConfig(**sizes, head_dim=32),
        "llama3": LlamaConfig(
            **sizes, rope_parameters=scaled | dict(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0)),
        "linear": LlamaConfig(**sizes, rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=4.0)),
        "yarn": Qwen2Config(**sizes, rope_parameters=scaled | dict(rope_type="yarn")),
        "mistral": MistralConfig(**sizes, sliding_window=256),
        "qwen2": Qwen2Config(**sizes, tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=1e6)),
        "qwen3": Qwen3Config(**sizes, head_dim=32)}[family]
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p)*(0.2 if p.ndim == 1 else 0.1))
    return model


@pytest.mark.parametrize("family,words", [("llama", "pieces"), ("llama", "no blank"), ("wide", "gpt-2"), ("llama3", "llama-bpe"),
    ("linear", "llama-bpe"), ("mistral", "pieces"), ("mistral", "tekken"), ("qwen2", "qwen2"), ("yarn", "qwen2"),
    ("qwen3", "qwen2")])
def test_families_of_gguf(family, words, tiny, tmp_path):
    "Weights, positions and tokenizer survive; llama.cpp, where it is installed, agrees."
    kinds = {"gpt-2": lambda: tiny, "pieces": pieces, "no blank": lambda: pieces(blank=False)}
    tokenizer = kinds.get(words, lambda: words_like(words))()
    chat = ChatModel(some_model(family, tokenizer), Renderer(tokenizer, "chatml"))
    write_model(chat, tmp_path)
    file = write_gguf(tmp_path, tmp_path/"model.gguf", "f16")
    said = reference_of(chat, fixed_questions(3), 8)
    model, again = read_gguf(file, "float32")
    found = distance(said, forward_of(model))
    assert found["kl"] < 1e-4 and found["logit"] < 2e-2
    for text in NASTY:
        assert again(text, add_special_tokens=False).input_ids == tokenizer(text, add_special_tokens=False).input_ids, text
    assert again.backend_tokenizer.model.ignore_merges == (words in ("llama-bpe", "tekken"))
    from medllm.export.gguf import forward_of_llama_cpp, llama_cpp
    if (llama := llama_cpp(file, 256)) is None: return
    found = distance(said, forward_of_llama_cpp(llama))
    llama.close()
    assert found["kl"] < 1e-4, found
    llama = importlib.import_module("llama_cpp").Llama(str(file), vocab_only=True, verbose=False)
    for text in NASTY:
        assert llama.tokenize(text.encode(), add_bos=True, special=True) == tokenizer(text).input_ids, text


def test_a_llama_cpp_that_dies_takes_no_export_with_it(tmp_path, monkeypatch, capsys):
    "A build for another processor ends with a signal: the export goes on, and says what was not compared."
    from medllm.export import gguf
    monkeypatch.setattr(gguf, "_ASK", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    monkeypatch.setattr(exporting, "llama_cpp", lambda file, positions: gguf.LlamaCpp(file, positions))
    plan = exporting.ExportPlan(str(tmp_path/"out"), ModelChoice("tiny"), gguf=("f16",), answers=2, max_new_tokens=4,
        limits=("gguf-f16.agreement=0.5",))                                          # random weights: tokens are nearly tied
    report = exporting.export(plan)
    assert report["passed"] and "SIGSEGV" in report["not_compared"][0] and (tmp_path/"out/gguf/model-f16.gguf").exists()
    assert "not compared: gguf-f16, llama.cpp" in capsys.readouterr().err
    assert "Not compared: gguf-f16, llama.cpp" in (tmp_path/"out/README.md").read_text()


def test_a_family_that_only_llama_cpp_reads(tmp_path, monkeypatch):
    "GLM-4: refused before anything is merged where llama.cpp is not there, or cannot run; else compared by it alone."
    from importlib.util import find_spec
    from families import model_of
    from medllm.export import gguf
    from medllm.models.tiny import tiny_tokenizer
    model_of("GLM-4-0414").save_pretrained(tmp_path/"glm")
    tiny_tokenizer().save_pretrained(tmp_path/"glm")
    plan = exporting.ExportPlan(str(tmp_path/"out"), ModelChoice(str(tmp_path/"glm")), gguf=("f16",), answers=2,
        max_new_tokens=4)
    if find_spec("llama_cpp"):
        found = {v["artefact"]: v["passed"] for v in exporting.export(plan)["verdicts"]}
        assert found["gguf-f16, llama.cpp"] and found["gguf-f16, llama.cpp's tokens"] and "gguf-f16" not in found
        shutil.rmtree(tmp_path/"out")
    with monkeypatch.context() as m:
        m.setattr(gguf, "find_spec", lambda name: None)
        with pytest.raises(UserError, match="a glm4 file is read by llama.cpp alone"): exporting.export(plan)
    monkeypatch.setattr(gguf, "find_spec", lambda name: True)
    monkeypatch.setattr(gguf, "_ASK", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(UserError, match="nothing could compare the file: gguf-f16, llama.cpp"): exporting.export(plan)
    assert not (tmp_path/"out").exists()


def test_a_modelfile_for_a_tokenizer_that_adds_bos():
    "Ollama puts BOS in front by itself when the file says so: the template must not write a second one."
    tokenizer = pieces()
    text = modelfile(Renderer(tokenizer, "llama2"), "m.gguf", {}, 512)
    assert 'PARAMETER stop "</s>"' in text and '{{ if eq $last "" }}[INST]' in text and "<s>[INST]" in text


@pytest.mark.slow
def test_transformers_serves_it(exported, tmp_path):
    "The first line of the recipe: a server on the folder answers as medllm does."
    pytest.importorskip("fastapi", reason="transformers serve needs fastapi and uvicorn")
    import socket
    import urllib.request
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with open(tmp_path/"log", "w") as log:
        server = subprocess.Popen([str(BIN/"transformers"), "serve", str(exported), "--port", str(port)], env=environment,
            stdout=log, stderr=log)
    try:
        for _ in range(120):
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).read()
            except OSError: time.sleep(1)
            else: break
        turns = [{"role": "user", "content": "What is asthma?"}]
        ask = {"model": str(exported), "messages": turns, "max_tokens": 8, "temperature": 0}
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(ask).encode(),
            {"Content-Type": "application/json"})
        said = json.loads(urllib.request.urlopen(request, timeout=120).read())
    finally:
        server.terminate()
        server.wait(30)
    chat = load_chat_model(ModelChoice(str(exported)))
    prompt = chat.prompt([Turn("user", "What is asthma?")])
    assert said["usage"]["prompt_tokens"] == len(prompt)
    assert said["choices"][0]["message"]["content"].strip() == chat.answers([prompt], Sampling(8, 0.0))[0].text


@pytest.mark.slow
def test_a_record_gives_the_card(tmp_path):
    "A run's folder is exported with the card of its record: data with hash, metrics, settings, and the check."
    done = run("medllm", "run", "sft", "-p", "max_steps", "2", "-p", "finetuning_type", "lora", "--runs", tmp_path/"runs")
    folder = next((tmp_path/"runs/sft").iterdir())
    assert done.returncode == 0, done.stderr
    words = ["--model_name_or_path", str(folder)]
    assert main(["evaluate", *words, "--limit", "8", "--output", str(tmp_path/"measured")]) == 0
    words += ["--evaluation", str(tmp_path/"measured"), "--answers", "2"]
    assert main(["export", *words, "--output", str(tmp_path/"model")]) == 0
    card, state = (tmp_path/"model/README.md").read_text(), json.loads((folder/"run.json").read_text())
    metric = state["metrics"]["eval_loss"]
    assert f"{metric:.4g}"[:5] in card and "| mm |" in card and "| merged | within the limit" in card
    assert next(iter(state["weights"].values())) in card and str(tmp_path) not in card
    assert "## Evaluation" in card and "| mm_mcq | accuracy |" in card and "not distinguishable" in card
    other = adapter(tmp_path/"other")
    assert main(["export", "--adapter_name_or_path", other, *words[2:], "--output", str(tmp_path/"no")]) == 2
    assert not (tmp_path/"no").exists()
