"""A training loop of plain PyTorch with fused layers, augmentation, Mixup and CutMix, label
smoothing, decoupled weight decay, averaged weights and early stopping."""

import digits
import torch
from torch.utils.data import DataLoader

import reg_kernels
from reg_kernels import augment, nn, optim
from reg_kernels.training import EarlyStopping

torch.manual_seed(0)
data = digits.load(epochs=60)
loader = DataLoader(data.train, digits.BATCH, shuffle=True, drop_last=True)

# A copy whose BatchNorm, ReLU and Dropout run fused; its state_dict is the model's.
model = reg_kernels.convert(digits.conv_net(), fuse=True).to(digits.DEVICE)

# Weights decay; biases and norms do not. Clipping and averaging are part of the step.
optimizer = optim.AdamW(
    optim.param_groups(model, weight_decay=0.5), lr=4e-3, max_grad_norm=1.0, ema_decay=0.98
)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, data.epochs * len(loader))

# One pass from bytes to the normalised batch, and one more that mixes it. Mixup smooths labels, so
# the loss does not.
pipeline = augment.Pipeline(
    augment.RandomAffine(10, translate=(0.1, 0.1), scale=(0.9, 1.1), interpolation="bilinear"),
    augment.Normalize(digits.MEAN, digits.STD),
    augment.Mixup(0.2, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=digits.CLASSES),
    seed=0,
)
criterion = nn.CrossEntropyLoss()

# Checks are of the averaged weights; those of the best one are in the model after the block.
with EarlyStopping(model, patience=10, optimizer=optimizer) as stop:
    for epoch in range(data.epochs):
        pipeline.set_epoch(epoch)
        for images, labels in loader:
            images, target = pipeline(images.to(digits.DEVICE), labels.to(digits.DEVICE))
            loss = criterion(model(images), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        with optimizer.ema_weights():
            loss, accuracy = digits.evaluate(model, pipeline, data.validation)
        print(f"epoch {epoch}: validation loss {loss:.3f}, accuracy {accuracy:.1%}")
        if stop(loss):
            print(f"stopped: no better loss since epoch {stop.best_check - 1}")
            break

loss, accuracy = digits.evaluate(model, pipeline, data.test)
print(f"test loss {loss:.3f}, accuracy {accuracy:.1%}")
