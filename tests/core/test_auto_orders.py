"""Whatever module of transformers comes first after `import hovle_core`, it imports and HoVLE is registered."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

ROOT = Path(transformers.__file__).parent

# One process imports torch and forks: each child has the registries still to import.
IMPORTS = """
import os, sys, traceback
import torch, hovle_core
failed = []
for name in sys.argv[1:]:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            __import__(name)
            from transformers import AutoConfig, AutoProcessor
            assert type(AutoConfig.for_model("hovle")).__name__ == "HovleConfig"
            import transformers
            names = {config.__name__ for config in transformers.AutoModelForImageTextToText._model_mapping.keys()}
            assert "HovleConfig" in names, sorted(names)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if os.waitpid(pid, 0)[1]:
        failed.append(name)
print("failed:", failed)
sys.exit(bool(failed))
"""


def test_a_module_that_imports_the_registries_in_its_middle_may_come_first():
    run_first("modeling_layers")


@pytest.mark.slow
def test_every_module_that_imports_a_registry_may_come_first():
    files = [*ROOT.glob("*.py"), *ROOT.glob("*/__init__.py"), *ROOT.glob("[giq]*/*.py")]
    found = {path for path in files if re.search(r"^from \.+models\.auto", path.read_text(), re.MULTILINE)}
    names = sorted(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in found)
    assert "modeling_layers" in names
    run_first(*(name.removesuffix(".__init__") for name in names), "processing_utils", "generation")


def run_first(*names):
    result = subprocess.run(
        [sys.executable, "-c", IMPORTS, *(f"transformers.{name}" for name in names)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
