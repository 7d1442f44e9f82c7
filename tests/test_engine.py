import pytest
import torch
import torch.nn.functional as F
from torch import nn

from disout import Disout
from utils.engine import Schedule, evaluate, train_epoch
from utils.schedules import dist_prob_at


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 6), Disout(0.5), nn.Linear(6, 6))


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 12, generator=generator), torch.arange(n) % 6) for n in (8, 8, 3)]


@pytest.fixture
def train(model, batches):
    def train_model(first_step=0, batches=batches, lr_at_step=lambda step: 0.1):
        optimizer = torch.optim.SGD(model.parameters(), lr=123.0, momentum=0.9)
        sizes = [len(labels) for _, labels in batches]
        schedule = Schedule(lr_at_step, [(model[2], 0.5)], total_steps=30, seed=0)
        return train_epoch(model, batches, sizes, optimizer, schedule, first_step)

    return train_model


def test_learning_rate_and_dist_prob_of_every_step(model, train):
    """A first step other than 0 is a resumed run."""
    seen = []
    model[2].register_forward_hook(lambda layer, *_: seen.append(layer.dist_prob))
    rates = []
    scores = train(first_step=9, lr_at_step=lambda step: rates.append(step) or step / 100)
    assert rates == [9, 10, 11]
    assert seen == pytest.approx([dist_prob_at(step, 30, 0.5) for step in (9, 10, 11)])
    assert scores["lr"] == 0.11
    assert scores["distorted"] == model[2].distorted.item() > 0


def test_a_step_draws_the_same_whatever_came_before(model, train, batches):
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(first_step=29, batches=batches[:1])
    first = model[1].weight.clone()
    model.load_state_dict(weights)
    torch.rand(1000)
    train(first_step=29, batches=batches[:1])
    assert torch.equal(model[1].weight, first)


def test_the_loss_of_the_first_step_is_the_untrained_networks(model, train, batches):
    images, labels = batches[0]
    expected = F.cross_entropy(model.eval()(images), labels).item()  # at step 0 dist_prob is 0
    assert train(batches=batches[:1])["train_loss"] == pytest.approx(expected)


def test_zero_learning_rate_changes_nothing(model, train):
    before = model[1].weight.clone()
    train(lr_at_step=lambda step: 0.0)
    assert torch.equal(model[1].weight, before)


def test_evaluation_weighs_images_not_batches(model, batches):
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    logits = model.eval()(images)
    top5 = sum(label in row.argsort(descending=True)[:5] for row, label in zip(logits, labels, strict=True))
    scores = evaluate(model.train(), batches)
    assert scores["test_loss"] == pytest.approx(F.cross_entropy(logits, labels).item())
    assert scores["test_top1"] == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    assert scores["test_top5"] == pytest.approx(100 * top5 / 19)
    assert not model.training
    assert scores["test_images"] == 19


def test_accumulated_steps_are_those_of_whole_batches(model, batches):
    """Uneven parts count by their images; learning rate and seed are those of the optimizer step."""
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))

    def trained(batches, sizes, accumulate_steps):
        model.load_state_dict(weights)
        optimizer, rates = torch.optim.SGD(model.parameters(), lr=1.0), []
        schedule = Schedule(lambda step: rates.append(step) or 0.1, [], total_steps=9, seed=0)
        train_epoch(model, batches, sizes, optimizer, schedule, 4, accumulate_steps=accumulate_steps)
        return model[1].weight.clone(), rates

    model[2].dist_prob = 0.0
    whole, in_parts = trained([(images, labels)], [19], 1), trained(batches, [19], 3)
    torch.testing.assert_close(in_parts[0], whole[0])
    assert in_parts[1] == whole[1] == [4]


def test_label_smoothing_is_in_the_gradient_and_not_in_the_reported_loss(model, batches):
    images, labels = batches[0]
    model[2].dist_prob = 0.0
    plain = F.cross_entropy(model(images), labels).item()
    F.cross_entropy(model(images), labels, label_smoothing=0.1).backward()
    gradient = model[1].weight.grad.clone()
    before = model[1].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    schedule = Schedule(lambda _: 1.0, [], total_steps=1, seed=0)
    scores = train_epoch(model, batches[:1], [8], optimizer, schedule, 0, label_smoothing=0.1)
    torch.testing.assert_close(before - model[1].weight, gradient)
    assert scores["train_loss"] == pytest.approx(plain)


def test_images_that_were_skipped_do_not_count(model, batches):
    (images, labels), scores = batches[0], []
    for marked in (labels, torch.cat([labels, torch.tensor([-100, -100])])):
        padded = torch.cat([images, torch.zeros(len(marked) - 8, 12)])
        scores.append(evaluate(model, [(padded, marked)]))
    assert [score.pop("test_skipped") for score in scores] == [0, 2]
    assert scores[0] == pytest.approx(scores[1])
    assert scores[1]["test_images"] == 8
