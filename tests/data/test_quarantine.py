"""The ledger: every bad sample named once, the same after a restart, and a run that fails above a share."""

import json
import threading

import pytest

from hovle_data.quarantine import Ledger, TooManyBadSamples
from hovle_data.schema import BadSample


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_key_is_written_once(tmp_path):
    path = tmp_path / "run" / "quarantine.jsonl"
    ledger = Ledger(path, max_share=1)
    assert not path.exists()
    for _ in range(3):
        ledger.seen()
        ledger.record(BadSample("k", "a/s.tar", "bad json: x"))
    ledger.record(BadSample("k", "b/s.tar", "bad json: x"))
    assert lines(path) == [{"shard": s, "key": "k", "reason": "bad json: x"} for s in ("a/s.tar", "b/s.tar")]
    assert (ledger.num_seen, ledger.num_bad) == (3, 4)


def test_a_resumed_run_leaves_the_same_file_and_counts_anew(tmp_path):
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    bad = [BadSample(f"k{i}", "s", f"r: {i}") for i in range(4)]
    ledger = Ledger(whole, max_share=1)
    for b in bad:
        ledger.record(b)
    for chunk in (bad[:3], bad[1:]):  # the second run replays two
        ledger = Ledger(parts, max_share=1)
        for b in chunk:
            ledger.record(b)
    assert parts.read_bytes() == whole.read_bytes()
    assert ledger.num_bad == 3


def test_a_line_torn_by_a_kill_is_mended(tmp_path):
    path = tmp_path / "q.jsonl"
    ledger = Ledger(path)
    ledger.record(BadSample("a", "s", "r"))
    ledger.record(BadSample("b", "s", "r"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    ledger = Ledger(path)
    ledger.record(BadSample("a", "s", "r"))
    ledger.record(BadSample("b", "s", "r"))
    assert path.read_bytes() == whole


def test_a_file_that_is_no_ledger_is_refused(tmp_path):
    path = tmp_path / "q.jsonl"
    for content in ("hello\n", "[1]\n", '{"shard": "a"}\n'):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"q\.jsonl, line 1: not a ledger record"):
            Ledger(path)


def test_above_the_share_the_run_fails_with_the_commonest_reasons(tmp_path):
    ledger = Ledger(tmp_path / "q.jsonl", max_share=0.08, min_seen=100)
    reasons = (
        ["image tags and images differ: 1 tags, 2 images"] * 3 + ["bad json: 1"] * 2 + ["too long: 9"] * 2
    )
    for i, reason in enumerate([*reasons, "rare"]):
        ledger.seen()
        ledger.record(BadSample(f"k{i}", "s", reason))
    ledger.seen(92)
    with pytest.raises(TooManyBadSamples) as caught:
        ledger.record(BadSample("one more", "s", "too long: 8"))
    message = str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert "9 of 100" in message
    assert "3x image tags and images differ (such as s: k0: image tags" in message
    assert "2x bad json" in message
    assert "3x too long" in message
    assert "rare" not in message
    assert "q.jsonl" in message


def test_at_the_share_it_goes_on():
    ledger = Ledger(None, max_share=0.01, min_seen=200)
    ledger.seen(200)
    ledger.record(BadSample("a", "s", "r"))
    ledger.record(BadSample("b", "s", "r"))
    with pytest.raises(TooManyBadSamples):
        ledger.record(BadSample("c", "s", "r"))


def test_few_samples_are_judged_as_if_the_rest_were_good():
    for good in (0, 100, 197):
        ledger = Ledger(None, max_share=0.01, min_seen=200)
        ledger.seen(good)
        for i in range(2):
            ledger.seen()
            ledger.record(BadSample(f"k{i}", "s", "r"))
        ledger.seen()
        with pytest.raises(TooManyBadSamples, match=f"3 of {good + 3} samples"):
            ledger.record(BadSample("k3", "s", "r"))


def test_merged_ledgers_do_not_tell_how_many_ranks_there_were(tmp_path):
    merged = []
    for world_size in (1, 2, 4):
        folder = tmp_path / str(world_size)
        ledgers = [Ledger(Ledger.rank_path(folder, r), max_share=1) for r in range(world_size)]
        for k in range(40):  # ten bad samples, met in four epochs, by other ranks in each
            ledgers[(k + k // 10) % world_size].record(BadSample(f"k{k % 10}", f"s/{k % 3}.tar", "r"))
        Ledger.merge(folder)
        Ledger.merge(folder)
        merged.append((folder / "quarantine.jsonl").read_text())
    assert merged[0] == merged[1] == merged[2]
    assert len(merged[0].splitlines()) == len({(k % 10, k % 3) for k in range(40)})
    Ledger.merge(tmp_path)
    assert not (tmp_path / "quarantine.jsonl").exists()


def test_threads_share_it(tmp_path):
    ledger = Ledger(tmp_path / "q.jsonl", max_share=1)

    def work() -> None:
        for i in range(50):
            ledger.seen()
            ledger.record(BadSample(f"k{i}", "s", "r" * 200))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(record["key"] for record in lines(ledger.path)) == sorted(f"k{i}" for i in range(50))
    assert ledger.num_bad == ledger.num_seen == 200


def test_arguments():
    with pytest.raises(ValueError, match="max_share=5"):
        Ledger(None, max_share=5)
    assert Ledger.rank_path("runs/a", 3).as_posix() == "runs/a/quarantine-rank3.jsonl"
