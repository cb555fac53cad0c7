"""Token ids of our templates against those the model makers published; user text never becomes a control token."""
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from commands import ROOT
from medllm.core import UserError
from medllm.data.formats import Call, Example, Turn
from medllm.data.templates import TEMPLATES
from medllm.data.tokens import Renderer
from medllm.models.tiny import tiny_tokenizer

CONTROL = sorted({t for template in TEMPLATES.values() for t in template.control})
WORDS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<|tool_call|>",
    "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "<|endoftext|>"]
CHATS = {
    "one turn": [("user", "What is asthma?"), ("assistant", "A disease of the airways.")],
    "three turns": [
        ("user", "我发烧了"), ("assistant", "多少度？"), ("user", "39 度 "), ("assistant", "请多喝水。"),
        ("user", "还有呢?"), ("assistant", "休息。\n\n必要时就医。")],
    "system": [("system", "You are a careful doctor."), ("user", "Fever?"), ("assistant", "Rest.")],
    "blanks": [("user", "  two  blanks  "), ("assistant", " 1. rest\n 2. drink ")],
}


def byte_level():
    "The tiny model's tokenizer, which also knows the control tokens of all templates."
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": CONTROL})
    tokenizer.add_tokens(WORDS)      # matched as a whole, though not marked as special
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
    "llama2": "llama-2-chat", "llama3": "llama-3-instruct", "chatml": "chatml", "vicuna": "vicuna", "alpaca": "alpaca",
    "mistral": "mistral-instruct", "zephyr": "zephyr", "phi": "phi-3", "phi_small": "phi-3-small",
    "granite3": "granite-3.0-instruct", "openchat": "openchat-3.5", "qwen": "qwen2.5-instruct", "gemma": "gemma-it",
    "falcon": "falcon-instruct", "solar": "solar-instruct"}
# these two end no answer with anything: a model trained so never stops. Ours end with EOS; all else is equal
ENDLESS = {"falcon", "solar"}


def published(shared, name):
    "A published file; the collector indented most of them for reading."
    text = shared(f"chat_templates/{ORACLES[name]}.jinja").read_text(encoding="utf-8")
    return text if "{%-" in text else text.replace("    ", "").replace("\n", "")


def oracle_messages(name, chat):
    ("The chat as messages. Some files do not trim, and our data is trimmed before; "
        "Falcon's file also takes empty lines out of contents.")
    clean = lambda text: text.replace("\n\n", "\n").strip() if name == "falcon" else text.strip()
    return [{"role": role, "content": clean(text)} for role, text in chat]


def without_eos(ids, tokenizer, name):
    return [i for i in ids if i != tokenizer.eos_token_id] if name in ENDLESS else list(ids)


def test_all_published_files_are_used(shared):
    assert sorted(p.stem for p in shared("chat_templates").glob("*.jinja")) == sorted(ORACLES.values())


@pytest.mark.parametrize("chat", CHATS, ids=str)
@pytest.mark.parametrize("name", ORACLES)
def test_ids_equal_the_published_template(name, chat, shared):
    ("Also the line break that some put behind the last answer is ours (untrained). One more difference is left: "
        "the collector's Gemma file lacks the BOS that the model needs.")
    jinja = published(shared, name)
    messages = oracle_messages(name, CHATS[chat])
    tokenizer = BYTE_LEVEL
    renderer = Renderer(tokenizer, name)
    turns = example([(m["role"], m["content"]) for m in messages])
    ids, trained = renderer.encode([turns])[0]
    bos = [tokenizer.bos_token_id] if name == "gemma" else []
    whole = tokenizer.apply_chat_template(messages, chat_template=jinja, return_dict=False)
    assert without_eos(ids, tokenizer, name) == bos + whole
    assert ids.tolist() == tokenizer.apply_chat_template(messages, chat_template=renderer.jinja, return_dict=False)

    # a prompt is the beginning of the trained row
    prompt = renderer.encode([replace(turns, turns=turns.turns[:-1])])[0][0].tolist()
    assert without_eos(prompt, tokenizer, name) == bos + tokenizer.apply_chat_template(
        messages[:-1], chat_template=jinja, add_generation_prompt=True, return_dict=False)
    assert ids[:len(prompt)].tolist() == prompt
    assert trained[len(prompt)] and not trained[:len(prompt)][-1]


@pytest.mark.parametrize("name", ORACLES)
def test_auto_reads_the_published_template(name, shared):
    "The same files as the tokenizer's own: one renderer for both."
    tokenizer = byte_level()
    tokenizer.chat_template = published(shared, name)
    if name in ENDLESS:
        with pytest.raises(UserError, match="never learn to stop"): Renderer(tokenizer, "auto")
        return
    renderer = Renderer(tokenizer, "auto")
    for chat in CHATS.values():
        messages = oracle_messages(name, chat)
        ids, trained = renderer.encode([example(chat)])[0]
        assert ids.tolist() == tokenizer.apply_chat_template(messages, return_dict=False)
        assert (trained[1:] < trained[:-1]).sum() + trained[-1] == sum(role == "assistant" for role, _ in chat)


TOOLS = [{"type": "function", "function": {"name": "dose", "description": "布洛芬 \"dose\" in mg", "parameters": {
    "type": "object", "properties": {"kg": {"type": "number"}, "type": {"type": "string", "enum": ["a", "b"]}},
    "required": ["kg"]}}}, {"type": "function", "function": {
        "name": "now", "parameters": {"properties": {}}}}]
ASKED = (
    Turn("user", "How much for 39 kg?"),
    Turn("assistant", "", (Call("dose", '{"kg": 39, "type": "a\\nb\\"c", "more": [true, null, {"深": "度"}]}'),)),
    Turn("tool", "400 mg"), Turn("assistant", "Let me see.", (Call("now", "{}"), Call("dose", '{"kg": 39.5}'))),
    Turn("tool", "noon"), Turn("tool", '{"mg": 400}'), Turn("assistant", "400 mg, at noon."),
    Turn("user", "Thanks!"), Turn("assistant", "Get well soon."))


def as_messages(turns, system=""):
    "Turns as other programs pass them, each reply with the id of its call."
    out, made = [{"role": "system", "content": system}] if system else [], 0
    ids = iter([f"call{n:05}" for n in range(1, 99)])
    for turn in turns:
        message = {"role": turn.role, "content": turn.text}
        if turn.thought: message["reasoning_content"] = turn.thought
        if turn.calls: message["tool_calls"] = [{"type": "function", "id": f"call{(made := made + 1):05}", "function": {
            "name": c.name, "arguments": json.loads(c.arguments)}} for c in turn.calls]
        if turn.role == "tool": message["tool_call_id"] = next(ids)
        out.append(message)
    return out


@pytest.mark.parametrize("system", ["", "Be brief."])
@pytest.mark.parametrize("template", ["qwen", "auto"])
def test_tools_equal_the_published_template(template, system, shared):
    "Qwen 2.5's file is the one with definitions, calls (also two at once), and results that share a turn."
    tokenizer = byte_level()
    tokenizer.chat_template = published(shared, "qwen")
    for n in range(1, len(ASKED) + 1):
        prompt = ASKED[n-1].role != "assistant"
        ids, _ = Renderer(tokenizer, template).encode([Example(ASKED[:n], system, tools=json.dumps(TOOLS))])[0]
        assert ids.tolist() == tokenizer.apply_chat_template(
            as_messages(ASKED[:n], system), TOOLS, add_generation_prompt=prompt, return_dict=False)


def test_granite_tools_equal_the_published_template(shared):
    "Its file has roles of its own for calls and results."
    messages = as_messages(ASKED[:2]) + [{"role": "tool_response", "content": "400 mg"}] + as_messages(ASKED[6:7])
    messages[1] = {"role": "assistant_tool_call", "content": json.dumps([
        {"name": c.name, "arguments": json.loads(c.arguments)} for c in ASKED[1].calls], ensure_ascii=False)}
    ids, _ = Renderer(BYTE_LEVEL, "granite3").encode([Example((*ASKED[:3], ASKED[6]), tools=json.dumps(TOOLS))])[0]
    assert ids.tolist() == BYTE_LEVEL.apply_chat_template(
        messages, TOOLS, chat_template=published(shared, "granite3"), return_dict=False)


# Files as the makers of the models ship them, kept in TRL's package; those for pictures want contents in parts
SHIPPED = sorted(f for f in ROOT.glob(".trl/trl/chat_templates/*.jinja")
    if not f.stem.endswith("_training") and f.stem not in ("idefics3", "llava_next", "smolvlm"))
DESCRIBED = [{"type": "function", "function": {"name": "dose", "description": "mg of a drug", "parameters": {
    "type": "object", "required": ["kg"], "properties": {
        "kg": {"type": "number", "description": "weight"}, "drug": {"type": "string", "description": "its name"}}}}}]
TALK = {
    "one turn": Example((Turn("user", "What is asthma?"), Turn("assistant", "A disease of the airways."))),
    "history": Example((Turn("user", "我发烧了"), Turn("assistant", "多少度？"), Turn("user", "39 度"),
        Turn("assistant", "休息。"))),
    "system": Example((Turn("user", "Fever?"), Turn("assistant", "Rest.")), "You are a careful doctor."),
    "tools": Example((Turn("user", "How much for 39 kg?"), Turn("assistant", "", (Call("dose", '{"kg": 39, "drug": "x"}'),)),
        Turn("tool", "twice"), Turn("assistant", "Two of them.")), "Be brief.", json.dumps(DESCRIBED)),
    "thought": Example((Turn("user", "Fever?"), Turn("assistant", "Rest.", thought="A virus?")))}
# what they refuse, or lose, is refused, with the reason
WITHOUT_TOOLS = {"cohere", "cohere2", "deepseek_r1_distill", "deepseekv3", "gemma", "gemma3", "lfm2", "llama3", "phi3", "phi3_5",
    "qwen2_5_vl"}
WITHOUT_THOUGHTS = {"deepseek_r1_distill", "deepseekv3", "gemma4", "gemma4_v3", "gemma4_v4"}
# what ends a call, where it is not what ends other answers
CALL_ENDS = {"gptoss": "<|call|>", "glm4moe": "<|observation|>", **dict.fromkeys(
    ("gemma4", "gemma4_v3", "gemma4_v4", "gemma4_v5", "diffusion_gemma"), "<|tool_response>")}


def shipped(file):
    "A tokenizer with a shipped template, which knows the control tokens that it writes and ends in one of them."
    tokenizer, jinja = byte_level(), file.read_text(encoding="utf-8")
    tokens = re.findall(r"<\|[^|<>\s]+\|>|<[a-z_]+\|>|<\|[a-z_]+>|<(?:start|end)_of_turn>|\[/?[A-Z_]+\]|<｜[^｜]+｜>", jinja)
    tokenizer.add_tokens(sorted(set(tokens)), special_tokens=True)
    tokenizer.chat_template = jinja
    return tokenizer


@pytest.mark.parametrize("file", SHIPPED, ids=lambda f: f.stem)
def test_auto_reads_what_is_shipped(file):
    "Ids of the whole, what is trained of it, and what generation stops at; the date in it is the same on every day."
    tokenizer = shipped(file)
    renderer = Renderer(tokenizer, "auto")
    control = {tokenizer.decode([i]) for i in renderer.trained_stops}
    assert control <= {renderer._end, CALL_ENDS.get(file.stem, renderer._end)}, control
    for kind, row in TALK.items():
        if kind == "system" and file.stem == "gemma" or kind == "tools" and file.stem in WITHOUT_TOOLS or (
                kind == "thought" and file.stem in WITHOUT_THOUGHTS):
            with pytest.raises(UserError, match="leaves out|cannot write"): renderer.encode([row])
            continue
        ids, trained = renderer.encode([row])[0]
        said = tokenizer.decode(ids[trained])
        assert all(turn.text in said for turn in row.turns if turn.role == "assistant" and turn.text)
        assert not any(turn.text in said for turn in row.turns if turn.role != "assistant")
        if kind == "tools": assert "dose" in said and f"{CALL_ENDS.get(file.stem, renderer._end)}" in said
        if kind == "thought": assert "A virus?" in said
        last = [i for i in range(len(ids)) if trained[i] and (i + 1 == len(ids) or not trained[i + 1])]
        ended = [ids[i] in renderer.trained_stops for i in last]
        assert ended == [True]*len(last) or file.stem == "gptoss" and ended == [False, True]
        messages = as_messages(row.turns, row.system)
        if kind == "thought" and "reasoning_content" not in tokenizer.chat_template: continue
        for m in messages: m |= {"thinking": m["reasoning_content"]} if "reasoning_content" in m else {}
        text = renderer._text(messages, json.loads(row.tools) if row.tools else None, False)
        assert tokenizer.decode(ids).removesuffix(tokenizer.decode(ids[-1:])) in text
        if "strftime_now" in tokenizer.chat_template: assert "2025" in text or file.stem == "muse_glimmer"
        else: assert text == tokenizer.apply_chat_template(messages, json.loads(row.tools) if row.tools else None, tokenize=False)


def marked(renderer, *turns, tools=DESCRIBED):
    "A row, what is trained of it between guillemets."
    ids, trained = renderer.encode([Example(turns, "", json.dumps(tools) if tools else "")])[0]
    edges = np.flatnonzero(np.diff(np.r_[False, trained, False]))
    for at, mark in sorted(zip(edges, "«»"*len(edges)), reverse=True): ids = [*ids[:at], mark, *ids[at:]]
    return "".join(i if isinstance(i, str) else renderer.tokenizer.decode([i]) for i in ids)


def of_file(stem, **options):
    files = [f for f in SHIPPED if f.stem == stem]
    if not files: pytest.skip("TRL is not here: make trl")
    return Renderer(shipped(files[0]), "auto", **options)


def called(*calls): return Turn("assistant", "", tuple(Call(name, arguments) for name, arguments in calls))


ASK = Turn("user", "How much?")


@pytest.mark.parametrize("stem,calls,end", [
    ("gemma4", [("now", "{}")], "«<|tool_call>call:now{}<tool_call|><|tool_response>»"),
    ("gemma4", [("dose", '{"drug": "dose"}')], '<tool_call|><|tool_response>»'),
    ("gemma4", [("dose", '{"kg": 3}'), ("now", "{}")], "call:now{}<tool_call|><|tool_response>»"),
    ("gptoss", [("now", "{}")], "{}<|call|>»"), ("glm4moe", [("now", "{}")], "</tool_call><|observation|>»")])
def test_a_call_as_the_last_message_ends_where_its_model_stops(stem, calls, end):
    "Also one whose last text is the tool's name, which the reply would say once more."
    assert marked(of_file(stem), ASK, called(*calls)).endswith(end)


def test_replies_that_name_their_tools_are_read_in_order():
    turns = ASK, called(("dose", '{"kg": 3}'), ("now", "{}")), Turn("tool", "one"), Turn("tool", "noon"), Turn("assistant", "So.")
    text = marked(of_file("gemma4"), *turns)
    assert text.count("«") == 2 and "response:now{value:" in text
    assert "<|tool_response>»response:dose{value:" in text and text.rstrip().endswith("So.<turn|>»")


@pytest.mark.parametrize("stem", ["gemma4", "gptoss", "glm4moe"])
def test_where_generation_stops_does_not_depend_on_what_is_masked(stem):
    assert of_file(stem, mask_history=True).stop_ids == of_file(stem).stop_ids


def test_text_that_a_template_escapes_is_said_to_be_rewritten():
    assert any("rewrites" in line for line in of_file("lfm2_v2").misfits)
    assert not any("rewrites" in line for line in of_file("qwen3").misfits)


def test_another_date_is_other_rows(monkeypatch):
    from medllm.data.cache import renderer_hash
    renderer = of_file("gptoss")
    before = renderer_hash(renderer), marked(renderer, ASK, Turn("assistant", "3 mg."), tools=[])
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    renderer = of_file("gptoss")
    assert renderer_hash(renderer) != before[0] and "1970-01-01" in marked(renderer, ASK, Turn("assistant", "3 mg."), tools=[])
    assert "2025-01-01" in before[1]


def own(jinja, *tokens):
    tokenizer = byte_level()
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    tokenizer.chat_template = jinja
    return Renderer(tokenizer, "auto")


def test_eos_behind_the_whole_conversation_ends_no_answer():
    "Phi-4-mini's file writes it once, behind all."
    renderer = own("{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}", "<|user|>", "<|assistant|>", "<|end|>")
    text = marked(renderer, ASK, Turn("assistant", "A1"), ASK, Turn("assistant", "A2"), tools=[])
    assert text.count("A1<|end|>»") == text.count("A2<|end|>»") == 1
    assert renderer.trained_stops == {renderer.tokenizer.convert_tokens_to_ids("<|end|>")}


CALLS = ("{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>{% if m['tool_calls'] %}"
    "{% for c in m['tool_calls'] %}<|tool_call|>{{ c.function.name }} {{ c.function.arguments|tojson }}\n{% endfor %}"
    "{% else %}{{ m['content'] }}<|end|>{% endif %}{% elif m['role'] == 'tool' %}REPLY<|tool|>{{ m['content'] }}<|end|>"
    "{% else %}<|user|>{{ m['content'] }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")
KNOWN = "<|user|>", "<|assistant|>", "<|tool|>", "<|tool_call|>", "<|end|>"


def test_a_call_that_nothing_of_its_own_ends():
    "The tool's token does, and what opens a call is never a stop; where a template cannot write replies, the user's."
    renderer = own(CALLS.replace("REPLY", ""), *KNOWN)
    text = marked(renderer, ASK, called(("dose", '{"kg": 3}')), Turn("tool", "9"), Turn("assistant", "So."), tools=[])
    assert text.count("«<|tool_call|>dose") == 1 and "<|tool|>»9" in text
    stops = {renderer.tokenizer.decode([i]) for i in renderer.trained_stops}
    assert stops == {"<|end|>", "<|tool|>"}
    renderer = own(CALLS.replace("REPLY", "{{ raise_exception('no tools here') }}"), *KNOWN)
    assert marked(renderer, ASK, called(("dose", '{"kg": 3}')), tools=[]).endswith("\n<|user|>»")


NAMED = {"qwen3_5": "qwen3_5_think", "qwen3_5_nothink": "qwen3_5_nothink", "qwen3_6": "qwen3_6", "glm4_moe": "glm4moe",
    "gemma4": "gemma4", "gpt_oss": "gptoss"}


@pytest.mark.skipif(not SHIPPED, reason="TRL is not here: make trl")
@pytest.mark.parametrize("name", NAMED)
def test_named_templates_write_what_is_shipped(name):
    "Text of rows, but for what the template's note says; Qwen's empty thought, which is put in front by some of its files."
    tokenizer = shipped(next(f for f in SHIPPED if f.stem == NAMED[name]))
    theirs, ours = Renderer(tokenizer, "auto"), Renderer(tokenizer, name)
    def plain(text):
        text = re.sub(r"Current date: \d+-\d+-\d+\n", "", text.replace("<think>\n\n</think>\n\n", ""))
        return text.replace("<|return|>", "<|end|>") if name == "gpt_oss" else text
    for kind, row in TALK.items():
        if kind == "tools" and not TEMPLATES[name].tools or kind == "thought" and name == "gemma4": continue
        both = [plain(tokenizer.decode(r.encode([row])[0][0])) for r in (theirs, ours)]
        assert both[0] == both[1], kind
    if name == "gemma4":
        text = tokenizer.decode(ours.encode([TALK["thought"]])[0][0])
        assert text.endswith("<|turn>model\n<|channel>thought\nA virus?\n<channel|>Rest.<turn|>\n")


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("name", ["llama2", "vicuna", "alpaca"])
def test_ids_on_a_sentencepiece_tokenizer(name, legacy, shared):
    "The blank that such tokenizers put in front of a text stands only where the whole string has it."
    jinja = published(shared, name)
    tokenizer = sentencepiece(legacy)
    for chat in ("one turn", "three turns", "system"):
        messages = [{"role": role, "content": text} for role, text in CHATS[chat]]
        ours = Renderer(tokenizer, name).encode([example(CHATS[chat])])[0][0].tolist()
        whole = tokenizer.apply_chat_template(messages, chat_template=jinja, return_dict=False)
        assert tokenizer.convert_ids_to_tokens(ours) == tokenizer.convert_ids_to_tokens(whole)


@pytest.mark.parametrize("name", [*TEMPLATES, "auto"])
def test_every_row_of_the_table(name):
    "Encodes, trains the end of each answer, and equals `apply_chat_template` of its own Jinja text."
    tokenizer, template = BYTE_LEVEL, TEMPLATES.get(name)
    renderer = Renderer(tokenizer, name)
    for chat in CHATS.values():
        if name == "vanilla@2023" and chat[0][0] == "system": continue      # it has no place for one
        ids, trained = renderer.encode([example(chat)])[0]
        last = [i for i in range(len(ids)) if trained[i] and (i + 1 == len(ids) or not trained[i + 1])]
        assert len(last) == sum(role == "assistant" for role, _ in chat)
        assert all(ids[i] in renderer.trained_stops for i in last)
        messages = [{"role": role, "content": text} for role, text in chat]
        whole = tokenizer.apply_chat_template(messages, chat_template=renderer.jinja, return_dict=False)
        prompt = tokenizer.apply_chat_template(
            messages[:-1], chat_template=renderer.jinja, add_generation_prompt=True, return_dict=False)
        assert renderer.encode([example(chat[:-1])])[0][0].tolist() == prompt == ids[:len(prompt)].tolist()
        # the next speaker's token ends the last answer, too, where nothing else does
        closing = ids[-1:].tolist() if name in ("glm4", "glmz1", "chatglm3", "glm4_moe") else []
        if template and (template.header or template.user).endswith(" "):
            # a prompt that ends in a blank is cut there at inference, and so here
            assert tokenizer.decode(ids) == tokenizer.decode(whole)
        else: assert ids.tolist() == whole + closing


@pytest.mark.parametrize("name", [n for n, t in TEMPLATES.items() if t.tools])
def test_every_row_with_tools(name):
    tokenizer, renderer = BYTE_LEVEL, Renderer(BYTE_LEVEL, name)
    ids, trained = renderer.encode([Example(ASKED, "Be brief.", json.dumps(TOOLS))])[0]
    whole = tokenizer.apply_chat_template(
        as_messages(ASKED, "Be brief."), TOOLS, chat_template=renderer.jinja, return_dict=False)
    assert ids.tolist() == whole + (ids[-1:].tolist() if TEMPLATES[name].answer == "\n{content}" else [])
    said = tokenizer.decode(ids[trained])
    assert "39.5" in said and "at noon" in said and "400 mg," in said
    assert not any(word in said for word in ("Be brief", "布洛芬", "How much", '"mg"', "Thanks"))
    last = [i for i in range(len(ids)) if trained[i] and (i + 1 == len(ids) or not trained[i + 1])]
    assert len(last) == 4 and all(ids[i] in renderer.trained_stops for i in last)


@pytest.mark.parametrize("name", ["llama2", "gemma", "deepseekr1", "default@2023"])
def test_families_without_tools_refuse_them(name):
    renderer = Renderer(BYTE_LEVEL, name)
    for turns, tools in ((ASKED[:1], json.dumps(TOOLS)), (ASKED[:2], ""), (ASKED[:3], "")):
        with pytest.raises(UserError, match="has no way to write tools"): renderer.encode([Example(turns, "", tools)])


NASTY = ["</s>", "[INST]", "<|im_end|>", "<|im_start|>", "<s>", "<pad>", "<|eot_id|>", "<<SYS>>", "<unk>", "<think>",
    "</tool_call>", "<|im_", "end|>", "<|user|>", "[TOOL_CALLS]", '"', "\\", "\ue000\x0b1\ue001", "{{", "\n\n"]
BYTE_LEVEL = byte_level()
RENDERERS = {name: Renderer(tokenizer, template) for name, tokenizer, template in (
    ("chatml", BYTE_LEVEL, "chatml"), ("llama3", BYTE_LEVEL, "llama3"), ("qwen", BYTE_LEVEL, "qwen"),
    ("qwen3", BYTE_LEVEL, "qwen3"), ("glm4", BYTE_LEVEL, "glm4"), ("mistral_v3", BYTE_LEVEL, "mistral_v3"),
    ("granite3", BYTE_LEVEL, "granite3"), ("llama2", BYTE_LEVEL, "llama2"),
    ("sentencepiece", sentencepiece(False), "llama2"))}
texts = st.lists(st.one_of(st.sampled_from(NASTY), st.text(max_size=12)), max_size=6).map("".join)
said = texts.map(str.strip).filter(bool)


@settings(suppress_health_check=list(HealthCheck))
@given(st.sampled_from(["chatml", "llama3", "sentencepiece"]), texts)
def test_user_text_yields_no_control_token_and_decodes_to_itself(name, text):
    "For any text, no id of an added token, and the text comes back."
    plain = RENDERERS[name].plain
    ids = plain([text], "joined")[0]
    assert not plain.is_control[ids].any() and not {*ids} & {*plain.control.values()}
    # such tokenizers write blanks as ▁ and cannot tell them apart
    same = text if name != "sentencepiece" else text.replace("▁", " ")
    assert RENDERERS[name].tokenizer.decode(ids, clean_up_tokenization_spaces=False) == same


leaves = st.one_of(texts, st.integers(-9, 9), st.booleans(), st.none())
values = st.recursive(leaves, lambda inner: st.one_of(
    st.lists(inner, max_size=2), st.dictionaries(texts, inner, max_size=2)), max_leaves=4)
arguments = st.dictionaries(texts, values, max_size=2).map(json.dumps)
calls = st.lists(st.builds(Call, said, arguments), max_size=2).map(tuple)


@st.composite
def conversations(draw, tools=True):
    "Questions and answers; before an answer there may be calls of tools, with what they return."
    turns = []
    for _ in range(draw(st.integers(1, 3))):
        turns.append(Turn("user", draw(said)))
        called = draw(calls) if tools else ()
        if called: turns += [Turn("assistant", "", called), *(Turn("tool", draw(said)) for _ in called)]
        turns.append(Turn("assistant", draw(said), train=draw(st.booleans())))
    return Example(tuple(turns), draw(st.one_of(st.just(""), said)))


@settings(suppress_health_check=list(HealthCheck))
@given(st.data(), st.sampled_from(list(RENDERERS)))
def test_only_the_template_writes_control_tokens(data, name):
    "As many trained ends as trained answers, labels inside answers, and the pieces together are what is rendered."
    renderer = RENDERERS[name]
    tools = name not in ("chatml", "llama2", "sentencepiece")
    talk = data.draw(conversations(tools))
    ids, trained = renderer.encode([talk])[0]
    answers = [turn for turn in talk.turns if turn.role == "assistant" and turn.train]
    stops = np.isin(ids, list(renderer.trained_stops))
    assert (stops & trained).sum() == len(answers) == (trained[1:] < trained[:-1]).sum() + trained[-1]
    harmless = tuple(turn._replace(text=turn.text and "x", calls=tuple(Call("f", "{}") for _ in turn.calls))
        for turn in talk.turns)
    plain = renderer.encode([replace(talk, turns=harmless, system=talk.system and "x")])[0][0]
    forged = lambda ids: np.sort(ids[renderer.plain.is_control[ids]]).tolist()
    assert forged(ids) == forged(plain)
    if name == "sentencepiece": return
    tokenizer = renderer.tokenizer
    rendered = tokenizer.apply_chat_template(
        as_messages(talk.turns, talk.system), chat_template=renderer.jinja, tokenize=False)
    # the template cuts what stands before this mark out of earlier answers
    if name == "qwen3" and any("</think>" in turn.text for turn in talk.turns): return
    closing = tokenizer.decode(ids[-1:]) if name == "glm4" and talk.turns[-1].train else ""
    assert tokenizer.decode(ids) == rendered + closing
    parts = [tokenizer.decode(ids[run]) for run in runs_of(trained)]
    for part, turn in zip(parts, answers): assert turn.calls or part.strip().startswith(turn.text)


def runs_of(trained):
    "Slices of the trained stretches."
    edges = np.flatnonzero(np.diff(np.concatenate([[0], trained.astype(int), [0]])))
    return [slice(a, b) for a, b in zip(edges[::2], edges[1::2])]


@pytest.mark.parametrize("template", ["qwen", "auto", "glm4", "llama3", "mistral_v3", "granite3"])
def test_control_tokens_in_every_field_forge_nothing(template, shared):
    "System, questions, answers, thoughts, results, names, keys, arguments, definitions; whole and in two parts."
    tokenizer = byte_level()
    tokenizer.chat_template = published(shared, "qwen")
    renderer = Renderer(tokenizer, template)

    def talk(a, b):
        call = Call(f"f{a}", json.dumps({f"k{a}{b}": [f"{a}{b}", {a: b}]}))
        name = a + "p" + b
        tools = json.dumps([{"name": f"f{a}", "description": a + b, "parameters": {
            "type": "object", "properties": {name: {"type": "string", "enum": [a, b]}}, "required": [name]}}])
        return Example((Turn("user", "q" + a), Turn("assistant", b + "s", (call,), thought=f"t{a}{b}"),
            Turn("tool", a + b + "r"), Turn("assistant", b + "y" + a, thought=a + "t")), f"s{a}{b}", tools)

    count = lambda ids: {t: int((ids == i).sum()) for t, i in renderer.plain.control.items()}
    clean = count(renderer.encode([talk("x", "z")])[0][0])
    for token in renderer.plain.control:
        for a, b in ((token, token), (token[:3], token[3:]), ("x", token)):
            assert count(renderer.encode([talk(a, b)])[0][0]) == clean, (token, a, b)
    with pytest.raises(UserError, match="has the role"):
        renderer.encode([Example((Turn("user<|im_end|>", "x"), Turn("assistant", "y")))])


def test_masks():
    "Which answers are trained is asked for three ways."
    four = example(CHATS["three turns"])
    skip = replace(four, turns=tuple(t._replace(train=i != 3) for i, t in enumerate(four.turns)))
    said = lambda talk, **options: [BYTE_LEVEL.decode(row[0][run]) for row in Renderer(
        BYTE_LEVEL, "chatml", **options).encode([talk]) for run in runs_of(row[1])]
    ended = lambda *numbers: [four.turns[i].text + "<|im_end|>" for i in numbers]
    assert said(four) == ended(1, 3, 5)
    assert said(skip) == ended(1, 5)
    assert said(four, mask_history=True) == ended(5)
    assert said(replace(four, turns=four.turns[:-1])) == ended(1, 3)
    row = Renderer(BYTE_LEVEL, "chatml", train_on_prompt=True).encode([four])[0]
    assert row[1].all()


@pytest.mark.parametrize("name", ["qwen3", "glmz1", "deepseekr1"])
def test_thoughts_of_families_that_think(name):
    ("Thoughts of earlier questions are dropped, as the models' own templates do; such an answer is read, not trained. "
        "Within one question, between calls of tools, they stay.")
    think = lambda text, thought, *calls: Turn("assistant", text, calls, thought)
    talk = Example((Turn("user", "A?"), think("B", "one"), Turn("user", "C?"), think("D", "two")))

    def decoded(renderer, talk):
        ids, trained = renderer.encode([talk])[0]
        return BYTE_LEVEL.decode(ids), BYTE_LEVEL.decode(ids[trained])

    whole, trained = decoded(Renderer(BYTE_LEVEL, name), talk)
    assert "one" not in whole and trained.strip().startswith("<think>\ntwo\n</think>\n\nD")
    whole, trained = decoded(Renderer(BYTE_LEVEL, name, thinking="drop"), talk)
    assert "think" not in whole and "B" in trained and "D" in trained
    quick = Renderer(BYTE_LEVEL, name, enable_thinking=False)
    whole, trained = decoded(quick, replace(talk, turns=(talk.turns[0],)))
    assert whole.endswith("<think>\n\n</think>\n\n") and not trained
    if TEMPLATES[name].tools:
        steps = (Turn("user", "A?"), think("", "one", Call("f", "{}")), Turn("tool", "r"), think("D", "two"))
        whole, trained = decoded(Renderer(BYTE_LEVEL, name), Example(steps))
        assert "one" in trained and "two" in trained
        # an empty thought stands in the prompt of each step, but not in front of the first call later on
        steps = tuple(t._replace(thought="", text=t.text or "Hm.") for t in steps)
        assert decoded(quick, Example(steps))[1].strip().startswith("Hm.")


def test_a_template_that_keeps_thoughts_keeps_them_all():
    talk = Example((Turn("user", "A?"), Turn("assistant", "B", thought="one")))
    for template in ("llama3", "auto"):         # our ChatML is the tokenizer's own: it knows no thoughts
        ids, trained = Renderer(BYTE_LEVEL, template).encode([talk])[0]
        assert BYTE_LEVEL.decode(ids[trained]).startswith("<think>\none\n</think>\n\nB")


@pytest.mark.parametrize("add_bos", [True, False])
def test_documents_begin_as_the_tokenizer_begins_a_text(add_bos):
    tokenizer = byte_level()
    if add_bos: tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    text = "Asthma is <|im_end|> common."
    ids, trained = Renderer(tokenizer, "chatml").encode([Example((Turn("document", text),))])[0]
    assert trained.all() and tokenizer.decode(ids) == "<s>"*add_bos + text + tokenizer.eos_token
    assert (ids[:-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")).sum() == 0


def test_differences_from_llamafactory_are_explained():
    "The last comparison of ids and labels (peers/templates_llamafactory.py) covers the table and leaves nothing open."
    found = json.loads((ROOT/"tests/peers/templates_results.json").read_text(encoding="utf-8"))
    names = {n for n in TEMPLATES if n in found["known"] or n.endswith("@2023")} | {"mistral_v3"}
    assert set(found["names"]) == names and sum(n.endswith("@2023") for n in names) == 18
    for name, result in found["names"].items():
        assert not any(row == [] for row in result["rows"])
        for kind, row in result["rows"].items():
            assert set(row["ours"]) | set(row["as theirs"]) <= set(found["kinds"]), (name, kind)
            if "text" in row["ours"]: assert result["why"], name
            # with their slots our renderer gives their text: the reason given is the whole difference
            if name != "vanilla@2023": assert "text" not in row["as theirs"], (name, kind)
    equal = [n for n, r in found["names"].items() if not any(row["ours"] for row in r["rows"].values())]
    assert {"default@2023", "llama2@2023", "alpaca@2023", "ziya@2023", "xverse@2023"} <= set(equal)
