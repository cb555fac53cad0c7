"""Every flag of a training run is in force, translated or refused: the table, and what it is made of."""
import re
import sys

import pytest
from conftest import ROOT, run
from flag_cases import CASES
from flag_watch import Walk
from flags import CRASH, IN_FORCE, NOTHING, REFUSED, TABLE, TRANSLATED, table, walked

ROW = re.compile(r"\| `--(\w+)` \| ([\w ]+) \| (.*) \|")
AGAIN = ("dataloader_drop_last", "push_to_hub", "gradient_checkpointing", "quantization_type", "do_eval", "model_revision",
    "warmup_steps", "label_names", "local_rank", "ddp_bucket_cap_mb")


def rows():
    "Flag -> verdict, as the table has them."
    found = [ROW.fullmatch(line) for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| `--")]
    return {match[1]: match[2] for match in found}


@pytest.fixture(scope="module")
def walk(tmp_path_factory): return Walk(tmp_path_factory.mktemp("walk"))


def test_the_table_has_every_flag_of_the_help_and_no_other():
    from medllm.train.__main__ import help_text
    helped = set(re.findall(r"^  --(\w+)", help_text(), flags=re.M))
    assert len(helped) > 200 and rows().keys() == helped == {case.flag for case in CASES}


def test_every_flag_of_the_table_is_in_force_translated_or_refused():
    assert set(rows().values()) == {IN_FORCE, TRANSLATED, REFUSED}
    assert not {CRASH, NOTHING} & set(re.findall(f"{CRASH}|{NOTHING}", TABLE.read_text(encoding="utf-8")))


def test_some_flags_come_to_what_the_table_says(walk):
    again = table(walked(walk, [case for case in CASES if case.flag in AGAIN and case.around != "two processes"]))[2:]
    assert len(again) == len(AGAIN)
    known = TABLE.read_text(encoding="utf-8").splitlines()
    assert [line for line in again if line not in known and "--ddp_" not in line] == []


def test_a_flag_that_does_nothing_would_be_seen(walk, monkeypatch):
    from flag_cases import Case
    from medllm.data.batches import GroupedBatches
    case = next(c for c in CASES if c.flag == "dataloader_drop_last")
    made = GroupedBatches.__init__
    monkeypatch.setattr(GroupedBatches, "__init__", lambda self, *args, **more: made(self, *args, **more | {"drop_last": False}))
    walk.kept.clear()
    assert walked(walk, [Case(case.flag, True, given=case.given)])[0][1] == NOTHING
    walk.kept.clear()


@pytest.mark.slow
def test_the_whole_walk_made_again_is_the_table():
    done = run(sys.executable, ROOT/"tests/flags.py", timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
