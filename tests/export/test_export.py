"""torch.export: programs of converted models, what they hold, and where they run."""

import copy
import io
import sys
import textwrap

import pytest
import torch
from torch import nn

import reg_kernels
from reg_kernels import functional as F

from export_models import EveryLayer, calls, images, trained
from support import run_program

pytestmark = pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec", "ignore:.*At pre-dispatch")

WAYS = [(fuse, strict) for fuse in (False, True) for strict in (False, True)]


def exported(model, strict, x=None, dynamic=True):
    shapes = ({0: torch.export.Dim("batch", min=2)},) if dynamic else None
    x = images() if x is None else x
    program = torch.export.export(model, (x,), dynamic_shapes=shapes, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def decomposed(program):
    return program.run_decompositions(reg_kernels.export.decompositions())


def foreign(program):
    """The operations that are none of core ATen, but for what torch adds for a cast."""
    return {
        str(n.target)
        for n in program.graph.nodes
        if n.op == "call_function"
        and isinstance(n.target, torch._ops.OpOverload)
        and torch.Tag.core not in n.target.tags
    } - {"aten._assert_tensor_metadata.default"}


@pytest.mark.parametrize(("fuse", "strict"), WAYS)
def test_evaluation_is_the_same_bits_and_becomes_core_aten(fuse, strict):
    model = reg_kernels.convert(trained(EveryLayer()), fuse=fuse).eval()
    program = exported(model, strict)
    for count in (2, 7):
        x = images(count)
        assert torch.equal(program.module()(x), model(x))
    found = calls(program)
    assert sum(name.startswith("reg_kernels.batch_norm_inference") for name in found) == 3
    # A layer scale is one pass in a fused model; without one, a sum is all that is left.
    assert found.count("reg_kernels.drop_path.default") == fuse
    assert ("aten.relu.default" in found, "aten.silu.default" in found) == (not fuse, not fuse)
    assert not {"aten.resolve_neg.default", "aten.promote_types.default"} & set(found)
    core = decomposed(program)
    assert not foreign(core)
    torch.testing.assert_close(core.module()(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("fuse", "strict"), WAYS[1:3])  # each way once
def test_training_moves_what_it_moved(fuse, strict):
    model = EveryLayer.to_train(drop=0.0, fuse=fuse)
    program = exported(model, strict).module()
    model = copy.deepcopy(model)
    for count in (3, 6):
        x = images(count)
        outputs = [m(x) for m in (model, program)]
        assert torch.equal(*outputs)
        for y in outputs:
            y.square().sum().backward()
    for of in ("named_parameters", "named_buffers"):
        ours = dict(getattr(program, of)())
        for name, value in getattr(model, of)():
            if "noise_" in name:  # no part of the state
                continue
            value, other = value.grad if of == "named_parameters" else value, ours[name]
            other = other.grad if of == "named_parameters" else other
            torch.testing.assert_close(other, value, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize(("mode", "strict"), [("row", False), ("row", True), ("subset", False)])
def test_training_draws_anew_and_by_the_seed(mode, strict):
    # How many samples a subset has is no formula of torch's: its batch has one size.
    program = exported(EveryLayer.to_train(0.4, mode), strict, dynamic=mode == "row")
    found = calls(program)
    assert not {"aten.ones.default", "aten.cat.default", "aten.resolve_neg.default"} & set(found)
    x, run = images(), program.module()

    def seeded(seed):
        torch.manual_seed(seed)
        return run(x)

    first = seeded(1)
    assert torch.equal(seeded(1), first)
    assert not torch.equal(run(x), first)
    assert not torch.equal(seeded(2), first)


def test_a_subset_of_a_larger_batch():
    """A program knows the share of samples that it keeps, and the batch may have more of them."""
    block = reg_kernels.nn.StochasticDepthBlock(nn.Identity(), 0.5, "subset").train()
    sizes = ({0: torch.export.Dim.AUTO},)
    run = torch.export.export(block, (images(6),), dynamic_shapes=sizes).module()
    x = images(8)
    y = run(x)
    kept = (y != x).flatten(1).any(1)
    assert kept.sum() == 4
    assert torch.equal(y[kept], 3 * x[kept])


# Core ATen


class Chains(nn.Module):
    """A chain for each activation, one without parameters, and branches with a layer scale."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            reg_kernels.nn.BatchNormAct2d(3, activation=name, affine=affine)
            for name in ("relu", "leaky_relu", "silu", "gelu", None)
            for affine in (True, False)
        )
        self.gamma = nn.Parameter(torch.rand(3, 1, 1))

    def forward(self, x):
        chains = [layer(x, residual) for layer in self.layers for residual in (None, x.relu())]
        branches = [
            F.drop_path(x, 0.2, False, residual=residual, layer_scale=self.gamma, mode=mode)
            for residual in (None, x.relu())
            for mode in ("row", "batch")
        ]
        return chains + branches


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [
        (torch.float64, "reference"),
        *((dtype, "native") for dtype in (torch.float32, torch.float16, torch.bfloat16)),
    ],
)
def test_core_aten_rounds_once_as_the_kernels_do(dtype, backend):
    if (why := reg_kernels.backends.why_not(backend, "cpu", dtype)) is not None:
        pytest.skip(why)
    model = trained(Chains()).eval().to(dtype)
    x = images().to(dtype)
    with reg_kernels.backend(backend):
        core = decomposed(exported(model, strict=False, x=x))
        assert not foreign(core)
        y = images(3).to(dtype)
        expected = copy.deepcopy(model).double()(y.double())
    compute = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    rounding = torch.finfo(dtype).eps / 2
    for actual, truth in zip(core.module()(y), expected, strict=True):
        assert actual.dtype == dtype
        torch.testing.assert_close(
            actual.double(), truth, rtol=rounding + 4 * compute, atol=16 * compute
        )


def test_what_draws_stays_an_op():
    found = calls(decomposed(exported(EveryLayer.to_train(), strict=False)))
    assert found.count("reg_kernels.drop_path.default") == 3  # one of them with a layer scale


def test_a_table_can_be_changed():
    program = exported(nn.Sequential(reg_kernels.nn.BatchNormAct2d(3)).eval(), strict=False)
    table = reg_kernels.export.decompositions()
    del table[torch.ops.reg_kernels.batch_norm_inference.default]
    assert foreign(program.run_decompositions(table)) == {
        "reg_kernels.batch_norm_inference.default"
    }
    assert not foreign(decomposed(program))


# Elsewhere


def test_a_program_is_loaded_where_reg_kernels_was_imported(tmp_path):
    model = reg_kernels.convert(trained(EveryLayer()), fuse=True).eval()
    program, x = torch.export.export(model, (images(),), strict=False), images()
    torch.export.save(program, tmp_path / "ours.pt2")
    torch.export.save(decomposed(program), tmp_path / "core.pt2")
    torch.save([x, model(x).detach()], tmp_path / "values.pt")
    script = """
        import sys, torch
        x, y = torch.load("values.pt")
        core = torch.export.load("core.pt2").module()(x)
        torch.testing.assert_close(core, y, rtol=1e-5, atol=1e-5)
        assert "reg_kernels" not in sys.modules
        try:
            torch.export.load("ours.pt2")
        except RuntimeError:
            import reg_kernels
            # Close, not equal: the other process may have other numbers of threads.
            again = torch.export.load("ours.pt2").module()(x)
            torch.testing.assert_close(again, y, rtol=1e-5, atol=1e-5)
            print("after the import")
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = run_program(command, cwd=tmp_path, together=True)
    assert done.stdout.rstrip().endswith("after the import"), done.stdout
    assert "failed to resolve torch.ops.reg_kernels." in done.stdout
    assert "import the custom op to register it before deserializing" in done.stdout


class Block(nn.Module):
    def __init__(self, inputs):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(inputs, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        self.drop = nn.Dropout(0.2)

    def forward(self, x):
        return self.drop(self.act(self.bn(self.conv(x))))


def quantised(model, x):
    pytest.importorskip("torchao.quantization.pt2e")
    from torchao.quantization.pt2e import quantize_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    program = torch.export.export(model, (x,)).module()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = quantize_pt2e.prepare_pt2e(program, quantizer)
    prepared(x)
    return quantize_pt2e.convert_pt2e(prepared)


@torch.no_grad()
def test_quantisation_after_folding():
    """torchao's flow sees, of a folded model, torch's convolutions, activations and sums alone."""
    x, net = images(), trained(nn.Sequential(Block(3), Block(8))).eval()
    model = quantised(reg_kernels.fold_batch_norm(reg_kernels.convert(net, fuse=True)), x)
    assert not any("reg_kernels" in name for name in calls(model))
    assert torch.equal(model(x), quantised(reg_kernels.fold_batch_norm(net), x)(x))
    assert (model(x) - net(x)).norm() < 0.03 * net(x).norm()


@torch.no_grad()
def test_quantisation_without_folding():
    """The chains stay in floating point between what is quantised."""
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x, net = images(), trained(nn.Sequential(Block(3), Block(8), pool, nn.Linear(8, 4))).eval()
    model = quantised(reg_kernels.convert(net, fuse=True), x)
    found = [node for node in model.graph.nodes if node.op == "call_function"]
    inputs = {str(n.target): [str(x.target) for x in n.all_input_nodes[:2]] for n in found}
    dequantised = "quantized_decomposed.dequantize_per_"
    for name in ("aten.conv2d.default", "aten.linear.default"):
        assert all(source.startswith(dequantised) for source in inputs[name]), inputs[name]
    assert calls(model).count("reg_kernels.batch_norm_inference.default") == 2
    assert inputs["reg_kernels.batch_norm_inference.default"][0] == "aten.conv2d.default"
    assert (model(x) - net(x)).norm() < 0.03 * net(x).norm()
