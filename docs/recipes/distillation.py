"""A teacher taught first, then a student of a tenth of its size that learns from the teacher's
scores and from the labels."""

import digits
import torch
from torch.utils.data import DataLoader

import reg_kernels
from reg_kernels import augment, nn, optim

torch.manual_seed(0)
data = digits.load(epochs=30)
loader = DataLoader(data.train, digits.BATCH, shuffle=True, drop_last=True)
pipeline = augment.Pipeline(
    augment.RandomAffine(10, translate=(0.1, 0.1), interpolation="bilinear"),
    augment.Normalize(digits.MEAN, digits.STD),
    augment.Mixup(0.2, num_classes=digits.CLASSES, label_smoothing=0.0),
    seed=0,
)


def train(model, loss_of):
    """Trains a model, where `loss_of(images, target)` is its loss."""
    optimizer = optim.AdamW(optim.param_groups(model, weight_decay=0.5), lr=4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, data.epochs * len(loader))
    for epoch in range(data.epochs):
        pipeline.set_epoch(epoch)
        for images, labels in loader:
            loss = loss_of(*pipeline(images.to(digits.DEVICE), labels.to(digits.DEVICE)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model


def net(width):
    return reg_kernels.convert(digits.conv_net(width), fuse=True).to(digits.DEVICE)


cross_entropy = nn.CrossEntropyLoss()
teacher = net(48)
train(teacher, lambda images, target: cross_entropy(teacher(images), target))
teacher.eval().requires_grad_(False)

# alpha T^2 KL(teacher || student) + (1 - alpha) CE, in one pass over both scores. The teacher sees
# the images as the student does, mixed ones too.
distillation = nn.DistillationLoss(temperature=4.0, alpha=0.7)


def by_the_teacher(student):
    def loss(images, target):
        with torch.no_grad():
            scores = teacher(images)
        return distillation(student(images), scores, target)

    return loss


student, alone = net(6), net(6)
alone.load_state_dict(student.state_dict())  # the same beginning
train(student, by_the_teacher(student))
train(alone, lambda images, target: cross_entropy(alone(images), target))

nets = {"teacher": teacher, "student": student, "the same net without a teacher": alone}
for name, model in nets.items():
    parameters = sum(p.numel() for p in model.parameters())
    loss, accuracy = digits.evaluate(model, pipeline, data.test)
    print(f"{name}: {parameters} parameters, test loss {loss:.3f}, accuracy {accuracy:.1%}")
