"""Stepping in backward with paged state: what fails before the first update changes nothing.

The first gradient of a backward pass here is that of a bias, which is too small for a page: its
update must not come before somebody has looked at the pages of the others.
"""

import errno
import os
import shutil

import pytest
import torch
from paged_training import complete, refuse_a_window
from torch import nn
from training import assert_same

import came8bit
from came8bit.paging import page_file as pagefile
from came8bit.paging.page_file import PageFile

BIAS = 5  # position of the parameter whose gradient comes first


def net_and_optimizer(directory, **options):
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Linear(300, 300) for _ in range(3)])
    if directory is not None:
        options["page_dir"] = directory
    optimizer = came8bit.PagedCAME8bit(net.parameters(), lr=1e-3, **options)
    return net, optimizer, came8bit.step_in_backward(optimizer)


def backward(net, i):
    x = torch.randn(4, 300, generator=torch.Generator().manual_seed(i))
    net(x).square().mean().backward()


def train(net, optimizer, first=0, steps=2):
    for i in range(first, first + steps):
        backward(net, i)
        optimizer.step()
    return complete(optimizer)


def end_step(optimizer):
    """As the message says."""
    optimizer.zero_grad()
    optimizer.step()


def params_and_counts(optimizer):
    params = optimizer.param_groups[0]["params"]
    states = [optimizer.state.get(p, {}) for p in params]
    return [p.detach().clone() for p in params], [int(s.get("step", 0)) for s in states]


def refused(net, optimizer, kind, message):
    """A backward pass that raises and changes nothing; its error says so, and only that."""
    before = params_and_counts(optimizer)
    with pytest.raises(kind, match=message) as caught:
        backward(net, 9)
    after = params_and_counts(optimizer)
    assert all(torch.equal(p, q) for p, q in zip(before[0], after[0], strict=True))
    assert before[1] == after[1]
    text = str(caught.value)
    assert text.count("changed") == 1
    assert "in backward(), before the first update of this step: no parameter has been ch" in text
    assert "have been updated" not in text


def expected(steps):
    net, optimizer, _ = net_and_optimizer(None)
    return train(net, optimizer, steps=steps)


@pytest.mark.parametrize("how", ["deleted", "directory deleted", "cut short", "cut by a byte"])
def test_a_file_that_is_lost_between_steps(how, tmp_path):
    directory = tmp_path / "pages"
    directory.mkdir()
    net, optimizer, _ = net_and_optimizer(directory)
    train(net, optimizer)
    saved = optimizer.state_dict()
    file = directory / "came8bit-0.pages"
    if how == "deleted":
        file.unlink()
    elif how == "directory deleted":
        shutil.rmtree(directory)
    else:
        os.truncate(file, 0 if how == "cut short" else file.stat().st_size - 1)
    cut = how.startswith("cut")
    kind, message = (OSError, "cut it short") if cut else (FileNotFoundError, "has been deleted")
    refused(net, optimizer, kind, message)
    end_step(optimizer)
    refused(net, optimizer, kind, message)
    directory.mkdir(exist_ok=True)
    optimizer.load_state_dict(saved)  # ends the step, too
    assert_same(expected(4), train(net, optimizer, first=2))


def test_a_budget_that_is_too_small():
    net, optimizer, _ = net_and_optimizer(None, page_budget=1000)
    refused(net, optimizer, ValueError, "page_budget is 1000 bytes, .* needs a page of 92672")
    assert not optimizer.state


def test_no_room_for_pages_that_come_later(tmp_path, monkeypatch):
    """Parameters that thaw need pages in a step that begins with one that has its state."""
    net, optimizer, _ = net_and_optimizer(tmp_path)
    net[0].requires_grad_(False)
    train(net, optimizer)
    net[0].requires_grad_()
    with monkeypatch.context() as patch:
        patch.setattr(pagefile, "_free", lambda place: 1000)
        refused(net, optimizer, OSError, r"wanted \d+ KiB more for .*, had 1000 bytes free")
    end_step(optimizer)
    train(net, optimizer, first=2)


def test_a_directory_that_was_never_there_again(tmp_path):
    directory = tmp_path / "pages"
    directory.mkdir()
    net, optimizer, _ = net_and_optimizer(directory)
    directory.rmdir()
    refused(net, optimizer, FileNotFoundError, "is not there")
    assert not optimizer.state
    end_step(optimizer)
    directory.mkdir()
    assert_same(expected(2), train(net, optimizer))


def test_accumulating_looks_at_the_pages_when_it_updates(tmp_path):
    net, optimizer, release = net_and_optimizer(tmp_path)
    train(net, optimizer)
    with release.accumulate():
        backward(net, 2)
    (tmp_path / "came8bit-0.pages").unlink()
    refused(net, optimizer, FileNotFoundError, "has been deleted")


def test_a_file_that_is_lost_during_a_step(tmp_path):
    """Whatever comes next is refused, with or without a page; the error counts what came before."""
    for last in range(1, BIAS):
        directory = tmp_path / str(last)
        directory.mkdir()
        net, optimizer, _ = net_and_optimizer(directory)
        train(net, optimizer)
        saved, weights = optimizer.state_dict(), [p.detach().clone() for p in net.parameters()]
        file = directory / "came8bit-0.pages"
        params = list(net.parameters())
        params[last].register_post_accumulate_grad_hook(lambda _, file=file: file.unlink())
        order = [int(s["step"]) for s in optimizer.state.values()]
        with pytest.raises(FileNotFoundError, match="has been deleted") as caught:
            backward(net, 2)
        counts = params_and_counts(optimizer)[1]
        done = sum(counts) - sum(order)
        text = str(caught.value)
        assert 0 < done < 6
        assert f"after {done} of 6 parameters had been updated; the others have not been" in text
        assert "zero_grad() and step() end this step" in text
        assert "checkpoint of model and optimizer" in text
        assert "othing has been changed" not in text
        params[last]._post_accumulate_grad_hooks.popitem()
        # As it says: back to what was saved.
        for p, q in zip(params, weights, strict=True):
            p.data.copy_(q)
        optimizer.load_state_dict(saved)
        assert_same(expected(4), train(net, optimizer, first=2))


@pytest.mark.parametrize("number", [4, 6])
def test_a_window_that_cannot_be_had_during_a_step(number, tmp_path, monkeypatch):
    """The step can be ended, and training goes on from there."""
    net, optimizer, _ = net_and_optimizer(tmp_path, page_budget=100_000)
    train(net, optimizer)
    with monkeypatch.context() as patch:
        refuse_a_window(patch, number)
        with pytest.raises(OSError, match="no more") as caught:
            backward(net, 2)
    counts = params_and_counts(optimizer)[1]
    done = counts.count(3)
    assert 0 < done < 6
    assert counts.count(2) == 6 - done
    assert f"no more. This happened in backward(), after {done} of 6 parameters" in str(
        caught.value
    )
    # What is left has a gradient, and step() would use it.
    with monkeypatch.context() as patch:
        patch.setattr(PageFile, "check", lambda self: refuse_all())
        with pytest.raises(OSError, match=rf"lost\. backward\(\) has updated {done} of 6 param"):
            optimizer.step()
    end_step(optimizer)
    train(net, optimizer, first=3)
    assert params_and_counts(optimizer)[1] == [count + 2 for count in counts]


def refuse_all():
    raise OSError(errno.EIO, "lost")


def test_pages_of_a_group_that_has_gone_are_given_back(tmp_path):
    net, optimizer, _ = net_and_optimizer(tmp_path)
    extra = nn.Linear(300, 300)
    optimizer.add_param_group({"params": extra.parameters()})
    extra(torch.ones(1, 300)).sum().backward()
    train(net, optimizer, steps=1)
    assert extra.weight in optimizer._store.pager
    optimizer.param_groups.pop()
    for p in extra.parameters():
        del optimizer.state[p]
    backward(net, 1)
    assert extra.weight not in optimizer._store.pager
    optimizer.step()
    assert_same(expected(2), complete(optimizer))
