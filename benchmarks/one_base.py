"""Peak memory of a run whose teacher is the student's base, against one with two copies of that model.

    python benchmarks/one_base.py --json benchmarks/results/one_base.json

SmolLM2-135M in float32 with LoRA of rank 16 on every linear layer: rollouts, blended, and one training step. Each arm
is a process of its own, which has trained the embedded pair before, so that whatever a step loads is loaded. What is
compared is the largest resident memory during the step above what was there before the model was, a median of rounds;
loading, in which a file passes through memory, is left out.
"""

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MODEL = "smollm2-135m"
ARMS = ("one set of weights", "two copies")
RANK, ROLLOUTS, TOKENS, CHUNK = 16, 2, 24, 16  # small: what a step takes beside weights is the same in both arms
PROMPTS = [{"prompt": [{"role": "user", "content": "What is the capital of Norway? Answer in one sentence."}]}] * 4
# Of the kernel's accounts of this process, in kB.
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def memory(field: str) -> int:
    """Bytes: VmRSS now, or VmHWM at most since `reset`."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def trainer(student: Any, teacher: Any, tokenizer: Any, directory: str) -> Any:
    from datasets import Dataset
    from peft import LoraConfig

    from trb import TRBConfig, TRBTrainer

    args = TRBConfig(
        directory,
        max_steps=1,
        per_device_train_batch_size=ROLLOUTS,
        num_generations=ROLLOUTS,
        max_completion_length=TOKENS,
        loss_chunk_tokens=CHUNK,
        initial_kl_budget=0.1,
        gradient_checkpointing=True,
        save_strategy="no",
        report_to="none",
        recorded_rollouts=0,
        bf16=False,
        disable_tqdm=True,
    )
    lora = LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    rows = Dataset.from_list(PROMPTS)
    return TRBTrainer(student, teacher, args, train_dataset=rows, processing_class=tokenizer, peft_config=lora)


def arm(name: str) -> dict[str, float]:
    from trb.models.loading import load_model, load_tokenizer

    shared = name == ARMS[0]
    with tempfile.TemporaryDirectory() as directory:
        small = "zoo:student"
        trainer(load_model(small), load_model("zoo:teacher"), load_tokenizer(small), f"{directory}/small").train()
        before = memory("VmRSS")
        teacher = "base" if shared else load_model(MODEL)
        run = trainer(load_model(MODEL), teacher, load_tokenizer(MODEL), f"{directory}/run")
        loaded = memory("VmRSS") - before
        CLEAR.write_text("5")  # the largest so far is what there is now
        run.train()
        return {"loaded": loaded, "peak": memory("VmHWM") - before, "without the model": before}


def measured(name: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, "--arm", name], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    from trb.studies import provenance

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(arm(args.arm)))
        return
    rounds = [{name: measured(name) for name in ARMS} for _ in range(args.rounds)]
    found = {
        name: {key: statistics.median(each[name][key] for each in rounds) for key in rounds[0][name]} for name in ARMS
    }
    one, two = (found[name]["peak"] for name in ARMS)
    record = {
        "unit": "MB of resident memory above that of a process without the model",
        "model": MODEL,
        "lora_rank": RANK,
        "rollouts": ROLLOUTS,
        "tokens": TOKENS,
        "loss_chunk_tokens": CHUNK,
        "rounds": args.rounds,
        **{name: {key: round(value / 1e6, 1) for key, value in sizes.items()} for name, sizes in found.items()},
        "ratio of peaks": round(one / two, 3),
        "saved": round((two - one) / 1e6, 1),
        "provenance": provenance.describe(),
    }
    text = json.dumps(record, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
