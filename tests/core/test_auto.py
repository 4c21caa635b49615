"""What `import hovle_core` does to transformers, in processes of their own: registered, and nothing heavy loaded."""

import inspect
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import hovle_core
from hovle_core import auto

SOURCE = Path(hovle_core.__file__).parent


def in_new_process(code: str, *arguments: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


REGISTERED = """
from transformers import (AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText,
                          AutoModelForMultimodalLM, AutoProcessor)
import torch
assert type(AutoConfig.for_model("hovle")).__name__ == "HovleConfig"
from hovle_core.testing import tiny_hovle, tiny_processor, tiny_tokenizer
processor = tiny_processor(tiny_tokenizer())
model = tiny_hovle(processor.tokenizer)
for auto in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    assert type(auto.from_config(model.config)) is type(model), auto
try:
    AutoModelForCausalLM.from_config(model.config)
except ValueError as error:
    assert "Unrecognized configuration class" in str(error)  # a HoVLE takes pictures: it is no plain causal LM
else:
    raise AssertionError
processor.save_pretrained("checkpoint")
processor.image_processor.save_pretrained("images")
model.save_pretrained("checkpoint")
model.config.save_pretrained("images")
assert type(AutoProcessor.from_pretrained("checkpoint")).__name__ == "HovleProcessor"
for folder in ("checkpoint", "images"):
    assert type(AutoImageProcessor.from_pretrained(folder)).__name__ == "HovleImageProcessor", folder
"""


@pytest.mark.parametrize("imported_first", ["registry", "hovle_core", "member"])
def test_a_member_registers_once_in_every_order(imported_first, tmp_path, monkeypatch) -> None:
    """With modules of a line each: a process that imports transformers takes 8 seconds."""
    (tmp_path / "a_registry.py").write_text("members = []\n")
    (tmp_path / "a_member.py").write_text("import a_registry\na_registry.members.append(__name__)")
    monkeypatch.syspath_prepend(tmp_path)
    others = [finder for finder in sys.meta_path if not isinstance(finder, auto.RegistryFinder)]
    monkeypatch.setattr(sys, "meta_path", others)
    monkeypatch.setattr(auto, "REGISTERS_IN", {"a_registry": "a_member"})
    for name in ("a_registry", "a_member"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    if imported_first == "registry":
        registry = import_module("a_registry")
        assert registry.members == []
        auto.register()
    else:
        auto.register()
        assert "a_member" not in sys.modules
        import_module("a_member" if imported_first == "member" else "a_registry")
        registry = sys.modules["a_registry"]
    assert registry.members == ["a_member"]
    assert inspect.getsource(registry) == "members = []\n"  # the loader still is Python's own in all else


WITHOUT_ANYTHING_ELSE = f"""
import sys, hovle_core
assert not {{"torch", "transformers"}} & set(sys.modules)
blocked, modules = (argument.split(",") for argument in sys.argv[1:])

class Without:
    "A finder as it was, for which some packages are not installed: transformers looks for them, and goes without."
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in blocked else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
{REGISTERED}
from importlib import import_module
for module in modules:
    import_module(module)
from PIL import Image
inputs = processor(images=Image.new("RGB", (56, 56)), text="<IMG_CONTEXT>what is this")
out = model.generate(**inputs, max_new_tokens=2, eos_token_id=None)
assert out.shape[1] == inputs["input_ids"].shape[1] + 2
assert not set(blocked) & set(sys.modules)
"""
# Installed beside hovle-core in a workspace, and no dependency of it (torchvision is transformers' choice to use).
OTHERS = (
    "ray", "timm", "torchvision", "webdataset", "wandb", "pydantic", "rich", "psutil", "scipy", "sklearn", "pandas",
    "accelerate", "gguf", "peft", "torchao", "flash_attn", "sentencepiece", "hovle_data", "hovle_train", "hovle_serve",
)  # fmt: skip


def test_everything_is_registered_and_works_without_what_is_not_declared(tmp_path, monkeypatch) -> None:
    """hovle_core comes before transformers here, as isort has it."""
    monkeypatch.chdir(tmp_path)
    files = (path.relative_to(SOURCE.parent).with_suffix("") for path in SOURCE.rglob("*.py"))
    modules = sorted(".".join(file.parts).removesuffix(".__init__") for file in files)
    in_new_process(WITHOUT_ANYTHING_ELSE, ",".join(OTHERS), ",".join(modules))
