"""Compares our templates with LLaMA-Factory's, name by name: ids and labels of the same rows on the same tokenizer.

    python tests/peers/templates_llamafactory.py [--python ITS_PYTHON] [--work FOLDER]

Without --python (or LLAMAFACTORY_PYTHON) it makes an environment of its own and installs it there. The release of 2023
is only unpacked: its template file stands alone. The outcome is written to templates_results.json beside this file; a
difference that nobody explained fails.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent/"data")]
from medllm.data.formats import Call, Example, Turn  # noqa: E402
from medllm.data.templates import TEMPLATES  # noqa: E402
from medllm.data.tokens import Renderer  # noqa: E402
from test_templates import TOOLS, byte_level  # noqa: E402

TORCH = "torch==2.13.0"
TODAY = ["llamafactory==0.9.5", "transformers==5.6.0", "peft==0.18.1"]
OLD = "llmtuner==0.2.0"

# Kinds of difference that the script recognises by itself, and why ours is as it is
KINDS = {
    "after": "Theirs also trains what stands behind the token that ends an answer (a line break). Generation stops at "
        "that token, so nothing behind it is ever the model's to say.",
    "pieces": "The text is the same, the ids are not: theirs tokenises prefix, system text, question and answer each "
        "for itself, so pieces that a tokenizer joins in the whole string stay apart. Ours equal apply_chat_template.",
    "end": "Theirs writes no token behind an answer: EOS is only a label, at the place where the next question begins, "
        "and stands behind the last answer, even where the format has a token of its own for that. Ours ends each "
        "answer with a token that is there (the format's, or EOS): labels are ids, and inference sees the same.",
    "empty thought": "Theirs puts an empty thought into each answer without one and trains it (its default), which "
        "teaches the model not to think. Ours leaves the data as it is; enable_thinking=False asks for it.",
    "text": "The text differs, as said by name.",
    "lost": "The format has no place for a system text: ours refuses the row, theirs drops the text.",
    "refused": "Ours says that the family has no way to write tools; theirs falls back to a format that its models "
        "never saw.",
}


def _dated(name):
    "Slots with the date of the day in the system text."
    tools = TEMPLATES[name].tools
    day = datetime.now().strftime("%d %b %Y")
    return dict(tools=replace(tools, join="", system=(
        f"Cutting Knowledge Date: December 2023\nToday Date: {day}\n\n{tools.system}")))


def _tools_in_system(name):
    "Slots with the definitions of tools behind the system text."
    tools = TEMPLATES[name].tools
    return dict(tools=replace(tools, turn="", system=tools.turn))


_DATE = ("theirs writes the day of training into the system text of rows with tools, so the same data gives other ids "
    "tomorrow, and nothing between that and a system text of the data")
_THINK = "<think>\n{thought}\n</think>\n\n"
_OSS = "<|channel|>analysis<|message|><|end|><|start|>assistant<|channel|>final<|message|>"
_MISTRAL = "the published template writes tools in front of [INST]; theirs writes them behind the system text"
THEIR_NAMES = {"mistral_v3": "mistral"}   # ours to theirs, where the format has another name
# By name: slots that turn our row into theirs (the comparison is then made with it), and why ours differs
_PUBLISHED = "the published template has "
EXPLAINED = {
    "alpaca": (dict(default_system="Below is an instruction that describes a task. Write a response that "
        "appropriately completes the request.\n\n", system="{content}", prefix=""),
        _PUBLISHED + "BOS in front, no system text of its own, and an empty line behind one that is given"),
    "chatml": (dict(prefix="", tools=None), _PUBLISHED + "BOS in front; tools are written as Hermes does"),
    "default": (dict(prefix=""), "models whose tokenizer has a BOS were trained with it in front of every text"),
    "deepseek": (dict(answer="{content}{eos}"), _PUBLISHED + "a blank in front of the answer"),
    "falcon": (dict(header="\nFalcon:", user="User: {content}", answer="{content}{eos}", after="\n"),
        _PUBLISHED + "'Assistant:' on a paragraph of its own"),
    "granite3": (dict(tools=None), _PUBLISHED + "roles and tokens for tools, see KINDS for what theirs does"),
    "llama2": (dict(answer="{content}{eos}"), _PUBLISHED + "blanks around the answer; theirs relies on the blank that "
        "a SentencePiece tokenizer puts in front of each piece, and misses the one behind"),
    "llama3": (_dated("llama3"), _DATE),
    "llama4": (_dated("llama4"), _DATE),
    "ministral": (_tools_in_system("ministral"), _MISTRAL),
    "mistral_small": (_tools_in_system("mistral_small"), _MISTRAL),
    "mistral_v3": (_tools_in_system("mistral_v3"), _MISTRAL),
    "vanilla@2023": ({}, "theirs drops earlier turns and the system text without a word; ours keeps the turns and "
        "refuses a system text that would be lost"),
    "llama2_zh": (dict(answer="{content}{eos}"), "as llama2"),
    "mistral": (dict(system="", user="[INST] {content}[/INST]", user_with_system="[INST] {system}\n\n{content}[/INST]"),
        _PUBLISHED + "a blank in front of [/INST] and the system text in front of [INST]; their format is our "
        "mistral_v3"),
    "openchat": (dict(system="{content}", user="GPT4 Correct User: {content}{eos}", answer="{content}{eos}"),
        _PUBLISHED + "<|end_of_turn|> and a blank in front of the answer; theirs takes the tokenizer's EOS, which is "
        "that token for this model, and puts no token behind a system text"),
    "phi_small": (dict(prefix=""), _PUBLISHED + "BOS in front; theirs means to, but its prefix is a set of a "
        "token's name, which its code drops without a word"),
    "solar": (dict(prefix="", after=""), _PUBLISHED + "BOS in front and an empty line behind an answer"),
    "ministral3": (dict(system="", user_with_system="[INST]{system}\n\n{content}[/INST]", thought=_THINK, **_tools_in_system(
        "ministral")), _PUBLISHED + "a system prompt between tokens of its own, [THINK] around thoughts, and [ARGS] behind the "
        "name of a function; theirs is their ministral of before"),
    "gemma4": (dict(system="<|turn>system\n<|think|>{content}<turn|>\n", default_system="You are a helpful assistant.",
        thoughtless="<|channel>thought\n<channel|>", thought="<|channel>thought\n<channel|>" + _THINK),
        _PUBLISHED + "no system text of its own and no empty thoughts; theirs asks for thinking in every row, trains an empty "
        "thought in each answer, and puts a real one into the text"),
    "glm4_moe": (dict(answer="{content}", thoughtless="<think>\n\n</think>\n\n\n", thought="\n" + _THINK),
        _PUBLISHED + "<think></think> on a line of its own, closed calls and tags around results; theirs leaves a call open "
        "and puts tools behind a system text that the published file has in a turn of its own"),
    "gpt_oss": (dict(prefix="", system="<|start|>system<|message|>{content}<|end|>",
        default_system="You are ChatGPT, a large language model trained by OpenAI.", thoughtless=_OSS, thought=_OSS + _THINK),
        _PUBLISHED + "the makers' system message and the user's system text behind it, as the developer's; theirs puts one "
        "in the place of the other, trains an empty analysis in each answer, and puts a real one into the text"),
    **dict.fromkeys(("qwen3_5", "qwen3_5_nothink", "qwen3_6"), ({}, _PUBLISHED + "the system text behind the tools, and each "
        "function as its definition has it; theirs writes them the other way round, and without what is around a function")),
    "vicuna": (dict(user="USER: {content} ", system="{content}", answer="{content}{eos}", after="", prefix="",
        default_system=(
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions.")),
        _PUBLISHED + "BOS in front, line breaks between turns, a blank in front of the answer, and no system "
        "text of its own; theirs writes a system text and USER: with nothing between"),
    "zephyr": (dict(system="<|system|>\n{content}{eos}", user="<|user|>\n{content}{eos}", after="",
        default_system="You are Zephyr, a helpful assistant."),
        _PUBLISHED + "a line break behind each EOS, and no system text of its own"),
}

# besides, of rows with tools: the system text in front of them, functions without what is around them, and other tags
WITH_TOOLS = {name: dict(tools=replace(TEMPLATES[name].tools, system=TEMPLATES[name].tools.system.removesuffix("{system}")))
    for name in ("qwen3_5", "qwen3_5_nothink", "qwen3_6")} | {"glm4_moe": dict(tools=replace(TEMPLATES["glm4_moe"].tools, turn="",
        system=TEMPLATES["glm4_moe"].tools.turn.removeprefix("<|system|>\n") + "\n", join="\n\n",
        call="<tool_call>{name}{arguments}", argument="\n<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>",
        result="\n{content}"))}
BARE = "(tool|tojson)", "((tool.function if tool.function is defined else tool)|tojson)"


def rows():
    "Conversations by kind, as both sides read them."
    user, said = (lambda t: Turn("user", t)), (lambda t, **more: Turn("assistant", t, **more))
    call = (Call("dose", '{"kg": 39, "type": "a\\nb\\"c"}'),)
    return {
        "one turn": Example((user("What is asthma?"), said("A disease of the airways."))),
        "history": Example((user("我发烧了"), said("多少度？"), user("39 度"), said("请多喝水。"), user("还有呢?"),
            said("休息。\n\n必要时就医。"))),
        "system": Example((user("Fever?"), said("Rest.")), "You are a careful doctor."),
        "tools": Example((user("How much for 39 kg?"), said("", calls=call), Turn("tool", "400 mg"),
            said("Take 400 mg.")), "Be brief.", json.dumps(TOOLS)),
        "thought": Example((user("Fever?"), said("Rest.", thought="A virus?"))),
    }


def for_them(example):
    "A conversation in their roles."
    role = {"tool": "observation"}
    messages = [{"role": "function", "content": json.dumps([
        {"name": c.name, "arguments": json.loads(c.arguments)} for c in t.calls])} if t.calls else
        {"role": role.get(t.role, t.role),
         "content": (f"<think>\n{t.thought}\n</think>\n\n" if t.thought else "") + t.text} for t in example.turns]
    return {"messages": messages, "system": example.system, "tools": example.tools}


def compare(renderer, theirs, example, name):
    "The kinds of difference of one row."
    tokenizer = renderer.tokenizer
    ids, trained = renderer.encode([example])[0]
    their_ids, their_labels = map(np.array, theirs)
    labels = np.where(trained, ids, -100)
    if ids.tolist() == their_ids.tolist():
        if labels.tolist() == their_labels.tolist(): return []
        more = np.flatnonzero((their_labels != -100) & ~trained)
        behind = all(i == 0 or their_labels[i-1] != -100 for i in more)
        return ["after"] if behind and (trained <= (their_labels != -100)).all() else ["labels"]
    text, their_text = tokenizer.decode(ids), tokenizer.decode(their_ids)
    if text == their_text: return ["pieces"]
    ends = [tokenizer.eos_token, *(tokenizer.decode([i]) for i in renderer.trained_stops)]
    if _without(text, ends) == _without(their_text, ends): return ["end"]
    thought = ["<think>\n\n</think>\n\n"]
    if _without(text, thought) == _without(their_text, thought): return ["empty thought"]
    if _without(text, thought + ends) == _without(their_text, thought + ends): return ["empty thought", "end"]
    return ["text"]


def _without(text, words):
    for word in words: text = text.replace(word, "")
    return text.rstrip("\n")


def environment(folder):
    "Python of a fresh environment with today's release."
    if not (folder/"bin/python").exists():
        venv.create(folder, with_pip=True)
        pip = lambda *words: subprocess.run([folder/"bin/python", "-m", "pip", *words], check=True)
        pip("install", "-q", TORCH)
        pip("install", "-q", TORCH, *TODAY)
        pip("uninstall", "-q", "-y", "torchvision", "torchaudio")     # built for another torch; text needs neither
    return folder/"bin/python"


def ask(python, work, names, package=""):
    "Their ids and labels by name and kind of row."
    byte_level().save_pretrained(work/"tokenizer")
    task = {"tokenizer": str(work/"tokenizer"), "names": names, "package": str(package),
        "rows": {kind: for_them(e) for kind, e in rows().items() if not package or kind not in ("tools", "thought")}}
    (work/"task.json").write_text(json.dumps(task), encoding="utf-8")
    subprocess.run([python, HERE/"llamafactory_rows.py", work/"task.json", work/"out.json"], check=True,
        env={**os.environ, "PYTHONPATH": ""}, stdout=subprocess.DEVNULL)
    return json.loads((work/"out.json").read_text())


def outcome(name, theirs):
    "By kind of row: the differences of our row as it is, and of our row with their slots."
    slots, why = EXPLAINED.get(name, ({}, ""))
    found = {}
    for label, given in (("ours", {}), ("as theirs", slots)):
        for kind, row in theirs.items():
            more = WITH_TOOLS.get(name, {}) if kind == "tools" and label == "as theirs" else {}
            tokenizer, jinja = byte_level(), replace(TEMPLATES[name], **given | more).jinja
            tokenizer.chat_template = jinja.replace(*BARE) if more and name.startswith("qwen") else jinja
            try: kinds = [] if isinstance(row, str) else compare(Renderer(tokenizer, "auto"), row, rows()[kind], name)
            except Exception as e: kinds = ["refused"] if "no way to write tools" in str(e) else (
                ["lost"] if "leaves out the system" in str(e) else [f"error: {e}"])
            if isinstance(row, str): kinds = [f"theirs fails: {row}"]
            found.setdefault(kind, {})[label] = kinds
    return {"rows": found, "why": why}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=os.environ.get("LLAMAFACTORY_PYTHON"), help="Python that has it installed")
    parser.add_argument("--work", type=Path, help="folder for what is made here; a temporary one by default")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        python = args.python or environment(work/"llamafactory")
        names = {n: THEIR_NAMES.get(n, n) for n in TEMPLATES if "@" not in n}
        answer = ask(python, work, sorted({*names.values()}))
        results = {n: outcome(n, answer["rows"][theirs]) for n, theirs in names.items() if theirs in answer["rows"]}
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", OLD, "-d", work], check=True)
        with zipfile.ZipFile(next(work.glob("llmtuner-*.whl"))) as wheel: wheel.extractall(work/"old")
        old = [n.removesuffix("@2023") for n in TEMPLATES if n.endswith("@2023")]
        for name, theirs in ask(python, work, old, work/"old")["rows"].items():
            results[f"{name}@2023"] = outcome(f"{name}@2023", theirs)
    write({"versions": [*TODAY, OLD], "known": answer["known"], "kinds": KINDS, "names": results})


def unexplained(found):
    "Rows whose difference nobody explained, or that still differ in text with the slots that were said to explain it."
    bad = []
    for name, result in found["names"].items():
        for kind, row in result["rows"].items():
            known = set(row["ours"]) | set(row["as theirs"]) <= set(found["kinds"])
            settled = "text" not in row["as theirs"] or name == "vanilla@2023"
            if not known or not settled or ("text" in row["ours"] and not result["why"]): bad.append((name, kind, row))
    return bad


def write(found):
    (HERE/"templates_results.json").write_text(
        json.dumps(found, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
    for name, result in found["names"].items():
        print(name, {kind: row["ours"] for kind, row in result["rows"].items() if row["ours"]},
            {kind: row["as theirs"] for kind, row in result["rows"].items() if row["as theirs"] != row["ours"]})
    if bad := unexplained(found): sys.exit(f"not explained: {bad}")


if __name__ == "__main__": main()
