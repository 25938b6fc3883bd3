"""StructLoRA in one file: low-rank adaptation with an information-bottleneck gate on every
rank-one direction and a graph of layers that share their updates (arXiv 2603.14228, ACL 2026).

    adapters = attach(model, Config(rank=4, targets=("q_proj", "v_proj")))
    optimizer = torch.optim.AdamW(adapters.param_groups(lr=3e-3))
    for x, y in batches:
        loss = F.cross_entropy(model(x), y) + adapters.penalty(num_examples=len(dataset))
        loss.backward()
        adapters.observe_gradients()             # moves the gradient-similarity edges
        optimizer.step(); optimizer.zero_grad()
    model = adapters.merge()                     # plain nn.Linear again; inference costs nothing

Shapes: W0 [d, k] frozen, A [r, k] uniform in +-1/sqrt(k), B [d, r] zero, s = alpha / r. Layers
l = 1..L of one kind (same dotted name with the numbers replaced by *, same shape) form one graph;
kinds do not mix. The equations below are repeated where they are computed.

    1  y = W0 x + s dW_l x                            dW_l = B_l A_l for plain LoRA
    2  U_lj = B_j diag(m_lj) A_j                      layer j's update as receiver l filters it:
                                                      a gate per direction and message
    3  m_lji ~ N(mu_lji, sigma_lji^2)                 training, one draw per sample and direction
       m_lji = mu_lji if mu_lji^2 >= sigma_lji^2 else 0      evaluation, merge, export
       R_l = sum_ji 1/2 log(1 + mu_lji^2 / sigma_lji^2)      nats; I(X; Z_l) <= R_l + const
                                                      (variational bound of Dai et al. 2018)
    4  loss = cross entropy + beta R / N              R = sum_l R_l, N labelled training examples
    5  h_l = normalised vec(P^T U_ll Q)               a 4 x 4 sketch of the node feature vec(U_ll)
       e_lj = LeakyReLU(w_src . h_l + w_dst . h_j),   a_l. = softmax_j e_lj   over the edges of l
    6  dW_l = sum_j M_lj U_lj,   M = (I + rho a)^hops rho learned, starts at 1
    7  dW_l = [M_lj B_j diag(m_lj)]_j [A_j]_j         columns and rows stacked over the senders j: a
                                                      plain LoRA of rank <= r (1 + degree), exactly
    8  budget b: between 40% and 80% of training the directions of lowest mu^2 / sigma^2 over all
       layers of all kinds are removed on a cubic schedule until b * (number of layers) are left
    9  concrete gate: m = sigmoid((logit u + phi) / temperature), pi = sigmoid(phi),
       rate = KL(Bernoulli(pi) || Bernoulli(prior)); evaluation uses pi if pi >= 1/2 else 0

Where this departs from the paper, and why. (a) The paper swaps the names A and B; ours are those
of the LoRA paper and PEFT. (b) Its message sigma(h Theta) acts on vec(dW), so Theta would have
(d k)^2 entries and the result could not be merged exactly; we keep the linear residual part and
put what is learned into the attention, whose features are sketches. (c) It leaves the noise model
and N open: at beta = 1 equations 3 and 4 are the variational free energy. We temper it, beta = 0.1:
with few labels the full rate shuts messages that help. (d) The features h carry no gradient: at
B = 0 the normalisation has none, and the attention should weigh the updates, not pull on them.
(e) A Gaussian gate is not confined to [0, 1]: its scale is absorbed by B, and only mu / sigma
matters. (f) The similarity edges settle after EDGES_SETTLE steps: factors and gates learn for the
senders they have, and each change of one is a jump.

Order of this file: layer, gate, coordinator, attach / merge / export, diagnostics, files, training
loop. Everything above the training loop can be copied out alone; it needs torch only.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import pickle
import re
import signal
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any, Callable, NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

SKETCH = 4                # P and Q have this many columns (Eq. 5)
LEAKY_SLOPE = 0.2         # of the LeakyReLU in Eq. 5, as in GAT
GRADIENT_DECAY = 0.9      # of the running mean gradients behind the similarity edges
EDGES_SETTLE = 10         # steps after which these edges stay
RANDOM_DEGREE = 3         # edges per node of the random control: the degree of a hybrid node
INITIAL_SIGMA = 0.1       # Gaussian gates start at mu = 1: 2.3 nats a direction
PENALTY_WARMUP = 50       # calls of penalty() over which beta grows linearly to its value
PRUNE_START, PRUNE_END = 0.4, 0.8    # share of training between which the budget is reached (Eq. 8)


class InputError(ValueError):
    """A mistake in what the user gave: main() prints it as one line and exits with status 2."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What to attach. The defaults are the full method; without gate and coordinator it is LoRA."""
    rank: int = 8                    # r, directions per layer
    alpha: float = 16.0              # updates are scaled by s = alpha / rank
    dropout: float = 0.0             # on the input of the update, as in LoRA
    targets: tuple = ("q_proj", "v_proj")   # last name components of the linear layers to adapt
    gate: str = "gaussian"           # "gaussian" (Eq. 3), "concrete" (Eq. 9) or "none"
    beta: float = 0.1                # weight of the rate (Eq. 4); 1 is the variational free energy
    coordinator: str = "attention"   # "attention" (Eq. 5), "uniform" (a = 1 / degree) or "none"
    edges: str = "hybrid"            # "depth" (l +- 1), "similarity", "hybrid" (both) or "random"
    hops: int = 1                    # power of the mixing matrix: how far an update travels
    budget: float | None = None      # mean merged rank per layer after pruning (Eq. 8)

    def __post_init__(self):
        names = self.targets.split(",") if isinstance(self.targets, str) else self.targets
        object.__setattr__(self, "targets", tuple(names))      # JSON gives a list, people a string

    def check(self) -> None:
        """Raises InputError (a ValueError) that names the first field out of range."""
        choices = {"gate": ("gaussian", "concrete", "none"),
                   "coordinator": ("attention", "uniform", "none"),
                   "edges": ("hybrid", "depth", "similarity", "random"), "hops": (1, 2, 3)}
        rules = {field: (getattr(self, field) in allowed, f"must be one of {allowed}")
                 for field, allowed in choices.items()} | {
            "rank": (isinstance(self.rank, int) and self.rank >= 1, "must be a whole number >= 1"),
            "alpha": (0 < self.alpha < math.inf, "must be positive"),
            "dropout": (0 <= self.dropout < 1, "must be in [0, 1)"),
            "beta": (0 <= self.beta < math.inf, "must not be negative"),
            "targets": (self.targets and all(isinstance(t, str) and t for t in self.targets),
                        "must name at least one layer"),
            "budget": (self.budget is None or 0 < self.budget < math.inf and self.gate != "none",
                       "must be positive, and needs a gate to rank the directions")}
        for field, (good, rule) in rules.items():
            if not good:
                raise InputError(f"{field}={getattr(self, field)!r}: {rule}")


# ---------------------------------------------------------------------------------------------
# Layer


class LoRALinear(nn.Module):
    """A frozen linear layer plus its update, Eq. 1 in the stacked form of Eq. 7.

    x [N, ..., k] -> [N, ..., d], with N the samples: the gate is drawn once for each of them.
    """

    def __init__(self, base: nn.Linear, graph: "LayerGraph", index: int):
        super().__init__()
        self.base, self.in_features, self.out_features = base, base.in_features, base.out_features
        self.place = (graph, index)     # a tuple, so that not every layer registers the graph,
        if index == 0:                  # but the first one of its kind alone
            self.graph = graph
        self.train(base.training)

    @property
    def weight(self):
        """The frozen weight [d, k], for code that asks a layer for its dtype or device."""
        return self.base.weight

    @property
    def bias(self):
        """The frozen bias [d] or None."""
        return self.base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """W0 x + s dW x; two matmuls of width R = r (1 + degree), nothing of size [d, k]."""
        graph, index = self.place
        A, B, scale, gate = graph.messages_to(index)             # [R, k], [R, d], [R], its gate
        y = self.base(x)                                         # [N, ..., d]
        u = F.dropout(x, graph.config.dropout, self.training).to(A.dtype) @ A.T      # [N, ..., R]
        if gate is not None:
            shape = (len(x), *[1] * (x.dim() - 2)) if x.dim() > 1 else ()
            scale = scale * graph.gate.sample(gate, (*shape, len(scale)))            # [N, 1.., R]
        y = y + ((u * scale.to(u.dtype)) @ B).to(y.dtype)        # Eq. 1 and 7
        if graph.watches and y.requires_grad:
            sketch = x.detach() @ graph.Q.to(x.dtype)            # [N, ..., 4]; x itself is not kept
            y.register_hook(functools.partial(graph.record, index, sketch))
        return y


# ---------------------------------------------------------------------------------------------
# Gate


class GaussianGate(nn.Module):
    """Eq. 3: multiplicative Gaussian noise on every direction of every message.

    shape [L, S, r]: receivers, senders (slot 0 is the receiver itself), directions.
    """

    def __init__(self, shape: tuple):
        super().__init__()
        self.mu = nn.Parameter(torch.ones(shape))
        self.log_sigma = nn.Parameter(torch.full(shape, math.log(INITIAL_SIGMA)))

    def score(self) -> torch.Tensor:
        """Signal-to-noise ratio mu^2 / sigma^2 [L, S, r], by which Eq. 8 ranks directions."""
        return self.mu.square() * torch.exp(-2 * self.log_sigma)

    def rate(self) -> torch.Tensor:
        """Upper bound on the information a direction carries, in nats [L, S, r] (Eq. 3)."""
        return 0.5 * torch.log1p(self.score())

    def mean(self) -> torch.Tensor:
        """The gate of evaluation, merge and export [L, S, r]: mu, or 0 below half a bit."""
        return self.mu * (self.score() >= 1)

    def per_layer(self) -> list:
        """What sample() needs, one tuple per receiver: (mu [S r], sigma [S r])."""
        return list(zip(self.mu.flatten(1).unbind(), self.log_sigma.exp().flatten(1).unbind()))

    def sample(self, layer: tuple, shape: tuple) -> torch.Tensor:
        """One draw of m; shape [N, 1.., S r] with a leading dimension of samples."""
        mu, sigma = layer
        return mu + sigma * torch.randn(shape, device=mu.device, dtype=mu.dtype)


class ConcreteGate(nn.Module):
    """Eq. 9: a relaxed Bernoulli gate (Maddison et al. 2017) of the same shape [L, S, r]."""

    def __init__(self, shape: tuple, temperature: float = 2 / 3, prior: float = 0.1):
        super().__init__()
        self.temperature, self.prior = temperature, prior
        self.phi = nn.Parameter(torch.full(shape, 3.0))          # opens at pi = 0.95

    def score(self) -> torch.Tensor:
        """pi = sigmoid(phi) = P(m > 1/2) at every temperature [L, S, r]."""
        return torch.sigmoid(self.phi)

    def rate(self) -> torch.Tensor:
        """KL(Bernoulli(pi) || Bernoulli(prior)) in nats [L, S, r] (Eq. 9)."""
        open_, shut = F.logsigmoid(self.phi), F.logsigmoid(-self.phi)    # log pi, log(1 - pi)
        return (open_.exp() * (open_ - math.log(self.prior))
                + shut.exp() * (shut - math.log(1 - self.prior)))

    def mean(self) -> torch.Tensor:
        """The gate of evaluation, merge and export [L, S, r]: pi, or 0 below 1/2."""
        pi = self.score()
        return pi * (pi >= 0.5)

    def per_layer(self) -> list:
        """What sample() needs, one tuple per receiver: (phi [S r],)."""
        return list(zip(self.phi.flatten(1).unbind()))

    def sample(self, layer: tuple, shape: tuple) -> torch.Tensor:
        """One draw of m in (0, 1); shape [N, 1.., S r]."""
        phi, = layer
        u = torch.rand(shape, device=phi.device, dtype=torch.float32).to(phi.dtype)
        return torch.sigmoid((torch.logit(u, eps=1e-6) + phi) / self.temperature)


GATES = {"gaussian": GaussianGate, "concrete": ConcreteGate, "none": lambda shape: None}


# ---------------------------------------------------------------------------------------------
# Coordinator


class LayerGraph(nn.Module):
    """All adapted layers of one kind: their factors, their gates and the edges between them.

    Factors are stacked over the L layers, so that the messages of all layers are gathered by one
    index_select, and the optimizer sees few large tensors. Every layer has S slots for senders:
    slot 0 is the layer itself, the others its neighbours (all other layers if hops > 1). A slot
    without a sender (the ends of the chain) points to the layer itself and is marked invalid.
    """

    def __init__(self, names: list[str], linears: list[nn.Linear], config: Config):
        super().__init__()
        self.names, self.config = names, config
        L, r, (d, k) = len(names), config.rank, linears[0].weight.shape
        self.A = nn.Parameter(torch.empty(L, r, k).uniform_(-1, 1) / math.sqrt(k))
        self.B = nn.Parameter(torch.zeros(L, r, d))              # B_l^T: a direction is a row
        self._place_edges()
        S = self.senders.shape[1]
        self.gate = GATES[config.gate]((L, S, r))
        self.register_buffer("kept", torch.ones(L, S, r, dtype=torch.bool))          # Eq. 8
        generator = torch.Generator().manual_seed(0)             # P, Q: the same in every run
        self.register_buffer("P", torch.randn(d, SKETCH, generator=generator))
        self.register_buffer("Q", torch.randn(k, SKETCH, generator=generator))
        if S > 1:
            self.rho = nn.Parameter(torch.ones(()))
        if S > 1 and config.coordinator == "attention":          # zero: starts as the plain average
            self.w_src = nn.Parameter(torch.zeros(SKETCH * SKETCH))
            self.w_dst = nn.Parameter(torch.zeros(SKETCH * SKETCH))
        self.watches = self.learns_edges = config.edges in ("hybrid", "similarity") and L > 1
        self.register_buffer("gradient", torch.zeros(L, SKETCH, SKETCH))         # running mean
        self.register_buffer("gradient_sum", torch.zeros(L, SKETCH, SKETCH), persistent=False)
        self.reference = (linears[0],)       # for its dtype; a tuple, as in LoRALinear
        self.messages, self.stamp = None, None

    # --- edges

    def _place_edges(self) -> None:
        """Buffers neighbours [L, D] and is_edge [L, D] at the start; similarity comes later."""
        L, edges = len(self.names), self.config.edges
        here, columns = torch.arange(L), []
        if L > 1 and self.config.coordinator != "none":
            if edges in ("depth", "hybrid"):
                columns += [here - 1, here + 1]
            if edges == "similarity" or (edges == "hybrid" and L > 2):
                columns += [torch.full((L,), -1)]                # unknown before the first gradient
            if edges == "random":
                others = torch.stack([torch.randperm(L - 1)[:RANDOM_DEGREE] for _ in range(L)])
                columns += list((others + (others >= here[:, None])).T)     # skips the layer itself
        neighbours = torch.stack(columns, 1) if columns else torch.empty(L, 0, dtype=torch.long)
        is_edge = (neighbours >= 0) & (neighbours < L)
        self.register_buffer("neighbours", torch.where(is_edge, neighbours, here[:, None]))
        self.register_buffer("is_edge", is_edge)
        self._place_slots()

    def _place_slots(self) -> None:
        """Buffers senders [L, S] and valid [L, S]: who reaches whom along at most `hops` edges."""
        L, device = len(self.names), self.neighbours.device
        here = torch.arange(L, device=device)[:, None]
        if self.config.hops == 1 or not self.neighbours.shape[1]:
            senders = torch.cat([here, self.neighbours], 1)
            valid = torch.cat([torch.ones_like(here, dtype=torch.bool), self.is_edge], 1)
        else:                                                    # a slot for everyone, itself first
            senders = (here + here.T) % L
            step = torch.eye(L, device=device) + self.adjacency()
            valid = torch.linalg.matrix_power(step, self.config.hops).gather(1, senders) > 0
        self.register_buffer("senders", senders)
        self.register_buffer("valid", valid)

    def adjacency(self) -> torch.Tensor:
        """[L, L] bool: row l marks the neighbours that send to layer l."""
        L = len(self.names)
        empty = torch.zeros(L, L, dtype=torch.bool, device=self.neighbours.device)
        return empty.scatter(1, self.neighbours, self.is_edge)

    @torch.no_grad()
    def record(self, index: int, sketch: torch.Tensor, grad: torch.Tensor) -> None:
        """Backward hook of layer `index`, given x Q: adds P^T G Q; G = dL/dW = sum grad x^T."""
        left = (grad @ self.P.to(grad.dtype)).reshape(-1, SKETCH)                # [N T, 4]
        right = sketch.reshape(-1, SKETCH)                                       # [N T, 4]
        self.gradient_sum[index] += (left.T.float() @ right.float()).to(self.gradient_sum)

    @torch.no_grad()
    def observe(self) -> None:
        """Folds this step's gradients into the running mean and re-points the similarity edges."""
        self.gradient.lerp_(self.gradient_sum, 1 - GRADIENT_DECAY)
        self.gradient_sum.zero_()
        if self.config.coordinator == "none":
            return
        if self.config.budget is not None and not self.kept.all():
            return                           # what is left was chosen for the present senders
        cosine = self.gradient_cosine().fill_diagonal_(-2.0)
        if self.config.edges == "hybrid":                        # l +- 1 are edges already
            L = len(self.names)
            near = torch.ones(L, L, dtype=torch.bool, device=cosine.device).tril(1).triu(-1)
            cosine = cosine.masked_fill(near, -2.0)
        if self.config.edges == "similarity" or len(self.names) > 2:
            best = cosine.max(1)
            self.is_edge[:, -1] = best.values > -2.0
            here = torch.arange(len(self.names), device=cosine.device)
            self.neighbours[:, -1] = torch.where(self.is_edge[:, -1], best.indices, here)
            self._place_slots()
            self.stamp = None

    def gradient_cosine(self) -> torch.Tensor:
        """[L, L] cosine between the layers' running mean gradients dL/dW (of their sketches)."""
        g = F.normalize(self.gradient.flatten(1).float(), dim=1)
        return g @ g.T

    # --- mixing

    @torch.no_grad()
    def features(self) -> torch.Tensor:
        """h [L, 16] of Eq. 5, the normalised sketch of every layer's own update U_ll."""
        left, right = self.B @ self.P, self.A @ self.Q           # [L, r, 4] each
        if self.gate is not None:
            left = left * (self.gate.mean() * self.kept)[:, 0, :, None]
        return F.normalize((left.mT @ right).flatten(1).float(), dim=1)

    def mixing(self) -> torch.Tensor:
        """M [L, L] of Eq. 6: what share of layer j's filtered update layer l receives."""
        identity = torch.eye(len(self.names), device=self.A.device)
        if not self.neighbours.shape[1]:
            return identity
        edge = self.adjacency()
        e = torch.zeros_like(identity)
        if self.config.coordinator == "attention":               # Eq. 5
            h = self.features()
            score = (h @ self.w_src.float())[:, None] + h @ self.w_dst.float()
            e = F.leaky_relu(score, LEAKY_SLOPE)
        a = e.masked_fill(~edge, -1e9).softmax(1) * edge         # rows without an edge become zero
        return torch.linalg.matrix_power(identity + self.rho.float() * a, self.config.hops)

    def scales(self, with_gate: bool) -> torch.Tensor:
        """s M_lj [L, S, r] (Eq. 7), zero where there is no sender or the direction was removed;
        times the gate's mean for evaluation, merge and export."""
        weight = self.mixing().gather(1, self.senders) * self.valid              # [L, S]
        scale = self.config.alpha / self.config.rank * weight[:, :, None] * self.kept
        return scale * self.gate.mean() if with_gate and self.gate is not None else scale

    def gather(self, factor: torch.Tensor) -> torch.Tensor:
        """[L, r, n] -> [L, S r, n]: the rows of all senders of every layer (Eq. 7)."""
        L, S = self.senders.shape
        if S == 1:
            return factor.view_as(factor)
        return factor.index_select(0, self.senders.flatten()).view(L, -1, factor.shape[2])

    def refresh(self) -> None:
        """Computes the messages of all layers, once per forward pass of the whole model."""
        self.stamp = self._now()
        A, B = self.gather(self.A.to(self.stamp[0])), self.gather(self.B.to(self.stamp[0]))
        sampled = self.gate is not None and self.training
        scale = self.scales(with_gate=not sampled).flatten(1)                    # [L, S r]
        gates = self.gate.per_layer() if sampled else [None] * len(A)
        if A.requires_grad:
            A.register_hook(self._used_up)
        self.messages = list(zip(A.unbind(), B.unbind(), scale.unbind(), gates))

    def messages_to(self, index: int) -> tuple:
        """(A [S r, k], B [S r, d], scale [S r], gate parameters or None) of layer `index`."""
        if self.stamp != self._now():        # a part of the model was called, not the model itself,
            keep = lambda tensor: tensor     # perhaps inside a checkpoint, which must not notice
            with torch.autograd.graph.saved_tensors_hooks(keep, keep):
                self.refresh()
        return self.messages[index]

    def _now(self) -> tuple:
        """What the messages depend on, the dtype to compute in first."""
        device, dtype = self.A.device.type, self.reference[0].weight.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        return dtype, self.B.data_ptr(), self.B._version, self.training, torch.is_grad_enabled()

    def _used_up(self, grad: torch.Tensor) -> None:
        self.messages, self.stamp = None, None    # backward() has freed the graph behind them

    def __getstate__(self):
        return {**self.__dict__, "messages": None, "stamp": None}    # autograd cannot be copied

    # --- what is left after training

    def rates(self) -> torch.Tensor:
        """R_l in nats [L] (Eq. 3), over the directions that exist and were not removed."""
        return (self.gate.rate() * self.present()).sum((1, 2))

    def present(self) -> torch.Tensor:
        """[L, S, r] bool: the directions that exist and were not removed."""
        return self.kept & self.valid[:, :, None]

    def importance(self) -> torch.Tensor:
        """What Eq. 8 ranks the directions by [L, S, r], never negative."""
        return self.gate.score()

    @torch.no_grad()
    def factors(self) -> dict:
        """name -> (B [d, R], A [R, k]) in fp32, B A = s dW_l (Eq. 7), without closed directions."""
        scale = self.scales(with_gate=True).flatten(1).float()
        A, B, result = self.gather(self.A.float()), self.gather(self.B.float()), {}
        for l, name in enumerate(self.names):
            used = scale[l] != 0
            result[name] = ((B[l, used] * scale[l, used, None]).T.contiguous(), A[l, used].clone())
        return result


# ---------------------------------------------------------------------------------------------
# Attach, merge, export


def kind_of(name: str) -> str:
    """The dotted name with every number replaced by *: "layers.3.q_proj" -> "layers.*.q_proj"."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _find_targets(model: nn.Module, targets: tuple) -> dict:
    """name -> nn.Linear of all layers to adapt; InputError if there are none, or they are tied."""
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n}
    hit = lambda name, target: name == target or name.endswith("." + target)
    found = {n: m for n, m in linears.items() if any(hit(n, t) for t in targets)}
    if not found:
        there = ", ".join(sorted({kind_of(n) for n in linears})) or "none"
        raise InputError(f"no linear layer is named {' or '.join(targets)}; the model has: {there}")
    for target in targets:
        if not any(hit(n, target) for n in found):
            warnings.warn(f"target {target!r} matches no linear layer", stacklevel=3)
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for name, linear in found.items():
        shared = names.get(id(linear.weight), [])
        if not shared:
            raise InputError(f"the weight of {name} is computed (a parametrization): there is "
                             "nothing to merge into; remove it, or leave the layer out of targets")
        if len(shared) > 1:
            raise InputError(f"the weight of {name} is tied ({' = '.join(shared)}): merging would "
                             "change both; untie it or leave it out of targets")
        # These two read weights without calling the layer: an adapter inside would be skipped.
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention):
            raise InputError(f"{name}: nn.MultiheadAttention never calls this layer; not supported")
        fast = torch.backends.mha.get_fastpath_enabled()
        if isinstance(parent, nn.TransformerEncoderLayer) and fast:
            raise InputError(f"{name}: nn.TransformerEncoderLayer goes around this layer; "
                             "call torch.backends.mha.set_fastpath_enabled(False) first")
    return found


def attach(model: nn.Module, config: Config = Config()) -> "StructLoRA":
    """Freezes `model` and replaces every nn.Linear whose dotted name ends in one of config.targets.

    The output stays bit-equal until the first step. Raises InputError (a ValueError) if nothing
    matches (it lists the names there are), if rank < 1 or rank > min(in, out), if a target's
    weight is tied to another parameter, or if the model has adapters already.
    """
    config.check()
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise InputError("the model has adapters already: merge() or detach() them first")
    found = _find_targets(model, config.targets)
    for name, linear in found.items():
        if config.rank > min(linear.weight.shape):
            raise InputError(f"rank={config.rank} is more than {name} has: its weight is "
                             f"{linear.out_features} x {linear.in_features}")
    return StructLoRA(model, config, found)


class StructLoRA:
    """The handle that attach() returns. The parameters live in the model, in the first layer of
    each kind; this object only knows where."""

    def __init__(self, model: nn.Module, config: Config, found: dict[str, nn.Linear]):
        self.model, self.config, self.penalty_calls, self.observations = model, config, 0, 0
        self.was_trainable = [(p, p.requires_grad) for p in model.parameters()]
        model.requires_grad_(False)
        kinds = {}
        for name in sorted(found, key=lambda n: [int(p) for p in n.split(".") if p.isdigit()]):
            kinds.setdefault((kind_of(name), found[name].weight.shape), []).append(name)
        self.layers, self.graphs = {}, []                        # both empty again after merge()
        for names in kinds.values():
            linears = [found[name] for name in names]
            graph = LayerGraph(names, linears, config).to(linears[0].weight.device)
            self.graphs.append(graph)
            for index, name in enumerate(names):
                self.layers[name] = LoRALinear(found[name], graph, index)
                self._place(name, self.layers[name])
        self.hook = model.register_forward_pre_hook(self._before_forward)

    def _place(self, name: str, module: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(self.model.get_submodule(parent), child, module)

    def _before_forward(self, model, args) -> None:
        for graph in self.graphs:
            graph.refresh()

    def penalty(self, num_examples: int) -> torch.Tensor:
        """beta R / num_examples (Eq. 4), a scalar to add to the mean task loss; 0 without a gate.

        num_examples: labelled training examples (predicted tokens for a language model). beta is
        warmed up over the first PENALTY_WARMUP calls.
        """
        if self.config.gate == "none" or not self.graphs:
            return torch.zeros((), device=next(self.model.parameters()).device)
        self.penalty_calls += 1
        beta = self.config.beta * min(1.0, self.penalty_calls / PENALTY_WARMUP)
        return beta / num_examples * sum(graph.rates().sum() for graph in self.graphs)

    def observe_gradients(self) -> None:
        """After backward(), before the optimizer step: updates the gradient-similarity edges, until
        they stay as they are after EDGES_SETTLE calls."""
        self.observations += 1
        for graph in self.graphs:
            if graph.watches:
                graph.observe()
                graph.watches = self.observations < EDGES_SETTLE

    @torch.no_grad()
    def prune(self, progress: float) -> None:
        """Once a step, progress in [0, 1] of training: removes directions on the cubic schedule of
        Eq. 8, the worst of all layers of all kinds first. Does nothing without a budget."""
        if self.config.budget is None or progress < PRUNE_START:
            return
        candidates = sum(int(g.valid.sum()) for g in self.graphs) * self.config.rank
        target = min(candidates, round(self.config.budget * len(self.layers)))
        remaining = 1 - min(1.0, (progress - PRUNE_START) / (PRUNE_END - PRUNE_START))
        count = target + math.ceil((candidates - target) * remaining ** 3)
        scores = torch.cat([g.importance().float().masked_fill(~g.present(), -1.0).flatten()
                            for g in self.graphs])               # a score is never negative
        best = torch.zeros_like(scores, dtype=torch.bool)
        best[scores.topk(count).indices] = True
        for graph, part in zip(self.graphs, best.split([g.kept.numel() for g in self.graphs])):
            graph.kept &= part.view_as(graph.kept)
            graph.stamp = None

    def param_groups(self, lr: float, gate_lr: float | None = None,
                     weight_decay: float = 0.01) -> list[dict]:
        """Groups for torch.optim: everything in the model that requires a gradient.

        Factors, and what else you unfroze (a head), at lr with weight decay; the coordinator at lr;
        gates at gate_lr without decay. gate_lr defaults to 0.05 with a budget, which needs gates
        that separate, and to 0.01 without one: faster gates saturate.
        """
        gate_lr = gate_lr if gate_lr is not None else 0.05 if self.config.budget else 0.01
        mine = [(name, p) for graph in self.graphs for name, p in graph.named_parameters()]
        factors = [p for name, p in mine if name in ("A", "B")]
        gates = [p for name, p in mine if name.startswith("gate.")]
        mixing = [p for name, p in mine if name in ("rho", "w_src", "w_dst")]
        groups = [(factors + list(self.trained().values()), lr, weight_decay),
                  (mixing, lr, 0.0), (gates, gate_lr, 0.0)]
        return [{"params": params, "lr": rate, "weight_decay": decay}
                for params, rate, decay in groups if params]

    def factors(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """name -> (B [out, R], A [R, in]) in fp32: the final update is B A, s included (Eq. 7).

        R is the merged rank: r (1 + degree) less the directions whose gate is shut or removed."""
        return {name: pair for graph in self.graphs for name, pair in graph.factors().items()}

    def deltas(self) -> dict[str, torch.Tensor]:
        """name -> the final update s dW_l [out, in] in fp32."""
        return {name: B @ A for name, (B, A) in self.factors().items()}

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Adds the updates to the weights (in fp32, then cast) and removes the adapters.

        Returns the model. A second call changes nothing. Raises InputError, with the model
        untouched, if a merged weight would not be finite."""
        def merged(name: str, B: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
            weight = self.layers[name].base.weight
            wide = torch.promote_types(weight.dtype, torch.float32)
            return (weight.to(wide) + (B @ A).to(wide)).to(weight.dtype)         # W0 + s dW

        factors = self.factors()
        for name, pair in factors.items():       # twice the work, so that a failure changes nothing
            if not merged(name, *pair).isfinite().all():
                raise InputError(f"not merged: the weight of {name} would not be finite")
        for name, pair in factors.items():
            self.layers[name].base.weight.copy_(merged(name, *pair))
        return self.detach()

    def detach(self) -> nn.Module:
        """Removes the adapters without adding them; puts nn.Linear and requires_grad back."""
        for name, layer in self.layers.items():
            layer.base.train(layer.training)
            self._place(name, layer.base)
        for parameter, flag in self.was_trainable:
            parameter.requires_grad_(flag)
        self.hook.remove()
        self.layers, self.graphs, self.was_trainable = {}, [], []
        return self.model

    # --- files

    def trained(self) -> dict[str, nn.Parameter]:
        """What is trained beside the adapters, by name: a new head, usually."""
        mine = {id(p) for graph in self.graphs for p in graph.parameters()}
        return {name: p for name, p in self.model.named_parameters()
                if p.requires_grad and id(p) not in mine}

    def state(self) -> dict:
        """What save() writes: plain types and tensors, all that weights_only=True can read.
        Raises InputError after merge() or detach()."""
        if not self.graphs:
            raise InputError("there are no adapters any more: merge() or detach() was called")
        return {"format": "structlora-1", "config": dataclasses.asdict(self.config),
                "layers": {g.names[0]: len(g.names) for g in self.graphs},
                "penalty_calls": self.penalty_calls, "observations": self.observations,
                "state": [graph.state_dict() for graph in self.graphs],
                "trained": {name: p.detach() for name, p in self.trained().items()}}

    @torch.no_grad()
    def load_state(self, state: dict, source: str = "state") -> None:
        """The reverse of state(), for a model with the same layers. Raises InputError."""
        layers = {g.names[0]: len(g.names) for g in self.graphs}
        try:
            if state["layers"] != layers:
                raise ValueError(f"it is for layers {state['layers']}, here are {layers}")
            trained = {self.model.get_parameter(n): value for n, value in state["trained"].items()}
            pairs = [*trained.items(), *((mine[key], value) for graph, saved in
                                         zip(self.graphs, state["state"], strict=True)
                                         for mine in [graph.state_dict()] for key, value in
                                         (saved | dict.fromkeys(mine.keys() - saved)).items())]
            for mine, value in pairs:            # all before any is copied
                if mine.shape != value.shape or not torch.can_cast(value.dtype, mine.dtype):
                    raise ValueError(f"a tensor is {value.dtype} {list(value.shape)}, here "
                                     f"{mine.dtype} {list(mine.shape)}")
                if not value.isfinite().all():
                    raise ValueError("NaN or infinite entries")
                if mine.dtype == torch.long and ((value < 0) | (value >= len(mine))).any():
                    raise ValueError(f"an edge leads to none of the {len(mine)} layers")
            calls = int(state["penalty_calls"]), int(state["observations"])
        except (ValueError, AttributeError, KeyError, TypeError, RuntimeError) as error:
            raise InputError(f"{source}: does not fit the model: {one_line(error)}") from None
        for mine, value in pairs:
            mine.copy_(value)
        for parameter in trained:
            parameter.requires_grad_(True)
        self.penalty_calls, self.observations = calls
        for graph in self.graphs:
            graph.watches = graph.learns_edges and self.observations < EDGES_SETTLE
            graph.stamp = None

    def save(self, path: str | Path) -> None:
        """Writes adapters, gates, coordinator, running edges, Config and what else was trained."""
        write_atomically(path, lambda temporary: torch.save(self.state(), temporary))

    @staticmethod
    def load(model: nn.Module, path: str | Path) -> "StructLoRA":
        """attach() as the file says, then its state. Raises InputError that names the file."""
        state = read_torch(path)
        if not isinstance(state, dict) or state.get("format") != "structlora-1":
            raise InputError(f"{path}: not a file of StructLoRA.save")
        try:
            adapters = attach(model, Config(**state["config"]))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{path}: does not fit the model: {one_line(error)}") from None
        try:
            adapters.load_state(state, str(path))
        except InputError:
            adapters.detach()
            raise
        return adapters

    def export_peft(self, directory: str | Path, base: str | None = None,
                    rank: int | None = None) -> None:
        """Writes adapter_config.json and adapter_model.bin, which PEFT reads as a plain LoRA.

        rank=None is exact: every layer keeps its merged rank. Otherwise each update is cut to
        `rank` by SVD, the nearest of that rank. A trained head goes along as modules_to_save.
        """
        trained = self.state()["trained"]
        for name in trained:                 # PEFT replaces whole modules, and knows no other way
            owner = name.rpartition(".")[0]
            if not owner or any(f"{layer}.".startswith(f"{owner}.") or owner.startswith(f"{layer}.")
                                for layer in self.layers):
                raise InputError(f"PEFT cannot carry {name}, trained beside the adapters: use "
                                 "save()")
        tensors = {f"base_model.model.{n}": value.clone() for n, value in trained.items()}
        ranks = {}
        for name, (B, A) in self.factors().items():
            B, A = truncate(B, A, rank) if rank else (B, A)
            if not A.shape[0]:                                   # PEFT knows no rank 0
                B, A = B.new_zeros(len(B), 1), A.new_zeros(1, A.shape[1])
            tensors[f"base_model.model.{name}.lora_A.weight"] = A.contiguous()
            tensors[f"base_model.model.{name}.lora_B.weight"] = B.contiguous()
            ranks[name] = A.shape[0]
        common = statistics.mode(ranks.values())
        # PEFT takes these for patterns of how a name ends; ^ tells q_proj from encoder.q_proj.
        start = {n: "^" * any(other.endswith("." + n) for other in ranks) for n in ranks}
        others = {start[n] + re.escape(n): r for n, r in ranks.items() if r != common}
        config = {"peft_type": "LORA", "base_model_name_or_path": base, "task_type": None,
                  "r": common, "rank_pattern": others,
                  "lora_alpha": common, "alpha_pattern": others,     # a scaling of 1 everywhere
                  "target_modules": list(ranks), "lora_dropout": 0.0, "bias": "none",
                  "fan_in_fan_out": False, "inference_mode": True,
                  "modules_to_save": sorted({n.rpartition(".")[0] for n in trained}) or None}
        Path(directory).mkdir(parents=True, exist_ok=True)
        write_atomically(Path(directory) / "adapter_model.bin", lambda t: torch.save(tensors, t))
        write_json(Path(directory) / "adapter_config.json", config)

    # --- diagnostics

    @torch.no_grad()
    def diagnostics(self) -> dict[str, Any]:
        """What the gates and the coordinator did. Keys:

        rate (nats), gate_mean, kept (merged rank), effective_rank (exp of the entropy of the
        singular values) and svd_coverage (share of the energy in the first r): name -> number.
        drift_energy: sum_l ||u_{l+1} - u_l||^2 over the chains, u_l = vec(s dW_l).
        update_cosine, gradient_cosine: mean over adjacent layers (None where unknown; gradients are
        those of the first EDGES_SETTLE steps).
        cosine_matrix, mixing: kind -> [L, L].
        """
        result = {key: {} for key in ("rate", "gate_mean", "kept", "effective_rank",
                                      "svd_coverage", "cosine_matrix", "mixing")}
        drift, cosines, gradient_cosines = 0.0, [], []
        for graph in self.graphs:
            kind, factors = kind_of(graph.names[0]), graph.factors()
            gram = gram_matrix(list(factors.values()))                           # [L, L]
            norm = gram.diagonal().clamp_min(0).sqrt()
            cosine = gram / (norm[:, None] * norm).clamp_min(1e-30)
            drift += float((norm[1:]**2 + norm[:-1]**2 - 2 * gram.diagonal(1)).sum())
            cosines += cosine.diagonal(1).tolist()
            if graph.gradient.any():
                gradient_cosines += graph.gradient_cosine().diagonal(1).tolist()
            result["cosine_matrix"][kind], result["mixing"][kind] = cosine, graph.mixing()
            if graph.gate is not None:
                present = graph.present()
                gate = (graph.gate.mean() * present).sum((1, 2)) / present.sum((1, 2)).clamp_min(1)
                result["rate"] |= dict(zip(graph.names, graph.rates().tolist()))
                result["gate_mean"] |= dict(zip(graph.names, gate.tolist()))
            for name, (B, A) in factors.items():
                values = singular_values(B, A)
                share = values / values.sum().clamp_min(1e-30)
                result["kept"][name] = A.shape[0]
                result["effective_rank"][name] = float(
                    torch.special.entr(share).sum().exp() * (values.sum() > 0))
                energy = values.square()
                result["svd_coverage"][name] = float(
                    energy[:self.config.rank].sum() / energy.sum().clamp_min(1e-30))
        mean = lambda numbers: statistics.fmean(numbers) if numbers else None
        return result | {"drift_energy": drift, "update_cosine": mean(cosines),
                         "gradient_cosine": mean(gradient_cosines)}


def gram_matrix(factors: list) -> torch.Tensor:
    """[L, L] inner products <B_l A_l, B_j A_j> of low-rank updates, without building any [d, k]."""
    ranks = [A.shape[0] for _, A in factors]
    B, A = torch.cat([B.T for B, _ in factors]), torch.cat([A for _, A in factors])
    product = (B @ B.T) * (A @ A.T)                              # [sum R, sum R]
    rows = torch.stack([part.sum(0) for part in product.split(ranks)])
    return torch.stack([part.sum(1) for part in rows.split(ranks, 1)], 1)


def _small_svd(B: torch.Tensor, A: torch.Tensor) -> tuple:
    """SVD of B A [d, k] through two thin QR factorisations: U [d, R], S [R], V^T [R, k]."""
    (q_b, r_b), (q_a, r_a) = torch.linalg.qr(B), torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ U, S, Vh @ q_a.T


def singular_values(B: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """Singular values of B A, the largest first; none of an empty update."""
    return _small_svd(B, A)[1] if A.shape[0] else A.new_zeros(1)


def truncate(B: torch.Tensor, A: torch.Tensor, rank: int) -> tuple:
    """(B' [d, rank], A' [rank, k]), the best approximation of B A of that rank (Eckart-Young)."""
    if A.shape[0] <= rank:
        return B, A
    U, S, Vh = _small_svd(B, A)
    root = S[:rank].sqrt()
    return U[:, :rank] * root, root[:, None] * Vh[:rank]


# ---------------------------------------------------------------------------------------------
# Files


def one_line(error: BaseException | str) -> str:
    """An exception's text on one line, cut to a readable length."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."


def rename(path: str | Path, tensors: dict, table: dict) -> dict:
    """Our name -> tensor, by a table of (their name -> our name) with * for the layer's number.
    Raises InputError that names the file and the first key that is not in the table."""
    renamed = {}
    for key, tensor in tensors.items():
        number = re.search(r"(?<=[._])\d+(?=[./])", key)         # blocks.3.norm1, encoderblock_3/
        pattern = key[:number.start()] + "*" + key[number.end():] if number else key
        if pattern not in table:
            raise InputError(f"{path}: {key} is no part of the models that this script knows; this "
                             "kind is not supported")
        renamed[table[pattern].replace("*", number.group() if number else "")] = tensor
    return renamed


def refuse_safetensors(folder: Path) -> None:
    """Raises InputError that says what to do with a folder of safetensors."""
    if any(folder.glob("*.safetensors")):
        raise InputError(f"{folder}: holds safetensors only; write their tensors once with "
                         "torch.save(safetensors.torch.load_file(f), 'pytorch_model.bin'), or "
                         "-00001-of-0000N.bin if there are several")


def has_backbone(path: Path, read: Callable, recipe: Any, args: argparse.Namespace) -> bool:
    """True if `path` holds the small model that these options pretrain: read(path) says of which
    recipe it is. Raises InputError if there is none and --eval-only needs one."""
    if path.exists() and read(path).get("recipe") == recipe:
        print(f"using the backbone in {path}")
        return True
    if args.eval_only:
        raise InputError(f"--eval-only: there is no backbone of these options in {path}")
    return False


@contextlib.contextmanager
def writing(path: str | Path):
    """Around what writes `path`: OSError that names it, which that of a full disk does not."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path}: not written: {error.strerror or error}") from None
    except RuntimeError as error:            # torch.save reports a full disk this way
        raise OSError(f"{path}: not written; is the disk full? ({one_line(error)})") from None


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """write(temporary name), then rename: a reader sees the whole file or none of it."""
    temporary = Path(f"{path}.tmp{os.getpid()}")
    try:
        with writing(path):
            write(temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` as indented JSON, whole or not at all."""
    write_atomically(path, lambda t: t.write_text(json.dumps(value, indent=2) + "\n"))


def read_torch(path: str | Path) -> Any:
    """torch.load with weights_only=True, memory-mapped where the format allows (zip; files older
    than torch 1.6 are not). Raises InputError that names the file and what to do."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with open(path, "rb") as file:
        head = file.read(16)
    if path.suffix == ".safetensors" or head[8:10] == b'{"':
        raise InputError(f"{path}: a safetensors file; save its tensors with torch.save first")
    try:
        mapped = {"mmap": True} if head[:4] == b"PK\x03\x04" else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")      # about the pickle's age: not the user's business
            return torch.load(path, map_location="cpu", weights_only=True, **mapped)
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error):
            raise InputError(f"{path}: holds more than tensors and was refused; nothing in it was "
                             f"run ({one_line(str(error).rpartition('error: ')[2])})") from None
        raise InputError(f"{path}: truncated, or not a file of torch.save") from None
    except (RuntimeError, EOFError, KeyError, ValueError, AttributeError, TypeError, IndexError,
            OverflowError, UnicodeDecodeError, AssertionError, MemoryError, OSError) as error:
        raise InputError(f"{path}: truncated, or not a file of torch.save "
                         f"({type(error).__name__}); fetch it again") from None


def read_json(path: str | Path, kind: type = dict) -> Any:
    """Reads a JSON object, or any value with kind=object; raises InputError that names the file."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({one_line(error)})") from None
    if not isinstance(value, kind):
        raise InputError(f"{path}: not a JSON object")
    return value


def check_finite(path: str | Path, tensors: dict[str, torch.Tensor]) -> None:
    """Raises InputError that names the first tensor with NaN or infinite entries."""
    for name, tensor in tensors.items():
        # One pass without temporaries; isfinite() takes 20 times as long. NaN spreads to both.
        extremes = tensor.aminmax() if tensor.is_floating_point() and tensor.numel() else ()
        if not all(extreme.isfinite() for extreme in extremes):
            raise InputError(f"{path}: {name} has NaN or infinite entries; the file is damaged")


# ---------------------------------------------------------------------------------------------
# Training loop, shared by the scripts


class Task(NamedTuple):
    """What a script hands to train()."""
    batch: Callable[[int], Any]                    # micro-batch number -> batch on the device, or
                                                   # this rank's share of it (see divided)
    loss: Callable[[nn.Module, Any], torch.Tensor]           # mean task loss of a batch, a scalar
    evaluate: Callable[[nn.Module], dict]          # scores on the test set; "loss" among them
    num_examples: int                              # N of Eq. 4
    score: str = "accuracy"                        # which of the scores the table shows
    size: Callable[[Any], int] = lambda batch: 1   # how many labels the loss is the mean of


class OneLineParser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message):
        """Raises `message`, without the usage text, for run() to print."""
        raise InputError(message)


def positive(kind: type) -> Callable[[str], Any]:
    """An argparse type: a finite number above zero."""
    def parse(text):
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not a positive number")
        return value
    parse.__name__ = f"positive {kind.__name__}"             # argparse puts it into its message
    return parse


def make_parser(description: str, **defaults) -> OneLineParser:
    """The options that the three scripts share; `defaults` are the script's own."""
    p = OneLineParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                      allow_abbrev=False)
    p.add_argument("--checkpoint", help="pretrained weights; without, a small model is pretrained")
    p.add_argument("--data", help="data to adapt to; without it the embedded demo")
    p.add_argument("--method", choices=["structlora", "lora"], help="default: structlora; without "
                   "--checkpoint, LoRA, LoRA of the matched merged rank and StructLoRA in turn")
    p.add_argument("--rank", type=positive(int), help="r, directions per layer")
    p.add_argument("--alpha", type=positive(float), help="updates are scaled by alpha / rank "
                   "(default: 2 rank)")
    p.add_argument("--dropout", type=float, default=0.0, help="on the input of the updates")
    p.add_argument("--targets", default="q_proj,v_proj", help="linear layers to adapt, by name")
    p.add_argument("--gate", default="gaussian", choices=["gaussian", "concrete", "none"])
    p.add_argument("--no-gate", dest="gate", action="store_const", const="none")
    p.add_argument("--beta", type=float, default=Config.beta, help="weight of the rate (Eq. 4)")
    p.add_argument("--coordinator", default="attention", choices=["attention", "uniform", "none"])
    p.add_argument("--no-coordinator", dest="coordinator", action="store_const", const="none")
    p.add_argument("--edges", default="hybrid",
                   choices=["hybrid", "depth", "similarity", "random"])
    p.add_argument("--hops", type=int, default=1, choices=[1, 2, 3])
    p.add_argument("--budget", type=positive(float), help="mean merged rank per layer to prune to")
    amount = p.add_mutually_exclusive_group()
    amount.add_argument("--shots", type=positive(int), help="labelled examples (per class) to use")
    amount.add_argument("--fraction", type=positive(float), help="share of the examples to use")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--steps", type=positive(int), help="optimizer steps")
    p.add_argument("--lr", type=positive(float), help="peak learning rate (default: tuned for "
                   "each method, but not with --checkpoint)")
    p.add_argument("--gate-lr", type=positive(float), help="of the gates (0.01; 0.05 if --budget)")
    p.add_argument("--weight-decay", type=float, default=0.01)
    p.add_argument("--batch-size", type=positive(int))
    p.add_argument("--accumulate", type=positive(int), default=1, help="micro-batches per step")
    p.add_argument("--save-every", type=positive(int), default=100, help="steps between saves")
    p.add_argument("--out", help="folder for everything that is written")
    p.add_argument("--resume", action="store_true", help="continue the run in --out")
    p.add_argument("--eval-only", action="store_true", help="score the checkpoint, with the "
                   "adapter in --out if there is one; nothing is trained or written")
    p.add_argument("--merge", action="store_true", help="write OUT/merged.pt, the merged weights")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], help="of frozen weights and matmuls "
                   "(default: bfloat16 on a GPU, else float32)")
    p.set_defaults(**defaults)
    return p


def check_options(args: argparse.Namespace) -> None:
    """Fills in what depends on other options; raises InputError that names the option."""
    if args.fraction and args.fraction > 1:
        raise InputError(f"--fraction {args.fraction}: must be in (0, 1]")
    if args.checkpoint and not args.data:
        raise InputError("--checkpoint needs --data to adapt to")
    if not 0 <= args.seed < 2 ** 31:
        raise InputError(f"--seed {args.seed}: must be in [0, 2^31)")
    if not 0 <= args.weight_decay < 1:
        raise InputError(f"--weight-decay {args.weight_decay}: must be in [0, 1)")
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {args.device}: {one_line(error)}") from None
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    for method in ("lora", "structlora"):
        make_config(args, method).check()
    if args.resume and not Path(args.out).is_dir():
        raise InputError(f"--resume: there is no run in {args.out}")
    join_processes(args)


def make_config(args: argparse.Namespace, method: str, rank: int | None = None) -> Config:
    """The Config that the options describe; `rank` overrides --rank at the same alpha / rank."""
    rank = rank or args.rank
    scale = (args.alpha or 2 * args.rank) / args.rank
    shared = dict(rank=rank, alpha=scale * rank, dropout=args.dropout, targets=args.targets)
    if method == "lora":
        return Config(**shared, gate="none", coordinator="none", edges="depth")
    return Config(**shared, gate=args.gate, beta=args.beta, coordinator=args.coordinator,
                  edges=args.edges, hops=args.hops, budget=args.budget)


def autocast(args: argparse.Namespace):
    """bf16 matmuls if --dtype says so; the adapters and the loss stay in fp32."""
    if args.dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(args.device).type, torch.bfloat16)


def learning_rate(step: int, steps: int) -> float:
    """Factor on the peak rate: linear warmup over the first 6% of the steps, then cosine to 0."""
    warmup = max(1, round(0.06 * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@functools.lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def batch_indices(count: int, size: int, number: int, seed: int) -> torch.Tensor:
    """Indices [size] of batch `number` in an endless run of reshuffled epochs of `count` examples.

    A pure function of its arguments, so a resumed run sees the batches it would have seen."""
    positions = torch.arange(number * size, (number + 1) * size)
    epochs = positions // count
    return torch.cat([_permutation(count, seed, int(e))[positions[epochs == e] % count]
                      for e in epochs.unique()])


def choose(labels: torch.Tensor, shots: int | None, fraction: float | None,
           seed: int) -> torch.Tensor:
    """Indices of `shots` examples of each class, or of a `fraction` of each; all without either."""
    generator, chosen = torch.Generator().manual_seed(seed), []
    for label in labels.unique():
        mine = (labels == label).nonzero()[:, 0]
        count = shots or max(1, round((fraction or 1.0) * len(mine)))
        if count > len(mine):
            print(f"class {int(label)} has {len(mine)} examples, fewer than --shots {count}: "
                  "all are used")
        chosen.append(mine[torch.randperm(len(mine), generator=generator)[:count]])
    return torch.cat(chosen).sort().values


def pretrain(model: nn.Module, task: Task, args: argparse.Namespace, steps: int, lr: float) -> None:
    """Trains all of a small model for the demos; one line at the end says how it went. Of several
    processes each does the whole of it, to the same weights."""
    from tqdm import tqdm
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    model.train()
    for step in tqdm(range(steps), "pretraining", disable=rank() > 0 or None, leave=False):
        optimizer.param_groups[0]["lr"] = lr * learning_rate(step, steps)
        with autocast(args):
            loss = task.loss(model, task.batch(step))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    scores = evaluate(model, task, args)
    print(f"pretrained for {steps} steps: "
          + ", ".join(f"{key} {value:.4g}" for key, value in scores.items()), flush=True)


def evaluate(model: nn.Module, task: Task, args: argparse.Namespace) -> dict:
    """task.evaluate in eval mode, without gradients; the mode is put back."""
    training = model.training
    model.eval()
    with torch.no_grad(), autocast(args):
        scores = task.evaluate(model)
    model.train(training)
    return scores


# What may differ between a run and its resumption; everything else in config.json must not.
TRANSIENT = ("resume", "save_every", "eval_only", "out", "device", "merge")


def open_run(out: str | Path, args: argparse.Namespace) -> None:
    """Makes the folder, locks it and writes config.json, or checks that --resume continues the
    same run. Raises InputError rather than overwrite a run that has not written its summary.json,
    or if another process is writing here. Nothing is done for --eval-only."""
    if not args.eval_only:
        on_rank_zero(_open_run, Path(out), args)


def _open_run(out: Path, args: argparse.Namespace) -> None:
    path, summary = out / "config.json", out / "summary.json"
    options = dict(sorted((vars(args) | {"processes": processes()}).items()))
    out.mkdir(parents=True, exist_ok=True)
    lock(out)
    for left in out.glob("**/*.tmp[0-9]*"):      # by a process that was killed while it wrote
        left.unlink()
    if args.resume and path.exists():
        before = read_json(path)
        changed = [key for key in options | before if key not in TRANSIENT
                   and before.get(key) != options.get(key)]
        if changed:
            raise InputError(f"{path}: the run had {changed[0]}={before.get(changed[0])!r}, "
                             f"--resume asks for {options.get(changed[0])!r}")
        return
    if not summary.exists() and any(out.glob("**/adapter.pt")) and not args.resume:
        raise InputError(f"{out} holds an unfinished run: continue it with --resume, remove it, or "
                         "name another --out")
    summary.unlink(missing_ok=True)
    write_json(path, options)


def lock(folder: Path) -> None:
    """Raises InputError if another process has locked `folder`. The kernel takes the lock from a
    process when it ends, however it ends, so a kill -9 leaves nothing to clean up."""
    try:
        import fcntl
    except ImportError:                          # Windows has no such locks
        return
    held = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)      # closing it would end the lock
    try:
        fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise InputError(f"{folder}: another run is writing here; wait for its end, or name "
                         "another --out") from None


def save_checkpoint(path: Path, adapters: StructLoRA, optimizer, extra: dict) -> None:
    """adapter.pt: what StructLoRA.save writes, plus what resuming exactly needs: the optimizer's
    state and the random state of every rank. Rank 0 writes, the others wait for it."""
    device = next(adapters.model.parameters()).device
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    random = gather((torch.get_rng_state(), cuda))
    state = adapters.state() | extra | {"optimizer": optimizer.state_dict()["state"],
                                        "random": random}
    on_rank_zero(write_atomically, path, lambda temporary: torch.save(state, temporary))


def load_checkpoint(path: Path, adapters: StructLoRA, optimizer, extra: dict) -> dict:
    """Puts save_checkpoint's state back; returns the file's values of `extra`. Raises InputError
    that names the file, and what does not fit."""
    state = read_torch(path)
    if not isinstance(state, dict) or "optimizer" not in state:
        raise InputError(f"{path}: not the checkpoint of a run")
    mine = dataclasses.asdict(adapters.config)
    for field, value in (state["config"] if isinstance(state.get("config"), dict) else {}).items():
        if repr(mine.get(field, value)) != repr(value):
            raise InputError(f"{path}: is of a run with {field}={one_line(repr(value))}, this one "
                             f"has {mine[field]!r}")
    adapters.load_state(state, str(path))
    groups = optimizer.state_dict()["param_groups"]
    trainable = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        for number, values in state["optimizer"].items():
            values = {name: values[name] for name in ("step", "exp_avg", "exp_avg_sq")}
            check_finite(path, values)
            if any(v.shape not in (trainable[number].shape, ()) or not v.is_floating_point()
                   for v in values.values()):
                raise ValueError(f"the optimizer's state of tensor {number} is of another kind")
        optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
        cpu, cuda = state["random"][rank()]
        torch.set_rng_state(cpu)
        if cuda is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(cuda, trainable[0].device)
        return {key: type(value)(state[key]) if value is not None else state[key]
                for key, value in extra.items()}
    except (KeyError, IndexError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: damaged: {one_line(error)}") from None


@contextlib.contextmanager
def stop_requests():
    """Yields a list that Ctrl-C or SIGTERM fills, so that the step under way is finished and the
    state saved is one that an uninterrupted run also had. Another one, a second or more later,
    stops at once; not sooner, as torchrun repeats what the terminal has sent already."""
    asked, before = [], {}

    def ask(number, frame):
        asked.append(time.monotonic())
        if asked[-1] - asked[0] > 1:
            raise KeyboardInterrupt("stopped at once; --resume goes on from the last save")

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, ask)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def open_metrics(path: Path, start: int) -> Callable:
    """Returns write(**values), which appends a line to metrics.jsonl, on rank 0. Lines past the
    step that a run resumes from are dropped first, and so is one that a kill cut short."""
    if rank():
        return lambda **values: None
    def step(line: str) -> float:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            return math.inf if "final" in entry else entry["step"]
        return math.inf

    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text().splitlines(keepends=True) if start and path.exists() else []
    kept = "".join(line for line in lines if step(line) <= start)
    write_atomically(path, lambda temporary: temporary.write_text(kept))

    def write(**values) -> None:
        with writing(path), open(path, "a") as file:
            file.write(json.dumps(values) + "\n")
    return write


def training_step(model, adapters, task: Task, args, optimizer, step: int,
                  asked: list = ()) -> tuple[float, float, bool]:
    """One optimizer step over args.accumulate micro-batches -> (task loss, gradient norm, whether
    to stop: some rank was `asked` to). The loss is the mean over the labels of all of them."""
    for group in optimizer.param_groups:
        peak = group.setdefault("peak", group["lr"])
        group["lr"] = peak * learning_rate(step, args.steps)
    optimizer.zero_grad()
    first = step * args.accumulate
    batches = [task.batch(number) for number in range(first, first + args.accumulate)]
    sizes = [task.size(batch) for batch in batches]
    if not sum(sizes):
        raise InputError(f"step {step + 1}: nothing in the batch has a label to learn from")
    total = 0.0
    for batch, weight in ((b, size / sum(sizes)) for b, size in zip(batches, sizes) if size):
        with autocast(args):
            loss = task.loss(model, batch)
        total += weight * loss.item()
        (weight * (loss + adapters.penalty(task.num_examples))).backward()       # Eq. 4
    trainable = [p for group in optimizer.param_groups for p in group["params"]]
    total, stop = average(trainable, adapters, total, sum(sizes), bool(asked))
    norm = float(nn.utils.clip_grad_norm_(trainable, 1.0))
    if not (math.isfinite(total) and math.isfinite(norm)):
        raise FloatingPointError(f"loss {total:.4g}, gradient norm {norm:.4g} at step {step + 1}")
    adapters.observe_gradients()
    optimizer.step()
    adapters.prune((step + 1) / args.steps)
    return total, norm, stop


def train(model: nn.Module, adapters: StructLoRA, task: Task, args: argparse.Namespace,
          out: str | Path, name: str) -> dict:
    """Fine-tunes, writes metrics.jsonl, adapter.pt and adapter_peft/ under `out`, and returns the
    row of the summary table.

    AdamW (0.9, 0.999), warmup and cosine, gradients clipped to norm 1. A loss that is not finite
    raises InputError with the last good state kept in adapter.pt; Ctrl-C and SIGTERM save and
    raise KeyboardInterrupt. With args.resume it goes on from adapter.pt, to the same numbers.
    """
    out, path = Path(out), Path(out) / "adapter.pt"
    optimizer = torch.optim.AdamW(adapters.param_groups(args.lr, args.gate_lr, args.weight_decay),
                                  betas=(0.9, 0.999))
    extra = {"step": 0, "ms_per_step": 0.0, "before": None}
    if args.resume and path.exists():
        extra = load_checkpoint(path, adapters, optimizer, extra)
    write, times, start = open_metrics(out / "metrics.jsonl", extra["step"]), [], extra["step"]
    if extra["before"] is None:
        extra["before"] = evaluate(model, task, args)
        write(step=0, **extra["before"])
    reset_peak_memory(args.device)
    save = lambda: save_checkpoint(path, adapters, optimizer, extra)
    model.train()
    from tqdm import tqdm
    with stop_requests() as asked:
        for step in tqdm(range(start, args.steps), name, initial=start, total=args.steps,
                         disable=rank() > 0 or None, leave=False):
            began = time.perf_counter()
            try:
                loss, norm, stop = training_step(model, adapters, task, args, optimizer, step,
                                                 asked)
            except FloatingPointError as error:
                save()
                raise InputError(f"{name}: {error}; lower --lr. The state before it is in {path}, "
                                 f"{extra['step']} steps in") from None
            times.append(1e3 * (time.perf_counter() - began))
            extra |= {"step": step + 1, "ms_per_step": statistics.median(times[-500:])}
            write(step=step + 1, loss=loss, gradient_norm=norm,
                  lr=optimizer.param_groups[0]["lr"])
            if (step + 1) % args.save_every == 0 or step + 1 == args.steps or stop:
                save()
            if stop:
                raise KeyboardInterrupt(f"{name}: stopped after step {step + 1} of {args.steps}, "
                                        f"saved in {path}; add --resume to go on")
    after = evaluate(model, task, args)
    row = summary_row(name, adapters, task, extra, after, args)
    write(step=args.steps, final=True, **after)
    on_rank_zero(adapters.export_peft, out / "adapter_peft", base=args.checkpoint)
    return row


def summary_row(name: str, adapters: StructLoRA, task: Task, extra: dict, after: dict,
                args: argparse.Namespace) -> dict:
    """One line of the table; merged rank and kept directions are means over the adapted layers."""
    d = adapters.diagnostics()
    candidates = sum(int(g.valid.sum()) * g.config.rank for g in adapters.graphs)
    percent = lambda value: f"{100 * value:.1f}" if task.score == "accuracy" else f"{value:.3f}"
    show = lambda value, form: "-" if value is None else format(value, form)
    trainable = sum(p.numel() for p in adapters.model.parameters() if p.requires_grad)
    return {"method": name, "trainable": f"{trainable:,}",
            "merged rank": f"{statistics.fmean(d['kept'].values()):.1f}",
            f"{task.score} before": percent(extra["before"][task.score]),
            "after": percent(after[task.score]), "test loss": f"{after['loss']:.3f}",
            "rate (nats)": show(sum(d["rate"].values()) if d["rate"] else None, ".1f"),
            "kept": f"{sum(d['kept'].values())}/{candidates}",
            "drift energy": f"{d['drift_energy']:.3g}",
            "adjacent cosine": show(d["update_cosine"], ".3f"),
            "ms/step": f"{extra['ms_per_step']:.1f}",
            "peak memory": f"{peak_memory(args.device) / 2**20:.0f} MiB"}


def fine_tune(args: argparse.Namespace, config: Config, name: str, out: Path,
              load: Callable[[], nn.Module], task: Task, save: Callable, also_train: tuple) -> dict:
    """One run: load, attach, train, and with --merge write merged.pt -> row of the table.

    The frozen weights are cast to --dtype, what is trained stays in fp32; merging starts again
    from the checkpoint's own precision."""
    torch.manual_seed(args.seed)
    model = load().to(args.device, getattr(torch, args.dtype))
    if args.eval_only:
        if (out / "adapter.pt").exists():
            StructLoRA.load(model, out / "adapter.pt")
        scores = evaluate(model, task, args)
        return {"method": name if (out / "adapter.pt").exists() else "frozen"} | {
            key: f"{value:.4f}" for key, value in scores.items()}
    adapters = attach(model, config)
    for part in also_train:
        model.get_submodule(part).float().requires_grad_(True)
    # Every method starts with the same augmentations; every rank has noise of its own.
    torch.manual_seed(args.seed + 1 + 1_000_003 * rank())
    row = train(model, adapters, task, args, out, name)
    if args.merge:
        on_rank_zero(lambda: save(StructLoRA.load(load(), out / "adapter.pt").merge(),
                                  out / "merged.pt"))
    return row


def compare(args: argparse.Namespace, load: Callable[[], nn.Module], task: Task, save: Callable,
            learning_rates: dict, also_train: tuple = ()) -> None:
    """Runs --method, or LoRA, StructLoRA and LoRA of StructLoRA's merged rank in turn; prints the
    table and writes summary.json.

    load() -> the pretrained model on the CPU; save(model, path) writes merged weights; also_train
    names modules trained beside the adapters; learning_rates: the default of --lr for "lora",
    "lora matched" and "structlora" on the small models, and for every method on a "checkpoint"."""
    out = Path(args.out)

    def one(method: str, rank: int, label: str, folder: Path) -> dict:
        rate = args.lr or learning_rates["checkpoint" if args.checkpoint else method]
        mine = argparse.Namespace(**vars(args) | {"lr": rate})
        config = make_config(args, method.split()[0], rank)
        return fine_tune(mine, config, label, folder, load, task, save, also_train)

    if args.method or args.checkpoint:
        method = args.method or "structlora"
        rows = [one(method, args.rank, f"{method} r={args.rank}", out)]
    else:
        rows = [one("lora", args.rank, f"LoRA r={args.rank}", out / "lora"),
                one("structlora", args.rank, f"StructLoRA r={args.rank}", out / "structlora")]
        if not args.eval_only:
            matched = max(1, round(float(rows[1]["merged rank"])))
            rows.insert(1, one("lora matched", matched, f"LoRA r={matched} (matched)",
                               out / "lora_matched"))
    print_table(rows)
    if not args.eval_only:
        on_rank_zero(write_json, out / "summary.json", rows)


def print_table(rows: list[dict]) -> None:
    """The rows as a table with right-aligned columns; it is also valid Markdown."""
    columns = list(rows[0])
    widths = [max(2, len(column), *(len(row[column]) for row in rows)) for column in columns]
    line = lambda cells: "| " + " | ".join(c.rjust(w) for c, w in zip(cells, widths)) + " |"
    print(line(columns), line(["-" * (w - 1) + ":" for w in widths]), sep="\n")
    print("\n".join(line(row.values()) for row in rows), flush=True)


def reset_peak_memory(device: str) -> None:
    """Starts peak_memory() anew; on a CPU only where Linux allows it."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: str) -> int:
    """Bytes: allocated on the GPU, or resident in this process, at the most since the reset."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return 1024 * int(line.split()[1])
    import resource                          # not on Windows
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run(main: Callable[[], None]) -> int:
    """Calls main(); a user's error becomes one line on stderr and status 2, Ctrl-C and SIGTERM
    status 130. What goes wrong on all ranks alike is said by rank 0 alone."""
    name, others = Path(sys.argv[0]).name, os.environ.get("RANK", "0") != "0"
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
        return 0
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not known and "can't allocate memory" not in str(error):        # torch's words on a CPU
            raise
        message = ("out of memory: lower --batch-size and raise --accumulate; for text, lower "
                   f"--max-length or add --gradient-checkpointing ({error})")
    except (InputError, OSError) as error:
        message = error
    except KeyboardInterrupt as error:
        if not others:
            print(f"\n{name}: {one_line(error) or 'interrupted'}", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
        if dist.is_initialized():
            dist.destroy_process_group()
    if others and not isinstance(message, ConnectionError):
        time.sleep(2)                        # in which torchrun ends it, if rank 0 has failed too
    print(f"{name}: error: {one_line(message)}", file=sys.stderr)
    return 2


# --- several processes: torchrun --nproc-per-node=N train_X.py ... Every rank holds the whole model
# and takes every N-th example of a batch N times as large; only what is trained is exchanged.


def rank() -> int:
    """Number of this process, 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    """How many processes train together, 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def join_processes(args: argparse.Namespace) -> None:
    """Joins the processes that torchrun started, and a GPU of its own; only rank 0 prints."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    cuda = args.device.startswith("cuda")
    if cuda:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    dist.init_process_group("nccl" if cuda else "gloo")
    if rank():
        sys.stdout = open(os.devnull, "w")


@contextlib.contextmanager
def contact():
    """Around what needs all ranks: ConnectionError, one line, if one of them has died."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(f"rank {rank()} of {processes()} stops, as another one has ended; "
                              f"--resume goes on from the last save ({one_line(error)})") from None


def gather(value: Any) -> list:
    """`value` of every rank, in their order, on every rank; also a point where all meet."""
    values = [value] * processes()
    if len(values) > 1:
        with contact():
            dist.all_gather_object(values, value)
    return values


def on_rank_zero(function: Callable, *arguments, **options) -> None:
    """Rank 0 calls it while the others wait; an error of user or disk is everybody's."""
    error = None
    try:
        if rank() == 0:
            function(*arguments, **options)
    except (InputError, OSError) as caught:
        error = caught
    if error := gather(error)[0]:
        raise error


def global_batch(args: argparse.Namespace) -> tuple[int, slice]:
    """(examples in a batch of all ranks together, which of them are this rank's)."""
    return args.batch_size * processes(), slice(rank(), None, processes())


def divided(function: Callable, batches: list) -> list:
    """[function(batch) for batch in batches], the batches dealt out to the ranks in turn."""
    parts = gather([function(batch) for batch in batches[rank()::processes()]])
    return [parts[i % len(parts)][i // len(parts)] for i in range(len(batches))]


def average(tensors: list, adapters: StructLoRA, loss: float, size: int, stop: bool) -> tuple:
    """Means over the ranks, weighted by how many labels each had, of the gradients of `tensors` and
    of the sketches that the coordinator watches (in place) and of `loss`, by one all-reduce of one
    flat tensor; with it goes whether any rank is to `stop`. Returns (loss, stop)."""
    if not dist.is_initialized():
        return loss, stop
    for tensor in tensors:                   # the projector has none on a rank without a picture
        tensor.grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
    parts = [t.grad for t in tensors] + [g.gradient_sum for g in adapters.graphs if g.watches]
    parts.append(parts[0].new_tensor([loss, stop, 1.0]))
    flat = size * torch.cat([part.flatten() for part in parts])
    with contact():
        dist.all_reduce(flat)                # the last entry is now the number of all labels
    for part, total in zip(parts, flat.split([part.numel() for part in parts])):
        part.copy_(total.view_as(part) / flat[-1])
    return float(parts[-1][0]), bool(parts[-1][1] > 0)
