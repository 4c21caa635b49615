"""The environment of every test. What torch, Ray and transformers read at import is set before they are imported."""

import os
import random
import sys

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads of two processes starve each other
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "disabled",
    "WDS_SECURE": "1",  # webdataset: no pickles, no "pipe:" addresses
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",  # else Ray writes a token into the home folder
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",  # a report waits for it; the default is 2 s
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}
for name in ("HOVLE_PLUGINS", "HOVLE_DEBUG"):  # the developer's shell does not decide what is tested
    os.environ.pop(name, None)

# Shared cores make deadlines flaky; the same examples each time make a failure everyone's.
settings.register_profile("hovle", deadline=None, derandomize=True, database=None)
settings.load_profile("hovle")


# Processes share the suite out file by file (`make test`). The longest come first, or one would be left with them.
LONGEST = ("test_ray_train.py", "test_demo_run.py")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # one of several processes
        items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Every test starts from the same random state, whichever ran before it; no import of torch just for that."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
