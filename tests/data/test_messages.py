"""What rows of other people mean: marks of answers not to be learnt, system texts, pictures, calls, texts in pieces."""
import json

import pytest

from medllm.core import UserError
from medllm.data.accounts import OnBad, load_examples
from medllm.data.formats import Call, Turn
from medllm.data.media import media_in
from medllm.data.registry import find_sources
from medllm.data.tokens import Renderer
from medllm.evaluate.items import load_items
from medllm.train.arguments import parse
from medllm.train.inputs import prepare_data


def source_of(folder, rows, **entry):
    "A dataset of rows, registered when an entry is given."
    (folder/"r.json").write_text(json.dumps(rows, ensure_ascii=False))
    if not entry: return find_sources(str(folder/"r.json"))[0]
    (folder/"dataset_info.json").write_text(json.dumps({"set": {"file_name": "r.json", **entry}}))
    return find_sources("set", str(folder))[0]


SHAPES = {"openai": ("messages", "role", "content", "user", "assistant"),
    "sharegpt": ("conversations", "from", "value", "human", "gpt")}


def draft(shape, **marks):
    "A row whose first answer carries marks."
    column, role, content, user, assistant = SHAPES[shape]
    said = lambda who, text, **more: {role: who, content: text, **more}
    return {column: [said(user, "Normal?"), said(assistant, "DRAFT.", **marks), said(user, "Sure?"), said(assistant, "No.")]}


NOT_LEARNT = [{key: value} for key in ("train", "training", "trainable", "weight", "loss", "loss_weight", "loss_scale",
    "loss_mask") for value in (False, 0, 0.0, "false", "0")] + [{"masked": value} for value in (True, 1, "true")]
LEARNT = [{}, {"loss": None}, {"weight": 1}, {"weight": 1.0}, {"loss": True}, {"train": "True"}, {"masked": False}]


@pytest.mark.parametrize("shape", SHAPES)
def test_an_answer_that_is_not_to_be_learnt_is_not_trained(shape, tmp_path, tiny):
    "In every spelling; the tokens of the draft are read, and none of them counts in the loss."
    renderer = Renderer(tiny, "chatml")
    for marks in NOT_LEARNT + LEARNT:
        (example,), account = load_examples(source_of(tmp_path, [draft(shape, **marks)]))
        ids, trained = renderer.encode([example])[0]
        assert ("DRAFT" in tiny.decode(ids[trained])) == (marks in LEARNT), marks
        assert "DRAFT" in tiny.decode(ids) and "No.<|im_end|>" in tiny.decode(ids[trained]) and not account.unread


@pytest.mark.parametrize("marks, said", [({"weight": 0.5}, "'weight' of a message must be true or false"),
    ({"loss": "high"}, "'loss' of a message must be true or false"), ({"loss_mask": [0, 1]}, "'loss_mask' of a message"),
    ({"train": True, "loss": False}, "'loss' and 'train' of a message contradict each other"),
    ({"weight": 1, "masked": True}, "'masked' and 'weight' of a message contradict")])
def test_a_mark_that_is_neither_yes_nor_no_is_an_error(marks, said, tmp_path):
    with pytest.raises(UserError, match=f"line 1: {said}"): load_examples(source_of(tmp_path, [draft("openai", **marks)]))


def test_keys_that_are_not_read_are_named_once(tmp_path, capfd):
    "With what was done about them; also when the rows come out of the cache; never a value."
    rows = [draft("openai", annotator="SECRET", refusal=None, id=7) for _ in range(5)]
    for row in rows: row["messages"][0] |= {"speaker": "SECRET", "loss": True, "weight": 0}
    source_of(tmp_path, rows, formatting="openai")
    flags = dict(dataset="set", dataset_dir=str(tmp_path), tokenized_path=str(tmp_path/"cache"))
    for _ in range(2):
        prepare_data(parse(flags))
        said = [line for line in capfd.readouterr().err.splitlines() if "were not read" in line]
        assert said == ["set: keys of messages that change nothing here and were not read: loss, speaker, annotator"]


def test_system_texts_are_all_kept(tmp_path):
    "A column beside a system turn, two system turns, the same text twice; in pairs, where the chosen answer is a conversation."
    talk = [{"role": "user", "content": "Fever?"}, {"role": "assistant", "content": "Rest."}]
    said = lambda *texts: [{"role": "system", "content": text} for text in texts]
    for column, turns, system in (("Be brief.", said("Be kind."), "Be brief.\n\nBe kind."),
            ("Be kind.", said("Be kind."), "Be kind."), (None, said("Be kind."), "Be kind."), ("Be brief.", [], "Be brief."),
            ("", said("A.", "B."), "A.\n\nB."),
            ("Be brief.", said(""), "Be brief.")):
        (example,), _ = load_examples(source_of(tmp_path, [{"system": column, "messages": turns + talk}]))
        assert (example.system, len(example.turns)) == (system, 2)
    pair = lambda system, answer: said(system) + [talk[0], {"role": "assistant", "content": answer}]
    rows = [{"messages": [], "chosen": pair("Be kind.", "Rest."), "rejected": pair("Be kind.", "Go.")}]
    (example,), _ = load_examples(source_of(tmp_path, rows), "dpo")
    assert (example.system, [t.text for t in example.turns], example.worse.text) == ("Be kind.", ["Fever?", "Rest."], "Go.")
    rows[0]["rejected"] = pair("Be rude.", "Go.")
    assert load_examples(source_of(tmp_path, rows), "dpo")[1].rejected == {"wrong_order": 1}


TEXT = {"instruction": "What does this show?", "output": "A shadow."}
TALK = {"conversations": [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A lung."}]}
part = lambda *parts: {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]},
    {"role": "assistant", "content": "A lung."}]}
PICTURES = {
    "column image": (TALK | {"image": "x/1.png"}, "column 'image'"),
    "column images": (TEXT | {"images": ["x/1.png"]}, "column 'images'"),
    "an id": (TEXT | {"img_id": 17}, "column 'img_id'"), "a path": (TEXT | {"Figure_path": "PMC1.jpg"}, "column 'Figure_path'"),
    "audio": (TEXT | {"audio": {"path": "a.wav", "array": [0.1]}}, "column 'audio'"),
    "video": (TEXT | {"videos": ["v.mp4"]}, "column 'videos'"),
    "bytes": (TEXT | {"scan": {"bytes": "iVBOR", "path": None}}, "column 'scan'"),
    "image_url": (part({"type": "image_url", "image_url": {"url": "x"}}), "message part 'image_url'"),
    "image part": (part({"type": "image", "source": {"data": "iVBOR"}}), "message part 'image'"),
    "input_audio": (part({"type": "input_audio", "input_audio": {"data": "x"}}), "message part 'input_audio'"),
    "input_image": (part({"type": "input_image", "image_url": "x"}), "message part 'input_image'"),
    "video part": (part({"type": "video", "video": "x"}), "message part 'video'"),
    "key of a message": ({"messages": [{"role": "user", "content": "What?", "images": ["a.png"]},
        {"role": "assistant", "content": "A lung."}]}, "message part 'images'")}


@pytest.mark.parametrize("what", PICTURES)
def test_rows_with_pictures_are_refused_by_name_and_count(what, tmp_path):
    "Also behind rows of text; skipped and counted where the user allows it, and then named with the first."
    row, name = PICTURES[what]
    rows = [{"messages": [{"role": "user", "content": "Fever?"}, {"role": "assistant", "content": "Rest."}]}, row, row, row]
    if "instruction" in row: rows[0] = {"instruction": "Fever?", "output": "Rest."} | dict.fromkeys(row.keys() - TEXT.keys())
    with pytest.raises(UserError) as raised: load_examples(source_of(tmp_path, rows))
    assert f"r.json, row 2: {name}" in str(raised.value) and "has 3 such rows of 4" in str(raised.value)
    examples, account = load_examples(source_of(tmp_path, rows), on_bad=OnBad("skip", 3))
    assert (len(examples), account.rejected) == (1, {"picture": 3})
    assert "picture: " in account.lines()[1] and account.lines()[1].endswith("the first is r.json, row 2")


@pytest.mark.parametrize("stage, row", [("pt", {"text": "The left lung."}),
    ("dpo", {"instruction": "?", "chosen": "A", "rejected": "B"}),
    ("kto", {"instruction": "?", "output": "A", "good": True}), ("grpo", {"instruction": "?", "answer": "A"})])
def test_every_stage_refuses_pictures(stage, row, tmp_path):
    entry = {"columns": {"kto_tag": "good"}} if stage == "kto" else {"ranking": True} if stage == "dpo" else {}
    with pytest.raises(UserError, match="column 'image' is a picture"):
        load_examples(source_of(tmp_path, [row | {"image": "a.png"}], **entry), stage)


def test_words_about_pictures_are_text(tmp_path):
    "The mark without a picture, empty columns, a column that the registry names as the text."
    rows = [{"instruction": "What is <image> for?", "output": "A picture."}, TEXT | {"image": None}, TEXT | {"images": []},
        TEXT | {"image": ""}, TEXT | {"image_note": "none"}, TEXT | {"speech": "slow"}]
    assert load_examples(source_of(tmp_path, rows))[1].kept == len(rows)
    named = [{"picture": "A red, swollen joint. What is it?", "output": "Perhaps gout."}]
    assert load_examples(source_of(tmp_path, named, columns={"prompt": "picture"}))[1].kept == 1


def test_calls_made_together_are_one_turn(tmp_path):
    "ShareGPT writes them one behind the other; what is said before a call belongs to it; OpenAI's older key is read."
    say = lambda who, value: {"from": who, "value": value}
    lab, bed = '{"name": "lab", "arguments": {"k": 1}}', '{"name": "bed", "arguments": {}}'
    rows = [{"conversations": [say("human", "Bed 4?"), say("gpt", "Let me see."), say("function_call", lab),
        say("function_call", bed), say("observation", "4.1"), say("observation", "72"), say("gpt", "Fine.")]}]
    (example,), _ = load_examples(source_of(tmp_path, rows))
    calls = (Call("lab", '{"k": 1}'), Call("bed", "{}"))
    assert example.turns[1] == Turn("assistant", "Let me see.", calls)
    assert [t.role for t in example.turns] == ["user", "assistant", "tool", "tool", "assistant"]
    older = [{"role": "user", "content": "Bed 4?"}, {"role": "assistant", "content": None, "function_call":
        {"name": "lab", "arguments": '{"k": 1}'}}, {"role": "tool", "content": "4.1"}, {"role": "assistant", "content": "Fine."}]
    (example,), _ = load_examples(source_of(tmp_path, [{"messages": older}]))
    assert example.turns[1].calls == calls[:1]


@pytest.mark.parametrize("passage", [["A cohort.", " 12 died. "], {"contexts": ["A cohort.", "12 died."], "labels": ["B", "R"]},
    ["A cohort.", None, "", "12 died."], "A cohort.\n12 died."])
def test_a_text_in_pieces_is_the_same_in_training_and_evaluation(passage, tmp_path):
    "As the contexts of PubMedQA and mediQ are written."
    rows = [{"question": "Did most live?", "context": passage, "final_decision": word} for word in ("yes", "no")]
    source = source_of(tmp_path, rows, columns={"prompt": "question", "query": "context", "response": "final_decision"})
    examples, account = load_examples(source)
    items = load_items(str(tmp_path/"r.json")).items
    assert account.kept == 2 and [i.context for i in items] == ["A cohort.\n12 died."]*2
    assert [e.turns[0].text for e in examples] == [f"{i.question}\n{i.context}" for i in items]
    document = source_of(tmp_path, [{"text": passage}], columns={"prompt": "text"})
    assert load_examples(document, "pt")[0][0].turns[0].text == "A cohort.\n12 died."


def test_several_answers_are_no_text_in_pieces(tmp_path):
    "Training would take all of them for one answer."
    entry = dict(columns={"prompt": "q", "response": "a"}, formatting="alpaca")
    with pytest.raises(UserError, match="column 'a' must be text, not list"):
        load_examples(source_of(tmp_path, [{"q": "Fever?", "a": ["Rest.", "Drink."]}], **entry))
    assert load_examples(source_of(tmp_path, [{"q": "Fever?", "a": ["Rest."]}], **entry))[0][0].turns[1].text == "Rest."
    with pytest.raises(UserError, match="column 'q' must be text, not list"):
        load_examples(source_of(tmp_path, [{"q": ["Fever?", 7], "a": "Rest."}], **entry))


def test_pubmedqa_is_read_as_it_is_published(shared):
    "The real file: the abstract in training is the passage of the evaluation."
    file = shared("data/pubmedqa/ori_pqal.json")
    items = {i.id: i for i in load_items(str(file)).items}
    from medllm.data.registry import Columns, Source
    source = Source("pubmedqa", files=(file,), columns=Columns(prompt="QUESTION", query="CONTEXTS", response="LONG_ANSWER"),
        mapped=frozenset({"prompt", "query", "response"}), formatting="alpaca")
    examples, account = load_examples(source)
    assert account.kept == 1000 and len(items) >= 500
    contexts = {i.question: i.context for i in items.values()}
    found = [e for e in examples if e.turns[0].text.split("\n")[0] in contexts]
    assert len(found) >= 500
    assert all(e.turns[0].text == f"{q}\n{contexts[q]}" for e in found for q in [e.turns[0].text.split("\n")[0]])


def test_a_row_that_speaks_against_being_learnt_is_counted(tmp_path):
    "A mark of a whole row, and the mark of a picture without a column for it; body weights and marks within a sentence pass."
    rows = [{"instruction": f"Fever of case {i}?", "output": "Rest."} for i in range(4)]
    rows[0] |= {"loss": False, "weight": 71.5}
    rows[1] |= {"weight": 0, "train": "yes"}
    rows[2]["instruction"] = "<image>\nWhat does the picture show?"
    rows[3] |= {"instruction": "What does the mark <image> stand for?", "note": "<image>"}
    examples, account = load_examples(source_of(tmp_path, rows))
    assert len(examples) == 4 and account.kept == 4
    assert account.unread == {"row 'loss'": 1, "row 'weight'": 1, "mark '<image>'": 1}
    assert [line.partition(": ")[2].split(":")[0].split(", which")[0] for line in account.lines()[1:]] == [
        "1 row learnt in spite of 'loss' in the row", "1 row learnt in spite of 'weight' in the row",
        "1 row with the mark of a picture, '<image>'"]


def test_the_name_of_a_picture_in_a_text_is_not_told():
    "It may be that of a patient."
    assert media_in({"q": "See ![Anna Muster 1950](muster_anna.png) here."}) == "mark '![](…)'"
    assert media_in({"q": 'See <img alt="Anna Muster" src="a.png"> here.'}) == "mark '<img src='"
