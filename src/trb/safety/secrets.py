"""What secrets are called and look like, and what stands in their place where something is written down or shown."""

import re
import shlex
from collections.abc import Sequence

__all__ = ["HIDDEN", "hide_options", "names_secret", "redact"]

HIDDEN = "[redacted]"

# The name's last word decides: hub_token is a secret; max_new_tokens, eos_token_id and a tokenizer's eos_token are not.
_OF_A_TOKENIZER = "".join(f"(?<!{name}[-_.])" for name in ("eos", "bos", "pad", "unk", "sep", "cls", "mask"))
_SECRET_NAME = re.compile(
    rf"((^|[-_.])({_OF_A_TOKENIZER}token|secret|passw(or)?d|credentials?)|key)$",
    re.IGNORECASE,
)
# The forms of well-known services: Hugging Face, GitHub, GitLab, API keys, Slack, AWS, JSON web tokens.
_SECRET_VALUE = re.compile(
    r"\b(hf_\w{16,}|(gh[pousr]|github_pat)_\w{16,}|glpat-[\w-]{16,}|sk-[\w-]{16,}|xox[abps]-[\w-]{8,}"
    r"|AKIA[A-Z0-9]{12,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+)"
)
# A long unbroken mix of letters and digits is an API key, unless its option says that it is a commit.
_OPAQUE = re.compile(r"(?=.*\d)(?=.*[A-Za-z])[A-Za-z0-9+]{32,}={0,2}")
_COMMIT_NAME = re.compile(r"(?i)(revision|commit|sha)$")
_ASSIGNMENT = re.compile(r"-{0,2}[A-Za-z][\w.-]*=")
_URL_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")


def names_secret(name: str) -> bool:
    """Whether what has such a name is a token, a key or a password: an option, or a dotted key."""
    return _SECRET_NAME.search(name) is not None


def redact(arguments: Sequence[str]) -> str:
    """A command line as one shell-quoted string, without what looks like a token, a key or a password."""
    shown = []
    option = ""
    for argument in arguments:
        if _ASSIGNMENT.match(argument):
            name, _, value = argument.partition("=")
            shown.append(f"{name}={_redact_value(name, value)}")
            option = ""
        elif argument.startswith("-"):
            shown.append(argument)
            option = argument
        else:
            shown.append(_redact_value(option, argument))
            option = ""
    return shlex.join(shown)


def hide_options(text: str) -> str:
    """A text without the values of options that name a secret: a command line that somebody else wrote down."""
    words, is_value = re.split(r"(\s+)", text), False
    for place in range(0, len(words), 2):  # what lies between them at odd places
        name, equals, _ = words[place].partition("=")
        if is_value:
            words[place], is_value = HIDDEN, False
        elif name.startswith("-") and names_secret(name):
            words[place], is_value = f"{name}={HIDDEN}" if equals else name, not equals
    return "".join(words)


def _redact_value(name: str, value: str) -> str:
    if names_secret(name) or (_OPAQUE.fullmatch(value) and not _COMMIT_NAME.search(name)):
        return HIDDEN
    return _URL_LOGIN.sub(f"{HIDDEN}@", _SECRET_VALUE.sub(HIDDEN, value))
