"""The optimizers in the loops of trainers, by stand-ins of what these ask and do, and in the
libraries themselves where they are installed."""

import copy

import pytest
import torch
from torch import nn

from reg_kernels.optim import SGD, SGDW, Adam, AdamW

from support import DEVICE

KINDS = [AdamW, Adam, SGDW, SGD]
kinds = pytest.mark.parametrize("kind", KINDS)


def network():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)).to(DEVICE)


def batches(count, bad=()):
    """Inputs; of those in `bad` the loss's gradient is infinite."""
    torch.manual_seed(3)
    made = [torch.randn(4, 5, device=DEVICE) for _ in range(count)]
    for i in bad:
        made[i][0, 0] = torch.inf
    return made


def torchs(kind):
    return {AdamW: torch.optim.AdamW, Adam: torch.optim.Adam}.get(kind, torch.optim.SGD)


def scaler():
    return torch.amp.GradScaler(device=DEVICE, init_scale=64.0, growth_interval=2)


def results(loop, kind, options):
    """The parameters after a loop by ours and by torch's."""
    for of in (kind, torchs(kind)):
        model = network()
        yield loop(model, of(model.parameters(), **options))


OPTIONS = {AdamW: {"lr": 0.1}, Adam: {"lr": 0.1}, SGDW: {"lr": 0.1}, SGD: {"lr": 0.1}}


@kinds
def test_scaling_in_the_step_is_for_those_who_ask_for_it(kind):
    model = network()
    for options, supports in (({}, False), ({"fused": False}, False), ({"fused": True}, True)):
        optimizer = kind(model.parameters(), **options)
        copies = copy.deepcopy((model, optimizer))
        for of in (optimizer, copies[1]):
            assert bool(getattr(of, "_step_supports_amp_scaling", False)) == supports
        optimizer._step_supports_amp_scaling = not supports  # as people have helped themselves
        optimizer.load_state_dict(kind(model.parameters(), fused=not supports).state_dict())
        assert optimizer._step_supports_amp_scaling == supports


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@kinds
def test_clipping_of_a_trainer_that_asks_the_optimizer_first(kind, precision):
    # As Lightning's mixed precision: clipping is refused where the step would unscale by itself.
    def loop(model, optimizer):
        scale = scaler() if precision == "16-mixed" else None
        for x in batches(5, bad=[2] if scale else ()):

            def closure(x=x):
                optimizer.zero_grad()
                loss = model(x).square().mean()
                (loss if scale is None else scale.scale(loss)).backward()
                return loss

            if scale is None:
                optimizer.step(lambda closure=closure: clip(closure, model, optimizer))
                continue
            closure()
            scale.unscale_(optimizer)
            clip(lambda: None, model, optimizer)
            scale.step(optimizer)
            scale.update()
        return list(model.parameters())

    def clip(closure, model, optimizer):
        loss = closure()
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            raise RuntimeError("gradient clipping is not possible: the step unscales")
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        return loss

    ours, theirs = results(loop, kind, OPTIONS[kind])
    torch.testing.assert_close(ours, theirs)


@kinds
def test_a_trainer_that_looks_whether_the_step_was_called(kind):
    # As accelerate's AcceleratedOptimizer, which a schedule asks whether it is to move.
    seen = []

    def loop(model, optimizer):
        scale, schedule = scaler(), torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        skips = []
        for x in batches(5, bad=[1, 3]):
            called = []
            step = optimizer.step

            def patched(*args, step=step, called=called, **kwargs):
                called.append(True)
                return step(*args, **kwargs)

            scale.scale(model(x).square().mean()).backward()
            optimizer.step = patched
            scale.step(optimizer)
            scale.update()
            optimizer.step = step
            optimizer.zero_grad()
            skips.append(not called)
            if called:
                schedule.step()
        seen.append((skips, schedule.get_last_lr(), scale.get_scale()))
        return list(model.parameters())

    ours, theirs = results(loop, kind, OPTIONS[kind])
    torch.testing.assert_close(ours, theirs)
    assert seen[0] == seen[1]
    assert seen[0][0] == [False, True, False, True, False]


class Wrapped:
    """As Lightning's: of a class that derives from the optimizer's, and with its attributes."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        self.__class__ = type("Wrapped", (Wrapped, type(optimizer)), {})

    def __getattr__(self, name):
        return getattr(self._optimizer, name)


@kinds
def test_averages_that_are_swapped_in_by_a_wrapper(kind):
    model = network()
    optimizer = kind(model.parameters(), lr=0.1, max_grad_norm=1.0, ema_decay=0.5)
    wrapped = Wrapped(optimizer)
    model(batches(1)[0]).square().mean().backward()
    optimizer.step()
    assert torch.equal(wrapped.grad_norm, optimizer.grad_norm)
    trained = copy.deepcopy(list(model.parameters()))
    with wrapped.ema_weights():
        assert not torch.equal(model[0].weight, trained[0])
        with pytest.raises(RuntimeError, match=r"the averaged weights are swapped in"):
            optimizer.step()
    torch.testing.assert_close(list(model.parameters()), trained, rtol=0, atol=0)
    optimizer.step()
    wrapped.swap_in_ema()
    optimizer.swap_out_ema()


# The libraries themselves


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
@pytest.mark.filterwarnings("ignore")
def test_lightning_clips(precision, tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, kind):
            super().__init__()
            self.network, self.kind = network(), kind

        def training_step(self, batch):
            return self.network(batch).square().mean()

        def configure_optimizers(self):
            return self.kind(self.parameters(), lr=0.1)

    trained = []
    for kind in (AdamW, torch.optim.AdamW):
        trainer = lightning.Trainer(
            max_epochs=1,
            precision=precision,
            gradient_clip_val=0.05,
            accelerator="auto" if DEVICE == "cuda" else "cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        module = Module(kind)
        trainer.fit(module, torch.utils.data.DataLoader(torch.cat(batches(4)).cpu(), batch_size=4))
        trained.append([p.detach().cpu() for p in module.parameters()])
    torch.testing.assert_close(*trained)


def test_accelerate_sees_a_skipped_step():
    accelerate = pytest.importorskip("accelerate")
    from accelerate.optimizer import AcceleratedOptimizer

    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.Accelerator(cpu=DEVICE == "cpu")
    for kind in (AdamW, torch.optim.AdamW):
        model = network()
        scale = scaler()
        optimizer = AcceleratedOptimizer(kind(model.parameters(), lr=0.1), scaler=scale)
        skipped = []
        for x in batches(4, bad=[1]):
            optimizer.zero_grad()
            scale.scale(model(x).square().mean()).backward()
            optimizer.step()
            skipped.append(optimizer.step_was_skipped)
        assert skipped == [False, True, False, False]
    accelerate.state.AcceleratorState._reset_state(True)
