"""StructLoRA in one file: low-rank adaptation with an information-bottleneck gate on every
rank-one direction and a graph of layers that share their updates (arXiv 2603.14228, ACL 2026).

    adapters = attach(model, Config(rank=4, targets=("q_proj", "v_proj")))
    optimizer = torch.optim.AdamW(adapters.param_groups(lr=3e-3))
    model.train()                                # only in training mode are the gates random
    for x, y in batches:
        loss = F.cross_entropy(model(x), y) + adapters.penalty(num_examples=len(dataset))
        loss.backward()
        adapters.observe_gradients()             # counts the step, moves the similarity edges
        optimizer.step(); optimizer.zero_grad()
    model = adapters.merge()                     # the plain layers again: inference costs nothing

Three words. A direction is a column of B with its row of A. Layers l = 1..L of one kind (the same
dotted name once its numbers are replaced by *, the same shape and device) form one graph; kinds do
not mix. A message is what one layer contributes to another's update, or to its own. Shapes: W0
[d, k] frozen, A [r, k] uniform in +-1/sqrt(k), B [d, r] zero, s = alpha / r. The equations are
repeated where they are computed.

    1  y = W0 x + s dW_l x                            dW_l = B_l A_l for plain LoRA
    2  U_lj = B_j diag(m_lj) A_j                      layer j's update as receiver l filters it:
                                                      a gate per direction and message
    3  m_lji ~ N(mu_lji, sigma_lji^2)                 training, one draw per sample and direction
       m_lji = mu_lji if mu_lji^2 >= sigma_lji^2 else 0      evaluation, merge, export
       R_l = sum_ji 1/2 log(1 + mu_lji^2 / sigma_lji^2)      nats, the rate: see gate_rate()
    4  loss = cross entropy + beta R / N              R = sum_l R_l, N labelled training examples;
                                                      at beta = 1 the free energy over N
    5  h_l = normalised vec(P^T U_ll Q)               a 4 x 4 sketch of the node feature vec(U_ll);
                                                      P [d, 4] and Q [k, 4] fixed and random
       e_lj = LeakyReLU(w_src . h_l + w_dst . h_j),   a_l. = softmax_j e_lj   over the edges of l
    6  dW_l = sum_j M_lj U_lj,   M = I + rho a        message passing; rho learned, starts at 1
         edges "depth"       l - 1 and l + 1
               "similarity"  argmax_j cos(g_l, g_j),  g_l = running mean of P^T (dL/dW_l) Q
               "hybrid"      both: the paper's graph, the default
               "all"         ours: every other layer, directions at random signs, rho from L - 1
    7  dW_l = [M_lj B_j diag(m_lj)]_j [A_j]_j         columns and rows stacked over the senders j: a
                                                      plain LoRA of rank <= r (1 + degree), exactly
    8  budget b: between 40% and 80% of training the directions of lowest mu^2 / sigma^2 over all
       layers of all kinds are removed on a cubic schedule until b * (number of layers) are left
    9  concrete gate: m = sigmoid((logit u + phi) / temperature), pi = sigmoid(phi),
       rate = KL(Bernoulli(pi) || Bernoulli(prior)); evaluation uses pi if pi >= 1/2 else 0

Where this departs from the paper. (a) It swaps the names A and B; ours are LoRA's and PEFT's. (b)
Its message sigma(h Theta) acts on vec(dW): Theta would have (d k)^2 entries, and nothing could be
merged exactly; we keep the linear residual part and put what is learned into the attention, which
weighs updates but sends them no gradient. (c) It leaves beta, N and the noise model open; the
bound asks for beta = 1, which measured worse than our 0.1. Of a Gaussian gate only mu / sigma
matters: B absorbs its scale. (d) Similarity edges settle after EDGES_SETTLE steps: each new sender
makes the update jump.
"""

import contextlib
import dataclasses
import json
import math
import os
import pickle
import re
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any, Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel

SKETCH = 4                # P and Q have this many columns (Eq. 5)
LEAKY_SLOPE = 0.2         # of the LeakyReLU in Eq. 5, as in GAT
GRADIENT_DECAY = 0.9      # of the running mean gradients behind the similarity edges
EDGES_SETTLE = 10         # optimizer steps after which these edges stay
START = {"gaussian": {"mu": 1.0, "log_sigma": math.log(0.1)},    # of gates: 2.3 nats a direction,
         "concrete": {"phi": 3.0}, "none": {}}                   # or pi = 0.95
TEMPERATURE, PRIOR = 2 / 3, 0.1      # of the concrete gate (Eq. 9)
BETA_WARMUP = 50          # optimizer steps over which beta grows linearly to its value
PRUNE_START, PRUNE_END = 0.4, 0.8    # share of training between which the budget is reached (Eq. 8)


# === Part 1: the method

@dataclasses.dataclass(frozen=True)
class Config:
    """What to attach: by default the full method; without gate and coordinator it is LoRA."""
    rank: int = 8                    # r, directions per layer
    alpha: float = 16.0              # updates are scaled by s = alpha / rank
    dropout: float = 0.0             # on the input of the update, as in LoRA
    targets: tuple = ("q_proj", "v_proj")   # last name components of the linear layers to adapt
    gate: str = "gaussian"           # "gaussian" (Eq. 3), "concrete" (Eq. 9) or "none"
    beta: float = 0.1                # weight of the rate (Eq. 4); 1 is the free energy
    coordinator: str = "attention"   # "attention" (Eq. 5), "uniform" (a = 1 / degree) or "none"
    edges: str = "hybrid"            # the paper's; or "depth", "similarity", "all" (Eq. 6)
    budget: float | None = None      # directions kept per layer, on average over all (Eq. 8)

    def __post_init__(self):
        check_fields(self)


# --- Gates, of all layers of a kind at once: parameters [L, S, r] (layers, messages, directions)

def gate_strength(gates: dict) -> torch.Tensor:
    """What Eq. 8 ranks the directions by: mu^2 / sigma^2, or pi = sigmoid(phi) = P(m > 1/2)."""
    if "phi" in gates:
        return torch.sigmoid(gates["phi"])
    return gates["mu"].square() * torch.exp(-2 * gates["log_sigma"])


def gate_rate(gates: dict) -> torch.Tensor:
    """Nats that a direction can carry at most: Eq. 3, or KL(Bernoulli(pi) || Bernoulli(PRIOR)).

    Eq. 3 is a variational bound (Dai et al. 2018). Of its input X a gated direction passes on Z =
    m u, u = a^T x. For any prior q(Z), I(X; Z) <= E_x KL(p(Z | x) || q). With p = N(mu u, sigma^2
    u^2) and q = N(0, v) the best v is (mu^2 + sigma^2) E[u^2], and the bound becomes 1/2 log(1 +
    mu^2 / sigma^2) + 1/2 (log E[u^2] - E log u^2), whose second term no gate changes."""
    if "mu" in gates:
        return 0.5 * torch.log1p(gate_strength(gates))
    log_open, log_shut = F.logsigmoid(gates["phi"]), F.logsigmoid(-gates["phi"])
    return (log_open.exp() * (log_open - math.log(PRIOR))
            + log_shut.exp() * (log_shut - math.log(1 - PRIOR)))


def gate_mean(gates: dict) -> torch.Tensor:
    """The gates of evaluation, merge and export: mu or pi, but 0 where the noise is larger than mu
    (a rate below 1/2 log 2) or pi is below 1/2."""
    if "mu" in gates:
        return gates["mu"] * (gate_strength(gates) >= 1)
    return gate_strength(gates) * (gate_strength(gates) >= 0.5)


def gate_draw(gates: tuple[torch.Tensor, ...], samples: int) -> torch.Tensor:
    """One draw of m for each of N samples, [N, 1, R]: Eq. 3 of (mu, sigma), or Eq. 9 of (phi,)."""
    shape, like = (samples, 1, len(gates[0])), {"device": gates[0].device, "dtype": gates[0].dtype}
    if len(gates) == 2:
        mu, sigma = gates
        return torch.addcmul(mu, sigma, torch.randn(shape, **like))
    u = torch.rand(shape, device=gates[0].device)                # fp32: 1 - u must not be 0
    logit = torch.logit(u, eps=1e-6).to(gates[0].dtype)
    return torch.sigmoid((logit + gates[0]) / TEMPERATURE)       # Maddison et al. 2017


# --- Adapter of a layer

class LoRA(nn.Module):
    """What hangs on a frozen linear layer as its child `lora`: A [r, k], B [d, r] and the gates
    [S, r] of the S messages that it receives. The layer stays what and where it is, and its weight
    is never read: it may be stored in any way."""

    def __init__(self, linear: nn.Linear, config: Config, S: int):
        super().__init__()
        d, k = linear.out_features, linear.in_features
        self.A = nn.Parameter(torch.empty(config.rank, k).uniform_(-1, 1) / math.sqrt(k))
        self.B = nn.Parameter(torch.zeros(d, config.rank))
        self.gate = nn.ParameterDict({name: torch.full((S, config.rank), value)
                                      for name, value in START[config.gate].items()})
        self.probe = nn.Parameter(torch.zeros(SKETCH, SKETCH))   # C, see LayerGraph.add_probes
        self.config, self.disabled = config, 0
        self.message = None      # in a pass: (A [R, k], B [d, R], gates to draw [R] or none), Eq. 7
        self.to(device_of(linear)).train(linear.training)
        self.register_load_state_dict_pre_hook(say_what_is_missing)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """y = W0 x [N, ..., d] plus the update of x [N, ..., k], N samples: Eq. 1 in the form of
        Eq. 7, two products of width R = r (1 + degree). Nothing of size [d, k] is ever built."""
        if self.disabled:
            return y
        A, B, gates = self.message or replayable(self.graph)[self.index]
        if self.config.dropout:
            x = F.dropout(x, self.config.dropout, self.training)
        u = F.linear(x.reshape(-1, A.shape[1]).to(y.dtype), A.to(y.dtype))       # [T = N * ..., R]
        if gates and self.training:
            samples = len(x) if x.dim() > 1 else 1
            u = u.view(samples, len(u) // max(samples, 1), len(A)) * gate_draw(gates, samples)
            u = u.flatten(0, 1)
        elif gates:                          # in a pass in which others are in training mode
            names = ("mu", "log_sigma") if len(gates) == 2 else ("phi",)
            u = u * gate_mean(dict(zip(names, (gates[0], gates[-1].log()))))
        # y + u B^T in one call saves a pass over the activations.
        return torch.addmm(y.reshape(-1, len(B)), u.to(y.dtype), B.to(y.dtype).T).view_as(y)

    def __getstate__(self):
        return super().__getstate__() | {"message": None}        # of this moment; has a history


def add_update(linear: nn.Linear, args: tuple, kwargs: dict, y: torch.Tensor) -> torch.Tensor:
    """Forward hook of an adapted layer; a function, so that copies and pickles work."""
    return linear.lora(args[0] if args else kwargs["input"], y)


# --- Graph of layers: the coordinator

class LayerGraph(nn.Module):
    """The edges between the adapted layers of one kind, and the messages along them. Each of L
    layers receives S: one is its own, the others are its neighbours'. edges [L, S, L] is positive
    where message s of layer l comes from layer j, all 0 for one without a sender (at the ends of
    the chain). removed [L, S, r] is not 0 for the directions that Eq. 8 took, also in an average of
    models. The graph is a child of the last layer's adapter; the others refer to it."""

    def __init__(self, names: list[str], linears: list[nn.Linear], config: Config):
        super().__init__()
        self.names, self.config = names, config                  # names: as attach() found them
        L, d, k = len(names), linears[0].out_features, linears[0].in_features
        itself, messages = torch.eye(L), [torch.eye(L)]          # message 0: the layer's own
        if L > 1 and config.coordinator != "none":
            if config.edges in ("depth", "hybrid"):
                messages += [torch.ones(L - 1).diag(-1), torch.ones(L - 1).diag(1)]      # l -+ 1
            if config.edges in ("similarity", "hybrid"):
                messages.append(torch.zeros(L, L))               # empty before the first gradient
            if config.edges == "all":
                messages = [row.expand(L, L) for row in itself]  # message j: from layer j
        edges, S = torch.stack(messages, 1), len(messages)
        self.learns_edges = S > 1 and config.edges in ("similarity", "hybrid")   # the last message
        # A plain list: the adapters are children of their layers, not of this.
        self.layers = [LoRA(linear, config, S) for linear in linears]
        generator = torch.Generator().manual_seed(0)             # the same in every run
        P, Q = (torch.randn(n, SKETCH, generator=generator) / math.sqrt(n) for n in (d, k))
        signs, removed = torch.ones(L, S, config.rank), torch.zeros(L, S, config.rank)
        if S > 1:
            self.rho = nn.Parameter(torch.ones(1))
            if config.edges == "all":        # a = 1 / (L - 1): so |M_lj| = 1
                self.rho.data *= L - 1
                random = torch.randint(0, 2, signs.shape, generator=generator) * 2.0 - 1
                signs = torch.where(itself[:, :, None] > 0, signs, random)
            if config.coordinator == "attention":            # zero: starts as the plain average
                self.w_src = nn.Parameter(torch.zeros(SKETCH * SKETCH))
                self.w_dst = nn.Parameter(torch.zeros(SKETCH * SKETCH))
        for name, tensor in (("edges", edges), ("signs", signs), ("removed", removed),
                             ("gradient", torch.zeros(L, SKETCH, SKETCH)),       # running mean
                             ("steps", torch.zeros(())), ("P", P), ("Q", Q)):
            self.register_buffer(name, tensor)
        self.probing = True                          # the probes are in use
        self.pass_owner, self.replay = None, None    # see begin_pass(), replayable()
        self.register_load_state_dict_post_hook(LayerGraph.set_probing)
        self.to(device_of(linears[-1]))

    def collect_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A [L, r, k] and B [L, d, r] of all layers."""
        return (torch.stack([layer.A for layer in self.layers]),
                torch.stack([layer.B for layer in self.layers]))

    def collect_gates(self) -> dict[str, torch.Tensor]:
        """The gates' parameters, [L, S, r] each, of all layers."""
        return {name: torch.stack([layer.gate[name] for layer in self.layers])
                for name in START[self.config.gate]}

    def senders(self) -> torch.Tensor:
        """[L, S, L]: 1 where message s of layer l comes from layer j."""
        if not self.learns_edges:
            return self.edges
        choice = latest(self.edges[:, -1]).to(self.edges.dtype)
        return torch.cat([self.edges[:, :-1], choice[:, None]], 1)

    def mixing(self, senders: torch.Tensor, A, B, gates: dict) -> torch.Tensor:
        """M of Eq. 6 by messages [L, S]: 1 for the layer's own, rho a_lj for a neighbour's."""
        itself = senders.diagonal(dim1=0, dim2=2).T              # [L, S], 1 at the layer's own
        if senders.shape[1] == 1:
            return itself
        edge = senders.sum(2) - itself                           # [L, S], 1 at its neighbours'
        e = torch.zeros_like(edge)
        if self.config.coordinator == "attention":               # Eq. 5
            with torch.no_grad():
                own = itself[..., None] * (self.removed == 0)                    # [L, S, r]
                own = (own * gate_mean(gates) if gates else own).sum(1, keepdim=True)
                h = (self.P.T @ B * own) @ (A @ self.Q)                          # [L, 4, 4]
                h = unit(h.flatten(1))                                           # [L, 16]
            e = (h @ self.w_src)[:, None] + senders @ (h @ self.w_dst)
            e = F.leaky_relu(e, LEAKY_SLOPE)
        lowest = torch.finfo(e.dtype).min
        a = e.masked_fill(edge == 0, lowest).softmax(1) * edge   # rows without an edge become 0
        return itself + self.rho * a

    def gather(self, senders, A, B) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows [L, R = S r, k] and columns [L, d, R] of each layer's senders (Eq. 7)."""
        L, S, _ = senders.shape
        if self.config.edges == "all" and S > 1:                 # one matrix, which all layers read
            A, B = A.flatten(0, 1), B.transpose(0, 1).flatten(1)             # [L r, k], [d, L r]
            return A.expand(L, -1, -1), B.expand(L, -1, -1)
        # Products with 0 and 1 are exact; the backward pass of an index would add by atomics.
        senders = senders.to(A.dtype)
        return (torch.einsum("lsj,jrk->lsrk", senders, A).flatten(1, 2),
                torch.einsum("lsj,jdr->ldsr", senders, B).flatten(2))

    def updates(self, random: bool, probing: bool = False) -> tuple:
        """Eq. 7 for all layers: rows A [L, R, k]; columns B [L, d, R], times s M and, if they are
        not random, the mean gates; these weights [L, R]; what is drawn otherwise, [L, R] each."""
        with torch.autocast(self.P.device.type, enabled=False):  # in fp32, as it is stored
            (A, B), gates, senders = self.collect_factors(), self.collect_gates(), self.senders()
            s, drawn = self.config.alpha / self.config.rank, []
            weight = s * self.mixing(senders, A, B, gates)[..., None] * self.signs       # [L, S, r]
            weight = weight * (self.removed == 0)
            if gates and not random:
                weight = weight * gate_mean(gates)
            elif "phi" in gates:
                drawn = [gates["phi"]]
            elif gates:
                drawn = [gates["mu"], gates["log_sigma"].exp()]
            drawn = [gate.flatten(1) for gate in drawn]
            A, B = self.gather(senders, A, B)
            weight = weight.flatten(1)                                           # [L, R = S r]
            B = B * weight[:, None]
            if probing:
                A, B, drawn = self.add_probes(A, B, drawn)
        return A, B, weight, drawn

    def add_probes(self, A: torch.Tensor, B: torch.Tensor, drawn: list) -> tuple:
        """Four more directions, y += P C Q^T x, where C [4, 4] is kept at 0 as C - C.detach(). They
        do not change y, but since dL/dW = sum_x (dL/dy) x^T, the gradient of C is
        sum_x P^T (dL/dy) x^T Q = P^T (dL/dW) Q: the sketch that Eq. 6 compares."""
        C = torch.stack([layer.probe for layer in self.layers])                  # [L, 4, 4]
        B = torch.cat([B, (self.P @ (C - C.detach())).to(B.dtype)], 2)
        A = torch.cat([A, self.Q.T.to(A.dtype).expand(len(A), -1, -1)], 1)
        always_one = (math.inf,) if self.config.gate == "concrete" else (1.0, 0.0)
        drawn = [F.pad(gate, (0, SKETCH), value=v) for gate, v in zip(drawn, always_one)]
        return A, B, drawn

    @torch.no_grad()
    def observe(self) -> None:
        """Counts a step; in the first ones moves the running mean gradient and the edges by it."""
        self.steps += 1
        self.end_pass()                      # of one that was interrupted
        if self.probing:
            sketches = torch.stack([layer.probe if layer.probe.grad is None else layer.probe.grad
                                    for layer in self.layers])
            for layer in self.layers:
                layer.probe.grad = None
            # Not a GradScaler's infinite gradients, and not once directions were chosen (Eq. 8).
            if sketches.isfinite().all() and not self.removed.any():
                self.gradient.lerp_(sketches, 1 - GRADIENT_DECAY)
                if self.learns_edges:        # an entry that grows by the step: see latest()
                    self.edges[:, -1] = torch.where(self.most_similar(), 1000.0 ** self.steps, 0.0)
            self.set_probing()

    def most_similar(self) -> torch.Tensor:
        """[L, L] bool: the layer of the most similar gradient that is no neighbour otherwise."""
        taken = self.edges[:, :-1].sum(1) > 0
        best = self.gradient_cosine().masked_fill(taken, -2.0).max(1)
        return F.one_hot(best.indices, len(taken)).bool() & (best.values > -2.0)[:, None]

    def gradient_cosine(self) -> torch.Tensor:
        """[L, L] cosine between the layers' running mean gradients dL/dW (of their sketches)."""
        g = unit(self.gradient.flatten(1))
        return g @ g.T

    def set_probing(self, *_) -> None:
        """Whether the next passes use the probes; also after loading."""
        self.probing = bool(self.steps < (EDGES_SETTLE if self.learns_edges else 1))

    def present(self) -> torch.Tensor:
        """[L, S, r] bool: the directions that have a sender and were not removed."""
        return (self.edges.sum(2)[..., None] != 0) & (self.removed == 0)

    def strengths(self) -> torch.Tensor:
        """[L, S, r] what Eq. 8 ranks by, on the CPU; -1, less than any, for those not present."""
        return gate_strength(self.collect_gates()).float().masked_fill(~self.present(), -1.0).cpu()

    def rates(self) -> torch.Tensor:
        """R_l in nats [L] (Eq. 3)."""
        return (gate_rate(self.collect_gates()) * self.present()).sum((1, 2))

    def begin_pass(self, module: nn.Module, inputs: tuple) -> None:
        """A pass is a call of the outermost module that holds two of the layers. Before it all
        messages are computed at once, since every small operation costs, and each layer is handed
        its own. (By number, torch.compile would compile each block anew: numbers are constants.)"""
        if self.pass_owner in (None, id(module)) and self.layers:
            self.pass_owner = id(module)     # not the module itself, which may be a compiled one
            for layer, message in zip(self.layers, replayable(self)):
                layer.message = message

    def end_pass(self, module: nn.Module | None = None, *_) -> None:
        """After it, even if it failed. Without a module: after whichever there is."""
        if module is None or self.pass_owner == id(module):
            self.pass_owner = None
            for layer in self.layers:
                layer.message = None

    def messages(self, random: bool, values: bool = False) -> list[tuple]:
        """(A [R, k], B [d, R], gates to draw [R] if random) of each layer; values: no history."""
        probing = self.probing and torch.is_grad_enabled() and not torch.jit.is_tracing()
        A, B, _, drawn = self.updates(random, probing)
        if values:
            A, B, *drawn = (t.detach().requires_grad_(t.requires_grad) for t in (A, B, *drawn))
        drawn = [gate.unbind() for gate in drawn]
        gates = [tuple(gate[l] for gate in drawn) for l in range(len(A))]
        return list(zip(A.unbind(), B.unbind(), gates))

    def __getstate__(self):
        return super().__getstate__() | {"pass_owner": None, "replay": None}     # of this moment


# --- Attach, and the handle

def attach(model: nn.Module, config: Config | None = None) -> "StructLoRA":
    """Freezes `model` and hangs an adapter on every nn.Linear (also of a subclass) whose dotted
    name ends in one of config.targets. The output stays bit-equal until the first step. Raises
    ValueError, with the model untouched, if a target matches nothing, for a layer that cannot be
    adapted, and if there are adapters already."""
    config = config or Config()
    kinds = find_kinds(model, config)                            # [{name: layer}]
    remember(model)                                              # for detach() and export_peft()
    model.requires_grad_(False)
    for linears in kinds:
        with torch.device("cpu"):            # where the fixed generator is; moved afterwards
            graph = LayerGraph([*linears], [*linears.values()], config)
        for index, (linear, layer) in enumerate(zip(linears.values(), graph.layers)):
            object.__setattr__(layer, "graph", graph)            # refers to it, is no parent of it
            linear.lora, layer.index = layer, index
            linear.register_forward_hook(add_update, prepend=True, with_kwargs=True)
        layer.graph = graph                  # the last one is its parent
        for prefix, module in model.named_modules():
            if module is model or sum(name.startswith(f"{prefix}.") for name in linears) > 1:
                module.register_forward_pre_hook(graph.begin_pass)
                module.register_forward_hook(graph.end_pass, always_call=True)
    if "torch._dynamo" in sys.modules:       # what is compiled already looks for no new hooks
        torch.compiler.reset()
    return StructLoRA(model)


class StructLoRA:
    """The handle of a model with adapters, also of a copied or loaded one: all that is trained
    lives in the model. Raises ValueError if there are no adapters."""

    def __init__(self, model: nn.Module):
        self.model = model.module if isinstance(model, WRAPPERS) else model
        self.graphs = [*dict.fromkeys(layer.graph for layer in self.layers.values())]
        if len({graph.config for graph in self.graphs}) != 1:
            raise ValueError("the model has no adapters, or those of several Configs: make a "
                             "handle of the part that one attach() was given")
        self.config = self.graphs[0].config

    def penalty(self, num_examples: int) -> torch.Tensor:
        """beta R / num_examples (Eq. 4), a scalar to add to the mean task loss; 0 without a gate.
        num_examples: labelled training examples (predicted tokens for a language model). beta is
        warmed up over the first BETA_WARMUP steps. Raises ValueError in eval mode."""
        if not is_positive(num_examples):
            raise ValueError(f"penalty(num_examples={num_examples!r}): must be a positive number")
        device = next(self.model.parameters()).device
        if self.config.gate == "none" or not self.graphs:
            return torch.zeros((), device=device)
        if not self.model.training:
            raise ValueError("penalty() in eval mode, without noise: call model.train() first")
        beta = self.config.beta * ((self.graphs[0].steps + 1) / BETA_WARMUP).clamp(max=1)
        R = sum(graph.rates().sum().to(device) for graph in self.graphs)
        return beta.to(device) * R / num_examples

    def observe_gradients(self) -> None:
        """After backward(), before clipping and the optimizer step: counts the step, and in the
        first EDGES_SETTLE moves the similarity edges. The first call raises ValueError that names
        the layers of a kind that no gradient reached."""
        self._check_gradients()
        for graph in self.graphs:
            graph.observe()

    def prune(self, progress: float) -> None:
        """Once a step, progress in [0, 1] of training (else ValueError): removes directions on the
        cubic schedule of Eq. 8, the weakest of all kinds first. Does nothing without a budget."""
        if not 0 <= progress <= 1:
            raise ValueError(f"prune({progress!r}): progress must be in [0, 1]")
        if self.config.budget is None or progress < PRUNE_START:
            return
        layers = sum(len(graph.layers) for graph in self.graphs)
        candidates = sum(int(graph.senders().sum()) for graph in self.graphs) * self.config.rank
        target = min(candidates, max(1, round(self.config.budget * layers)))
        remaining = 1 - min(1.0, (progress - PRUNE_START) / (PRUNE_END - PRUNE_START))
        count = target + math.ceil((candidates - target) * remaining ** 3)
        strengths = [graph.strengths().flatten() for graph in self.graphs]
        weak = torch.ones(sum(map(len, strengths)))
        weak[torch.cat(strengths).topk(count).indices] = 0.0
        for graph, part in zip(self.graphs, weak.split([len(each) for each in strengths])):
            graph.removed += part.view_as(graph.removed).to(graph.removed)

    @torch.no_grad()
    def factors(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """name -> (B [out, R], A [R, in]) in fp32: the final update is B A, s included (Eq. 7). The
        merged rank R is r (1 + degree) less the directions that are shut or removed."""
        factors, layers = {}, self.layers
        for graph in {layer.graph for layer in layers.values()}:
            A, B, weight, _ = graph.updates(random=False)
            for l, layer in enumerate(graph.layers):
                used, wide = weight[l] != 0, torch.promote_types(A.dtype, torch.float32)
                factors[layer] = B[l][:, used].to(wide), A[l][used].to(wide)
        return {name: factors[layer] for name, layer in layers.items()}

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Adds the updates to the weights (in fp32, then cast) and removes the adapters. Returns
        the model; a second call changes nothing. Raises ValueError, with the model untouched, that
        names a weight which is quantised, computed or tied, or would not be finite."""
        self._check_finite()
        self._check_merge()
        self._say_what_was_not_called()
        linears, merged = adapted(self.model), {}
        for name, delta in self.deltas().items():                # s dW [d, k]
            weight = linears[name].weight
            merged[name] = (weight + delta).to(weight.dtype)     # W0 + s dW, a sum in fp32
        check_finite(merged)
        for name, weight in merged.items():
            linears[name].weight.copy_(weight)
        return self.detach()

# === Part 2: Around the method. First the other calls of the handle.

    def param_groups(self, lr: float, gate_lr: float | None = None,
                     weight_decay: float = 0.01) -> list[dict]:
        """Groups for torch.optim: factors, and what else you unfroze (a head), at lr with weight
        decay; the coordinator at lr; gates at gate_lr, by default 0.05 with a budget, which ranks
        by them, and 0.01 without."""
        layers, groups = self.layers.values(), []
        factors = [p for layer in layers for p in (layer.A, layer.B)]
        factors += dict.fromkeys(sort_tensors(self.model)[1].values())   # a head; tied ones once
        mixing = [p for graph in self.graphs for p in graph.parameters()]
        gates = [p for layer in layers for p in layer.gate.values()]
        if gate_lr is None:
            gate_lr = 0.05 if self.config.budget else 0.01
        for params, own_lr, decay in ((factors, lr, weight_decay), (mixing, lr, 0.0),
                                      (gates, gate_lr, 0.0)):
            if params := [p for p in params if p.requires_grad]:
                groups.append({"params": params, "lr": own_lr, "weight_decay": decay})
        return groups

    @property
    def layers(self) -> dict[str, LoRA]:
        """name -> adapter, of the layers that are in the model now."""
        return {name: linear.lora for name, linear in adapted(self.model).items()}

    @torch.autocast("cpu", enabled=False)      # which would round
    @torch.autocast("cuda", enabled=False)
    def deltas(self) -> dict[str, torch.Tensor]:
        """name -> the final update s dW_l [out, in] in fp32."""
        return {name: B @ A for name, (B, A) in self.factors().items()}

    @torch.no_grad()
    @torch.autocast("cpu", enabled=False)      # which would round
    @torch.autocast("cuda", enabled=False)
    def diagnostics(self) -> dict[str, Any]:
        """What the gates and the coordinator did. Keys: rate (nats), gate_mean, kept (merged rank),
        effective_rank (exp of the entropy of the singular values): name -> number. drift_energy:
        sum_l ||u_{l+1} - u_l||^2 over the chains, u_l = vec(s dW_l). update_cosine, gradient_cosine
        (of the first steps): means over adjacent layers, None where unknown. cosine_matrix, mixing:
        kind -> [L, L]."""
        keys = ("rate", "gate_mean", "kept", "effective_rank", "cosine_matrix", "mixing")
        result, drift = {key: {} for key in keys}, 0.0
        cosines = {"update_cosine": [], "gradient_cosine": []}
        for graph in self.graphs:
            gates, kind, senders = graph.collect_gates(), kind_of(graph.names[0]), graph.senders()
            mixing = graph.mixing(senders, *graph.collect_factors(), gates)              # [L, S]
            A, B, weight, _ = graph.updates(random=False)
            if kind in result["mixing"]:                         # the same name in another shape
                kind += f" {[B.shape[1], A.shape[2]]}"
            gram = torch.stack([(b.mT @ B * (a @ A.mT)).sum((1, 2))      # <u_l, u_j>, no [d, k]
                                for a, b in zip(A, B)])                  # [L, L]
            norm = gram.diagonal().clamp_min(0).sqrt()
            cosine = gram / (norm[:, None] * norm).clamp_min(1e-30)
            drift += float((norm[1:]**2 + norm[:-1]**2 - 2 * gram.diagonal(1)).sum())
            cosines["update_cosine"] += cosine.diagonal(1).tolist()
            if graph.gradient.any():
                cosines["gradient_cosine"] += graph.gradient_cosine().diagonal(1).tolist()
            mixing = torch.einsum("ls,lsj->lj", mixing, senders)
            result["cosine_matrix"][kind], result["mixing"][kind] = cosine, mixing
            values = thin_svd(B, A)[1]                           # [L, R]
            share = values / values.sum(1, keepdim=True).clamp_min(1e-30)
            effective = torch.special.entr(share).sum(1).exp() * (norm > 0)
            result["effective_rank"] |= zip(graph.names, effective.tolist())
            result["kept"] |= zip(graph.names, (weight != 0).sum(1).tolist())
            if gates:
                present = graph.present()
                mean = (gate_mean(gates) * present).sum((1, 2)) / present.sum((1, 2)).clamp_min(1)
                result["rate"] |= zip(graph.names, graph.rates().tolist())
                result["gate_mean"] |= zip(graph.names, mean.tolist())
        for key, values in cosines.items():
            result[key] = sum(values) / len(values) if values else None
        return result | {"drift_energy": drift}

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model is the frozen one: a reference model for DPO, a baseline. A gradient
        checkpoint that goes forward inside must go backward inside, too."""
        layers = [*self.layers.values()]
        for layer in layers:
            layer.disabled += 1              # may be nested
        try:
            yield
        finally:
            for layer in layers:
                layer.disabled -= 1

    def detach(self) -> nn.Module:
        """Removes the adapters without adding them; requires_grad becomes what it was."""
        for linear in adapted(self.model).values():
            linear.lora.graph.layers = []    # no reference cycle; hooks above find nothing to do
            del linear.lora
        for module in self.model.modules():
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                for key, hook in [*hooks.items()]:
                    if hook is add_update or isinstance(getattr(hook, "__self__", 0), LayerGraph):
                        del hooks[key]
                        module._forward_hooks_always_called.pop(key, None)
                        module._forward_hooks_with_kwargs.pop(key, None)
            for name, before in vars(module).pop("before_attach", {}).items():
                if isinstance(module._parameters.get(name), nn.Parameter):
                    module._parameters[name].requires_grad_(before)
        self.graphs = []
        return self.model

    def _check_gradients(self) -> None:
        """Before the first step: raises ValueError if no gradient has reached a kind. Notes what is
        trained, since an average or a model in use is often frozen afterwards."""
        first = [graph for graph in self.graphs if graph.probing and graph.steps == 0]
        for module in self.model.modules() if first else ():
            trained = {n for n, p in module.named_parameters(recurse=False) if p.requires_grad}
            vars(module).setdefault("before_attach", {})[" trained"] = trained
        if any(graph.layers[0].A.dtype.itemsize == 2 for graph in self.graphs):
            warnings.warn("adapters in half precision: cast before attach()", stacklevel=3)
        for graph in first:
            grads = {name: layer.probe.grad for name, layer in zip(graph.names, graph.layers)
                     if layer.probe.requires_grad}
            unreached = [name for name, grad in grads.items() if grad is None or not grad.any()]
            text = (f"no gradient reached {', '.join(unreached)}: the model does not call them "
                    "(only reads their weights), or a gradient checkpoint needs "
                    "use_reentrant=False, or ")
            if grads and all(grad is None for grad in grads.values()):
                raise ValueError(f"{text}backward() was not called")
            if 0 < len(unreached) < len(grads):      # a head of zeros lets nothing through at first
                warnings.warn(f"{text}they are left out at random", stacklevel=3)

    def _check_finite(self) -> None:
        """Raises ValueError that names a parameter of ours with NaN or infinite entries."""
        for name, layer in self.layers.items():
            check_finite({f"{name} ({key})": p for key, p in layer.named_parameters()})

    def _check_merge(self) -> None:
        """Raises ValueError that names an adapted layer to whose weight nothing can be added."""
        owners = {}
        for prefix, module in self.model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                owners.setdefault(parameter.data_ptr(), []).append(clean(f"{prefix}.{name}"))
        for name, linear in adapted(self.model).items():
            weight, reason = linear._parameters.get("weight"), None
            stored = type(weight) is nn.Parameter and not weight.is_meta
            if not is_plain(linear) or not stored or 0 in weight.stride():
                reason = f"its weight is quantised, computed or offloaded ({type(linear).__name__})"
            elif len(owners[weight.data_ptr()]) > 1:
                reason = f"its weight is tied ({' = '.join(owners[weight.data_ptr()])})"
            if reason:
                raise ValueError(f"{name} cannot be merged: {reason}; use save() or export_peft()")

    def _say_what_was_not_called(self) -> None:
        """Warns, on the way out, of what the training loop has left out."""
        if not any(layer.B.any() for layer in self.layers.values()):
            return                               # nothing was learned
        needed = self.config.gate != "none" or any(g.learns_edges for g in self.graphs)
        if needed and self.graphs[0].steps == 0:
            warnings.warn("observe_gradients() was never called: beta and the similarity edges "
                          "stayed as they began", stacklevel=3)
        if self.config.budget and not any(g.removed.any() for g in self.graphs):
            warnings.warn("prune(progress) has removed nothing: the budget is not kept",
                          stacklevel=3)

    def state(self) -> dict:
        """What save() writes: plain types and tensors. Raises ValueError without adapters, or if a
        layer has left the model whose directions the others use."""
        own, trained, buffers = sort_tensors(self.model)
        there = set(self.layers.values())
        if not there or not all(there.issuperset(graph.layers) for graph in self.graphs):
            raise ValueError("adapters are missing: merge() or detach() was called, or a layer was "
                             "cut off whose directions the others use; merge() or export_peft()")
        state = {name: tensor.detach() for name, tensor in (own | trained | buffers).items()}
        return {"format": FORMAT, "config": dataclasses.asdict(self.config), "state": state}

    @torch.no_grad()
    def load_state(self, file: dict) -> None:
        """The reverse of state(), for a model with the same layers. Raises ValueError before
        anything is copied."""
        state, mine = file["state"], self.state()["state"]
        parameters = {clean(n): p for n, p in self.model.named_parameters(remove_duplicate=False)}
        there = parameters | {clean(n): b for n, b in self.model.named_buffers()}
        for name in sorted(mine.keys() - state.keys() | state.keys() - there.keys()):
            raise ValueError(f"does not fit the model: {name} is only in one of them")
        for name, tensor in state.items():
            if tensor.shape != there[name].shape:
                raise ValueError(f"does not fit the model: {name} is {list(tensor.shape)}")
        check_finite({name: tensor for name, tensor in state.items() if name in parameters})
        for name, tensor in state.items():
            there[name].copy_(tensor)
            if name in parameters and name not in mine:          # a head, say
                parameters[name].requires_grad_(True)
        for graph in self.graphs:
            graph.set_probing()

    def save(self, path: str | Path) -> None:
        """Writes adapters, gates, graphs, Config, what else is trained, and the buffers that
        training has moved (statistics) to one file."""
        self._say_what_was_not_called()
        write(path, self.state())

    @staticmethod
    def load(model: nn.Module, path: str | Path) -> "StructLoRA":
        """attach() as the file says, then its state. Raises ValueError that names the file."""
        with reading(path):
            file = load_torch(path)
            found = file.get("format") if isinstance(file, dict) else None
            if found != FORMAT:
                raise ValueError(f"no file of StructLoRA.save: format {found!r}, not {FORMAT!r}")
            adapters = attach(model, Config(**file["config"]))
            try:
                adapters.load_state(file)
            except Exception:
                adapters.detach()
                raise
        return adapters

    @torch.autocast("cpu", enabled=False)      # which would round
    @torch.autocast("cuda", enabled=False)
    def export_peft(self, directory: str | Path, base: str | None = None,
                    rank: int | None = None) -> None:
        """Writes adapter_config.json and adapter_model.bin, which PEFT reads as a plain LoRA, with
        a trained head as modules_to_save. rank=None is exact; otherwise each update is cut to
        `rank` by SVD. Raises ValueError for what PEFT cannot carry or is not finite."""
        if rank is not None and not (isinstance(rank, int) and rank >= 1):
            raise ValueError(f"rank={rank!r}: must be a whole number >= 1")
        if not self.graphs:
            raise ValueError("there are no adapters any more: merge() or detach() was called")
        self._say_what_was_not_called()
        self._check_finite()
        (tensors, to_save), ranks = carried_by_peft(self), {}
        for name, (B, A) in self.factors().items():
            r = min(rank or len(A), len(B), A.shape[1])          # no update has more
            if r < len(A):                                       # Eckart-Young
                U, S, Vh = thin_svd(B, A)
                B, A = U[:, :r] * S[:r].sqrt(), S[:r, None].sqrt() * Vh[:r]
            if not len(A):                                       # PEFT knows no rank 0
                B, A = B.new_zeros(len(B), 1), A.new_zeros(1, A.shape[1])
            ranks[name], tensors[f"{name}.lora_A.weight"] = len(A), A.float()
            tensors[f"{name}.lora_B.weight"] = B.float()
        check_finite(tensors)
        largest = max(ranks.values())        # is r, because some servers check r alone
        # Patterns of how a name ends; ^ tells q_proj from encoder.q_proj.
        smaller = {"^" + re.escape(name): r for name, r in ranks.items() if r < largest}
        config = {"peft_type": "LORA", "base_model_name_or_path": base, "task_type": None,
                  "r": largest, "lora_alpha": largest,           # a scaling of 1 everywhere
                  "rank_pattern": smaller, "alpha_pattern": smaller, "target_modules": list(ranks),
                  "modules_to_save": to_save or None, "bias": "none", "inference_mode": True}
        write(Path(directory, "adapter_model.bin"),
              {f"base_model.model.{name}": tensor for name, tensor in tensors.items()})
        write(Path(directory, "adapter_config.json"), json.dumps(config, indent=2))


FORMAT = "structlora-3"   # of the files that StructLoRA.save writes
WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)    # of .module
PREFIXES = re.compile(r"_orig_mod\.|_checkpoint_wrapped_module\.|_fsdp_wrapped_module\.")


# --- Layers

def clean(name: str) -> str:
    """A dotted name without what torch.compile, checkpoint wrappers and FSDP put into it."""
    return PREFIXES.sub("", name)


def adapted(model: nn.Module) -> dict[str, nn.Linear]:
    """name -> linear layer, of all that have an adapter now."""
    return {clean(name): module for name, module in model.named_modules()
            if isinstance(module._modules.get("lora"), LoRA)}


def device_of(linear: nn.Linear) -> torch.device:
    """Where its tensors are, whatever they are called."""
    return next((t.device for t in (*linear.parameters(), *linear.buffers())), torch.device("cpu"))


def is_plain(linear: nn.Linear) -> bool:
    """Whether it computes F.linear(x, weight, bias) and no more: not quantised, not offloaded."""
    return getattr(linear.forward, "__func__", None) is nn.Linear.forward


def kind_of(name: str) -> str:
    """The name with its numbers replaced by *, but for the last component, where w1 and w3 are
    different layers: "block3.layers.0.w1" -> "block*.layers.*.w1"."""
    parent, dot, last = name.rpartition(".")
    return re.sub(r"\d+", "*", parent) + dot + last


def find_kinds(model: nn.Module, config: Config) -> list[dict[str, nn.Linear]]:
    """{name: layer} of each kind, in the order of their numbers. Raises ValueError for what cannot
    be adapted; warns if no layer has a neighbour."""
    if adapted(model):
        raise ValueError("the model has adapters already: merge() or detach() them first")
    modules, kinds = {name: module for name, module in model.named_modules() if name}, {}
    linears = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    for target in config.targets:
        named = [name for name in modules if f".{name}".endswith(f".{target}")]
        if not linears.keys() & set(named):
            what = type(modules[named[0]]).__name__ if named else "nothing"
            there = ", ".join(sorted({kind_of(name) for name in linears})) or "none"
            raise ValueError(f"{target!r} names {what}, no nn.Linear; the model has: {there}")
    found = [n for n in linears if f".{n}".endswith(tuple(f".{t}" for t in config.targets))]
    for name in sorted(found, key=lambda n: [int(i) for i in re.findall(r"\d+", n)]):
        linear = linears[name]
        check_layer(name, linear, config.rank)
        kind = kind_of(name), linear.out_features, linear.in_features, device_of(linear)
        kinds.setdefault(kind, {})[name] = linear
    if config.coordinator != "none" and all(len(layers) == 1 for layers in kinds.values()):
        warnings.warn(f"no layer has a neighbour to share with: {', '.join(found)} are each the "
                      "only one of its kind", stacklevel=3)
    return [*kinds.values()]


# --- Checks before anything is touched

def check_layer(name: str, linear: nn.Linear, rank: int) -> None:
    """Raises ValueError for a layer that cannot be adapted."""
    size, reason = min(linear.out_features, linear.in_features), None
    if hasattr(linear, "lora"):
        reason = "it has an attribute `lora` of its own"
    elif device_of(linear).type == "meta":
        reason = "its weight is on the meta device, not in memory"
    elif is_plain(linear) and linear.weight.dtype not in (torch.float32, torch.float16,
                                                          torch.bfloat16, torch.float64):
        reason = f"its weight is {linear.weight.dtype}, which nn.Linear cannot multiply by"
    elif rank > size:
        reason = f"rank={rank} is more than {size}, its smaller side"
    if reason:
        raise ValueError(f"{name} cannot be adapted: {reason}")


def is_positive(value: Any) -> bool:
    """Whether it is a number above 0 and below infinity."""
    try:
        return not isinstance(value, str) and 0 < float(value) < math.inf
    except (TypeError, ValueError):
        return False


def check_fields(config: Config) -> None:
    """Raises ValueError that names the first field of a Config that cannot work."""
    c, names = config, config.targets
    names = names.split(",") if isinstance(names, str) else names
    named = isinstance(names, (list, tuple)) and len(names) > 0 and all(
        isinstance(name, str) and name.strip() for name in names)
    if named:
        object.__setattr__(c, "targets", tuple(name.strip() for name in names))
    choices = {"gate": tuple(START), "coordinator": ("attention", "uniform", "none"),
               "edges": ("hybrid", "depth", "similarity", "all")}
    for field, good, rule in (
            ("rank", type(c.rank) is int and c.rank >= 1, "a whole number >= 1"),
            ("alpha", is_positive(c.alpha), "a positive number"),
            ("dropout", c.dropout == 0 or is_positive(c.dropout) and c.dropout < 1, "in [0, 1)"),
            ("targets", named, "names of linear layers"),
            *((field, getattr(c, field) in known, f"one of {known}")
              for field, known in choices.items()),
            ("beta", c.beta == 0 or is_positive(c.beta), "zero or positive"),
            ("budget", c.budget is None or is_positive(c.budget) and c.gate != "none",
             "positive, and needs a gate to rank by")):
        if not good:
            raise ValueError(f"{field}={getattr(c, field)!r}: must be {rule}")


def say_what_is_missing(layer: LoRA, state: dict, prefix: str, *_) -> None:
    """Before load_state_dict: warns of factors that come without what belongs to them."""
    needed = [name for name, _ in layer.named_parameters() if name != "probe"]
    if "graph" in layer._modules:
        needed += ["graph.edges"] * layer.graph.learns_edges
        needed += ["graph.removed"] * bool(layer.config.budget)
    missing = [f"{prefix}{name}" for name in needed if f"{prefix}{name}" not in state]
    if missing and f"{prefix}A" in state:
        warnings.warn(f"factors are loaded without {', '.join(missing)}, which stay as they are in "
                      "this model", stacklevel=2)


# --- Averages, checkpoints, precision

def unit(rows: torch.Tensor) -> torch.Tensor:
    """The rows [L, n] at length 1, or 0 where they are 0, in half precision too."""
    return F.normalize(rows, dim=1, eps=max(1e-12, torch.finfo(rows.dtype).tiny))


def latest(choices: torch.Tensor) -> torch.Tensor:
    """[L, L] bool: the largest entry of each row that has any. A choice of step t is 1000^t, so
    that in an average of models the last one wins, whatever its share."""
    place = torch.arange(len(choices), device=choices.device)
    return (choices != 0) & (place == choices.argmax(1, keepdim=True))


def replayable(graph: LayerGraph) -> list[tuple]:
    """graph.messages(), such that gradient checkpoints can replay the layers. A checkpoint must not
    record how messages are computed; and what it recomputes inside backward() needs their values
    alone, computed once for all layers of that backward()."""
    random, unrecorded = any(layer.training for layer in graph.layers), contextlib.nullcontext()
    if torch.compiler.is_compiling():
        return graph.messages(random)
    task = torch._C._current_graph_task_id()
    if task >= 0 and graph.replay and graph.replay[0] == (task, random):
        return graph.replay[1]                                   # of this backward()
    if torch._C._autograd._saved_tensors_hooks_is_enabled():     # not inside torch.func.grad
        unrecorded = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    with unrecorded:
        messages = graph.messages(random, values=task >= 0)
    graph.replay = ((task, random), messages) if task >= 0 else None
    return messages


# --- Tensors and files

def remember(model: nn.Module) -> None:
    """Notes on each module which of its parameters are trained, and what its buffers hold."""
    for module in model.modules():
        notes = {n: p.requires_grad for n, p in module.named_parameters(recurse=False)}
        notes |= {n: b.clone() for n, b in lasting_buffers(module)}
        vars(module).setdefault("before_attach", notes)


def lasting_buffers(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Its own buffers that belong into a state_dict."""
    return [(name, buffer) for name, buffer in module.named_buffers(recurse=False)
            if name not in module._non_persistent_buffers_set]


def sort_tensors(model: nn.Module) -> tuple[dict, dict, dict]:
    """name -> tensor, in three: of adapters and graphs; parameters that are trained beside them;
    buffers that are no more what they were. (state_dict() would pack 4-bit weights anew.)"""
    own, trained, moved = {}, {}, {}
    ours = {module for linear in adapted(model).values() for module in linear.lora.modules()}
    for prefix, module in model.named_modules():
        prefix, notes = clean(f"{prefix}." if prefix else ""), vars(module).get("before_attach", {})
        for name, parameter in module.named_parameters(recurse=False):
            if module in ours or parameter.requires_grad or name in notes.get(" trained", ()):
                (own if module in ours else trained)[prefix + name] = parameter
        for name, buffer in lasting_buffers(module):
            before = notes.get(name)
            if module in ours:
                own[prefix + name] = buffer
            elif before is None or not torch.equal(before.to(buffer), buffer):
                moved[prefix + name] = buffer
    return own, trained, moved


def carried_by_peft(adapters: StructLoRA) -> tuple[dict[str, torch.Tensor], list[str]]:
    """(tensors, modules_to_save): what is trained beside the adapters. Raises ValueError for what
    PEFT would read as something else, or not at all."""
    model, tensors, layers = adapters.model, {}, adapted(adapters.model)
    _, trained, moved = sort_tensors(model)
    modules = {clean(name): module for name, module in model.named_modules()}
    for name, parameter in trained.items():
        owner = name.rpartition(".")[0]                          # PEFT saves it whole
        wrong = [n for n in modules if n.endswith(owner) and n != owner]         # and these
        wrong += [n for n in layers if f"{n}.".startswith(f"{owner}.")]
        wrong += [n for n, p in model.named_parameters(remove_duplicate=False)
                  if p is parameter and clean(n) != name]        # tied
        if wrong:
            raise ValueError(f"PEFT cannot carry {name}, trained beside the adapters: it would "
                             f"take {', '.join(wrong[:3])} for it too; use save() or merge()")
        for key, tensor in modules[owner].state_dict().items():
            tensors[f"{owner}.{key}"] = tensor.clone()
    for name in sorted(moved.keys() - tensors.keys()):
        raise ValueError(f"PEFT cannot carry {name}, which training moves: use save()")
    twice = [clean(n) for n, m in model.named_modules(remove_duplicate=False)
             if m in layers.values() and clean(n) not in layers]
    if twice:
        raise ValueError(f"PEFT cannot carry {twice[0]}, whose layer has two names; use save()")
    return tensors, sorted({name.rpartition(".")[0] for name in trained})


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Around what reads `path`: whatever fails becomes one ValueError of one line that names it."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        if isinstance(error, pickle.UnpicklingError):
            text = "holds more than tensors, or is damaged: refused, and nothing in it was run"
        elif not isinstance(error, (ValueError, OSError)):
            text = f"damaged, cut short or of another kind ({type(error).__name__}: {text})"
        raise ValueError(text if text.startswith(str(path)) else f"{path}: {text}") from None


def load_torch(path: str | Path) -> Any:
    """The tensors and plain types in a file of torch.save; no code in it is run."""
    if Path(path).suffix == ".safetensors" or not Path(path).exists() and list(
            Path(path).parent.glob("*.safetensors")):
        raise ValueError(f"{path}: safetensors are not read; write their tensors once with "
                         "torch.save(safetensors.torch.load_file(FILE), 'pytorch_model.bin')")
    return torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def check_finite(tensors: dict[str, torch.Tensor]) -> None:
    """Raises ValueError that names the first tensor with NaN or infinite entries."""
    for name, tensor in tensors.items():     # isfinite() takes 20 times as long; NaN spreads
        if tensor.numel() and not all(extreme.isfinite() for extreme in tensor.aminmax()):
            raise ValueError(f"{name} has NaN or infinite entries")


def write(path: str | Path, value: Any) -> None:
    """Writes a text, or tensors by torch.save, to a temporary name and renames it: a reader sees
    the whole file or none of it."""
    temporary = Path(f"{path}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        if isinstance(value, str):
            temporary.write_text(value, "utf-8")
        else:
            torch.save(value, temporary)
    except RuntimeError as error:            # torch.save's word for a full disk
        raise OSError(f"{path}: {error}") from None
    os.replace(temporary, path)


def thin_svd(B: torch.Tensor, A: torch.Tensor) -> tuple:
    """SVD of B A through two thin QR factorisations: U [..., d, R], S [..., R], V^T [..., R, k]."""
    (q_b, r_b), (q_a, r_a) = torch.linalg.qr(B), torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    return q_b @ U, S, Vh @ q_a.mT
