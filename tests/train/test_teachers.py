"""Several teachers at once: each has its head, its share of the loss and its line in the log."""

import pytest
import torch

from hovle_core.testing import GridTeacher
from hovle_data.quarantine import Ledger
from hovle_train import evaluate
from hovle_train.loop import Trainer
from hovle_train.metrics import read_metrics
from hovle_train.recipe_sections import Named
from hovle_train.runtime import Runtime
from hovle_train.teachers import build_teacher, target_names

SMALL = {"name": "grid", "options": {"feature_size": 5, "grid": 3}}


def prepared(recipe, plugins) -> Trainer:
    trainer = Trainer(recipe, plugins, Runtime())
    trainer.prepare()
    return trainer


def test_the_loss_is_the_weighted_mean_of_each_teachers(make_recipe, plugins, tmp_path):
    def run(name: str, options: dict) -> tuple[Trainer, list]:
        options |= {"text_weight": 0}
        trainer = prepared(
            make_recipe("distillation", run_dir=str(tmp_path / name), options=options), plugins
        )
        return trainer, trainer.loader(Ledger()).batches(0)

    both, batches = run("both", {"teachers": [{"name": "grid"}, {**SMALL, "weight": 3}]})
    totals = both.count_targets(batches)
    images = totals["image_cosine"]
    assert totals["image_cosine/grid"] == totals["image_cosine/grid-2"] == images
    for option, head, share in (({"name": "grid"}, 0, 0.25), (SMALL, 1, 0.75)):
        alone, _ = run(f"alone-{head}", {"teacher": option})
        alone.module.head = both.module.head.parts[head]
        sums = [
            sum(float(trainer.stage.loss(trainer.module, batch, totals)[1][name]) for batch in batches)
            for trainer, name in ((both, both.stage.teacher_names[head]), (alone, "image_cosine"))
        ]
        assert sums[0] == pytest.approx(sums[1], rel=1e-5)
        assert both.stage.shares[head] == share
    loss, logged = both.stage.loss(both.module, batches[0], totals)
    mean = 0.25 * logged["image_cosine/grid"] + 0.75 * logged["image_cosine/grid-2"]
    assert float(logged["image_cosine"]) == pytest.approx(float(mean), rel=1e-5)
    assert float(loss.detach()) == pytest.approx(-float(mean) / images, rel=1e-5)


def test_a_run_of_two_teachers_learns_from_both_and_is_scored(make_recipe, plugins):
    options = {"teachers": [{"name": "grid"}, SMALL], "cache_features": True, "head": "mlp"}
    recipe = make_recipe("distillation", options=options, train={"steps": 30}, optim={"lr": 1e-2})
    Trainer(recipe, plugins, Runtime()).run()
    metrics = read_metrics(recipe.path / "metrics.jsonl")
    for name in ("image_cosine", "image_cosine/grid", "image_cosine/grid-2"):
        assert metrics[-1][name] > metrics[0][name] + 0.2, name
    final = recipe.path / "final"
    head, mean = evaluate.load_head(final)
    assert [tuple(part[2].weight.shape) for part in head.parts] == [(8, 128), (5, 128)]
    assert mean.shape == (13,)

    from hovle_core import HovleForConditionalGeneration
    from hovle_core.processor import HovleProcessor
    from hovle_data.decode import decode_image
    from hovle_data.shards import ShardSource

    processor = HovleProcessor.from_pretrained(final)
    picture = decode_image(ShardSource(recipe.data.images[0].path)[0].images[0])
    teacher = build_teacher([Named(**teacher) for teacher in options["teachers"]], plugins.registry, 4)
    model = HovleForConditionalGeneration.from_pretrained(final)
    tiles = processor.image_processor.tiles(picture)
    assert evaluate.image_cosine(model, processor, teacher, final, tiles) > 0.5


def test_joined_features_are_each_teachers_on_the_students_grid(plugins):
    tiles = torch.randint(0, 256, (2, 3, 56, 56), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    joined = build_teacher([Named(name="grid"), Named(**SMALL)], plugins.registry, num_tokens=4)
    features = joined.features(tiles)
    assert features.shape == (2, 2, 2, 13)
    assert torch.equal(features[..., :8], GridTeacher().features(tiles))
    assert joined.feature_size == 13
    assert build_teacher([Named(name="grid")], plugins.registry, 4).feature_size == 8


def test_names_in_the_log():
    given = [Named(name="a"), Named(name="b"), Named(name="a")]
    assert target_names(given) == ["image_cosine/a", "image_cosine/b", "image_cosine/a-2"]


@pytest.mark.parametrize("options", [{}, {"teacher": {"name": "grid"}, "teachers": [{"name": "grid"}]}])
def test_one_teacher_or_a_list(make_recipe, plugins, options):
    recipe = make_recipe("distillation", options={"centre": True, **options})
    with pytest.raises(ValueError, match="either one teacher, or several as a list"):
        Trainer(recipe, plugins, Runtime())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"blocks": {1: 1.0, 2: 1.0}},
            "blocks .* learn from one teacher, and teachers names 2.*: leave blocks out",
        ),
        (
            {"head": "connector"},
            "head 'connector' is one teacher's, and teachers names 2: set head: linear or mlp",
        ),
    ],
)
def test_several_teachers_teach_the_output_through_heads(make_recipe, plugins, options, message):
    recipe = make_recipe("distillation", options={"teachers": [{"name": "grid"}, SMALL], **options})
    with pytest.raises(ValueError, match=message):
        Trainer(recipe, plugins, Runtime())


def test_a_pool_runs_one_teacher_and_gives_its_features(make_recipe, plugins):
    pool = {"teacher_pool": {"actors": 1}}
    with pytest.raises(
        ValueError, match="teacher_pool runs one teacher, and stage.options.teachers is a list"
    ):
        make_recipe("distillation", options={"teachers": [{"name": "grid"}, SMALL]}, resources=pool)
    options = {"teacher": {"name": "grid"}, "head": "connector"}
    recipe = make_recipe("distillation", options=options, resources=pool)
    with pytest.raises(ValueError, match="head 'connector' is not in a resources.teacher_pool"):
        Trainer(recipe, plugins, Runtime())
