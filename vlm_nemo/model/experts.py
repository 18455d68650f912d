"""Mixture of experts: megatron-core's MoELayer with the all-gather dispatcher, our router, and names without a layout.

The experts of a layer are spread whole over `parallel.expert` ranks, which lie side by side among tensor x context x
data ranks; with 1, each is cut over the tensor ranks as an MLP is. Every rank hands its tokens to all ranks of its
group, each of these computes what its experts are to give, and a reduce-scatter sums it where the tokens came from. So
all ranks run the same collectives of the same sizes, whatever goes where, and no token is dropped.

Two ranks, four experts, one token each that goes to two of them:

    rank 0   experts 0 1   token a -> 0 3        gather: a b        gives 0(a)            sum: 0(a) + 3(a)
    rank 1   experts 2 3   token b -> 2 3        on both ranks      gives 3(a), 2(b) 3(b)      2(b) + 3(b)
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    checkpoint,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    get_default_pg_collection,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from vlm_nemo.model.balance import Balance, balance_losses, counted
from vlm_nemo.model.config import LanguageConfig
from vlm_nemo.model.transformer import mlp_spec
from vlm_nemo.runtime.config import ParallelConfig


def experts_config(cfg: LanguageConfig, parallel: ParallelConfig) -> dict[str, Any]:
    """What megatron's config of the decoder says about experts; nothing of a dense one."""
    moe = cfg.moe
    if moe.experts is None:
        return {}
    return dict(
        num_moe_experts=moe.experts,
        moe_router_topk=moe.top_k,
        moe_router_pre_softmax=not moe.norm_top_k,
        moe_ffn_hidden_size=moe.ffn_hidden_size or cfg.ffn_hidden_size,
        moe_shared_expert_intermediate_size=moe.shared_ffn_hidden_size,
        moe_shared_expert_gate=moe.shared_gate,
        moe_layer_freq=[int(moe.sparse(n)) for n in range(cfg.num_layers)],
        moe_aux_loss_coeff=moe.aux_loss,
        moe_z_loss_coeff=moe.z_loss,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
    )


class Router(TopKRouter):
    """Scores in fp32, softmax over the chosen experts or over all (`norm_top_k`), and the losses of balance.py.

    A frozen router has no such loss: it could not follow it, and the projector in front of it should not.
    """

    told: Tensor | None = None
    """[2]: balance loss and z loss of what this rank saw since `take_losses`, summed over supervised tokens."""
    balance: Balance | None = None
    """Of the row that comes next, all its tokens; None: no loss is wanted."""

    def gating(self, input: Tensor) -> Tensor:  # noqa: A002  (megatron's name)
        # Each tensor rank routes other tokens. megatron sums their gradients under sequence parallelism; else we do.
        split = self.config.sequence_parallel
        weight = self.weight if split else copy_to_tensor_model_parallel_region(self.weight)
        return F.linear(input.float(), weight.float())

    def forward(self, input: Tensor, padding_mask: None = None) -> tuple[Tensor, Tensor]:  # noqa: A002
        """[t, 1, D] -> weights [t, E] float32, 0 where not chosen, and what is chosen [t, E] bool."""
        logits = self.gating(input).view(-1, self.num_experts)
        weights, chosen = topk_routing_with_score_function(
            logits, self.topk, use_pre_softmax=self.config.moe_router_pre_softmax
        )
        # Under recomputation the first pass has no gradients: each row is counted once
        learns = self.training and torch.is_grad_enabled() and self.weight.requires_grad
        if self.balance is None or not learns:
            return weights, chosen
        balance = self.balance.moved(lambda x: self._own(x, len(logits)))
        own = len(balance.sample)  # what fills the last ranks' parts up is of no sample
        with torch.no_grad():
            counts = counted(chosen[:own], balance)
            if self.tp_cp_group.size() > 1:
                dist.all_reduce(counts, group=self.tp_cp_group)
        even, z = balance_losses(logits[:own], counts, balance)
        losses = torch.stack((even, z)).detach()
        self.told = losses if self.told is None else self.told + losses
        # The factors stay numbers of the host: as a tensor they would be copied to the device while it waits
        weighed = self.config.moe_aux_loss_coeff * even + self.config.moe_z_loss_coeff * z
        return MoEAuxLossAutoScaler.apply(weights, weighed), chosen

    def _own(self, tokens: Tensor, count: int) -> Tensor:
        """This tensor rank's part of something that there is of every token: `count`, the last ranks perhaps fewer."""
        return tokens[self.tp_group.rank() * count :][:count]


class LocalExperts(SequentialMLP):
    """The experts of this rank, one MLP each, named by their numbers in the whole layer."""

    def __init__(
        self, count: int, config: TransformerConfig, submodules: MLPSubmodules, pg_collection: ProcessGroupCollection
    ) -> None:
        own = copy.copy(config)
        own.ffn_hidden_size = config.moe_ffn_hidden_size
        own.sequence_parallel = False  # the dispatcher gathers and scatters for them
        super().__init__(count, own, submodules, pg_collection)

    def forward(self, tokens: Tensor, counts: list[int], weights: Tensor) -> tuple[Tensor, None]:
        """[n, D], the first counts[0] of them for the first expert, and so on -> the same, times weights [n]."""
        experts = list(self.local_experts)
        if isinstance(tokens, FakeTensor):  # a rehearsal on shapes: one expert needs for all of them what they all need
            experts, counts = experts[:1], [len(tokens)]
        parts = zip(experts, tokens.split(counts), weights.split(counts), strict=True)
        return torch.cat([expert(part, weight)[0] for expert, part, weight in parts]), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Every expert under a key of its own: experts.5.linear_fc1.weight."""
        found: dict[str, Any] = {}
        first = self.ep_group.rank() * self.num_local_experts
        for number, expert in enumerate(self.local_experts):
            here = f"{prefix}local_experts.{number}."
            entries = expert.sharded_state_dict(here, sharded_offsets, metadata)
            replace_prefix_for_sharding(entries, here, f"{prefix}{first + number}.")
            for entry in entries.values():
                entry.replica_id = (*entry.replica_id[:2], self.dp_group.rank())
            found |= entries
        return found


class Dispatcher(MoEAllGatherTokenDispatcher):
    """megatron's, which hands each expert its tokens in a run. How long the runs are is known on the device only, so
    every layer waits for it there: twice in a forward pass, as every way to drop no token does."""

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, list[int], Tensor]:
        """[t, D] of all ranks of the group -> (tokens of this rank's experts, how many each has, their weights)."""
        self.hidden_shape_before_permute = hidden_states.shape
        own = slice(self.local_expert_indices[0], self.local_expert_indices[-1] + 1)
        chosen: Tensor = self.routing_map
        self.local_map, weights = chosen[:, own], probs[:, own]
        if isinstance(hidden_states, FakeTensor):
            counts = even_share(len(hidden_states) * self.router_topk, self.config.num_moe_experts)[own]
            tokens = experts = torch.zeros(sum(counts), dtype=torch.int64, device=hidden_states.device)
        else:
            experts, tokens = self.local_map.t().nonzero(as_tuple=True)
            counts = self.local_map.sum(0).tolist()
        self.reversed_local_input_permutation_mapping = tokens
        self.local_probs = weights[tokens, experts]
        return hidden_states.index_select(0, tokens), counts, self.local_probs


def even_share(choices: int, experts: int) -> list[int]:
    """(7, 4) -> [2, 2, 2, 1]: what each expert gets in a rehearsal on shapes, where nothing is routed."""
    return [choices // experts + (n < choices % experts) for n in range(experts)]


class SparseMLP(MoELayer):
    """What stands in the MLP's place: a router, experts, and perhaps one expert that every token goes to."""

    def __init__(self, config: TransformerConfig, layer_number: int | None = None) -> None:
        mlp = mlp_spec()
        parts = MoESubmodules(
            router=Router,
            experts=ModuleSpec(module=LocalExperts, submodules=mlp),
            shared_experts=ModuleSpec(module=SharedExpertMLP, submodules=mlp),
        )
        groups = get_default_pg_collection()
        super().__init__(config, parts, layer_number, groups)
        selective = config.recompute_granularity == "selective"
        self.recompute = selective and "mlp" in (config.recompute_modules or [])
        self.token_dispatcher = Dispatcher(self.num_local_experts, self.local_expert_indices, config, groups)

    def forward(self, hidden_states: Tensor, padding_mask: None = None) -> tuple[Tensor, None]:
        """[T, 1, D] -> the same; under sequence parallelism this rank's part of the tokens."""
        # Another row may be on its way when this one is computed again
        compute = partial(self._compute, self.router.balance)
        if self.training and self.recompute:
            return checkpoint(compute, False, hidden_states), None
        return compute(hidden_states), None

    def _compute(self, balance: Balance | None, hidden_states: Tensor) -> Tensor:
        self.router.balance = balance
        shared = self.shared_experts_compute(hidden_states)
        length, ranks = len(hidden_states), self.attn_tp_group.size()
        alike = ranks > 1 and not self.config.sequence_parallel
        if alike:  # every tensor rank has all tokens: each routes its part, as under sequence parallelism
            hidden_states = F.pad(hidden_states, (0, 0, 0, 0, 0, -length % ranks))
            hidden_states = scatter_to_sequence_parallel_region(hidden_states)
        weights, chosen = self.route(hidden_states)
        tokens, weights = self.dispatch(*self.preprocess(hidden_states, weights, chosen))
        out, _ = self.routed_experts_compute(tokens, weights)
        out = self.postprocess(self.combine(out), None)
        if alike:
            out = gather_from_sequence_parallel_region(out, tensor_parallel_output_grad=False)[:length]
        return out if shared is None else out + shared


def sparse_layer(dense: ModuleSpec) -> ModuleSpec:
    """A decoder layer with experts in place of its MLP."""
    return replace(dense, submodules=replace(dense.submodules, mlp=SparseMLP))


def expect(layer: nn.Module, balance: Balance | None) -> None:
    """Tell a layer's router which samples the row is made of that comes next."""
    if isinstance(layer, SparseMLP):
        layer.router.balance = balance


def take_losses(chunks: Iterable[nn.Module]) -> Tensor | None:
    """[2], since the last call: balance loss and z loss of this rank's tokens and layers, summed over supervised
    tokens; None without any. Over all ranks of the job they are sums over all tokens and sparse layers."""
    routers = [m for chunk in chunks for m in chunk.modules() if isinstance(m, Router) and m.told is not None]
    told = [router.told for router in routers if router.told is not None]
    for router in routers:
        router.told = None
    return torch.stack(told).sum(0) if told else None
