"""What is frozen is in eval; modules without parameters go with their parent."""

import pytest
from torch import nn

from hovle_core.testing import tiny_embedding_config, tiny_llm
from hovle_train.freeze import freeze_except


def test_dropout_goes_with_its_parent():
    net = nn.ModuleDict({name: nn.Sequential(nn.Linear(2, 2), nn.Dropout()) for name in ("a", "b")})
    freeze_except(net, ["a."])
    assert net["a"][1].training
    assert not net["b"][1].training
    assert [name for name, p in net.named_parameters() if p.requires_grad] == ["a.0.weight", "a.0.bias"]
    with pytest.raises(ValueError, match="no parameter starts with 'c.'"):
        freeze_except(net, ["c."])


def test_instruction_tuning_leaves_an_untied_llms_unread_table(make_recipe, plugins):
    """A HoVLE reads text through its own table: the LLM's never gets a gradient, unless its head is tied to it."""
    from hovle_core import HovleForConditionalGeneration
    from hovle_train.stages.instruction_tuning import InstructionTuning

    stage = InstructionTuning(make_recipe("instruction_tuning"), plugins.registry)
    model = HovleForConditionalGeneration.from_language_model(
        tiny_llm(64, tie_word_embeddings=False), tiny_embedding_config(64), 7
    )
    freeze_except(model, stage.trainable(model))
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["language_model.model.embed_tokens.weight"]
