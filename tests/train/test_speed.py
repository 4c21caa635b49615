"""MFU: the operations of a step are counted, and counting changes nothing."""

import pytest
import torch
from safetensors.torch import load_file

from hovle_train.loop import Trainer
from hovle_train.metrics import read_metrics
from hovle_train.progress import describe
from hovle_train.runtime import Runtime
from hovle_train.speed import PEAKS, Speed, peak_flops


def test_operations_are_those_of_the_matrices():
    speed = Speed(torch.device("cpu"), torch.float32)
    layer = torch.nn.Linear(32, 48, bias=False)
    x = torch.randn(10, 32, requires_grad=True)
    with speed.count_once(10):
        layer(x).sum().backward()
    assert speed.flops_per_token == 6 * 32 * 48, "forward, and backward to weight and input"
    with speed.count_once(10):
        layer(layer(x)[:, :32]).sum().backward()
    assert speed.flops_per_token == 6 * 32 * 48, "the first body only"


def test_attention_counts_also_with_fewer_heads_of_keys():
    query, key = torch.randn(1, 4, 16, 8, requires_grad=True), torch.randn(1, 2, 16, 8, requires_grad=True)
    speed = Speed(torch.device("cpu"), torch.float32)
    with speed.count_once(1):
        torch.nn.functional.scaled_dot_product_attention(query, key, key, enable_gqa=True).sum().backward()
    # Two matmuls forward; backward four, and the scores once more.
    assert speed.flops_per_token == (2 + 5) * 2 * (4 * 16 * 16 * 8)


def test_mfu_is_a_share_of_the_devices_peak(monkeypatch):
    speed = Speed(torch.device("cpu"), torch.float32)
    assert speed.mfu(100.0, 1) == {}
    speed.flops_per_token = 6e9
    monkeypatch.setattr("hovle_train.speed.peak_flops", lambda device, dtype: 1e12)
    assert speed.mfu(100.0, 1)["mfu"] == pytest.approx(0.6)
    assert speed.mfu(100.0, 4)["mfu"] == pytest.approx(0.15)
    assert peak_flops(torch.device("cpu"), torch.float32) > 1e8


def test_the_peak_of_a_slow_device_is_not_waited_for(monkeypatch):
    """A first line of metrics waits for it: no larger matmuls where small ones take long, the largest elsewhere."""
    sides, rate = [], 1e9

    def timed(matrix):
        sides.append(len(matrix))
        return 2 * len(matrix) ** 3 / rate

    monkeypatch.setattr("hovle_train.speed._time_matmul", timed)
    assert peak_flops(torch.device("cpu"), torch.bfloat16) == pytest.approx(1e9)
    assert set(sides) == {256}
    rate = 1e12
    assert peak_flops(torch.device("cpu"), torch.bfloat16) == pytest.approx(1e12)
    assert set(sides) == {256, 512, 1024}


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12),
     ("NVIDIA L40S", 362e12), ("NVIDIA L4", 121e12), ("NVIDIA A10G", 70e12), ("Tesla T4", 65e12)],
)  # fmt: skip
def test_known_devices(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == peak
    assert peak in PEAKS.values()


def test_a_run_logs_it_and_counting_changes_no_bit(make_recipe, plugins, tmp_path, monkeypatch):
    counted = make_recipe("instruction_tuning", run_dir=str(tmp_path / "counted"))
    Trainer(counted, plugins, Runtime()).run()
    metrics = read_metrics(counted.path / "metrics.jsonl")
    assert all(0 < line["mfu"] < 1.5 for line in metrics)
    assert "MFU" in describe(metrics[-1])
    plain = make_recipe("instruction_tuning", run_dir=str(tmp_path / "plain"))
    trainer = Trainer(plain, plugins, Runtime())
    trainer.speed.flops_per_token = 1.0  # as if it had been counted
    trainer.run()
    one, other = (load_file(r.path / "final" / "model.safetensors") for r in (counted, plain))
    assert all((one[name] == other[name]).all() for name in one)


def test_a_step_in_words():
    metrics = {"loss": 2.3456, "tokens_per_s": 12345.6, "mfu": 0.314, "data_wait_share": 0.02, "fill": 0.93}
    assert describe(metrics) == "loss 2.346  12,346 tokens/s  MFU 31%  data wait 2%  fill 93%"
    assert describe({**metrics, "mfu": None, "imbalance": 1.25}).endswith("fill 93%  imbalance 1.25")
