"""Token ids and labels of LLaMA-Factory's own templates: `llamafactory_rows.py TASK.json` in its environment.

The task names a tokenizer folder, templates and rows; `package` is the folder of its 2023 release for those names.
"""
import importlib.machinery
import importlib.util
import json
import sys
import types
from functools import partial
from pathlib import Path

from transformers import AutoTokenizer

IGNORED = -100


def allow_missing_torchaudio():
    "It is imported always, though text needs none of it, and its wheel may not load with the torch that is there."
    try: import torchaudio  # noqa: F401
    except (ImportError, OSError):
        sys.modules["torchaudio"] = types.ModuleType("torchaudio")
        sys.modules["torchaudio"].__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)


def today(tokenizer, name):
    "A function row -> ids, labels through the processor that its training uses."
    from llamafactory.data.mm_plugin import get_mm_plugin
    from llamafactory.data.processor.supervised import SupervisedDatasetProcessor
    from llamafactory.data.template import get_template_and_fix_tokenizer
    options = types.SimpleNamespace(
        template=name, train_on_prompt=False, tool_format=None, default_system=None, enable_thinking=True,
        preserve_thinking=False, mask_history=False, cutoff_len=10**6)
    template = get_template_and_fix_tokenizer(tokenizer, options)
    template.mm_plugin = get_mm_plugin(name="base")     # those for pictures ask for a picture processor
    processor = SupervisedDatasetProcessor(template, tokenizer, None, options)
    return lambda row: processor._encode_data_example(
        row["messages"][:-1], row["messages"][-1:], row["system"], row["tools"], [], [], [])


def then(tokenizer, name, package):
    "The same for the release of 2023, whose template file needs nothing else of it."
    logging = types.ModuleType("llmtuner.extras.logging")
    logging.get_logger = lambda _: types.SimpleNamespace(info=print)
    empty = types.ModuleType("tiktoken")
    empty.Encoding = type("Encoding", (), {})
    sys.modules |= {"tiktoken": empty, "llmtuner.extras.logging": logging}
    spec = importlib.util.spec_from_file_location("old_template", Path(package)/"llmtuner/extras/template.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["old_template"] = module
    spec.loader.exec_module(module)
    template = module.templates[name]
    # tokenizers of these families have no BOS, or say that it is not put in front
    tokenizer.add_bos_token = name not in ("baichuan", "baichuan2", "chatml", "chatglm2")

    def encode(row):
        texts = [m["content"] for m in row["messages"]]
        pairs = list(zip(texts[::2], texts[1::2]))
        turns = template.encode_multiturn(tokenizer, *pairs[-1], [list(p) for p in pairs[:-1]], row["system"])
        ids, labels = [], []
        for i, (asked, said) in enumerate(turns):
            first = [tokenizer.eos_token_id] if i and template.efficient_eos else [IGNORED]
            ids += asked + said
            labels += first + [IGNORED]*(len(asked) - 1) + said
        end = [tokenizer.eos_token_id] if template.efficient_eos else []
        return ids + end, labels + end
    return encode


def main():
    task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    allow_missing_torchaudio()
    if task["package"]: known, read = None, partial(then, package=task["package"])
    else:
        from llamafactory.data.template import TEMPLATES
        known, read = sorted(TEMPLATES), today
    out = {}
    for name in task["names"]:
        if known is not None and name not in known: continue
        encode, out[name] = read(AutoTokenizer.from_pretrained(task["tokenizer"]), name), {}
        for kind, row in task["rows"].items():
            try: out[name][kind] = encode(row)
            except Exception as e: out[name][kind] = f"{type(e).__name__}: {e}"
    Path(sys.argv[2]).write_text(json.dumps({"known": known, "rows": out}))


main()
