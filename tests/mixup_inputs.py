"""What mixup's tests share: batches in each layout, kinds of arguments, and the formula twice over:
in float64, sample by sample, and of torch's differentiable operators."""

import torch

from support import DEVICE

BYTES = torch.uint8


def is_interpreted(backend):
    return backend == "triton" and DEVICE == "cpu"


def draw(*shape, dtype=torch.float64):
    if dtype == BYTES:
        return torch.randint(0, 256, shape, dtype=BYTES, device=DEVICE)
    return torch.randn(shape, dtype=torch.float64, device=DEVICE).to(dtype)


def integers(*values):
    return torch.tensor(values, device=DEVICE)


def indices(n):
    """The kinds of partner lists, of n samples."""
    generator = torch.Generator().manual_seed(n)
    return {
        "reversed": None,
        "identity": torch.arange(n, device=DEVICE),
        "permuted": torch.randperm(n, generator=generator).to(DEVICE),
        "repeated": torch.randint(0, max(n, 1), (n,), generator=generator).to(DEVICE),
        "all one": torch.full((n,), n - 1, device=DEVICE),
        "int32": torch.arange(n, dtype=torch.int32, device=DEVICE).roll(1),
    }


def lambdas(n):
    """The kinds of lambdas: one or n of them, with 0 and 1 among the latter."""
    each = torch.linspace(0, 1, n, dtype=torch.float64, device=DEVICE) if n else draw(0)
    return {
        "float": 0.3,
        "one": torch.tensor(0.7, device=DEVICE),
        "each": each,
        "half": each.half(),
    }


def boxes_of(n, height, width):
    """Boxes at the edges, of nothing, of everything, and of a part."""
    some = [
        (0, 0, width, height),
        (1, 1, width - 1, height),
        (0, 0, 0, 0),
        (width, 0, width, height),
        (1, 0, 2, 1),
        (0, height - 1, width, height),
    ]
    return integers(*(some[i % len(some)] for i in range(n)))


def blended(x, lam, index=None, boxes=None, mean=None, std=None):
    """The truth in float64, sample by sample, and how large what it was summed of is."""
    partners = range(len(x) - 1, -1, -1) if index is None else index.tolist()
    lam = torch.as_tensor(lam, dtype=torch.float64).expand(len(x)).tolist()
    wide = x.double() / 255 if x.dtype == BYTES else x.double()
    output, sizes = torch.empty_like(wide), torch.empty_like(wide)
    for n, (share, m) in enumerate(zip(lam, partners, strict=True)):
        own, partner = wide[n], wide[m]
        output[n] = {1: own, 0: partner}.get(share, share * own + (1 - share) * partner)
        sizes[n] = own.abs() + partner.abs()
        if boxes is not None:
            x1, y1, x2, y2 = (boxes if boxes.dim() == 1 else boxes[n]).tolist()
            output[n, ..., y1:y2, x1:x2] = partner[..., y1:y2, x1:x2]
    for values, function in ((mean, torch.sub), (std, torch.div)):
        if values is not None:
            values = torch.as_tensor(values, dtype=torch.float64, device=x.device)
            values = values.expand(x.shape[1]).view(-1, *[1] * (x.dim() - 2))
            output = function(output, values)
            sizes = sizes + values.abs() if function is torch.sub else sizes / values.abs()
    return output, sizes


def check(y, truth, sizes, backend):
    """One rounding at the store, and a few of the arithmetic before it."""
    compute = torch.finfo(torch.promote_types(y.dtype, torch.float32)).eps
    store = torch.finfo(y.dtype).eps / 2
    if is_interpreted(backend) and y.dtype == torch.bfloat16:
        store *= 2  # the interpreter truncates where it should round
    tiny = torch.finfo(y.dtype).smallest_normal * torch.finfo(y.dtype).eps
    allowed = truth.abs() * store + 4 * compute * sizes + tiny
    assert ((y.double() - truth).abs() <= allowed).all()


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "strided": lambda x: torch.stack([x, x * 0], -1)[..., 0],
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "misaligned": lambda x: torch.cat([x.reshape(-1)[:1], x.reshape(-1)])[1:].view(x.shape),
    "negated": lambda x: x if x.dtype == BYTES else torch._neg_view(-x),
    "expanded": lambda x: x[:, :1].expand(x.shape),
}
FORMATS = {
    4: (None, torch.preserve_format, torch.contiguous_format, torch.channels_last),
    5: (None, torch.contiguous_format, torch.channels_last_3d),
}


def by_torch(x, lam, index, boxes=None, std=None):
    """The formula of differentiable operators of torch."""
    partner = x.flip(0) if index is None else x[index]
    lam = torch.as_tensor(lam, dtype=x.dtype, device=x.device)
    lam = lam.expand(len(x)).view(-1, *[1] * (x.dim() - 1))
    if boxes is not None:
        inside = torch.zeros(x.shape, dtype=torch.bool, device=x.device)
        for n, (x1, y1, x2, y2) in enumerate(boxes.expand(len(x), 4).tolist()):
            inside[n, ..., y1:y2, x1:x2] = True
        lam = torch.where(inside, 0, lam)
    return (lam * x + (1 - lam) * partner) / (1 if std is None else std)
