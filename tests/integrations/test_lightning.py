"""The callback in Lightning's own trainer."""

import pytest
import torch
from torch import nn

from reg_kernels.training import StopReason

pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

from reg_kernels.integrations.lightning import EarlyStopping  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class Module(pl.LightningModule):
    """Its weight counts the steps, of which an epoch has two; logs the values that it is given."""

    def __init__(self, values, fail_after=None):
        super().__init__()
        self.values, self.fail_after = values, fail_after
        self.weight = nn.Parameter(torch.zeros(1))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def training_step(self, batch, _):
        self.seen += 1
        if self.fail_after is not None and self.seen > self.fail_after:
            raise OSError("out of batches")
        return -self.weight.sum()

    def validation_step(self, batch, _):
        self.log("val_loss", self.values[self.current_epoch])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(2, 1))

    def val_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(1, 1))


def fit(module, *callbacks, tmp_path, ckpt_path=None, **options):
    quiet = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    options = dict.fromkeys(quiet, False) | {"max_epochs": len(module.values)} | options
    trainer = pl.Trainer(
        accelerator="cpu", default_root_dir=tmp_path, callbacks=list(callbacks), **options
    )
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("restore_best", [True, False])
def test_the_best_weights_are_in_the_model(restore_best, tmp_path):
    module = Module([3.0, 1.0, 2.0, 2.0, 0.0])
    callback = EarlyStopping("val_loss", patience=2, restore_best=restore_best)
    trainer = fit(module, callback, tmp_path=tmp_path)
    assert trainer.current_epoch == 4
    stop = callback.stop
    assert (stop.reason, stop.best, stop.best_check) == (StopReason.PATIENCE, 1.0, 2)
    assert module.weight.item() == module.seen.item() == (4 if restore_best else 8)


def test_also_when_the_epochs_are_over_and_on_an_exception(tmp_path):
    module = Module([3.0, 1.0, 2.0])
    fit(module, EarlyStopping("val_loss"), tmp_path=tmp_path)
    assert module.weight.item() == 4
    module = Module([3.0, 1.0, 2.0], fail_after=5)
    saving = pl.callbacks.OnExceptionCheckpoint(tmp_path)
    options = {"tmp_path": tmp_path, "enable_checkpointing": True}
    with pytest.raises(OSError, match="out of batches"):
        fit(module, EarlyStopping("val_loss"), saving, **options)
    assert module.weight.item() == 4
    saved = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    assert saved["state_dict"]["weight"].item() == 5  # what training goes on from


def test_a_resumed_run_stops_at_the_same_check(tmp_path):
    values = [3.0, 1.0, 2.0, 2.0, 2.0, 0.0]
    whole = Module(values)
    saving = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    options = {"tmp_path": tmp_path, "enable_checkpointing": True}
    expected = EarlyStopping("val_loss", patience=3)
    fit(whole, expected, saving, **options)
    expected = expected.stop.state_dict()
    assert expected["checks"] == 5
    for epoch in (2, 4):  # at the latter the run had stopped
        module, callback = Module(values), EarlyStopping("val_loss", patience=3)
        trainer = fit(module, callback, ckpt_path=tmp_path / f"epoch={epoch}.ckpt", **options)
        assert trainer.global_step == 10 and trainer.current_epoch == 5
        assert callback.stop.reason is StopReason.PATIENCE
        found = callback.stop.state_dict()
        weights = zip(found.pop("weights").items(), expected["weights"].items(), strict=True)
        assert all(name == other and torch.equal(x, y) for (name, x), (other, y) in weights)
        assert found == {name: x for name, x in expected.items() if name != "weights"}
        assert module.weight.item() == whole.weight.item() == 4


def test_min_epochs_hold_a_stop_off_and_do_not_keep_it(tmp_path):
    values = [1.0, 2.0, 2.0, 0.5, 2.0, 2.0, 2.0]  # two without improvement before the third is over
    module, callback = Module(values), EarlyStopping("val_loss", patience=2)
    trainer = fit(module, callback, tmp_path=tmp_path, min_epochs=4)
    assert trainer.current_epoch == 6 and callback.stop.best_check == 4


def test_a_name_that_is_not_logged(tmp_path):
    with pytest.raises(RuntimeError, match=r"monitor must be what is logged \(val_loss\), got x"):
        fit(Module([1.0]), EarlyStopping("x"), tmp_path=tmp_path)
    fit(Module([1.0]), EarlyStopping("x", strict=False), tmp_path=tmp_path)
    with pytest.raises(ValueError, match="EarlyStopping: mode must be min or max, got 'least'"):
        EarlyStopping("x", mode="least")
