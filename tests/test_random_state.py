"""What is done for the first time in a process, a probe of the machine say, draws from no generator of the process.

A run that was killed resumes in a process of its own: a draw more or less there, and its rows are summed in another
order. Tests that share a process cannot see it.
"""

import os
import subprocess
import sys

SCRIPT = """
import random

import numpy as np
import torch

from trb import zoo
from trb.blend import solve
from trb.losses import topk_reverse_kl
from trb.policies import TrustRegionPolicy
from trb.sampling import SAMPLERS, sample
from trb.tasks.evaluation import evaluate


def states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


(student, tokenizer), (teacher, _) = zoo.load("student"), zoo.load("teacher")
problems = zoo.problems(2, seed=0, split="test")
prompts = [[5, 6, 7]] * 3
logits = [torch.linspace(-3, 3, 40).view(4, 10).sin().requires_grad_() for _ in range(2)]
mask = torch.ones(4, dtype=torch.bool)
ends = {"eos_token_id": student.generation_config.eos_token_id}
ends["teacher_eos_token_id"] = teacher.generation_config.eos_token_id


def drawn(method):
    return sample(student, teacher, prompts, TrustRegionPolicy(0.1), max_new_tokens=4, method=method, **ends)


DONE = {
    "solve": lambda: solve(logits[0].detach(), logits[1].cos().detach(), 0.1),
    "loss": lambda: topk_reverse_kl(*logits, mask, 0).backward(),
    **{f"sample: {method}": lambda method=method: drawn(method) for method in SAMPLERS},
    "evaluate": lambda: evaluate(student, tokenizer, problems, n=2, max_new_tokens=4, progress=False),
}
for name, do in DONE.items():
    before = states()
    do()
    assert states() == before, name
    print("left alone:", name)
"""


def test_nothing_draws_from_the_generators_of_a_fresh_process() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT], env=os.environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("left alone") == 5
