"""Soak: 10,000 requests to a tiny model over HTTP, a third of which hang up at a random moment; does anything stay?

Many clients at once ask with and without pictures, streamed or whole, and hang up before the answer, within it, or not
at all. Measured from outside: the server's memory after each tenth of the requests, requests that are still in its
queue or batch at the end, open files, and that the last requests are answered as the first ones were. `--requests N`.
"""

import argparse
import base64
import io
import json
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
from PIL import Image

from hovle_core.testing import tiny_hovle, tiny_processor, tiny_tokenizer

CLIENTS = 24
HANG_UP = 1 / 3


def write_model(folder: Path) -> None:
    processor = tiny_processor(tiny_tokenizer())
    tiny_hovle(processor.tokenizer).save_pretrained(folder)
    processor.save_pretrained(folder)


def picture(rng: random.Random) -> str:
    file = io.BytesIO()
    image = Image.new(
        "RGB", rng.choice([(60, 60), (120, 60), (200, 200)]), tuple(rng.choices(range(256), k=3))
    )
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def request(rng: random.Random, model: str) -> bytes:
    parts: list[dict[str, Any]] = [{"type": "text", "text": "word " * rng.randrange(1, 20)}]
    if rng.random() < 0.4:
        parts.append({"type": "image_url", "image_url": {"url": picture(rng)}})
    body = {
        "model": model, "messages": [{"role": "user", "content": parts}], "max_tokens": rng.choice([1, 4, 8, 16, 60]),
        "stream": rng.random() < 0.6, "temperature": rng.choice([0, 1]), "n": rng.choice([1, 1, 1, 1, 2]),
    }  # fmt: skip
    return json.dumps(body).encode()


def ask(port: int, body: bytes, patience: float | None) -> str:
    """The answer, and "" if we hung up `patience` seconds after asking; "busy" if there was no room."""
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
        "Content-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    until = None if patience is None else time.monotonic() + patience
    with socket.create_connection(("127.0.0.1", port), timeout=120) as connection:
        connection.sendall(head.encode() + body)
        got = b""
        while True:
            if until is not None:
                if (left := until - time.monotonic()) <= 0:
                    return ""
                connection.settimeout(left)
            try:
                piece = connection.recv(65536)
            except TimeoutError:
                if until is None:
                    raise
                return ""
            if not piece:
                break
            got += piece
    status = int(got[9:12])
    if status == 429:
        return "busy"
    if status != 200 or not (b"data: [DONE]" in got or b'"usage"' in got):
        raise RuntimeError(got[:2000])
    return "answered"


def metrics(port: int) -> dict[str, float]:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        text = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
    return {name: float(value) for name, value in re.findall(r"^(hovle_\w+) (\S+)$", text, re.M)}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--requests", type=int, default=10_000)
    count = arguments.parse_args().requests
    outcomes: dict[str, int] = {"answered": 0, "": 0, "busy": 0}
    lock = threading.Lock()
    with tempfile.TemporaryDirectory() as name:
        write_model(Path(name) / "tiny")
        command = [sys.executable, "-m", "hovle_core.cli", "serve", str(Path(name) / "tiny"), "--port", "0"]
        with subprocess.Popen([*command, "--max-batch", "16"], stderr=subprocess.PIPE, text=True) as process:
            try:
                assert process.stderr is not None
                port = next(
                    int(m[1]) for line in process.stderr if (m := re.search(r"http://\S+:(\d+)", line))
                )
                said: list[str] = []
                reader = threading.Thread(target=lambda: said.extend(process.stderr or []), daemon=True)
                reader.start()
                server = psutil.Process(process.pid)

                def one(i: int) -> None:
                    rng = random.Random(i)
                    body = request(rng, "tiny")
                    patience = rng.expovariate(10) if rng.random() < HANG_UP else None
                    while (outcome := ask(port, body, patience)) == "busy":
                        with lock:
                            outcomes["busy"] += 1
                        time.sleep(rng.random())
                    with lock:
                        outcomes[outcome] += 1

                memory, seconds = [], []
                with ThreadPoolExecutor(CLIENTS) as pool:
                    for tenth in range(10):
                        start = time.perf_counter()
                        list(pool.map(one, range(tenth * count // 10, (tenth + 1) * count // 10)))
                        seconds.append(time.perf_counter() - start)
                        memory.append(server.memory_info().rss)
                        print(f"{tenth + 1}0 %: {memory[-1] >> 20} MiB, {seconds[-1]:.1f} s", file=sys.stderr)
                time.sleep(1)
                left = metrics(port)
                files = server.num_fds()
            finally:
                process.terminate()
            reader.join()  # before its file is closed
    result = {
        "benchmark": "serve_soak",
        "requests": count,
        "answered": outcomes["answered"],
        "hung_up": outcomes[""],
        "told_to_come_back": outcomes["busy"],
        "stuck": int(left["hovle_active_requests"] + left["hovle_waiting_requests"]),
        "cached_tokens_left": int(left["hovle_cached_tokens"]),
        "open_files": files,
        "memory_MiB": [m >> 20 for m in memory],
        # Of the second half over the second tenth: caches fill in the first.
        "memory_growth": round(statistics.median(memory[5:]) / memory[1] - 1, 3),
        "lines_logged": len(said),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
