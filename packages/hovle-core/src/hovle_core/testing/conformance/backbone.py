"""Conformance of LLM backbones (`hovle_core.roles.LLMBackbone`), alone and inside a HoVLE."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hovle_core.config import HolisticEmbeddingConfig
from hovle_core.image_processor import HovleImageProcessor
from hovle_core.losses import IGNORE_INDEX
from hovle_core.modeling import HovleForConditionalGeneration
from hovle_core.processor import IMAGE_CONTEXT, Encoded, HovleProcessor
from hovle_core.roles import LLMBackbone
from hovle_core.testing.conformance.base import SpecTests
from hovle_core.testing.conformance.tokenizer import TokenizerChecks

PICTURE = Image.new("RGB", (56, 56), "red")
QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this?"}]}
ANSWER = {"role": "assistant", "content": "a red square"}


class BackboneTests(TokenizerChecks, SpecTests):
    """A transformers causal LM with its tokenizer. Everything runs in float32 on the CPU: use a small one."""

    kind = "backbone"

    @pytest.fixture(scope="class")
    @classmethod
    def tokenizer(cls, subject: LLMBackbone) -> PreTrainedTokenizerBase:
        return subject.tokenizer()

    @pytest.fixture(scope="class")
    @classmethod
    def llm(cls, subject: LLMBackbone) -> PreTrainedModel:
        return subject.model().eval()

    @pytest.fixture(scope="class")
    @classmethod
    def untrained(
        cls, tokenizer: PreTrainedTokenizerBase, llm: PreTrainedModel
    ) -> HovleForConditionalGeneration:
        """A new HoVLE of one block around the LLM."""
        config = llm.config.get_text_config()
        heads = {
            field: value
            for field in ("num_attention_heads", "num_key_value_heads", "head_dim")
            if (value := getattr(config, field, None)) is not None
        }
        embedding = HolisticEmbeddingConfig(
            vocab_size=llm.get_input_embeddings().weight.shape[0], hidden_size=config.hidden_size,
            intermediate_size=2 * config.hidden_size, num_hidden_layers=1, image_size=56, **heads,
        )  # fmt: skip
        image_id = tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return HovleForConditionalGeneration.from_language_model(llm, embedding, image_id).eval()

    @pytest.fixture(scope="class")
    @classmethod
    def hovle(cls, untrained: HovleForConditionalGeneration) -> HovleForConditionalGeneration:
        """The same with random blocks and a frozen LLM: projections that start at zero hide what is behind them."""
        model = copy.deepcopy(untrained)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in model.embedding.parameters():
                if not p.any():
                    p.copy_(0.02 * torch.randn(p.shape, generator=generator))
        model.language_model.requires_grad_(False)
        return model

    @pytest.fixture(scope="class")
    @classmethod
    def processor(
        cls, tokenizer: PreTrainedTokenizerBase, hovle: HovleForConditionalGeneration
    ) -> HovleProcessor:
        tokens_per_tile = hovle.config.embedding_config.tokens_per_tile
        return HovleProcessor(HovleImageProcessor(56, 1, 2), tokenizer, tokens_per_tile=tokens_per_tile)

    def test_is_a_backbone(self, subject: Any) -> None:
        """It is made to read a recipe, and loads only when it is asked to."""
        assert isinstance(subject, LLMBackbone), (
            f"the target returns a {type(subject).__name__}: make it a subclass of hovle_core.roles.LLMBackbone"
        )

    def test_config_is_the_models(
        self, subject: LLMBackbone, llm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """The embedding is sized from `config()` and the tokenizer before the model is loaded."""
        rows, width = llm.get_input_embeddings().weight.shape
        declared = subject.config().get_text_config()
        assert declared.hidden_size == width, (
            f"config() says hidden_size {declared.hidden_size}, the LLM has {width}"
        )
        assert rows >= len(tokenizer), (
            f"the LLM has {rows} embeddings for {len(tokenizer)} tokens: "
            "call model.resize_token_embeddings(len(tokenizer)) in model()"
        )
        head = llm.get_output_embeddings().weight.shape[0]
        assert head == rows, f"the LLM reads {rows} tokens and writes {head}"

    def test_is_float32_and_whole(self, llm: PreTrainedModel) -> None:
        """The loop casts by itself (`train.precision`) and keeps masters in float32."""
        other = {str(p.dtype) for p in llm.parameters()} - {"torch.float32"}
        assert not other, f"model() holds {sorted(other)}: load with dtype=torch.float32"
        assert all(p.isfinite().all() for p in llm.parameters()), "model() holds NaN or infinity"

    def test_gives_the_same_model_each_time(self, subject: LLMBackbone, llm: PreTrainedModel) -> None:
        """Every rank builds its own, and they must be equal; random weights need a seed of their own."""
        with torch.random.fork_rng(
            devices=[]
        ):  # leaves no seed behind, by which the next model would be equal
            torch.manual_seed(1234)
            again = subject.model().state_dict()
        differing = [
            name for name, tensor in llm.state_dict().items() if not torch.equal(again[name], tensor)
        ]
        assert not differing, f"a second model() has another {differing[:3]}: seed random weights in model()"

    @torch.no_grad()
    def test_reads_embeddings_like_ids(self, llm: PreTrainedModel) -> None:
        """A HoVLE calls the LLM with `inputs_embeds`, which must mean what `input_ids` means."""
        ids = some_ids(llm)
        assert_close(
            llm(inputs_embeds=llm.get_input_embeddings()(ids)).logits,
            llm(input_ids=ids).logits,
            "logits of inputs_embeds differ from those of input_ids",
        )

    @torch.no_grad()
    def test_an_untrained_hovle_reads_text_like_the_llm(
        self, untrained: HovleForConditionalGeneration, llm: PreTrainedModel
    ) -> None:
        """The embedding starts from the LLM's own: training begins with a model that can write."""
        ids = some_ids(llm)
        assert_close(
            untrained(input_ids=ids).logits,
            llm(input_ids=ids).logits,
            "logits of a new HoVLE differ from the LLM's (does the LLM scale or shift what its embedding table gives?)",
        )

    @torch.no_grad()
    def test_cached_is_uncached(self, llm: PreTrainedModel) -> None:
        """Chat decodes with a cache and training without: both must be one model."""
        ids = some_ids(llm)
        whole = llm(input_ids=ids, use_cache=False).logits
        out = llm(input_ids=ids[:, :5], use_cache=True)
        steps = [out.logits]
        for t in range(5, ids.shape[1]):
            out = llm(input_ids=ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            steps.append(out.logits)
        assert_close(torch.cat(steps, dim=1), whole, "logits with a cache differ from those without")

    @torch.no_grad()
    def test_a_hovle_generates_the_same_with_a_cache(
        self, hovle: HovleForConditionalGeneration, processor: HovleProcessor
    ) -> None:
        """One cache holds the LLM's layers and the blocks of the embedding."""
        prompt = processor.batch([processor.encode([QUESTION], [PICTURE], add_generation_prompt=True)])
        cached, uncached = (
            hovle.generate(**prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=use_cache)
            for use_cache in (True, False)
        )
        assert torch.equal(cached, uncached), f"{cached.tolist()} with a cache, {uncached.tolist()} without"

    def test_chat_template_tells_answers_from_prompts(self, processor: HovleProcessor) -> None:
        """Only answers are targets, and `generate` must see the prompts of training."""
        assert processor.chat_template, "the tokenizer has no chat_template: set one in tokenizer()"
        encoded = processor.encode([QUESTION, ANSWER], [PICTURE])
        targets = encoded.labels[encoded.labels != IGNORE_INDEX]
        text = processor.tokenizer.decode(targets)
        assert ANSWER["content"] in text, f"the answer to learn is {text!r}"
        assert "what is this" not in text, f"the question is a target too: {text!r}"
        assert targets[-1] == processor.tokenizer.eos_token_id, (
            f"the answer to learn ends with {processor.tokenizer.decode(targets[-1:])!r} and not with eos_token: "
            "set eos_token to what the template ends a turn with"
        )
        prompt = processor.encode([QUESTION], [PICTURE], add_generation_prompt=True).input_ids
        assert (encoded.input_ids[: len(prompt)] == prompt).all(), (
            "the prompt differs between chat and training"
        )

    def test_gradients_reach_the_embedding(
        self, hovle: HovleForConditionalGeneration, processor: HovleProcessor
    ) -> None:
        """In alignment the LLM is frozen and the embedding learns through it."""
        loss(hovle, processor, processor.encode([QUESTION, ANSWER], [PICTURE])).backward()
        without = [n for n, p in hovle.embedding.named_parameters() if p.grad is None or not p.grad.any()]
        assert not without, f"no gradient reaches {without[:3]}: does model() detach, or run under no_grad?"
        moved = [n for n, p in hovle.language_model.named_parameters() if p.grad is not None]
        assert not moved, f"the frozen LLM has gradients: {moved[:3]}"

    def test_learns_from_text_alone(
        self, hovle: HovleForConditionalGeneration, processor: HovleProcessor
    ) -> None:
        """Batches without a picture happen at every rank, and must give a finite loss and gradients."""
        hovle.zero_grad()
        value = loss(hovle, processor, processor.encode_text("a red square"))
        assert value.isfinite(), f"the loss of text without a picture is {float(value)}"
        value.backward()
        assert any(p.grad is not None and p.grad.any() for p in hovle.embedding.layers.parameters()), (
            "text without a picture gives the embedding no gradient"
        )

    @torch.no_grad()
    def test_a_hovle_survives_saving_and_loading(
        self, hovle: HovleForConditionalGeneration, processor: HovleProcessor, tmp_path: Path
    ) -> None:
        """A checkpoint is all that is left of a run: tied heads and resized embeddings must come back."""
        hovle.save_pretrained(tmp_path)
        again = HovleForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
        inputs = processor.batch([processor.encode([QUESTION, ANSWER], [PICTURE])])
        assert torch.equal(again(**inputs).logits, hovle(**inputs).logits), (
            "loaded again, it gives other logits"
        )


def some_ids(llm: PreTrainedModel) -> Tensor:
    """Eight ids `[1, 8]`, of the first tokens: those that a tokenizer adds for pictures come last."""
    size = max(8, llm.get_input_embeddings().weight.shape[0] - 64)
    return torch.randint(0, size, (1, 8), generator=torch.Generator().manual_seed(0))


def assert_close(actual: Tensor, expected: Tensor, what: str) -> None:
    difference = float((actual - expected).abs().max())
    assert difference <= 1e-4 * max(1.0, float(expected.abs().max())), f"{what} by up to {difference:.2g}"


def loss(hovle: HovleForConditionalGeneration, processor: HovleProcessor, sample: Encoded) -> Tensor:
    """The mean next-token loss of one sample."""
    return hovle(**processor.batch([sample]), labels=torch.from_numpy(sample.labels)[None]).loss
