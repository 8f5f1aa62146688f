"""The pretended CUDA device does what tests rely on."""

import copy
import os

import numpy as np
import pytest
import torch
from torch import nn

from tests.support import processes
from tests.support.planted import planted
from tests.support.pretended_device import DEVICE, Pretended, pretended_device


@pytest.fixture
def traffic():
    with pretended_device() as traffic:
        yield traffic


@pytest.fixture
def there(traffic):
    """Three numbers on the device; their upload is not counted."""
    tensor = torch.arange(3.0).to("cuda")
    traffic.clear()
    return tensor


@pytest.mark.parametrize(
    "meet",
    [lambda there, here: there + here,
     lambda there, here: here.add_(there),
     lambda there, here: torch.cat([there, here]),
     lambda there, here: torch.stack([there[0], here[0]]),
     lambda there, here: torch.where(here > 0, there, there),
     lambda there, here: here[there.long()],
     lambda there, here: nn.functional.linear(there, torch.ones(2, 3)),
     lambda there, here: nn.Linear(3, 2)(there)],
)  # fmt: skip
def test_tensors_of_two_devices_do_not_meet(there, meet):
    with pytest.raises(RuntimeError, match="found at least two devices, cuda:0 and cpu"):
        meet(there, torch.ones(3))


def test_a_number_of_the_cpu_may_meet_any_tensor(there):
    assert (there * torch.tensor(2.0)).tolist() == [0, 2, 4]
    assert (there * 2 + 1).cpu().tolist() == [1, 3, 5]


def test_values_of_the_device_do_not_become_arrays(there):
    for read in (there.numpy, lambda: np.asarray(there)):
        with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
            read()
    assert there.cpu().numpy().tolist() == [0, 1, 2]


def test_what_comes_of_the_device_stays_there(there):
    made = [there.half(), there[None].mT, there.max(dim=0).values, torch.zeros_like(there),
            there.new_zeros(2), torch.zeros(2, device=DEVICE), torch.tensor([1], device="cuda"),
            there.to(torch.int32), torch.ones(1).to(there)]  # fmt: skip
    assert {tensor.device for tensor in made} == {DEVICE}
    assert all(tensor.is_cuda and not tensor.is_cpu for tensor in made)
    back = [there.cpu(), there.to("cpu", torch.half), torch.zeros_like(there, device="cpu")]
    assert {tensor.device.type for tensor in back} == {"cpu"}
    assert not any(isinstance(tensor, Pretended) for tensor in back)


def test_a_copy_is_a_copy(traffic):
    here = torch.zeros(2)
    there = here.to("cuda")
    here += 1
    back = there.cpu()
    there += 5
    assert (here.tolist(), back.tolist(), there.tolist()) == ([1, 1], [0, 0], [5, 5])


@pytest.mark.parametrize(
    ("act", "counts"),
    [(lambda there: there * there, (0, 0, 0)),
     (lambda there: there.to("cuda"), (0, 0, 0)),
     (lambda there: torch.ones(2, 3).to("cuda", torch.half), (1, 0, 0)),
     (lambda there: torch.ones(2).cuda(), (1, 0, 0)),
     (lambda there: there.copy_(torch.ones(3)), (1, 0, 0)),
     (lambda there: torch.tensor([1, 2], device="cuda"), (1, 0, 0)),
     (lambda there: there[torch.tensor([0, 1])], (1, 0, 0)),
     (lambda there: there.cpu(), (0, 1, 0)),
     (lambda there: there.to("cpu"), (0, 1, 0)),
     (lambda there: torch.zeros(3).copy_(there), (0, 1, 0)),
     (lambda there: there.sum().item(), (0, 0, 1)),
     (lambda there: float(there[0]), (0, 0, 1)),
     (lambda there: bool((there > 5).any()), (0, 0, 1)),
     (lambda there: there.tolist(), (0, 0, 1)),
     (lambda there: there[there > 1], (0, 0, 1)),
     (lambda there: torch.equal(there, there), (0, 0, 1)),
     (lambda there: torch.cuda.synchronize(), (0, 0, 1))],
)  # fmt: skip
def test_uploads_downloads_and_syncs_are_counted(traffic, there, act, counts):
    act(there)
    assert traffic.counts == counts


def test_what_crosses_is_told_with_its_shape(traffic):
    torch.ones(2, 3, dtype=torch.uint8).to("cuda").float().sum(0).cpu()
    (up,), (down,) = traffic.uploads, traffic.downloads
    assert (up.function, up.shape, up.dtype) == ("to", (2, 3), torch.uint8)
    assert (down.function, down.shape, down.dtype) == ("cpu", (3,), torch.float32)


def test_modules_move_and_learn_as_on_the_cpu(traffic):
    torch.manual_seed(0)
    here = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))
    there = copy.deepcopy(copy.deepcopy(here).to("cuda"))
    assert all(isinstance(p, nn.Parameter) and p.is_cuda for p in there.parameters())
    assert all(buffer.is_cuda for buffer in there.buffers())
    values = torch.rand(5, 3)
    for network, batch in ((here, values), (there, values.to("cuda"))):
        optimizer = torch.optim.AdamW(network.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            network(batch).square().mean().backward()
            optimizer.step()
    state = there.state_dict()
    assert all(torch.equal(t, state[name].cpu()) for name, t in here.state_dict().items())


def test_gradients_are_clipped_on_the_device(traffic):
    network = nn.Linear(3, 2).to("cuda")
    network(torch.ones(1, 3, device="cuda")).sum().backward()
    traffic.clear()
    assert nn.utils.clip_grad_norm_(network.parameters(), 0.1).is_cuda
    assert traffic.counts == (0, 0, 0)


def test_nothing_is_pretended_afterwards():
    cudnn = torch.backends.cudnn
    before = torch.cuda.is_available(), torch.autocast, torch.Generator, cudnn.deterministic
    with pretended_device():
        cudnn.deterministic = not cudnn.deterministic
        assert torch.cuda.is_available()
    now = torch.cuda.is_available(), torch.autocast, torch.Generator, cudnn.deterministic
    assert before == now


def test_a_mistake_is_planted_in_a_text_that_has_its_place_once():
    assert planted(processes, "return True", "return 7").is_ours(os.getpid()) == 7
    with pytest.raises(AssertionError, match="0 times"):
        planted(processes, "no such text", "")
