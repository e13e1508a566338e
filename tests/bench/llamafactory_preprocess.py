"""LLaMA-Factory's own preprocessing of the same rows, timed. Run by the Python that has it installed, as a script:
nothing of this project is imported. No model is loaded."""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.hparams import get_train_args
from llamafactory.model import load_tokenizer

# LLaMA-Factory's template ends its default system text with a full stop that the model's own template does not have.
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def preprocess(rows: Path, base: str, work: Path, workers: int, max_tokens: int) -> dict[str, Any]:
    """Return the seconds from reading the file to the tokenised data set, its sequences and its tokens."""
    (work / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": str(rows)}}), encoding="utf-8")
    options = {
        "model_name_or_path": base,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "dataset": "rows",
        "dataset_dir": str(work),
        "template": "smollm2",
        "default_system": SYSTEM,
        "cutoff_len": max_tokens,
        "overwrite_cache": True,
        "preprocessing_num_workers": workers,
        "output_dir": str(work / "out"),
        "report_to": "none",
        "use_cpu": True,
    }
    model, data, training, _, _ = get_train_args(options)
    tokenizer = load_tokenizer(model)
    template = get_template_and_fix_tokenizer(tokenizer["tokenizer"], data)
    started, computed = time.monotonic(), cpu_time()
    found = get_dataset(template, model, data, training, stage="sft", **tokenizer)["train_dataset"]
    times = {"seconds": time.monotonic() - started, "cpu_seconds": cpu_time() - computed}
    tokens = pc.sum(pc.list_value_length(found.data.column("input_ids"))).as_py()
    return {**times, "sequences": len(found), "tokens": tokens}


def cpu_time() -> float:
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


if __name__ == "__main__":
    file, base, work, workers, max_tokens = sys.argv[1:]
    print(json.dumps(preprocess(Path(file), base, Path(work), int(workers), int(max_tokens))))
