"""What `verify` knows of a seal: who signed it, whether it is the one noted, what is gone; and what it cannot know, in words."""
import json
import shutil
import subprocess

import pytest
from commands import command
from written_files import record

from medllm.core import UserError

ssh = pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="needs ssh-keygen (OpenSSH)")


def key(place, name, passphrase=""):
    "A private key, and a file of allowed signers that names its owner."
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-f", place/name, "-C", name], check=True)
    (place/f"{name}.allowed").write_text(f"{name}@clinic.example {(place/f'{name}.pub').read_text()}")
    return place/name


def verified(folder, *words):
    "Exit code, defects and notes of `verify --record-only --json`."
    code, out, _ = command("runs", "verify", folder, "--record-only", "--json", *words)
    found, = json.loads(out)
    return code, found["defects"], found["notes"]


def sealed(tmp_path, **state):
    "A record that holds: without what only a machine has."
    from medllm.records.seal import seal
    folder = record(tmp_path/"runs/sft/a", stages=[], cells=[], **state)
    seal(folder)
    assert verified(folder)[:2] == (0, [])
    return folder


def append(folder, **event):
    with open(folder/"events.jsonl", "a") as f: f.write(json.dumps({"time": "2026-12-01T00:00:00+00:00"} | event) + "\n")


# signed

@ssh
def test_a_signature_is_verified_against_those_who_may_sign(tmp_path):
    folder, ours, other = sealed(tmp_path), key(tmp_path, "ours"), key(tmp_path, "other")
    code, out, _ = command("runs", "sign", folder, "--key", ours)
    digest = json.loads((folder/"seal.json").read_text())["digest"]
    assert code == 0 and digest in out
    code, defects, notes = verified(folder, "--allowed-signers", tmp_path/"ours.allowed", "--digest", digest)
    assert code == 0 and any(n.startswith("signed by ours@clinic.example with ED25519 key SHA256:") for n in notes), notes
    code, defects, _ = verified(folder, "--allowed-signers", tmp_path/"other.allowed")
    assert code == 1 and len(defects) == 1 and "does not name that key" in defects[0]
    code, _, notes = verified(folder)
    assert code == 0 and any("whose key that is, --allowed-signers FILE can tell" in n for n in notes)


@ssh
def test_who_changes_a_signed_record_and_seals_it_anew_is_seen(tmp_path):
    from medllm.records.seal import seal
    folder, ours = sealed(tmp_path), key(tmp_path, "ours")
    command("runs", "sign", folder, "--key", ours)
    signature = (folder/"seal.json.sig").read_bytes()
    (folder/"history.jsonl").write_text((folder/"history.jsonl").read_text() + "\n")
    seal(folder)
    assert verified(folder)[0] == 0                               # its own seal holds: that is all that a seal can say
    code, defects, _ = verified(folder, "--allowed-signers", tmp_path/"ours.allowed")
    assert code == 1 and defects == ["seal.json.sig: the seal is not signed"]
    (folder/"seal.json.sig").write_bytes(signature)               # the old signature beside the new seal
    for words in ((), ("--allowed-signers", tmp_path/"ours.allowed")):
        code, defects, _ = verified(folder, *words)
        assert code == 1 and "it is no signature of this seal" in defects[0]


@ssh
@pytest.mark.parametrize("namespace", ["git", "file", "seal@example.org"])
def test_a_signature_for_something_else_is_none(tmp_path, namespace):
    folder, ours = sealed(tmp_path), key(tmp_path, "ours")
    subprocess.run(["ssh-keygen", "-Y", "sign", "-f", ours, "-n", namespace, folder/"seal.json"], check=True, capture_output=True)
    assert (folder/"seal.json.sig").exists()
    for words in ((), ("--allowed-signers", tmp_path/"ours.allowed")):
        code, defects, _ = verified(folder, *words)
        assert code == 1 and "no signature of this seal" in defects[0]


@ssh
def test_what_cannot_be_signed(tmp_path):
    folder, ours = sealed(tmp_path), key(tmp_path, "ours")
    for words, why in ((("--key", tmp_path/"none"), "no such file"), (("--key", folder/"run.json"), "does not sign with it")):
        code, _, err = command("runs", "sign", folder, *words)
        assert code == 2 and why in err and err.count("\n") == 1, err
    (folder/"x").write_text("")
    code, _, err = command("runs", "sign", folder, "--key", ours)
    assert code == 2 and "is not signed: x was added" in err
    (folder/"x").unlink()
    assert command("runs", "sign", folder, "--key", ours)[0] == 0
    assert "is signed already" in command("runs", "sign", folder, "--key", ours)[2]


@ssh
@pytest.mark.parametrize("data", [b"", b"junk", bytes(10**6), b"\x1b[2J",
    b"-----BEGIN SSH SIGNATURE-----\nAAAA\n-----END SSH SIGNATURE-----\n"])
def test_a_torn_signature_is_a_defect(tmp_path, data):
    folder = sealed(tmp_path)
    (folder/"seal.json.sig").write_bytes(data)
    code, defects, _ = verified(folder)
    assert code == 1 and len(defects) == 1 and defects[0].startswith("seal.json.sig: it ")


@ssh
def test_a_signature_goes_with_a_promoted_copy_and_away_with_another_attempt(tmp_path):
    from medllm.experiment.execute import _go_on
    folder, ours = sealed(tmp_path), key(tmp_path, "ours")
    command("runs", "sign", folder, "--key", ours)
    assert command("runs", "promote", folder, "--to", tmp_path/"kept")[0] == 0
    kept, = (tmp_path/"kept/sft").iterdir()
    code, _, notes = verified(kept, "--allowed-signers", tmp_path/"ours.allowed")
    assert code == 0 and any(n.startswith("signed by ours@") for n in notes)
    assert any(n.startswith("not here: checkpoint-2/COMMIT.json") and "anybody could have added" in n for n in notes), notes
    state = json.loads((folder/"run.json").read_text())
    (folder/"run.json").write_text(json.dumps(state | {"status": "interrupted"}))
    _go_on(folder)
    assert not (folder/"seal.json.sig").exists() and not (folder/"seal.json").exists()


def test_without_openssh_it_is_said(tmp_path, monkeypatch):
    folder = sealed(tmp_path)
    (folder/"seal.json.sig").write_text("x")
    (tmp_path/"allowed").write_text("")
    monkeypatch.setenv("PATH", "")
    code, _, notes = verified(folder)
    assert code == 0 and any("cannot be told without ssh-keygen" in n for n in notes)
    assert "install OpenSSH" in command("runs", "verify", folder, "--allowed-signers", tmp_path/"allowed")[2]


# unsigned

def test_an_unsigned_seal_is_said_to_be_one_and_its_digest_can_be_kept(tmp_path):
    from medllm.records.seal import seal
    folder = sealed(tmp_path)
    _, _, notes = verified(folder)
    digest = json.loads((folder/"seal.json").read_text())["digest"]
    assert notes[0].endswith(f"digest {digest}") and notes[1].startswith("not signed: whoever can write into the folder")
    assert "not signed" in command("runs", "verify", folder, "--record-only")[1]
    assert digest in command("runs", "show", folder)[1]
    assert verified(folder, "--digest", digest.upper())[2][1] == "not signed, but it is the seal whose digest was given"
    (folder/"history.jsonl").write_text("")
    seal(folder)
    code, defects, _ = verified(folder, "--digest", digest)
    assert code == 1 and any(d.endswith(f"and not the given {digest}") for d in defects)
    for wrong in ("12ab", "z"*64):
        assert "64 hex digits" in command("runs", "verify", folder, "--digest", wrong)[2]


# what a later line excuses, and what it does not

@pytest.mark.parametrize("event", ["freed", "promoted"])
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "report.png", "metrics.json", "checkpoint-2"])
def test_no_line_makes_a_missing_file_go_unsaid(tmp_path, event, name):
    "gc frees checkpoints, promote leaves weights and tokenizers out; what those may excuse is named, all else is a defect."
    from medllm.records.seal import seal
    folder = sealed(tmp_path)
    for more in ("model.safetensors", "tokenizer.json", "report.png"): (folder/more).write_text("x")
    seal(folder)
    shutil.rmtree(folder/name) if (folder/name).is_dir() else (folder/name).unlink()
    append(folder, event=event, names=[name])
    code, out, _ = command("runs", "verify", folder, "--record-only")
    left = {"freed": ("checkpoint-2",), "promoted": ("model.safetensors", "tokenizer.json")}
    excused = name in left[event]
    assert code == (0 if excused else 1) and name in out
    if excused: assert f"not here: {name}" in out and "anybody could have added" in out


@pytest.mark.parametrize("line", ['{"event": "status", "status": "completed"}', '{"event": "seen"}',
    '{"event": "freed", "names": "all"}', '{"event": "freed", "names": [], "event": "x"}', "no JSON", "[]", ""])
def test_events_behind_the_seal_are_named(tmp_path, line):
    folder = sealed(tmp_path)
    with open(folder/"events.jsonl", "a") as f: f.write(line + "\n")
    code, defects, _ = verified(folder)
    assert code == 1 and defects[0].startswith("events.jsonl: 1 lines were added since the record was sealed"), defects


def test_a_torn_line_behind_the_seal_is_named_until_the_next(tmp_path):
    from medllm.records.record import Run
    folder = sealed(tmp_path)
    with open(folder/"events.jsonl", "a") as f: f.write('{"event": "fre')
    assert verified(folder)[1] == ["events.jsonl: it ends in the middle of a line"]
    Run(folder).event("freed", names=["checkpoint-2"])
    assert verified(folder)[:2] == (0, [])


@pytest.mark.parametrize("name", ["x.part", ".x.1.2.part", "sub/seal.json", "sub/heartbeat.json", "sub/.lock",
    "sub/COMMIT.json", "seal.json.bak", "checkpoint-2/evil.py", "checkpoint-x/COMMIT.json"])
def test_what_was_put_beside_is_named(tmp_path, name):
    folder = sealed(tmp_path)
    (folder/name).parent.mkdir(exist_ok=True)
    (folder/name).write_text("x")
    code, defects, _ = verified(folder)
    assert code == 1 and len(defects) == 1 and name.split("/")[-1] in defects[0], defects


def test_links_are_named_and_not_followed(tmp_path):
    folder = sealed(tmp_path)
    (tmp_path/"elsewhere").mkdir()
    (tmp_path/"elsewhere/secret").write_text("x")
    (folder/"link").symlink_to(tmp_path/"elsewhere")
    (folder/"checkpoint-2/link").symlink_to(tmp_path/"elsewhere")
    (folder/"history.jsonl").rename(tmp_path/"history.jsonl")
    (folder/"history.jsonl").symlink_to(tmp_path/"history.jsonl")
    code, defects, _ = verified(folder)
    assert code == 1 and sorted(d.split()[0] for d in defects) == ["checkpoint-2/link", "history.jsonl:", "link"], defects


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "sub/../../x", ""])
def test_a_seal_names_files_of_its_record(tmp_path, name):
    "Another's seal would have us read, and tell the hash of, a file of ours."
    from medllm.records.seal import _digest
    folder = sealed(tmp_path)
    seal = json.loads((folder/"seal.json").read_text())
    seal["files"][name] = {"sha256": "0"*64, "bytes": 1}
    (folder/"seal.json").write_text(json.dumps(seal | {"digest": _digest(seal)}))
    code, defects, _ = verified(folder)
    assert code == 1 and defects == [f"seal.json names a file outside the record: {name}"]


def test_a_link_to_a_folder_leads_no_sealed_name_outside(tmp_path):
    from medllm.records.seal import _digest
    folder = sealed(tmp_path)
    (tmp_path/"elsewhere").mkdir()
    (tmp_path/"elsewhere/secret").write_text("x")
    (folder/"sub").symlink_to(tmp_path/"elsewhere")
    seal = json.loads((folder/"seal.json").read_text())
    seal["files"]["sub/secret"] = {"sha256": "0"*64, "bytes": 1}
    (folder/"seal.json").write_text(json.dumps(seal | {"digest": _digest(seal)}))
    code, defects, _ = verified(folder)
    assert sorted(defects) == ["sub was added since the record was sealed", "sub/secret was removed since the record was sealed"]


def test_a_record_names_no_weights_outside_their_folder_and_nothing_endless(tmp_path):
    from medllm.records.verify import data_here, models_here
    outside = {"consumed": [{"role": "base", "name": "x", "place": str(tmp_path), "weights": {"../../etc/passwd": "ab"*32}}]}
    assert list(models_here(outside).values()) == ["run.json: base model names a file outside its folder: ../../etc/passwd"]
    places = ("/dev/zero", "/proc/kcore", "/proc/kmsg", "x"*5000)
    endless = {"inputs": {"data": [{"name": "x", "sha256": {p: "ab"*32 for p in places}}]}}
    assert all("is not here" in text for text in data_here(endless).values()) and len(data_here(endless)) == 4


def test_sign_is_for_this_machine(tmp_path):
    from medllm.cli.main import parser
    args = parser().parse_args(["runs", "sign", "a", "--key", "k", "--runs", "memory://records"])
    with pytest.raises(UserError, match="wants a folder of this machine"): args.function(args)
