"""Files of other people with any damage: a sentence each, in ten seconds and a gigabyte. Records: test_foreign_records."""
import io
import json
import random
import re
import shutil
import zipfile
from pathlib import Path

import pytest

from faults.mutate import both, json_mutations, mutations, survives

from medllm.core import UserError


@pytest.fixture
def model(tmp_path):
    from medllm.models.tiny import tiny_folder
    return Path(shutil.copytree(tiny_folder(), tmp_path/"model"))


@pytest.fixture
def adapter(tmp_path):
    from medllm.models.adapters import AdaptPlan, adapt
    from medllm.models.loading import load_model
    adapt(load_model("tiny"), AdaptPlan(target="q_proj,v_proj", rank=2)).save_pretrained(tmp_path/"adapter")
    return tmp_path/"adapter"


def answered(folder):
    "Load what lies in a folder, and let it read and answer."
    from medllm.data.formats import Example
    from medllm.data.messages import Turn
    from medllm.models.chat import ModelChoice, load_chat_model
    from medllm.models.sampling import Sampling
    chat = load_chat_model(ModelChoice(str(folder)), "cpu")
    turns = (Turn("user", "Fever?"), Turn("assistant", "Rest. 发热 \u2009°"))
    chat.renderer.encode([Example(turns)])
    chat.answers([chat.prompt(turns[:1])], Sampling(max_new_tokens=2, temperature=0))


# fields that published files have and those of the tiny model lack
PUBLISHED = {
    "generation_config.json": {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05,
        "eos_token_id": [4, 2], "max_new_tokens": 2048, "max_length": 1024, "num_beams": 1, "suppress_tokens": None,
        "cache_implementation": None, "no_repeat_ngram_size": 0, "stop_strings": None},
    "tokenizer_config.json": {"add_bos_token": True, "add_eos_token": False, "add_prefix_space": False, "padding_side": "right",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "sp_model_kwargs": {}, "legacy": False,
        "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": False, "rstrip": False,
            "single_word": False},
        "added_tokens_decoder": {str(n): {"content": text, "lstrip": False, "normalized": False, "rstrip": False,
            "single_word": False, "special": True} for n, text in enumerate(("<pad>", "<s>"))}}}


def published(folder, name):
    "The folder with a file as a publisher writes it."
    (folder/name).write_text(json.dumps(json.loads((folder/name).read_text()) | PUBLISHED[name], indent=2))
    return folder


def a_model(folder, name, tmp_path):
    def read(_, data):
        (folder/name).write_bytes(data)
        answered(folder)
    return read, (folder/name).read_bytes()


def header_of(whole):
    "The header of a safetensors file as JSON text, and what follows."
    size = int.from_bytes(whole[:8], "little")
    return whole[8:8 + size], whole[8 + size:]


def headers(whole, seed, n):
    "Safetensors files of which only the header is another, with its length or without."
    header, rest = header_of(whole)
    for k, (name, data) in enumerate(mutations(whole[:8 + len(header)], seed, n//2)): yield name, data + rest
    for k, (name, data) in enumerate(json_mutations(header, seed, n - n//2)):
        yield name, (len(header) if k % 5 == 0 else len(data)).to_bytes(8, "little") + data + rest


def registry(tmp_path):
    "A registry in which nearly every field is used; no entry asks the network when it is read."
    from medllm.data.accounts import load_examples
    from medllm.data.registry import load_registry
    folder = tmp_path/"data"
    folder.mkdir()
    rows = [{"instruction": "Fever?", "input": "", "output": "Rest.", "system": "S", "history": [["a", "b"]]}]*2
    (folder/"a.json").write_text(json.dumps(rows))
    (folder/"b.jsonl").write_text(json.dumps({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}],
        "tools": "[]", "chosen": {"from": "gpt", "value": "A"}, "rejected": {"from": "gpt", "value": "B"}}) + "\n")
    entries = {"a": {"file_name": "a.json", "formatting": "alpaca", "columns": {"prompt": "instruction", "query": "input",
            "response": "output", "system": "system", "history": "history"}, "split": "train", "num_samples": 1,
            "license": "Apache-2.0", "private": False},
        "b": {"file_name": "b.jsonl", "formatting": "sharegpt", "ranking": True, "columns": {"messages": "conversations",
            "tools": "tools", "chosen": "chosen", "rejected": "rejected"}, "tags": {"role_tag": "from", "content_tag": "value",
            "user_tag": "human", "assistant_tag": "gpt"}, "file_sha256": "ab"*32}}
    def read(_, data):
        (folder/"dataset_info.json").write_bytes(data)
        for source in load_registry(str(folder)).values():
            if not (source.hub or source.cloud or source.script): load_examples(source)
    return read, json.dumps(entries, indent=1).encode()


def reader(tmp_path, name):
    "Reads the rows of a file with a name."
    from medllm.data.readers import read_file
    def read(_, data):
        (tmp_path/name).write_bytes(data)
        for row in read_file(tmp_path/name): row.where
    return read


def rows(n=40):
    return {"question": [f"Fever {k}? 发热" for k in range(n)], "answer": ["Rest." if k % 3 else None for k in range(n)],
        "number": list(range(n)), "share": [k/7 for k in range(n)]}


def sheet(tmp_path):
    "A spreadsheet with shared texts, dates, numbers, formulas and two sheets."
    import datetime
    import openpyxl
    book = openpyxl.Workbook()
    first, table = book.active, rows()
    first.append([*table, "day", "formula"])
    for n, values in enumerate(zip(*table.values())):
        first.append([*values, datetime.datetime(2026, 11, 1 + n % 28), f"=C{n + 2}*2"])
    book.create_sheet("other").append(["x"])
    book.save(tmp_path/"good.xlsx")
    return shared_texts(tmp_path/"good.xlsx")


def shared_texts(file):
    "The sheet as Excel writes it: texts stand in a part of their own."
    with zipfile.ZipFile(file) as archive: parts = {i.filename: archive.read(i) for i in archive.infolist()}
    texts, within = [], re.compile(rb't="inlineStr"><is>(<t>.*?</t>)</is>')
    def number(found): return b't="s"><v>%d</v>' % (texts.append(found[1]) or len(texts) - 1)
    name = b"xmlns=\"http://schemas.openxmlformats.org/spreadsheetml/2006/main\""
    parts["xl/worksheets/sheet1.xml"] = within.sub(number, parts["xl/worksheets/sheet1.xml"])
    parts["xl/sharedStrings.xml"] = b"<sst %s>%s</sst>" % (name, b"".join(b"<si>%s</si>" % text for text in texts))
    kind = b"application/vnd.openxmlformats-officedocument.spreadsheetml.sharedStrings+xml"
    parts["[Content_Types].xml"] = parts["[Content_Types].xml"].replace(b"</Types>",
        b'<Override PartName="/xl/sharedStrings.xml" ContentType="%s"/></Types>' % kind)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items(): archive.writestr(name, data)
    assert len(texts) > 40
    return out.getvalue()


def sheets(whole, seed, n):
    "Archives with any damage; archives that are whole and hold a damaged part."
    yield from mutations(whole, seed, n//2)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive: parts = {i.filename: archive.read(i) for i in archive.infolist()}
    names = [name for name in parts if name.endswith((".xml", ".rels"))]
    for k in range(n - n//2):
        rng = random.Random(f"sheets {seed} {k}")
        name = rng.choice(["xl/worksheets/sheet1.xml", "xl/workbook.xml", "xl/sharedStrings.xml", *names])
        done, data = list(mutations(parts[name], f"{seed} {k}", 2))[1]
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED))) as archive:
            for other, text in parts.items():
                if other == name or rng.random() > .01: archive.writestr(other, data if other == name else text)
        yield f"{name}-{done}", out.getvalue()


def tables(tmp_path, kind):
    "Parquet and Arrow files of several makes: with dictionaries, lists, structures, compressed or not."
    import pyarrow as pa
    import pyarrow.parquet
    said = [[{"role": "user", "content": f"Q{k}"}, {"role": "assistant", "content": "A"}] for k in range(40)]
    table = pa.table(rows() | {"said": said,
        "kind": pa.array(["a", "b"]*20).dictionary_encode(), "odd": pa.array([[1, 2], None]*20)})
    made = []
    for n, how in enumerate(("none", "snappy", "zstd", "gzip")):
        file = tmp_path/f"good{n}.{kind}"
        if kind == "parquet": pa.parquet.write_table(table, file, compression=how, row_group_size=25, use_dictionary=n % 2 == 0,
            data_page_version=("1.0", "2.0")[n//2])
        else:
            options = pa.ipc.IpcWriteOptions(compression=None if how in ("none", "gzip") else how.replace("snappy", "lz4"))
            new = pa.ipc.new_file if n % 2 else pa.ipc.new_stream
            with new(file, table.schema, options=options) as out: out.write_table(table)
        made.append(file.read_bytes())
    return made


def damaged_tables(made, seed, n):
    "Damage anywhere, and in what describes the rest: footers and the headers of pages and messages."
    for k in range(n):
        rng, whole = random.Random(f"tables {seed} {k}"), made[k % len(made)]
        parts = [slice(0, len(whole)), slice(max(0, len(whole) - 3000), len(whole)), slice(0, 400), slice(4, 60)]
        part = rng.choice(parts)
        done, data = list(mutations(whole[part], f"{seed} {k}", 2))[1]
        yield done, whole[:part.start] + data + whole[part.stop:]


def kinds(kind, tmp_path, request):
    "What reads the kind of file, a good one, and what damages it."
    of = request.getfixturevalue
    if kind in ("config.json", "tokenizer.json"): return *a_model(of("model"), kind, tmp_path), both
    if kind in PUBLISHED: return *a_model(published(of("model"), kind), kind, tmp_path), both
    if kind == "adapter_config.json": return *a_model(of("adapter"), kind, tmp_path), both
    if kind == "safetensors": return *a_model(of("model"), "model.safetensors", tmp_path), headers
    if kind == "adapter.safetensors": return *a_model(of("adapter"), "adapter_model.safetensors", tmp_path), headers
    if kind == "dataset_info.json": return *registry(tmp_path), both
    if kind == "xlsx": return reader(tmp_path, "t.xlsx"), sheet(tmp_path), sheets
    return reader(tmp_path, f"t.{kind}"), tables(tmp_path, kind), damaged_tables


KINDS = ("config.json", "generation_config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json", "safetensors",
    "adapter.safetensors", "dataset_info.json", "xlsx", "parquet", "arrow")


def walk(kind, n, seed, tmp_path, request):
    read, good, damaged = kinds(kind, tmp_path, request)
    for whole in good if isinstance(good, list) else [good]: read("as it is", whole)
    found = survives(read, damaged(good, seed, n), allowed=UserError)
    assert not found, f"{len(found)} of {n}: " + "\n".join(found[:8])


@pytest.mark.parametrize("kind", KINDS)
def test_some_mutated_files(kind, tmp_path, request):
    "A sentence, or what is right in it; no hang, no flood."
    walk(kind, 32, "some", tmp_path, request)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_500_mutated_files(kind, tmp_path, request): walk(kind, 500, "all", tmp_path, request)
