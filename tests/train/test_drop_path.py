"""Drop path: rates by depth and step, drawn for each sample, the mean kept, the same in recomputed activations."""

import pytest
import torch
from safetensors.torch import load_file

from hovle_core.testing import tiny_hovle, tiny_tokenizer
from hovle_data.quarantine import Ledger
from hovle_train.drop_path import DropPath, drop_rate
from hovle_train.loop import Trainer
from hovle_train.recipe_file import parse_recipe
from hovle_train.recipe_sections import DropPathConfig
from hovle_train.runtime import Runtime


def test_rates():
    linear = DropPathConfig(rate=0.4)
    assert [drop_rate(linear, 7, 10, block, 5) for block in range(5)] == pytest.approx(
        [0, 0.1, 0.2, 0.3, 0.4]
    )
    rising = DropPathConfig(rate=0.7, start_rate=0.1, depth="uniform")  # De-focus: 0.1 -> 0.7
    assert [drop_rate(rising, step, 7, 0, 5) for step in (0, 3, 6)] == pytest.approx([0.1, 0.4, 0.7])
    both = DropPathConfig(rate=0.6, start_rate=0)
    assert drop_rate(both, 5, 11, 1, 3) == pytest.approx(0.15)
    assert drop_rate(linear, 0, 10, 0, 1) == pytest.approx(0.4), "the only block is the last one"


@pytest.fixture(scope="module")
def model():
    return tiny_hovle(tiny_tokenizer())


def block_outputs(model, branch, x, position_ids):
    """Inputs of the LLM for hidden states `x [1, T, D]`, and what `branch` added."""
    added = []
    handle = branch.register_forward_hook(lambda module, args, out: added.append(out))
    with torch.no_grad():
        out = model.embedding.blocks(x, None, position_ids)
    handle.remove()
    return out, added[0]


def test_whole_samples_are_dropped_and_the_mean_stays(model):
    drop = DropPath(model, DropPathConfig(rate=0.3, depth="uniform"), steps=1)
    x, positions = torch.randn(1, 12, 32), torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1, 0, 1, 2]])
    branch = model.embedding.layers[0].mlp
    plain, _ = block_outputs(model.train(), branch, x, positions)
    assert torch.equal(block_outputs(model, branch, x, positions)[0], plain), "no step is set: nothing drops"
    drop.set_step(0)
    attention = model.embedding.layers[0].self_attn
    share, draws = torch.zeros(4), 600
    for _ in range(draws):
        _, added = block_outputs(model, attention, x, positions)
        for i, (first, last) in enumerate([(0, 3), (3, 7), (7, 9), (9, 12)]):
            part = added[0, first:last]
            assert bool((part == 0).all()) or bool((part != 0).any(-1).all())
            share[i] += float((part == 0).all())
    assert (share / draws - 0.3).abs().max() < 0.08  # four standard deviations of 600 draws
    reference = block_outputs(model.eval(), attention, x, positions)[1]
    kept = block_outputs(model.train(), attention, x, positions)[1]
    rows = (kept != 0).any(-1)
    torch.testing.assert_close(kept[rows], reference[rows] / 0.7)
    assert torch.equal(block_outputs(model.eval(), branch, x, positions)[0], plain), "eval drops nothing"


def forget_what_was_kept(trainer):
    """For the last row of training, before anything is exported."""
    export = trainer.stage.export

    def forgetful(*given):
        trainer.drop_path._kept.clear()
        export(*given)

    trainer.stage.export = forgetful


def test_an_average_beside_is_exported_without_what_was_dropped(make_recipe, plugins, tmp_path):
    """Its copy of the model computes rows of other lengths than the last step's, to match norms."""
    weights = []
    for name in ("plain", "again"):
        recipe = make_recipe(
            "distillation",
            run_dir=str(tmp_path / name),
            train={"steps": 2, "drop_path": {"rate": 0.5, "depth": "uniform"}},
            optim={"ema": {"decay": 0.5, "export": "beside"}},
        )
        trainer = Trainer(recipe, plugins, Runtime())
        if name == "again":
            forget_what_was_kept(trainer)
        trainer.run()
        weights.append(load_file(recipe.path / "final_ema" / "model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_recomputed_activations_drop_the_same(make_recipe, plugins, tmp_path):
    norms = []
    for checkpointing in (False, True):
        recipe = make_recipe(
            "alignment",
            run_dir=str(tmp_path / str(checkpointing)),
            train={"drop_path": {"rate": 0.5, "depth": "uniform"}},
        )
        raw = recipe.model_dump(mode="json")
        raw["model"]["activation_checkpointing"] = checkpointing
        trainer = Trainer(parse_recipe(raw), plugins, Runtime())
        trainer.prepare()
        batches = trainer.loader(Ledger()).batches(0)
        norms.append([trainer.step(step, batches) for step in range(3)])
    assert norms[0] == norms[1]
    plain = Trainer(make_recipe("alignment"), plugins, Runtime())
    plain.prepare()
    batches = plain.loader(Ledger()).batches(0)
    assert [plain.step(step, batches) for step in range(3)] != norms[0]
