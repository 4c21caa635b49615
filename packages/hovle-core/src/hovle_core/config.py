"""What a checkpoint stores: the holistic embedding's config, the LLM's own config, and how the two meet."""

import copy
from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

PIXEL_SHUFFLE_LOCATIONS = ("pre", "post")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MASK_TYPES = ("causal", "image_bidirectional")
ATTENTION = "attention"
# InternLM2-chat-1.8B, which is a Llama (hovle_core.official).
RELEASED_LLM = {
    "model_type": "llama", "vocab_size": 92553, "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32768, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6},
}  # fmt: skip


class HolisticEmbeddingConfig(PreTrainedConfig):
    """The stack of causal blocks that turns patches and text tokens into `inputs_embeds` (paper, section 3.1).

    Defaults are the released HoVLE's. `pixel_shuffle_loc="pre"` shuffles patches before the blocks (HoVLE),
    `"post"` after them (HoVLE-HD). `image_size` is the side of a tile in pixels. `image_mean` and `image_std`
    normalise tiles that arrive as uint8 (`HovleImageProcessor(do_normalize=False)`). `mask_type="causal"` is the
    paper's; with `"image_bidirectional"` all tokens of one image (of all its tiles) see each other in the blocks, while
    text and the LLM stay causal. `token_mixer` names what mixes tokens in the blocks, `attention` or a plugin's, and
    `token_mixer_options` its settings.

    Raises ValueError for an unknown choice, a negative number of layers, and when the sizes cannot fit together (heads,
    patches, shuffle).
    """

    model_type = "holistic_embedding"

    vocab_size: int = 92553
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 8
    num_attention_heads: int = 16
    if TYPE_CHECKING:  # None is taken in and never kept: a built config has numbers
        num_key_value_heads: int
        head_dim: int
    else:
        num_key_value_heads: int | None = 8
        head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 32768
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    num_channels: int = 3
    patch_size: int = 14
    image_size: int = 448
    downsample_ratio: float = 0.5
    pixel_shuffle_loc: str = "pre"
    image_mean: list[float] | tuple[float, ...] = IMAGENET_MEAN
    image_std: list[float] | tuple[float, ...] = IMAGENET_STD
    mask_type: str = "causal"
    token_mixer: str = ATTENTION
    token_mixer_options: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # As they come back from JSON.
        self.image_mean, self.image_std = list(self.image_mean), list(self.image_std)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        for name in ("num_attention_heads", "num_key_value_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.pixel_shuffle_loc not in PIXEL_SHUFFLE_LOCATIONS:
            raise ValueError(
                f"pixel_shuffle_loc must be one of {PIXEL_SHUFFLE_LOCATIONS}, got {self.pixel_shuffle_loc!r}"
            )
        if self.mask_type not in MASK_TYPES:
            raise ValueError(f"mask_type must be one of {MASK_TYPES}, got {self.mask_type!r}")
        if self.mask_type != "causal" and self.token_mixer != ATTENTION:
            raise ValueError(
                f"mask_type {self.mask_type!r} is for token_mixer {ATTENTION!r}: token mixers such as "
                f"{self.token_mixer!r} are causal; leave mask_type out"
            )
        if self.num_hidden_layers < 0:
            raise ValueError(f"num_hidden_layers must not be negative, got {self.num_hidden_layers}")
        if self.num_hidden_layers == 0 and self.pixel_shuffle_loc == "post":
            raise ValueError(
                "pixel_shuffle_loc 'post' shuffles behind the blocks, and num_hidden_layers is 0: use 'pre'"
            )
        if self.hidden_size % self.num_attention_heads or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} must divide by num_attention_heads {self.num_attention_heads}, "
                f"and that by num_key_value_heads {self.num_key_value_heads}"
            )
        if self.image_size % self.patch_size or (self.image_size // self.patch_size) % self.shuffle_factor:
            raise ValueError(
                f"image_size {self.image_size} must be a multiple of patch_size {self.patch_size} times "
                f"{self.shuffle_factor} (1 / downsample_ratio)"
            )
        super().__post_init__(**kwargs)

    @property
    def shuffle_factor(self) -> int:
        """Patches merged along each side of the grid: 2 for downsample_ratio 0.5."""
        return round(1 / self.downsample_ratio)

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens a tile takes in `input_ids` and in the LLM (256 for the released models)."""
        return (self.patches_per_side // self.shuffle_factor) ** 2

    @property
    def block_tokens_per_placeholder(self) -> int:
        """Tokens in the embedding blocks for one placeholder in `input_ids`: 1 for HoVLE, 4 for HoVLE-HD."""
        return self.shuffle_factor**2 if self.pixel_shuffle_loc == "post" else 1


class HovleConfig(PreTrainedConfig):
    """A HoVLE: `embedding_config` for the holistic embedding, `text_config` for any transformers causal LM
    (without one the released model's).

    `image_token_id` is the placeholder in `input_ids` that an image token replaces (`<IMG_CONTEXT>`). `released` is the
    `config.json` of the released checkpoint that this one comes from: `hovle convert --to released` starts from it.
    """

    model_type = "hovle"
    sub_configs_defaults = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
        "embedding_config": SubConfigSpec(config_class=HolisticEmbeddingConfig),
    }

    if TYPE_CHECKING:  # dicts and None are taken in and never kept: transformers builds the sub-configs
        text_config: PreTrainedConfig
        embedding_config: HolisticEmbeddingConfig
    else:
        text_config: dict | PreTrainedConfig | None = None
        embedding_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 92546
    # The LLM ties its head to its own table, not to the holistic embedding's; text_config says whether.
    tie_word_embeddings: bool = False
    released: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.text_config is None:
            self.text_config = dict(RELEASED_LLM)
        super().__post_init__(**kwargs)
        if self.embedding_config.hidden_size != self.text_config.hidden_size:
            raise ValueError(
                f"embedding_config.hidden_size {self.embedding_config.hidden_size} must equal "
                f"text_config.hidden_size {self.text_config.hidden_size}: the LLM reads the embedding's output"
            )
        # The Auto classes of models look one up by its config; see hovle_core.auto.
        import_module("hovle_core.modeling")

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The LLM's config; for `decoder=True` with the embedding blocks counted in, since `generate` sizes its
        cache by it. The LLM's layers come first in that cache (see `generation.split_cache`)."""
        text_config = super().get_text_config(decoder=decoder, encoder=encoder)
        if not decoder:
            return text_config
        llm_layers, blocks = text_config.num_hidden_layers, self.embedding_config.num_hidden_layers
        text_config = copy.deepcopy(text_config)
        layer_types = getattr(text_config, "layer_types", None)
        if layer_types is None:
            windowed = getattr(text_config, "sliding_window", None) is not None
            layer_types = ["sliding_attention" if windowed else "full_attention"] * llm_layers
        text_config.num_hidden_layers = llm_layers + blocks
        text_config.layer_types = [*layer_types, *["full_attention"] * blocks]
        return text_config


AutoConfig.register(HolisticEmbeddingConfig.model_type, HolisticEmbeddingConfig, exist_ok=True)
AutoConfig.register(HovleConfig.model_type, HovleConfig, exist_ok=True)
