"""hovle-quantization: a frozen LLM in int8 while the embedding trains, and a checkpoint with the LLM as it came."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hovle_core import HovleForConditionalGeneration
from hovle_quantization.int8 import Int8Linear, quantize, restore
from hovle_train.loop import Trainer
from hovle_train.metrics import read_metrics
from hovle_train.runtime import Runtime


def with_int8(make_recipe, stage="alignment", wrappers=None, **sections):
    recipe = make_recipe(stage, **sections)
    recipe.model.wrappers = {"quantization": {}} if wrappers is None else wrappers
    return recipe


def tensors(recipe, folder="final"):
    return load_file(recipe.path / folder / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_the_rounded_ones_product_and_gradient(dtype):
    """The oracle is nn.Linear with the weight that the int8 stands for."""
    torch.manual_seed(0)
    linear = nn.Linear(48, 32)
    linear.weight.data[3] = 0  # a row of zeros has no largest element
    linear.requires_grad_(False)
    holder = nn.ModuleDict({"part": linear})
    quantize(holder, modules=["part"])
    int8 = holder["part"]
    assert int8.weight.dtype == torch.int8
    rounded = int8.weight * int8.scale[:, None]
    step = linear.weight.abs().amax(1, keepdim=True) / 127
    assert ((rounded - linear.weight).abs() <= step / 2 + 1e-7).all()

    x = torch.randn(2, 5, 48, dtype=dtype, requires_grad=True)
    grad = torch.randn(2, 5, 32, dtype=dtype)
    holder.to(dtype)
    assert (int8.weight.dtype, int8.scale.dtype) == (torch.int8, dtype)
    out = int8(x)
    out.backward(grad)
    expected = x.detach().double() @ rounded.double().T + linear.bias.double()
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        x.grad.double(), grad.double() @ rounded.double(), rtol=tolerance, atol=tolerance
    )

    restore(holder)
    assert type(holder["part"]) is nn.Linear
    assert holder["part"].bias is linear.bias


def test_no_layer_keeps_its_weight_for_the_backward_pass():
    linear = nn.Linear(256, 256, bias=False).requires_grad_(False)
    holder = nn.ModuleDict({"part": linear})
    quantize(holder, modules=["part"])
    kept: list[torch.Tensor] = []
    x = torch.randn(4, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        holder["part"](x)
    assert {t.dtype for t in kept if t.numel() >= linear.weight.numel()} == {torch.int8}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_alignment_through_an_int8_llm(make_recipe, plugins, precision, tmp_path):
    """It learns as without; the frozen weights leave the run bit for bit; what is exported is a plain HoVLE."""
    sections = {"train": {"precision": precision, "steps": 12}}
    plain = make_recipe("alignment", run_dir=str(tmp_path / "plain"), **sections)
    recipe = with_int8(make_recipe, run_dir=str(tmp_path / "int8"), **sections)
    before = Trainer(plain, plugins, Runtime()).stage.build()[0].state_dict()
    Trainer(plain, plugins, Runtime()).run()
    trainer = Trainer(recipe, plugins, Runtime())
    done, seen = trainer.step, {}

    def step(number, batches):
        layers = [m for m in trainer.module.modules() if isinstance(m, Int8Linear)]
        seen["layers"], seen["dtypes"] = len(layers), {m.weight.dtype for m in layers}
        return done(number, batches)

    trainer.step = step
    trainer.run()
    assert seen == {"layers": 2 * 7, "dtypes": {torch.int8}}  # two layers of seven projections

    losses = [read_metrics(r.path / "metrics.jsonl") for r in (plain, recipe)]
    assert losses[1][-1]["loss"] < losses[1][0]["loss"] - 0.1
    assert losses[1][0]["loss"] == pytest.approx(losses[0][0]["loss"], rel=0.05)
    assert losses[1][0]["loss"] != losses[0][0]["loss"]
    after, without = tensors(recipe), tensors(plain)
    assert after.keys() == without.keys()
    for name, tensor in after.items():
        if name.startswith("language_model."):
            assert torch.equal(tensor, before[name]), name
    trained = [name for name in after if not torch.equal(after[name], before[name])]
    assert any(name.endswith("o_proj.weight") for name in trained)
    model = HovleForConditionalGeneration.from_pretrained(recipe.path / "final").eval()
    assert model(torch.arange(3, 9)[None]).logits.isfinite().all()


def test_a_resumed_run_is_the_uninterrupted_one(make_recipe, plugins, tmp_path, run_killed_after):
    def recipe(name):
        return with_int8(
            make_recipe, run_dir=str(tmp_path / name), train={"steps": 4, "precision": "bfloat16"}
        )

    Trainer(recipe("whole"), plugins, Runtime()).run()
    broken = Trainer(recipe("broken"), plugins, Runtime())
    run_killed_after(broken, 3)
    Trainer(recipe("broken"), plugins, Runtime()).run()
    whole, resumed = tensors(recipe("whole")), tensors(recipe("broken"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_adapters_over_an_int8_llm(make_recipe, plugins, tmp_path):
    """LoRA trains over int8 and is merged into the weights as they came."""
    lora = {"r": 2, "target_modules": ["q_proj", "v_proj"], "freeze": ["embedding.", "language_model."]}
    recipe = with_int8(
        make_recipe,
        "instruction_tuning",
        {"lora": lora, "quantization": {}},
        optim={"lr": 5e-2},
        train={"steps": 3},
    )
    trainer = Trainer(recipe, plugins, Runtime())
    before = trainer.stage.build()[0].state_dict()
    trainer.run()
    after = tensors(recipe)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "v_proj"}
    for name in changed:
        assert torch.linalg.matrix_rank((after[name] - before[name]).double(), rtol=1e-3) <= 2, name
    assert (recipe.path / "final" / "adapter" / "adapter_model.safetensors").is_file()


def test_an_average_beside_is_whole_too(make_recipe, plugins):
    recipe = with_int8(make_recipe, optim={"ema": {"decay": 0.5, "export": "beside"}}, train={"steps": 3})
    Trainer(recipe, plugins, Runtime()).run()
    plain, averaged = tensors(recipe), tensors(recipe, "final_ema")
    assert plain.keys() == averaged.keys()
    assert all(torch.equal(plain[n], averaged[n]) for n in plain if n.startswith("language_model."))
    assert any(not torch.equal(plain[n], averaged[n]) for n in plain)


def test_every_weight_is_sharded_or_left_alone(make_recipe, plugins, tmp_path):
    """FSDP2, one process: the same losses as without sharding."""
    losses = []
    for strategy in ("ddp", "fsdp2"):
        recipe = with_int8(make_recipe, run_dir=str(tmp_path / strategy), parallel={"strategy": strategy})
        recipe.train.steps = 2
        Trainer(recipe, plugins, Runtime()).run()
        losses.append([m["loss"] for m in read_metrics(recipe.path / "metrics.jsonl")])
        assert "language_model.model.layers.0.self_attn.q_proj.weight" in tensors(recipe)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    ("stage", "settings", "message"),
    [
        ("alignment", {"module": []}, "model.wrappers.quantization has no 'module'; did you mean 'modules'"),
        ("alignment", {"modules": ["llm."]}, "modules 'llm.' holds no linear layer; there are"),
        (
            "instruction_tuning",
            {},
            "'language_model.': all of its linear layers train, and int8 is for what is frozen",
        ),
    ],
)
def test_settings_are_checked(make_recipe, plugins, stage, settings, message):
    recipe = with_int8(make_recipe, stage, {"quantization": settings})
    with pytest.raises(ValueError, match=message):
        Trainer(recipe, plugins, Runtime()).prepare()


def test_the_file_of_originals_goes_with_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    holder = nn.ModuleDict({"part": nn.Linear(4, 4).requires_grad_(False)})
    quantize(holder, modules=["part"])
    assert len(list(tmp_path.glob("hovle-quantization-*"))) == 1
    restore(holder)
    assert not list(tmp_path.glob("hovle-quantization-*"))
