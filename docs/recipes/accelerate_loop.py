"""Accelerate: mixed precision, gradient accumulation and as many processes as `accelerate launch`
starts, around fused layers, optimizer and augmentation."""

import digits
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

import reg_kernels
from reg_kernels import augment, nn, optim

accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=2)
set_seed(0, device_specific=True)  # each process has masks of its own
data = digits.load(epochs=30)
loader = DataLoader(data.train, digits.BATCH, shuffle=True, drop_last=True)

# Convert before the optimizer is made, since the copy has parameters of its own, and before
# prepare() wraps the model. The step clips: there is no accelerator.clip_grad_norm_ to call.
model = reg_kernels.convert(digits.conv_net(), fuse=True)
optimizer = optim.AdamW(optim.param_groups(model, weight_decay=0.5), lr=4e-3, max_grad_norm=1.0)
steps = data.epochs * len(loader) // accelerator.gradient_accumulation_steps
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)

pipeline = augment.Pipeline(
    augment.RandomAffine(10, translate=(0.1, 0.1), interpolation="bilinear"),
    augment.Normalize(digits.MEAN, digits.STD),
    augment.Mixup(0.2, cutmix_alpha=1.0, num_classes=digits.CLASSES),
    seed=accelerator.process_index,
)
criterion = nn.CrossEntropyLoss()

for epoch in range(data.epochs):
    pipeline.set_epoch(epoch)
    for images, labels in loader:  # bytes, on the device already
        with accelerator.accumulate(model):
            images, target = pipeline(images, labels)
            loss = criterion(model(images), target)  # the prepared model autocasts by itself
            accelerator.backward(loss)
            optimizer.step()  # after every other batch, as schedule and zero_grad
            schedule.step()
            optimizer.zero_grad()
    loss, accuracy = digits.evaluate(model, pipeline, data.validation)
    accelerator.print(f"epoch {epoch}: validation loss {loss:.3f}, accuracy {accuracy:.1%}")

loss, accuracy = digits.evaluate(model, pipeline, data.test)
accelerator.print(f"test loss {loss:.3f}, accuracy {accuracy:.1%}")
accelerator.end_training()
