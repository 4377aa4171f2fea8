"""A fused model compiled ahead of time: it runs in Python, and in a C++ program without it."""

import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional
from torch import nn

import reg_kernels
from reg_kernels import backends
from reg_kernels import functional as F

from support import run_program

PACKAGE = Path(reg_kernels.__file__).parent
TORCH = Path(torch.__file__).parent

pytestmark = pytest.mark.skipif(
    backends.why_not("native", "cpu", torch.float32) is not None or shutil.which("g++") is None,
    reason="needs the native library and a compiler",
)


OPS = (
    *("batch_norm_inference", "batch_norm", "cross_entropy"),
    *("dropout", "drop_path", "gaussian_noise"),
)


class Net(nn.Module):
    """A fused chain in evaluation, what is exact in training, and what draws."""

    def __init__(self) -> None:
        super().__init__()
        chain = (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1))
        chain = nn.Sequential(*chain, nn.Flatten(), nn.Linear(512, 10))
        self.chain = reg_kernels.convert(chain, fuse=True)

    def forward(self, x):
        logits = self.chain(x)
        labels = torch.zeros_like(logits[:, 0], dtype=torch.int64)
        ones = torch.ones_like(x)
        # Running statistics there have to be: torch hands an op's empty list on as None.
        mean, variance = torch.zeros_like(x[0, :, 0, 0]), torch.ones_like(x[0, :, 0, 0])
        normalised = F.batch_norm(x, mean, variance, training=True)
        return (
            logits,
            normalised,
            torch.cat((mean, variance)),
            F.cross_entropy(logits, labels, label_smoothing=0.1),
            F.dropout(ones, 0.5),
            F.drop_path(ones, 0.5, residual=ones),
            F.gaussian_noise(ones, 0.5),
        )


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Net()
    model(torch.randn(16, 3, 8, 8))  # moves the running statistics
    return model.eval()


@pytest.fixture(scope="module")
def package(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("package") / "model.pt2"
    with torch.no_grad():
        batch = torch.export.Dim("batch", min=2, max=64)
        x = torch.randn(2, 3, 8, 8)
        program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: batch}}, strict=True)
        targets = {str(node.target) for node in program.graph.nodes}
        assert {f"reg_kernels.{name}.default" for name in OPS} <= targets, targets
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    return path


def check(outputs, model, x):
    """Four outputs are the model's own, and the others have the values that their ops draw."""
    *exact, dropped, paths, noise = outputs
    with torch.no_grad():
        for ours, expected in zip(exact, model(x)[:4], strict=True):
            torch.testing.assert_close(ours, expected)
    assert {*dropped.unique().tolist()} == {0.0, 2.0}
    assert {*paths.unique().tolist()} <= {1.0, 3.0}
    assert all(len(sample.unique()) == 1 for sample in paths)
    # Over four deviations of the mean and of the deviation, of 576 values at least.
    assert abs(noise.mean() - 1) < 0.1 and abs(noise.std() - 0.5) < 0.08


def test_in_python(package, model):
    run = torch._inductor.aoti_load_package(str(package))
    for samples in (3, 7):
        x = torch.randn(samples, 3, 8, 8)
        first, second = run(x), run(x)
        check(first, model, x)
        for draws in (4, 6):
            assert not first[draws].equal(second[draws])  # each run draws anew


# A package needs libtorch itself, of which nothing in a program does.
LINKED = ("-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10")


def test_the_program_of_the_page_compiles(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    (source,) = re.findall(r"```cpp\n(.*?)```", page, re.DOTALL)
    assert " ".join(LINKED) in page
    path = tmp_path / "program.cpp"
    path.write_text(source)
    command = ["g++", "-std=c++20", "-fsyntax-only", path, "-isystem", TORCH / "include"]
    done = run_program(command)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The compiled program; a torch that C++ cannot be compiled against is a failure."""
    path = tmp_path_factory.mktemp("program") / "program"
    done = run_program(
        [
            *("g++", "-std=c++20", Path(__file__).with_name("program.cpp"), "-o", path),
            *("-isystem", TORCH / "include", f"-L{TORCH / 'lib'}", f"-Wl,-rpath,{TORCH / 'lib'}"),
            *LINKED,
        ]
    )
    assert done.returncode == 0, done.stderr
    return path


def test_in_a_program_without_python(package, program, model):
    done = run_program([program, package, reg_kernels.export.library()])
    assert done.returncode == 0, done.stderr
    values = torch.tensor([float(line) for line in done.stdout.split()])
    x = torch.linspace(-1, 1, 5 * 3 * 8 * 8).view(5, 3, 8, 8)
    shapes = ((5, 10), x.shape, (6,), (), x.shape, x.shape, x.shape)
    parts = values.split([math.prod(shape) for shape in shapes])
    check([part.view(shape) for part, shape in zip(parts, shapes, strict=True)], model, x)


def test_without_the_library_the_error_names_the_op(package, program):
    done = run_program([program, package])
    assert done.returncode == 1
    assert "Could not find schema for reg_kernels::" in done.stderr


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_the_libraries_know_no_python_and_of_torch_its_stable_interface():
    for path in (*PACKAGE.glob("libreg_kernels*.so"), PACKAGE / "_C.abi3.so"):
        said = run_program(["nm", "-D", "--undefined-only", path]).stdout
        names = {line.split()[-1] for line in said.splitlines()}
        assert any(name.startswith("aoti_torch_") for name in names), path
        of_torch = {name for name in names if re.match(r"_ZN?K?\d*(2at|3c10|5torch)", name)}
        assert not of_torch, path
        if path.name != "_C.abi3.so":
            assert not {name for name in names if name.startswith(("Py", "_Py"))}, path


def test_a_copy_of_the_library_beside_the_first_one(tmp_path):
    for path in PACKAGE.glob("libreg_kernels*.so"):
        shutil.copy(path, tmp_path)
    paths = [str(folder / "libreg_kernels.so") for folder in (tmp_path, PACKAGE)]
    code = f"import torch\nfor path in {paths!r}: torch.ops.load_library(path)"
    done = run_program([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr


def test_python_takes_what_a_program_has_declared_before_it():
    code = (
        "import torch\n"
        f"torch.ops.load_library({str(PACKAGE / 'libreg_kernels.so')!r})\n"
        "import reg_kernels\n"
        "print(sorted({*reg_kernels.nn.Dropout(0.5)(torch.ones(100)).tolist()}))\n"
        f"torch.ops.load_library({str(PACKAGE / 'libreg_kernels.so')!r})\n"
    )
    done = run_program([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[0.0, 2.0]"


def test_python_first_and_the_declarations_after_it():
    code = (
        "import torch, reg_kernels\n"
        f"torch.ops.load_library({str(PACKAGE / 'libreg_kernels.so')!r})\n"
        "print(sorted({*reg_kernels.nn.Dropout(0.5)(torch.ones(100)).tolist()}))\n"
    )
    done = run_program([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[0.0, 2.0]"
