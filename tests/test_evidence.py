"""Kept evidence: whole records without weights, naming no place of a machine; the READMEs' table is made from them."""
import csv
import json
import re
from pathlib import Path

import pytest
from evidence import DATA, KEPT, NAMES, lines

from medllm.records.record import read_run_json
from medllm.records.verify import verify

ROOT = Path(__file__).resolve().parents[1]
RECORDS = sorted(p.parent for p in KEPT.glob("_*/*/*/run.json"))
PLACE = re.compile(r"(?<![\w.:/])/(?:root|home|tmp|work|Users|mnt)/[\w.-]+")


@pytest.mark.parametrize("record", RECORDS, ids=lambda p: p.relative_to(KEPT).as_posix())
def test_a_kept_record_holds(record):
    "Its seal is whole, it is completed, and it has neither weights nor a path of the machine that it was made on."
    assert verify(record, record_only=True).defects == []
    assert read_run_json(record)["status"] == "completed"
    for file in (f for f in record.rglob("*") if f.is_file()):
        assert file.suffix not in (".safetensors", ".bin", ".gguf", ".pt") and file.stat().st_size < 2_000_000, file.name
        if file.suffix != ".png":
            found = PLACE.search(file.read_text(encoding="utf-8"))
            assert not found, (file.name, found)


def strings(value):
    "Texts anywhere in JSON, as long as a sentence."
    if isinstance(value, str) and len(value) > 40: yield value
    for part in value if isinstance(value, list) else value.values() if isinstance(value, dict) else ():
        yield from strings(part)


def test_no_row_of_the_data_and_no_answer_is_kept():
    "Real data are no part of the project, nor is what a model says to requests that it should refuse."
    if not DATA.is_dir(): pytest.skip(f"the real data are not at {DATA}")
    files = ("chatdoctor/chatdoctor5k.json", "pubmedqa/ori_pqal.json", "apollo_multi/dev.json")
    said = {text[:40] for name in files for text in strings(json.loads((DATA/name).read_text(encoding="utf-8")))}
    for file in (DATA/"medsafetybench/train").rglob("*.csv"):
        said |= {text[:40] for row in csv.DictReader(file.open(encoding="utf-8")) for text in strings(row)}
    assert len(said) > 5000 and not list(KEPT.rglob("predictions.jsonl"))
    for file in (f for f in KEPT.rglob("*") if f.suffix in (".json", ".jsonl", ".ipynb", ".md")):
        text = file.read_text(encoding="utf-8")
        assert not any(text[at:at + 40] in said for at in range(len(text) - 39)), file


def test_no_output_of_a_notebook_names_a_place_of_a_machine():
    "A warning of a library has the path that it lies at; the stream that warnings go to is kept with a notebook too."
    shown = {(p.relative_to(ROOT).as_posix(), cell["id"]): json.dumps(cell.get("outputs", []), ensure_ascii=False)
        for p in (ROOT/"nbs").rglob("*.ipynb") for cell in json.loads(p.read_text(encoding="utf-8"))["cells"]}
    assert len(shown) > 1000 and [where for where, text in shown.items() if PLACE.search(text)] == []


@pytest.mark.parametrize("readme", ("README.md", "README_zh.md"))
def test_the_readmes_have_the_table(readme):
    text = (ROOT/readme).read_text(encoding="utf-8")
    assert [line for line in lines() if line not in text] == []


def test_each_evidence_says_what_it_is():
    assert len(NAMES) == 8 and all(make.__doc__ for make in NAMES.values())
    assert {p.name for p in KEPT.glob("_*")} <= {f"_{name}" for name in NAMES}
