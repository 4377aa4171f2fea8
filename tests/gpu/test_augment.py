"""What augmentation alone has on a GPU: a pipeline's bits are the CPU's, and nothing waits."""

import pytest
import torch

from reg_kernels import augment

from support import captured

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
PIPELINES = {
    "crop": "RandomResizedCrop(32), RandomHorizontalFlip, Normalize",
    "policy": "RandomResizedCrop(32), RandAugment, ColorJitter(0.4, 0.4, 0.4, 0.1), Normalize",
    "filters": "RandomCrop(32, 4), GaussianBlur(9), RandomAdjustSharpness(2.0), RandomEqualize",
    "noise": "RandomAffine(30, (0.1, 0.1), interpolation='bilinear'), GaussianNoise, RandomErasing",
    "AugMix": "CenterCrop(32), AugMix, Normalize",
}


def made(text: str, **options: object) -> augment.Pipeline:
    text = text.replace("Normalize", f"Normalize({MEAN}, {STD})")
    return augment.from_text(text, seed=3, **options)


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("text", PIPELINES.values(), ids=PIPELINES)
def test_the_bits_are_the_cpus(text, backend):
    images = torch.randint(256, (16, 3, 40, 36), dtype=torch.uint8)
    expected = made(text)(images, indices=range(16))
    found = made(text, backend=backend)(images.cuda(), indices=range(16))
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_nothing_waits_for_the_gpu(backend):
    pipeline = made(PIPELINES["policy"], backend=backend)
    images = torch.randint(256, (16, 3, 40, 36), dtype=torch.uint8, device="cuda")
    pipeline(images)  # compiles
    with torch.cuda.device("cuda"):
        torch.cuda.set_sync_debug_mode("error")
        try:
            pipeline(images)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_captured_pipeline_takes_new_images():
    pipeline = made(PIPELINES["policy"], backend="native")
    images = torch.randint(256, (16, 3, 40, 36), dtype=torch.uint8, device="cuda")
    replay, found = captured(lambda: pipeline(images, indices=range(16)))
    for _ in range(2):
        images.copy_(images.roll(1, 0))
        replay()
        assert torch.equal(found, pipeline(images, indices=range(16)))
