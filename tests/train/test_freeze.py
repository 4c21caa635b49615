"""What is frozen is in eval; modules without parameters go with their parent."""

import pytest
import torch
from torch import nn

from hovle_core.losses import next_token_loss
from hovle_core.testing import tiny_embedding_config, tiny_hovle, tiny_llm, tiny_tokenizer
from hovle_train.freeze import freeze_except, set_train_mode


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


def test_a_frozen_llm_recomputes_its_activations_and_nothing_else_of_it_trains():
    """Alignment: gradients run through the frozen LLM; its dropout (0.5 here) must stay off all the same."""
    model = tiny_hovle(tiny_tokenizer())
    layers = list(model.language_model.model.layers)
    for layer in layers:
        layer.self_attn.attention_dropout = 0.5
    freeze_except(model, ["embedding."])
    runs = []
    for layer in layers:
        layer.self_attn.register_forward_pre_hook(lambda *args: runs.append(args[0]))
    ids = torch.randint(8, 200, (1, 20))

    def gradients():
        runs.clear()
        model.zero_grad()
        next_token_loss(model, {"input_ids": ids}, ids).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, len(runs)

    plain, once = gradients()
    model.activation_checkpointing_enable()
    set_train_mode(model)
    recomputed, twice = gradients()
    assert (once, twice) == (len(layers), 2 * len(layers))
    assert plain.keys() == recomputed.keys()
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)
    assert all(name.startswith("embedding.") for name in plain)
    assert [m for m in model.language_model.modules() if m.training] == layers
