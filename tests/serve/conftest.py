"""A tiny HoVLE on disk that speaks ASCII, and pictures."""

import signal
import threading

import pytest
from PIL import Image

from hovle_core.testing import tiny_hovle, tiny_processor, tiny_tokenizer
from hovle_serve import engine, stream


@pytest.fixture(scope="session")
def processor():
    return tiny_processor(tiny_tokenizer())


@pytest.fixture
def model(processor):
    """Random weights; tokens that are no printable ASCII are never said, so every token is a piece."""
    model = tiny_hovle(processor.tokenizer)
    silent = [
        token_id
        for token_id in range(len(processor.tokenizer))
        if not (text := processor.tokenizer.decode([token_id], skip_special_tokens=True)).isprintable()
        or not text.isascii()
        or not text
    ]
    model.generation_config.suppress_tokens = silent
    return model


@pytest.fixture
def checkpoint(model, processor, tmp_path):
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "red square.png"
    Image.new("RGB", (80, 60), "red").save(path)
    return path


@pytest.fixture(autouse=True)
def ctrl_c_is_heard():
    """A shell starts background jobs with Ctrl-C ignored, and CI may be one; a person's terminal does not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not [
        thread for thread in threading.enumerate() if thread.name in (stream.THREAD_NAME, engine.THREAD_NAME)
    ]
