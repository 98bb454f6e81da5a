"""The optimizers inside Hugging Face's Trainer, Accelerate and Lightning, each as released, on the CPU.

A framework may call ``step`` differently, move and reload the state, scale the gradients and skip; the weights must be those
of the plain loop all the same, and an interrupted run must end with the bits of the undisturbed one.
"""

import importlib.util
import math

import pytest
import torch
from runs import FUSED
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

OPTIONS = {"AdaBayes": dict(lr=2e-2, batch_size=8), "AdaBayesFP": dict(lr=2e-2, sgd_lr=1.0)}
BATCH, STEPS, SAVED, WARMUP = 8, 9, 4, 3


@pytest.fixture(autouse=True)
def _one_thread():
    """These networks are tiny: threads would wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def needs(*packages):
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    reason = f"needs {', '.join(missing)}: pip install 'adabayes_fused[frameworks]'"
    return pytest.mark.skipif(bool(missing), reason=reason)


def examples():
    """As many as one run sees, in order."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(STEPS * BATCH, 6, generator=generator)
    return inputs, (inputs[:, 0] > inputs[:, 1]).long()


def batches(n=BATCH):
    return list(DataLoader(TensorDataset(*examples()), batch_size=n))


def network(seed=0, biases=True):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16, bias=biases), nn.Tanh(), nn.Linear(16, 2, bias=biases))


def from_zero(optimizer):
    """A warm-up whose first step has a learning rate of 0."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, t / WARMUP))


def weights_of(module):
    return [p.detach().clone() for p in module.parameters()]


def state_of(optimizer, module):
    return [{name: t.clone() for name, t in optimizer.state[p].items()} for p in module.parameters() if p in optimizer.state]


def assert_same(module, optimizer, other, expected):
    """The same bits of weights and state."""
    assert all(map(torch.equal, weights_of(module), weights_of(other)))
    found, wanted = state_of(optimizer, module), state_of(expected, other)
    assert len(found) == len(wanted) == len(weights_of(module))
    assert_same_state(found, wanted)


def assert_same_state(found, wanted):
    for entry, other in zip(found, wanted, strict=True):
        assert entry.keys() == other.keys()
        for name, value in other.items():
            assert entry[name].dtype == value.dtype, name
            assert torch.equal(entry[name], value), name


def plain(name, clip=None, accumulate=1, **kind):
    """The loop that the frameworks replace: (network, optimizer, losses)."""
    model = network(**kind)
    optimizer = FUSED[name](model.parameters(), **OPTIONS[name])
    scheduler, losses = from_zero(optimizer), []
    for t, (inputs, labels) in enumerate(batches(BATCH // accumulate), start=1):
        loss = cross_entropy(model(inputs), labels) / accumulate
        loss.backward()
        losses.append(loss.item())
        if t % accumulate == 0:
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return model, optimizer, losses


# --- Hugging Face Trainer ---------------------------------------------------------------------------------------------

huggingface = needs("transformers", "accelerate")


class WithLoss(nn.Module):
    """A network as the Trainer wants it. That it takes what it does not use is what docs/huggingface.md warns of."""

    accepts_loss_kwargs = False

    def __init__(self, seed=0, biases=True):
        super().__init__()
        self.network = network(seed, biases)

    def forward(self, inputs, labels, **kwargs):
        return {"loss": cross_entropy(self.network(inputs), labels)}


def trainer_of(folder, name, way, seed=0, biases=True, resume=None, **arguments):
    """Trains; returns the Trainer, the model, and the weights and learning rates after each step."""
    import transformers

    seen = []

    class Watch(transformers.TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
            seen.append((weights_of(model), [group["lr"] for group in optimizer.param_groups]))

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    data = [{"inputs": x, "labels": y} for x, y in zip(*examples(), strict=True)]
    model = WithLoss(seed, biases)
    defaults = dict(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        warmup_steps=WARMUP,
        lr_scheduler_type="constant_with_warmup",
        weight_decay=0.5,
        max_grad_norm=0.0,
        save_steps=SAVED,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    args = transformers.TrainingArguments(**{**defaults, **arguments})
    if way == "optimizers":
        optimizer = FUSED[name](model.parameters(), **OPTIONS[name])
        given = dict(optimizers=(optimizer, from_zero(optimizer)))
    else:
        given = dict(optimizer_cls_and_kwargs=(FUSED[name], dict(OPTIONS[name])))
    trainer = InOrder(model, args, train_dataset=data, callbacks=[Watch()], **given)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, model, seen


@huggingface
@pytest.mark.parametrize("way", ["optimizers", "optimizer_cls_and_kwargs"])
@pytest.mark.parametrize("name", FUSED)
def test_trainer_goes_on_from_its_checkpoint_bit_for_bit(name, way, tmp_path):
    """Warm-up from 0; other weights and options are there before the checkpoint is loaded."""
    trainer, model, seen = trainer_of(tmp_path, name, way)
    assert [lrs[0] for _, lrs in seen] == pytest.approx([OPTIONS[name]["lr"] * min(1, t / WARMUP) for t in range(STEPS)])
    assert all(map(torch.equal, seen[0][0], weights_of(WithLoss())))  # lr = 0
    assert not any(map(torch.equal, seen[1][0], seen[0][0]))
    assert all(float(entry["step"]) == STEPS for entry in state_of(trainer.optimizer, model))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]

    resumed, other, later = trainer_of(tmp_path, name, way, seed=1, resume=str(tmp_path / f"checkpoint-{SAVED}"))
    assert len(later) == STEPS - SAVED
    assert_same(other, resumed.optimizer, model, trainer.optimizer)


@huggingface
@pytest.mark.parametrize("name", FUSED)
def test_trainer_takes_the_steps_of_the_plain_loop(name, tmp_path):
    trainer, model, _ = trainer_of(tmp_path, name, "optimizers")
    expected, optimizer, _ = plain(name)
    assert_same(model, trainer.optimizer, expected, optimizer)


@huggingface
@pytest.mark.parametrize("name", FUSED)
def test_trainer_with_an_empty_group(name, tmp_path):
    """No biases: of the Trainer's two groups, the one without weight decay is empty. It is saved and loaded too."""
    trainer, model, _ = trainer_of(tmp_path, name, "optimizer_cls_and_kwargs", biases=False)
    groups = trainer.optimizer.param_groups
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(2, 0.5), (0, 0.0)]
    resumed, other, _ = trainer_of(
        tmp_path, name, "optimizer_cls_and_kwargs", seed=1, biases=False, resume=str(tmp_path / f"checkpoint-{SAVED}")
    )
    assert_same(other, resumed.optimizer, model, trainer.optimizer)


@huggingface
def test_trainer_decays_the_groups_it_makes(tmp_path):
    """Its ``weight_decay`` reaches the matrices and leaves biases alone."""
    decays = {}
    for weight_decay in (0.0, 0.5):
        trainer, model, _ = trainer_of(tmp_path, "AdaBayesFP", "optimizer_cls_and_kwargs", weight_decay=weight_decay, max_steps=2)
        assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [weight_decay, 0.0]
        decays[weight_decay] = {n: p.detach() for n, p in model.named_parameters()}
    start = dict(WithLoss().named_parameters())
    lr = OPTIONS["AdaBayesFP"]["lr"] / WARMUP  # of the second step; the first has 0
    for key, without in decays[0.0].items():
        expected = without - lr * 0.5 * start[key].detach() if key.endswith("weight") else without
        torch.testing.assert_close(decays[0.5][key], expected, rtol=1e-6, atol=1e-7)


@huggingface
def test_trainer_averages_accumulated_batches_where_told_to(tmp_path):
    two = dict(per_device_train_batch_size=BATCH // 2, gradient_accumulation_steps=2)
    trainer, model, _ = trainer_of(tmp_path, "AdaBayes", "optimizers", **two)
    expected, optimizer, _ = plain("AdaBayes", accumulate=2)
    assert_same(model, trainer.optimizer, expected, optimizer)


# --- Accelerate -------------------------------------------------------------------------------------------------------

accelerate_ = needs("accelerate")


@pytest.fixture
def accelerator():
    """A function that makes one, on the CPU, as a new process would."""
    import accelerate

    def make(**options):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()
        return accelerate.Accelerator(cpu=True, **options)

    yield make
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


@accelerate_
@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_prepare_leaves_the_state_as_it_is(name, lean, accelerator):
    """bfloat16 parameters have float32 state with bits that bfloat16 has not; a parameter without a gradient has none."""
    model = network().to(torch.bfloat16)
    late = model[2].bias.requires_grad_(False)
    optimizer = FUSED[name](model.parameters(), lean=lean, **OPTIONS[name])
    for inputs, labels in batches()[:3]:
        cross_entropy(model(inputs.bfloat16()), labels).backward()
        optimizer.step()
    before, weights = state_of(optimizer, model), weights_of(model)
    assert len(before) == 3
    assert all(t.dtype == torch.float32 for entry in before for t in entry.values())
    assert any(not torch.equal(t, t.bfloat16().float()) for entry in before for t in entry.values())
    prepared, wrapped = accelerator().prepare(model, optimizer)
    assert wrapped.optimizer is optimizer
    assert_same_state(state_of(optimizer, prepared), before)
    assert late not in optimizer.state
    assert all(map(torch.equal, weights_of(prepared), weights))


@accelerate_
@pytest.mark.parametrize("name", FUSED)
def test_prepare_leaves_a_new_optimizer_new(name, accelerator):
    model = network()
    optimizer = FUSED[name](model.parameters(), **OPTIONS[name])
    accelerator().prepare(model, optimizer)
    assert not optimizer.state


def accelerated(name, make, accumulate=1, seed=0, start=0, stop=STEPS, folder=None, **policy):
    """Trains on batches ``start`` to ``stop``; loads from ``folder`` first unless it starts at 0, else saves there at SAVED."""
    tool = make(gradient_accumulation_steps=accumulate)
    model = network(seed)
    optimizer = FUSED[name](model.parameters(), **OPTIONS[name], **policy)
    model, optimizer, scheduler = tool.prepare(model, optimizer, from_zero(optimizer))
    if start:
        tool.load_state(folder)
    for t, (inputs, labels) in enumerate(batches(BATCH // accumulate)[start:stop], start=start + 1):
        with tool.accumulate(model):
            tool.backward(cross_entropy(model(inputs), labels))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if folder and t == SAVED and not start:
            tool.save_state(folder)
    return model, optimizer.optimizer


@accelerate_
@pytest.mark.parametrize("name", FUSED)
def test_accelerate_goes_on_from_its_checkpoint_bit_for_bit(name, accelerator, tmp_path):
    folder = str(tmp_path / "saved")
    model, optimizer = accelerated(name, accelerator, folder=folder)
    assert_same(model, optimizer, *plain(name)[:2])
    resumed, other = accelerated(name, accelerator, seed=1, start=SAVED, folder=folder)
    assert_same(resumed, other, model, optimizer)


@accelerate_
@pytest.mark.parametrize("name", FUSED)
def test_accelerate_keeps_8_bits(name, accelerator, tmp_path):
    """Preparing and loading cast no state."""
    folder, policy = str(tmp_path / "saved"), dict(lean=True, state_dtype="8bit")
    model, optimizer = accelerated(name, accelerator, folder=folder, **policy)
    resumed, other = accelerated(name, accelerator, seed=1, start=SAVED, folder=folder, **policy)
    assert_same(resumed, other, model, optimizer)
    assert {entry["exp_avg"].dtype for entry in other.state.values()} == {torch.uint8}


@accelerate_
@pytest.mark.parametrize("name", FUSED)
def test_accelerate_accumulates_gradients(name, accelerator):
    model, optimizer = accelerated(name, accelerator, accumulate=2, stop=2 * STEPS)
    assert_same(model, optimizer, *plain(name, accumulate=2)[:2])
    whole = plain(name)[0]
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@accelerate_
@pytest.mark.parametrize("fused_unscale", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_accelerate_at_an_overflow(name, fused_unscale, accelerator):
    """Accelerate's own wrappers over torch's scaler, put together by hand: Accelerate has fp16 on accelerators alone. Nothing
    changes at an overflow, whoever skips; it is reported, and the scheduler waits, with ``fused_unscale=False``."""
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.scheduler import AcceleratedScheduler

    accelerator()
    model, other = network(), network()
    optimizer, expected = (
        FUSED[name](m.parameters(), **OPTIONS[name], fused_unscale=fused) for m, fused in ((model, fused_unscale), (other, True))
    )
    scheduler, schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), []
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    wrapped = AcceleratedOptimizer(optimizer, scaler=scaler)
    wrapped_scheduler = AcceleratedScheduler(scheduler, wrapped)
    for t, (inputs, labels) in enumerate(batches()[:5]):
        before, state = weights_of(model), state_of(optimizer, model)
        scaler.scale(cross_entropy(model(inputs), labels)).backward()
        if t in (0, 2):
            model[0].weight.grad[1, 1] = math.inf
        expected.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"]
        wrapped.step()
        wrapped_scheduler.step()
        schedule.append(wrapped.step_was_skipped)
        if t in (0, 2):
            assert all(map(torch.equal, weights_of(model), before))
            assert_same_state(state_of(optimizer, model), state)
        else:
            cross_entropy(other(inputs), labels).backward()
            expected.step()
        wrapped.zero_grad()
        expected.zero_grad()
    assert scaler.get_scale() == 256.0
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
    assert int(optimizer.skipped_steps) == (2 if fused_unscale else 0)  # else the scaler does not call step
    if not fused_unscale:
        assert schedule == [True, False, True, False, False]
        assert optimizer.param_groups[0]["lr"] == OPTIONS[name]["lr"] * 0.5**3


# --- Lightning --------------------------------------------------------------------------------------------------------

lightning_ = needs("lightning")
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:Be aware that when using `ckpt_path`")  # of Lightning


def lightning_run(name, folder, policy=None, seed=0, scaled=False, bad=(), resume=None, **options):
    """Trains over the examples in order; returns the module, with its optimizer and what was seen of each step."""
    import lightning
    from lightning.pytorch.plugins.precision import MixedPrecision

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = network(seed)
            self.losses = []
            self.closures = []

        def training_step(self, batch, index):
            inputs, labels = batch
            loss = cross_entropy(self.network(inputs).float(), labels)
            self.losses.append(loss.item())
            return loss * math.inf if index in bad else loss

        def configure_optimizers(self):
            self.optimizer = FUSED[name](self.parameters(), **OPTIONS[name], **(policy or {}))
            scheduler = {"scheduler": from_zero(self.optimizer), "interval": "step"}
            self.optimizer.register_step_pre_hook(lambda _, args, kwargs: self.closures.append(kwargs.get("closure")))
            return {"optimizer": self.optimizer, "lr_scheduler": scheduler}

    module = Module()
    if scaled:
        options["plugins"] = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))]
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
        **{"max_epochs": 1, "enable_checkpointing": False, **options},
    )
    trainer.fit(module, DataLoader(TensorDataset(*examples()), batch_size=BATCH), ckpt_path=resume)
    module.trained_by = trainer
    return module


@lightning_
@pytest.mark.parametrize("name", FUSED)
def test_lightning_clips_and_takes_the_steps_of_the_plain_loop(name, tmp_path):
    """In float32: ``step`` runs the closure Lightning gives it, which computes the gradients, and clips them after."""
    module = lightning_run(name, tmp_path, gradient_clip_val=0.05)
    model, optimizer, losses = plain(name, clip=0.05)
    assert len(module.closures) == STEPS
    assert all(map(callable, module.closures))
    assert module.losses == losses
    assert_same(module.network, module.optimizer, model, optimizer)
    assert not any(map(torch.equal, weights_of(model), weights_of(plain(name)[0])))  # the clipping is felt


@lightning_
@pytest.mark.parametrize("name", FUSED)
def test_lightning_in_mixed_precision_clips(name, tmp_path):
    """Lightning clips under ``fused_unscale=False``; the optimizer's own clipping does the same. An overflow is skipped."""
    runs = [
        lightning_run(name, tmp_path, dict(fused_unscale=False), scaled=True, bad=(4,), gradient_clip_val=0.05),
        lightning_run(name, tmp_path, dict(max_grad_norm=0.05), scaled=True, bad=(4,)),
        lightning_run(name, tmp_path, scaled=True, bad=(4,)),  # not clipped
    ]
    theirs, ours, neither = (run.network for run in runs)
    for p, q, r in zip(theirs.parameters(), ours.parameters(), neither.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
        assert (p - r).abs().max() > 1e-4
    for run in runs:
        assert {float(entry["step"]) for entry in state_of(run.optimizer, run)} == {STEPS - 1}
        assert all(p.isfinite().all() for p in run.parameters())
        assert run.losses[-1] < run.losses[0]
    assert [int(run.optimizer.skipped_steps) for run in runs] == [0, 1, 1]


@lightning_
def test_lightning_refuses_to_clip_what_is_still_scaled(tmp_path):
    with pytest.raises(RuntimeError, match="AdaBayes, does not allow for gradient clipping"):
        lightning_run("AdaBayes", tmp_path, scaled=True, gradient_clip_val=0.05)


@lightning_
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_lightning_goes_on_from_its_checkpoint_bit_for_bit(name, scaled, tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    saving = ModelCheckpoint(dirpath=tmp_path / "saved", filename="{epoch}", every_n_epochs=1, save_top_k=-1)
    twice = dict(scaled=scaled, bad=(4,) if scaled else (), max_epochs=2)
    whole = lightning_run(name, tmp_path, callbacks=[saving], enable_checkpointing=True, **twice)
    resumed = lightning_run(name, tmp_path, seed=1, resume=str(tmp_path / "saved" / "epoch=0.ckpt"), **twice)
    assert resumed.losses == whole.losses[STEPS:]
    assert_same(resumed.network, resumed.optimizer, whole.network, whole.optimizer)
