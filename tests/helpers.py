"""Tiny models, and equations 2, 5 and 6 written a second time, as slow sums over full matrices."""

import torch
import torch.nn as nn

from structlora import Config, attach

torch.set_num_threads(1)      # on tensors this small a second thread costs more than it does
WIDTH, HIDDEN = 6, 10         # q_proj is 6 -> 10, v_proj 10 -> 6: two kinds that must not mix


class Block(nn.Module):
    def __init__(self, width=WIDTH, hidden=HIDDEN):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.v_proj(torch.tanh(self.q_proj(x)))


class Chain(nn.Module):
    def __init__(self, layers=3, width=WIDTH, hidden=HIDDEN, classes=4):
        super().__init__()
        self.blocks = nn.ModuleList([Block(width, hidden) for _ in range(layers)])
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Fan(nn.Module):
    """Layers side by side on one input, so that a test can give each the gradient it wants."""

    def __init__(self, layers, width=6, out=7):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(width, out, bias=False)})
                                     for _ in range(layers)])

    def forward(self, x):
        return torch.stack([block["q_proj"](x) for block in self.blocks])


def chain(layers=3, seed=0, **sizes):
    torch.manual_seed(seed)
    return Chain(layers, **sizes)


def adapted(layers=3, seed=0, trained=True, **config):
    """A Chain with adapters, as if trained: nothing is left at its initial value."""
    model = chain(layers, seed)
    adapters = attach(model, Config(**{"rank": 2, "alpha": 3.0, **config}))
    if trained:
        shake(adapters, seed)
    return model, adapters


@torch.no_grad()
def shake(adapters, seed=0):
    """Random values for all trained tensors, about half of the gates shut, edges learned."""
    generator = torch.Generator().manual_seed(seed + 1)
    random = lambda like: torch.randn(like.shape, generator=generator).to(like)
    for graph in adapters.graphs:
        graph.B.copy_(0.5 * random(graph.B))
        if graph.gate is not None:
            for parameter in graph.gate.parameters():
                parameter.copy_(random(parameter))
        for name, parameter in graph.named_parameters():
            if name in ("rho", "w_src", "w_dst"):
                parameter.copy_(0.7 + random(parameter))
    images = torch.randn(5, 3, WIDTH, generator=generator)
    if any(graph.watches for graph in adapters.graphs):
        with torch.enable_grad():
            adapters.model(images.to(adapters.model.head.weight)).square().sum().backward()
        adapters.observe_gradients()
        adapters.model.zero_grad()
    return adapters


def inputs(n=5, tokens=3, width=WIDTH, seed=7, dtype=torch.float32):
    shape = (n, tokens, width) if tokens else (n, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def open_gates(graph):
    """Equation 3 or 9 at evaluation: [L, S, r]."""
    if graph.config.gate == "none":
        return torch.ones(graph.kept.shape)
    if graph.config.gate == "concrete":
        pi = 1 / (1 + torch.exp(-graph.gate.phi))
        return torch.where(pi >= 0.5, pi, 0.0)
    mu, sigma = graph.gate.mu, graph.gate.log_sigma.exp()
    return torch.where(mu ** 2 >= sigma ** 2, mu, 0.0)


def slot_of(graph, receiver, sender):
    """The one slot through which `receiver` hears `sender`, or None."""
    slots = [i for i, j in enumerate(graph.senders[receiver].tolist())
             if j == sender and graph.valid[receiver, i]]
    assert len(slots) <= 1, "a message must have one gate, not several"
    return slots[0] if slots else None


def by_hand_mixing(graph):
    """M of equations 5 and 6, edge by edge, in float64."""
    L = len(graph.names)
    gates = open_gates(graph).double() * graph.kept
    h = []
    for l in range(L):
        update = graph.B[l].double().T @ torch.diag(gates[l, 0]) @ graph.A[l].double()
        sketch = (graph.P.double().T @ update @ graph.Q.double()).flatten().detach()
        h.append(sketch / max(float(sketch.norm()), 1e-12))
    a = torch.zeros(L, L, dtype=torch.float64)
    for l in range(L):
        edges = sorted({j for j, ok in zip(graph.neighbours[l].tolist(), graph.is_edge[l]) if ok})
        if not edges:
            continue
        e = torch.zeros(len(edges), dtype=torch.float64)
        if graph.config.coordinator == "attention":
            e = torch.stack([h[l] @ graph.w_src.double() + h[j] @ graph.w_dst.double()
                             for j in edges])
            e = torch.where(e > 0, e, 0.2 * e)
        row = torch.zeros(L, dtype=torch.float64)
        row[edges] = e.exp() / e.exp().sum()
        a = a + torch.outer(torch.eye(L, dtype=torch.float64)[l], row)
    step = torch.eye(L, dtype=torch.float64)
    if hasattr(graph, "rho"):
        step = step + graph.rho.double() * a
    result = step
    for _ in range(graph.config.hops - 1):
        result = result @ step
    return result


def by_hand_updates(graph, gates=None):
    """s dW_l of equation 6, one [d, k] matrix a layer; gates [L, S, r] default to evaluation's."""
    gates = (open_gates(graph) if gates is None else gates).double() * graph.kept
    M, updates = by_hand_mixing(graph), []
    for l in range(len(graph.names)):
        total = torch.zeros(graph.B.shape[2], graph.A.shape[2], dtype=torch.float64)
        for j in range(len(graph.names)):
            slot = slot_of(graph, l, j)
            assert slot is not None or M[l, j] == 0, "a message has no slot to travel in"
            if slot is not None:                                         # equation 2
                U = graph.B[j].double().T @ torch.diag(gates[l, slot]) @ graph.A[j].double()
                total = total + M[l, j] * U
        updates.append(graph.config.alpha / graph.config.rank * total)
    return updates
