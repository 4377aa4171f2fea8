"""Hugging Face's Trainer: a small ViT with fused dropout, our AdamW as its optimizer, and images
that are augmented and mixed where the loss is computed, on the device."""

import tempfile

import digits
import torch
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

import reg_kernels
from reg_kernels import augment, nn, optim

pipeline = augment.Pipeline(
    augment.RandomAffine(10, translate=(0.1, 0.1), interpolation="bilinear"),
    augment.Normalize(digits.MEAN, digits.STD),
    augment.Mixup(0.1, label_smoothing=0.05, num_classes=digits.CLASSES),
    seed=0,
)
criterion = nn.CrossEntropyLoss()


class MixingTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # Not in the collator, which makes the next batch while the model may still be evaluated.
        pipeline.train(model.training)
        images, target = pipeline(inputs["pixel_values"], inputs["labels"])
        outputs = model(pixel_values=images)
        loss = criterion(outputs.logits, target)
        return (loss, outputs) if return_outputs else loss


def collate(samples):
    images, labels = zip(*samples, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.stack(labels)}


def accuracy(prediction):
    return {"accuracy": (prediction.predictions.argmax(1) == prediction.label_ids).mean()}


set_seed(0)
data = digits.load(epochs=60)
config = ViTConfig(
    **{"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": digits.CLASSES},
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "hidden_dropout_prob": 0.1, "initializer_range": 0.1},
)
model = reg_kernels.convert(ViTForImageClassification(config))  # the state_dict's keys are ViT's

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder,
        num_train_epochs=data.epochs,
        per_device_train_batch_size=digits.BATCH,
        per_device_eval_batch_size=500,
        weight_decay=0.05,
        lr_scheduler_type="cosine",
        max_grad_norm=0.0,  # the step clips
        eval_strategy="epoch",
        save_strategy="no",
        report_to="none",
    )
    trainer = MixingTrainer(
        model,
        arguments,
        train_dataset=data.train,
        eval_dataset=data.validation,
        data_collator=collate,
        compute_metrics=accuracy,
        # In the Trainer's own groups, which leave norms and biases without decay.
        optimizer_cls_and_kwargs=(optim.AdamW, {"lr": 2e-3, "max_grad_norm": 1.0}),
    )
    trainer.train()
    print(trainer.evaluate(data.test, metric_key_prefix="test"))
