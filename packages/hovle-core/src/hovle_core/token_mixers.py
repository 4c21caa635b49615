"""What mixes tokens in the embedding's blocks: self attention, or a plugin's in its place.

A config names it, and a checkpoint's config is all that `from_pretrained` has; so the name is looked up here, in this
process's plugins, where everything else is handed a registry.
"""

from collections.abc import Callable
from typing import Any

from hovle_core.config import ATTENTION, HolisticEmbeddingConfig
from hovle_core.layers import CausalSelfAttention
from hovle_core.plugins import load_plugins
from hovle_core.roles import TokenMixer


def token_mixer_builder(config: HolisticEmbeddingConfig) -> Callable[[int], TokenMixer]:
    """`layer_idx` -> the token mixer of that block.

    Raises ValueError for a name that no installed plugin provides, and for options that its target does not take.
    """
    options: dict[str, Any] = dict(config.token_mixer_options or {})
    name = config.token_mixer
    if name == ATTENTION and not options:  # no plugin is asked: released models run whatever is installed
        return lambda layer_idx: CausalSelfAttention(config, layer_idx)
    plugins = load_plugins(strict=False)
    try:
        plugins.registry.get("token_mixer", name)
    except ValueError as error:
        plugins.raise_if_broken()  # the reason why it is not there, most likely
        raise ValueError(
            f"embedding_config.token_mixer: {error}; correct the name, or install the plugin that provides it"
        ) from None

    def build(layer_idx: int) -> TokenMixer:
        mixer = plugins.registry.build("token_mixer", name, config=config, layer_idx=layer_idx, **options)
        if not isinstance(mixer, TokenMixer):
            raise ValueError(
                f"token_mixer {name!r} is a {type(mixer).__name__}, not a hovle_core.roles.TokenMixer"
            )
        return mixer

    return build
