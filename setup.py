"""What is compiled: smolvla_fast._cpu everywhere, smolvla_fast._cuda for the NVIDIA GPUs that are here, or as asked.

csrc/ninja_build.py says how. A compiler that is missing or fails never stops an installation: the package
works without either extension, and `smolvla-fast doctor` reads the reason in smolvla_fast/_build.json.
"""

import json
import shutil
import sys
import sysconfig
import time
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, "csrc")
from ninja_build import CUDA_ARCHS, NotAsked, compile_extension

SOURCES = {
    "cpu": ["csrc/bindings.cpp", *sorted(glob("csrc/cpu/*.cpp"))],
    "cuda": ["csrc/bindings_cuda.cpp", *sorted(glob("csrc/cuda/*.cu"))],
}
DEPENDS = [p for p in sorted(glob("csrc/**", recursive=True)) if p.endswith((".h", ".cuh", ".py"))]


def kind_of(extension):
    return extension.name.rpartition("_")[2]


class NinjaBuild(build_ext):
    only_option = ("only=", None, "cpu or cuda: fail without it, leave the other as it is")
    user_options = build_ext.user_options + [only_option]  # noqa: RUF005

    def initialize_options(self):
        super().initialize_options()
        self.only = None

    def run(self):
        self.record = {}
        if self.only:
            self.extensions = [ext for ext in self.extensions if kind_of(ext) == self.only]
        folder = Path("smolvla_fast" if self.inplace else Path(self.build_lib, "smolvla_fast"))
        path = folder / "_build.json"
        before = json.loads(path.read_text()) if path.exists() and self.inplace else {}
        # A checkout that has it keeps it, for what it was asked for, when something else is compiled anew there.
        self.without_gpu = CUDA_ARCHS if self.only == "cuda" else before.get("cuda", {}).get("archs", [])
        super().run()
        # What was not built must not be looked for by the later steps of an installation.
        self.extensions = [ext for ext in self.extensions if self.record[kind_of(ext)]["built"]]
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**(before if self.only else {}), **self.record}, indent=1) + "\n")
        if self.only:
            self.report(self.only)

    def report(self, kind):
        facts = self.record.get(kind, {"built": False, "reason": "no such extension; there are cpu and cuda"})
        if not facts["built"]:
            raise SystemExit(f"smolvla_fast._{kind} was not compiled: {facts['reason']}")
        for_whom = f" for sm_{', sm_'.join(facts['archs'])} and as PTX" if "archs" in facts else ""
        print(f"Compiled smolvla_fast._{kind}{for_whom} in {facts['seconds']} s ({facts['compiler']}).")

    def build_extension(self, ext):
        kind, target = kind_of(ext), Path(self.get_ext_fullpath(ext.name))
        work = Path("build", "ninja", f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}", kind)
        target.unlink(missing_ok=True)  # one left by an earlier build must not be shipped if this one fails
        start = time.perf_counter()
        try:
            facts = compile_extension(kind, ext.sources, work / target.name, work, self.without_gpu)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(work / target.name, target)
        except NotAsked as reason:
            self.record[kind] = {"built": False, "reason": f"{reason}"}
            self.announce(f"smolvla_fast._{kind} is left out: {reason}")
        except Exception as error:  # whatever it is, it must not cost the user the package
            self.record[kind] = {"built": False, "reason": f"{error}"}
            self.warn(f"smolvla_fast._{kind} is left out, everything else works: {error}")
        else:
            self.record[kind] = {"built": True, "seconds": round(time.perf_counter() - start, 1), **facts}


extensions = [Extension(f"smolvla_fast._{k}", s, depends=DEPENDS, optional=True) for k, s in SOURCES.items()]
setup(ext_modules=extensions, cmdclass={"build_ext": NinjaBuild})
