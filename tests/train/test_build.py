"""What a recipe's `model` builds: a tokenizer's provider by name, and a processor that fits the embedding."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hovle_core import HovleProcessor
from hovle_core.registry import Provider, Spec
from hovle_core.testing import tiny_tokenizer
from hovle_train.build import build_hovle, build_tokenizer
from hovle_train.loop import Trainer
from hovle_train.runtime import Runtime

TEXT = "a red square thing, number 7"


@pytest.fixture
def other(tmp_path):
    """A folder with a tokenizer that splits text otherwise than the LLM's, and has no more tokens."""
    tokenizer = tiny_tokenizer(["square thing number here"] * 9)
    tokenizer.save_pretrained(tmp_path / "other")
    return tmp_path / "other", tokenizer


def with_tokenizer(make_recipe, stage="alignment", resize_embeddings=False, **tokenizer):
    recipe = make_recipe(stage, train={"steps": 1, "micro_batch_tokens": 256})
    return make_recipe(
        stage,
        train={"steps": 1, "micro_batch_tokens": 256},
        model={**recipe.model.model_dump(), "tokenizer": tokenizer, "resize_embeddings": resize_embeddings},
    )


@pytest.mark.parametrize("stage", ["language_modeling", "alignment"])
def test_a_run_encodes_with_the_tokenizer_of_its_recipe(stage, make_recipe, plugins, other):
    folder, tokenizer = other
    named = {"name": "transformers", "options": {"path": str(folder)}}
    with pytest.raises(ValueError, match="ids that are other tokens .* set model.resize_embeddings: true"):
        build_tokenizer(with_tokenizer(make_recipe, stage, **named).model, plugins.registry)
    recipe = with_tokenizer(make_recipe, stage, resize_embeddings=True, **named)
    trainer = Trainer(recipe, plugins, Runtime())
    own = build_tokenizer(make_recipe(stage).model, plugins.registry)
    assert own(TEXT)["input_ids"] != tokenizer(TEXT)["input_ids"]
    trainer.run()
    assert trainer.processor.tokenizer(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    if stage == "alignment":
        saved = HovleProcessor.from_pretrained(recipe.path / "final").tokenizer
        assert saved(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
        # A finished run is a tokenizer's folder as well.
        named = {"name": "transformers", "options": {"path": str(recipe.path)}}
        again = with_tokenizer(make_recipe, resize_embeddings=True, **named)
        assert build_tokenizer(again.model, plugins.registry)(TEXT) == tokenizer(TEXT)


def test_pictures_are_normalised_as_the_embedding_says(make_recipe, plugins):
    model = make_recipe("alignment").model.model_dump()
    model["embedding"] |= {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    hovle, processor = build_hovle(make_recipe("alignment", model=model).model, plugins.registry, 0)
    config = hovle.config.embedding_config
    assert processor.image_processor.image_mean == config.image_mean == [0.5, 0.4, 0.3]
    assert processor.image_processor.image_std == config.image_std == [0.2, 0.3, 0.4]


def test_a_recipe_asks_for_fast_tiles_and_its_checkpoint_keeps_them(make_recipe, plugins, tmp_path):
    recipe = make_recipe("alignment")
    assert not build_hovle(recipe.model, plugins.registry, 0)[1].image_processor.fast
    recipe.model.image.fast = True
    build_hovle(recipe.model, plugins.registry, 0)[1].save_pretrained(tmp_path / "saved")
    assert HovleProcessor.from_pretrained(tmp_path / "saved").image_processor.fast


def test_picture_tokens_are_added(make_recipe, plugins, other):
    from transformers import PreTrainedTokenizerFast

    folder, _ = other
    plain = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    plain.save_pretrained(folder)
    options = {"path": str(folder)}
    recipe = with_tokenizer(make_recipe, resize_embeddings=True, name="transformers", options=options)
    assert "<IMG_CONTEXT>" in build_tokenizer(recipe.model, plugins.registry).all_special_tokens


def test_resized_embeddings_need_a_tokenizer(make_recipe):
    model = make_recipe("alignment").model.model_dump()
    with pytest.raises(ValueError, match="resize_embeddings .* name it in model.tokenizer"):
        make_recipe("alignment", model={**model, "resize_embeddings": True})


def test_what_does_not_fit_is_named(make_recipe, plugins, world, tmp_path):
    folder, tokenizer = tmp_path / "more", AutoTokenizer.from_pretrained(world / "llm")
    tokenizer.add_tokens([f"<extra {i}>" for i in range(40)])
    tokenizer.save_pretrained(folder)
    (tmp_path / "empty").mkdir()
    plugins.registry.add(
        "tokenizer", Spec("no-provider", "hovle_core.testing:GridTeacher"), Provider("tests", "0")
    )
    for name, options, message in (
        (
            "transformers",
            {"path": str(folder)},
            f"has {len(tokenizer)} tokens .*, and the LLM of model.backbone has 30",
        ),
        (
            "transformers",
            {"path": str(tmp_path / "empty")},
            "path .*empty' holds no tokenizer that transformers can load",
        ),
        ("transformers", {"paht": "x"}, "did you mean 'path'"),
        ("transformer", {"path": "x"}, "there is no tokenizer 'transformer'; did you mean 'transformers'"),
        ("no-provider", {}, "tokenizer 'no-provider' is a GridTeacher, not a TokenizerProvider"),
    ):
        recipe = with_tokenizer(make_recipe, name=name, options=options)
        with pytest.raises(ValueError, match=message):
            Trainer(recipe, plugins, Runtime()).run()


def test_blocks_start_from_the_llms_first_layers(make_recipe, plugins, world):
    """On text, two blocks then give what the LLM has after two layers: its own hidden states are the oracle."""
    recipe = make_recipe("alignment")
    recipe.model.blocks_from_llm = True
    model, processor = build_hovle(recipe.model, plugins.registry, seed=0)
    ids = processor.tokenizer("a red thing is here", return_tensors="pt").input_ids
    llm = AutoModelForCausalLM.from_pretrained(world / "llm").eval()
    with torch.no_grad():
        states = []
        handle = llm.model.layers[1].register_forward_hook(lambda module, args, out: states.append(out))
        llm(ids)
        handle.remove()
        torch.testing.assert_close(model.eval().embed(ids), states[0], atol=1e-5, rtol=1e-4)
    plain, _ = build_hovle(make_recipe("alignment").model, plugins.registry, seed=0)
    with torch.no_grad():
        assert (plain.eval().embed(ids) - states[0]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("embedding", "message"),
    [
        ({"num_hidden_layers": 3}, "3 blocks cannot start from this LLM of 2 layers: lower"),
        ({"num_hidden_layers": 2, "intermediate_size": 48}, "layers differ in mlp.down_proj.weight"),
        ({"num_hidden_layers": 2, "attention_bias": True}, "layers differ in self_attn.k_proj.bias"),
        (
            {"num_hidden_layers": 2, "hidden_act": "gelu"},
            "model.embedding.hidden_act is 'gelu' and the LLM's",
        ),
    ],
)
def test_blocks_that_cannot_start_from_the_llm(embedding, message, make_recipe, plugins):
    recipe = make_recipe("alignment")
    recipe.model.blocks_from_llm = True
    recipe.model.embedding = {"image_size": 56, **embedding}
    with pytest.raises(ValueError, match=message):
        build_hovle(recipe.model, plugins.registry, seed=0)
