"""Every flag of a training run is in force, translated or refused: the table, and what it is made of."""
import re
import sys

import pytest
from commands import ROOT, run
from flag_cases import CASES, Case
from flag_watch import Walk
from flags import IN_FORCE, NOT_SHOWN, REFUSED, TABLE, TRANSLATED, failing, table, verdicts, walked

from medllm.core import UserError
from medllm.train.arguments import parse

AGAIN = ("dataloader_drop_last", "push_to_hub", "gradient_checkpointing", "do_eval", "model_revision",
    "warmup_steps", "label_names", "max_bad", "fsdp", "ddp_timeout")
UNSETTLED = set()                        # flags that the table does not show, each with its reason there


def rows():
    "Flag -> verdict, as the committed table has them."
    return verdicts(TABLE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def walk(tmp_path_factory): return Walk(tmp_path_factory.mktemp("walk"))


def test_the_table_has_every_flag_of_the_help_and_no_other():
    from medllm.train.__main__ import help_text
    helped = set(re.findall(r"^  --(\w+)", help_text(), flags=re.M))
    assert len(helped) > 200 and rows().keys() == helped == {case.flag for case in CASES}


def test_every_flag_of_the_table_is_in_force_translated_or_refused():
    settled = {flag: verdict for flag, verdict in rows().items() if flag not in UNSETTLED}
    assert {rows()[flag] for flag in UNSETTLED} <= {NOT_SHOWN}
    assert set(settled.values()) == {IN_FORCE, TRANSLATED, REFUSED}


def test_some_flags_come_to_what_the_table_says(walk):
    again = walked(walk, [case for case in CASES if case.flag in AGAIN])
    assert verdicts("\n".join(table(again))) == {flag: rows()[flag] for flag in AGAIN}
    assert failing(again) == []


@pytest.mark.parametrize("stage", ["sft", "dpo", "grpo", "ppo"])
def test_the_same_run_twice_shows_nothing(walk, stage):
    assert [row[1] for row in walked(walk, [Case("learning_rate", 1e-2, stage)])] == [NOT_SHOWN]


def test_a_flag_that_does_nothing_would_be_seen(walk, monkeypatch):
    from medllm.data.batches import GroupedBatches
    case, made = next(c for c in CASES if c.flag == "dataloader_drop_last"), GroupedBatches.__init__
    ignoring = lambda self, *args: made(self, *args[:6], False, *args[7:])
    monkeypatch.setattr(GroupedBatches, "__init__", ignoring)
    monkeypatch.setattr(walk, "kept", {})
    assert [row[1] for row in walked(walk, [case])] == [NOT_SHOWN]


def test_a_case_that_is_refused_with_the_flag_and_without_shows_nothing(walk):
    case = Case("warmup_steps", 2, given={"dataset": "nowhere"})
    other = Case("dataset", "elsewhere", given={"dataset": "nowhere"})
    assert [row[1] for row in walked(walk, [case, other])] == [NOT_SHOWN]*2


def test_a_case_that_cannot_be_run_is_named_and_the_walk_goes_on(walk):
    cases = [Case("warmup_steps", 2, "no such stage"), Case("warmup_steps", 2)]
    found = walked(walk, cases)
    assert [row[1] for row in found] == ["crash", IN_FORCE] and failing(found)[0].startswith("--warmup_steps 2: crash")


def test_a_record_that_launches_two_processes_may_use_what_needs_them():
    from medllm.core import UserError
    from medllm.train.runs import SftRun
    flag = {"ddp_backend": "gloo"}
    SftRun(num_processes=2, extra=flag).preflight()
    with pytest.raises(UserError, match="needs several processes"): SftRun(extra=flag).preflight()


@pytest.mark.slow
def test_the_whole_walk_made_again_comes_to_the_table_s_verdicts():
    done = run(sys.executable, ROOT/"tests/flags.py", timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_a_flag_with_torn_json_is_named():
    "Where the shell took its quotes away, or a bracket is missing."
    with pytest.raises(UserError, match=r"^--lr_scheduler_kwargs \{min_lr:1\}: not valid JSON \(.*\); quote it whole"):
        parse({"lr_scheduler_kwargs": "{min_lr:1}"})
