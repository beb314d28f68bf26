"""What is called a secret is one wherever it is written down or shown."""

import pytest

from trb.report import summary
from trb.safety.secrets import HIDDEN, hide_options, names_secret, redact

SECRETS = ["token", "hub_token", "github_token", "openai_key", "api-key", "my_password", "passwd", "credentials"]
SECRETS += ["trainer.hub_token", "HF_TOKEN", "client-secret", "push_to_hub_token"]
OTHERS = ["eos_token", "pad_token", "eos-token", "max_new_tokens", "eos_token_id", "token_mean", "keys", "tokenizer"]


@pytest.mark.parametrize(("names", "hidden"), [(SECRETS, True), (OTHERS, False)])
def test_the_command_and_the_report_hide_the_same_names(names: list[str], hidden: bool) -> None:
    for name in names:
        assert names_secret(name) == hidden, name
        for command in ([f"--{name}", "abc"], [f"--{name}=abc"]):
            assert ("abc" not in redact(command)) == hidden, name
            assert ("abc" not in hide_options(" ".join(["trb train", *command, "--seed 1"]))) == hidden, name
        assert summary.flatten({name: "abc"}) == [(name, HIDDEN if hidden else "abc")]


def test_what_stands_around_a_secret_stays() -> None:
    text = "trb  train --quiet --hub-token a=b --api-key=c=d --seed 1\n--password"
    assert hide_options(text) == (f"trb  train --quiet --hub-token {HIDDEN} --api-key={HIDDEN} --seed 1\n--password")
