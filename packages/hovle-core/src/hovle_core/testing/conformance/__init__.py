"""What a plugin must keep, as plain pytest classes: subclass one, name the spec, run pytest.

    from hovle_core.testing.conformance import TeacherTests

    class TestMyTeacher(TeacherTests):
        name = "my-teacher"          # as `hovle plugins list` shows it
        options = {"size": 112}      # what its target is called with, as in a recipe

`hovle plugin test PLUGIN` runs the same classes without a file. A test's docstring says why it matters. Needs pytest.
"""

from hovle_core.testing.conformance.backbone import BackboneTests
from hovle_core.testing.conformance.base import SpecTests
from hovle_core.testing.conformance.dataset import DatasetTests
from hovle_core.testing.conformance.stage import StageTests
from hovle_core.testing.conformance.teacher import TeacherTests
from hovle_core.testing.conformance.token_mixer import TokenMixerTests
from hovle_core.testing.conformance.tokenizer import TokenizerTests

__all__ = [
    "BackboneTests",
    "DatasetTests",
    "SpecTests",
    "StageTests",
    "TeacherTests",
    "TokenMixerTests",
    "TokenizerTests",
]
