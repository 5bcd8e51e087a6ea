"""The engine on DeepSpeed: ZeRO 1 to 3, with or without expert parallelism.

DeepSpeed averages gradients over ranks; our objective is already divided by the counts of the whole global batch, so it
is multiplied by the world size before the backward pass.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.parameter_offload import ZeROOrderedDict
from deepspeed.utils import groups as deepspeed_groups
from deepspeed.utils import nvtx
from torch import Tensor, nn

from rxt_dist.config.run import RunConfig
from rxt_dist.engine.autoep import our_layers
from rxt_dist.engine.collectives import Collectives
from rxt_dist.engine.expert_parallel import (
    RoutedShape,
    autoep_config,
    cut,
    is_expert,
    model_name,
)
from rxt_dist.engine.inspection import first_nonfinite
from rxt_dist.engine.interface import (
    FIRST_MOMENT,
    SECOND_MOMENT,
    WEIGHT,
    Fragment,
    NonFinite,
    StepResult,
    TermTotals,
    at_once,
)
from rxt_dist.engine.optimizer import adam_state, adamw, parameter_groups, set_learning_rates
from rxt_dist.engine.replicas import bit_sum, differing_ranks
from rxt_dist.engine.routing import RoutingState
from rxt_dist.engine.sums import StepSums, evaluate_stage
from rxt_dist.engine.zero3_over_gloo import exchange_in_place
from rxt_dist.losses import StageOutput, objective
from rxt_dist.model.count import local_moe_parameters
from rxt_dist.stages.base import MicroBatch, Stage

_PREFIX = "stage.model."

# Elements that are reduced, gathered ahead, kept for a next use, or updated at once; a larger parameter goes alone.
# DeepSpeed's own values, up to 10^9, let all weights and several copies of all gradients stand beside each other.
_PORTION_ELEMENTS = 1 << 24
# What is reduced at once, or kept for a next use, on CPU: what is reduced stands there three times, and one more
# collective costs nothing.
_CPU_BUCKET_ELEMENTS = 1 << 22

# DeepSpeed asks this table which of its own C++ operators it can build, and the first look runs compilers for seconds;
# on CPU it then builds a shared-memory collective that only its inference uses (35 s, and a start without g++ fails).
# Training needs none of them.
deepspeed.ops.__compatible_ops__ = {}
# Many small functions mark each of their calls for Nsight: 4 % of the host's time in a tiny step of ZeRO-3.
nvtx.enable_nvtx = False


def _import_muon() -> None:
    """Import DeepSpeed's Muon, which it looks at in every start, without letting it ask torch for a compiler.

    The compiler's import takes a rank one to two seconds, and no run here uses Muon.
    """
    compiler = torch.compile
    torch.compile = lambda function, **_: function  # type: ignore[assignment]
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        torch.compile = compiler


_import_muon()


@contextmanager
def _parameters_unread() -> Iterator[None]:
    """ZeRO-3 makes a text of the values of all its parameters, for a line that it then does not print."""
    printed = nn.Parameter.__repr__
    nn.Parameter.__repr__ = object.__repr__  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        nn.Parameter.__repr__ = printed  # type: ignore[assignment,method-assign]


class _Wrapper(nn.Module):
    """The stage as DeepSpeed wants to see it: with a `config` that says how many experts there are."""

    def __init__(self, stage: nn.Module, shape: RoutedShape) -> None:
        super().__init__()
        self.stage = stage
        self.config = shape

    def forward(self, micro: Any, load_ME: Tensor) -> StageOutput:
        return self.stage(micro, load_ME)


class DeepSpeedEngine:
    """Trains a stage over all ranks. See `Engine`."""

    def __init__(self, stage: Stage, config: RunConfig, device: torch.device) -> None:
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self.stage = stage
        self.device = device
        self.config = config
        self.ranks = Collectives(device)
        self.expert_parallel = config.parallel.expert_parallel
        self.wrapper = _Wrapper(stage, RoutedShape.of(config.model))
        if device.type == "cpu":
            exchange_in_place(_CPU_BUCKET_ELEMENTS)
        with our_layers(), _parameters_unread():
            self.engine, self.zero, *_ = deepspeed.initialize(
                model=self.wrapper,
                optimizer=self._make_optimizer,
                # Lazily, since a list would keep the experts that AutoEP replaces.
                model_parameters=(p for p in self.wrapper.parameters() if p.requires_grad),
                config=engine_config(config, device),
                dist_init_required=False,
            )
        if config.parallel.zero == 3 and device.type == "cpu":
            self._gather_nothing_ahead()
        if config.parallel.zero == 3:
            self._keep_small_weights()
            self._call_functions_directly()
        # float32 and bfloat16 runs alike skip an update whose gradients are not finite, on all ranks.
        if config.parallel.zero < 3:
            self.zero.check_grad_overflow = True
        if config.train.precision == "float32":
            self._share_masters()
        self.routing = RoutingState.of(stage.model, config.train, device)

    def _make_optimizer(self, _: Any) -> torch.optim.Optimizer:
        """Called by DeepSpeed after AutoEP has replaced the experts; their groups must be marked for it."""
        _freeze(self.stage)
        named = [(name, p) for name, p in self.wrapper.named_parameters() if p.requires_grad]
        expert_ids = {id(p) for _, p in named if is_expert(p)}
        groups = []
        ours = [(model_name(name.removeprefix(_PREFIX)), p) for name, p in named]
        rate_group = self.config.stage.rate_group
        for group in parameter_groups(ours, self.stage.model.matrices, self.config.optimizer, rate_group):
            dense = [p for p in group["params"] if id(p) not in expert_ids]
            experts = [p for p in group["params"] if id(p) in expert_ids]
            groups += [group | {"params": portion} for portion in self._portions(dense)]
            marks = {"moe": True, "name": f"ep_size_{self.expert_parallel}"}
            groups += [group | {"params": portion} | marks for portion in self._portions(experts)]
        return adamw(groups, self.config.optimizer)

    def _gather_nothing_ahead(self) -> None:
        """DeepSpeed makes a prefetch of 0 elements one of 1 where weights are gathered one after another, and then
        each module gathers at least one parameter ahead: of experts that are one to two layers."""
        coordinator = self.zero.parameter_offload.get_param_coordinator()
        coordinator._PartitionedParameterCoordinator__prefetch_bucket_sz = 0

    def _keep_small_weights(self) -> None:
        """ZeRO-3 keeps small weights whole only in passes whose order it knows, and learns that order anew whenever a
        pass is not the last one: dialogues of more turns, an evaluation, a part that is freed. Until then every module
        would gather its own again. What DeepSpeed takes for another module's weight it lets go at no module."""
        for parameter in self.zero.persistent_parameters:
            parameter.is_external_param = True

    def _call_functions_directly(self) -> None:
        """ZeRO-3 puts two functions of autograd around every module. In each call `Function.apply` looks up their
        signature, for arguments that were left out, but they take one tensor: 8 % of the host's time in a tiny step."""
        for module in self.wrapper.modules():
            for name in ("pre_bwd_fn", "post_bwd_fn"):
                function = vars(module)[name]
                function.apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def train_step(
        self, micros: Sequence[MicroBatch], rates: Mapping[str, float], before_update: Callable[[], None] = at_once
    ) -> StepResult:
        """See `Engine.train_step`."""
        self.engine.train()
        set_learning_rates(self.zero.optimizer, rates)
        sums = StepSums(self.stage, micros, self.ranks, self.routing)
        for index, micro in enumerate(micros):
            self.engine.set_gradient_accumulation_boundary(index == len(micros) - 1)
            output = self.engine(micro.to(self.device), self.routing.load_ME)
            loss = objective(output.sums_J, sums.counts_J, sums.weights_J)
            sums.add(output)
            self.engine.backward(loss * self.ranks.world_size, scale_wrt_gas=False)
        before_update()
        self.engine.step()
        sums.reduce()
        applied = bool(self.engine.was_step_applied())
        if applied:
            self.routing.update(sums.expert_counts_ME)
        elif self.config.parallel.zero == 3:
            self._forget_order()
        grad_norm = self.engine.get_global_grad_norm() if applied else float("nan")
        totals, expert_counts_ME, (norm,) = sums.read(torch.as_tensor(grad_norm))
        reason = "" if applied else "non-finite gradients"
        return StepResult(applied, reason, totals, norm, expert_counts_ME)

    def _forget_order(self) -> None:
        """Let ZeRO-3 learn anew in which order weights are used.

        Where numbers are not finite, layers take part in a backward pass that did not before, or the other way round,
        and ZeRO-3 fails in a pass that is not the one that it knows.
        """
        coordinator = self.zero.parameter_offload.get_param_coordinator()
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()

    def evaluate(self, micros: Sequence[MicroBatch]) -> TermTotals:
        """See `Engine.evaluate`."""
        return evaluate_stage(self.wrapper, self.stage, self.engine, micros, self.ranks, self.routing)

    def inspect(self, micros: Sequence[MicroBatch]) -> NonFinite | None:
        """See `Engine.inspect`. ZeRO-3 fetches weights in the order that it knows from whole backward passes, and fails
        in one that leaves out the gradients of parameters: there only the forward pass is looked at, as in evaluation.
        """
        backward = self.config.parallel.zero < 3
        self.engine.train(backward)
        sums = StepSums(self.stage, micros, self.ranks, self.routing)
        # Around the engine, which would take gradients of activations for those of a step.
        forward = self.wrapper if backward else self.engine
        return first_nonfinite(self.stage, forward, micros, sums, self.routing, backward=backward)

    def differing_ranks(self) -> list[int]:
        """See `Engine.differing_ranks`. ZeRO-3 leaves only what is too small to be divided on every rank."""
        held: tuple[list[Tensor], list[Tensor]] = [*self.routing.state().values()], []
        whole = self.zero.persistent_parameters if self.config.parallel.zero == 3 else self.wrapper.parameters()
        for parameter in whole:
            held[is_expert(parameter)].append(parameter.data)
        return differing_ranks(self.ranks, [bit_sum(tensors, self.device) for tensors in held], self._expert_rank())

    @contextmanager
    def reading(self) -> Iterator[None]:
        """See `Engine.reading`. ZeRO-3 gathers and frees weights by hooks on each module, so a part may be called.

        A weight that another module than its own uses, as the heads do, it meets in a forward pass for the first time,
        and knows from then on; it looks out for them only in passes of its engine, which this is one of.
        """
        self.engine.eval()
        held = [module._parameters for module in self.wrapper.modules()]
        with _looking_out([of for of in held if isinstance(of, ZeROOrderedDict)]), torch.no_grad():
            yield

    def fragments(self, *, owned: bool) -> Iterator[Fragment]:
        """Pieces of this rank's ZeRO partition; ZeRO 1 to 3 hold every piece exactly once among all ranks."""
        self._materialise_moments()
        for name, parameter in self.wrapper.named_parameters():
            local = self._local_state(parameter) if parameter.requires_grad else None
            if local is not None:
                yield from cut(name.removeprefix(_PREFIX), parameter, self._expert_rank(), *local)

    def frozen_fragments(self) -> Iterator[Fragment]:
        """See `Engine.frozen_fragments`."""
        for name, parameter in self.wrapper.named_parameters():
            if not parameter.requires_grad:
                offset, held = 0, parameter.data.view(-1)
                if self.config.parallel.zero == 3:
                    offset, held = self._partition(parameter, parameter.ds_tensor)  # type: ignore[attr-defined]
                yield from cut(name.removeprefix(_PREFIX), parameter, self._expert_rank(), offset, {WEIGHT: held})

    def routing_state(self) -> dict[str, Tensor]:
        """See `Engine.routing_state`."""
        return self.routing.state()

    def finish_load(self, optimizer_steps: int, routing: Mapping[str, Tensor]) -> None:
        """See `Engine.finish_load`."""
        for state in self.zero.optimizer.state.values():
            # One counter each: shared ones would advance several times a step.
            state["step"] = torch.tensor(float(optimizer_steps), device=self.device)
        if self.config.parallel.zero == 3:
            for index in range(len(self.zero.fp16_groups)):
                self.zero._reassign_or_swap_out_partitioned_parameters(index)
            for parameter in self.zero.persistent_parameters:
                parameter.partition()
            if self.zero.persistent_parameters:
                self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)
        else:
            self.zero.update_lp_params()
        self.routing.load(routing)

    def describe(self) -> list[str]:
        """See `Engine.describe`."""
        parallel = self.config.parallel
        experts = "AutoEP" if self.expert_parallel > 1 else "own grouped products"
        return [
            f"engine: DeepSpeed {deepspeed.__version__}, ZeRO {parallel.zero}, {self.ranks.world_size} ranks",
            f"experts: {experts}, expert parallel {self.expert_parallel}",
            f"optimizer: fused AdamW on float32 masters, {self.config.train.precision} weights",
        ]

    def close(self) -> None:
        """See `Engine.close`."""
        self.engine.destroy()

    def _portions(self, parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
        """The parameters of a group, for ZeRO 1 and 2 a few at a time: they copy a whole group's gradients at once.

        ZeRO-3 makes its own portions (`sub_group_size`).
        """
        portion: list[nn.Parameter] = []
        elements = 0
        for parameter in parameters:
            if portion and self.config.parallel.zero < 3 and elements + parameter.numel() > _PORTION_ELEMENTS:
                yield portion
                portion, elements = [], 0
            portion.append(parameter)
            elements += parameter.numel()
        if portion:
            yield portion

    def _share_masters(self) -> None:
        """Let the optimizer step over the weights themselves: DeepSpeed copies them also where they are float32."""
        for index, flat in enumerate(self._flat_parameters()):
            if self.config.parallel.zero == 3:
                flat.data = self.zero.fp16_partitioned_groups_flat[index].data
                continue
            group = self.zero.real_dp_process_group[index]
            flat.data = self.zero.parallel_partitioned_bit16_groups[index][torch.distributed.get_rank(group)].data
        for parameter in self.wrapper.parameters():
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is not None:
                at = mapping.hp_fragment_address
                flat = self._flat_parameters()[mapping.param_group_index]
                mapping.hp_fragment = flat.detach().narrow(0, at.start, at.numel)

    def _flat_parameters(self) -> list[nn.Parameter]:
        """The float32 tensors that the optimizer steps over."""
        if self.config.parallel.zero == 3:
            return list(self.zero.fp32_partitioned_groups_flat)
        if isinstance(self.zero, BF16_Optimizer):  # ZeRO 1 with bfloat16 weights and float32 gradient sums.
            return list(self.zero.fp32_groups_flat_partition)
        return list(self.zero.single_partition_of_fp32_groups)

    def _expert_rank(self) -> int:
        if self.expert_parallel == 1:
            return 0
        return int(deepspeed_groups._get_expert_parallel_rank(f"ep_size_{self.expert_parallel}"))

    def _partition(self, parameter: Any, tensor: Tensor) -> tuple[int, Tensor]:
        """ZeRO-3: where this rank's partition begins in the flattened parameter, and it without its padding."""
        offset = tensor.numel() * self.zero._get_param_partition_rank(parameter)
        return offset, tensor[: max(0, min(tensor.numel(), parameter.ds_numel - offset))]

    def _materialise_moments(self) -> None:
        """Make the moments of a run that has not stepped yet, so that they can be saved or loaded."""
        for flat in self._flat_parameters():
            if "exp_avg" not in self.zero.optimizer.state[flat]:
                self.zero.optimizer.state[flat].update(adam_state(flat, 0))

    def _local_state(self, parameter: Any) -> tuple[int, dict[str, Tensor]] | None:
        """(offset in the flattened local parameter, float32 views of this rank's partition of it)."""
        if self.config.parallel.zero == 3:
            partition = {
                WEIGHT: self.zero._get_fp32_opt_state_partition(parameter, False)[0],
                FIRST_MOMENT: self.zero._get_fp32_opt_state_partition(parameter, False, "exp_avg")[0],
                SECOND_MOMENT: self.zero._get_fp32_opt_state_partition(parameter, False, "exp_avg_sq")[0],
            }
            held = {kind: self._partition(parameter, tensor) for kind, tensor in partition.items()}
            return held[WEIGHT][0], {kind: tensor for kind, (_, tensor) in held.items()}
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        flat = self._flat_parameters()[mapping.param_group_index]
        state = self.zero.optimizer.state[flat]
        at = mapping.hp_fragment_address
        return mapping.lp_fragment_address.start, {
            WEIGHT: flat.detach().narrow(0, at.start, at.numel),
            FIRST_MOMENT: state["exp_avg"].narrow(0, at.start, at.numel),
            SECOND_MOMENT: state["exp_avg_sq"].narrow(0, at.start, at.numel),
        }


class ZeroDivision:
    """Divides parameters over all ranks as ZeRO-3 does, before an engine is made: called with some after others."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self._made = engine_config(config, device)
        self._dtype = torch.bfloat16 if config.train.precision == "bfloat16" else torch.float32
        self._divided: Any = None

    def __call__(self, parameters: Sequence[nn.Parameter]) -> None:
        """Leave of each parameter this rank's share."""
        if self._divided is None:
            deepspeed.zero.Init(module=nn.ParameterList(parameters), config_dict_or_path=self._made, dtype=self._dtype)
            self._divided = parameters[0]
        else:
            # What DeepSpeed itself calls for parameters that come later.
            self._divided.convert_to_zero_parameters(param_list=list(parameters))


def install_expert_parallel(stage: Stage, config: RunConfig) -> nn.Module:
    """Replace the routed blocks of `stage` by AutoEP's without handing the training itself to DeepSpeed (ZeRO 0).

    Returns the wrapper that DeepSpeed changed; the parameters to train are those of the stage inside it.
    """
    expert_parallel = config.parallel.expert_parallel
    wrapper = _Wrapper(stage, RoutedShape.of(config.model))
    made = {"train_micro_batch_size_per_gpu": 1, "expert_parallel": autoep_config(expert_parallel)}
    with our_layers():
        deepspeed.initialize(model=wrapper, config=made, dist_init_required=False)
    _freeze(stage)
    return wrapper


def _freeze(stage: Stage) -> None:
    """Freeze again what AutoEP has replaced."""
    stage.freeze((model_name(name), parameter) for name, parameter in stage.model.named_parameters())


def expert_groups(expert_parallel: int) -> tuple[Any, Any]:
    """Process groups (expert parallel, expert data parallel): who splits experts, and who holds the same ones."""
    name = f"ep_size_{expert_parallel}"
    return deepspeed_groups._get_expert_parallel_group(name), deepspeed_groups._get_expert_data_parallel_group(name)


def engine_config(config: RunConfig, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's configuration for a run."""
    cuda = device.type == "cuda"
    bucket = _PORTION_ELEMENTS if cuda else _CPU_BUCKET_ELEMENTS
    layer = local_moe_parameters(config.model, config.parallel.expert_parallel)
    made: dict[str, Any] = {
        # Batch bookkeeping is ours: micro-batches and boundaries are set by hand in every step.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimizer.clip,
        "zero_optimization": {
            "stage": config.parallel.zero,
            "overlap_comm": cuda,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": _PORTION_ELEMENTS,
            "sub_group_size": _PORTION_ELEMENTS,
            # Weights for the next modules are gathered while a device computes; on CPU both would be done in turn.
            "stage3_prefetch_bucket_size": _PORTION_ELEMENTS if cuda else 0,
            "stage3_max_live_parameters": 2 * layer,
            # So far it looks ahead, after every module: what is used again soon is in the layer that is recomputed.
            "stage3_max_reuse_distance": min(bucket, layer),
            # Weights of a module gathered together pass through a buffer of their size.
            "allgather_sequential": not cuda,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }
    if config.train.precision == "bfloat16":
        made["bf16"] = {"enabled": True}
        # Gradients are summed in float32, over micro-batches and over ranks.
        made["data_types"] = {"grad_accum_dtype": "fp32"}
        made["communication_data_type"] = "fp32"
    if config.parallel.expert_parallel > 1:
        made["expert_parallel"] = autoep_config(config.parallel.expert_parallel)
    return made


@contextmanager
def _looking_out(held: Sequence[ZeROOrderedDict]) -> Iterator[None]:
    """ZeRO-3 gathers a weight of these that is used while it is divided. A pass of the engine ends that as well."""
    for parameters in held:
        parameters._in_forward = True
    try:
        yield
    finally:
        for parameters in held:
            parameters._in_forward = False
