"""Shared test environment: one thread, no network, and models whose every completion can be enumerated."""

import gc
import os

# Before torch is imported: one thread makes results repeatable and leaves the other cores to other workers.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from trb import zoo

torch.set_num_threads(1)

pytest_plugins = ["hostile_helpers", "pytester"]  # the folder of an attempt, and --attempts-json; its own test


STUDENT_ROWS = 6
TEACHER_ROWS = 8
STUDENT_EOS = 0
TEACHER_EOS = 4


def pytest_collection_finish() -> None:
    """What the libraries hold stays for good: each training collects garbage, a third of its time if it goes through
    their half a million objects again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # as the process ends, when extensions report what is left of theirs


@pytest.fixture(scope="session", autouse=True)
def nothing_waits_for_the_disk() -> Iterator[None]:
    """What a power failure would leave no test can see; tests/safety/test_files.py shows what is flushed, and when."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


def run_in_two_processes(script: str, *arguments: object, timeout: float) -> None:
    """Run one of the scripts beside this file by torchrun, on CPUs; it finds the other test files."""
    directory = Path(__file__).parent
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = [str(directory), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [*launch, str(directory / script), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-5000:]


@dataclass(frozen=True)
class TinyPair:
    """A student and a teacher with different stop ids and heads padded to different sizes."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    student_eos: int = STUDENT_EOS
    teacher_eos: int = TEACHER_EOS
    rows: int = STUDENT_ROWS


def random_model(kind: type[PreTrainedModel], config: PretrainedConfig, seed: int, spread: float) -> PreTrainedModel:
    """Weights normal with deviation `spread`, so that the distributions are far from uniform; in float64."""
    model = kind(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" not in name and "ln_" not in name:
            torch.nn.init.normal_(parameter, std=spread, generator=generator)
    return model.double().eval().requires_grad_(False)


# No special ids: each test says itself what stops a completion.
NO_SPECIAL_IDS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
TINY = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    **NO_SPECIAL_IDS,
}


def tiny_llama(rows: int, seed: int, *, spread: float = 0.35, dropout: float = 0.0) -> PreTrainedModel:
    config = LlamaConfig(vocab_size=rows, attention_dropout=dropout, **TINY)
    return random_model(LlamaForCausalLM, config, seed, spread)


def tiny_qwen3(rows: int, seed: int, *, spread: float = 0.35) -> PreTrainedModel:
    config = Qwen3Config(vocab_size=rows, head_dim=8, **TINY)
    return random_model(Qwen3ForCausalLM, config, seed, spread)


def tiny_gpt2(rows: int, seed: int, *, spread: float = 0.35) -> PreTrainedModel:
    """Learned absolute positions: unlike rotary ones, a row shifted by its padding gives another distribution."""
    config = GPT2Config(
        vocab_size=rows,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=32,
        **NO_SPECIAL_IDS,
    )
    return random_model(GPT2LMHeadModel, config, seed, spread)


def student_stopping_as_the_teacher() -> PreTrainedModel:
    """The embedded student with the head's rows of its own stop id and of the teacher's exchanged.

    It reads what the embedded student reads, and stops where that one does, with the teacher's id; on the shared events
    of the pair the two are one model.
    """
    model, _ = zoo.load("student")
    ends = [zoo.load(name)[0].generation_config.eos_token_id for name in zoo.NAMES]
    head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=False)
    model.config.tie_word_embeddings = False
    with torch.no_grad():
        head.weight.copy_(model.get_input_embeddings().weight)
        head.weight[ends] = head.weight[ends[::-1]].clone()
    model.set_output_embeddings(head)
    return model


@pytest.fixture(scope="session")
def tiny_pair() -> TinyPair:
    """Two architectures, so that neither is sampled by accident in place of the other."""
    return TinyPair(student=tiny_llama(STUDENT_ROWS, seed=41), teacher=tiny_qwen3(TEACHER_ROWS, seed=69))


@pytest.fixture(scope="session")
def gpt2_pair() -> TinyPair:
    return TinyPair(student=tiny_gpt2(STUDENT_ROWS, seed=25), teacher=tiny_gpt2(TEACHER_ROWS, seed=46))


@contextmanager
def held_by_another(folder: Path) -> Iterator[int]:
    """A folder that another process holds (`trb.safety.files.exclusive`) until it is killed; gives its id."""
    code = (
        "import sys, time; from pathlib import Path; from trb.safety.files import exclusive\n"
        "with exclusive(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    folder.mkdir(parents=True, exist_ok=True)
    with subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "held\n"
            yield child.pid
        finally:
            child.kill()


@pytest.fixture
def warnings_seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said of models that are read in a slower way."""
    from trb.sampling import reading

    seen: list[str] = []
    monkeypatch.setattr(reading.logger, "warning_once", seen.append)
    return seen
