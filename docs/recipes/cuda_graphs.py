"""torch.compile with CUDA graphs, mode="reduce-overhead", and what to keep out of them. On a CPU
the same script compiles without graphs."""

import digits
import torch
from torch.utils.data import DataLoader

import reg_kernels
from reg_kernels import augment, nn, optim

torch.manual_seed(0)
data = digits.load(epochs=20)
# A graph is of one shape: no last batch of another size, and evaluation by the model itself.
loader = DataLoader(data.train, digits.BATCH, shuffle=True, drop_last=True)

# Convert, then compile: fused layers are one node each. Their masks are drawn inside of the graph,
# new ones at each replay, under torch.manual_seed.
model = reg_kernels.convert(digits.conv_net(), fuse=True).to(digits.DEVICE)
criterion = nn.CrossEntropyLoss()


@torch.compile(mode="reduce-overhead", fullgraph=True)
def forward(images, target):
    return criterion(model(images), target)


# Not in the graph: augmentation, whose program depends on what is drawn on the host, and the step.
# One launch steps all parameters, so a graph would gain nothing, and the schedule changes its lr.
pipeline = augment.Pipeline(
    augment.RandomAffine(10, translate=(0.1, 0.1), interpolation="bilinear"),
    augment.Normalize(digits.MEAN, digits.STD),
    augment.Mixup(0.2, cutmix_alpha=1.0, num_classes=digits.CLASSES),
    seed=0,
)
optimizer = optim.AdamW(optim.param_groups(model, weight_decay=0.5), lr=4e-3, max_grad_norm=1.0)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, data.epochs * len(loader))

for epoch in range(data.epochs):
    pipeline.set_epoch(epoch)
    total = torch.zeros((), device=digits.DEVICE)
    for images, labels in loader:
        images, target = pipeline(images.to(digits.DEVICE), labels.to(digits.DEVICE))
        torch.compiler.cudagraph_mark_step_begin()  # the last step's results may be written over
        loss = forward(images, target)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        total += loss.detach()  # kept before the next replay writes there; no .item() waits here
    print(f"epoch {epoch}: training loss {total.item() / len(loader):.3f}")

loss, accuracy = digits.evaluate(model, pipeline, data.test)
print(f"test loss {loss:.3f}, accuracy {accuracy:.1%}")
