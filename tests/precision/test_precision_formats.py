"""Number formats on a CPU: what is chosen, what is said, what is computed, what is kept."""

import copy
import logging
import math
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from cvtrain.errors import ConfigError, DivergedError
from cvtrain.precision import Amp, Bf16, Fp16, Fp32, Precision, Tf32, cpu_features, native_dtype

CPU = torch.device("cpu")
GO_ON = torch.zeros(())
OPTIONS = sorted((Path(__file__).resolve().parents[2] / "configs" / "precision").glob("*.yaml"))
NATIVE = native_dtype(CPU)[0]
needs_bf16 = pytest.mark.skipif(NATIVE is None, reason="this CPU has no native bf16")


@pytest.fixture(autouse=True)
def settings():
    threads = torch.get_num_threads()
    tf32 = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32


@pytest.fixture
def problem():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )
    labels = torch.arange(16) % 4
    images = torch.randn(16, 3, 12, 12) + torch.randn(4, 3, 1, 1)[labels]
    return model, lambda trial: nn.functional.cross_entropy(trial(images).float(), labels)


def ready(precision, problem):
    precision.setup(CPU, *problem)
    return precision


def scaled(problem):
    """The fp16 path on a CPU, which `Fp16` refuses because it is slow, not because it is wrong."""
    precision = Fp16()
    Precision.setup(precision, CPU, *problem)
    return precision


def amp_lines(caplog):
    return [message for message in caplog.messages if message.startswith("precision: amp")]


def test_native_bf16_is_what_the_cpus_flags_say():
    dtype, reason = native_dtype(CPU)
    flags = cpu_features() & {"avx512_bf16", "amx_bf16", "bf16"}
    if dtype is None:
        assert "no native bf16" in reason
        assert not flags or not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    else:
        assert dtype is torch.bfloat16
        assert flags
        assert ("AMX" in reason) == ("amx_bf16" in flags)
        assert ("AVX512-BF16" in reason) == ("avx512_bf16" in flags)


def test_amp_says_in_one_line_what_it_computes_in(problem, caplog):
    caplog.set_level(logging.INFO, logger="cvtrain")
    precision = ready(Amp(), problem)
    (line,) = amp_lines(caplog)
    assert precision.describe() in ("float32", "bfloat16")
    assert (f"stays with {precision.describe()}" in line) or (f"uses {precision.describe()}" in line)
    assert ("native" if NATIVE is None else "×") in line


@pytest.mark.parametrize(
    ("ratio", "chosen"), [(0.5, "float32"), (1.0, "float32"), (1.049, "float32"), (1.05, "bfloat16"), (3.0, "bfloat16")]
)
@needs_bf16
def test_amp_takes_bf16_only_when_the_probe_finds_it_clearly_faster(problem, caplog, monkeypatch, ratio, chosen):
    caplog.set_level(logging.INFO, logger="cvtrain")
    monkeypatch.setattr(Amp, "_speedup", lambda *_: ratio)
    precision = ready(Amp(), problem)
    assert precision.describe() == chosen
    (line,) = amp_lines(caplog)
    assert f"{ratio:.2f}×" in line
    assert ("stays with float32" in line) == (chosen == "float32")


@needs_bf16
def test_amp_without_a_probe_takes_the_native_type(problem, caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="cvtrain")
    monkeypatch.setattr(Amp, "_speedup", lambda *_: pytest.fail("probed"))
    assert ready(Amp(probe=False), problem).describe() == "bfloat16"
    assert len(amp_lines(caplog)) == 1


@pytest.mark.skipif(NATIVE is not None, reason="this CPU has native bf16")
def test_amp_stays_with_float32_where_nothing_is_native(problem):
    assert ready(Amp(), problem).describe() == "float32"


def test_the_probe_leaves_the_model_its_gradients_and_its_mode_as_they_were(problem):
    model, loss = problem
    model.eval()
    before = copy.deepcopy(model.state_dict())
    amp = Amp()
    amp.dtype = torch.bfloat16
    ratio = amp._speedup(model, loss)
    assert 0 < ratio < 1000
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_fp16_on_a_cpu_is_refused_with_the_fix(problem):
    with pytest.raises(ConfigError, match=r"precision=fp16 with device=cpu.*precision=amp"):
        ready(Fp16(), problem)


@pytest.mark.parametrize(("kind", "dtype"), [(Fp32, torch.float32), (Tf32, torch.float32), (Bf16, torch.bfloat16)])
def test_products_are_computed_in_the_type_and_the_weights_stay_float32(problem, kind, dtype):
    precision = ready(kind(), problem)
    model = problem[0]
    with precision.autocast():
        assert model(torch.randn(2, 3, 8, 8)).dtype is dtype
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert precision.describe() == str(dtype).removeprefix("torch.")


def test_fp32_turns_tensorfloat32_off_and_tf32_turns_it_on_and_says_that_a_cpu_has_none(problem, caplog):
    caplog.set_level(logging.INFO, logger="cvtrain")
    ready(Tf32(), problem)
    assert torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.allow_tf32
    assert caplog.messages == ["precision: tf32 needs an NVIDIA GPU of capability 8.0; this run computes in float32"]
    ready(Fp32(), problem)
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32


def train(precision, problem, steps=20, clip=None, lr=0.2):
    model = copy.deepcopy(problem[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    losses = []
    for _ in range(steps):
        with precision.autocast():
            loss = problem[1](model)
        precision.backward(loss)
        precision.clip(optimizer, clip, None)
        precision.step(optimizer, GO_ON)
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, model


def test_the_losses_of_bf16_and_scaled_fp16_training_follow_those_of_fp32(problem):
    golden, _ = train(ready(Fp32(), problem), problem)
    assert golden[-1] < 0.8 * golden[0]
    for precision in (ready(Bf16(), problem), scaled(problem)):
        losses, model = train(precision, problem)
        assert losses != golden
        assert losses == pytest.approx(golden, rel=0.05, abs=0.02)
        assert all(torch.isfinite(p).all() for p in model.parameters())


def test_fp32_training_is_plain_torch_to_the_bit(problem):
    losses, model = train(ready(Fp32(), problem), problem, clip=0.5)
    plain = copy.deepcopy(problem[0])
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.2, momentum=0.9)
    expected = []
    for _ in range(20):
        loss = problem[1](plain)
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(float(loss.detach()))
    assert losses == expected
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("make", [lambda p: ready(Fp32(), p), scaled])
def test_the_norm_that_is_returned_and_clipped_is_the_unscaled_one(problem, make):
    precision = make(problem)
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    precision.backward((weight * torch.tensor([3.0, 4.0])).sum())
    [norm] = precision.clip(optimizer, 1.0, None)
    precision.step(optimizer, GO_ON)
    assert float(norm) == pytest.approx(5.0)
    assert weight.detach().tolist() == pytest.approx([3.0 - 0.6, 4.0 - 0.8], abs=1e-5)
    optimizer.zero_grad()
    precision.backward((weight * torch.tensor([6.0, 8.0])).sum())
    assert math.hypot(*precision.clip(optimizer, None, 2.0)) == pytest.approx(math.sqrt(8))
    assert weight.grad.tolist() == [2.0, 2.0]


@pytest.mark.parametrize("clip", [None, 1.0])
def test_an_overflow_under_scaling_skips_the_step_and_lowers_the_scale(problem, clip):
    precision = scaled(problem)
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scale = precision.scaler.get_scale()
    precision.backward((weight * torch.tensor([float("inf"), 1.0])).sum())
    precision.clip(optimizer, clip, None)
    precision.step(optimizer, GO_ON)
    optimizer.zero_grad()
    assert weight.detach().tolist() == [1.0, 1.0]
    assert precision.skipped == 1
    assert precision.scaler.get_scale() == scale / 2
    precision.backward(weight.sum())
    precision.clip(optimizer, clip, None)
    precision.step(optimizer, GO_ON)
    assert weight.detach().tolist() != [1.0, 1.0]
    assert precision.skipped == 1


def slowed(monkeypatch, seconds):
    """Let a clock of the test's own tell how long a step takes: `seconds(round, low)`; return the losses taken."""
    taken, now = [], [0.0]
    monkeypatch.setattr("cvtrain.precision.time.perf_counter", lambda: now[0])
    weight = nn.Parameter(torch.ones(1))

    def loss(_):
        low = torch.is_autocast_enabled("cpu")
        now[0] += seconds(sum(which == low for which in taken), low)
        taken.append(low)
        return weight.sum()

    return taken, loss


@pytest.mark.parametrize(
    ("seconds", "ratio", "steps"),
    [
        (lambda i, low: 0.01 if low else 0.02, 2.0, 24),
        # Another process disturbs all rounds but one of each: the median would say slower.
        (lambda i, low: (0.01 if low else 0.02) if i == 3 else (0.05 if low else 0.03), 2.0, 24),
        # The first round makes kernels and does not count.
        (lambda i, low: (2.0 if low else 0.1) if i == 0 else (0.01 if low else 0.02), 2.0, 4),
        # A step of seconds: two steps are all that a probe may cost.
        (lambda i, low: 2.0 if low else 4.0, 2.0, 2),
    ],
)
def test_a_probe_compares_the_fastest_rounds_and_is_short(problem, monkeypatch, seconds, ratio, steps):
    taken, loss = slowed(monkeypatch, seconds)
    amp = Amp()
    amp.dtype = torch.bfloat16
    assert amp._speedup(problem[0], loss) == pytest.approx(ratio)
    assert taken == [False, True] * (steps // 2)


@pytest.mark.parametrize("make", [lambda p: ready(Fp32(), p), scaled], ids=["fp32", "fp16"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_a_first_step_that_is_skipped_leaves_a_fused_optimizer_as_new(problem, make, optimizer):
    settings = {"momentum": 0.9, "nesterov": True} if optimizer is torch.optim.SGD else {}
    skipping, plain = make(problem), make(problem)
    weights = [nn.Parameter(torch.linspace(-1, 1, 4096)) for _ in range(2)]
    one, two = (optimizer([w], lr=0.1, fused=True, **settings) for w in weights)
    junk = [torch.full((4096,), float("nan")) for _ in range(64)]
    del junk  # what an unwritten buffer is likely to find
    bad = torch.full((), float("inf"))
    skipping.backward((weights[0] * bad).sum())
    skipping.clip(one, None, None)
    skipping.step(one, torch.ones(()))
    one.zero_grad()
    assert torch.equal(weights[0].detach(), torch.linspace(-1, 1, 4096))
    for _ in range(3):
        for precision, weight, taker in ((skipping, weights[0], one), (plain, weights[1], two)):
            precision.backward((weight**2).sum())
            precision.clip(taker, None, None)
            precision.step(taker, GO_ON)
            taker.zero_grad()
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0].detach(), torch.linspace(-1, 1, 4096))


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("maximize", [True, False])
def test_the_short_way_to_the_fused_kernel_is_the_optimizers_own_step_to_the_bit(problem, nesterov, maximize):
    def trained(step):
        generator = torch.Generator().manual_seed(1)
        weights = [nn.Parameter(torch.randn(300, 7, generator=generator)) for _ in range(3)]
        groups = [{"params": weights[:1], "weight_decay": 0.01}, {"params": weights[1:]}]
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=nesterov, maximize=maximize, fused=True)
        for i in range(4):
            optimizer.param_groups[0]["lr"] = 0.1 / (i + 1)
            for weight in weights[: 3 - i % 2]:  # one of them has a gradient now and then
                weight.grad = torch.randn(300, 7, generator=generator)
            step(optimizer)
            for weight in weights:
                weight.grad = None
        return weights, optimizer

    precision = ready(Fp32(), problem)
    (ours, one), (theirs, two) = trained(lambda o: precision.step(o, GO_ON)), trained(lambda o: o.step())
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)
        assert torch.equal(one.state[mine]["momentum_buffer"], two.state[other]["momentum_buffer"])


def test_a_halted_step_changes_nothing_also_where_the_optimizer_is_not_fused(problem):
    precision = ready(Fp32(), problem)
    for fused in (True, False):
        weight = nn.Parameter(torch.ones(2))
        optimizer = torch.optim.SGD([weight], lr=0.1, fused=fused)
        precision.backward(weight.sum())
        precision.step(optimizer, torch.ones(()))
        assert weight.detach().tolist() == [1.0, 1.0]
        precision.step(optimizer, GO_ON)
        assert weight.detach().tolist() == pytest.approx([0.9, 0.9])


def test_skipped_steps_are_counted_told_and_kept_for_a_resume(problem, caplog):
    caplog.set_level(logging.INFO, logger="cvtrain")
    precision = scaled(problem)
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for factor in (float("inf"), 1.0, float("inf"), float("inf"), 1.0):
        precision.backward(weight.sum() * factor)
        precision.clip(optimizer, None, None)
        precision.step(optimizer, GO_ON)
        optimizer.zero_grad()
        if factor == 1.0:
            precision.check()
            precision.check()
    told = [message for message in caplog.messages if "fp16 has skipped" in message]
    assert [int(message.split("skipped ")[1].split()[0]) for message in told] == [1, 3]
    resumed = scaled(problem)
    resumed.load_state(copy.deepcopy(precision.state()))
    assert resumed.skipped == precision.skipped == 3
    resumed.check()
    assert len([message for message in caplog.messages if "fp16 has skipped" in message]) == 2


def test_overflow_without_end_stops_the_run(problem):
    precision = scaled(problem)
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    with pytest.raises(DivergedError, match="20 steps in a row"):
        for _ in range(30):
            precision.backward((weight * float("inf")).sum())
            precision.clip(optimizer, None, None)
            precision.step(optimizer, GO_ON)
            optimizer.zero_grad()
            precision.check()
    assert weight.item() == 1.0


def test_the_scaler_goes_on_from_its_saved_state(problem):
    one, two = scaled(problem), scaled(problem)
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for factor in (float("inf"), 1.0, 1.0):
        one.backward(weight.sum() * factor)
        one.clip(optimizer, None, None)
        one.step(optimizer, GO_ON)
        optimizer.zero_grad()
    state = one.state()
    assert state["format"] == "float16"
    two.load_state(copy.deepcopy(state))
    assert two.scaler.state_dict() == one.scaler.state_dict()
    assert two.scaler.get_scale() == one.scaler.get_scale() == 2.0**15


@pytest.mark.parametrize("chosen", ["float32", "bfloat16"])
def test_a_resumed_run_computes_in_the_stored_format_whatever_the_probe_says_now(problem, chosen):
    stored = {"format": chosen, "scaler": {}}
    precision = Amp()
    precision.load_state(stored)
    assert precision.state() == stored
    with precision.autocast():
        assert str(problem[0](torch.randn(2, 3, 8, 8)).dtype) == f"torch.{chosen}"


def test_every_precision_option_builds_what_it_names():
    assert [path.stem for path in OPTIONS] == ["amp", "bf16", "fp16", "fp32", "tf32"]
    for path, kind in zip(OPTIONS, (Amp, Bf16, Fp16, Fp32, Tf32), strict=True):
        built = instantiate(OmegaConf.load(path))
        assert type(built) is kind
        assert {k: v for k, v in vars(built).items() if k != "scaler"} == {
            k: v for k, v in vars(kind()).items() if k != "scaler"
        }


def test_a_scaled_step_stands_still_after_a_loss_that_was_not_finite(problem):
    precision = scaled(problem)
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for halt, expected in ((1.0, [1.0, 1.0]), (0.0, [0.9, 0.9])):
        precision.backward(weight.sum())
        precision.clip(optimizer, None, None)
        precision.step(optimizer, torch.tensor(halt))
        optimizer.zero_grad()
        assert weight.detach().tolist() == pytest.approx(expected)


def test_tensorfloat_32_does_not_outlive_its_run(problem):
    ready(Tf32(), problem)
    assert torch.backends.cuda.matmul.allow_tf32
    ready(Bf16(), problem)
    assert not torch.backends.cuda.matmul.allow_tf32
