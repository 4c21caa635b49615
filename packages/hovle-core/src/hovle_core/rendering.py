"""A conversation through its chat template, so that neither pictures nor typed special tokens depend on the template.

What stands for a picture, and text that spells a special token, go through it behind one-time marks and are put back as
token ids.
"""

import copy
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary, ref

from PIL import Image
from transformers import PreTrainedTokenizerBase
from transformers.image_utils import load_image

from hovle_core.images import open_image

Message = Mapping[str, Any]
# Tokenizer -> its length and its copy for literal text.
_TWINS: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, PreTrainedTokenizerBase]] = WeakKeyDictionary()
# Tokenizer -> its length and its ids of pieces read lately.
_PIECES: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, Callable[[str], tuple[int, ...]]]] = (
    WeakKeyDictionary()
)
LONGEST_PIECE = 256  # characters: a role's line, a question asked again, a short answer
MOST_CALLS = 64  # of the tokenizer for one text: more pieces are read in one
# What stands in a rendered prompt for a picture or a spelled-out special token.
_MARK = re.compile(r"\[\[(?:picture|literal) (?P<nonce>[0-9a-f]{16})(?: (?P<number>\d+))?\]\]")


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Plain text -> token ids; spelled-out special tokens stay text, whatever other threads do with the tokenizer."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if set(tokenizer.all_special_ids).isdisjoint(ids):
        return ids
    return _literal_twin(tokenizer)(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def _literal_twin(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy that only ever splits special tokens: `split_special_tokens` is a switch on the tokenizer that another
    thread may turn back between our turning it and its use."""
    size, twin = _TWINS.get(tokenizer, (-1, tokenizer))
    if size != len(tokenizer):  # none yet, or tokens were added since
        twin = copy.deepcopy(tokenizer)
        _TWINS[tokenizer] = (len(tokenizer), twin)
    return twin


@lru_cache(maxsize=16)
def _any_of(tokens: tuple[str, ...]) -> re.Pattern:
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len)))


class Rendering:
    """Messages (transformers style) with marks in them; `num_images` counts their image parts.

    `variables` are the template's, beside the messages.

    Raises ValueError for a content part that is neither text nor image.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        messages: Sequence[Message],
        chat_template: str | None,
        variables: Mapping[str, Any] | None = None,
    ):
        self.tokenizer, self.chat_template, self.variables = tokenizer, chat_template, variables or {}
        self.special = _any_of(tuple(tokenizer.all_special_tokens))
        self.num_images = 0
        self.nonce = secrets.token_hex(8)
        self.image_mark, self.literal_mark = f"[[picture {self.nonce}]]", f"[[literal {self.nonce} %d]]"
        self.literals: list[str] = []
        self.messages = [self._escaped(i, message) for i, message in enumerate(messages)]

    def _escaped(self, i: int, message: Message) -> Message:
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not isinstance(content, str | list | tuple):
            raise ValueError(
                f"message {i} needs a role, and as its content a string or a list of parts, got role {role!r} and "
                f"content of type {type(content).__name__}"
            )
        return {**message, "role": self._text(role), "content": self._content(content)}

    def _content(self, content: str | Sequence[Mapping[str, Any]]) -> str:
        if isinstance(content, str):
            return self._text(content)
        out = []
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind == "image":
                self.num_images += 1
                out.append(self.image_mark)
            elif kind == "text" and isinstance(part.get("text"), str):
                out.append(self._text(part["text"]))
            else:
                given = f"type {kind!r}" if isinstance(part, Mapping) else repr(part)
                raise ValueError(
                    f"content part {given} is not known; known are {{'type': 'image'}} and "
                    "{'type': 'text', 'text': ...}"
                )
        return "\n".join(out)

    def _text(self, text: str) -> str:
        def mark(match: re.Match) -> str:
            self.literals.append(match.group())
            return self.literal_mark % (len(self.literals) - 1)

        return self.special.sub(mark, text)

    def _render(self, messages: Sequence[Message], **options: bool) -> str:
        from jinja2 import TemplateError  # transformers renders with it

        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                chat_template=self.chat_template,
                **options,
                **self.variables,
            )
        except TemplateError as error:  # such as raise_exception for an order of roles
            raise ValueError(f"the chat template refuses these messages: {error}") from error

    def _opening(self) -> str:
        """What comes before an answer that is the first message: transformers renders no empty conversation."""
        answer = {"role": self.messages[0]["role"], "content": self.image_mark}
        return self._render([answer], add_generation_prompt=False).partition(self.image_mark)[0]

    def segments(
        self, add_generation_prompt: bool, continue_final_message: bool = False
    ) -> list[tuple[str, bool]]:
        """The rendered conversation as (text, is it an answer) pieces in order.

        `continue_final_message` leaves the last message open, for `generate` to go on with.
        Raises ValueError if the template rewrites earlier turns when later ones come.
        """
        pieces, done = [], ""
        last = len(self.messages) - 1
        for i, message in enumerate(self.messages):
            if message["role"] != "assistant" or (continue_final_message and i == last):
                continue
            prompt = self._render(self.messages[:i], add_generation_prompt=True) if i else self._opening()
            answer = self._render(self.messages[: i + 1], add_generation_prompt=False)
            if not prompt.startswith(done) or not answer.startswith(prompt):
                raise ValueError(
                    "the chat template rewrites earlier turns, so answers cannot be told from prompts"
                )
            pieces += [(prompt[len(done) :], False), (answer[len(prompt) :], True)]
            done = answer
        ends_open = add_generation_prompt or continue_final_message
        if ends_open or not pieces or self.messages[-1]["role"] != "assistant":
            rest = self._render(
                self.messages,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
            if not rest.startswith(done):
                raise ValueError(
                    "the chat template rewrites earlier turns, so answers cannot be told from prompts"
                )
            pieces.append((rest[len(done) :], False))
        return pieces

    def text(self, image_token: str, add_generation_prompt: bool, continue_final_message: bool) -> str:
        """The whole conversation as text with `image_token` for each picture.

        Raises ValueError where a message spells a special token: in plain text it would become one.
        """
        if self.literals:
            raise ValueError(
                f"a message spells the special token {self.literals[0]!r}, which plain text cannot tell from a real "
                "one; use apply_chat_template(..., tokenize=True)"
            )
        pieces = self.segments(add_generation_prompt, continue_final_message)
        return "".join(text for text, _ in pieces).replace(self.image_mark, image_token)

    def tokenize(self, text: str, pictures: Iterator[list[int]]) -> list[int]:
        """A rendered piece -> ids; each picture's mark takes the next of `pictures`, literals become plain text."""
        texts, marks, position = [], [], 0
        for match in _MARK.finditer(text):
            if match["nonce"] == self.nonce:  # others only look like a mark
                texts.append(text[position : match.start()])
                marks.append(match)
                position = match.end()
        read = _pieces_ids(self.tokenizer, [*texts, text[position:]])
        literal_ids = lru_cache(maxsize=None)(lambda literal: text_ids(self.tokenizer, literal))
        ids = list(read[0])
        for match, after in zip(marks, read[1:], strict=True):
            is_picture = match.group() == self.image_mark
            ids += next(pictures) if is_picture else literal_ids(self.literals[int(match["number"])])
            ids += after
        return ids


def _pieces_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Sequence[int]]:
    """Ids of rendered pieces, special tokens among them. Many different ones are read in one call: a call takes longer
    than most pieces are long, and whoever types special tokens may make as many pieces."""
    if len(texts) <= MOST_CALLS:
        return [_piece_ids(tokenizer, text) for text in texts]
    different = [text for text in dict.fromkeys(texts) if text]
    ids = tokenizer(different, add_special_tokens=False)["input_ids"] if different else []
    found = {"": [], **dict(zip(different, ids, strict=True))}
    return [found[text] for text in texts]


def _piece_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Sequence[int]:
    """Conversations are made of pieces that come again and again, which are kept."""
    if not text:
        return []
    if len(text) > LONGEST_PIECE:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
    found = _PIECES.get(tokenizer)
    if found is None or found[0] != len(tokenizer):  # none yet, or tokens were added since
        found = _PIECES[tokenizer] = len(tokenizer), _reader(ref(tokenizer))
    return found[1](text)


def _reader(tokenizer: ref[PreTrainedTokenizerBase]) -> Callable[[str], tuple[int, ...]]:
    """The ids of a piece, kept for those asked for last. Behind a weak reference: what a weak dictionary holds
    must not hold its key."""

    @lru_cache(maxsize=4096)
    def read(piece: str) -> tuple[int, ...]:
        living = tokenizer()
        assert living is not None  # whoever asks has it
        return tuple(living(piece, add_special_tokens=False)["input_ids"])

    return read


def open_pictures(messages: Sequence[Message]) -> list[Image.Image]:
    """The pictures inside messages, in order. Raises ValueError for an image part that names none."""
    parts = [
        part for message in messages if not isinstance(message["content"], str) for part in message["content"]
    ]
    return [_open(part) for part in parts if part["type"] == "image"]


def _open(part: Mapping[str, Any]) -> Image.Image:
    source = next((part[key] for key in ("image", "path", "url") if key in part), None)
    if isinstance(source, Image.Image):
        return source
    if source is None:
        raise ValueError(
            'an image part holds no picture; give {"type": "image", "image": PIL image, path or URL}'
        )
    if str(source).startswith(("http://", "https://", "data:")):
        return load_image(source)
    return open_image(source)
