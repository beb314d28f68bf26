"""Answers made to run code in the grader, to outlast it, or to cost the answers after them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hostile_helpers import SECONDS, Bomb, canary, each, refused

from trb.safety.confinement import permitted_environment
from trb.tasks.grading import Verifier
from trb.tasks.prompts import load_prompts


@pytest.fixture(scope="module")
def grader() -> Iterator[Verifier]:
    """One for all attempts, as in a run: what one of them does must not cost the next."""
    with Verifier(timeout_s=20.0) as verifier:
        yield verifier


@pytest.fixture(scope="module")
def impatient_grader() -> Iterator[Verifier]:
    with Verifier(timeout_s=2.0) as verifier:
        yield verifier


def grade(verifier: Verifier, completions: list[str], rows: list[dict[str, Any]]) -> None:
    """Fails if one of them gets a point, or if an honest answer after them gets none."""
    scores = verifier.score([*completions, r"\boxed{x+1}"], [*rows, {"answer": "1+x", "verifier": "math"}])
    assert scores == [0.0] * len(completions) + [1.0]


MATH = {
    "power tower": r"\boxed{9^{9^{9^{9}}}}",
    "factorial": r"\boxed{(10^{9})!}",
    "factorials": r"\boxed{9!!!!!!!!!!!!!!!!!}",
    "huge product": r"\boxed{\prod_{k=1}^{10^{9}} k}",
    "huge sum": r"\boxed{\sum_{k=1}^{10^{12}} \sin k}",
    "integral": r"\boxed{\int_0^1 \frac{\sin(x^{x^{x}})}{\log(1+x^{x})} dx}",
    "million digits": "\\boxed{" + "9" * 10**6 + "}",
    "unclosed boxes": "\\boxed{" * 100_000,
    "nested boxes": "\\boxed{" * 50_000 + "}" * 50_000,
    "nested fractions": "\\boxed{" + "\\frac{1}{" * 400 + "2" + "}" * 401,
    "brackets": "\\boxed{" + "(" * 900 + "1" + ")" * 900 + "}",
    "announcements": "the final answer is " * 50_000,
    "spaces": "\\boxed{1" + " " * 500_000 + "}",
    "commands": "\\boxed{" + "\\text{" * 20_000 + "}" * 20_001,
    "python": r"\boxed{__import__('os').system('touch CANARY')}",
    "announced python": "The final answer is (1-__import__('os').system('touch CANARY'))",
    "control": "\\boxed{\x00\x1b\u202e}",
    "half a surrogate": "\\boxed{\ud800}",
}
WAITED_FOR = ("factorial", "factorials", "huge product", "huge sum", "integral", "brackets")  # as is a power tower


@each("text", slow_ones=WAITED_FOR, **MATH)
def test_a_mathematical_answer(folder: Path, impatient_grader: Verifier, text: str) -> None:
    completion = text.replace("CANARY", str(canary(folder)))
    grade(impatient_grader, [completion], [{"answer": "5+x", "verifier": "math"}])


CODE = {
    "import": "__import__('os').system('touch CANARY')",
    "open": "open('CANARY', 'w').close()",
    "exec": "exec(\"open('CANARY', 'w').close()\")",
    "lambda": "(lambda: open('CANARY', 'w'))()",
    "comprehension": "[open('CANARY', 'w') for _ in [0]]",
    "subclasses": "().__class__.__base__.__subclasses__()",
    "format": "'{0.__class__}'.format(0)",
    "preview": "preview('x', output='png')",
    "lambdify": "lambdify((), \"__import__('os').system('touch CANARY')\", modules='math')()",
    "sympify": "sympify(\"__import__('os').system('touch CANARY')\")",
    "attribute": "Integer(1).__class__.__init__.__globals__",
    "exit": "exit(0)",
}


@each("text", **CODE)
def test_an_answer_that_is_code(folder: Path, grader: Verifier, text: str) -> None:
    """One for every way in which scorers of reasoning-gym evaluate answers."""
    tasks = ["spiral_matrix", "string_insertion", "n_queens", "binary_matrix", "countdown", "polynomial_multiplication"]
    rows = [load_prompts(f"reasoning-gym:{task}", limit=1)[0] for task in tasks]
    answer = text.replace("CANARY", str(canary(folder)))
    grade(grader, [f"<answer>{answer}</answer>"] * len(rows), rows)


@each(
    "metadata",
    nesting="[" * 100_000,
    settings='{"task": "chain_sum", "settings": {"size": "x"}, "entry": {}}',
    list="[]",
)
def test_a_dataset_with_unusable_metadata(folder: Path, grader: Verifier, metadata: str) -> None:
    row = {"answer": "1", "verifier": "reasoning-gym:chain_sum", "metadata": metadata}
    refused(lambda: grade(grader, [r"\boxed{1}"], [row]))


@each("what", memory="memory", processes="processes", files="files", network="network", native="native", kill="kill")
def test_code_in_the_grading_process(folder: Path, what: str) -> None:
    """What code could do there if the filter of expressions had a hole: it is run behind the filter on purpose."""
    code = {
        "memory": "x = bytearray(8 * 2**30)",
        "processes": "import os; os.fork()",
        "files": Bomb(folder).code,
        "network": "import socket; socket.create_connection(('127.0.0.1', 9))",
        "native": "import ctypes; ctypes.CDLL(None)",
        "kill": "import os; os.kill(os.getppid(), 0)",
    }[what]
    program = (
        "import json, sys; from trb.safety import confinement\n"
        "import socket, ctypes\n"
        "print(confinement.limit_resources(1024)); confinement.forbid_side_effects()\n"
        f"try:\n    exec({code!r})\nexcept BaseException as error:\n    print(type(error).__name__, error)\n"
        "else:\n    print('DONE')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=SECONDS)
    limited, _, result = done.stdout.partition("\n")
    assert result.startswith(("PermissionError", "MemoryError")), f"limits {limited}, then {result or done.stderr}"


def test_secrets_in_the_environment(folder: Path) -> None:
    secrets = {
        "HF_TOKEN": "1",
        "WANDB_API_KEY": "1",
        "AWS_SECRET_ACCESS_KEY": "1",
        "OPENAI_API_KEY": "1",
        "SSH_AUTH_SOCK": "1",
    }
    assert not permitted_environment({**os.environ, **secrets}).keys() & secrets.keys()


@pytest.mark.parametrize("name", ["PYTHONIOENCODING", "PYTHONINSPECT", "PYTHONOPTIMIZE", "PYTHONSTARTUP"])
def test_settings_of_the_interpreter_stay_outside(folder: Path, name: str) -> None:
    """What Python reads beside its paths changes what a confined process reads, checks, or leaves running."""
    assert name not in permitted_environment({name: "1"})


def test_the_encoding_of_the_terminal_is_not_that_of_answers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "utf-16")
    with Verifier(timeout_s=60.0) as verifier:
        assert verifier.score([r"\boxed{pi/2}", r"\boxed{2}"], [{"answer": r"\frac{\pi}{2}"}] * 2) == [1.0, 0.0]
        assert (verifier.timeouts, verifier.crashes) == (0, 0)
