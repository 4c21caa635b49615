"""hovle-tensorboard: what a run logs is in its event files, once."""

import struct
from dataclasses import dataclass
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from hovle_core.plugins import load_plugins
from hovle_tensorboard import events, plugin


@dataclass(frozen=True)
class Run:
    dir: Path

    @property
    def final(self) -> Path:
        return self.dir / "final"


def read_events(run_dir: Path) -> list[Event]:
    """All events in order of writing; a record is length, its checksum, data, its checksum (TFRecord)."""
    found = []
    for path in sorted((run_dir / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack_from("<Q", data)
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def points(found: list[Event]) -> list[tuple[str, int, float]]:
    return [(v.tag, e.step, round(v.simple_value, 4)) for e in found for v in e.summary.value]


@pytest.fixture
def hook(tmp_path, monkeypatch):
    monkeypatch.setenv("HOVLE_PLUGINS", "")
    manager = load_plugins().manager
    manager.register(plugin)
    yield manager.hook
    events.close(tmp_path)


def test_metrics_of_a_run_are_in_its_folder(hook, tmp_path) -> None:
    run = Run(tmp_path)
    for step in (9, 19):
        hook.hovle_on_log(
            run=run, step=step, metrics={"loss": 1 / (step + 1), "quarantined": 0, "note": "text"}
        )
    hook.hovle_on_checkpoint(run=run, step=19, path=tmp_path / "checkpoints" / "step-19")
    assert tmp_path in events._writers
    hook.hovle_on_checkpoint(run=run, step=19, path=run.final)
    assert tmp_path not in events._writers
    written = points(read_events(tmp_path))
    assert written == [
        ("loss", 9, 0.1),
        ("quarantined", 9, 0.0),
        ("loss", 19, 0.05),
        ("quarantined", 19, 0.0),
    ]


def test_a_resumed_run_hides_what_it_repeats(hook, tmp_path) -> None:
    run = Run(tmp_path)
    for step in (9, 19, 29):
        hook.hovle_on_log(run=run, step=step, metrics={"loss": 2.0})
    events.close(tmp_path)  # as far as the writer had got when the process died
    hook.hovle_on_log(run=run, step=19, metrics={"loss": 1.0})
    events.close(tmp_path)
    restarts = [e.step for e in read_events(tmp_path) if e.session_log.status == e.session_log.START]
    assert restarts[-1] == 19, "TensorBoard drops older points from this step on"
    assert points(read_events(tmp_path))[-1] == ("loss", 19, 1.0)
