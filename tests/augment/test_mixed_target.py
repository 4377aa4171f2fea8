"""MixedTarget: what loaders, pickles, compilers and trainers make of it, and its dense form."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Mapping

import numpy as np
import pytest
import torch
import torch.nn.functional as TF
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, default_collate

from reg_kernels import functional
from reg_kernels.augment import MixedTarget

from support import DEVICE

A, B = torch.tensor([0, 2, 1]), torch.tensor([1, 2, 0])
LAM = torch.tensor([0.25, 1.0, 0.5])


def same(target, other):
    assert type(target) is type(other) is MixedTarget
    for name in ("labels", "partner_labels", "lam", "label_smoothing"):
        a, b = getattr(target, name), getattr(other, name)
        assert type(a) is type(b)
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    return True


def test_it_goes_where_a_batch_of_bytes_is_and_keeps_its_shares():
    target = MixedTarget(A, B, LAM)
    assert same(target.to(torch.zeros(1, dtype=torch.uint8)), target)
    assert target.to(torch.float64).lam.dtype == torch.float64


# The dense form


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lam": 2.0}, "lam must be in"),
        ({"lam": torch.tensor([0.0, -0.1, 1.0])}, "lam must be in"),
        ({"lam": torch.ones(2)}, "lam must be one number, or one for each of the 3 samples"),
        ({"label_smoothing": 3.0}, "label_smoothing must be in"),
    ],
)
def test_a_dense_form_of_nonsense_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        MixedTarget(A, B, LAM)._replace(**change).to_dense(3)


def test_a_dense_form_of_bytes():
    bytes_ = MixedTarget(A.to(torch.uint8), B.to(torch.uint8), LAM)
    assert torch.equal(bytes_.to_dense(3), MixedTarget(A, B, LAM).to_dense(3))


def smooth(labels, classes, smoothing):
    hot = TF.one_hot(labels, classes).double()
    return (hot * (1 - smoothing) + smoothing / classes).movedim(-1, min(1, labels.dim()))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 4), (2, 3, 2)])
@pytest.mark.parametrize("lam", ["each", "one", "float"])
def test_to_dense(smoothing, shape, lam):
    classes = 4
    a, b = (torch.randint(classes, shape, device=DEVICE) for _ in range(2))
    share = torch.rand(shape[:1] if lam == "each" else (), device=DEVICE)
    target = MixedTarget(a, b, share.item() if lam == "float" else share, smoothing)
    dense = target.to_dense(classes)
    assert dense.dtype == torch.float32
    share = share.double().reshape(-1, *[1] * len(shape)) if shape else share.double()
    expected = share * smooth(a, classes, smoothing) + (1 - share) * smooth(b, classes, smoothing)
    torch.testing.assert_close(dense, expected.float())
    torch.testing.assert_close(dense.sum(min(1, len(shape))), torch.ones(shape, device=DEVICE))


def test_to_dense_is_rounded_once():
    lam = torch.tensor([0.3, 0.7, 0.1])
    target = MixedTarget(A, B, lam, 0.1)
    exact = target.to_dense(1000, torch.float64)
    assert target.to_dense(1000, torch.bfloat16).equal(exact.to(torch.bfloat16))
    own = lam.double() * 0.9 + 0.1 / 1000
    torch.testing.assert_close(exact[[0, 2], A[[0, 2]]], own[[0, 2]], rtol=1e-15, atol=0)
    assert exact[1, 2].item() == pytest.approx(0.9 + 0.1 / 1000, rel=1e-15)


def test_to_dense_refuses():
    with pytest.raises(ValueError, match=r"^MixedTarget.to_dense: num_classes must be .* got 0$"):
        MixedTarget(A, B, LAM).to_dense(0)
    for a, b in ((A, B + 1), (B + 1, A)):
        with pytest.raises(IndexError, match=r"labels must be in \[0, 3\), got 3$"):
            MixedTarget(a, b, LAM).to_dense(3)
    with pytest.raises(IndexError, match=r"got -100$"):
        MixedTarget(A, torch.tensor([0, -100, 1]), LAM).to_dense(3)


def test_no_value_is_looked_at_on_a_device():
    labels = torch.empty(3, dtype=torch.int64, device="meta")
    for lam in (0.25, torch.empty(3, device="meta")):
        assert MixedTarget(labels, labels, lam).to_dense(5).shape == (3, 5)


@pytest.mark.parametrize("lam", [LAM, 0.25], ids=["each", "float"])
def test_to_dense_under_a_default_device(lam):
    target = MixedTarget(A, B, lam, 0.1)
    expected = target.to_dense(3)
    with torch.device("meta"):
        assert target.to_dense(3).equal(expected)
        assert default_collate(singles()).to_dense(3).equal(default_collate(singles()).to_dense(3))


def test_numbers_as_torch_takes_them():
    expected = MixedTarget(A, B, 0.25, 0.5).to_dense(3)
    for kind in (np.float32, np.float64, torch.tensor):
        given = MixedTarget(A, B, kind(0.25), kind(0.5))
        assert given.to_dense(np.int64(3)).equal(expected)
    with pytest.raises(TypeError, match=r"num_classes must be an integer, got float$"):
        MixedTarget(A, B).to_dense(3.0)


# A batch of targets


def test_its_length_and_its_samples():
    target = MixedTarget(A, B, LAM, 0.1)
    assert len(target) == 3
    same(target[1:], MixedTarget(A[1:], B[1:], LAM[1:], 0.1))
    same(target[-1], MixedTarget(A[-1], B[-1], LAM[-1], 0.1))
    same(target[torch.tensor([2, 0])], MixedTarget(A[[2, 0]], B[[2, 0]], LAM[[2, 0]], 0.1))
    for lam in (0.3, torch.tensor(0.3), torch.tensor([0.3])):
        same(MixedTarget(A, B, lam)[:2], MixedTarget(A[:2], B[:2], lam))
    for wrong, error in ((3, IndexError), ((0, 1), TypeError), ("lambda", KeyError)):
        with pytest.raises(error):
            target[wrong]
    with pytest.raises(TypeError):
        len(target[0])
    with pytest.raises(TypeError, match="partner_labels must be given"):
        MixedTarget(A)


def test_it_is_equal_to_nothing():
    target = MixedTarget(A, B, LAM)
    for compare in (
        lambda: target == A,
        lambda: target == A,
        lambda: target != A,
        lambda: target == target,
        lambda: A in target,
        lambda: target < A,
        lambda: torch.eq(A, target),
    ):
        with pytest.raises(TypeError):
            compare()


def each_of(data, f):
    """As trainers go through what a loader gave them."""
    if isinstance(data, Mapping):
        return type(data)({key: each_of(value, f) for key, value in data.items()})
    assert isinstance(data, torch.Tensor)  # what else there is they refuse to gather
    return f(data)


def joined(batches):
    first = batches[0]
    return type(first)({key: torch.cat([batch[key] for batch in batches]) for key in first})


def stand_ins():
    return joined, lambda data, part: each_of(data, lambda x: x[part]), lambda data: len(data)


def accelerates():
    operations = pytest.importorskip("accelerate.utils.operations")
    return operations.concatenate, operations.slice_tensors, operations.find_batch_size


@pytest.mark.parametrize("library", [stand_ins, accelerates])
@pytest.mark.parametrize("lams", [(LAM, LAM / 2), (torch.tensor(0.3), torch.tensor(0.9)), (0.3, 1)])
def test_joined_and_cut_as_trainers_do(lams, library):
    concatenate, cut, batch_size = library()
    targets = [MixedTarget(A, B, lams[0], 0.1), MixedTarget(B, A, lams[1], 0.1)]
    whole = concatenate(targets)
    assert type(whole) is MixedTarget
    assert (batch_size(whole), len(whole), whole.label_smoothing) == (6, 6, 0.1)
    dense = torch.cat([target.to_dense(3) for target in targets])
    torch.testing.assert_close(whole.to_dense(3), dense, rtol=0, atol=1e-7)
    part = cut(whole, slice(2, 5))
    torch.testing.assert_close(part.to_dense(3), dense[2:5], rtol=0, atol=1e-7)
    targets[1] = targets[1]._replace(label_smoothing=0.2)
    with pytest.raises(ValueError, match=r"one label_smoothing, got 0\.1, 0\.2$"):
        concatenate(targets)


def test_gathered_as_trainers_do():
    """From all processes, tensor by tensor; one that is broadcast is written over in place."""
    target = MixedTarget(A, B, torch.tensor(0.3), 0.1)
    twice = each_of(target, lambda x: torch.cat([x, x]))
    assert twice.to_dense(3).equal(torch.cat([target.to_dense(3)] * 2))
    assert all(value.is_contiguous() for value in target.values())
    shapes = type(target)({key: tuple(value.shape) for key, value in target.items()})
    assert {shapes.labels, shapes.lam, shapes.label_smoothing} == {(3,)}


def test_it_is_a_pytree():
    target = MixedTarget(A, B, LAM)
    leaves, tree = pytree.tree_flatten(target)
    assert len(leaves) == 4
    same(pytree.tree_unflatten(leaves, tree), target)


@pytest.mark.parametrize("lam", [LAM, torch.tensor(0.5), 0.5], ids=["each", "one", "float"])
def test_pickle_and_copy(lam):
    target = MixedTarget(A, B, lam, 0.1)
    same(pickle.loads(pickle.dumps(target)), target)
    twin = copy.deepcopy(target)
    same(twin, target)
    assert twin.labels is not A


@pytest.mark.parametrize("lam", [LAM, torch.tensor(0.5), 0.5], ids=["each", "one", "float"])
def test_to(lam):
    target = MixedTarget(A, B, lam, 0.1)
    same(target.to("cpu"), target)
    same(target.to(torch.device("cpu"), non_blocking=True), target)
    for moved in (
        target.to("meta"),
        target.to(device="meta"),
        target.to(torch.empty(0, device="meta")),
    ):
        assert moved.labels.device.type == moved.partner_labels.device.type == "meta"
        if isinstance(lam, torch.Tensor):
            assert moved.lam.device.type == "meta"
    for cast in (target.to(torch.float64), target.to("cpu", torch.float64)):
        assert cast.labels.dtype == cast.partner_labels.dtype == torch.int64
        assert not isinstance(lam, torch.Tensor) or cast.lam.dtype == torch.float64
        assert cast.label_smoothing == 0.1
    with pytest.raises((TypeError, RuntimeError)):
        target.to("cpu", dtype="float")


@pytest.mark.skipif(DEVICE == "cpu", reason="pages are locked for a GPU")
def test_pin_memory():
    from torch.utils.data._utils.pin_memory import pin_memory

    for pinned in (
        MixedTarget(A, B, LAM, 0.1).pin_memory(),
        pin_memory(MixedTarget(A, B, LAM, 0.1)),
    ):
        assert all(pinned[name].is_pinned() for name in ("labels", "partner_labels", "lam"))
        same(pinned, MixedTarget(A, B, LAM, 0.1))


def test_compiled_whole():
    torch.compiler.reset()
    compiled = torch.compile(
        lambda t: (t.to(torch.float64), t.to_dense(4)), fullgraph=True, backend="aot_eager"
    )
    for lam in (LAM, torch.tensor(0.25)):
        target = MixedTarget(A, B, lam, 0.1)
        moved, dense = compiled(target)
        same(moved, target.to(torch.float64))
        assert dense.equal(target.to_dense(4))


# Collating


def singles(smoothings=(0.1, 0.1, 0.1), lam=lambda n: LAM[n]):
    return [MixedTarget(A[n], B[n], lam(n), s) for n, s in enumerate(smoothings)]


def test_default_collate():
    same(default_collate(singles()), MixedTarget(A, B, LAM, 0.1))
    same(
        default_collate(singles(lam=lambda n: LAM[n].item())), MixedTarget(A, B, LAM.double(), 0.1)
    )
    numbers = [MixedTarget(int(t.labels), int(t.partner_labels), t.lam) for t in singles((0, 0, 0))]
    same(default_collate(numbers), MixedTarget(A, B, LAM))
    # Beside what else a sample holds.
    images, target = default_collate([(torch.ones(2), each) for each in singles()])
    assert images.shape == (3, 2)
    same(target, MixedTarget(A, B, LAM, 0.1))


def test_a_batch_has_one_smoothing():
    message = r"^MixedTarget: a batch must have one label_smoothing, got 0\.0, 0\.1$"
    with pytest.raises(ValueError, match=message):
        default_collate(singles((0.1, 0.0, 0.1)))


class Mixed(Dataset):
    """Samples whose targets are mixed already, as of a mixture made in the data set."""

    def __len__(self):
        return 3

    def __getitem__(self, n):
        return torch.full((2,), float(n)), MixedTarget(A[n], B[n], LAM[n], 0.1)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader(workers):
    (images, target), last = DataLoader(Mixed(), batch_size=2, num_workers=workers)
    assert images.tolist() == [[0, 0], [1, 1]]
    same(target, MixedTarget(A[:2], B[:2], LAM[:2], 0.1))
    same(last[1], MixedTarget(A[2:], B[2:], LAM[2:], 0.1))


def test_unpickling_alone_registers_the_collation():
    """A spawned worker imports what its pickled data set names, and no more."""
    blob = pickle.dumps(MixedTarget(A, B, LAM))
    code = (
        "import pickle, sys; from torch.utils.data import default_collate as c;"
        "t = pickle.loads(sys.stdin.buffer.read()); t = c([t, t]);"
        "print(type(t).__name__, t.label_smoothing)"
    )
    done = subprocess.run([sys.executable, "-c", code], input=blob, capture_output=True, check=True)
    assert done.stdout.decode().split() == ["MixedTarget", "0.0"]


@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec")
@pytest.mark.parametrize("strict", [False, True])
def test_a_program_takes_it(strict, tmp_path):
    class Net(torch.nn.Module):
        def forward(self, logits, target):
            return functional.cross_entropy(logits, target)

    labels = torch.tensor([0, 1, 2, 3])
    logits, target = torch.randn(4, 5), MixedTarget(labels, labels.flip(0), torch.rand(4))
    program = torch.export.export(Net(), (logits, target), strict=strict)
    torch.export.save(program, tmp_path / "program.pt2")
    again = torch.export.load(tmp_path / "program.pt2").module()
    torch.testing.assert_close(again(logits, target), Net()(logits, target))
