"""The head that fastai's create_head makes, in plain PyTorch: concat-pooled features to logits, and its training."""

import torch
from torch import nn


def make_head(width, classes, device):
    head = nn.Sequential(
        nn.BatchNorm1d(width),
        nn.Dropout(0.25),
        nn.Linear(width, 512, bias=False),
        nn.ReLU(),
        nn.BatchNorm1d(512),
        nn.Dropout(0.5),
        nn.Linear(512, classes, bias=False),
    ).to(device)
    for m in head:
        if isinstance(m, nn.Linear):
            nn.init.kaiming_normal_(m.weight)
    return head


def make_optimizer(name, parameters, lr):
    if name == "adam":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, fused=True)
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, fused=True)


def batches_of(n, size, device):
    """The rows of each batch of a shuffled epoch, without the short last batch, as in fastai's training."""
    return [rows for rows in torch.randperm(n, device=device).split(size) if len(rows) == size]


def train_batch(head, optimizer, x, y):
    """Does one step; returns the loss, which is still on the device."""
    optimizer.zero_grad(set_to_none=True)
    loss = nn.functional.cross_entropy(head(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


def evaluate(head, x, y):
    """(mean loss, errors) with the head in eval mode."""
    head.eval()
    with torch.inference_mode():
        z = head(x)
        return nn.functional.cross_entropy(z, y).item(), int((z.argmax(1) != y).sum())
