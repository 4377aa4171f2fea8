"""What a user's type checker sees of the public functions and classes; `make lint` runs mypy."""

from __future__ import annotations

from typing import assert_type

import torch
from torch import Tensor, nn

import reg_kernels
from reg_kernels import adversarial, augment, optim, training
from reg_kernels import functional as F
from reg_kernels import nn as fused

x = torch.ones(4, 3, 8, 8)
model: nn.Module = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())

assert_type(F.dropout(x, 0.1, training=True, inplace=False, backend="native"), Tensor)
assert_type(F.drop_path(x, 0.1, residual=x, layer_scale=x[0]), Tensor)
assert_type(F.gaussian_noise(x, 0.1), Tensor)
assert_type(F.uniform_noise(x, 0.1), Tensor)
assert_type(F.salt_and_pepper(x, 0.1), Tensor)
assert_type(F.batch_norm(x, None, None, training=True), Tensor)
assert_type(F.batch_norm_act(x, None, None, residual=x, training=True, activation="relu"), Tensor)
assert_type(F.l1_penalty(model.parameters()), Tensor)
assert_type(F.mixup(x, 0.3, torch.arange(4)), Tensor)
assert_type(F.adversarial_step_(x, x, x, torch.ones(4), 0.1, "l2", 0, 1), Tensor)
assert_type(F.cross_entropy(x, torch.zeros(4, 8, 8)), Tensor)

assert_type(fused.Dropout(0.5, backend="native").forward(x), Tensor)
assert_type(fused.BatchNorm2d(3).eps, float)
layer: nn.BatchNorm2d = fused.BatchNormAct2d(3, activation="silu", drop=0.1)
loss: nn.CrossEntropyLoss = fused.CrossEntropyLoss(label_smoothing=0.1)
target = augment.MixedTarget(torch.arange(4), torch.arange(4), 0.5)
assert_type(target.labels, Tensor)
assert_type(target.to_dense(10), Tensor)
mixup = augment.Mixup(0.2, num_classes=10)
flip = augment.RandomHorizontalFlip()
pipeline = augment.Pipeline(flip, augment.from_timm("rand-m9"), mixup, dtype=torch.float16)
params: augment.Params = pipeline.train()(x, torch.arange(4), return_params=True)[-1]
assert_type(pipeline.apply(x, params), Tensor)
assert_type(params["RandomHorizontalFlip.applied"], Tensor)

assert_type(adversarial.PGD(model, 8 / 255, norm="l2")(x, torch.arange(4)), Tensor)
assert_type(adversarial.trades_loss(model, x, torch.arange(4), beta=6.0), Tensor)

groups = optim.param_groups(model, weight_decay=0.1)
optimizer: torch.optim.Optimizer = optim.AdamW(groups, lr=1e-3, max_grad_norm=1.0)

with training.EarlyStopping(model, patience=3, optimizer=optimizer) as stop:
    assert_type(stop(x.mean(), may_stop=False), bool)
assert_type(stop.reason, training.StopReason | None)

assert_type(reg_kernels.convert(model, fuse=True, report=print), nn.Module)
assert_type(reg_kernels.fold_batch_norm(model), nn.Module)
with reg_kernels.backend("triton"):
    pass
