"""Schedules as functions of the step, parameter groups, and float32 masters."""

import pytest
import torch
from torch import nn

from hovle_train import muon
from hovle_train.freeze import freeze_except
from hovle_train.muon import BatchedMuon
from hovle_train.optim import build_optimizers, lr_share, set_lr
from hovle_train.recipe_sections import OptimConfig
from hovle_train.weights import Weights


def module():
    return nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4)]), "head": nn.Linear(4, 2)})


def test_schedules():
    cosine = OptimConfig(lr=1, warmup_steps=4)
    assert [lr_share(cosine, step, 24) for step in (0, 3, 4, 14)] == pytest.approx([0.25, 1, 1, 0.5])
    assert lr_share(cosine, 23, 24) < 0.01
    # By hand: 2 steps up, flat, and the last round(0.25 * 12) = 3 steps down to a third; zero would be step 12.
    short = OptimConfig(lr=1, schedule="wsd", decay_share=0.25, warmup_steps=2)
    assert [lr_share(short, step, 12) for step in range(12)] == pytest.approx(
        [1 / 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2 / 3, 1 / 3]
    )
    wsd = OptimConfig(lr=1, schedule="wsd", decay_share=0.2)
    assert [lr_share(wsd, step, 100) for step in (0, 79, 80, 90)] == pytest.approx([1, 1, 1, 0.5])
    assert lr_share(OptimConfig(lr=1, schedule="constant"), 99, 100) == 1
    again = OptimConfig(lr=1, warmup_steps=4, restarts=[0.4, 0.733])
    steps = (3, 4, 14, 24, 34, 43, 44, 52)
    expected = [1, 1, 0.5, 1, 0.5, 0.006, 1, 0.5]
    assert [lr_share(again, step, 60) for step in steps] == pytest.approx(expected, abs=1e-3)
    assert lr_share(OptimConfig(lr=1, min_lr_share=0.1), 99, 100) == pytest.approx(0.1, abs=1e-3)


def test_groups_and_factors():
    config = OptimConfig(lr=1e-2, weight_decay=0.1, lr_factors={"head.*": 0.5, "h*": 7})
    (optimizer,) = build_optimizers(config, dict(module().named_parameters()))
    groups = {
        (group["peak_lr"], group["weight_decay"]): len(group["params"]) for group in optimizer.param_groups
    }
    assert groups == {(1e-2, 0.1): 1, (1e-2, 0.0): 1, (5e-3, 0.1): 1, (5e-3, 0.0): 1}
    set_lr([optimizer], 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {5e-3, 2.5e-3}
    with pytest.raises(ValueError, match="no trainable parameter matches 'haed'"):
        build_optimizers(OptimConfig(lr=1, lr_factors={"haed": 2}), dict(module().named_parameters()))


def test_muon_takes_the_block_matrices_and_adamw_the_rest():
    names = {
        "model.layers.0.weight": nn.Parameter(torch.ones(4, 4)),
        "head.weight": nn.Parameter(torch.ones(4, 4)),
    }
    muon, adamw = build_optimizers(OptimConfig(lr=1e-3, name="muon"), names)
    assert isinstance(muon, BatchedMuon)
    assert muon.param_groups[0]["params"] == [names["model.layers.0.weight"]]
    assert adamw.param_groups[0]["params"] == [names["head.weight"]]


def test_masters_take_steps_that_bfloat16_cannot():
    net = module()
    freeze_except(net, ["head."])
    weights = Weights(net, torch.bfloat16)
    before = net["head"].weight.detach().clone()
    assert net["layers"][0].weight.dtype == net["head"].weight.dtype == torch.bfloat16
    assert set(weights.masters) == {"head.weight", "head.bias"}
    for _ in range(2):  # two micro-batches add up in float32
        net["head"](torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
        weights.collect()
    assert weights.masters["head.weight"].grad.dtype == torch.float32
    assert weights.masters["head.weight"].grad.eq(2).all()
    optimizer = torch.optim.SGD(list(weights), lr=1e-6)
    for _ in range(2000):
        optimizer.step()
        weights.publish()
    assert not torch.equal(net["head"].weight, before), "2,000 tiny steps must add up"
    weights.restore(net)
    assert net["head"].weight.dtype == torch.float32
    assert torch.equal(net["head"].weight, weights.masters["head.weight"])


@pytest.mark.parametrize("is_fast", [True, False])
def test_muon_computes_in_bfloat16_only_where_that_is_fast(monkeypatch, is_fast):
    """CPUs without AMX take a hundred times as long for it: a step of the demo took 12 s in place of 0.6."""
    monkeypatch.setattr(muon, "has_fast_bfloat16", lambda device: is_fast)
    directions = muon.orthogonalize(torch.randn(2, 16, 24, generator=torch.Generator().manual_seed(0)))
    assert directions.dtype == (torch.bfloat16 if is_fast else torch.float32)
    values = torch.linalg.svdvals(directions.float())
    assert values.min() > 0.3
    assert values.max() < 1.5


def test_batched_muon_follows_torchs():
    """The same matrices, gradients and settings, ten steps: equal up to the bfloat16 of the iterations."""
    shapes = [(8, 8), (8, 24), (8, 24), (24, 8), (8, 8)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    a = BatchedMuon(ours, lr=1e-2, weight_decay=0.05)
    b = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    before = [p.detach().clone() for p in ours]
    for _ in range(10):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q, start in zip(ours, theirs, before, strict=True):
        assert (p - q).norm() < 0.03 * (q - start).norm()
    with pytest.raises(ValueError, match="matrices only"):
        BatchedMuon([nn.Parameter(torch.ones(3))], lr=1)
