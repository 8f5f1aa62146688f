import math

import pytest
import torch

from unet_core.config.train import LossConfig
from unet_core.training import losses
from unet_core.training.augment import MicroBatch
from unet_core.training.losses import Loss, class_weights

IGNORE = 255
NAMES = ("cross_entropy", "bce", "focal", "dice", "jaccard", "tversky")


def scene(logits, crops=3):
    torch.manual_seed(0)
    labels = torch.randint(0, max(2, logits), (crops, 5, 6))
    labels[0, 0] = IGNORE
    return torch.randn(crops, logits, 5, 6, requires_grad=True), labels


def micro_batch_of(labels, boundary=None):
    return MicroBatch(["a"] * len(labels), torch.empty(0), labels, boundary)


def value(x, labels, terms=None, class_weights=None, **options):
    zero = dict.fromkeys(("cross_entropy", "dice"), 0.0)
    loss = Loss(LossConfig(**{**zero, **options}), IGNORE, class_weights)
    micro_batch = micro_batch_of(labels, terms)
    return loss.share(x, micro_batch, loss.counts(micro_batch))


@pytest.mark.parametrize("logits", [1, 3])
def test_losses_are_those_of_their_definitions(logits):
    x, labels = scene(logits)
    scan = labels != IGNORE
    one_logit = logits == 1
    p = torch.sigmoid(x) if one_logit else torch.softmax(x, 1)
    classes = [1] if one_logit else [0, 1, 2]
    true = torch.stack([labels == k for k in classes], 1)
    chosen = torch.where(true, p, 1 - p)[:, 0] if one_logit else (p * true).sum(1)
    entropy = -chosen[scan].log()
    assert value(x, labels, cross_entropy=1).item() == pytest.approx(entropy.mean().item())
    lin = ((1 - chosen[scan]) ** 1.5 * entropy).mean()
    assert value(x, labels, focal=1, focal_gamma=1.5).item() == pytest.approx(lin.item(), rel=1e-5)
    q = torch.sigmoid(x)
    each = -torch.where(true, q, 1 - q).log().mean(1)[scan]
    assert value(x, labels, bce=1).item() == pytest.approx(each.mean().item(), rel=1e-5)
    expected = dict.fromkeys(("dice", "jaccard", "tversky"), 0.0)
    for crop in range(len(x)):
        for k in (0,) if one_logit else (1, 2):
            inside = scan[crop]
            pk, tk = p[crop, k][inside].double(), true[crop, k][inside].double()
            tp, fp, fn = (pk * tk).sum(), (pk * (1 - tk)).sum(), ((1 - pk) * tk).sum()
            share = 1 / len(x) / max(1, logits - 1)
            expected["dice"] += share * (1 - (2 * tp + 1) / (2 * tp + fp + fn + 1)).item()
            expected["jaccard"] += share * (1 - (tp + 0.5) / (tp + fp + fn + 0.5)).item()
            tversky = 1 - (tp + 0.5) / (tp + 0.3 * fp + 0.7 * fn + 0.5)
            expected["tversky"] += share * tversky.item()
    for name, wanted in expected.items():
        assert value(x, labels, **{name: 1}).item() == pytest.approx(wanted, abs=1e-6), name
    both = value(x, labels, dice=0.5, cross_entropy=2)
    assert both.item() == pytest.approx(0.5 * expected["dice"] + 2 * entropy.mean().item())


@pytest.mark.parametrize("logits", [1, 3])
@pytest.mark.parametrize("name", ["dice", "jaccard", "tversky"])
def test_without_a_background_class_0_counts_like_the_others(logits, name):
    x, labels = scene(logits)
    config = LossConfig(**{"cross_entropy": 0.0, "dice": 0.0, name: 1.0})
    micro_batch = micro_batch_of(labels)
    loss = Loss(config, IGNORE, None, first_foreground=0)
    found = loss.share(x, micro_batch, loss.counts(micro_batch)).item()
    alpha, beta = {"dice": (0.5, 0.5), "jaccard": (1, 1), "tversky": (0.3, 0.7)}[name]
    of_class_1 = torch.sigmoid(x)
    p = torch.cat([1 - of_class_1, of_class_1], 1) if logits == 1 else torch.softmax(x, 1)
    wanted = 0.0
    for crop, inside in enumerate(labels != IGNORE):
        for k in range(p.shape[1]):
            pk, tk = p[crop, k][inside].double(), (labels[crop] == k)[inside].double()
            tp, fp, fn = (pk * tk).sum(), (pk * (1 - tk)).sum(), ((1 - pk) * tk).sum()
            index = (tp + 0.5) / (tp + alpha * fp + beta * fn + 0.5)
            wanted += (1 - index).item() / p.shape[1] / len(x)
    assert found == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("logits", [1, 3])
def test_pixels_that_are_certain_have_a_gradient(logits, gamma):
    x = torch.zeros(1, logits, 1, 5)
    x[:, -1] = torch.tensor([0.0, 10.0, 20.0, 50.0, 200.0])
    x.requires_grad_()
    labels = torch.full((1, 1, 5), max(1, logits - 1))
    value(x, labels, focal=1, focal_gamma=gamma).backward()
    assert x.grad.isfinite().all()
    assert (x.grad[0, -1, 0, :2] < 0).all()
    assert not x.grad[0, -1, 0, 4]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("logits", [1, 3])
def test_a_batch_without_truth_weighs_nothing(name, logits):
    x, labels = scene(logits)
    loss = value(x, torch.full_like(labels, IGNORE), **{name: 1})
    loss.backward()
    assert loss.item() == 0
    assert not x.grad.any()


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_of_a_batch_add_up(name):
    x, labels = scene(3, crops=5)
    labels[4] = IGNORE  # what a rank without images computes
    config = LossConfig(**{"cross_entropy": 0.0, "dice": 0.0, name: 1.0})
    loss = Loss(config, IGNORE, None)
    totals = loss.counts(micro_batch_of(labels))
    assert totals.valid_crops == 4
    whole = loss.share(x, micro_batch_of(labels), totals).item()
    cuts = (slice(0, 1), slice(1, 4), slice(4, 5))
    parts = [loss.share(x[cut], micro_batch_of(labels[cut]), totals).item() for cut in cuts]
    assert math.fsum(parts) == pytest.approx(whole, rel=1e-5)


def test_pixels_weigh_by_class_and_boundary():
    x, labels = scene(3)
    boundary = torch.rand(labels.shape)
    scan = labels != IGNORE
    entropy = losses.cross_entropy(x, labels.where(scan, 0))
    of_class = torch.tensor([0.5, 1.0, 2.0])[labels.where(scan, 0)]
    expected = ((of_class + 10 * boundary) * entropy * scan).sum() / scan.sum()
    found = value(x, labels, boundary, [0.5, 1.0, 2.0], cross_entropy=1, boundary=10)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_balanced_weights_have_a_mean_of_one_over_all_pixels():
    weights = class_weights(LossConfig(class_weights="balanced"), 3, [90, 10])
    assert weights == [pytest.approx(100 / 180), pytest.approx(5.0), 0.0]
    assert 90 * weights[0] + 10 * weights[1] == pytest.approx(100)
