"""The cache of tokenised rows: what is damaged is made anew, and what is whole is found without waiting."""
import json
import os
import shutil
import sys

import numpy as np
import pytest
from commands import ROOT, run
from written_files import write

from medllm.core import UserError
from medllm.data.cache import cached_rows
from medllm.data.registry import Source
from medllm.data.rows import ROW_FILES
from medllm.data.tokens import Renderer


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny):
    "A dataset and the folder of its rows."
    folder = tmp_path_factory.mktemp("cache")
    rows = [{"instruction": f"Is {n} mg too much?", "output": f"Ask at {n % 24} o'clock."} for n in range(40)]
    (folder/"rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source, renderer = Source("doses", files=(folder/"rows.jsonl",)), Renderer(tiny)
    cached_rows(source, renderer, folder=folder/"whole")
    return source, renderer, folder/"whole"


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data)//2] ^= 1
    file.write_bytes(data)


def halve(file): os.truncate(file, file.stat().st_size//2)
def empty(file): file.write_bytes(b"")
def lengthen(file): file.write_bytes(file.read_bytes() + b"\0")
def fold(file):
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("harm", [flip, halve, empty, lengthen, os.unlink, fold], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["ids", "trained", "table", "account.json"])
def test_damaged_rows_are_made_anew(made, name, harm, tmp_path, capfd):
    source, renderer, whole = made
    shutil.copytree(whole, tmp_path/"rows")
    place, = (p.parent for p in (tmp_path/"rows").glob("*/account.json"))
    want, account = cached_rows(source, renderer, folder=tmp_path/"rows")
    assert "damaged" not in capfd.readouterr().err
    want, before = [want[i]["input_ids"].tolist() for i in range(len(want))], (place/"ids").read_bytes()
    harm(place/name)
    rows, again = cached_rows(source, renderer, folder=tmp_path/"rows")
    assert [rows[i]["input_ids"].tolist() for i in range(len(rows))] == want and vars(again) == vars(account)
    said = capfd.readouterr().err
    if (name, harm) != ("account.json", os.unlink): assert said.count("damaged") == 1 and "made anew" in said
    assert (place/"ids").read_bytes() == before
    cached_rows(source, renderer, folder=tmp_path/"rows")
    assert "damaged" not in capfd.readouterr().err and len(list((tmp_path/"rows").glob("*/account.json"))) == 1


def test_figures_of_an_account_are_believed_no_more_than_rows(made, tmp_path, capfd):
    source, renderer, whole = made
    shutil.copytree(whole, tmp_path/"rows")
    note, = (tmp_path/"rows").glob("*/account.json")
    note.write_text(note.read_text().replace('"kept": 40', '"kept": 41'))
    assert cached_rows(source, renderer, folder=tmp_path/"rows")[1].kept == 40
    assert "account.json was changed" in capfd.readouterr().err


def test_rows_that_cannot_be_written_are_one_sentence(made, monkeypatch, tmp_path):
    "A disk that changes what is written does not make it go round for ever; a full one is named."
    from medllm.data import cache
    source, renderer, _ = made
    real = cache._make
    def spoilt(*args):
        real(*args)
        halve(args[3]/"ids")
    monkeypatch.setattr(cache, "_make", spoilt)
    with pytest.raises(UserError, match="damaged as soon as they are written"): cached_rows(source, renderer, folder=tmp_path)
    def full(*args): raise OSError(28, "No space left on device", "ids")
    monkeypatch.setattr(cache, "_make", full)
    with pytest.raises(UserError, match=r"cannot be kept in .* \(No space left on device\)"):
        cached_rows(source, renderer, folder=tmp_path)


def test_a_folder_that_is_only_read_serves(made, monkeypatch, tmp_path):
    "Nothing is locked or written where all is there: a cache on a read-only disk."
    import medllm.data.cache as cache
    source, renderer, whole = made
    def refuse(*args, **more): raise OSError(30, "Read-only file system")
    for name in ("os.utime", "os.replace", "lasting", "FileLock"):
        monkeypatch.setattr(f"medllm.data.cache.{name}", refuse)
    rows, account = cached_rows(source, renderer, folder=whole)
    assert account.kept == 40 and len(rows) == 40
    assert cache.FileLock is refuse


@pytest.mark.slow
def test_a_warm_start_costs_about_as_much_as_the_hash_of_the_data(tmp_path, tiny):
    "Fifty million tokens: finding the rows against hashing as many bytes."
    import time

    from medllm.files import sha256
    from medllm.data.cache import _read_note, find_rows
    from medllm.data.rows import RowInfo, RowWriter
    from medllm.machine import all_described, digest
    writer, n = RowWriter(tmp_path), 50_000
    ids, trained = np.arange(1000, dtype=np.int32), np.ones(1000, bool)
    for _ in range(n//1000): writer.add([ids]*1000, [trained]*1000, [RowInfo()]*1000)
    writer.close()
    note = {"name": "x", "read": n, "kept": n, "rejected": {}, "truncated": {}, "examples": n, "rejects": [], "faults": {},
        "files": all_described(tmp_path, ROW_FILES)}
    (tmp_path/"account.json").write_text(json.dumps(note | {"sha256": digest(note)}))
    assert _read_note(tmp_path)[1] == ""
    since = time.perf_counter()
    assert len(find_rows(tmp_path, "x")[0]) == n
    found = time.perf_counter() - since
    since = time.perf_counter()
    sha256(tmp_path/"ids")
    hashed = time.perf_counter() - since
    print(f"found in {found:.2f} s; the hash of {4*n//1000} MB alone takes {hashed:.2f} s")
    assert found < 3*hashed + 1


@pytest.mark.parametrize("harm", [flip, halve, empty, os.unlink], ids=lambda f: f.__name__)
@pytest.mark.parametrize("end", [".npy", ".json"])
def test_damaged_sums_of_a_reference_are_made_anew(end, harm, tmp_path):
    from types import SimpleNamespace

    from medllm.train.reference import _stored
    made, args = [], SimpleNamespace(device="cpu", world_size=1)
    trainer = SimpleNamespace(args=args, is_world_process_zero=lambda: True)
    def compute():
        made.append(1)
        return np.arange(20.)
    for times in (1, 1):
        assert _stored(tmp_path/"sums.npy", trainer, compute).tolist() == list(range(20)) and len(made) == times
    harm(tmp_path/f"sums{end}")
    for times in (2, 2):
        assert _stored(tmp_path/"sums.npy", trainer, compute).tolist() == list(range(20)) and len(made) == times
    assert sorted(f.name for f in tmp_path.iterdir()) == ["sums.json", "sums.npy"]


def test_a_damaged_tiny_model_is_made_anew(tmp_path, monkeypatch, capfd):
    from medllm.models import made, tiny
    monkeypatch.setenv("MEDLLM_CACHE", str(tmp_path))
    folder = tiny.tiny_folder()
    good = (folder/"model.safetensors").read_bytes()
    for harm, name in ((flip, "model.safetensors"), (os.unlink, "config.json"), (empty, "medllm_made.json")):
        made._keep_whole.cache_clear()
        harm(folder/name)
        assert tiny.tiny_folder() == folder and (folder/"model.safetensors").read_bytes() == good
        assert (folder/"config.json").exists()
        assert "is damaged" in capfd.readouterr().err


# code or data changed, and the rows are made anew

KEY = """
from medllm.data.cache import Recipe, cache_key, source_files
from medllm.data.registry import find_sources
from medllm.data.tokens import Renderer
from medllm.models.loading import LoadPlan, load_tokenizer
import sys
def key(file):
    source, = find_sources([file], "data")
    return cache_key(source, Renderer(load_tokenizer("tiny", LoadPlan()), "auto"), Recipe(), source_files(source))
if __name__ == "__main__": print(key(sys.argv[1]))
"""


def test_changed_code_and_data_find_no_stale_rows(tmp_path):
    rows = tmp_path/"rows.json"
    write(rows, [{"instruction": "a?", "output": "b"}])
    shutil.copytree(ROOT/"medllm", tmp_path/"code/medllm", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("settings.ini", "nbs", "data"): (tmp_path/"code"/name).symlink_to(ROOT/name)
    def key_by_copy():
        done = run(sys.executable, "-c", KEY, rows, cwd=tmp_path, PYTHONPATH=tmp_path/"code")
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()
    exec(KEY, here := {"__name__": "here"})
    first, times = here["key"](str(rows)), (rows.stat().st_atime_ns, rows.stat().st_mtime_ns)
    assert key_by_copy() == first
    write(rows, [{"instruction": "a?", "output": "c"}])
    os.utime(rows, ns=times)
    second = here["key"](str(rows))
    with open(tmp_path/"code/medllm/data/formats.py", "a") as f: f.write("# changed\n")
    assert len({first, second, key_by_copy()}) == 3
