"""timm's training ingredients: a timm model with fused layers, our AdamW from timm's optimizer
factory, our Mixup in the place of timm's, and timm's loss and schedule as they are."""

import digits
import timm
import torch
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch.utils.data import DataLoader

import reg_kernels
from reg_kernels import augment
from reg_kernels.integrations.timm import register

torch.manual_seed(0)
data = digits.load(epochs=30)
loader = DataLoader(data.train, digits.BATCH, shuffle=True, drop_last=True)

# BatchNorm with its ReLU, Dropout and DropPath become fused ones; `report=print` lists them.
model = timm.create_model(
    "test_resnet", in_chans=1, num_classes=digits.CLASSES, drop_rate=0.1, drop_path_rate=0.1
)
model = reg_kernels.convert(model, fuse=True).to(digits.DEVICE)

# As `--opt rkadamw` of a training script: timm makes the groups, and passes our options on.
register()
optimizer = create_optimizer_v2(
    model, "rkadamw", lr=2e-3, weight_decay=0.05, max_grad_norm=1.0, ema_decay=0.98
)
steps = data.epochs * len(loader)
schedule = CosineLRScheduler(optimizer, steps, warmup_t=steps // 10, t_in_epochs=False)

# The dense target is timm's: lam-weighted probabilities [N, classes], smoothed.
pipeline = augment.Pipeline(
    augment.Resize(32),
    augment.from_timm("rand-m5-n1-mstd0.5"),
    augment.Normalize(digits.MEAN, digits.STD),
    augment.RandomErasing(0.1),
    augment.Mixup(0.2, cutmix_alpha=1.0, num_classes=digits.CLASSES, dense=True),
    seed=0,
)
criterion = SoftTargetCrossEntropy()

step = 0
for epoch in range(data.epochs):
    pipeline.set_epoch(epoch)
    for images, labels in loader:
        images, target = pipeline(images.to(digits.DEVICE), labels.to(digits.DEVICE))
        loss = criterion(model(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step_update(step := step + 1)
    with optimizer.ema_weights():  # in the place of timm's ModelEma: part of the step
        loss, accuracy = digits.evaluate(model, pipeline, data.validation)
    print(f"epoch {epoch}: validation loss {loss:.3f}, accuracy {accuracy:.1%}")

with optimizer.ema_weights():
    loss, accuracy = digits.evaluate(model, pipeline, data.test)
print(f"test loss {loss:.3f}, accuracy {accuracy:.1%}")
