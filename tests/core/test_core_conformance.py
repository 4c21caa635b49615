"""Core's own plugin keeps what it asks of others; and each promise of the suite is broken once, and noticed."""

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers
from torch import nn

from hovle_core.fusion import number_samples
from hovle_core.roles import TokenMixer
from hovle_core.testing import GridTeacher, tiny_hovle, tiny_llm, tiny_tokenizer
from hovle_core.testing.conformance import BackboneTests, TeacherTests, TokenizerTests, TokenMixerTests
from hovle_core.testing.conformance.tokenizer import TokenizerChecks


@pytest.fixture(scope="module")
def llm_folder(tmp_path_factory):
    """A tiny Llama with a head of its own, saved with fewer embeddings than its tokenizer has tokens."""
    folder = tmp_path_factory.mktemp("llm")
    tokenizer = tiny_tokenizer()
    tiny_llm(len(tokenizer) - 3, tie_word_embeddings=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


class TestTransformersBackbone(BackboneTests):
    name = "transformers"

    @pytest.fixture(scope="class")
    @classmethod
    def arguments(cls, llm_folder):
        return {"path": llm_folder}


class TestTransformersTokenizer(TokenizerTests):
    name = "transformers"

    @pytest.fixture(scope="class")
    @classmethod
    def arguments(cls, llm_folder):
        return {"path": llm_folder}


class TestSelfAttention(TokenMixerTests):
    name = "attention"


# --- the suite notices ------------------------------------------------------------------------------------------


class WrongSize(GridTeacher):
    def grid_features(self, tiles):
        return super().grid_features(tiles)[..., :-1]


class ChannelsFirst(GridTeacher):
    def grid_features(self, tiles):
        return super().grid_features(tiles).permute(0, 3, 1, 2)


class Noisy(GridTeacher):
    def grid_features(self, tiles):
        return super().grid_features(tiles) + torch.rand(1)


class BatchWise(GridTeacher):
    def grid_features(self, tiles):
        features = super().grid_features(tiles)
        return features - features.mean(0)


class Turned(GridTeacher):
    def grid_features(self, tiles):
        return super().grid_features(tiles).transpose(1, 2)


class Blind(GridTeacher):
    def grid_features(self, tiles):
        return torch.ones(len(tiles), 2, 2, self.feature_size)


class NotANumber(GridTeacher):
    def grid_features(self, tiles):
        return super().grid_features(tiles) / 0


class Trains(GridTeacher):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


class TrainMode(GridTeacher):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def train(self, mode=True):
        return nn.Module.train(self, mode)


class TakesAnything(GridTeacher):
    def features(self, tiles):
        return self.grid_features(tiles)


@pytest.mark.parametrize(
    ("teacher", "test", "message"),
    [
        (WrongSize, "test_features_are_as_declared", "feature_size says 8, .* have 7 channels"),
        (
            ChannelsFirst,
            "test_features_are_as_declared",
            r"\[3, 8, 2, 2\] have 2 channels \(the channels come",
        ),
        (NotANumber, "test_features_are_as_declared", "NaN or infinity"),
        (Noisy, "test_same_tiles_same_features", "other features the second time"),
        (BatchWise, "test_a_tile_does_not_see_its_neighbours", "depend on the batch around it"),
        (
            Turned,
            "test_rows_and_columns_are_where_they_are_in_the_picture",
            "lower left changed the upper right",
        ),
        (Blind, "test_rows_and_columns_are_where_they_are_in_the_picture", "changed no feature"),
        (Trains, "test_is_frozen", r"require gradients: \['scale'\]"),
        (TrainMode, "test_stays_in_eval", "reached .*'norm'"),
        (TakesAnything, "test_refuses_tiles_that_are_normalised_already", "float tiles were taken"),
        (nn.Identity, "test_is_a_teacher", "returns a Identity: make it a subclass"),
    ],
)
def test_a_teacher_that_breaks_a_promise_is_told(teacher, test, message) -> None:
    tiles = torch.randint(0, 256, (3, 3, 56, 56), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    run = getattr(TeacherTests(), test)
    for broken in (False, True):
        subject = teacher() if broken else GridTeacher()
        arguments = {
            name: value
            for name, value in {"subject": subject, "tiles": tiles}.items()
            if name in run.__annotations__
        }
        if broken:
            with pytest.raises(AssertionError, match=message):
                run(**arguments)
        else:
            run(**arguments)


def lacks_picture_tokens(tokenizer):
    backend = tokenizer.backend_tokenizer
    text = backend.to_str().replace("<IMG_CONTEXT>", "<OTHER>")
    return type(tokenizer)(tokenizer_object=type(backend).from_str(text), eos_token="<|im_end|>")


def takes_picture_tokens_for_words(tokenizer):
    plain = type(tokenizer)(tokenizer_object=Tokenizer(models.BPE()), eos_token="</s>")
    plain.add_tokens(["<img>", "</img>", "<IMG_CONTEXT>"])
    return plain


def lower_cases(tokenizer):
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def never_ends(tokenizer):
    tokenizer.eos_token = None
    return tokenizer


@pytest.mark.parametrize(
    ("spoil", "test", "message"),
    [
        (
            lacks_picture_tokens,
            "test_picture_tokens_are_single_ids",
            "lacks .*<IMG_CONTEXT>.*add_image_tokens",
        ),
        (
            takes_picture_tokens_for_words,
            "test_typed_special_tokens_stay_text",
            "typed '<img>' becomes special ids .*: declare it as a special token",
        ),
        (lower_cases, "test_text_comes_back", "'Größe.*' comes back as 'größe"),
        (never_ends, "test_has_an_end_token", "eos_token is not set"),
    ],
)
def test_a_tokenizer_that_breaks_a_promise_is_told(spoil, test, message) -> None:
    run = getattr(TokenizerChecks(), test)
    run(tiny_tokenizer())
    with pytest.raises(AssertionError, match=message):
        run(spoil(tiny_tokenizer()))


class RunningSum(TokenMixer):
    """Sums what came before in a sample; `breaks` says which promise it does not keep."""

    is_recurrent = True
    breaks = ""

    def __init__(self, config):
        super().__init__()
        self.v_proj, self.o_proj = (nn.Linear(config.hidden_size, config.hidden_size) for _ in range(2))
        nn.init.zeros_(self.o_proj.bias)

    def forward(self, x, position_ids, past_key_values=None, **kwargs):
        v = self.v_proj(x)
        v = v.detach() if self.breaks == "gradient" else v
        sample = number_samples(position_ids).expand(x.shape[:2])
        if self.breaks == "packing":
            sample = torch.zeros_like(sample)
        seen = sample[:, :, None] == sample[:, None]
        if self.breaks != "causal":
            seen = seen.tril()
        if self.breaks == "mixing":
            seen = torch.eye(x.shape[1], dtype=torch.bool)[None]
        out = seen.float() @ v
        if past_key_values is not None and self.breaks != "cache":
            layer = past_key_values.layers[0 if self.breaks == "layer" else self.layer_idx]
            if layer.state is not None:
                out = out + (sample == 0)[..., None] * layer.state[:, None]
            layer.keep(out[:, -1], x.shape[1])
        return self.o_proj(out) + (x if self.breaks == "o_proj" else 0)


@pytest.mark.parametrize(
    ("breaks", "test", "message"),
    [
        ("mixing", "test_mixes_tokens_and_keeps_their_shape", "changes none of those behind it"),
        ("causal", "test_sees_only_what_came_before", "later tokens change earlier ones"),
        ("o_proj", "test_all_of_it_goes_through_o_proj", "is not the output times two"),
        ("packing", "test_packed_samples_do_not_see_each_other", "differs from the same one alone"),
        ("packing", "test_padding_changes_nothing", "padding before a row changes it"),
        ("cache", "test_cached_is_uncached", "logits differ from those without"),
        ("layer", "test_cached_is_uncached", "logits differ from those without"),
        ("gradient", "test_gradients_reach_all_of_it", "no gradient reaches .*v_proj"),
    ],
)
def test_a_token_mixer_that_breaks_a_promise_is_told(breaks, test, message) -> None:
    model = tiny_hovle(tiny_tokenizer())
    run = getattr(TokenMixerTests(), test)
    torch.manual_seed(0)
    for i, block in enumerate(model.embedding.layers):
        block.self_attn = RunningSum(model.config.embedding_config)
        block.self_attn.layer_idx = i
    model.embedding.recurrent_layers = [0, 1]
    run(model=model)
    for block in model.embedding.layers:
        block.self_attn.breaks = breaks
    with pytest.raises(AssertionError, match=message):
        run(model=model)
