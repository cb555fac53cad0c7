"""What other people's files may do here: nothing but be read. Registries, models, adapters, templates, tables."""
import encodings.aliases
import gzip
import json
import pkgutil
import re
import time

import pytest
from fastcore.test import test_fail as fails

from medllm.core import UserError
from medllm.data.readers import read_file, read_rows
from medllm.data.registry import Source, find_sources, parse_entry
from medllm.yaml_file import read_yaml


@pytest.fixture
def secret(tmp_path):
    "A folder beside the registry with a file that no registry may name."
    place = tmp_path/"mine"
    place.mkdir()
    (place/"rows.jsonl").write_text('{"instruction": "secret", "output": "words"}\n')
    (tmp_path/"registry").mkdir()
    return place


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.txt", "a.json.gz"])
def test_any_encoding_that_a_registry_names_is_taken_or_refused(name, tmp_path):
    "Python has encodings of domain names (idna, punycode), of bytes (hex), and some that read nothing."
    rows = [{"instruction": "Fever? 发热", "output": "Rest."}]*2
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = {"a.csv": "instruction,output\nFever? 发热,Rest.\n", "a.txt": "Fever 发热\n\\u12 +AGE-\n",
        "a.jsonl": "\n".join(lines)}.get(name, f"[{', '.join(lines)}]").encode()
    (tmp_path/name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    known = {m.name for m in pkgutil.iter_modules(encodings.__path__)} | set(encodings.aliases.aliases)
    assert {"idna", "punycode", "unicode_escape", "undefined", "hex", "utf_16"} <= known
    for encoding in sorted(known) + ["x"*1000, "a\0b", "../x", "é", " "]:
        try: list(read_file(tmp_path/name, encoding))
        except UserError as e: assert name in str(e) and "\n" not in str(e)
    for encoding in (3, ["utf-8"], {"a": 1}, True):
        (tmp_path/"dataset_info.json").write_text(json.dumps({"a": {"file_name": name, "encoding": encoding}}))
        fails(lambda: find_sources("a", str(tmp_path)), contains="encoding must be text", exc=UserError)


ADDRESSES = (
    "file://{}/rows.jsonl", "FILE://{}/rows.jsonl", " file://{}/rows.jsonl", "local://{}/rows.jsonl", "{}/rows.jsonl",
    "mine/rows.jsonl", "simplecache::file://{}/rows.jsonl", "filecache::local://{}/rows.jsonl", "blockcache::{}/rows.jsonl", "simplecache://{}/rows.jsonl",
    "simplecache::blockcache::file://{}/rows.jsonl", "zip://rows.jsonl::file://{}/x.zip", "tar://rows.jsonl::file://{}/x.tar",
    "dir::file://{}", "dir://rows.jsonl::file://{}", "reference://rows::file://{}/x.json", "libarchive://rows.jsonl::{}/x.zip",
    "s3://bucket/rows.jsonl::file://{}/rows.jsonl", "s3://", "s3:///", "arrow_hdfs://{}/rows.jsonl", "hdfs://{}/rows.jsonl",
    "github://owner:name@/rows.jsonl", "git://{}:rows.jsonl", "jar://{}", "generic://{}/rows.jsonl", "asynclocal://{}/rows.jsonl",
    "sftp://localhost{}/rows.jsonl", "ssh://localhost{}/rows.jsonl", "smb://localhost{}/rows.jsonl", "ftp://localhost{}/rows.jsonl",
    "jupyter://localhost", "root://localhost{}/rows.jsonl", "data:,x", "memory://rows.jsonl", "pyfilesystem:osfs://{}")


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_in_a_registry_names_no_local_file(address, secret, monkeypatch):
    monkeypatch.chdir(secret.parent)
    theirs = lambda: parse_entry("theirs", {"cloud_file_name": address.format(secret)}, secret.parent/"registry")
    fails(lambda: list(read_rows(theirs())), contains="use file_name", exc=UserError)


@pytest.mark.parametrize("address", ["s3://bucket/rows.jsonl", "gs://bucket/rows.csv", "https://x.org/rows.json", "simplecache::s3://b/r.jsonl",
    "filecache://::gs://bucket/rows.jsonl", "hf://datasets/owner/name/rows.parquet"])
def test_an_address_of_a_store_elsewhere_is_taken(address, tmp_path):
    assert parse_entry("theirs", {"cloud_file_name": address}, tmp_path).cloud == address


@pytest.mark.parametrize("entry", [
    {"hf_hub_url": "json", "folder": "{}"}, {"hf_hub_url": "text", "folder": "{}"}, {"hf_hub_url": "csv"},
    {"hf_hub_url": "mine"}, {"hf_hub_url": "{}"}, {"hf_hub_url": "../mine"}, {"hf_hub_url": "owner/../mine"},
    {"hf_hub_url": "hf://datasets/json"}, {"hf_hub_url": "owner/.."}, {"hf_hub_url": "owner/name", "folder": "{}"},
    {"hf_hub_url": "owner/name", "folder": "../../mine"},
    {"hf_hub_url": "owner/name", "folder": "en/../../.."}, {"hf_hub_url": "owner/name", "folder": "~"},
    {"hf_hub_url": "owner/name", "folder": "file://{}"}, {"hf_hub_url": "owner/name", "folder": "zip://x::{}/x.zip"},
    {"hf_hub_url": "owner/name", "revision": "../../x"}], ids=lambda entry: " ".join(entry.values()))
def test_a_hub_set_is_an_owner_and_a_name(entry, secret, monkeypatch):
    monkeypatch.chdir(secret.parent)
    entry = {key: value.format(secret) for key, value in entry.items()}
    fails(lambda: list(read_rows(parse_entry("theirs", entry, secret.parent/"registry"))),
        contains="leaves the hub set" if entry["hf_hub_url"] == "owner/name" else "must be owner/name", exc=UserError)


def test_a_local_folder_does_not_stand_for_a_hub_set(secret, monkeypatch):
    "`datasets` takes `owner/name` for a folder where there is one."
    (secret/"set").mkdir()
    (secret/"rows.jsonl").rename(secret/"set/rows.jsonl")
    monkeypatch.chdir(secret.parent)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("medllm.data.readers.check_hub", lambda what: None)        # as where the hub answers
    source = parse_entry("theirs", {"hf_hub_url": "mine/set"}, secret.parent/"registry")
    fails(lambda: list(read_rows(source)), contains="cannot be loaded", exc=UserError)


@pytest.mark.parametrize("names", ["{}/rows.jsonl", "../mine/rows.jsonl", "file://{}/rows.jsonl"])
def test_the_card_of_a_set_names_no_file_outside_it(names, secret):
    copy = secret.parent/"set"
    copy.mkdir()
    (copy/"README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {names.format(secret)}\n---\n")
    with pytest.raises(UserError): list(read_rows(Source("theirs", hub=str(copy))))


def test_a_link_in_a_registry_leads_nowhere_else(secret):
    "Of a file, of a folder, of a file in a folder, and of a loading script."
    registry = secret.parent/"registry"
    (registry/"rows.jsonl").symlink_to(secret/"rows.jsonl")
    (registry/"linked").symlink_to(secret)
    (registry/"inner").mkdir()
    (registry/"inner/rows.jsonl").symlink_to(secret/"rows.jsonl")
    (registry/"script").mkdir()
    (secret/"own.py").write_text("raise SystemExit")
    (registry/"script/script.py").symlink_to(secret/"own.py")
    entries = {"file": {"file_name": "rows.jsonl"}, "folder": {"file_name": "linked"}, "inner": {"file_name": "inner"},
        "up": {"file_name": "../mine/rows.jsonl"}, "from root": {"file_name": str(secret/"rows.jsonl")},
        "script": {"script_url": "linked"},
        "script up": {"script_url": "../mine"}, "script from root": {"script_url": str(secret)}}
    (registry/"dataset_info.json").write_text(json.dumps(entries | {"linked script": {"script_url": "script"}}))
    for name in entries: fails(lambda: find_sources(name, str(registry)), contains="leaves the folder", exc=UserError)
    (registry/"round.jsonl").symlink_to("round.jsonl")
    for key in ("file_name", "script_url"): fails(lambda: parse_entry("round", {key: "round.jsonl"}, registry),
        contains="leaves the folder", exc=UserError)
    source, = find_sources("linked script", str(registry))
    fails(lambda: list(read_rows(source, trust_remote_code=True)), contains="is a link", exc=UserError)


def test_a_folder_given_by_its_path_has_no_links_to_elsewhere_either(secret):
    "To a file, to a folder, to nothing; a link within the folder, and a file that is named itself, are what was asked for."
    folder = secret.parent/"given"
    folder.mkdir()
    (folder/"own.jsonl").write_text((secret/"rows.jsonl").read_text())
    (folder/"again.jsonl").symlink_to("own.jsonl")
    assert len(find_sources(f"{folder}/")[0].files) == 2
    link = folder/"link.jsonl"
    for target in (secret/"rows.jsonl", secret, "nothing", "link.jsonl"):
        link.symlink_to(target)
        fails(lambda: find_sources(f"{folder}/"), contains=f"{link} is a link that leaves the folder", exc=UserError)
        link.unlink()
    link.symlink_to(secret/"rows.jsonl")
    assert find_sources(str(link))[0].files == (link,)
    (secret.parent/"other").symlink_to(secret)
    assert len(find_sources(f"{secret.parent/'other'}/")[0].files) == 1


def test_a_text_that_every_row_of_a_spreadsheet_names_is_not_copied_without_end(tmp_path, monkeypatch):
    "A spreadsheet keeps each text once, and its rows were counted against a thousand times the file."
    openpyxl = pytest.importorskip("openpyxl")
    monkeypatch.setattr("medllm.data.compressed._ROOM_OF_ROWS", 2**20)
    book = openpyxl.Workbook()
    for row in [["instruction", "output"], *[["q", "x"*32_000]]*400]: book.active.append(row)
    book.save(tmp_path/"a.xlsx")
    seen = 0
    with pytest.raises(UserError, match="more than 100 times as long"):
        for seen, _ in enumerate(read_file(tmp_path/"a.xlsx"), 1): pass
    assert 0 < seen < 400


# YAML: a configuration, thresholds, a grid, a card

@pytest.mark.parametrize("text", ["a: " + "["*50_000, "a: " + "{a: "*2000, "a: !!int x", "a: 2001-99-99", "a: !!timestamp x",
    "a: !!float x", "a: !!bool x",
    "? [a, b]\n: 1", "? {a: 1}\n: 1", "b: {[1]: 2}", "a: " + "1"*10_000, "a: " + ":".join(["59"]*5000),
    "a: 0x" + "f"*5000, "a: &a [*a]", "a: &a {b: *a}", 'a: "\\ud800"', "a: !!map x", "!!map [a]", "a: " + "x"*2**20,
    "a: [" + "1, "*2**19 + "]", 'output_dir: "a\\0b"'], ids=range(21))
def test_a_yaml_file_that_somebody_wrote_is_read_within_bounds_or_refused(text, tmp_path):
    (tmp_path/"run.yaml").write_text(text)
    began = time.monotonic()
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}/run.yaml")): read_yaml(str(tmp_path/"run.yaml"))
    assert time.monotonic() - began < 5
