"""docs/images/chat-*.png: the page of `hovle serve RUN` in Chromium, on a desktop's width and a phone's.

python docs/take_screenshots.py runs/demo PICTURE "QUESTION" ["QUESTION" ...]
"""

import shutil
import socket
import sys
import threading
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

from hovle_serve.listener import server
from hovle_serve.serving import ServeConfig, build_app

SIZES = {"desktop": (900, 640), "phone": (360, 640)}
FOLDER = Path(__file__).parent / "images"


def main(run: str, picture: str, *questions: str) -> None:
    http = server(build_app(ServeConfig(model=run)))
    with socket.create_server(("127.0.0.1", 0)) as listener, sync_playwright() as playwright:
        thread = threading.Thread(target=http.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox", "--no-proxy-server"]
            )
            for name, (width, height) in SIZES.items():
                page = browser.new_page(viewport={"width": width, "height": height})
                page.goto(f"http://127.0.0.1:{listener.getsockname()[1]}")
                page.locator("#files").set_input_files(picture)
                for i, question in enumerate(questions):
                    page.locator("#text").fill(question)
                    page.keyboard.press("Enter")
                    expect(page.locator("#log li.assistant small").nth(i)).to_be_visible(timeout=60_000)
                FOLDER.mkdir(exist_ok=True)
                page.screenshot(path=FOLDER / f"chat-{name}.png")
                print(page.locator("#log").inner_text())
            browser.close()
        finally:
            http.should_exit = True
            thread.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
