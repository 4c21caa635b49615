"""A tiny LLM, tokenizer and shards on disk, and recipes over them: everything real but small."""

import io
import json

import pytest
from PIL import Image

from hovle_core.plugins import load_plugins
from hovle_core.registry import Provider, Spec
from hovle_core.testing import tiny_llm, tiny_tokenizer
from hovle_data.schema import Sample
from hovle_data.shards import write_shards
from hovle_train.recipe_file import parse_recipe

COLOURS = {"red": (220, 20, 20), "green": (20, 160, 40), "blue": (20, 40, 200), "white": (250, 250, 250)}


def picture(colour: str, size=(56, 56)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, COLOURS[colour]).save(out, "PNG")
    return out.getvalue()


def question(colour: str) -> tuple:
    return (
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what colour is this?"}]},
        {"role": "assistant", "content": colour},
    )


class Killed(Exception):
    """Stands for a SIGKILL between two steps."""


def run_killed_after(trainer, steps: int) -> None:
    """Run a trainer that dies after so many steps of its own."""
    inner, left = trainer.step, [steps]

    def step(*args):
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        return inner(*args)

    trainer.step = step
    with pytest.raises(Killed):
        trainer.run()


@pytest.fixture(scope="session", name="run_killed_after")
def _run_killed_after():
    return run_killed_after


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Folder with `llm/` and shards `images`, `texts`, `pairs`, `chats`."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = tiny_tokenizer(["what colour is this? red green blue white"])
    # Wide weights: a frozen LLM must be able to say something decided for alignment to learn to make it.
    tiny_llm(len(tokenizer), initializer_range=0.3).save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    names = list(COLOURS)
    write_shards((Sample(f"i{n}", images=(picture(names[n % 4]),)) for n in range(24)), folder / "images")
    write_shards(
        (Sample(f"t{n}", text=f"a {names[n % 4]} thing, number {n}, is here") for n in range(24)),
        folder / "texts",
    )
    write_shards(
        (
            Sample(f"p{n}", images=(picture(names[n % 4]),), text=f"a {names[n % 4]} square")
            for n in range(24)
        ),
        folder / "pairs",
    )
    write_shards(
        (
            Sample(f"c{n}", images=(picture(names[n % 4]),), messages=question(names[n % 4]))
            for n in range(24)
        ),
        folder / "chats",
    )
    return folder


@pytest.fixture(scope="session")
def plugins():
    """All installed plugins, and a teacher without weights."""
    loaded = load_plugins()
    loaded.registry.add("teacher", Spec("grid", "hovle_core.testing:GridTeacher"), Provider("tests", "0"))
    return loaded


@pytest.fixture
def make_recipe(world, tmp_path):
    """`make_recipe(stage, **sections)`: a small recipe of that stage; sections are merged over the defaults."""

    def make(stage: str, options: dict | None = None, **sections):
        data = {
            "language_modeling": {"sources": [{"path": str(world / "texts")}]},
            "distillation": {
                "images": [{"path": str(world / "images")}],
                "texts": [{"path": str(world / "texts")}],
                "text_tokens": [4, 8],
            },
            "alignment": {"sources": [{"path": str(world / "pairs")}]},
            "instruction_tuning": {"sources": [{"path": str(world / "chats")}]},
        }[stage]
        options = options or ({"teacher": {"name": "grid"}} if stage == "distillation" else {})
        raw = {
            "stage": {"name": stage, "options": options},
            "run_dir": str(tmp_path / "run"),
            "model": {
                "backbone": {"name": "transformers", "options": {"path": str(world / "llm")}},
                "embedding": {"num_hidden_layers": 2, "image_size": 56} if stage != "language_modeling" else {},
                "image": {"max_tiles": 2} if stage != "language_modeling" else {},
            },
            "data": data,
            "optim": {"lr": 3e-3, "warmup_steps": 1},
            "train": {
                "steps": 6, "global_batch_size": 8, "micro_batch_tokens": 96, "precision": "float32",
                "log_every": 1, "checkpoint_every": 2,
            },
            "observers": {"wandb": "disabled"},
        }  # fmt: skip
        raw = json.loads(json.dumps(raw))
        for name, section in sections.items():
            if isinstance(section, dict) and isinstance(raw.get(name), dict):
                raw[name].update(section)
            else:
                raw[name] = section
        if raw["train"]["steps"] == 1:
            raw["optim"]["warmup_steps"] = 0
        return parse_recipe(raw)

    return make
