"""A server that samples, played by one that lies, breaks off, never ends or answers something else.

What vLLM's own server answers is in test_vllm and test_vllm_trainer.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from accelerate import Accelerator
from conftest import tiny_llama
from trl.generation import vllm_client, vllm_generation
from trl.trainer import distillation_trainer

from trb.policies import BehaviorPolicy, StudentPolicy, TemperaturePolicy, TrustRegionPolicy
from trb.sampling.vllm import ServedEngine, serve_command, served, stopping_parameters
from trb.sampling.vllm.verification import BlendRequest
from trb.training.vllm import BoundedClient, deferred_generation
from trb.vocab import SharedVocabulary

PAIR = SharedVocabulary(9, 2, (5,))
PROMPTS = [[1, 3], [4]]
STUDENT = StudentPolicy()
COLUMNS = ("teacher_weight", "kl_student", "kl_teacher", "accepted")
Answering = Callable[[BaseHTTPRequestHandler, Any], Any]


class Fake:
    """Plays the served engine: `answers` by path, a value for JSON or a function that writes what it likes."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {"/health": {}, "/v1/models": {"data": [{"id": "student"}]}}
        self.ending = threading.Event()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                fake.answer(self, None)

            def do_POST(self) -> None:
                fake.answer(self, json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"null"))

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, handler: BaseHTTPRequestHandler, body: Any) -> None:
        found = self.answers.get(handler.path.split("?")[0])
        if callable(found):
            found = found(handler, body)
        if found is not None:
            send(handler, 200, json.dumps(found).encode())

    def trickle(self, handler: BaseHTTPRequestHandler, body: Any) -> None:
        """A byte now and then, for ever: no time-out of a socket ever strikes."""
        handler.send_response(200)
        handler.end_headers()
        with suppress(OSError):
            while not self.ending.wait(0.05):
                handler.wfile.write(b" ")

    def silence(self, handler: BaseHTTPRequestHandler, body: Any) -> None:
        self.ending.wait()

    def endless_headers(self, handler: BaseHTTPRequestHandler, body: Any) -> None:
        with suppress(OSError):
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
            while not self.ending.wait(0.05):
                handler.wfile.write(b"x")


def send(handler: BaseHTTPRequestHandler, status: int, content: bytes) -> None:
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    with suppress(OSError):
        handler.wfile.write(content)


@pytest.fixture
def fake() -> Iterator[Fake]:
    started = Fake()
    yield started
    started.ending.set()
    started.server.shutdown()
    started.server.server_close()


def trls(fake: Fake, monkeypatch: pytest.MonkeyPatch, seconds: float = 20.0) -> BoundedClient:
    monkeypatch.setattr(vllm_client, "is_vllm_available", lambda: True)
    return BoundedClient(base_url=fake.url, connection_timeout=0.1, rows=9, request_timeout=seconds)


def complete(client: BoundedClient) -> list[list[int]]:
    options = {"max_tokens": 4, "generation_kwargs": stopping_parameters(PAIR), "logprobs": None}
    return client.generate(PROMPTS, n=2, **options)["completion_ids"]


def choices(*completions: Any, prompts: Any = None) -> dict[str, Any]:
    echoed = prompts or [row for row in PROMPTS for _ in range(2)]
    rows = zip(completions, [*echoed, *[[]] * len(completions)], strict=False)
    return {"choices": [{"prompt_token_ids": p, "token_ids": c, "logprobs": None} for c, p in rows]}


GOOD = ([7, 2], [7, 7, 7, 7], [5], [1, 2])


def test_honest_completions_pass(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.answers["/v1/completions"] = choices(*GOOD)
    assert complete(trls(fake, monkeypatch)) == list(GOOD)


ANSWERS = {
    "too few completions": choices(*GOOD[:3]),
    "too many completions": choices(*GOOD, [2]),
    "none": {"choices": []},
    "other prompts": choices(*GOOD, prompts=[[1], [1], [4], [4]]),
    "an id outside the vocabulary": choices([9, 2], *GOOD[1:]),
    "a negative id": choices([-1, 2], *GOOD[1:]),
    "a huge id": choices([10**30, 2], *GOOD[1:]),
    "a fraction": choices([1.5, 2], *GOOD[1:]),
    "a truth value": choices([True, 2], *GOOD[1:]),
    "NaN": choices([float("nan"), 2], *GOOD[1:]),
    "text": choices("72", *GOOD[1:]),
    "an empty completion": choices([], *GOOD[1:]),
    "a completion that is too long": choices([7] * 5, *GOOD[1:]),
    "a huge completion": choices([7] * 500_000, *GOOD[1:]),
    "one that goes on after its stop": choices([2, 7], *GOOD[1:]),
    "one that breaks off": choices([7], *GOOD[1:]),
    "no list of choices": {"choices": 3},
    "a list": [],
    "null": {"choices": None},
    "no token ids": {"choices": [{"prompt_token_ids": [1], "logprobs": None}] * 4},
    "log-probabilities that are none": {"choices": [{"prompt_token_ids": [1], "token_ids": [2], "logprobs": 5}] * 4},
}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_wrong_answer_is_an_error_that_names_the_server(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    client = trls(fake, monkeypatch)
    fake.answers["/v1/completions"] = ANSWERS[name]
    with pytest.raises(RuntimeError, match=r"http://127\.0\.0\.1:\d+"):
        complete(client)


def html(handler: BaseHTTPRequestHandler, body: Any) -> None:
    send(handler, 200, b"<html>sign in</html>")


def nested(handler: BaseHTTPRequestHandler, body: Any) -> None:
    send(handler, 200, b"[" * 100_000)


@pytest.mark.parametrize("answer", [html, nested])
def test_an_answer_that_is_not_json_is_named(fake: Fake, monkeypatch: pytest.MonkeyPatch, answer: Answering) -> None:
    client = trls(fake, monkeypatch)
    fake.answers["/v1/completions"] = answer
    with pytest.raises(RuntimeError, match="something else than JSON"):
        complete(client)


@pytest.mark.parametrize("how", ["trickle", "silence", "endless_headers"])
@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/completions"])
def test_a_server_that_never_ends_its_answer_is_given_up(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, how: str, path: str
) -> None:
    begun = time.monotonic()
    fake.answers[path] = getattr(fake, how)
    with pytest.raises((TimeoutError, ConnectionError), match=r"within|was not up in"):
        complete(trls(fake, monkeypatch, seconds=0.5))
    assert time.monotonic() - begun < 20


def test_an_answer_without_bounds_is_not_kept(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    def flood(handler: BaseHTTPRequestHandler, body: Any) -> None:
        handler.send_response(200)
        handler.end_headers()
        with suppress(OSError):
            while not fake.ending.is_set():
                handler.wfile.write(b" " * 65536)

    client = trls(fake, monkeypatch)
    monkeypatch.setattr(served, "MAX_BYTES", 1 << 20)
    fake.answers["/v1/completions"] = flood
    with pytest.raises(RuntimeError, match="more than 1,048,576 bytes"):
        complete(client)


def test_a_redirect_is_not_followed(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(handler: BaseHTTPRequestHandler, body: Any) -> None:
        handler.send_response(302)
        handler.send_header("Location", f"{fake.url}/elsewhere")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    client = trls(fake, monkeypatch)
    fake.answers |= {"/v1/completions": away, "/elsewhere": choices(*GOOD)}
    with pytest.raises(Exception, match="302"):
        complete(client)


def test_a_busy_server_is_asked_again(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def busy(handler: BaseHTTPRequestHandler, body: Any) -> Any:
        seen.append(body)
        if len(seen) > 1:
            return choices(*GOOD)
        send(handler, 503, b"busy")
        return None

    monkeypatch.setattr(served, "PAUSES", (0.0,))
    client = trls(fake, monkeypatch)
    fake.answers["/v1/completions"] = busy
    assert complete(client) == list(GOOD)
    assert len(seen) == 2 and seen[0] == seen[1]


def test_a_trainer_s_generation_talks_to_its_server_through_the_bounded_client(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (vllm_client, vllm_generation):
        monkeypatch.setattr(module, "is_vllm_available", lambda: True)
    monkeypatch.setattr(BoundedClient, "init_communicator", lambda self, device: None)  # NCCL, which needs a GPU
    with deferred_generation(0.5):
        generation = distillation_trainer.VLLMGeneration(
            tiny_llama(9, seed=1), Accelerator(cpu=True), None, mode="server", server_base_url=fake.url,
            server_timeout=0.1, max_completion_length=4, generation_kwargs=stopping_parameters(PAIR), logprobs=None,
        )  # fmt: skip
    fake.answers["/v1/completions"] = choices(*GOOD)
    four = [row for row in PROMPTS for _ in range(2)]
    assert generation.generate(four, None, 2)[1] == list(GOOD)
    fake.answers["/v1/completions"] = choices([9, 2], *GOOD[1:])
    with pytest.raises(RuntimeError, match="token id 9, but the model has 9"):
        generation.generate(four, None, 2)
    fake.answers["/v1/completions"] = fake.trickle
    with pytest.raises(TimeoutError, match=r"within 0\.5 s"):
        generation.generate(four, None, 2)


# ---- the blended engine behind a server ----


def blended(fake: Fake, *, seconds: float = 20.0, policy: BehaviorPolicy = STUDENT, **record: Any) -> Any:
    """Two rows sampled by a server whose completions are [7, 2] and whose records are as given."""
    numbers = {name: [0.5, 0.5] for name in COLUMNS}

    def records(handler: BaseHTTPRequestHandler, body: Any) -> Any:
        return {"results": [{name: {"tokens": [7, 2], **numbers, **record} for name in body["args"][0]}]}

    fake.answers.setdefault("/v1/completions", {"choices": [{"token_ids": [7, 2]}]})
    fake.answers.setdefault("/collective_rpc", records)
    engine = ServedEngine(fake.url, "teacher", timeout_s=seconds)
    return engine.sample(
        PROMPTS, [policy] * 2, vocabulary=PAIR, max_new_tokens=4, temperature=1.0, seed=0, prompt_keys=[1, 2],
        rollout_index=[0, 0],
    )  # fmt: skip


def test_honest_records_pass(fake: Fake) -> None:
    assert blended(fake).completions == [[7, 2], [7, 2]]


@pytest.mark.parametrize("policy", [STUDENT, TemperaturePolicy(0.8)], ids=str)
def test_a_row_without_a_teacher_has_no_divergence_from_it(fake: Fake, policy: BehaviorPolicy) -> None:
    """As an engine's own records: nobody asked the teacher."""
    found = blended(fake, policy=policy, kl_teacher=[])
    assert found.stats.kl_teacher == [[], []]
    assert found.stats.kl_student == [[0.5, 0.5]] * 2


@pytest.mark.parametrize(
    ("policy", "column"), [(TrustRegionPolicy(0.3), column) for column in COLUMNS] + [(STUDENT, "accepted")], ids=str
)
def test_other_numbers_cannot_be_left_out(fake: Fake, policy: BehaviorPolicy, column: str) -> None:
    with pytest.raises(RuntimeError, match=rf"{column} is \[\], expected 2 numbers"):
        blended(fake, policy=policy, **{column: []})


@pytest.mark.parametrize("value", [[0.5], ["x", 1], [True, True], [0.5, float("nan")], {}, "ab", None, 0.5])
@pytest.mark.parametrize("column", COLUMNS)
def test_a_record_that_is_none_is_refused(fake: Fake, column: str, value: Any) -> None:
    with pytest.raises(RuntimeError, match=f"{column} is .* expected 2 numbers"):
        blended(fake, **{column: value})


@pytest.mark.parametrize("answer", [{"choices": []}, [], {}, {"choices": [{"token_ids": [11, 2]}]}, None, 3])
def test_a_blended_completion_that_is_none_is_refused(fake: Fake, answer: Any) -> None:
    fake.answers["/v1/completions"] = lambda handler, body: send(handler, 200, json.dumps(answer).encode())
    with pytest.raises(RuntimeError, match=r"http://127\.0\.0\.1"):
        blended(fake)


@pytest.mark.parametrize("answer", [{"results": []}, {"results": [[]]}, {"results": [{}]}, {}])
def test_records_that_are_missing_are_named(fake: Fake, answer: Any) -> None:
    fake.answers["/collective_rpc"] = answer
    with pytest.raises(RuntimeError, match=r"http://127\.0\.0\.1.*(record|holds no)"):
        blended(fake)


@pytest.mark.parametrize("path", ["/v1/completions", "/collective_rpc"])
def test_a_blended_server_that_never_ends_is_given_up(fake: Fake, path: str) -> None:
    fake.answers[path] = fake.trickle
    with pytest.raises(TimeoutError, match=r"within 0\.5 s"):
        blended(fake, seconds=0.5)


def test_a_server_of_ours_listens_to_this_machine_alone() -> None:
    command = serve_command("student", "teacher", 3)
    assert command[command.index("--host") + 1] == "127.0.0.1"


# ---- what the plugin reads of a request ----


@pytest.mark.parametrize(
    "change",
    [
        {"name": []},
        {"seed": "x"},
        {"seed": 1.5},
        {"prompt_key": None},
        {"rollout_index": -1},
        {"rollout_index": True},
        {"temperature": "x"},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"max_new_tokens": 1.5},
        {"max_new_tokens": "9"},
        {"policy": {"name": "__import__"}},
        {"policy": {"name": ["StudentPolicy"]}},
        {"policy": {"name": "TrustRegionPolicy", "kl_budget": "x"}},
        {"policy": {"name": "SKDPolicy", "teacher_top_k": 1.5}},
        {"policy": {"name": "StudentPolicy", "x": 1}},
        {"policy": []},
        {"vocabulary": {"size": 9, "stop_id": 9, "folded_ids": []}},
        {"vocabulary": {"size": 9, "stop_id": 2, "folded_ids": [-1]}},
        {"vocabulary": {"size": 9, "stop_id": 2, "folded_ids": ["5"]}},
        {"vocabulary": {"size": "9", "stop_id": 2, "folded_ids": []}},
        {"vocabulary": {"size": 9, "stop_id": 2, "folded_ids": [2]}},
        {"vocabulary": {"size": 9, "stop_id": 2, "folded_ids": [3, 3]}},
        {"vocabulary": {"size": 10**400, "stop_id": 2, "folded_ids": []}},
        {"vocabulary": 3},
        {"extra": 1},
        {"max_new_tokens": 10**400},
        {"temperature": "1"},
        {"temperature": 1e-320},
        *({"temperature": number} for number in (10**400, 10**300, -(10**400))),
        *(
            {"policy": {"name": name, **dict.fromkeys(("teacher_top_k",) * (name == "SKDPolicy"), 1), option: number}}
            for number in (10**400, 10**300, -(10**400))
            for name, option in (
                ("TrustRegionPolicy", "kl_budget"),
                ("TemperaturePolicy", "temperature"),
                ("GeometricPolicy", "teacher_weight"),
                ("SKDPolicy", "teacher_temperature"),
                ("SKDPolicy", "teacher_top_k"),
            )
        ),
    ],
    ids=lambda change: f"{change}"[:60],
)
def test_a_hostile_request_is_refused_before_it_reaches_a_worker(change: dict[str, Any]) -> None:
    honest = BlendRequest("row", StudentPolicy(), PAIR, 1.0, 7, 0, 0, 0).to_text()
    with pytest.raises(ValueError, match="a blended request"):
        BlendRequest.from_text(json.dumps(json.loads(honest) | change))


@pytest.mark.parametrize("text", ["", "[]", "3", "null", "[" * 100_000, "{"])
def test_text_that_is_no_request_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a blended request"):
        BlendRequest.from_text(text)
