"""Lightning: fused layers, optimizer and augmentation in a LightningModule, and early stopping that
leaves the best weights behind."""

import digits
import lightning as L
import torch
from torch.utils.data import DataLoader

import reg_kernels
from reg_kernels import augment, nn, optim
from reg_kernels.integrations.lightning import EarlyStopping


class Classifier(L.LightningModule):
    def __init__(self, steps: int):
        super().__init__()
        self.steps = steps
        self.model = reg_kernels.convert(digits.conv_net(), fuse=True)
        self.criterion = nn.CrossEntropyLoss()
        self.pipeline = augment.Pipeline(
            augment.RandomAffine(10, translate=(0.1, 0.1), interpolation="bilinear"),
            augment.Normalize(digits.MEAN, digits.STD),
            augment.Mixup(0.2, cutmix_alpha=1.0, num_classes=digits.CLASSES),
            seed=0,
        )

    def configure_optimizers(self):
        # The step clips, so the Trainer gets no gradient_clip_val.
        groups = optim.param_groups(self.model, weight_decay=0.5)
        optimizer = optim.AdamW(groups, lr=4e-3, max_grad_norm=1.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_train_epoch_start(self):
        self.pipeline.set_epoch(self.current_epoch)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        """On the GPU where there is one: bytes are what was copied to it."""
        return self.pipeline.train(self.training)(*batch)

    def training_step(self, batch):
        images, target = batch
        return self.criterion(self.model(images), target)

    def validation_step(self, batch):
        self.log_scores("validation", *batch)

    def test_step(self, batch):
        self.log_scores("test", *batch)

    def log_scores(self, stage, images, labels):
        scores = self.model(images)
        self.log(f"{stage}_loss", self.criterion(scores, labels), prog_bar=True)
        self.log(f"{stage}_accuracy", (scores.argmax(1) == labels).float().mean(), prog_bar=True)


if __name__ == "__main__":
    L.seed_everything(0)
    data = digits.load(epochs=40)
    loader = DataLoader(data.train, digits.BATCH, shuffle=True, drop_last=True)
    validation, test = (DataLoader(part, 500) for part in (data.validation, data.test))
    trainer = L.Trainer(
        max_epochs=data.epochs,
        devices=1,
        precision="bf16-mixed",
        callbacks=[EarlyStopping("validation_loss", patience=10, verbose=True)],
        logger=False,
        enable_checkpointing=False,
    )
    model = Classifier(data.epochs * len(loader))
    trainer.fit(model, loader, validation)
    trainer.test(model, test)
