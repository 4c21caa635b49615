"""Sessions remember what was said, and only that; what can be talked to is loaded."""

import json
import shutil
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image

from hovle_core.cli import main
from hovle_core.images import open_image
from hovle_core.testing import tiny_hovle, tiny_processor
from hovle_serve.chat import ChatSession, load
from hovle_serve.sampling import Sampling


def test_an_answer_with_pictures_is_what_generate_says(session, model, processor, picture):
    images = [open_image(picture), Image.new("RGB", (300, 60), "blue")]
    answer = "".join(session.ask("what is this?", images))
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "what is this?"}]
    prompt = processor.encode([{"role": "user", "content": content}], images, add_generation_prompt=True)
    inputs = processor.batch([prompt])
    out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert answer == processor.tokenizer.decode(out[0, len(prompt.input_ids) :], skip_special_tokens=True)
    assert answer != "".join(ChatSession(model, processor, sampling=session.sampling).ask("what is this?"))


def test_a_session_remembers_and_forgets(session, model, processor):
    session.system = "be brief"
    session.reset()
    first = "".join(session.ask("hi", [Image.new("RGB", (60, 60), "red")]))
    second = "".join(session.ask("and now?"))
    assert [message["role"] for message in session.messages] == ["system", *["user", "assistant"] * 2]
    assert session.messages[2]["content"] == first
    assert len(session.images) == 1

    prompt = processor.encode(session.messages[:-1], session.images, add_generation_prompt=True)
    out = model.generate(**processor.batch([prompt]), max_new_tokens=6, do_sample=False)
    assert second == processor.tokenizer.decode(out[0, len(prompt.input_ids) :], skip_special_tokens=True)

    session.reset()
    assert session.messages == [{"role": "system", "content": "be brief"}]
    assert session.images == []


def test_a_seed_repeats_a_conversation_whoever_else_talks(model, processor):
    def make(seed):
        return ChatSession(model, processor, sampling=Sampling(max_new_tokens=6, temperature=1.0, seed=seed))

    one, other = make(1), make(1)
    alone = ["".join(one.ask("hi")), "".join(one.ask("more"))]
    disturbance = make(2)
    beside = []
    for text in ("hi", "more"):
        pieces = []
        for piece in other.ask(text):
            pieces.append(piece)
            next(disturbance.ask("noise"))
        beside.append("".join(pieces))
    assert beside == alone
    assert "".join(make(3).ask("hi")) != alone[0]
    one.reset()
    assert "".join(one.ask("hi")) == alone[0]


def test_a_stopped_answer_is_kept_and_one_that_never_began_is_not(session):
    with closing(session.ask("hi")) as pieces:
        said = next(pieces)
    assert session.messages == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": said}]
    session.ask("never read").close()
    assert len(session.messages) == 2


def test_a_failed_answer_leaves_the_conversation_as_it_was(session, model):
    "".join(session.ask("hi"))
    before = list(session.messages)
    handle = model.language_model.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(session.ask("again", [Image.new("RGB", (60, 60))]))
    assert session.messages == before
    assert session.images == []
    handle.remove()
    assert "".join(session.ask("again"))


def test_an_answer_never_outgrows_the_model(session, model):
    session.sampling = Sampling(max_new_tokens=10_000)
    prompt = session.processor.encode([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    model.config.text_config.max_position_embeddings = len(prompt.input_ids) + 4
    assert len(list(session.ask("hi"))) == 4
    with pytest.raises(ValueError, match="the conversation takes .* start a new one"):
        session.ask("more")
    assert len(session.messages) == 2


@pytest.mark.parametrize(
    ("text", "message"), [("  ", "is empty"), ("a \udcff", "the question is not valid Unicode")]
)
def test_what_is_no_question_is_refused_at_once(session, text, message):
    with pytest.raises(ValueError, match=message):
        session.ask(text)


def test_loading_gives_an_eval_model_with_sdpa(checkpoint, model):
    loaded, processor = load(str(checkpoint))
    assert not loaded.training
    assert loaded.config._attn_implementation == "sdpa"
    session, original = (
        ChatSession(m, processor, sampling=Sampling(max_new_tokens=6)) for m in (loaded, model)
    )
    assert list(session.ask("hi")) == list(original.ask("hi"))


def test_plugins_that_changed_since_training_are_named(checkpoint, tmp_path, caplog):
    folder = tmp_path / "final"
    shutil.copytree(checkpoint, folder)
    load(str(folder))
    assert "when the checkpoint was written" not in caplog.text
    (folder / "hovle_run.json").write_text(
        json.dumps({"plugins": {"core": "hovle-core 0.0.1", "gone": "gone 1.0"}})
    )
    load(str(folder))
    assert "plugin 'core' was hovle-core 0.0.1 when the checkpoint was written" in caplog.text
    assert "plugin 'gone' was gone 1.0 when the checkpoint was written and is not loaded now" in caplog.text
    (folder / "hovle_run.json").write_text("[]")
    with pytest.raises(ValueError, match="not what a run writes"):
        load(str(folder))


def test_a_released_checkpoint_with_a_processor_beside_it(tmp_path, processor):
    folder = tmp_path / "released"
    shutil.copytree(Path(__file__).parents[1] / "golden" / "hovle-tiny", folder)
    with pytest.raises(ValueError, match="cannot load .*holds no tokenizer"):
        load(str(folder))
    processor.save_pretrained(folder)
    model, loaded = load(str(folder))
    assert model.config._attn_implementation == "sdpa"
    assert list(ChatSession(model, loaded, sampling=Sampling(max_new_tokens=4)).ask("hi"))


def test_a_released_checkpoint_with_its_own_tokenizer(tmp_path, checkpoint, model, processor):
    assert main(["convert", str(checkpoint), str(tmp_path / "released"), "--to", "released"]) == 0
    assert not (tmp_path / "released" / "processor_config.json").exists()
    released, loaded = load(str(tmp_path / "released"))
    released.generation_config.suppress_tokens = model.generation_config.suppress_tokens
    session, original = (
        ChatSession(m, p, sampling=Sampling(max_new_tokens=6))
        for m, p in ((released, loaded), (model, processor))
    )
    assert list(session.ask("hi")) == list(original.ask("hi"))


def test_saved_checkpoint_configs_are_ours(tmp_path):
    """What `_check_is_hovle` looks for is what save_pretrained writes."""
    processor = tiny_processor()
    tiny_hovle(processor.tokenizer).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "hovle"
    with pytest.raises(ValueError, match="has no processor"):
        load(str(tmp_path))
