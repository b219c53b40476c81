"""`make demo` and `make test`: what each installs, and that the size of a download is said before it begins."""

from __future__ import annotations

import base64
import hashlib
import os
import socket
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import install
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("goals", "extras"),
    [
        ("demo", ["lerobot cli"]),
        ("test", ["lerobot dev"]),
        ("venv", ["lerobot dev"]),
        ("lint", ["lerobot dev"]),
    ],
)
def test_a_goal_installs_its_extras(tmp_path: Path, goals: str, extras: list[str]) -> None:
    command = ["make", "-n", f"VENV={tmp_path / 'venv'}", *goals.split()]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True)
    lines = [line for line in done.stdout.splitlines() if "scripts/install.py" in line]
    assert [line.partition("scripts/install.py ")[2] for line in lines] == extras
    metadata = (ROOT / "pyproject.toml").read_text()
    assert all(f"\n{name} = [" in metadata for words in extras for name in words.split())


def test_the_size_of_a_download_is_what_its_server_tells(tmp_path: Path) -> None:
    (tmp_path / "leaf.whl").write_bytes(b"x" * 1234)
    item = {"download_info": {"url": (tmp_path / "leaf.whl").as_uri()}}
    assert install.size_of(item) == 1234
    item["download_info"]["url"] = (tmp_path / "none.whl").as_uri()
    assert install.size_of(item) is None


def test_a_server_that_answers_no_http_tells_no_size() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:

        def answer() -> None:
            with server.accept()[0] as asked:
                asked.recv(4096)
                asked.sendall(b"nonsense\r\n\r\n")

        answered = pool.submit(answer)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/leaf.whl"
        assert install.size_of({"download_info": {"url": url}}) is None
        answered.result()


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (
            {"torch": 530_700_000, "nvidia-cublas": 423_100_000, "rich": 300_000},
            "Downloading 0.95 GB in 3 packages, less what pip has cached: torch 0.53, nvidia-cublas 0.42. "
            "torch brings its CUDA libraries with or without a GPU.",
        ),
        ({"torch": 190_000_000}, "Downloading 0.19 GB in 1 packages, less what pip has cached: torch 0.19."),
        (
            {"rich": 3e6, "own": None},
            "Downloading 0.00 GB in 2 packages, less what pip has cached, without 1 whose server tells no size.",
        ),
    ],
)
def test_the_announcement_adds_up(sizes: dict[str, int | None], words: str) -> None:
    assert install.announcement(sizes) == words


def wheel(folder: Path, name: str) -> None:
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": "here = True\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    digests = {
        path: base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        for path, text in files.items()
    }
    lines = [f"{path},sha256={digests[path]},{len(text)}" for path, text in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*lines, f"{info}/RECORD,,"]) + "\n"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)


def test_what_is_missing_is_announced_then_installed_and_nothing_the_second_time(tmp_path: Path) -> None:
    """A project of the same make with one dependency, by pip itself, in an environment of its own."""
    project, wheels = tmp_path / "project", tmp_path / "wheels"
    for folder in (project / "scripts", project / "trunk", wheels):
        folder.mkdir(parents=True)
    (project / "scripts" / "install.py").write_text((ROOT / "scripts" / "install.py").read_text())
    (project / "trunk" / "__init__.py").write_text("")
    (project / "setup.py").write_text("from setuptools import setup\nsetup()\n")
    (project / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "trunk"\nversion = "1.0"\n'
        'optional-dependencies = { first = ["leaf"] }\n[tool.setuptools]\npackages = ["trunk"]\n'
    )
    wheel(wheels, "leaf")
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    # pip and setuptools of the environment that tests run in, and no index.
    environment = {
        **os.environ, "PYTHONPATH": sysconfig.get_path("purelib"), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)
    }  # fmt: skip

    def run(*extras: str) -> str:
        done = subprocess.run(
            [python, project / "scripts" / "install.py", *extras],
            env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        return done.stdout

    assert "Downloading 0.00 GB in 1 packages" in run("first")
    assert "Downloading" not in run("first")
    code = "import leaf, trunk; print(trunk.__file__)"
    environment.pop("PYTHONPATH")
    found = subprocess.run(
        [python, "-c", code], env=environment, text=True, capture_output=True, cwd=tmp_path
    )
    assert found.stdout.strip() == str(project / "trunk" / "__init__.py"), found.stderr


def test_a_download_that_fails_ends_the_compile(tmp_path: Path) -> None:
    """Of a source release that tells its metadata and cannot be built, beside a compile of minutes."""
    leaf = tmp_path / "leaf-1.0"
    (tmp_path / "scripts").mkdir()
    leaf.mkdir()
    (tmp_path / "scripts" / "install.py").write_text((ROOT / "scripts" / "install.py").read_text())
    (leaf / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: leaf\nVersion: 1.0\n")
    (leaf / "setup.py").write_text(
        "import sys\nfrom setuptools import setup\n"
        "if 'bdist_wheel' in sys.argv: sys.exit('no wheel of leaf')\nsetup(name='leaf', version='1.0')\n"
    )
    (tmp_path / "setup.py").write_text(
        "import subprocess, sys\nfrom setuptools import setup\n"
        "if 'build_ext' in sys.argv: subprocess.run(['sleep', '300'])\nsetup(packages=[])\n"
    )
    (tmp_path / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "trunk"\nversion = "1.0"\noptional-dependencies = { first = ["leaf"] }\n'
    )
    with tarfile.open(tmp_path / "leaf-1.0.tar.gz", "w:gz") as archive:
        archive.add(leaf, "leaf-1.0")
    done = subprocess.run(
        [sys.executable, tmp_path / "scripts" / "install.py", "first"], timeout=120,
        env={**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}, text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 1 and "no wheel of leaf" in done.stderr, done.stderr
    assert "Downloading 0.00 GB in 1 packages" in done.stdout


def test_a_release_that_is_nowhere_is_pips_own_message(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "install.py").write_text((ROOT / "scripts" / "install.py").read_text())
    (tmp_path / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "trunk"\nversion = "1.0"\noptional-dependencies = { first = ["no-such-leaf-anywhere"] }\n'
    )
    done = subprocess.run(
        [sys.executable, tmp_path / "scripts" / "install.py", "first"],
        env={**os.environ, "PIP_NO_INDEX": "1"}, text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 1 and "no-such-leaf-anywhere" in done.stderr and "Traceback" not in done.stderr
