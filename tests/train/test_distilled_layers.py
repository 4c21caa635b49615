"""Distillation of several blocks and through the teacher's connector, against losses written out here."""

import pytest
import torch
from torch.nn import functional as F

from hovle_data.quarantine import Ledger
from hovle_train.evaluate import image_cosine
from hovle_train.loop import Trainer
from hovle_train.metrics import read_metrics
from hovle_train.runtime import Runtime
from hovle_train.teacher_tiles import tile_batches

JOINED = {"name": "grid", "options": {"feature_size": 8, "layers": 2}}


def prepared(make_recipe, plugins, **options):
    trainer = Trainer(make_recipe("distillation", options=options), plugins, Runtime())
    trainer.prepare()
    return trainer


def written_out(trainer, batch):
    """Inputs of every head, by block: the model is run block by block."""
    model = trainer.module.model
    is_image = batch.input_ids[0] == model.config.image_token_id
    states = []
    x = model.embedding.embed_tokens(batch.input_ids)
    pixels = trainer.processor.image_processor.normalize(batch.pixel_values)
    x = x.masked_scatter(is_image[None, :, None], model.embedding.image_tokens(pixels))
    for number in (1, 2):
        short = torch.nn.ModuleList(model.embedding.layers[:number])
        layers, model.embedding.layers = model.embedding.layers, short
        states.append(model.embedding.blocks(x, None, batch.position_ids)[0][is_image])
        model.embedding.layers = layers
    return states


@pytest.mark.parametrize("layers", [1, 2])
def test_blocks_learn_a_layer_each_with_their_weights(layers, make_recipe, plugins):
    teacher = {"name": "grid", "options": {"feature_size": 8, "layers": layers}}
    trainer = prepared(
        make_recipe, plugins, teacher=teacher, blocks={1: 1, 2: 3}, text_weight=0, image_weight=2
    )
    (batch, *_) = trainer.loader(Ledger()).batches(0)
    totals = trainer.count_targets([batch])
    with torch.no_grad():
        loss, logged = trainer.stage.loss(trainer.module, batch, totals)
        target = trainer.stage.features.get(batch.tile_keys, batch.pixel_values).flatten(0, 1)
        first, second = (target[:, :4], target[:, 4:]) if layers == 2 else (target, target)
        states = written_out(trainer, batch)
        module = trainer.module
        cosines = [
            F.cosine_similarity(head(state), wanted, dim=-1).mean()
            for head, state, wanted in zip(
                (module.block_heads[0], module.head), states, (first, second), strict=True
            )
        ]
    wanted = (cosines[0] + 3 * cosines[1]) / 4
    assert float(loss) == pytest.approx(-2 * float(wanted), rel=1e-4)
    assert float(logged["image_cosine"]) / totals["image_cosine"] == pytest.approx(float(wanted), rel=1e-4)


def test_a_run_of_several_blocks_leaves_the_outputs_head(make_recipe, plugins):
    """Its exported head and mean give the teacher's last layer: the score of the finished run says so."""
    recipe = make_recipe("distillation", options={"teacher": JOINED, "blocks": {1: 1, 2: 1}, "cache_features": True},
                         train={"steps": 80}, optim={"lr": 1e-2})  # fmt: skip
    trainer = Trainer(recipe, plugins, Runtime())
    trainer.run()
    final = recipe.path / "final"
    images = trainer.stage.mixture(recipe.data.images, "images")
    tiles = torch.cat([tiles for _, _, tiles in tile_batches(images, trainer.processor)])
    teacher = trainer.stage.features.teacher
    score = image_cosine(
        trainer.module.model, trainer.processor, teacher, final, tiles.permute(0, 2, 3, 1).numpy()
    )
    assert score > 0.8
    assert read_metrics(recipe.path / "metrics.jsonl")[-1]["image_cosine"] > 0.8


def test_the_teachers_connector_takes_the_heads_place(make_recipe, plugins):
    teacher = {"name": "grid", "options": {"connector_size": 32}}
    trainer = prepared(make_recipe, plugins, teacher=teacher, head="connector", text_weight=0)
    assert not list(trainer.module.head.parameters())
    (batch, *_) = trainer.loader(Ledger()).batches(0)
    with torch.no_grad():
        totals = trainer.count_targets([batch])
        loss, _ = trainer.stage.loss(trainer.module, batch, totals)
        colours = F.adaptive_avg_pool2d(batch.pixel_values.float() / 255, 2).permute(0, 2, 3, 1)
        wanted = (colours @ trainer.stage.features.teacher.directions).repeat(1, 1, 1, 4).flatten(0, 2)
        cosine = F.cosine_similarity(written_out(trainer, batch)[-1], wanted, dim=-1).mean()
    assert float(loss) == pytest.approx(-float(cosine), rel=1e-4), "not centred, and no head between"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_weight": 0, "text_weight": 0}, "image_weight and text_weight are both 0"),
        ({"blocks": {1: 1}}, "must end with the last of the 2 blocks"),
        ({"blocks": {2: 1, 3: 1}}, "must end with the last of the 2 blocks"),
        ({"blocks": {0: 1, 2: 1}}, "blocks.0.*greater than or equal to 1"),
        ({"teacher": {"name": "grid", "options": {"feature_size": 9, "layers": 3}}, "blocks": {1: 1, 2: 1}},
         "names 2 blocks, and teacher 'grid' joins 3 layers"),
        ({"head": "connector"}, "GridTeacher has no connector"),
        ({"head": "connector", "blocks": {2: 1}}, "blocks .* does nothing with head 'connector'"),
        ({"teacher": {"name": "grid", "options": {"connector_size": 16}}, "head": "connector"},
         "connector of teacher 'grid' gives 16 channels, and the LLM reads 32"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit(options, message, make_recipe, plugins):
    with pytest.raises(ValueError, match=message):
        prepared(make_recipe, plugins, **{"teacher": {"name": "grid"}, **options})


def test_hd_distils_its_last_block_alone(make_recipe, plugins):
    recipe = make_recipe("distillation", options={"teacher": {"name": "grid"}, "blocks": {1: 1, 2: 1}})
    recipe.model.embedding["pixel_shuffle_loc"] = "post"
    with pytest.raises(ValueError, match="with pixel_shuffle_loc 'post' an earlier block's tokens"):
        Trainer(recipe, plugins, Runtime()).prepare()
