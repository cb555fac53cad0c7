"""Packed and unpacked training learn the same; no token sees another document; packs hold every row once."""
import json
from itertools import chain

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commands import losses, run
from hypothesis import given
from hypothesis import strategies as st
from transformers import Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM

from medllm.core import UserError
from medllm.data.batches import Collate
from medllm.data.packing import PackedBatches, PackedCollate, pack
from medllm.data.rows import TokenRows, cut_document
from medllm.models import packed_attention as kept_apart
from medllm.models.adapters import AdaptPlan, adapt
from medllm.models.packed_attention import document_inputs, isolate
from medllm.models.fused_ops import fewer_passes
from medllm.models.loading import LoadPlan, load_model, load_tokenizer
from medllm.train.arguments import parse
from medllm.train.objectives import SelectedHead
from medllm.train.inputs import prepare_data
from medllm.train.loop import train

FLAGS = dict(
    model_name_or_path="tiny", dataset="mm", max_samples=120, packing=True, cutoff_len=256, logging_steps=1,
    per_device_train_batch_size=2, max_steps=6, save_strategy="no", lr_scheduler_type="constant", disable_tqdm=True)
SMALL = dict(vocab_size=4096, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, pad_token_id=0)


def some_rows(lengths=(9, 30, 17, 30, 2, 23, 9, 64), seed=0):
    "Rows of random tokens whose second half is trained, some with an untrained end."
    rng, rows = np.random.default_rng(seed), []
    for i, n in enumerate(lengths):
        trained = np.arange(n) >= n//2
        if i % 3 == 2: trained[-2:] = False
        rows.append((rng.integers(5, 4000, n).astype(np.int32), trained))
    return TokenRows(rows)


def packed_inputs(model, batch, **kwargs):
    return {"position_ids": batch["position_ids"], **document_inputs(model, batch["cu_seqlens"]), **kwargs}


def lora(model):
    "An adapter whose second half is not zero, so that gradients reach everything."
    model = adapt(model, AdaptPlan())
    torch.manual_seed(3)
    for name, p in model.named_parameters():
        if "lora_B" in name: torch.nn.init.normal_(p, std=0.05)
    return model


def mistral(window=None):
    torch.manual_seed(1)
    return MistralForCausalLM(MistralConfig(**SMALL, sliding_window=window))


MODELS = {
    "full": lambda: load_model("tiny", LoadPlan(frozen=False)), "lora": lambda: lora(load_model("tiny")),
    "window": lambda: mistral(8), "eager": lambda: load_model("tiny", LoadPlan(frozen=False, attention="disabled"))}


def gradients(model, loss):
    on = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(loss, on)


@pytest.mark.parametrize("kind", MODELS)
def test_packed_and_unpacked_losses_and_gradients_are_equal(kind):
    "Per document, and of the whole batch, in float32; the unpacked side is full logits with the model as loaded."
    rows = [row for row in map(some_rows().__getitem__, range(8)) if (row["labels"][1:] != -100).any()]
    model, alone, total = MODELS[kind]().eval(), [], 0.0
    for row in rows:
        ids, labels = (torch.tensor(np.asarray(row[k]), dtype=torch.long) for k in ("input_ids", "labels"))
        loss = F.cross_entropy(model(ids[None]).logits[0, :-1], labels[1:], ignore_index=-100, reduction="sum")
        alone.append(loss.item())
        total = total + loss
    count = sum((row["labels"][1:] != -100).sum() for row in rows)
    want = gradients(model, total/count)

    isolate(model, longest=64)
    order = sorted(range(len(rows)), key=lambda i: -len(np.trim_zeros(rows[i]["labels"] != -100, "b")))
    batch = PackedCollate(0)(rows)
    assert batch["input_ids"].shape[0] == 1 and len(batch["cu_seqlens"]) == len(rows) + 1
    head = SelectedHead(model, fuse=False)
    logits = head.logits(model, batch["input_ids"], batch["positions"], **packed_inputs(model, batch))
    each = F.cross_entropy(logits, batch["targets"], reduction="none")
    whose = np.searchsorted(batch["cu_seqlens"], batch["positions"].numpy(), side="right") - 1
    for place, i in enumerate(order):
        got = each[torch.from_numpy(whose == place)].sum().item()
        assert abs(got - alone[i]) < 1e-5*max(1, abs(alone[i])), (kind, i)
    head.remove()

    head = SelectedHead(model)
    with fewer_passes(model):
        loss = head.summed_loss(
            model, batch["input_ids"], batch["positions"], batch["targets"], **packed_inputs(model, batch))
        got = gradients(model, loss/count)
    assert abs(loss.item()/total.item() - 1) < 1e-5
    assert max((a - b).abs().max().item() for a, b in zip(got, want)) < 1e-5


def test_a_padded_batch_has_the_same_loss():
    model, rows = load_model("tiny").eval(), [some_rows()[i] for i in range(8)]
    head, padded = SelectedHead(model), Collate(0)(rows)
    want = head.summed_loss(model, padded["input_ids"], padded["positions"], padded["targets"])
    isolate(model, 64)
    for multiple in (1, 8):
        batch = PackedCollate(0, multiple)(rows)
        got = head.summed_loss(
            model, batch["input_ids"], batch["positions"], batch["targets"], **packed_inputs(model, batch))
        assert abs((got/want).item() - 1) < 1e-6 and len(batch["targets"]) == len(padded["targets"])
        assert batch["tokens"] == padded["tokens"] <= batch["input_ids"].numel() < padded["input_ids"].numel()


@pytest.mark.parametrize("kind", MODELS)
def test_no_token_attends_across_documents(kind):
    "Other documents can be exchanged without moving a bit; their embeddings get a gradient of exactly zero."
    model = MODELS[kind]().eval()
    isolate(model, 64)
    batch = PackedCollate(0)([some_rows()[i] for i in range(8)])
    ids, cu_seqlens = batch["input_ids"], batch["cu_seqlens"]
    more = packed_inputs(model, batch)
    before = model(input_ids=ids, **more).logits.detach()
    for begin, end in zip(cu_seqlens[:-1], cu_seqlens[1:]):
        other = ids.clone()
        other[:, begin:end] = other[:, begin:end] % 3000 + 7
        moved = (model(input_ids=other, **more).logits != before).any(-1)[0]
        assert moved[begin:end].all() and not moved[:begin].any() and not moved[end:].any()
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        states = model(inputs_embeds=embedded, **more).logits[:, begin:end]
        gradient = torch.autograd.grad(states.square().sum(), embedded)[0].abs().sum(-1)[0]
        assert (gradient[begin:end] > 0).all() and gradient[:begin].sum() == 0 and gradient[end:].sum() == 0


def test_no_mask_is_made_and_no_call_is_longer_than_a_document(monkeypatch):
    calls, original = [], F.scaled_dot_product_attention
    def watched(q, k, v, attn_mask=None, **kwargs):
        calls.append((q.shape[0], q.shape[2], attn_mask))
        return original(q, k, v, attn_mask=attn_mask, **kwargs)
    model = load_model("tiny").eval()
    isolate(model)
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(kept_apart, "sdpa_mask", lambda **kwargs: pytest.fail("a mask was made"))
    batch = PackedCollate(0)([some_rows((20, 20, 7, 20, 5))[i] for i in range(5)])
    model(input_ids=batch["input_ids"], **packed_inputs(model, batch))
    assert all(mask is None for *_, mask in calls)
    layers = model.config.num_hidden_layers
    documents = np.diff(batch["cu_seqlens"]).tolist()
    assert sorted(chain(*([length]*n for n, length, _ in calls))) == sorted(documents*layers)
    assert len(calls) == layers*len(set(documents))


def test_gradient_checkpointing_recomputes_with_the_right_borders():
    "Two batches go forward before either goes backward: recomputing takes the cu_seqlens of its own batch."
    batches = [PackedCollate(0)([some_rows(seed=s)[i] for i in part]) for s, part in ((0, range(8)), (1, range(3, 8)))]
    def both(checkpointing):
        model = load_model("tiny", LoadPlan(frozen=False)).train()
        if checkpointing: model.gradient_checkpointing_enable()
        isolate(model)
        head = SelectedHead(model)
        first, second = (head.summed_loss(
            model, b["input_ids"], b["positions"], b["targets"], **packed_inputs(model, b)) for b in batches)
        return gradients(model, first), gradients(model, second)
    for got, want in zip(both(True), both(False)):
        assert max((a - b).abs().max().item() for a, b in zip(got, want)) < 1e-5


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("plan", [LoadPlan(bits=4), LoadPlan(bits=8), LoadPlan(dtype="bfloat16")], ids=str)
def test_quantised_and_half_precision_models_pack(plan, autocast):
    model = lora(load_model("tiny", plan)).train()
    isolate(model)
    batch = PackedCollate(0)([some_rows()[i] for i in range(8)])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = SelectedHead(model).summed_loss(
            model, batch["input_ids"], batch["positions"], batch["targets"], **packed_inputs(model, batch))
    assert all(g.isfinite().all() and g.any() for g in gradients(model, loss))


# --- packs -----------------------------------------------------------------------

LENGTHS = st.integers(3, 200).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), max_size=80), st.just(capacity)))


@given(LENGTHS, st.integers(0, 3), st.integers(1, 4), st.integers(1, 3))
def test_packs_hold_every_row_once_and_whole(drawn, epoch, world, batch):
    lengths, capacity = np.array(drawn[0], int), drawn[1]
    packs = pack(lengths, capacity, seed=7, epoch=epoch)
    assert all(0 < lengths[rows].sum() <= capacity for rows in packs)
    assert sorted(chain(*map(list, packs))) == list(range(len(lengths)))
    again = pack(lengths.tolist(), capacity, seed=7, epoch=epoch)
    assert [p.tolist() for p in packs] == [p.tolist() for p in again]
    # best fit, longest first: no two packs could be one, unless the rule never met them (both more than half full)
    assert sum(lengths[rows].sum() <= capacity/2 for rows in packs) <= 1

    samplers = [PackedBatches(lengths, capacity, batch, 7, rank, world) for rank in range(world)]
    for sampler in samplers: sampler.set_epoch(epoch)
    ranks = [list(sampler) for sampler in samplers]
    assert {len(batches) for batches in ranks} == {len(samplers[0])}
    assert all(batches[i] for batches in ranks for i in range(len(samplers[0])))
    if len(lengths) >= world:
        assert sorted(chain(*chain(*ranks))) == list(range(len(lengths)))
        divided = len(lengths) >= len(packs) + samplers[0].missing
        assert not divided or all(lengths[rows].sum() <= batch*capacity for rows in chain(*ranks))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.sampled_from([1, 8]))
def test_no_label_crosses_a_border_and_positions_restart(lengths, multiple):
    rows = some_rows(lengths)
    batch = PackedCollate(0, multiple)([rows[i] for i in range(len(rows))])
    cu_seqlens, ids, positions = batch["cu_seqlens"], batch["input_ids"][0].numpy(), batch["position_ids"][0].numpy()
    assert cu_seqlens[0] == 0 and cu_seqlens[-1] == len(ids) and len(ids) % multiple == 0
    assert (np.diff(cu_seqlens) > 0).all()
    assert positions.tolist() == list(chain(*(range(n) for n in np.diff(cu_seqlens))))
    # every document with its labels is one of the rows, and each row is there once
    pairs, at = [], dict(zip(batch["positions"].tolist(), batch["targets"].tolist()))
    for begin, end in list(zip(cu_seqlens[:-1], cu_seqlens[1:]))[:len(rows)]:
        pairs.append((tuple(ids[begin:end]), tuple(at.pop(i, -100) for i in range(begin, end))))
    assert not at                                              # pads predict nothing
    wanted = []
    for row in (rows[i] for i in range(len(rows))):
        predicted = np.append(row["labels"][1:], -100)
        n = np.flatnonzero(predicted != -100)[-1] + 1 if (predicted != -100).any() else 1
        wanted.append((tuple(row["input_ids"][:n]), tuple(predicted[:n])))
    assert sorted(pairs) == sorted(wanted)


@given(st.lists(st.integers(1, 300), max_size=10), st.integers(3, 50))
def test_cut_documents_lose_nothing(lengths, cutoff_len):
    "Every token but a document's first is predicted exactly once, in pieces that fit."
    for n in lengths:
        ids = np.arange(n, dtype=np.int32)
        pieces = cut_document(ids, np.ones(n, bool), cutoff_len)
        assert all(1 <= len(piece) <= cutoff_len for piece, _ in pieces)
        assert [int(t) for piece, trained in pieces for t in piece[1:][trained[1:]]] == list(range(1, n))
        assert all(len(piece) > 1 for piece, _ in pieces) or n == 1


# --- runs --------------------------------------------------------------------------------------

def test_a_packed_run(tmp_path):
    "Learns, without a padded position, and says in the record what packing saved."
    args = parse(FLAGS | dict(output_dir=str(tmp_path), val_size=20, num_train_epochs=2, max_steps=-1))
    metrics = train(args, prepare_data(args))
    written = json.loads((tmp_path/"metrics.json").read_text())
    assert written["padding"] == metrics["padding"] and written["packs"] == metrics["packs"]
    assert metrics["padding"]["packed"] == metrics["padding_share"] == 0 < metrics["padding"]["random"]
    assert metrics["packs"]["documents"] == metrics["train_rows"] == 100 and metrics["packs"]["full"] > 0.9
    assert metrics["steps"] == 2*-(-metrics["packs"]["packs"]//2)
    assert metrics["eval_loss"] < metrics["eval_loss_before"]
    saved = json.loads((tmp_path/"config.json").read_text())
    assert "medllm_documents" not in json.dumps(saved)
    plain = parse(FLAGS | dict(
        output_dir=str(tmp_path/"plain"), val_size=20, packing=False, do_eval=True, do_train=False,
        model_name_or_path=str(tmp_path), finetuning_type="full"))
    unpacked = train(plain, prepare_data(plain))["eval_loss"]
    assert abs(unpacked - metrics["eval_loss"]) < 1e-5         # validation does not depend on the layout


@pytest.mark.slow
def test_two_processes_train_the_same_packs(tmp_path):
    words = lambda **flags: [w for k, v in (FLAGS | flags).items() for w in (f"--{k}", str(v))]
    one = run("python", "-m", "medllm.train", *words(
        gradient_accumulation_steps=2, output_dir=tmp_path/"one", max_steps=-1, num_train_epochs=1, max_samples=70))
    assert one.returncode == 0, one.stderr
    two = run("accelerate", "launch", "--num_processes", 2, "-m", "medllm.train", *words(
        output_dir=tmp_path/"two", max_steps=-1, num_train_epochs=1, max_samples=70))
    assert two.returncode == 0, two.stderr
    a, b = losses(tmp_path/"one"), losses(tmp_path/"two")
    assert a.keys() == b.keys() and max(abs(a[s] - b[s]) for s in a) < 1e-4
    tokens = [json.loads((tmp_path/d/"metrics.json").read_text())["trained_tokens"] for d in ("one", "two")]
    data = prepare_data(parse(FLAGS | dict(output_dir=str(tmp_path/"unused"), max_samples=70)))
    labels = [data.train[i]["labels"][1:] for i in range(len(data.train))]
    assert tokens[0] == tokens[1] == int(sum((part != -100).sum() for part in labels))   # every row once


def test_a_model_that_cannot_be_packed_is_refused(tmp_path):
    torch.manual_seed(0)
    Gemma2ForCausalLM(Gemma2Config(**SMALL)).save_pretrained(tmp_path/"gemma")
    load_tokenizer("tiny").save_pretrained(tmp_path/"gemma")
    args = parse(FLAGS | dict(model_name_or_path=str(tmp_path/"gemma"), output_dir=str(tmp_path/"out")))
    with pytest.raises(UserError, match="--packing: the documents .* cannot be kept apart .*caps attention scores"):
        train(args, prepare_data(args))
