"""Tiny models, and equations 2, 3, 5 and 6 written a second time as slow sums over matrices."""

import math
import os
import re
from pathlib import Path

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from structlora import Config, attach

torch.set_num_threads(1)      # on tensors this small a second thread costs more than it does
DATA = Path(__file__).parents[2] / "shared" / "data"     # real data; tests skip without it
GATES, COORDINATORS = ("gaussian", "concrete", "none"), ("attention", "uniform", "none")
EDGES = ("hybrid", "depth", "similarity", "all")
WIDTH, HIDDEN = 6, 10         # q_proj is 6 -> 10, v_proj 10 -> 6: two kinds that must not mix


def readme_code(word):
    """The block of Python in the README that holds this word."""
    text = (Path(__file__).parents[1] / "README.md").read_text()
    block, = (b for b in re.findall(r"```python\n(.*?)```", text, re.S) if word in b)
    return block


class Hostile:
    """Its pickle runs a command when it is read by a careless reader."""

    def __reduce__(self):
        return os.system, ("touch executed",)


class Block(nn.Module):
    def __init__(self, width=WIDTH, hidden=HIDDEN):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.v_proj(torch.tanh(self.q_proj(x)))


class Chain(nn.Module):
    def __init__(self, layers=3, width=WIDTH, hidden=HIDDEN, classes=4):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, hidden) for _ in range(layers))
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Checkpointed(Chain):
    reentrant = False

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


class Fan(nn.Module):
    """Layers side by side on one input, so that a test can give each the gradient it wants."""

    def __init__(self, layers, width=6, out=7):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(width, out, bias=False)})
                                    for _ in range(layers))

    def forward(self, x):
        return torch.stack([block["q_proj"](x) for block in self.blocks])


def chain(layers=3, seed=0, **sizes):
    torch.manual_seed(seed)
    return Chain(layers, **sizes)


def inputs(n=5, tokens=3, width=WIDTH, seed=7, dtype=torch.float32):
    shape = (n, tokens, width) if tokens else (n, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def waves(shapes, scale):
    """name -> weights that depend on no random generator; those of norms are about 1."""
    weights = {}
    for i, (name, shape) in enumerate(shapes.items()):
        wave = torch.sin(0.7 * torch.arange(math.prod(shape)).double() ** 1.1 + i).view(shape)
        is_scale = "norm" in name and name.endswith("weight")
        weights[name] = (1 + 0.2 * wave if is_scale else scale * wave).float()
    return weights


def adapted(layers=3, seed=0, **config):
    """A Chain with adapters, as if trained: nothing is left at its initial value."""
    model = chain(layers, seed)
    adapters = attach(model, Config(**{"rank": 2, "alpha": 3.0, **config}))
    return model, shake(adapters, seed)


def shake(adapters, seed=0):
    """One step that moves the similarity edges, then random values for all that is trained: about
    half of the gates are shut."""
    x = inputs(seed=seed).to(next(adapters.model.parameters()))
    adapters.model(x).square().sum().backward()
    adapters.observe_gradients()
    adapters.model.zero_grad()
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in adapters.model.named_parameters():
        if parameter.requires_grad and not name.endswith(".probe"):
            new = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(0.5 * new if name.endswith((".A", ".B")) else 0.3 + new)
    return adapters


def assert_same(got, wanted):
    """Two dictionaries of tensors are equal bit for bit."""
    assert got.keys() == wanted.keys() and got
    for name in got:
        assert torch.equal(got[name], wanted[name]), name


def senders(graph):
    """For each layer the set of its neighbours, those that send to it beside itself."""
    rows = enumerate(graph.senders())
    return [set(row.sum(0).nonzero()[:, 0].tolist()) - {l} for l, row in rows]


def open_gates(layer):
    """Equation 3 or 9 at evaluation: [S, r]."""
    if "phi" in layer.gate:
        pi = 1 / (1 + torch.exp(-layer.gate["phi"].double()))
        return torch.where(pi >= 0.5, pi, 0.0)
    if "mu" in layer.gate:
        mu, sigma = layer.gate["mu"].double(), layer.gate["log_sigma"].double().exp()
        return torch.where(mu ** 2 >= sigma ** 2, mu, 0.0)
    return torch.ones(1, layer.config.rank, dtype=torch.float64)


def message(graph, receiver, sender, gates):
    """U_lj of equation 2, [d, k], with the signs of edges "all" and without removed directions."""
    layer, places = graph.layers[sender], graph.senders()[receiver, :, sender].nonzero()[:, 0]
    assert len(places) == 1, "a message must have one gate, not several"
    m = (gates[receiver] * graph.signs[receiver] * (graph.removed[receiver] == 0))[places[0]]
    return layer.B.double() @ torch.diag(m) @ layer.A.double()


def by_hand_mixing(graph):
    """M of equations 5 and 6, edge by edge: [L, L] in float64."""
    gates, h, rows = [open_gates(layer) for layer in graph.layers], [], []
    for l in range(len(graph.layers)):
        U = message(graph, l, l, gates).detach()
        sketch = (graph.P.double().T @ U @ graph.Q.double()).flatten()
        h.append(sketch / max(float(sketch.norm()), 1e-12))
    for l, near in enumerate(senders(graph)):
        row, edges = torch.eye(len(h), dtype=torch.float64)[l], sorted(near)
        e = torch.zeros(len(edges), dtype=torch.float64)
        if edges and graph.config.coordinator == "attention":
            w_src, w_dst = graph.w_src.double(), graph.w_dst.double()
            e = torch.stack([h[l] @ w_src + h[j] @ w_dst for j in edges])
            e = torch.where(e > 0, e, 0.2 * e)
        for j, share in zip(edges, e.exp() / e.exp().sum()):
            row = row + graph.rho.double() * share * torch.eye(len(h), dtype=torch.float64)[j]
        rows.append(row)
    return torch.stack(rows)


def by_hand_updates(graph, gates):
    """s dW_l of equation 6, a [d, k] matrix per layer; gates: [S, r] per layer."""
    M, s, updates = by_hand_mixing(graph), graph.config.alpha / graph.config.rank, []
    for l, near in enumerate(senders(graph)):
        updates.append(s * sum(M[l, j] * message(graph, l, j, gates) for j in sorted(near | {l})))
    return updates
