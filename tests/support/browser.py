"""Pages in a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

needs_chromium = pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium (apt-get install chromium)")


def browse(page, tmp_path, *options):
    """Return the markup that headless Chromium makes of a page, and the lines of its console."""
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    command += ["--enable-logging=stderr", "--hide-scrollbars", *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=450, check=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def title_of(dom):
    found = re.search(r"<title>(.*?)</title>", dom, re.S)  # the first one: drawings have titles too
    assert found
    return found[1]
