"""torch.onnx: an evaluation is standard operations alone, with PyTorch's values in onnxruntime."""

import io

import pytest
import torch
from torch import nn

import reg_kernels
from reg_kernels import functional as F

from export_models import EveryLayer, images, trained

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*treespec, LeafSpec", "ignore:.*legacy TorchScript", "ignore:You are using the legacy"
)


def onnx(model, x, **options):
    """The operations of what is exported, each with its domain, and what runs it."""
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False, **options)
    file = io.BytesIO()
    program.save(file)
    return [(n.domain, n.op_type) for n in program.model.graph], runner(file)


def runner(file):
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


@pytest.mark.parametrize("fuse", [False, True])
def test_an_evaluation_is_standard_operations(fuse):
    model = reg_kernels.convert(trained(EveryLayer()), fuse=fuse).eval()
    found, run = onnx(model, images(), dynamic_shapes=({0: "batch"},))
    assert {domain for domain, _ in found} == {""}
    # The exporter itself folds a BatchNormalization into the convolution before it.
    assert {name for _, name in found} <= {
        *("Conv", "BatchNormalization", "Relu", "Sigmoid", "Gelu", "Add", "Mul"),
        *("ReduceMean", "Gemm"),
    }
    with torch.no_grad():
        for count in (1, 7):
            x = images(count)
            torch.testing.assert_close(run(x), model(x), rtol=1e-5, atol=1e-5)


class Chain(nn.Module):
    """The residual is the input, and the last step a function."""

    def __init__(self):
        super().__init__()
        self.chain = reg_kernels.nn.BatchNormAct2d(3, activation="leaky_relu", drop=0.2)
        self.bare = reg_kernels.nn.BatchNorm2d(3, affine=False)

    def forward(self, x):
        return F.dropout(self.bare(self.chain(x, x)), 0.3, self.training)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_chain_is_what_it_says(dtype):
    model = trained(Chain()).eval().to(dtype)
    x = images().to(dtype)
    found, run = onnx(model, x)
    steps = ["BatchNormalization", "Add", "LeakyRelu", "BatchNormalization"]
    names = [name for _, name in found]
    assert [name for name in names if name != "Cast"] == steps
    # A chain of 16-bit floats is computed in float32, and each of the two rounds once.
    assert ("Cast" in names) == (dtype == torch.float16)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(run(x), model(x).detach(), rtol=4 * eps, atol=16 * eps)


def test_an_exported_program_is_decomposed_before():
    model = reg_kernels.convert(trained(EveryLayer()), fuse=True).eval()
    program = torch.export.export(model, (images(),), strict=True)
    core = program.run_decompositions(reg_kernels.export.decompositions())
    file = io.BytesIO()
    torch.onnx.export(core, dynamo=True, verbose=False).save(file)
    x = images()
    torch.testing.assert_close(runner(file)(x), model(x).detach(), rtol=1e-5, atol=1e-5)


def test_the_older_exporter():
    model = reg_kernels.convert(trained(EveryLayer()), fuse=True).eval()
    file, x = io.BytesIO(), images()
    torch.onnx.export(model, (x,), file, dynamo=False)
    torch.testing.assert_close(runner(file)(x), model(x).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (reg_kernels.nn.Dropout(0.2), "dropout"),
        (reg_kernels.nn.BatchNormAct2d(3, drop=0.1), "batch_norm_act"),
        (reg_kernels.nn.GaussianNoise(0.1), "gaussian_noise"),
        (reg_kernels.nn.DropPath(0.1), "drop_path"),
        *(
            (reg_kernels.nn.StochasticDepthBlock(nn.ReLU(), 0.1, mode), "StochasticDepthBlock")
            for mode in ("batch", "subset", "row")
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_draws_are_refused(model, name):
    message = f"{name}: training must be False in an ONNX export, which has no such draws"
    with pytest.raises(torch.onnx.OnnxExporterError, match=message):
        onnx(model.train(), images())
    options = {"training": torch.onnx.TrainingMode.PRESERVE, "dynamo": False}
    with pytest.raises(RuntimeError, match=message):
        torch.onnx.export(model, (images(),), io.BytesIO(), **options)
