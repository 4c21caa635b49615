"""Serving: 16 requests at once, half of them with pictures, answers of 24 to 72 tokens; tokens per second.

Measured in turns, so that a machine that slows down is slow for all:
- `generate`, one request after the other, on the same HoVLE and prompts (`ratio_sequential`);
- the engine in this process, without HTTP (`stream_overhead`: what `hovle serve` streams over HTTP is slower by that);
- `hovle serve` in a process of its own, every request streamed, with times to first text and between texts;
- `transformers serve`, which serves no model class of others: its text requests go to a bare Llama of the same widths
  whose depth is that of blocks and LLM together, and the same requests to `hovle serve`. `ratio_transformers_serve` is
  over the command as it is, `ratio_continuous_batching` over it with `--continuous-batching`.

Ratios are of one round, and the median round counts. Tokens are those that a peer says it wrote. Weights are random, in
float32; no token ends an answer early. Every round has prompts of its own, so that no prefix of the round before is
reused. `--rounds N`, `--seconds S` (no round begins later), `--skip-transformers`.

OpenMP's threads wait alike in all peers, as `hovle serve` has them wait (`hovle_core.openmp`); this process computes in
threads that end, so that the engine's find the cores as theirs alone as the server's do.
"""

import argparse
import base64
import http.client
import io
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from hovle_core import HolisticEmbeddingConfig, HovleForConditionalGeneration
from hovle_core.image_processor import HovleImageProcessor
from hovle_core.images import decode_image
from hovle_core.openmp import SPINS, in_passing_thread
from hovle_core.processor import IMAGE_CONTEXT, Encoded, HovleProcessor
from hovle_core.testing import tiny_tokenizer
from hovle_serve.engine import Engine, Request
from hovle_serve.sampling import Sampling

WIDTHS = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
BLOCKS, LAYERS, POSITIONS = 4, 8, 4096
TILE, TOKENS_PER_TILE, MAX_TILES = 224, 64, 4
CONCURRENT = 16
PLAIN, BATCHING = "transformers serve", "transformers serve --continuous-batching"
WORDS = ["this", "is", "what", "a", "red", "blue", "square", "circle", "user", "assistant"]

Body = dict[str, Any]


# ---- models and requests ---------------------------------------------------------------------------------------------


def write_models(folder: Path) -> None:
    """`folder/hovle`, and `folder/llm`: the bare Llama of as many layers."""
    tokenizer = tiny_tokenizer()
    ids = range(len(tokenizer))
    texts = [tokenizer.decode([i], skip_special_tokens=True) for i in ids]
    unsaid = [i for i in ids if not texts[i] or not texts[i].isascii() or not texts[i].isprintable()]

    def llama(layers: int) -> LlamaForCausalLM:
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer), num_hidden_layers=layers, max_position_embeddings=POSITIONS,
                eos_token_id=None, bos_token_id=None, pad_token_id=0, **WIDTHS,
            )
        )  # fmt: skip

    embedding = HolisticEmbeddingConfig(
        vocab_size=len(tokenizer), num_hidden_layers=BLOCKS, image_size=TILE, max_position_embeddings=POSITIONS,
        **WIDTHS,
    )  # fmt: skip
    assert embedding.tokens_per_tile == TOKENS_PER_TILE
    model = HovleForConditionalGeneration.from_language_model(
        llama(LAYERS), embedding, tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT)
    )
    model.generation_config.suppress_tokens = unsaid
    model.save_pretrained(folder / "hovle")
    processor = HovleProcessor(
        HovleImageProcessor(TILE, 1, MAX_TILES), tokenizer, tokens_per_tile=TOKENS_PER_TILE
    )
    processor.save_pretrained(folder / "hovle")
    llama(BLOCKS + LAYERS).save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")


def load_model(path: str) -> HovleForConditionalGeneration:
    return HovleForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()


def picture(rng: random.Random) -> str:
    size = rng.choice([(224, 224), (448, 224), (448, 448), (224, 448)])
    image = Image.effect_noise(size, 60).convert("RGB")
    image.paste(tuple(rng.choices(range(256), k=3)), (10, 10, 90, 90))
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def requests(seed: int, with_pictures: bool) -> list[Body]:
    """16 requests; the first words tell all prompts apart, so that none is another's prefix."""
    rng = random.Random(seed)
    bodies = []
    for i in range(CONCURRENT):
        text = f"{rng.random()} " + " ".join(rng.choices(WORDS, k=rng.randint(10, 120)))
        content: Any = text
        if with_pictures and i % 2:
            content = [
                {"type": "text", "text": text},
                {"type": "image_url", "image_url": {"url": picture(rng)}},
            ]
        bodies.append(
            {"messages": [{"role": "user", "content": content}], "max_tokens": rng.randint(24, 72), "temperature": 0}
        )  # fmt: skip
    return bodies


def encoded(processor: HovleProcessor, body: Body) -> Encoded:
    content = body["messages"][0]["content"]
    if isinstance(content, str):
        return processor.encode([{"role": "user", "content": content}], [], add_generation_prompt=True)
    url = content[1]["image_url"]["url"]
    image = decode_image(base64.b64decode(url.partition(",")[2]))
    messages = [{"role": "user", "content": [content[0], {"type": "image"}]}]
    return processor.encode(messages, [image], add_generation_prompt=True)


# ---- the peers: each answers `bodies` and gives the number of tokens it wrote ----------------------------------------


def one_by_one(
    model: HovleForConditionalGeneration, processor: HovleProcessor, bodies: Sequence[Body]
) -> int:
    tokens = 0
    for body in bodies:
        prompt = encoded(processor, body)
        out = model.generate(
            **processor.batch([prompt]), max_new_tokens=body["max_tokens"], do_sample=False, eos_token_id=None
        )
        tokens += out.shape[1] - len(prompt.input_ids)
    return tokens


def in_engine(model: HovleForConditionalGeneration, processor: HovleProcessor, bodies: Sequence[Body]) -> int:
    """One thread prepares prompts while the first ones are answered, as in the server."""
    ended: SimpleQueue[Any] = SimpleQueue()

    def deliver(piece: Any) -> None:
        if isinstance(piece, Exception) or piece.finish_reason is not None:
            ended.put(piece)

    with Engine(model, processor) as engine:
        for body in bodies:
            engine.submit(Request(encoded(processor, body), Sampling(body["max_tokens"]), deliver))
        pieces = [ended.get() for _ in bodies]
    if failed := [piece for piece in pieces if isinstance(piece, Exception)]:
        raise failed[0]
    return sum(piece.completion_tokens for piece in pieces)


class Served:
    """Streams from a server, 16 at a time; keeps the seconds to the first text and between texts.

    `fields` are sent with every request: OpenAI's servers say on request what they wrote, transformers' always.
    """

    def __init__(self, port: int, model: str, **fields: Any) -> None:
        self.port, self.fields = port, {"model": model, "stream": True, **fields}
        self.first: list[float] = []
        self.between: list[float] = []

    def run(self, bodies: Sequence[Body]) -> int:
        raw = [json.dumps(body | self.fields).encode() for body in bodies]
        with ThreadPoolExecutor(len(raw)) as pool:
            return sum(pool.map(self._ask, raw))

    def _ask(self, body: bytes) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=280)
        last = start = time.perf_counter()
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {response.read()[:500]!r}")
        tokens = 0
        for line in response:
            if b'"content"' in line and b'"content":""' not in line:
                now = time.perf_counter()
                (self.first if last == start else self.between).append(now - last)
                last = now
            if found := re.search(rb'"completion_tokens": ?(\d+)', line):
                tokens = int(found[1])
            if b'"error"' in line:
                raise RuntimeError(line[:500])
        connection.close()
        return tokens


@contextmanager
def server(command: Sequence[str], said: str | None, port: int = 0) -> Iterator[int]:
    """A server's process; its port is read from what it says, or it is up once /health answers."""
    with subprocess.Popen(
        command, stderr=subprocess.PIPE if said else subprocess.DEVNULL, stdout=subprocess.DEVNULL, text=True
    ) as process:
        try:
            if said:
                assert process.stderr is not None
                for line in process.stderr:
                    if found := re.search(said, line):
                        port = int(found[1])
                        break
                threading.Thread(target=process.stderr.read, daemon=True).start()
            deadline = time.monotonic() + 90
            while not healthy(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{' '.join(command)} did not come up")
                time.sleep(0.3)
            yield port
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def in_turns(
    peers: dict[str, Callable[[Sequence[Body]], int]], rounds: int, pictures: bool, until: float
) -> dict[str, list[float]]:
    """Tokens per second of each in every round, whose order turns. One that is not counted warms up."""
    speeds: dict[str, list[float]] = {name: [] for name in peers}
    for run in peers.values():
        run(requests(-1, pictures)[:2])
    names = list(peers)
    for turn in range(rounds):
        if turn and time.monotonic() > until:
            break
        bodies = requests(turn + (100 if pictures else 0), pictures)
        wanted = sum(body["max_tokens"] for body in bodies)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            tokens = peers[name](bodies)
            speeds[name].append(tokens / (time.perf_counter() - start))
            print(
                f"round {turn}: {name} {speeds[name][-1]:.1f} tokens/s, {tokens} of {wanted}", file=sys.stderr
            )
    return speeds


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def percentiles(values: Sequence[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=20)
    return {"p50_ms": round(1e3 * statistics.median(values), 1), "p95_ms": round(1e3 * cuts[-1], 1)}


# ---- together --------------------------------------------------------------------------------------------------------


def against_transformers(folder: Path, ours: Served, rounds: int, until: float) -> dict[str, list[float]]:
    """The same text requests to `hovle serve` and to both modes of `transformers serve` on the bare LLM."""
    path = str(folder / "llm")
    base = [str(Path(sys.executable).with_name("transformers")), "serve", path, "--device", "cpu"]
    base += ["--dtype", "float32", "--host", "127.0.0.1"]
    blocks = ["--continuous-batching", "--cb-num-blocks", "256", "--cb-max-batch-tokens", "512"]
    port = 20_000 + os.getpid() % 10_000
    with (
        server([*base, "--port", str(port)], None, port),
        server([*base, *blocks, "--port", str(port + 1)], None, port + 1),
    ):
        peers = {
            "hovle serve, text": ours.run,
            PLAIN: Served(port, path).run,
            BATCHING: Served(port + 1, path).run,
        }
        return in_turns(peers, rounds, pictures=False, until=until)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--seconds", type=float, default=600)
    arguments.add_argument("--skip-transformers", action="store_true")
    args = arguments.parse_args()
    start = time.monotonic()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        in_passing_thread(lambda: write_models(folder))
        path = str(folder / "hovle")
        model = in_passing_thread(lambda: load_model(path))
        processor = HovleProcessor.from_pretrained(path)
        command = [sys.executable, "-m", "hovle_core.cli", "serve", path, "--port", "0"]
        with server(command, r"serving \S+ on http://127.0.0.1:(\d+)") as port:
            usage = {"stream_options": {"include_usage": True}}
            served = Served(port, "hovle", **usage)
            peers = {
                "generate": lambda bodies: in_passing_thread(lambda: one_by_one(model, processor, bodies)),
                "engine": lambda bodies: in_engine(model, processor, bodies),
                "hovle serve": served.run,
            }
            half = start + args.seconds / 2
            speed = in_turns(peers, args.rounds, pictures=True, until=half)
            if not args.skip_transformers:
                text = Served(port, "hovle", **usage)
                speed |= against_transformers(folder, text, args.rounds, start + args.seconds)
    result: dict[str, Any] = {
        "benchmark": "serve",
        "tokens_per_s": {name: round(statistics.median(values), 1) for name, values in speed.items()},
        "ratio_sequential": round(ratio(speed["hovle serve"], speed["generate"]), 2),
        "stream_overhead": round(1 - ratio(speed["hovle serve"], speed["engine"]), 3),
        "first_text": percentiles(served.first),
        "between_texts": percentiles(served.between),
        "rounds": {name: len(values) for name, values in speed.items()},
        "threads": torch.get_num_threads(),
    }
    for key, peer in (("ratio_transformers_serve", PLAIN), ("ratio_continuous_batching", BATCHING)):
        if peer in speed:
            result[key] = round(ratio(speed["hovle serve, text"], speed[peer]), 2)
    print(json.dumps(result))


if __name__ == "__main__":
    if "GOMP_SPINCOUNT" not in os.environ:  # it is read when torch is imported
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"GOMP_SPINCOUNT": SPINS})
    main()
