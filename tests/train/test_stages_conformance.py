"""Our own stages keep what `hovle plugin test` asks of anyone's."""

from dataclasses import replace

import pytest

from hovle_core.registry import Provider, Spec
from hovle_core.testing.conformance import StageTests
from hovle_data.packing import pack
from hovle_data.quarantine import Ledger
from hovle_train.recipe_file import parse_recipe
from hovle_train.runtime import Runtime

ROW = {"max_tokens": 96, "max_tiles": 8}


class OwnStageTests(StageTests):
    sources: dict[str, str]
    stage_options: dict = {}

    @pytest.fixture(scope="class")
    @classmethod
    def recipe(cls, world, tmp_path_factory):
        is_bare_llm = cls.name == "language_modeling"
        return parse_recipe({
            "stage": {"name": cls.name, "options": cls.stage_options},
            "run_dir": str(tmp_path_factory.mktemp("run")),
            "model": {
                "backbone": {"name": "transformers", "options": {"path": str(world / "llm")}},
                "embedding": {} if is_bare_llm else {"num_hidden_layers": 2, "image_size": 56},
                "image": {} if is_bare_llm else {"max_tiles": 2},
            },
            "data": {field: [{"path": str(world / shards)}] for field, shards in cls.sources.items()},
            "optim": {"lr": 1e-3},
            "train": {"steps": 2, "global_batch_size": 4, "micro_batch_tokens": 96, "precision": "float32"},
        })  # fmt: skip

    @pytest.fixture(scope="class")
    @classmethod
    def batches(cls, subject, module):
        subject.setup(module, subject.processor, Runtime())
        stream = subject.stream(subject.processor, Ledger())
        return pack([stream.get(k) for k in range(4)], **ROW)

    @pytest.fixture(scope="class")
    @classmethod
    def text_batch(cls, subject, module):
        return pack([replace(subject.processor.encode_text("a red square"), key="t")], **ROW)[0]


class TestLanguageModeling(OwnStageTests):
    name = "language_modeling"
    sources = {"sources": "texts"}


class TestDistillation(OwnStageTests):
    name = "distillation"
    sources = {"images": "images", "texts": "texts"}
    stage_options = {"teacher": {"name": "grid"}}

    @pytest.fixture(scope="class")
    @classmethod
    def registry(cls, plugins):
        plugins.registry.add(
            "teacher", Spec("grid", "hovle_core.testing:GridTeacher"), Provider("tests", "0")
        )
        return plugins.registry


class TestDistillationOfTwoTeachers(TestDistillation):
    stage_options = {
        "teachers": [
            {"name": "grid"},
            {"name": "grid", "weight": 3, "options": {"feature_size": 5, "grid": 3}},
        ]
    }


class TestAlignment(OwnStageTests):
    name = "alignment"
    sources = {"sources": "pairs"}


class TestInstructionTuning(OwnStageTests):
    name = "instruction_tuning"
    sources = {"sources": "chats"}
