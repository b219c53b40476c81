"""`make demo`, `make test`: smolvla_fast and its EXTRAS into the environment of the Python that runs this, editable.

    python scripts/install.py lerobot cli

pip chooses every release first and downloads nothing, so the size of the download is known before it begins; the extensions
are compiled meanwhile.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

ROOT = Path(__file__).resolve().parent.parent
PIP = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-input"]
# Not isolated: a change in csrc/ then recompiles what it touches, and downloads nothing.
BUILD = ["--no-build-isolation"]
LARGE = 100e6
"""Bytes from which on a package is named."""


def main(*extras: str) -> int:
    try:
        # A session of its own, so that its compilers can be ended with it.
        build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        compiler = subprocess.Popen(build, cwd=ROOT, start_new_session=True)
        try:
            if missing := resolve(f"{ROOT}[{','.join(extras)}]"):
                names = [item["metadata"]["name"] for item in missing]
                with ThreadPoolExecutor(16) as pool:
                    print(announcement(dict(zip(names, pool.map(size_of, missing), strict=True))), flush=True)
                pinned = ["{name}=={version}".format(**item["metadata"]) for item in missing]
                pip(*BUILD, "--no-deps", *pinned)
        except BaseException:
            with suppress(OSError):  # it may have ended
                os.killpg(compiler.pid, signal.SIGTERM)
            raise
        finally:
            compiler.wait()
        print("Installing smolvla_fast.", flush=True)
        # The extensions are there by now: their objects are only looked through.
        pip(*BUILD, "--no-deps", "-e", str(ROOT))
    except subprocess.CalledProcessError as failed:
        print(f"pip ended with status {failed.returncode}; its reason stands above", file=sys.stderr)
        return 1
    return 0


def pip(*arguments: str) -> None:
    subprocess.run([*PIP, *arguments], check=True)


def resolve(project: str) -> list[dict[str, Any]]:
    """What pip would install besides the project: items of its report, without those that are here already."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        wanted = ["--dry-run", "--report", str(report), *BUILD, "-e", project]
        # From an index without separate metadata pip else downloads whole wheels to read what they need.
        if subprocess.run([*PIP, "--use-feature=fast-deps", *wanted], stderr=subprocess.DEVNULL).returncode:
            pip(*wanted)
        found = json.loads(report.read_text())["install"]
    return [item for item in found if "dir_info" not in item["download_info"]]


def size_of(item: dict[str, Any]) -> int | None:
    """Bytes of a package as its server tells; None where it does not."""
    try:
        with urlopen(Request(item["download_info"]["url"], method="HEAD"), timeout=10) as answer:
            return int(answer.headers["Content-Length"])
    except (OSError, HTTPException, TypeError, ValueError):
        return None


def announcement(sizes: dict[str, int | None]) -> str:
    known = sorted(((size, name) for name, size in sizes.items() if size is not None), reverse=True)
    total, unknown = sum(size for size, _ in known) / 1e9, len(sizes) - len(known)
    said = f"Downloading {total:.2f} GB in {len(sizes)} packages, less what pip has cached"
    said += f", without {unknown} whose server tells no size" if unknown else ""
    large = ", ".join(f"{name} {size / 1e9:.2f}" for size, name in known if size >= LARGE)
    said += f": {large}" if large else ""
    cuda = any(name.startswith("nvidia-") for name in sizes)
    return said + ". torch brings its CUDA libraries with or without a GPU" * cuda + "."


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
