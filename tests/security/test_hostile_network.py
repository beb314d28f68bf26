"""What is on this machine, read where connections are noted: nothing may ask for one."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from hostile_helpers import RECIPE, SECONDS, each, model_copy, refused, slow

from trb.models.loading import load_model
from trb.tasks.prompts import load_prompts

OFFLINE = """
import os, sys, json
for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ.pop(name, None)
tried = []
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        if event == "socket.connect" and isinstance(arguments[1], (str, bytes)):
            return  # a socket of this machine
        tried.append(repr(arguments[-2:]))
        raise RuntimeError("no network today")
sys.addaudithook(watch)
from trb.models.loading import load_model, load_tokenizer
from trb.models.packaged import quiet_libraries
from trb.tasks.prompts import load_prompts
quiet_libraries()
folder = sys.argv[1]
for spec in ("zoo:student", folder + "/model"):
    load_model(spec), load_tokenizer(spec)
for spec in ("zoo:chains", folder + "/data.jsonl", folder + "/data"):
    assert len(load_prompts(spec, limit=1)) == 1
if sys.argv[2] == "train":
    from trb.studies.recipe import make_recipe
    from trb.studies.run import train
    train(make_recipe(json.loads(sys.argv[3])), folder + "/run")
print("TRIED", tried)
"""


def without_network(folder: Path, what: str) -> None:
    model_copy(folder)
    (folder / "data.jsonl").write_text('{"prompt": "x"}\n')
    (folder / "data").mkdir()
    shutil.copy(folder / "data.jsonl", folder / "data" / "train.jsonl")
    command = [sys.executable, "-c", OFFLINE, str(folder), what, json.dumps(RECIPE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-500:]
    assert "TRIED []" in done.stdout


@slow
def test_loading_local_things(folder: Path) -> None:
    without_network(folder, "load")


@slow
def test_training_on_local_things(folder: Path) -> None:
    without_network(folder, "train")


@each("what", model="model", data="data")
def test_a_path_that_looks_like_a_hub_name(folder: Path, what: str) -> None:
    missing = str(folder / "missing" / "thing")
    refused(lambda: load_model(missing) if what == "model" else load_prompts(missing))
