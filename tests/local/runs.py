"""What the processes of the tests of local updates do."""

import torch

from hf_efcp.groups import parameter_groups
from hf_efcp.local import LoRDO


def model(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)).to(dtype)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 4)
    return net


def batch(t, rank=0, dtype=torch.float64, size=8):
    generator = torch.Generator().manual_seed(1000 * rank + t)
    x = torch.randn(size, 12, generator=generator, dtype=torch.float64)
    return x.to(dtype), x[:, :3].argmax(1)


def optimizer_of(kind, net, **options):
    if kind == "lordo":
        return LoRDO(parameter_groups(net), lr=0.02, **{"rank": 3, **options})
    if kind == "adamw":
        return torch.optim.AdamW(net.parameters(), lr=0.02, weight_decay=0.0, **options)
    import hf_efcp

    return hf_efcp.create_optimizer(kind, net, lr=0.02, **options)


def train(net, optimizer, steps, rank=0, start=0, dtype=torch.float64):
    for t in range(start, start + steps):
        x, y = batch(t, rank, dtype)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()


def flat(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])
