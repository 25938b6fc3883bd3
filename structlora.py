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
    model = adapters.merge()                     # plain nn.Linear again: inference costs nothing

Shapes: W0 [d, k] frozen, A [r, k] uniform in +-1/sqrt(k), B [d, r] zero, s = alpha / r. Layers
l = 1..L of one kind (same dotted name once its numbers are replaced by *, same shape and device)
form one graph; kinds do not mix. The equations below are repeated where they are computed.

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
    6  dW_l = sum_j M_lj U_lj,   M = I + rho a        message passing; rho learned, starts at 1
         edges "depth"       l - 1 and l + 1
               "similarity"  argmax_j cos(g_l, g_j),  g_l = running mean of P^T (dL/dW_l) Q
               "hybrid"      both: the paper's graph
               "all"         every other layer, directions at random signs; rho starts at L - 1
    7  dW_l = [M_lj B_j diag(m_lj)]_j [A_j]_j         columns and rows stacked over the senders j: a
                                                      plain LoRA of rank <= r (1 + degree), exactly
    8  budget b: between 40% and 80% of training the directions of lowest mu^2 / sigma^2 over all
       layers of all kinds are removed on a cubic schedule until b * (number of layers) are left
    9  concrete gate: m = sigmoid((logit u + phi) / temperature), pi = sigmoid(phi),
       rate = KL(Bernoulli(pi) || Bernoulli(prior)); evaluation uses pi if pi >= 1/2 else 0

Where this departs from the paper. (a) It swaps the names A and B; ours are LoRA's and PEFT's. (b)
Its message sigma(h Theta) acts on vec(dW): Theta would have (d k)^2 entries, and nothing could be
merged exactly; we keep the linear residual part and put what is learned into the attention, which
weighs updates but sends them no gradient. (c) It leaves the noise model and N open: beta = 1, the
variational free energy, shuts messages which help when labels are few; hence 0.1. A Gaussian gate
need not lie in [0, 1]: B absorbs its scale, only mu / sigma matters. (d) Similarity edges settle
after EDGES_SETTLE steps: each new sender makes the update jump. (e) Edges "all", the default, are
ours: the directions of a kind form one dictionary, which each layer reads in its own random way.
"""

import contextlib
import dataclasses
import json
import math
import os
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any, Callable, Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F

SKETCH = 4                # P and Q have this many columns (Eq. 5)
LEAKY_SLOPE = 0.2         # of the LeakyReLU in Eq. 5, as in GAT
GRADIENT_DECAY = 0.9      # of the running mean gradients behind the similarity edges
EDGES_SETTLE = 10         # optimizer steps after which these edges stay
START = {"gaussian": {"mu": 1.0, "log_sigma": math.log(0.1)},    # of gates: 2.3 nats a direction,
         "concrete": {"phi": 3.0}, "none": {}}                   # or pi = 0.95
TEMPERATURE, PRIOR = 2 / 3, 0.1      # of the concrete gate (Eq. 9)
BETA_WARMUP = 50          # optimizer steps over which beta grows linearly to its value
PRUNE_START, PRUNE_END = 0.4, 0.8    # share of training between which the budget is reached (Eq. 8)
FORMAT = "structlora-2"   # of the files that StructLoRA.save writes


@dataclasses.dataclass(frozen=True)
class Config:
    """What to attach: by default the full method; without gate and coordinator it is LoRA."""
    rank: int = 8                    # r, directions per layer
    alpha: float = 16.0              # updates are scaled by s = alpha / rank
    dropout: float = 0.0             # on the input of the update, as in LoRA
    targets: tuple = ("q_proj", "v_proj")   # last name components of the linear layers to adapt
    gate: str = "gaussian"           # "gaussian" (Eq. 3), "concrete" (Eq. 9) or "none"
    beta: float = 0.1                # weight of the rate (Eq. 4); 1 is the variational free energy
    coordinator: str = "attention"   # "attention" (Eq. 5), "uniform" (a = 1 / degree) or "none"
    edges: str = "all"               # or "hybrid", "depth", "similarity" (Eq. 6)
    budget: float | None = None      # directions that a layer keeps in the mean (Eq. 8)

    def __post_init__(self):
        names = self.targets.split(",") if isinstance(self.targets, str) else self.targets
        object.__setattr__(self, "targets", tuple(name.strip() for name in names))
        coordinators = ("attention", "uniform", "none")
        graphs = ("all", "hybrid", "depth", "similarity")
        for field, good, rule in (
                ("rank", isinstance(self.rank, int) and self.rank >= 1, "a whole number >= 1"),
                ("alpha", 0 < self.alpha < math.inf, "positive"),
                ("dropout", 0 <= self.dropout < 1, "in [0, 1)"),
                ("targets", self.targets and all(self.targets), "names of linear layers"),
                ("gate", self.gate in START, f"one of {tuple(START)}"),
                ("beta", 0 <= self.beta < math.inf, "zero or positive"),
                ("coordinator", self.coordinator in coordinators, f"one of {coordinators}"),
                ("edges", self.edges in graphs, f"one of {graphs}"),
                ("budget", self.budget is None or self.budget > 0 and START.get(self.gate),
                 "positive, and needs a gate to rank by")):
            if not good:
                raise ValueError(f"{field}={getattr(self, field)!r}: must be {rule}")


# --- Gates, of all layers of a kind at once: parameters [L, S, r] (receivers, senders, directions)

def gate_strength(gates: dict) -> torch.Tensor:
    """What Eq. 8 ranks the directions by: mu^2 / sigma^2, or pi = sigmoid(phi) = P(m > 1/2)."""
    if "phi" in gates:
        return torch.sigmoid(gates["phi"])
    return gates["mu"].square() * torch.exp(-2 * gates["log_sigma"])


def gate_rate(gates: dict) -> torch.Tensor:
    """Nats that a direction can carry at most: Eq. 3, or KL(Bernoulli(pi) || Bernoulli(PRIOR))."""
    if "mu" in gates:
        return 0.5 * torch.log1p(gate_strength(gates))
    log_open, log_shut = F.logsigmoid(gates["phi"]), F.logsigmoid(-gates["phi"])
    return (log_open.exp() * (log_open - math.log(PRIOR))
            + log_shut.exp() * (log_shut - math.log(1 - PRIOR)))


def gate_mean(gates: dict) -> torch.Tensor:
    """The gates of evaluation, merge and export: mu or pi, but 0 below half a bit or 1/2."""
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


# --- Layer

class LoRALinear(nn.Linear):
    """A frozen linear layer and its update, Eq. 1 in the form of Eq. 7: x [N, ..., k] of N samples
    -> [N, ..., d]. It takes over the frozen weight [d, k] and bias [d] themselves, and owns A
    [r, k], B [d, r] and the gates [S, r] of the messages that it hears."""

    def __init__(self, linear: nn.Linear, config: Config, slots: int):
        d, k = linear.weight.shape
        super().__init__(k, d, linear.bias is not None, device="meta")   # takes no memory
        self.A = nn.Parameter(torch.empty(config.rank, k).uniform_(-1, 1) / math.sqrt(k))
        self.B = nn.Parameter(torch.zeros(d, config.rank))
        self.gate = nn.ParameterDict({name: torch.full((slots, config.rank), value)
                                      for name, value in START[config.gate].items()})
        self.probe = nn.Parameter(torch.zeros(SKETCH, SKETCH))   # C, see LayerGraph.stack
        self.weight, self.bias = linear.weight, linear.bias
        self.to(linear.weight.device).train(linear.training)
        self.config, self.disabled = config, 0
        self.message = None      # in a pass: (A [R, k], B [d, R], gates to draw [R] or none), Eq. 7
        self.last = None         # the last one with gradients
        self.ask = None          # LayerGraph.messages, for what is called outside a pass

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Two products of width R = r (1 + degree) beside the frozen one: nothing of size d k."""
        y = F.linear(x, self.weight, self.bias)                          # [N, ..., d]
        if self.disabled:
            return y
        A, B, gates = self.message or self.message_outside_a_pass()
        if self.config.dropout:
            x = F.dropout(x, self.config.dropout, self.training)
        u = F.linear(x.reshape(-1, A.shape[1]).to(A.dtype), A)           # [T, R], T = N * ...
        if gates:
            samples = len(x) if x.dim() > 1 else 1
            u = u.view(samples, len(u) // max(samples, 1), len(A)) * gate_draw(gates, samples)
            u = u.flatten(0, 1)
        u, B = u.to(y.dtype), B.to(y.dtype)
        # y + u B^T in one call saves a pass over the activations.
        return torch.addmm(y.reshape(-1, len(B)), u, B.T).view_as(y)

    def message_outside_a_pass(self) -> tuple:
        """The message when a part of the model is called, or when a checkpoint recomputes it."""
        if self.last and torch._C._current_graph_task_id() >= 0:         # inside backward()
            return self.last
        # A checkpoint must not record what follows: its recomputation uses `last`.
        unseen = contextlib.nullcontext()
        if torch._C._autograd._saved_tensors_hooks_is_enabled():         # not in torch.func.grad
            unseen = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
        with unseen:
            message = self.ask()[self.index]
        self.last = message if torch.is_grad_enabled() else self.last
        return message

    def __getstate__(self):
        return self.__dict__ | {"message": None, "last": None}   # autograd's cannot be copied


# --- Graph of layers: the coordinator

class LayerGraph(nn.Module):
    """The edges between the adapted layers of one kind, and the messages along them: those of all
    layers together, once per forward pass of the model, since every small operation costs.

    Every layer l has S slots for senders. hears [L, S, L] is 1 where slot s of layer l holds layer
    j: one of them the layer itself, the others its neighbours; a slot without a sender (the ends
    of the chain) is all 0. sign [L, S, r] is +-1, or 0 for directions that Eq. 8 has removed. The
    graph is a child of the model's root, and its training mode the root's."""

    def __init__(self, names: list[str], linears: list[nn.Linear], config: Config):
        super().__init__()
        self.names, self.config = names, config
        L, (d, k) = len(names), linears[0].weight.shape
        itself, slots = torch.eye(L), [torch.eye(L)]             # slot 0: the layer itself
        if L > 1 and config.coordinator != "none":
            if config.edges in ("depth", "hybrid"):
                slots += [torch.ones(L - 1).diag(-1), torch.ones(L - 1).diag(1)]         # l -+ 1
            if config.edges in ("similarity", "hybrid"):
                slots.append(torch.zeros(L, L))                  # empty before the first gradient
            if config.edges == "all":
                slots = [row.expand(L, L) for row in itself]     # slot j: layer j
        hears, S = torch.stack(slots, 1), len(slots)
        self.learns_edges = S > 1 and config.edges in ("similarity", "hybrid")   # the last slot
        # A plain list: the layers are children of their blocks, not of this.
        self.layers = [LoRALinear(linear, config, S) for linear in linears]
        sign = torch.ones(L, S, config.rank)
        if S > 1:
            self.rho = nn.Parameter(torch.ones(()))
            if config.edges == "all":            # with a = 1 / (L - 1), so that |M_lj| = 1
                nn.init.constant_(self.rho, L - 1)
                random = torch.randint(0, 2, sign.shape) * 2.0 - 1
                sign = torch.where(itself[:, :, None] > 0, sign, random)
            if config.coordinator == "attention":            # zero: starts as the plain average
                self.w_src = nn.Parameter(torch.zeros(SKETCH * SKETCH))
                self.w_dst = nn.Parameter(torch.zeros(SKETCH * SKETCH))
        generator = torch.Generator().manual_seed(0)             # P, Q: the same in every run
        P, Q = (torch.randn(n, SKETCH, generator=generator, device="cpu") / math.sqrt(n)
                for n in (d, k))
        for name, tensor in (("hears", hears), ("sign", sign), ("P", P), ("Q", Q),
                             ("gradient", torch.zeros(L, SKETCH, SKETCH)),       # running mean
                             ("steps", torch.zeros((), dtype=torch.long))):
            self.register_buffer(name, tensor)
        self.register_load_state_dict_post_hook(LayerGraph.settle)
        self.to(linears[0].weight.device)
        for index, layer in enumerate(self.layers):
            layer.ask, layer.index = self.messages, index

    forward = nn.Identity.forward    # a root that is an nn.Sequential calls all its children

    def messages(self) -> list[tuple]:
        """What stack() returns, layer by layer, in the dtype that they compute in."""
        device, dtype = self.P.device.type, self.layers[0].weight.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        probes = torch.is_grad_enabled() and not torch.jit.is_tracing() and bool(self.probes())
        A, B, _, gates = self.stack(dtype, self.training, probes)
        gates = list(zip(*(gate.unbind() for gate in gates))) or [()] * len(A)
        return list(zip(A.unbind(), B.unbind(), gates))

    def stack(self, dtype: torch.dtype, random: bool, probes: bool) -> tuple:
        """Eq. 7 for all layers: rows A [L, R, k]; columns B [L, d, R], times s M and, if they are
        not random, the mean gates; these weights [L, R]; what is drawn otherwise, [L, R] each."""
        with torch.autocast(self.P.device.type, enabled=False):  # mixing is computed in fp32
            A, B, gates = self.stacked()
            s, drawn = self.config.alpha / self.config.rank, []
            weight = s * self.mixing(A, B, gates)[..., None] * self.sign         # [L, S, r]
            if gates and not random:
                weight = weight * gate_mean(gates)
            elif gates:
                if "phi" in gates:
                    drawn = [gates["phi"]]
                else:
                    drawn = [gates["mu"], gates["log_sigma"].exp()]
                drawn = [gate.flatten(1).to(dtype) for gate in drawn]
            A, B = self.gather(A.to(dtype), B.to(dtype))
            weight = weight.flatten(1).to(dtype)                                 # [L, R = S r]
            B = B * weight[:, None]
            if probes:       # 4 more directions, y += P C Q^T x with C = 0: dL/dC = P^T (dL/dW) Q
                C = torch.stack([layer.probe for layer in self.layers])          # [L, 4, 4]
                B = torch.cat([B, (self.P @ (C - C.detach())).to(dtype)], 2)
                A = torch.cat([A, self.Q.T.to(dtype).expand(len(A), -1, -1)], 1)
                always_one = (math.inf,) if "phi" in gates else (1.0, 0.0)
                drawn = [F.pad(gate, (0, SKETCH), value=v) for gate, v in zip(drawn, always_one)]
        return A, B, weight, drawn

    def stacked(self) -> tuple[torch.Tensor, torch.Tensor, dict]:
        """A [L, r, k], B [L, d, r] and the gates' parameters, [L, S, r] each, of all layers."""
        A, B = [layer.A for layer in self.layers], [layer.B for layer in self.layers]
        gates = {name: torch.stack([layer.gate[name] for layer in self.layers])
                 for name in START[self.config.gate]}
        return torch.stack(A), torch.stack(B), gates

    def gather(self, A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows [L, R = S r, k] and columns [L, d, R] of each layer's senders (Eq. 7)."""
        L, S, _ = self.hears.shape
        if self.config.edges == "all" and S > 1:                 # one matrix, which all layers read
            A, B = A.flatten(0, 1), B.transpose(0, 1).flatten(1)             # [L r, k], [d, L r]
            return A.expand(L, -1, -1), B.expand(L, -1, -1)
        # Products with 0 and 1 are exact; the backward pass of an index would add by atomics.
        hears = self.hears.to(A.dtype)
        return (torch.einsum("lsj,jrk->lsrk", hears, A).flatten(1, 2),
                torch.einsum("lsj,jdr->ldsr", hears, B).flatten(2))

    def mixing(self, A: torch.Tensor, B: torch.Tensor, gates: dict) -> torch.Tensor:
        """M of Eq. 6 by slots [L, S]: 1 for the layer itself, rho a_lj for a neighbour."""
        itself = self.hears.diagonal(dim1=0, dim2=2).T           # [L, S], 1 at the layer itself
        if self.hears.shape[1] == 1:
            return itself
        edge = self.hears.sum(2) - itself                        # [L, S], 1 at its neighbours
        e = torch.zeros_like(edge)
        if self.config.coordinator == "attention":               # Eq. 5
            with torch.no_grad():
                own = self.sign * gate_mean(gates) if gates else self.sign
                own = (own * itself[..., None]).sum(1, keepdim=True)             # [L, 1, r]
                h = (self.P.T @ B * own) @ (A @ self.Q)                          # [L, 4, 4]
                h = F.normalize(h.flatten(1), dim=1)                             # [L, 16]
            e = (h @ self.w_src)[:, None] + self.hears @ (h @ self.w_dst)
            e = F.leaky_relu(e, LEAKY_SLOPE)
        lowest = torch.finfo(e.dtype).min
        a = e.masked_fill(edge == 0, lowest).softmax(1) * edge   # rows without an edge become 0
        return itself + self.rho * a

    def probes(self) -> list[nn.Parameter]:
        """The C that still ask for a gradient. One that gets none has no part in the loss."""
        return [layer.probe for layer in self.layers if layer.probe.requires_grad]

    @torch.no_grad()
    def observe(self) -> None:
        """Counts a step; in the first ones moves the running mean gradient and the edges by it."""
        self.steps += 1
        if self.probes():
            sketches = torch.stack([torch.zeros_like(layer.probe) if layer.probe.grad is None
                                    else layer.probe.grad for layer in self.layers])
            # Not a GradScaler's infinite gradients, and not once directions were chosen (Eq. 8).
            if sketches.isfinite().all() and self.sign.all():
                self.gradient.lerp_(sketches, 1 - GRADIENT_DECAY)
                if self.learns_edges:
                    self.hears[:, -1] = self.most_similar()
            self.settle()

    def settle(self, *_) -> None:
        """Clears the probes, and lets them rest when they have told enough; also after loading."""
        asks = bool(self.steps < (EDGES_SETTLE if self.learns_edges else 1))
        for layer in self.layers:
            layer.probe.grad = None
            layer.probe.requires_grad_(asks and layer.A.requires_grad)

    def gradient_cosine(self) -> torch.Tensor:
        """[L, L] cosine between the layers' running mean gradients dL/dW (of their sketches)."""
        g = F.normalize(self.gradient.flatten(1), dim=1)
        return g @ g.T

    def most_similar(self) -> torch.Tensor:
        """[L, L], 1 at the layer of the most similar gradient that is no neighbour otherwise."""
        taken = self.hears[:, :-1].sum(1) > 0
        best = self.gradient_cosine().masked_fill(taken, -2.0).max(1)
        return F.one_hot(best.indices, len(taken)) * (best.values > -2.0)[:, None]

    def present(self) -> torch.Tensor:
        """[L, S, r] bool: the directions that have a sender and were not removed."""
        return self.hears.sum(2)[..., None] * self.sign != 0

    def rates(self) -> torch.Tensor:
        """R_l in nats [L] (Eq. 3)."""
        return (gate_rate(self.stacked()[2]) * self.present()).sum((1, 2))


# --- Attach

def kind_of(name: str) -> str:
    """The name with its numbers replaced by *, but for the last component, where w1 and w3 are
    different layers: "block3.layers.0.w1" -> "block*.layers.*.w1"."""
    parent, dot, last = name.rpartition(".")
    return re.sub(r"\d+", "*", parent) + dot + last


def find_targets(model: nn.Module, targets: tuple) -> dict[str, nn.Linear]:
    """name -> nn.Linear of all layers to adapt. Raises ValueError for a target without any."""
    modules, found = {name: module for name, module in model.named_modules() if name}, {}
    linears = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    for target in targets:
        matches = [name for name in modules if f".{name}".endswith(f".{target}")]
        if not linears.keys() & set(matches):
            kind = type(modules[matches[0]]).__name__ if matches else "nothing"
            there = ", ".join(sorted({kind_of(name) for name in linears})) or "none"
            raise ValueError(f"{target!r} names {kind}, no nn.Linear; the model has: {there}")
        found |= {name: linears[name] for name in matches if name in linears}
    return found


def refusal(model: nn.Module, name: str, linear: nn.Linear, rank: int) -> str | None:
    """Why this layer cannot be adapted; None if it can."""
    weight, parent = linear.weight, model.get_submodule(name.rpartition(".")[0])
    owners = [n for n, p in model.named_parameters(remove_duplicate=False) if p is weight]
    if type(weight) is not nn.Parameter or weight.is_meta or weight.dtype not in (
            torch.float32, torch.float16, torch.bfloat16, torch.float64):
        return (f"its weight, a {type(weight).__name__} of {weight.dtype} on {weight.device}, is "
                "quantised, sharded, computed or not in memory")
    if type(linear).forward is not nn.Linear.forward or "forward" in vars(linear):
        return f"{type(linear).__name__} has a forward of its own, which would be lost"
    if linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks:
        return "it has hooks, which would be lost: remove them first"
    if len(owners) > 1:
        return f"its weight is tied ({' = '.join(owners)}): merging would change both"
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        return ("nn.TransformerEncoderLayer reads its weight without calling it: call "
                "torch.backends.mha.set_fastpath_enabled(False) first")
    if rank > min(weight.shape):
        return f"rank={rank} is more than its weight {list(weight.shape)} has"
    return None


def attach(model: nn.Module, config: Config = Config()) -> "StructLoRA":
    """Freezes `model` and replaces every nn.Linear whose dotted name ends in one of config.targets.
    The output stays bit-equal until the first step. Raises ValueError, with the model untouched, if
    a target matches nothing, for layers that refusal() names, and if there are adapters already."""
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("the model has adapters already: merge() or detach() them first")
    found = find_targets(model, config.targets)
    for name, linear in found.items():
        if reason := refusal(model, name, linear, config.rank):
            raise ValueError(f"{name} cannot be adapted: {reason}")
    adapters = StructLoRA(model, config, found)
    if config.coordinator != "none" and all(len(graph.names) == 1 for graph in adapters.graphs):
        warnings.warn(f"no layer has a neighbour to share with: {', '.join(found)} are each the "
                      "only one of its kind", stacklevel=2)
    return adapters


def reading_out(method: Callable) -> Callable:
    """Decorator of what computes the final updates: no gradient, and no autocast, which rounds."""
    for device in ("cpu", "cuda"):
        method = torch.autocast(device, enabled=False)(method)
    return torch.no_grad()(method)


class StructLoRA:
    """The handle that attach() returns. All that is trained lives in the model."""

    def __init__(self, model: nn.Module, config: Config, found: dict[str, nn.Linear]):
        self.model, self.config, self.plain = model, config, found
        self.before = set(model.state_dict())                    # the names of what was there
        self.required_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        model.requires_grad_(False)
        kinds = {}
        for name in sorted(found, key=lambda n: [int(i) for i in re.findall(r"\d+", n)]):
            weight = found[name].weight
            kinds.setdefault((kind_of(name), weight.shape, weight.device), []).append(name)
        self.layers, self.graphs = {}, []                        # both empty again after merge()
        for names in kinds.values():
            graph = LayerGraph(names, [found[name] for name in names], config)
            self.graphs.append(graph)
            self.layers |= zip(names, graph.layers)
        self._place(self.layers)
        model.structlora = nn.Sequential(*self.graphs).train(model.training)
        self.hooks = [model.register_forward_pre_hook(self._hand_out),
                      model.register_forward_hook(self._take_away, always_call=True)]

    def _place(self, layers: dict[str, nn.Module]) -> None:
        for name, layer in layers.items():
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, layer)

    def _hand_out(self, *_) -> None:
        """Before each forward pass of the model: gives every layer its message."""
        for graph in self.graphs:
            for layer, message in zip(graph.layers, graph.messages()):
                layer.message = message

    def _take_away(self, *_) -> None:
        """After it, even if it failed. What a checkpoint then recomputes uses the last one."""
        remember = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        for layer in self.layers.values():
            layer.last, layer.message = layer.message if remember else layer.last, None

    def trained(self) -> dict[str, nn.Parameter]:
        """What is trained beside the adapters, by name: a new head, usually."""
        own = {p for module in (*self.graphs, *self.layers.values())
               for name, p in module.named_parameters() if name not in ("weight", "bias")}
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad and p not in own}

    def param_groups(self, lr: float, gate_lr: float | None = None,
                     weight_decay: float = 0.01) -> list[dict]:
        """Groups for torch.optim: factors, and what else you unfroze (a head), at lr with weight
        decay; the coordinator at lr; gates at gate_lr without decay, by default 0.05 with a budget,
        which ranks by the gates, and 0.01 without: faster gates saturate."""
        layers, groups = self.layers.values(), []
        factors = [p for layer in layers for p in (layer.A, layer.B)] + [*self.trained().values()]
        mixing = [p for graph in self.graphs for p in graph.parameters()]
        gates = [p for layer in layers for p in layer.gate.values()]
        if gate_lr is None:
            gate_lr = 0.05 if self.config.budget else 0.01
        for params, own_lr, decay in ((factors, lr, weight_decay), (mixing, lr, 0.0),
                                      (gates, gate_lr, 0.0)):
            if params := [p for p in params if p.requires_grad]:
                groups.append({"params": params, "lr": own_lr, "weight_decay": decay})
        return groups

    def penalty(self, num_examples: int) -> torch.Tensor:
        """beta R / num_examples (Eq. 4), a scalar to add to the mean task loss; 0 without a gate.
        num_examples: labelled training examples (predicted tokens for a language model). beta is
        warmed up over the first BETA_WARMUP optimizer steps. Raises ValueError in eval mode."""
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
        for graph in self.graphs:
            probes = graph.probes()
            if probes and graph.steps == 0 and all(probe.grad is None for probe in probes):
                names = ", ".join(graph.names)
                raise ValueError(f"no gradient reached {names}: the model does not call them (only "
                                 "reads their weights), or a gradient checkpoint needs "
                                 "use_reentrant=False, or backward() was not called")
            if graph.layers[0].A.dtype in (torch.float16, torch.bfloat16):
                warnings.warn("adapters in half precision: cast before attach()", stacklevel=2)
        for graph in self.graphs:
            graph.observe()

    @torch.no_grad()
    def prune(self, progress: float) -> None:
        """Once a step, progress in [0, 1] of training: removes directions on the cubic schedule of
        Eq. 8, the weakest of all layers of all kinds first. Does nothing without a budget."""
        if self.config.budget is None or progress < PRUNE_START:
            return
        candidates = sum(int(graph.hears.sum()) for graph in self.graphs) * self.config.rank
        target = min(candidates, max(1, round(self.config.budget * len(self.layers))))
        remaining = 1 - min(1.0, (progress - PRUNE_START) / (PRUNE_END - PRUNE_START))
        count = target + math.ceil((candidates - target) * remaining ** 3)
        strengths = []
        for graph in self.graphs:            # a strength is never negative
            strength = gate_strength(graph.stacked()[2]).float().masked_fill(~graph.present(), -1.0)
            strengths.append(strength.flatten().cpu())
        best = torch.zeros(sum(map(len, strengths)))
        best[torch.cat(strengths).topk(count).indices] = 1.0
        for graph, part in zip(self.graphs, best.split([g.sign.numel() for g in self.graphs])):
            graph.sign *= part.view_as(graph.sign).to(graph.sign)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model is the frozen one: a reference model for DPO, a baseline."""
        layers = [*self.layers.values()]
        for layer in layers:
            layer.disabled += 1              # may be nested
        try:
            yield
        finally:
            for layer in layers:
                layer.disabled -= 1

    @reading_out
    def factors(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """name -> (B [out, R], A [R, in]) in fp32: the final update is B A, s included (Eq. 7). The
        merged rank R is r (1 + degree) less the directions that are shut or removed."""
        factors = {}
        for graph in self.graphs:
            wide = torch.promote_types(graph.layers[0].A.dtype, torch.float32)
            A, B, weight, _ = graph.stack(wide, random=False, probes=False)
            for l, used in enumerate(weight != 0):
                factors[graph.names[l]] = B[l][:, used], A[l][used]
        return factors

    @reading_out
    def deltas(self) -> dict[str, torch.Tensor]:
        """name -> the final update s dW_l [out, in] in fp32."""
        return {name: B @ A for name, (B, A) in self.factors().items()}

    @reading_out
    def merge(self) -> nn.Module:
        """Adds the updates to the weights (in fp32, then cast) and removes the adapters. Returns
        the model; a second call changes nothing. Raises ValueError, with the model untouched, if a
        merged weight would not be finite."""
        merged = {}
        for name, (B, A) in self.factors().items():
            weight = self.layers[name].weight
            merged[name] = (weight + B @ A).to(weight.dtype)     # W0 + s dW, and a sum in fp32
        check_finite(merged)
        for name, weight in merged.items():
            self.layers[name].weight.copy_(weight)
        return self.detach()

    def detach(self) -> nn.Module:
        """Removes the adapters without adding them; puts nn.Linear and requires_grad back."""
        for name, layer in self.layers.items():
            plain = self.plain[name].train(layer.training)
            plain.weight, plain.bias = layer.weight, layer.bias
        if self.graphs:
            self._place(self.plain)
            del self.model.structlora
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(self.required_grad.get(name, parameter.requires_grad))
        for hook in self.hooks:
            hook.remove()
        self.layers, self.graphs = {}, []
        return self.model

    def state(self) -> dict:
        """What save() writes: plain types and tensors. Raises ValueError after merge()."""
        if not self.graphs:
            raise ValueError("there are no adapters any more: merge() or detach() was called")
        trained, state = self.trained(), self.model.state_dict()
        state = {n: t for n, t in state.items() if n in trained or n not in self.before}
        return {"format": FORMAT, "config": dataclasses.asdict(self.config), "state": state}

    def load_state(self, file: dict) -> None:
        """The reverse of state(), for a model with the same layers. Raises ValueError."""
        mine, state = self.model.state_dict(), file["state"]
        for name in mine.keys() - self.before - state.keys() | state.keys() - mine.keys():
            raise ValueError(f"does not fit the model: {name} is only in one of them")
        for name, tensor in state.items():   # all of them before any is copied
            if tensor.shape != mine[name].shape:
                raise ValueError(f"does not fit the model: {name} is {list(tensor.shape)}")
        check_finite(state)
        self.model.load_state_dict(state, strict=False)
        for name in state.keys() & self.required_grad.keys():    # a head, say
            self.model.get_parameter(name).requires_grad_(True)

    def save(self, path: str | Path) -> None:
        """Writes adapters, gates, graphs, Config and what else was trained to one file."""
        write(path, self.state())

    @staticmethod
    def load(model: nn.Module, path: str | Path) -> "StructLoRA":
        """attach() as the file says, then its state. Raises ValueError that names the file."""
        with reading(path):
            file = load_torch(path)
            if not isinstance(file, dict) or file.get("format") != FORMAT:
                raise ValueError("not a file of StructLoRA.save")
            adapters = attach(model, Config(**file["config"]))
            try:
                adapters.load_state(file)
            except Exception:
                adapters.detach()
                raise
        return adapters

    def export_peft(self, directory: str | Path, base: str | None = None,
                    rank: int | None = None) -> None:
        """Writes adapter_config.json and adapter_model.bin, which PEFT reads as a plain LoRA, with
        a trained head as modules_to_save. rank=None is exact; otherwise each update is cut to
        `rank` by SVD. Raises ValueError for what PEFT cannot carry or is not finite."""
        if rank is not None and rank < 1:
            raise ValueError(f"rank={rank}: must be at least 1")
        state, trained, tensors, ranks = self.state()["state"], self.trained(), {}, {}
        for name in trained:
            owner = name.rpartition(".")[0]  # PEFT saves this module, and all whose names end so
            taken = [n for n, _ in self.model.named_modules() if n.endswith(owner) and n != owner]
            taken += [n for n in self.layers if f"{n}.".startswith(f"{owner}.")]
            taken += [n for n, p in self.model.named_parameters(remove_duplicate=False)
                      if p is trained[name] and n != name]       # tied
            if taken:
                raise ValueError(f"PEFT cannot carry {name}, trained beside the adapters: it would "
                                 f"take {', '.join(taken[:3])} for it too; use save() or merge()")
            tensors[name] = state[name].clone()
        for name, (B, A) in self.factors().items():
            r = min(rank or len(A), len(B), A.shape[1])          # no update has more
            if r < len(A):                                       # Eckart-Young
                U, S, Vh = thin_svd(B, A)
                B, A = U[:, :r] * S[:r].sqrt(), S[:r, None].sqrt() * Vh[:r]
            if not A.shape[0]:                                   # PEFT knows no rank 0
                B, A = B.new_zeros(len(B), 1), A.new_zeros(1, A.shape[1])
            tensors[f"{name}.lora_A.weight"] = A.float()
            tensors[f"{name}.lora_B.weight"] = B.float()
            ranks[name] = A.shape[0]
        check_finite(tensors)
        largest = max(ranks.values())        # is r, because some servers check r alone
        # Patterns of how a name ends; ^ tells q_proj from encoder.q_proj.
        smaller = {"^" + re.escape(name): r for name, r in ranks.items() if r < largest}
        config = {"peft_type": "LORA", "base_model_name_or_path": base, "task_type": None,
                  "r": largest, "lora_alpha": largest,           # a scaling of 1 everywhere
                  "rank_pattern": smaller, "alpha_pattern": smaller, "target_modules": list(ranks),
                  "modules_to_save": sorted({n.rpartition(".")[0] for n in trained}) or None,
                  "bias": "none", "inference_mode": True}
        write(Path(directory, "adapter_model.bin"),
              {f"base_model.model.{name}": tensor for name, tensor in tensors.items()})
        write(Path(directory, "adapter_config.json"), json.dumps(config, indent=2))

    @reading_out
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
            parts, kind = graph.stacked(), kind_of(graph.names[0])
            gates = parts[2]
            if kind in result["mixing"]:                         # the same kind in another shape
                kind += f" {list(graph.layers[0].weight.shape)}"
            A, B, weight, _ = graph.stack(torch.float32, random=False, probes=False)
            gram = torch.stack([(b.mT @ B * (a @ A.mT)).sum((1, 2))      # <u_l, u_j>, no [d, k]
                                for a, b in zip(A, B)])                  # [L, L]
            norm = gram.diagonal().clamp_min(0).sqrt()
            cosine = gram / (norm[:, None] * norm).clamp_min(1e-30)
            drift += float((norm[1:]**2 + norm[:-1]**2 - 2 * gram.diagonal(1)).sum())
            cosines["update_cosine"] += cosine.diagonal(1).tolist()
            if graph.gradient.any():
                cosines["gradient_cosine"] += graph.gradient_cosine().diagonal(1).tolist()
            mixing = torch.einsum("ls,lsj->lj", graph.mixing(*parts), graph.hears)
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


def thin_svd(B: torch.Tensor, A: torch.Tensor) -> tuple:
    """SVD of B A through two thin QR factorisations: U [..., d, R], S [..., R], V^T [..., R, k]."""
    (q_b, r_b), (q_a, r_a) = torch.linalg.qr(B), torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    return q_b @ U, S, Vh @ q_a.mT


# --- Files

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
            temporary.write_text(value)
        else:
            torch.save(value, temporary)
    except RuntimeError as error:            # torch.save's word for a full disk
        raise OSError(f"{path}: {error}") from None
    os.replace(temporary, path)
