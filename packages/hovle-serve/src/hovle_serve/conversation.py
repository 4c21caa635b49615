"""A conversation, whoever answers it: a model in this process (`chat.ChatSession`) or a server."""

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence

from PIL.Image import Image

from hovle_core.rendering import Message


class Conversation(ABC):
    """`messages` so far (transformers style) and the `images` of their image parts, in order.

    Ask one question at a time.
    """

    def __init__(self, system: str | None = None) -> None:
        self.system = system
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages: list[Message] = []
        if self.system is not None:
            self.messages.append({"role": "system", "content": _checked(self.system, "the system message")})
        self.images: list[Image] = []

    @abstractmethod
    def _answer(self, messages: Sequence[Message], images: Sequence[Image]) -> Generator[str, None, None]:
        """The pieces of an answer; closing them stops it. Raises ValueError at once for what cannot be asked."""

    def ask(self, text: str, images: Sequence[Image] = ()) -> Generator[str, None, None]:
        """The answer in pieces of whole characters; pictures stand before the text.

        Closing the iterator stops the answer; what came of it stays in the conversation. A question without any
        answer (stopped or failed before its first piece, or failed later) leaves the conversation as it was.

        Raises ValueError at once for an empty or malformed text and for a conversation that is too long for the
        model; what fails in generation is raised while iterating.
        """
        if not text.strip() and not images:
            raise ValueError("the question is empty: write a text or give a picture")
        parts: list[dict[str, str]] = [{"type": "image"} for _ in images]
        if text.strip():
            parts.append({"type": "text", "text": _checked(text, "the question")})
        messages = [*self.messages, {"role": "user", "content": parts if images else text}]
        pictures = [*self.images, *images]
        return self._remembered(self._answer(messages, pictures), messages, pictures)

    def _remembered(
        self, pieces: Generator[str, None, None], messages: list[Message], images: list[Image]
    ) -> Generator[str, None, None]:
        answer: list[str] = []

        def remember() -> None:
            self.messages = [*messages, {"role": "assistant", "content": "".join(answer)}]
            self.images = images

        try:
            for piece in pieces:
                answer.append(piece)
                yield piece
        except (GeneratorExit, KeyboardInterrupt):
            pieces.close()  # stops what answers and waits for it
            if answer:
                remember()
            raise
        remember()


def _checked(text: str, what: str) -> str:
    """Halves of surrogate pairs (a terminal's broken bytes) are no text for a tokenizer."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} is not valid Unicode: {error}") from error
    return text
