"""Talking to a server that samples: every answer ends, in time and in size, and is the completion that was asked for.

What a server could still do unseen is to draw from another law than the student's; nothing here could tell.
"""

import json
import math
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from threading import Timer
from typing import Any
from urllib.parse import urlsplit

from trb.errors import InputError, OperationError, ServerError, ServerTimeoutError

__all__ = ["REQUEST_SECONDS", "Answer", "ask", "check_completion", "check_numbers"]

REQUEST_SECONDS = 600.0
"""What one request may take if nobody says otherwise."""

# A token id, its text and its log-probability take some hundred bytes; a step of 64 rows of 32k tokens fits.
MAX_BYTES = 1 << 30
# Answers of a server that is busy or restarts: asked again after so many seconds.
_PASSING = (500, 502, 503)
PAUSES = (1.0, 2.0, 4.0)


@dataclass(frozen=True)
class Answer:
    """What a server said, whole."""

    url: str
    status_code: int
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode(errors="replace")

    def json(self) -> Any:
        """Raises RuntimeError for a body that is not JSON."""
        try:
            return json.loads(self.body or b"null")
        except (ValueError, RecursionError) as error:
            raise OperationError(f"{self.url} answered something else than JSON ({error}): {self.text:.200}") from error


def ask(url: str, body: Any = None, *, seconds: float, post: bool = False, patient: bool = False) -> Answer:
    """The answer to one request; redirects are not followed. With `patient`, a busy server is asked again.

    Raises:
        TimeoutError: it was not complete after `seconds`, all tries together.
        ConnectionError: the server could not be reached, or ended the connection.
        RuntimeError: it is larger than MAX_BYTES.
    """
    deadline = time.monotonic() + seconds
    for pause in (*(PAUSES if patient else ()), None):
        try:
            answer = _ask_once(url, body, deadline, post)
        except TimeoutError as error:
            raise ServerTimeoutError(f"{url} gave no complete answer within {seconds:g} s") from error
        except (OSError, HTTPException, ValueError) as error:
            raise ServerError(f"{url} gave no answer: {error!r:.300}") from error
        if len(answer.body) > MAX_BYTES:
            raise OperationError(f"{url} answered more than {MAX_BYTES:,} bytes")
        if answer.status_code not in _PASSING or pause is None or time.monotonic() + pause > deadline:
            break
        time.sleep(pause)
    return answer


def _ask_once(url: str, body: Any, deadline: float, post: bool) -> Answer:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError("an address of a server begins with http:// or https:// and names a host")
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    connection = kind(parts.hostname, parts.port, timeout=left)
    connection.connect()
    # A time-out of the socket begins anew with every byte; this one does not.
    open_socket = connection.sock
    late: list[bool] = []

    def end() -> None:
        late.append(True)
        with suppress(OSError):
            open_socket.shutdown(socket.SHUT_RDWR)

    timer = Timer(deadline - time.monotonic(), end)
    timer.daemon = True
    timer.start()
    try:
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        content = None if body is None else json.dumps(body).encode()
        connection.request("POST" if post else "GET", path, content, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        whole = answer.read(MAX_BYTES + 1)
    except (OSError, HTTPException):
        if late:
            raise TimeoutError from None
        raise
    finally:
        timer.cancel()
        connection.close()
    if late:
        raise TimeoutError
    return Answer(url, answer.status, whole)


def check_completion(tokens: Any, *, where: str, rows: int, stop_ids: Sequence[int], max_new_tokens: int) -> list[int]:
    """`tokens`, if they can be a completion; `rows` is how many token ids the model has.

    Raises:
        RuntimeError: they cannot. `where` names the server and the prompt.
    """
    if not (isinstance(tokens, list) and tokens and all(type(token) is int for token in tokens)):
        raise OperationError(f"{where} is completed with {tokens!r:.100}, not with a list of token ids")
    if outside := [token for token in tokens if not 0 <= token < rows]:
        raise OperationError(f"{where} is completed with token id {outside[0]}, but the model has {rows}")
    if len(tokens) > max_new_tokens:
        raise OperationError(f"{where} is completed with {len(tokens)} tokens; at most {max_new_tokens} were asked for")
    stops = [place for place, token in enumerate(tokens) if token in stop_ids]
    if stops and stops[0] != len(tokens) - 1:
        raise OperationError(f"{where}: the completion goes on after its stop token {tokens[stops[0]]}")
    if not stops and len(tokens) < max_new_tokens:
        raise OperationError(
            f"{where}: the completion breaks off after {len(tokens)} tokens, without a stop token and short of "
            f"{max_new_tokens}"
        )
    return tokens


def check_numbers(record: Mapping[str, Any], columns: Sequence[str], length: int, where: str) -> None:
    """Raises RuntimeError unless the record holds one number per token in each of the columns."""
    for name in columns:
        values = record.get(name)
        if not (isinstance(values, list) and len(values) == length and all(map(_is_number, values))):
            raise OperationError(f"{where}: {name} is {values!r:.100}, expected {length} numbers")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
