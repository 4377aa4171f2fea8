"""The instructions of `augment` that change colours, and those that read the whole image for it.

Each is a function (image, values, *arguments) -> image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._augment_values import Values


def brightness(image: Tensor, values: Values, factor: float) -> Tensor:
    return values.truncated(image * factor)


def contrast(image: Tensor, values: Values, factor: float, rest: float) -> Tensor:
    gray = values.gray(image) if len(image) == 3 else image
    return values.blend(image, _mean(gray, values).to(image.dtype), factor, rest)


def _mean(gray: Tensor, values: Values) -> Tensor:
    """The mean over a gray image. A sum of integers does not depend on its order, so it is one but
    in float64, which the reference alone has; the gradient is that of the mean itself."""
    zero = torch.zeros_like(gray)
    gray = torch.where(gray.isnan(), zero, values.clamp(gray))
    mean = gray.mean()
    if gray.dtype == torch.float64:
        return mean
    unit = 1.0 if values.exact else 256.0 if values.bound == 255.0 else 65536.0
    total = (gray.detach() * unit).round().to(torch.int64).sum()
    whole = (total.double() / gray.numel() / unit).to(gray.dtype)
    return whole + (mean - mean.detach())


def saturation(image: Tensor, values: Values, factor: float, rest: float) -> Tensor:
    return values.blend(image, values.gray(image), factor, rest)


def hue(image: Tensor, values: Values, shift: float) -> Tensor:
    """Through HSV and back, in torchvision's steps. A NaN makes all channels of its pixel one."""
    x = image if values.bound == 1.0 else image * (1.0 / values.bound)
    h, s, v = _to_hsv(x)
    h = h + shift
    result = _to_rgb(h - h.floor(), s, v)
    if values.exact:
        return values.clamp((result * 255.999).floor())
    return values.clamp(result * values.bound)


def _to_hsv(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    red, green, _ = x.unbind(0)
    least, most = x.amin(0), x.amax(0)
    gray = most == least
    one = torch.ones_like(most)
    spread = most - least
    saturation = spread / torch.where(gray, one, most)
    r, g, b = ((most - x) / torch.where(gray, one, spread)).unbind(0)
    sector = torch.where(most == green, (r + 2.0) - b, (g + 4.0) - r)
    sector = torch.where(most == red, b - g, sector)
    turned = sector * (1.0 / 6.0) + 1.0
    return turned - turned.trunc(), saturation, most


def _to_rgb(h: Tensor, s: Tensor, v: Tensor) -> Tensor:
    h = h * 6.0
    sector = h.floor()
    part = h - sector
    faded = s * part
    rest = 1.0 - s
    p = (rest * v).clamp(0.0, 1.0)
    q = ((1.0 - faded) * v).clamp(0.0, 1.0)
    t = ((faded + rest) * v).clamp(0.0, 1.0)
    index = sector.detach().nan_to_num(0.0).to(torch.int64) % 6
    order = torch.tensor([[0, 2, 1, 1, 3, 0], [3, 0, 0, 2, 1, 1], [1, 1, 3, 0, 0, 2]])
    chosen = order.to(h.device)[:, index]
    return torch.stack((v, p, q, t)).gather(0, chosen)


def grayscale(image: Tensor, values: Values) -> Tensor:
    return values.gray(image).expand_as(image)


def invert(image: Tensor, values: Values) -> Tensor:
    return values.bound - image


def solarize(image: Tensor, values: Values, threshold: float) -> Tensor:
    return torch.where(image >= threshold, values.bound - image, image)


def solarize_add(image: Tensor, values: Values, threshold: float, addend: float) -> Tensor:
    return torch.where(image < threshold, values.truncated(image + addend), image)


def posterize(image: Tensor, values: Values, bits: float) -> Tensor:
    levels = 2.0**bits
    if values.bound == 1.0:
        return (image * levels).floor().clamp(0.0, levels - 1.0) * (1.0 / levels)
    step = 256.0 / levels
    return (image * (1.0 / step)).floor() * step


def autocontrast(image: Tensor, values: Values) -> Tensor:
    absent = image.isnan()
    infinity = torch.full_like(image, torch.inf)
    least = torch.where(absent, infinity, image).amin((1, 2), keepdim=True)
    most = torch.where(absent, -infinity, image).amax((1, 2), keepdim=True)
    stretched = most > least
    scale = torch.where(stretched, (most - least) * (1.0 / values.bound), 1.0)
    return torch.where(stretched, values.truncated((image - least) / scale), image)


def equalize(image: Tensor, values: Values) -> Tensor:
    """By Pillow's table."""
    index = (image.detach() * (255.0 / values.bound)).nan_to_num(0.0).round().clamp(0, 255)
    index = index.to(torch.int64).flatten(1)
    zero = torch.zeros(len(image), 256, dtype=torch.int64, device=image.device)
    counts = zero.scatter_add(1, index, torch.ones_like(index))
    bins = torch.arange(256, device=image.device)
    last = torch.where(counts > 0, bins, 0).amax(1, keepdim=True)
    step = (index.shape[1] - counts.gather(1, last)) // 255
    below = counts.cumsum(1) - counts
    table = ((step // 2 + below) // step.clamp(min=1)).clamp(0, 255)
    result = table.gather(1, index).view(image.shape).to(image.dtype) * (values.bound / 255.0)
    return torch.where(step.unsqueeze(2) == 0, image, result)


def sharpness(image: Tensor, values: Values, factor: float, rest: float) -> Tensor:
    """v + rest (smoothed - v): the pixels at the border stay."""
    height, width = image.shape[1:]
    if height <= 2 or width <= 2:
        return image
    terms = [
        image[:, y : height - 2 + y, x : width - 2 + x] * ((5.0 if y == x == 1 else 1.0) / 13.0)
        for y in range(3)
        for x in range(3)
    ]
    smoothed = terms[0]
    for term in terms[1:]:
        smoothed = smoothed + term
    smoothed = smoothed.round() if values.exact else smoothed
    inner = image[:, 1:-1, 1:-1]
    inner = values.truncated(values.product_sum(rest, smoothed - inner, inner))
    inside = torch.zeros_like(image, dtype=torch.bool)
    inside[:, 1:-1, 1:-1] = True
    return torch.where(inside, torch.nn.functional.pad(inner, (1, 1, 1, 1)), image)
