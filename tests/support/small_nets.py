"""A residual network that trains in milliseconds, and a loop for it."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from training import snapshot

import came8bit

VOCABULARY, WIDTH = 64, 64


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


class Net(nn.Module):
    """A residual network whose embedding is its head, too; ``shared`` uses one block twice."""

    def __init__(self, *, shared=False, tied=True, reentrant=None):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.first = Block()
        self.second = self.first if shared else Block()
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.reentrant = reentrant

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in (self.first, self.second):
            if self.reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


def make_net(dtype=torch.float32, **options):
    torch.manual_seed(0)
    return Net(**options).to(dtype)


def tokens(i):
    return torch.randint(0, VOCABULARY, (8,), generator=torch.Generator().manual_seed(i))


def loss_of(net, i):
    return nn.functional.cross_entropy(net(tokens(i)).float(), tokens(i).roll(1))


def train(net, optimizer, first=0, steps=4, scheduler=None, zero_grad=True):
    for i in range(first, first + steps):
        if zero_grad:
            optimizer.zero_grad()
        loss_of(net, i).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return snapshot(optimizer)


def made(net=None, **options):
    net = net or make_net()
    optimizer = came8bit.CAME8bit(net.parameters(), **{"lr": 1e-3, **options})
    return net, optimizer, came8bit.step_in_backward(optimizer)
