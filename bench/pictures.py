"""Takes the README's pictures, of the inspector and of the server's page, with the Chromium of the system.

python -m bench.pictures EVALUATED RUN INDEX

EVALUATED is what `r3jax inspect` takes; RUN and INDEX are what `r3jax serve` takes.
"""

import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile

from playwright.sync_api import sync_playwright

from r3jax import inspect

OUT = pathlib.Path(__file__).parent.parent / "docs" / "img"
QUERY = "list files by size"
SECONDS = 300


def main(evaluated: str, run: str, index: str) -> None:
    OUT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        html = pathlib.Path(folder) / "page.html"
        inspect.main([evaluated, f"--out={html}"])
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 700})
        page.set_default_timeout(1000 * SECONDS)
        page.goto(html.as_uri())
        page.select_option("select[name=order]", "gain")
        for key in ("Escape", "j", "Enter"):  # out of the list, to the first query, open
            page.keyboard.press(key)
        page.evaluate("document.querySelector('.controls').scrollIntoView()")
        page.screenshot(path=OUT / "inspector.png")
        command = [sys.executable, "-m", "r3jax.serve", run, index, "--port=0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                page.goto(server.stdout.readline().split()[-1])
                page.keyboard.type(QUERY)  # the field has the focus
                page.keyboard.press("Enter")
                page.locator("#cost", has_text="ms to search").wait_for()
                page.screenshot(path=OUT / "serve.png")
            finally:
                server.send_signal(signal.SIGTERM)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
