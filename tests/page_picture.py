"""Make ``docs/images/server-page.png``: the built-in page of a real server, under load, with a question asked.

    python tests/page_picture.py

Starts ``serve.api`` with SmolLM2 and three random adapters in a temporary directory on a free port, sends it requests
in bursts for a while, and takes the picture with Chromium. It needs the extras ``serve`` and ``browser``.
"""

import argparse
import asyncio
import contextlib
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import browser
import httpx
import jax

import preft_jax

ROOT = Path(__file__).parent.parent
ADAPTERS = {
    "ann": preft_jax.AdapterConfig(rank=16),
    "ben": preft_jax.AdapterConfig(kind="loreft", rank=8),
    "eva": preft_jax.AdapterConfig(kind="direft", rank=32),
}
STRENGTH = 0.3
QUESTION = "Why is the sky blue?"
WORDS = ["rivers", "mountains", "trains", "letters", "planets", "bridges", "gardens", "clocks"]


def make_adapters(root: Path) -> None:
    """Save the adapters; random ones say something else than the base model, and nothing wiser."""
    model = preft_jax.load_model("smollm2-135m")
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        adapter = preft_jax.random_adapter(config, model.config, jax.random.key(seed), strength=STRENGTH)
        preft_jax.save_adapter(root / name, adapter)


@contextlib.contextmanager
def server(adapters: Path):
    """Run the server on a free port; yields its address when it is ready."""
    command = [sys.executable, "-m", "serve.api", "--port", "0", "--adapter-dir", str(adapters), "--max-num-seqs", "8"]
    log = adapters.with_name("log")  # A file: a pipe that nobody reads fills, and the server would wait for its reader.
    with log.open("w") as stream:
        process = subprocess.Popen(command, stderr=stream, cwd=ROOT)
    try:
        while not (found := re.search(r'"url": "([^"]+)"', log.read_text())):
            if process.poll() is not None:
                raise SystemExit(f"the server did not start: {log.read_text()}")
            time.sleep(0.2)
        with httpx.Client(base_url=found[1], trust_env=False) as client:
            while client.get("/ready").status_code != 200:
                time.sleep(0.5)
        yield found[1]
    finally:
        process.terminate()
        process.wait()


async def load(url: str, seconds: float) -> None:
    """Send bursts of chats, with every model in turn."""
    models = ["smollm2-135m", *ADAPTERS]
    ends = time.monotonic() + seconds
    async with httpx.AsyncClient(base_url=url, timeout=300, trust_env=False) as client:
        burst = 0
        while time.monotonic() < ends:
            burst += 1
            chats = [
                {
                    "model": models[i % len(models)],
                    "messages": [{"role": "user", "content": f"Tell me something about {WORDS[(i + burst) % 8]}."}],
                    "max_tokens": 16 + 16 * (i % 3),
                }
                for i in range((4, 14, 8)[burst % 3])
            ]
            await asyncio.gather(*(client.post("/v1/chat/completions", json=chat) for chat in chats))
            await asyncio.sleep(3)


def picture(url: str, path: Path, scheme: str, load_seconds: float) -> None:
    """Look at the page while it is loaded, ask two adapters as well, and take the picture when both have answered."""
    others = threading.Thread(target=lambda: asyncio.run(load(url, load_seconds)))
    with browser.chromium() as chromium:
        page = chromium.new_page(viewport={"width": 1440, "height": 900}, color_scheme=scheme)
        page.set_default_timeout(300_000)
        page.goto(url)
        page.locator("#right option[value=ben]").wait_for(state="attached")
        page.select_option("#left", "ann")
        page.select_option("#right", "ben")
        others.start()
        page.wait_for_timeout(1000 * max(0, load_seconds - 20))
        page.fill("#max-tokens", "80")
        page.fill("#text", QUESTION)
        page.press("#text", "Enter")
        for side in ("left", "right"):
            page.locator(f"#{side}-talk .note").wait_for()
        page.screenshot(path=path)
        others.join()


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images" / "server-page.png")
    parser.add_argument("--scheme", choices=("light", "dark"), default="light", help="default: %(default)s")
    parser.add_argument("--load-seconds", type=float, default=120, help="default: %(default)s")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        adapters = Path(directory) / "adapters"
        make_adapters(adapters)
        with server(adapters) as url:
            picture(url, args.output, args.scheme, args.load_seconds)


if __name__ == "__main__":
    main()
