"""Builds the native code. Environment variables:

REG_KERNELS_BUILD      auto (default): the CPU kernels, and CUDA's as below; none: no compiler is
                       called, the package runs its Triton and reference implementations.
REG_KERNELS_CUDA       auto (default): build the CUDA kernels where nvcc is found and torch is a
                       CUDA build; 1: build them or fail; 0: leave them out.
REG_KERNELS_CUDA_ARCH  compute capabilities, "80;90;100" by default; "native": this machine's GPU.
REG_KERNELS_ISA        all (default): the CPU kernels for each instruction set, the best of which is
                       chosen when they are loaded; native: for this machine's best alone, in
                       less than half the time; or the name of one of them.
REG_KERNELS_SANITIZE   1: the CPU kernels under ASan and UBSan, in a build folder of their own, and
                       no CUDA, for `make test-sanitized`; whoever imports them preloads libasan.
REG_KERNELS_LOCAL      what the version ends with behind a plus, as cu130, for wheels of another
                       content under the same version.
CXX, NVCC, MAX_JOBS    the compilers (g++, nvcc) and how many run at once (2).

What is built, in reg_kernels/, serves Python 3.11 and torch 2.11 and what comes after either:

libreg_kernels_cpu.so   the CPU kernels, and libreg_kernels_cuda.so those for GPUs, which is loaded
                        only where torch has CUDA: LibTorch's stable ABI, no Python
libreg_kernels.so       the ops' declarations for programs without Python; it loads the CPU kernels
_C.abi3.so              what is asked of Python's objects: Python's limited interface

What was built, and why something was not, is written to reg_kernels/_build.json, which
`reg-kernels info` reads.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
OLDEST_TORCH = "2.11"
TORCH_TARGET = "0x020b000000000000"  # the same
PYTHON_TARGET = "0x030B0000"  # 3.11, the oldest Python
CUDA_ARCHITECTURES = "80;90;100"
LIBRARY, CPU_LIBRARY, CUDA_LIBRARY = (f"libreg_kernels{part}.so" for part in ("", "_cpu", "_cuda"))
EXTENSION = "_C.abi3.so"

CXX_FLAGS = [
    *("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
    # The same bits from every instruction set: no multiply-add that only some of them have.
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd"),
    # g++ 12 finds its own AVX-512 header at fault.
    "-Wno-maybe-uninitialized",
    "-Wno-psabi",  # vector types are passed between inlined functions alone
]
# The instruction sets of each architecture, which the compiler's own macro tells, the least capable
# one first; csrc/cpu/isa.h names the same.
ISA_FLAGS = {
    "__x86_64__": {
        "baseline": [],
        "avx2": ["-march=x86-64-v3"],
        "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    },
    "__aarch64__": {"neon": []},
}
# What either finds ends the process. Of UBSan's checks without those that ASan or the entries make
# as well, and for this machine's instruction set alone: the compiler takes an hour for all of them.
SANITIZE_FLAGS = [
    *("-O1", "-g1", "-fno-omit-frame-pointer"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "-fno-sanitize=null,alignment,object-size,vptr,returns-nonnull-attribute",
]
NVCC_FLAGS = ["-std=c++20", "-O3", "--threads", "2", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


def fail(message):
    raise SystemExit(f"reg_kernels: {message}")


def setting(name, default, allowed):
    value = os.environ.get(name, default)
    if value not in allowed:
        fail(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def is_left_out():
    return setting("REG_KERNELS_BUILD", "auto", ("auto", "none")) == "none"


def is_sanitized():
    return setting("REG_KERNELS_SANITIZE", "0", ("0", "1")) == "1"


def import_torch():
    try:
        import torch
        import torch.utils.cpp_extension
    except ImportError as error:
        fail(
            f"the build needs an installed torch ({error}): install torch, then "
            "`pip install --no-build-isolation .`, or set REG_KERNELS_BUILD=none"
        )
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < tuple(map(int, OLDEST_TORCH.split("."))):
        fail(f"torch {OLDEST_TORCH} or later is needed, found {torch.__version__}")
    return torch


def import_ninja():
    try:
        from ninja import ninja_syntax
    except ImportError:
        fail(
            "the Python package ninja is missing, which runs the compilers; a program of that name "
            "on PATH does not do: `pip install ninja`"
        )
    return ninja_syntax


def find_compiler():
    name = os.environ.get("CXX", "g++")
    if shutil.which(name.split()[0]) is None:
        fail(
            f"no C++ compiler: {name!r} was not found; install g++ (or set CXX), or set "
            "REG_KERNELS_BUILD=none to do without native kernels"
        )
    return name


def instruction_sets(compiler):
    """{instruction set that the CPU kernels are built for: the compiler's options}, and what there
    is to say of it, or None."""

    def macros(*options):
        """What the compiler takes to be there."""
        command = [*compiler.split(), *options, "-dM", "-E", "-x", "c++", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            fail(f"CXX must be a C++ compiler as g++ is, got {compiler!r}: {done.stderr.strip()}")
        return {line.split()[1] for line in done.stdout.splitlines()}

    target = macros()
    known = [isas for architecture, isas in ISA_FLAGS.items() if architecture in target]
    if not known:
        names = " and ".join(architecture.strip("_") for architecture in ISA_FLAGS)
        return {"baseline": []}, (
            f"portable code alone: {compiler} compiles for none of the architectures whose "
            f"instruction sets are known ({names})"
        )
    isas = known[0]
    wanted = setting("REG_KERNELS_ISA", "all", ("all", "native", *isas))
    if wanted in isas:
        return {wanted: isas[wanted]}, None
    if (wanted == "all" and not is_sanitized()) or len(isas) == 1:
        return isas, None

    def features(*options):
        pattern = r"__(AVX|BMI|F16C|FMA|LZCNT|MOVBE).*__"
        return {word for word in macros(*options) if re.fullmatch(pattern, word)}

    here = features("-march=native")
    best = [isa for isa, flags in isas.items() if features(*flags) <= here][-1]
    return {best: isas[best]}, None


def find_nvcc(torch):
    """Path of nvcc and None, or None and why the CUDA kernels are left out."""
    wanted = setting("REG_KERNELS_CUDA", "auto", ("auto", "0", "1"))
    if is_sanitized():
        return None, "left out by REG_KERNELS_SANITIZE=1"
    if wanted == "0":
        return None, "this build leaves CUDA out (REG_KERNELS_CUDA=0)"
    if wanted == "auto" and torch.version.cuda is None:
        return None, "torch is a CPU build (REG_KERNELS_CUDA=1 builds them all the same)"
    name = os.environ.get("NVCC", "nvcc")
    nvcc = shutil.which(name)
    if nvcc is None and torch.utils.cpp_extension.CUDA_HOME:
        nvcc = shutil.which(str(Path(torch.utils.cpp_extension.CUDA_HOME) / "bin" / "nvcc"))
    if nvcc is None:
        if wanted == "1":
            fail(
                f"REG_KERNELS_CUDA=1, but {name!r} was not found: install the CUDA toolkit and put "
                "nvcc on PATH (or set NVCC), or unset REG_KERNELS_CUDA"
            )
        return None, "nvcc was not found when reg_kernels was installed"
    return nvcc, None


def cuda_architectures(torch):
    value = os.environ.get("REG_KERNELS_CUDA_ARCH", CUDA_ARCHITECTURES)
    if value == "native":
        if not torch.cuda.is_available():
            fail("REG_KERNELS_CUDA_ARCH=native, but torch sees no GPU: name an architecture, as 90")
        value = "{}{}".format(*torch.cuda.get_device_capability())
    architectures = value.replace(".", "").split(";")
    if not all(a.isdigit() for a in architectures):
        fail(
            f"REG_KERNELS_CUDA_ARCH must be like {CUDA_ARCHITECTURES!r} or 'native', got {value!r}"
        )
    return architectures


def compilations(folder, pattern):
    """(source, name, options) of what is compiled. Of a family of ops the sources <family>.* are,
    once for each op, with its header, include/reg_kernels/<family>/<op>.h, before them."""
    for source in sorted((CSRC / folder).glob(pattern)):
        family, *rest = source.stem.split(".")
        ops = sorted((CSRC / "include" / "reg_kernels" / family).glob("*.h"))
        for op in ops:
            yield source, ".".join([folder, op.stem, *rest]), ["-include", op]
        if not ops:
            yield source, f"{folder}.{source.stem}", []


def build_folder(torch):
    """Where ninja's file and the objects lie."""
    name = f"{sys.implementation.cache_tag}-torch{torch.__version__}"
    return ROOT / "build" / (name + ("-sanitized" if is_sanitized() else ""))


def quoted(words):
    """For ninja's file, whose commands a shell reads."""
    return " ".join(f"'{word}'" if {*" $"} & {*str(word)} else str(word) for word in words)


def write_ninja(path, torch, compiler, isas, nvcc, package):
    """One file for ninja: it rebuilds what changed, headers included."""
    ninja_syntax = import_ninja()
    torch_root = Path(torch.__file__).parent
    torch_includes = torch.utils.cpp_extension.include_paths()
    flags = [f"-I{CSRC}", f"-I{CSRC / 'include'}"]
    for directory in torch_includes:
        flags += ["-isystem", directory]
    flags += [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    sanitize = SANITIZE_FLAGS if is_sanitized() else []
    python = [
        *("-isystem", sysconfig.get_path("include"), f"-DPy_LIMITED_API={PYTHON_TARGET}"),
        f'-DRK_COMPILER=\\"{Path(compiler).name}\\"',
        f'-DRK_TORCH_VERSION=\\"{torch.__version__}\\"',
    ]
    # One of the libraries finds another beside it, wherever the package lies.
    beside = ["-Wl,-rpath,$$ORIGIN", "-Wl,--no-as-needed"]

    # Moved into place when whole: another process may be reading it.
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    with fresh.open("w") as file:
        ninja = ninja_syntax.Writer(file)
        ninja.variable("builddir", path.parent)
        ninja.rule(
            "cxx",
            f"{compiler} -MMD -MF $out.d {quoted([*CXX_FLAGS, *sanitize, *flags])} "
            "$flags -c $in -o $out",
            depfile="$out.d",
            deps="gcc",
            description="CXX $out",
        )
        ninja.rule(
            "link", f"{compiler} -shared $flags $in -o $out $libraries", description="LINK $out"
        )
        libtorch = f"-L{torch_root / 'lib'}"

        def compile_cxx(source, name, *options):
            target = str(path.parent / f"{name}.o")
            ninja.build(target, "cxx", str(source), variables={"flags": quoted(options)})
            return target

        def link(name, *inputs, options=()):
            """Of objects, and of libraries of this package that it needs."""
            target = str(package / name)
            flags = [f"-Wl,-soname,{name}", *options, *sanitize]
            words = {"flags": quoted(flags), "libraries": f"{libtorch} -ltorch_cpu"}
            ninja.build(target, "link", list(inputs), variables=words)
            return target

        objects = []
        for source, name, of_op in compilations("cpu", "*.cpp"):
            if source.name.endswith(".simd.cpp"):
                for isa, options in isas.items():
                    options = [*of_op, *options, f"-DRK_ISA={isa}"]
                    objects.append(compile_cxx(source, f"{name}.{isa}", *options))
            elif source.stem == "isa":
                of_op = [f"-DRK_BUILT_ISAS={','.join(isas)}"]
                objects.append(compile_cxx(source, name, *of_op))
            else:
                objects.append(compile_cxx(source, name, *of_op))
        cpu = link(CPU_LIBRARY, *objects)
        schemas = compile_cxx(CSRC / "schemas.cpp", "schemas")
        link(LIBRARY, schemas, cpu, options=beside)
        objects = [
            compile_cxx(source, f"python.{source.stem}", *python)
            for source in sorted((CSRC / "python").glob("*.cpp"))
        ]
        link(EXTENSION, *objects, cpu, options=beside)

        if nvcc:
            targets = cuda_architectures(torch)
            options = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in targets]
            # The newest one's PTX as well: a later GPU compiles that when it loads the library.
            options.append(f"-gencode=arch=compute_{targets[-1]},code=compute_{targets[-1]}")
            ninja.rule(
                "nvcc",
                f"{nvcc} -MD -MF $out.d {quoted(NVCC_FLAGS + options + flags)} -DUSE_CUDA "
                "$of_op -c $in -o $out",
                depfile="$out.d",
                deps="gcc",
                description="NVCC $out",
            )
            ninja.rule(
                "link_cuda",
                f"{nvcc} -shared -cudart shared $in -o $out $flags",
                description="LINK $out",
            )
            cuda_objects = []
            for source, name, of_op in compilations("cuda", "*.cu"):
                target = str(path.parent / f"{name}.o")
                ninja.build(target, "nvcc", str(source), variables={"of_op": quoted(of_op)})
                cuda_objects.append(target)
            # The stream comes from libtorch_cuda, which libtorch brings along where there is one:
            # it stays a dependency although a CPU torch, enough to build against, lacks it.
            libraries = ["-Xlinker", "--no-as-needed", libtorch, "-ltorch", "-ltorch_cpu", "-lc10"]
            flags = {"flags": quoted(libraries)}
            ninja.build(str(package / CUDA_LIBRARY), "link_cuda", cuda_objects, variables=flags)
    fresh.replace(path)


def jobs():
    """How many compilations run at once."""
    value = os.environ.get("MAX_JOBS", "2")
    if not value.isdecimal() or int(value) < 1:
        fail(f"MAX_JOBS must be a number from 1 on, got {value!r}")
    return int(value)


class Build(build_ext):
    """Compiles csrc/ by ninja and writes down what it built."""

    def run(self):
        package = ROOT if self.inplace else Path(self.build_lib).resolve()
        package = package / "reg_kernels"
        package.mkdir(parents=True, exist_ok=True)
        if self.editable_mode and is_left_out() and (package / "_build.json").exists():
            return  # make installs what it needs like this, and keeps what was built
        facts = self.compile(package)
        (package / "_build.json").write_text(json.dumps(facts, indent=1) + "\n")
        for part in ("native", "cuda"):
            missing = facts[f"{part}_missing"]
            print(f"reg_kernels: {part}: {'built' if missing is None else 'not built: ' + missing}")
        if facts["native_note"]:
            print(f"reg_kernels: native: {facts['native_note']}")

    def compile(self, package):
        for stale in {*package.glob("_C.*.so")} - {package / EXTENSION}:
            stale.unlink()  # of one Python's own interface, which would stand before ours
        if is_left_out():
            for stale in (EXTENSION, LIBRARY, CPU_LIBRARY, CUDA_LIBRARY):
                (package / stale).unlink(missing_ok=True)
            reason = "installed with REG_KERNELS_BUILD=none"
            return {"native_missing": reason, "native_note": None, "cuda_missing": reason}
        torch = import_torch()
        compiler = find_compiler()
        nvcc, cuda_missing = find_nvcc(torch)
        if nvcc is None:
            (package / CUDA_LIBRARY).unlink(missing_ok=True)
        isas, note = instruction_sets(compiler)
        build = build_folder(torch)
        build.mkdir(parents=True, exist_ok=True)
        ninja_file = build / "build.ninja"
        write_ninja(ninja_file, torch, compiler, isas, nvcc, package)
        command = ["ninja", "-f", ninja_file, "-j", str(jobs())]
        try:
            subprocess.run([sys.executable, "-m", *command], check=True)
        except subprocess.CalledProcessError as error:
            fail(f"the native build failed (exit code {error.returncode}): the lines above say why")
        return {"native_missing": None, "native_note": note, "cuda_missing": cuda_missing}

    def get_outputs(self):
        return []  # setuptools' list would name an object that this command does not make


class Wheel(bdist_wheel):
    """Of no Python's interface and no torch's: one for all, and without native code for any
    machine."""

    def get_tag(self):
        return "py3", "none", "any" if is_left_out() else super().get_tag()[2]


class Source(sdist):
    """Of sources alone: what was built in place is part of the package, and of no source. Nor are
    the tests, of which setuptools takes some by their names: they need the whole repository."""

    def make_release_tree(self, base_dir, files):
        left_out = (".so", "_build.json")
        kept = [f for f in files if not f.endswith(left_out) and not f.startswith("tests/")]
        super().make_release_tree(base_dir, kept)


def version():
    text = (ROOT / "reg_kernels" / "__init__.py").read_text()
    local = os.environ.get("REG_KERNELS_LOCAL")
    return re.search(r'^__version__ = "(.+)"$', text, re.M)[1] + (f"+{local}" if local else "")


def sources():
    """What a source distribution holds beside the Python package."""
    return [
        str(path.relative_to(ROOT))
        for path in sorted(CSRC.rglob("*"))
        if path.suffix in (".cpp", ".h", ".inc", ".cu", ".cuh")
    ]


def build_requirements():
    """What a build in an environment of its own needs there. pip asks for it by the command
    egg_info; with any other one, torch is there or `import_torch` says what to do."""
    asked = "egg_info" in sys.argv and not is_left_out()
    return [f"torch>={OLDEST_TORCH}", "ninja"] if asked else []


if __name__ == "__main__":  # tests import this file for what it knows of compilers
    setup(
        version=version(),
        ext_modules=[Extension("reg_kernels._C", sources=[], depends=sources())],
        cmdclass={"build_ext": Build, "bdist_wheel": Wheel, "sdist": Source},
        setup_requires=build_requirements(),
    )
