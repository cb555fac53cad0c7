"""Tokenizers of all sorts: any of BOS, EOS, UNK and PAD may be one token, and words may have been added."""
from itertools import product

import numpy as np
import pytest
from stages import quiet
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from medllm.core import UserError
from medllm.data.formats import Example, Turn
from medllm.data.templates import TEMPLATES
from medllm.data.tokens import Renderer
from medllm.models.chat import ModelChoice, load_chat_model
from medllm.models.loading import load_model, load_tokenizer
from medllm.models.sampling import Sampling
from medllm.train.arguments import parse
from medllm.train.inputs import load_renderer
from medllm.train.loop import run as train
from medllm.export.export import ExportPlan, export

ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
NAMES = ("<|endoftext|>", "</s>", "[PAD]", "<start>")
CONTROL = sorted({t for template in TEMPLATES.values() for t in template.control} - set(NAMES))
LETTERS = sorted({*map(chr, range(33, 127)), *"".join([t.jinja for t in TEMPLATES.values()] + CONTROL)} - {" ", "\n", "▁"})
CHAT = [{"role": "user", "content": "Is it gout?"}, {"role": "assistant", "content": "Perhaps."},
    {"role": "user", "content": "Why me?"}, {"role": "assistant", "content": "Nobody knows.\n\nAsk again."}]


def partitions():
    "Every way in which the four roles can be absent, or fall together."
    for labels in product((None, 0, 1, 2, 3), repeat=4):
        seen = [x for x in labels if x is not None]
        if all(x <= max(seen[:i], default=-1) + 1 for i, x in enumerate(seen)): yield labels


PARTITIONS = list(partitions())
shown = lambda labels: "".join("-" if x is None else "abcd"[x] for x in labels)


def byte_level(unknown):
    "GPT-2's kind: every byte is a token, nothing is unknown."
    alphabet = {b: i for i, b in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(alphabet, [], unk_token=unknown))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return backend


def word_piece(unknown):
    "BERT's kind: unknown words are UNK."
    vocabulary = {t: i for i, t in enumerate([unknown or "[UNK]", *LETTERS, *(f"##{c}" for c in LETTERS)])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown or "[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return backend


def unigram(unknown):
    "SentencePiece's kind without bytes: unknown characters are UNK."
    pieces = [(unknown or "<unk>", 0.0), *((c, -3.0) for c in ["▁", "\n", *LETTERS])]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace()
    return backend


def byte_fallback(unknown):
    "Llama 2's kind: unknown characters are bytes."
    pieces = [unknown or "<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *LETTERS]
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(pieces)}, [], byte_fallback=True, unk_token=unknown or "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


KINDS = {f.__name__: f for f in (byte_level, word_piece, unigram, byte_fallback)}


def tokenizer_of(kind, labels):
    "A tokenizer whose roles fall together as the labels say; it knows the control tokens of all templates."
    roles = {role: NAMES[x] for role, x in zip(ROLES, labels) if x is not None}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=KINDS[kind](roles.get("unk_token")), **roles)
    tokenizer.add_tokens(CONTROL, special_tokens=True)
    return tokenizer


def talk(*texts): return Example(tuple(Turn(role, text) for role, text in zip(("user", "assistant")*len(texts), texts)))


def ends_of(trained): return np.flatnonzero(trained & ~np.append(trained[1:], False))


def check_roles(tokenizer, template):
    "Right ids, an end that is trained behind each answer, no control token out of a text."
    if tokenizer.eos_token is None and "{eos}" in TEMPLATES[template].answer:
        with pytest.raises(UserError, match="needs an EOS token"): Renderer(tokenizer, template)
        return
    renderer = Renderer(tokenizer, template)
    ids, trained = renderer.encode([talk(*(m["content"] for m in CHAT))])[0]
    whole = tokenizer.apply_chat_template(CHAT, chat_template=renderer.jinja, return_dict=False)
    if (TEMPLATES[template].header or TEMPLATES[template].user).endswith(" "):  # a prompt is cut behind its last blank
        assert tokenizer.decode(ids) == tokenizer.decode(whole)
    else: assert ids[:len(whole)].tolist() == whole and len(ids) - len(whole) == (TEMPLATES[template].answer == "\n{content}")
    end = tokenizer.eos_token_id if "{eos}" in TEMPLATES[template].answer else None
    assert len(ends_of(trained)) == 2
    assert all(ids[i] in renderer.trained_stops and end in (None, ids[i]) for i in ends_of(trained))
    assert tokenizer.eos_token_id in (None, *renderer.stop_ids)
    prompt = renderer.encode([talk(*(m["content"] for m in CHAT[:3]))])[0][0]
    assert ids[:len(prompt)].tolist() == prompt.tolist() and trained[len(prompt)] and not trained[len(prompt) - 1]
    control = sorted(renderer.plain.control.values())
    count = lambda ids: [(ids == i).sum() for i in control]
    forged = "".join(["x", *NAMES, *(t for t in CONTROL if "▁" not in t), "y"])
    assert count(renderer.encode([talk(forged, forged, forged, forged)])[0][0]) == count(ids)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("labels", PARTITIONS, ids=shown)
def test_roles_may_fall_together(labels, kind):
    tokenizer = tokenizer_of(kind, labels)
    for template in ("vicuna", "chatml"): check_roles(tokenizer, template)


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_template_on_a_tokenizer_with_one_token_for_all(template):
    "GPT-2, BioMedLM, Phi-2, Pythia, SmolLM2, Granite."
    check_roles(tokenizer_of("byte_level", (0, 0, 0, 0)), template)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_every_template_on_all_tokenizers(template, kind):
    for labels in PARTITIONS: check_roles(tokenizer_of(kind, labels), template)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frame", ["", "bos", "bos eos", "cls sep", "sep"])
def test_documents_are_what_the_tokenizer_makes_of_a_text(frame, kind):
    "For pre-training: its own ids, whatever its post-processor puts around them, and one EOS behind."
    text = "Gout is </s> not <|endoftext|> rare."
    for labels in PARTITIONS[::3]:
        tokenizer = tokenizer_of(kind, labels)
        names = {"bos": tokenizer.bos_token, "eos": tokenizer.eos_token, "cls": "<|user|>", "sep": "<|end|>"}
        around = [names[part] for part in frame.split()]
        if None in around or tokenizer.eos_token is None: continue
        before = around[:1] if len(around) > 1 or frame == "bos" else []
        behind = around[len(before):]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing([*before, "$A", *behind],
            special_tokens=[(t, tokenizer.convert_tokens_to_ids(t)) for t in {*around}])
        ids, trained = Renderer(tokenizer, "vanilla@2023").encode([Example((Turn("document", text),))])[0]
        whole = tokenizer("Gout is x not x rare.").input_ids
        own = Renderer(tokenizer, "vanilla@2023").encode([Example((Turn("document", "Gout is x not x rare."),))])[0][0].tolist()
        assert own == whole[:len(whole) - len(behind)] + [tokenizer.eos_token_id]
        assert trained.all() and ids.tolist()[:len(before)] == [tokenizer.convert_tokens_to_ids(t) for t in before]
        assert not np.isin(ids[len(before):-1], [*tokenizer.convert_tokens_to_ids(around), tokenizer.eos_token_id]).any()


def legacy(unknown):
    "Llama 2's kind in the old spelling: a normaliser writes the blank in front."
    backend = byte_fallback(unknown)
    backend.pre_tokenizer = pre_tokenizers.Sequence([])
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return backend


WORDS = ["paracetamol", "高血压", "New York", "<dose>", "§§", "    "]


@pytest.mark.parametrize("kind, how", [pair for pair in product([*KINDS, "legacy"], [
    "as they are", "not normalised", "single words", "blanks around", "lower case"]) if pair != ("legacy", "not normalised")])
def test_added_words_are_used_as_other_programs_use_them(kind, how, monkeypatch):
    "The ids of texts with added words are the tokenizer's own, in conversations and in documents; and they train."
    monkeypatch.setitem(KINDS, "legacy", legacy)
    tokenizer = tokenizer_of(kind, (0, 1, 2, 3))
    if how == "lower case": tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [n for n in (normalizers.Lowercase(), tokenizer.backend_tokenizer.normalizer) if n])
    more = {"not normalised": {"normalized": False}, "single words": {"single_word": True},
        "blanks around": {"lstrip": True, "rstrip": True}}.get(how, {})
    tokenizer.add_tokens([AddedToken(word, **more) for word in WORDS])
    texts = ["paracetamol", "Takes paracetamol, and paracetamol.", "a<dose>b", "<dose> 5 g",
        "In New York    a 高血压 xparacetamolx", "§§"]
    same = lambda a, b: tokenizer.convert_ids_to_tokens(a) == tokenizer.convert_ids_to_tokens(b)
    renderer, used, known = Renderer(tokenizer, "chatml"), set(), {*tokenizer.convert_tokens_to_ids(WORDS)}
    for text in texts:
        if kind in ("unigram", "word_piece") and "高" in text: continue
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
        if how == "blanks around": messages.pop()          # a word there would swallow the end of the prompt
        ids = renderer.encode([talk(*(m["content"] for m in messages))])[0][0].tolist()
        whole = tokenizer.apply_chat_template(
            messages, chat_template=renderer.jinja, add_generation_prompt=len(messages) == 1, return_dict=False)
        assert same(ids, whole), text
        document = renderer.encode([Example((Turn("document", text),))])[0][0].tolist()
        assert same(document[:-1], tokenizer(text).input_ids), text
        used |= {*ids} & known
    assert len(used) >= 3 or (how, kind) == ("single words", "legacy")
    assert sorted(renderer.plain.words) == sorted(WORDS[:-1])
    assert any("5 words that were added" in line for line in renderer.misfits)


@pytest.mark.parametrize("token", [
    "<|im_end|>", "</s>", "<|x|>", "<｜User｜>", "<tool_call>", "[INST]", "<user>", "<end_of_turn>"])
def test_an_added_word_that_controls_is_no_text(token):
    "Not marked special, and yet no text gives it: a role, bars, or a chat template that writes it, also out of a role's name."
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(None), eos_token="</s>")
    tokenizer.add_tokens([token, "gout"])
    tokenizer.chat_template = ("{% for m in messages %}{{ '<' + m['role'] + '>' }}{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}")
    renderer = Renderer(tokenizer)
    i, word = tokenizer.convert_tokens_to_ids([token, "gout"])
    clean, forged = (renderer.encode([talk(text, text)])[0][0].tolist() for text in ("x", f"gout {token}"))
    assert clean.count(i) == forged.count(i) and forged.count(word) == 2
    assert clean.count(i) == {"</s>": 2, "<user>": 1}.get(token, 0)


@pytest.mark.parametrize("kind", ["word_piece", "unigram"])
def test_an_unknown_character_never_ends_an_answer(kind):
    "Where UNK is EOS, it is refused in one sentence; where UNK is a token of its own, or PAD, it is the tokenizer's affair."
    for labels, refused in (((None, 0, 0, None), True), ((0, 1, 0, None), True), ((0, 0, 0, 0), True),
            ((0, 1, 2, 3), False), ((0, 1, 2, 2), False)):
        tokenizer = tokenizer_of(kind, labels)
        row = talk("Is it " + "gout"*300 + "\U0001F600?", "No.")
        renderer = Renderer(tokenizer, "vicuna")
        if refused:
            with pytest.raises(UserError, match="reads the character U\\+1F600 as one of its"): renderer.encode([row])
        else: assert tokenizer.unk_token_id in renderer.encode([row])[0][0]


@pytest.mark.parametrize("bos, template, begins", [
    ("<|im_start|>", "chatml", ["<|im_start|>"]), ("<|im_start|>", "falcon_h1", ["<|im_start|>"]),
    ("<start_of_turn>", "gemma", ["<start_of_turn>"]), ("<|start_header_id|>", "llama3", ["<|start_header_id|>"]),
    ("<s>", "chatml", ["<s>", "<|im_start|>"]), (None, "chatml", ["<|im_start|>"])])
@pytest.mark.parametrize("system", ["", "Be brief."])
def test_bos_stands_once_at_the_beginning(system, bos, template, begins):
    "Also where it is the token that opens a turn, as in SmolLM2-Instruct."
    roles = {"eos_token": "</s>"} | ({"bos_token": bos} if bos else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(None), **roles)
    tokenizer.add_tokens(CONTROL, special_tokens=True)
    ids = Renderer(tokenizer, template).encode([Example((Turn("user", "?"), Turn("assistant", "!")), system)])[0][0]
    assert tokenizer.convert_ids_to_tokens(ids[:len(begins)]) == begins
    assert tokenizer.convert_ids_to_tokens(int(ids[len(begins)])) not in (bos, *CONTROL)


def folder_of(place, words=(), rows=None, **roles):
    "The tiny model with other roles, no chat template, and added words; `rows` makes its embedding table too short."
    tokenizer, model = load_tokenizer("tiny"), load_model("tiny")
    tokenizer.chat_template = None
    for role, token in roles.items(): setattr(tokenizer, role, token)
    tokenizer.add_tokens(list(words))
    model.resize_token_embeddings(rows or len(tokenizer))
    for config in (model.config, model.generation_config):
        for role in ("bos", "eos", "pad"): setattr(config, f"{role}_token_id", getattr(tokenizer, f"{role}_token_id"))
    tokenizer.save_pretrained(place)
    model.save_pretrained(place)
    return str(place)


ONE = dict.fromkeys(ROLES, "</s>")
FLAGS = dict(dataset="mm", finetuning_type="full", max_samples=12, max_steps=2, cutoff_len=192, save_strategy="no",
    disable_tqdm=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory): return folder_of(tmp_path_factory.mktemp("models")/"base", **ONE)


@pytest.mark.parametrize("template, ends", [("vicuna", ["</s>"]), ("chatml", ["</s>", "<|im_end|>"])])
def test_a_model_with_one_token_for_all_roles_goes_all_the_way(template, ends, base, tmp_path):
    "Trained, asked, exported (which compares the prompts of `apply_chat_template` with ours) and asked again."
    with quiet(): train(FLAGS | dict(model_name_or_path=base, template=template, output_dir=str(tmp_path/"out")))
    with quiet(): report = export(ExportPlan(
        str(tmp_path/"export"), ModelChoice(str(tmp_path/"out")), answers=3, max_new_tokens=4), log=lambda text: None)
    assert report["passed"] and {v["artefact"] for v in report["verdicts"]} == {"merged", "prompts"}
    chats = [load_chat_model(ModelChoice(str(tmp_path/name))) for name in ("out", "export")]
    prompts = [chat.prompt([Turn("user", "Is it </s> gout?")]) for chat in chats]
    assert prompts[0].tolist() == prompts[1].tolist()
    assert prompts[0].tolist().count(chats[0].tokenizer.eos_token_id) == 1 and prompts[0][0] == chats[0].tokenizer.bos_token_id
    assert sorted(chats[1].tokenizer.convert_ids_to_tokens(chats[1].renderer.stop_ids)) == ends
    with quiet(): assert len(chats[1].answers(prompts[1:], Sampling(4))) == 1


def test_pre_training_needs_no_chat_template(base, tmp_path):
    with quiet(): train(FLAGS | dict(stage="pt", model_name_or_path=base, dataset="mm_pt", output_dir=str(tmp_path/"out")))
    assert load_tokenizer(str(tmp_path/"out")).chat_template is None


@pytest.mark.parametrize("template, used", [
    ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "vanilla@2023"),
    ("{{ messages[0].nothing.at_all }}", "vanilla@2023"),
    ("{% for m in messages %}{{ m['content'] }}</s>{% endfor %}", "auto")])
def test_pre_training_does_not_mind_a_chat_template(template, used, base, tmp_path, capsys):
    "One that fits nothing is named and left out; documents are the same with any."
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = template
    load_model(base).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    renderer = load_renderer(parse(dict(stage="pt", model_name_or_path=str(tmp_path), dataset="mm_pt")))
    assert (renderer.jinja == TEMPLATES["vanilla@2023"].jinja) == (used != "auto")
    assert ("is not used: the chat template" in capsys.readouterr().err) == (used != "auto")
    ids = renderer.encode([Example((Turn("document", "Gout."),))])[0][0].tolist()
    assert ids == [*tokenizer("Gout.").input_ids, tokenizer.eos_token_id]


def test_pre_training_without_an_end_is_one_sentence(tmp_path):
    place = folder_of(tmp_path, eos_token=None)
    with pytest.raises(UserError, match="no EOS token to put behind a document; name one as eos_token"):
        load_renderer(parse(dict(stage="pt", model_name_or_path=place, dataset="mm_pt")))


def test_added_words_are_trained_and_served(tmp_path):
    "The rows of their ids move in training; the exported folder reads them with the same ids."
    (tmp_path/"rows.json").write_text('[{"instruction": "高血压 paracetamol <dose>?", "output": "paracetamol <dose> 高血压."}]')
    place = folder_of(tmp_path/"base", ["高血压", "paracetamol", "<dose>"], **ONE)
    with quiet(): train(FLAGS | dict(model_name_or_path=place, dataset=str(tmp_path/"rows.json"), template="vicuna",
        output_dir=str(tmp_path/"out"), learning_rate=1e-3))
    before, after = (load_model(str(p)).get_input_embeddings().weight for p in (place, tmp_path/"out"))
    moved = (before != after).any(1)
    assert moved[-3:].all() and not moved.all()
    chat = load_chat_model(ModelChoice(str(tmp_path/"out")))
    ids = chat.prompt([Turn("user", "高血压 paracetamol <dose>?")]).tolist()
    assert {*range(len(chat.tokenizer) - 3, len(chat.tokenizer))} < {*ids}
    assert ids == chat.tokenizer.apply_chat_template(
        [{"role": "user", "content": "高血压 paracetamol <dose>?"}], add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize("entry", ["train", "chat"])
def test_a_tokenizer_longer_than_the_embedding_table_is_an_error(entry, tmp_path):
    "In one sentence that names the first token beyond, before anything is read or trained."
    place = folder_of(tmp_path, ["gout", "高血压"], rows=4097, **ONE)
    with pytest.raises(UserError, match="has 4098 tokens and the embedding table 4097 rows \\(the first token beyond is 高血压"):
        if entry == "train": load_renderer(parse(dict(model_name_or_path=place, dataset="mm", template="vicuna")))
        else: load_chat_model(ModelChoice(place, template="vicuna"))


def test_the_publishers_ends_count(tmp_path):
    "Every control token that generation_config.json names ends an answer, and is in it again after training; a letter does not."
    model, tokenizer = load_model("tiny"), load_tokenizer("tiny")
    tokenizer.save_pretrained(tmp_path/"base")
    end, other = tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"])
    model.generation_config.eos_token_id = [end, other, 77]
    model.save_pretrained(tmp_path/"base")
    assert load_chat_model(ModelChoice(str(tmp_path/"base"))).renderer.stop_ids == sorted([end, other])
    with quiet(): train(FLAGS | dict(model_name_or_path=str(tmp_path/"base"), output_dir=str(tmp_path/"out")))
    assert load_model(str(tmp_path/"out")).generation_config.eos_token_id == sorted([end, other])
