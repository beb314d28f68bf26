"""Prompts made to lead out of their folder or onto the network, to run code, or to crash what parses them."""

import json
import os
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, Value
from hostile_helpers import ALIASES, Bomb, each, edit_json, refused, watched

from trb.tasks.prompts import load_prompts


def card(data_files: str) -> str:
    return f"---\nconfigs:\n- config_name: default\n  data_files: {data_files}\n---\n"


def prompts_refused(path: Path) -> None:
    refused(lambda: load_prompts(path).to_list())


@each(
    "file",
    parent=("README.md", card("../secret.jsonl")),
    absolute=("README.md", card("FOLDER/secret.jsonl")),
    web=("README.md", card("https://example.com/x.jsonl")),
    hub=("README.md", card("hf://datasets/owner/name/x.jsonl")),
    list=("README.md", card("[{split: train, path: [x.jsonl, ../secret.jsonl]}]")),
    directory=("README.md", "---\nconfigs:\n- config_name: default\n  data_dir: ../\n---\n"),
    other_file=(".huggingface.yaml", "configs:\n- config_name: default\n  data_files: ../secret.jsonl\n"),
    bomb=("README.md", f"---\n{ALIASES}---\n"),
)
def test_a_card_that_leads_out(folder: Path, file: tuple[str, str]) -> None:
    (folder / "secret.jsonl").write_text('{"prompt": "secret"}\n')
    data = folder / "data"
    data.mkdir()
    (data / "x.jsonl").write_text('{"prompt": "mine"}\n')
    (data / file[0]).write_text(file[1].replace("FOLDER", str(folder)))
    prompts_refused(data)


@each("name", file="x.jsonl", folder="more")
def test_a_link_in_a_folder(folder: Path, name: str) -> None:
    outside, data = folder / "outside", folder / "data"
    outside.mkdir()
    data.mkdir()
    (outside / "x.jsonl").write_text('{"prompt": "secret"}\n')
    (data / name).symlink_to(outside / "x.jsonl" if name == "x.jsonl" else outside)
    prompts_refused(data)


@each("name", shard="state.json", split="dataset_dict.json")
def test_a_saved_dataset_that_leads_out(folder: Path, name: str) -> None:
    Dataset.from_list([{"prompt": "secret"}]).save_to_disk(str(folder / "secret"))
    data = folder / "data"
    Dataset.from_list([{"prompt": "mine"}]).save_to_disk(str(data))
    if name == "state.json":
        edit_json(data / name, _data_files=[{"filename": "../secret/data-00000-of-00001.arrow"}])
    else:
        edit_json(data / name, splits=["train", "../secret"])
    prompts_refused(data)


@each(
    "place",
    file="FOLDER/secrets/x.png",
    local="file://FOLDER/secrets/x.png",
    ftp="ftp://127.0.0.1:9/x.png",
    web="http://127.0.0.1:9/x.png",
    hub="hf://datasets/owner/name/x.png",
    nested="zip://x.png::http://127.0.0.1:9/x.zip",
)
def test_a_picture_elsewhere(folder: Path, place: str) -> None:
    """A column that the schema calls a picture, in the parquet file, in the card, and in what save_to_disk wrote."""
    for name in ("secrets", "parquet", "card"):
        (folder / name).mkdir()
    (folder / "secrets" / "x.png").write_bytes(b"no picture")
    picture = {"bytes": None, "path": place.replace("FOLDER", str(folder))}
    row = {"prompt": "x", "picture": picture}
    features = Features({"prompt": Value("string"), "picture": Image()})
    table = pa.Table.from_pylist([row], schema=features.arrow_schema)
    pq.write_table(table, folder / "parquet" / "train.parquet")
    Dataset.from_list([{"prompt": "x"}]).save_to_disk(str(folder / "saved"))
    with pa.ipc.new_stream(str(folder / "saved" / "data-00000-of-00001.arrow"), table.schema) as stream:
        stream.write_table(table)
    edit_json(folder / "saved" / "dataset_info.json", features=features.to_dict())
    (folder / "card" / "train.jsonl").write_text(json.dumps(row) + "\n")
    types = {"features": [{"name": "prompt", "dtype": "string"}, {"name": "picture", "dtype": "image"}]}
    (folder / "card" / "README.md").write_text(f"---\ndataset_info: {json.dumps(types)}\n---\n")
    with watched(folder / "secrets") as seen:
        for name in ("parquet", "card", "saved"):
            assert [row["prompt"][0]["content"] for row in load_prompts(folder / name)] == ["x"]
        for name in ("parquet", "saved"):
            refused(lambda name=name: load_prompts(folder / name, prompt_column="picture"))
    assert not seen, f"it was followed: {seen}"


@each(
    "name",
    pickle="x.pkl",
    pandas="x.pandas",
    archive="x.zip",
    pages="x.warc.gz",
    picture="x.png",
    table="x.h5",
    script="data.py",
)
def test_a_folder_of_another_kind(folder: Path, name: str) -> None:
    data = folder / "data"
    data.mkdir()
    (data / name).write_bytes(pickle.dumps(Bomb(folder)))
    prompts_refused(data)


@each("what", pipe="pipe", deep_link="link", deep_folder="folder")
def test_an_entry_below(folder: Path, what: str) -> None:
    data, secret = folder / "data", folder / "secret"
    (data / "more" / "deeper").mkdir(parents=True)
    secret.mkdir()
    (secret / "x.jsonl").write_text('{"prompt": "secret"}\n')
    (data / "x.jsonl").write_text('{"prompt": "mine"}\n')
    place = data / "more" / "deeper" / "train.jsonl"
    if what == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to(secret / "x.jsonl" if what == "link" else secret)
    prompts_refused(data)


@each("what", offsets="offsets", half="half")
def test_a_damaged_arrow_file(folder: Path, what: str) -> None:
    Dataset.from_list([{"prompt": "abcdefgh" * 4}] * 3).save_to_disk(str(folder / "data"))
    path = folder / "data" / "data-00000-of-00001.arrow"
    content = path.read_bytes()
    offsets = b"".join(number.to_bytes(4, "little") for number in (32, 64, 96))
    assert content.count(offsets) == 1
    far = b"".join(number.to_bytes(4, "little") for number in (32, 64, 2**31 - 1))
    path.write_bytes(content.replace(offsets, far) if what == "offsets" else content[: len(content) // 2])
    prompts_refused(folder / "data")


@each(
    "content",
    nesting=b'{"prompt": ' + b"[" * 100_000,
    closed_nesting=b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    digits=b'{"prompt": "x", "answer": ' + b"9" * 5_000 + b"}",
    infinity=b'{"prompt": "x", "answer": 1e999}',
    nan=b'{"prompt": "x", "answer": NaN}',
    half_a_surrogate=b'{"prompt": "\\ud800"}',
    half_a_surrogate_in_the_answer=b'{"prompt": "x", "answer": "\\udfff"}',
    no_text=b"\xff\xfe\0\0",
    no_object=b"[1, 2]",
    half_a_line=b'{"prompt": "x',
    zero=b"\0",
    wrong_types=b'{"prompt": {"a": 1}}',
    unknown_grader=b'{"prompt": "x", "answer": "1", "verifier": "__import__"}',
)
def test_a_line_of_json(folder: Path, content: bytes) -> None:
    path = folder / "data.jsonl"
    path.write_bytes(content + b"\n")
    prompts_refused(path)


@each("how", cut="cut", overwritten="overwritten", no_text="text")
def test_a_damaged_parquet_file(folder: Path, how: str) -> None:
    path = folder / "data.parquet"
    if how == "text":
        column = pa.array([b"\xff\xfe"], pa.binary()).view(pa.string())
        pq.write_table(pa.table({"prompt": column}), path)
    else:
        pq.write_table(pa.table({"prompt": [f"question {number}" for number in range(500)]}), path)
        content = bytearray(path.read_bytes())
        middle = bytes(byte ^ 0x5A for byte in content[4:-8])
        path.write_bytes(content[: len(content) // 2] if how == "cut" else content[:4] + middle + content[-8:])
    prompts_refused(path)
