"""Everything that can be wrong with a sample, found before training. What passes here, every stream can use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from hovle_data.decode import cut_tiles, decode_image, image_suffix
from hovle_data.schema import BadSample, Message, Sample

if TYPE_CHECKING:
    from hovle_core.processor import Encoded
    from hovle_data.streams import Processor


def problems(sample: Sample, decode: bool = True) -> Iterator[str]:
    """Reasons, each "category" or "category: details", why a sample cannot be trained on; none for a good one.

    decode: also decode every picture, which is what takes the time.
    """
    try:
        sample.validate()
    except BadSample as bad:
        yield bad.reason
    if sample.messages is not None:
        yield from _turn_problems(sample.messages)
    for number, image in enumerate(sample.images):
        which = f" (image {number})" if len(sample.images) > 1 else ""
        if not image:
            yield f"empty image file{': image ' + str(number) if which else ''}"
        elif image_suffix(image) is None:
            yield f"not a known image format: starts with {image[:8]!r}{which}"
        elif decode:
            try:
                decode_image(image)
            except BadSample as bad:
                yield bad.reason + which


def encode(processor: Processor, sample: Sample) -> Encoded:
    """The sample as a stream of its kind encodes it. Raises ValueError for what the processor refuses."""
    images = [cut_tiles(processor, image) for image in sample.images]
    if sample.messages is not None:
        return processor.encode(sample.messages, images=images)
    if len(images) > 1:
        raise ValueError(f"more than one image without a conversation: {len(images)}")
    if sample.text is None:
        return processor.encode_image(images[0])
    return processor.encode_pair(images[0], sample.text) if images else processor.encode_text(sample.text)


def text_of(sample: Sample) -> str:
    """All text of a sample as one string: turns by line, pictures as <image>."""
    if sample.messages is None:
        return sample.text or ""
    return "\n".join(f"{turn['role']}: {content_text(turn)}" for turn in sample.messages)


def content_text(turn: Message) -> str:
    """The text of one turn, pictures as <image>."""
    content = turn["content"]
    if isinstance(content, str):
        return content
    return " ".join(part["text"] if part["type"] == "text" else "<image>" for part in content)


def _turn_problems(messages: tuple[Message, ...]) -> Iterator[str]:
    """What a chat template takes without complaint and no one means: answers that are empty, turns out of order."""
    turns = [turn for turn in messages if isinstance(turn, Mapping)]
    roles = [turn.get("role") for turn in turns]
    if "assistant" not in roles:
        yield "no answer"
    if "system" in roles[1:]:
        yield f"system turn inside the conversation: number {roles.index('system', 1)}"
    spoken = [role for role in roles if role != "system"]
    if spoken and spoken[0] == "assistant":
        yield "answer before any question"
    for number, (one, other) in enumerate(pairwise(spoken)):
        if one == other and one in ("user", "assistant"):
            yield f"two turns of one role: {one}, turns {number} and {number + 1}"
            break
    for number, turn in enumerate(turns):
        if not _says(turn.get("content")):
            yield f"empty {'answer' if turn.get('role') == 'assistant' else 'turn'}: number {number}"


def _says(content: Any) -> bool:
    if isinstance(content, list | tuple):
        return any(
            isinstance(part, Mapping)
            and (part.get("type") == "image" or bool(str(part.get("text", "")).strip()))
            for part in content
        )
    return not isinstance(content, str) or bool(content.strip())  # what is no text is named elsewhere
