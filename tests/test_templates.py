"""Token ids of our templates against those the model makers published; user text never becomes a control token."""
import json

import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from medllm.data.formats import Example, Turn
from medllm.data.templates import TEMPLATES
from medllm.data.tokens import Renderer
from medllm.models.tiny import tiny_tokenizer

LLAMA3 = TEMPLATES["llama3"].control
CHATS = {
    "one turn": [("user", "What is asthma?"), ("assistant", "A disease of the airways.")],
    "three turns": [
        ("user", "我发烧了"), ("assistant", "多少度？"), ("user", "39 度 "), ("assistant", "请多喝水。"),
        ("user", "还有呢?"), ("assistant", "休息。\n\n必要时就医。")],
    "system": [("system", "You are a careful doctor."), ("user", "Fever?"), ("assistant", "Rest.")],
    "blanks": [("user", "  two  blanks  "), ("assistant", " 1. rest\n 2. drink ")],
}


def byte_level():
    "The tiny model's tokenizer, which also knows Llama 3's control tokens."
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(LLAMA3)})
    return tokenizer


def sentencepiece(legacy):
    ("A BPE tokenizer in Llama 2's style: blanks are written as ▁, one stands in front, words are apart; "
        "bytes for unknown characters.")
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    texts = [text for chat in CHATS.values() for _, text in chat] + [
        "[INST] <<SYS>> USER: ASSISTANT: ### Instruction: Response:"]
    in_bytes = [f"<0x{i:02X}>" for i in range(256)]
    backend.train_from_iterator(texts*3, trainers.BpeTrainer(
        vocab_size=800, special_tokens=["<unk>", "<s>", "</s>", *in_bytes], show_progress=False))
    spec = json.loads(backend.to_str())
    # bytes are ordinary tokens
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] not in in_bytes]
    backend = Tokenizer.from_str(json.dumps(spec))
    if legacy:
        backend.pre_tokenizer = pre_tokenizers.Sequence([])
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else: backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def example(chat):
    "A chat as our data path has it: edges stripped, the system text apart."
    system = next((text for role, text in chat if role == "system"), "")
    return Example(tuple(Turn(role, text.strip()) for role, text in chat if role != "system"), system)


ORACLES = {
    "llama2": "llama-2-chat", "llama3": "llama-3-instruct", "chatml": "chatml", "vicuna": "vicuna",
    "alpaca": "alpaca"}


@pytest.mark.parametrize("chat", CHATS, ids=str)
@pytest.mark.parametrize("name", ORACLES)
def test_ids_equal_the_published_template(name, chat, shared):
    ("No difference is left to explain: also the line break that ChatML, Vicuna and Alpaca put behind the last "
        "answer is ours (untrained).")
    published = shared(f"chat_templates/{ORACLES[name]}.jinja").read_text().replace("    ", "").replace("\n", "")
    messages = [{"role": role, "content": text} for role, text in CHATS[chat]]
    tokenizer = byte_level()
    renderer = Renderer(tokenizer, name)
    ids, trained = renderer.encode([example(CHATS[chat])])[0]
    assert ids.tolist() == tokenizer.apply_chat_template(messages, chat_template=published, return_dict=False)
    assert ids.tolist() == tokenizer.apply_chat_template(messages, chat_template=renderer.jinja, return_dict=False)

    # a prompt is the beginning of the trained row. Llama 2's file has no generation prompt of its own:
    # it ends in [/INST] too
    prompt = renderer.encode([example(CHATS[chat][:-1])])[0][0].tolist()
    assert prompt == tokenizer.apply_chat_template(
        messages[:-1], chat_template=published, add_generation_prompt=True, return_dict=False)
    assert ids[:len(prompt)].tolist() == prompt
    assert trained[len(prompt)] and not trained[:len(prompt)][-1]


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("name", ["llama2", "vicuna", "alpaca"])
def test_ids_on_a_sentencepiece_tokenizer(name, legacy, shared):
    "The blank that such tokenizers put in front of a text stands only where the whole string has it."
    published = shared(f"chat_templates/{ORACLES[name]}.jinja").read_text().replace("    ", "").replace("\n", "")
    tokenizer = sentencepiece(legacy)
    for chat in ("one turn", "three turns", "system"):
        messages = [{"role": role, "content": text} for role, text in CHATS[chat]]
        ours = Renderer(tokenizer, name).encode([example(CHATS[chat])])[0][0].tolist()
        whole = tokenizer.apply_chat_template(messages, chat_template=published, return_dict=False)
        assert tokenizer.convert_ids_to_tokens(ours) == tokenizer.convert_ids_to_tokens(whole)


@pytest.mark.parametrize("name", [*TEMPLATES, "auto"])
def test_each_answer_ends_in_a_trained_end_token(name):
    renderer = Renderer(byte_level(), name)
    ids, trained = renderer.encode([example(CHATS["three turns"])])[0]
    runs = (trained[1:] < trained[:-1]).sum() + trained[-1]
    last = [i for i in range(len(ids)) if trained[i] and (i + 1 == len(ids) or not trained[i + 1])]
    assert runs == 3 and all(ids[i] in renderer.stop_ids for i in last)


NASTY = ["</s>", "[INST]", "<|im_end|>", "<|im_start|>", "<s>", "<pad>", "<|eot_id|>", "<<SYS>>", "<unk>"]
RENDERERS = {name: Renderer(tokenizer, template) for name, tokenizer, template in (
    ("byte-level", byte_level(), "chatml"), ("llama3", byte_level(), "llama3"),
    ("sentencepiece", sentencepiece(False), "llama2"))}
texts = st.lists(st.one_of(st.sampled_from(NASTY), st.text(max_size=12)), max_size=6).map("".join)


@pytest.mark.parametrize("name", RENDERERS)
@settings(max_examples=150, deadline=None)
@given(texts)
def test_user_text_yields_no_control_token_and_decodes_to_itself(name, text):
    plain = RENDERERS[name].plain
    ids = plain([text], "joined")[0]
    assert not plain.is_control[ids].any()
    # such tokenizers write blanks as ▁ and cannot tell them apart
    said = text if name != "sentencepiece" else text.replace("▁", " ")
    assert RENDERERS[name].tokenizer.decode(ids, clean_up_tokenization_spaces=False) == said


@settings(max_examples=100, deadline=None)
@given(st.lists(texts.filter(str.strip), min_size=2, max_size=6))
def test_only_the_template_writes_control_tokens(parts):
    "P2: as many trained end tokens as answers, whatever is said."
    turns = tuple(Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(parts[:len(parts)//2*2]))
    renderer = RENDERERS["byte-level"]
    ids, trained = renderer.encode([Example(turns)])[0]
    end = renderer.plain.control["<|im_end|>"]
    assert (ids[trained] == end).sum() == len(turns)//2
    assert (ids == end).sum() == len(turns)
