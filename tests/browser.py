"""Chromium for the tests of the page: the system's, or the one that playwright installed."""

import contextlib
import shutil

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class NoBrowserError(Exception):
    """There is none; the message says what to install."""


@contextlib.contextmanager
def chromium():
    """Yield a headless Chromium.

    Raises:
        NoBrowserError: if playwright or a Chromium is missing.
    """
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError as error:
        raise NoBrowserError("playwright is not installed; install the extra `browser`") from error
    with sync_playwright() as playwright:
        path = next(filter(None, map(shutil.which, NAMES)), None)
        try:
            browser = playwright.chromium.launch(executable_path=path)
        except Error as error:
            first = str(error).splitlines()[0]
            raise NoBrowserError(
                f"no Chromium starts ({first}); install one, or `playwright install chromium`"
            ) from error
        with contextlib.closing(browser):
            yield browser
