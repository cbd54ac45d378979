"""Run DeepSpeed behind the Engine protocol: as the only rank of a group, or one of the group that this process is in.

Precision: parameters stay float32 and `torch_autocast` casts inside matrix products, instead of DeepSpeed's `bf16` mode. The
module's parameters then *are* the masters: what is saved is exactly what is forwarded, gradients accumulate in float32 under
every ZeRO stage (the `bf16` mode refuses that under stage 0 and changes optimizer class under stage 1), and both engines
compute the same thing. The price is 2 more bytes a parameter.

Restoring: a ZeRO optimizer has no state before its first step, and `safe_set_full_*` fails without it. So every engine takes
one step with learning rate 0 and zero gradients, whose traces (moments, step counts) are then overwritten. Loading makes a
new DeepSpeed engine: overwriting parameters of a running one leaves stale copies under ZeRO 3.

Gathers: ZeRO 3 sends the matrices of linear layers as bfloat16 where autocast would round them to it anyway: half the bytes,
equal bits. Gradients are reduced in float32. DeepSpeed's own setting (`lower_precision_safe_modules`) would round both.

ZeRO 3 replaces `torch.nn.functional.linear` in the whole process, for good. Its own rounds otherwise under autocast: samplers
and engines of other stages would compute other bits for having come later. It is in place in this engine's passes only.

Ranks: DeepSpeed averages gradients over the ranks at every stage, and a loss that has the global denominator wants their sum;
so `backward` multiplies by the number of ranks. Norms are taken after that reduction, so that all ranks clip and skip alike.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from stages.models import Checkpoint, model_weights
from stages.training.adapters import load_trainable
from stages.training.config import REDUCED_AT_ONCE, DeepSpeedEngineConfig, TrainingConfig
from stages.training.engine import (
    CheckpointedEngine,
    StepReport,
    checkpoint_activations,
)
from stages.training.forward import logit_transform
from stages.training.optimizers import (
    TrainerState,
    build_optimizer,
    clip_gradients,
    heads,
    learning_rate_factor,
    name_of_broken_gradient,
    optimizer_state,
    read_trainer_state,
    restore_optimizer_state,
    rounded_by_autocast,
    set_learning_rate,
    trainable,
)
from stages.training.process_group import import_deepspeed, join_group, launched


class DeepSpeedEngine(CheckpointedEngine):
    """Implement `stages.training.engine.Engine`."""

    def __init__(self, checkpoint: Checkpoint, config: TrainingConfig) -> None:
        assert isinstance(config.engine, DeepSpeedEngineConfig)
        super().__init__(config)
        self._stage = config.engine.zero_stage
        import_deepspeed(self.device)
        join_group(self.device)
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        if self.world_size != config.engine.ranks:
            raise ValueError(
                f"training.engine.ranks: expected {self.world_size}, the processes of the group that trains here, found "
                f"{config.engine.ranks}; what trains on ranks is called through a stage that is marked `@on_ranks`"
            )
        self.model = None
        self.load(checkpoint)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradient of a loss; summed over the ranks by the last micro-batch."""
        self.holds = None
        self._losses.append(loss.detach())
        self.model.set_gradient_accumulation_boundary(last)
        with self._own_linear():  # layers may be recomputed
            # The loss has the global denominator already: DeepSpeed must not divide by its own count of micro-batches.
            self.model.backward(loss * self.world_size, scale_wrt_gas=False)

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Return a context for forward passes of this and of other models."""
        with self._own_linear(), super().autocast():
            yield

    @contextlib.contextmanager
    def _own_linear(self) -> Iterator[None]:
        """Give ZeRO 3 its linear layers, which keep no gathered weights for backward."""
        before = functional.linear
        if self._stage == 3:
            from deepspeed.runtime.zero.linear import zero3_linear_wrap

            functional.linear = zero3_linear_wrap
        try:
            yield
        finally:
            functional.linear = before

    def step(self, *, factor: float = 1.0) -> StepReport:
        """Clip, schedule, update."""
        self.holds = None
        rate = set_learning_rate(self.model.optimizer, factor * learning_rate_factor(self._updates, self._config))
        norm, skipped, gradient = self._step_replicated() if self._stage == 0 else self._step_partitioned()
        self._moment_updates += not skipped
        return self._stepped(norm, rate, skipped=skipped, gradient=gradient)

    def load(self, checkpoint: Checkpoint) -> None:
        """Make a new DeepSpeed engine from the checkpoint."""
        self.close()
        model, self._adapter = load_trainable(checkpoint, self._config, torch.float32)
        state = read_trainer_state(checkpoint, self._config, self._adapter)
        if self._config.activation_checkpointing:
            checkpoint_activations(model, reentrant=self._stage == 3)
            if self._adapter is not None and self._stage == 3:
                model.enable_input_require_grads()  # a reentrant layer has no gradient inside where its input has none
        self._names = {id(tensor): name for name, tensor in model.named_parameters()}
        self.model = self._initialize(model)
        self._restore(state)
        self._measure_head()
        self._take_over(checkpoint, state)

    def total(self, value: float) -> float:
        """Sum a number over the ranks."""
        summed = torch.tensor(value, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(summed)
        return summed.item()

    def close(self) -> None:
        """Free the DeepSpeed engine; the process group stays for the next one."""
        self.holds = None
        if self.model is not None:
            self.model.destroy()
            self.model = None

    def _step_replicated(self) -> tuple[float, bool, str]:
        """Step under stage 0, where DeepSpeed neither reports the norm nor looks for NaN."""
        norm = clip_gradients(self.model.module, self._config.max_grad_norm)
        if math.isfinite(norm):
            self.model.step()
            return norm, False, ""
        gradient = name_of_broken_gradient(self.model.module)
        self.model.zero_grad()
        return norm, True, gradient

    def _step_partitioned(self) -> tuple[float, bool, str]:
        """Step under ZeRO, whose optimizers clip, and skip a step whose norm is not finite."""
        self.model.step()
        return float(self.model.get_global_grad_norm()), bool(self.model.optimizer.overflow), ""

    def _initialize(self, model: Any) -> Any:
        import deepspeed

        optimizer, linear = build_optimizer(model, self._config.optimizer), functional.linear
        # A bias is left out: ZeRO 3's own linear layer adds it in float32.
        rounded = rounded_by_autocast(model, heads(model))
        try:
            with launched():
                engine, *_ = deepspeed.initialize(
                    model=model, optimizer=optimizer, config=self._settings(), dist_init_required=False
                )
        finally:
            functional.linear = linear
        engine.module.eval()
        if self._stage == 3 and self._config.bf16:
            self._gather_in_half(engine.optimizer, rounded)
        return engine

    def _gather_in_half(self, optimizer: Any, weights: list[Tensor]) -> None:
        """Let weights travel as bfloat16, and their gradients as float32."""
        from deepspeed.runtime.torch_autocast import PARAM_COMM_DTYPE_ATTR_NAME

        optimizer.get_param_comm_dtype = lambda parameter: torch.float32
        for weight in weights:
            setattr(weight, PARAM_COMM_DTYPE_ATTR_NAME, torch.bfloat16)

    def _measure_head(self) -> None:
        """Measure on all ranks now: later, one whose micro-batch is small would not take part in the forward that it needs."""
        if self.max_logits is not None and self.model.module.get_output_embeddings() is not None:
            logit_transform(self.model)

    def _settings(self) -> dict[str, Any]:
        # Stage 0 clips in `_step_replicated`; a limit that DeepSpeed knows as well would clip twice.
        clipping = self._config.max_grad_norm if self._stage else 0.0
        return {
            "train_micro_batch_size_per_gpu": 1,  # bookkeeping only: batches are made by the caller
            "gradient_accumulation_steps": 1,
            "gradient_clipping": clipping,
            "zero_optimization": {
                "stage": self._stage,
                # Sums have the same order either way. Under stages 1 and 2 a second bucket would be allocated.
                "overlap_comm": self._stage == 3 and self.device == "cuda",
                "reduce_scatter": self._stage > 1,
                **({"reduce_bucket_size": REDUCED_AT_ONCE} if self._stage == 3 else {}),
                **self._offloads(),
            },
            "zero_allow_untested_optimizer": True,  # torch.optim.AdamW: DeepSpeed's own would be compiled on first use
            "zero_force_ds_cpu_optimizer": False,
            # No gradient may travel in less than float32, hence the empty list.
            "torch_autocast": {
                "enabled": self._config.bf16,
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],
            },
            "steps_per_print": 2**31,
        }

    def _offloads(self) -> dict[str, Any]:
        assert isinstance(self._config.engine, DeepSpeedEngineConfig)
        parts = {"none": [], "optimizer": ["optimizer"], "parameters": ["optimizer", "param"]}
        host = {"device": "cpu", "pin_memory": self.device == "cuda"}
        return {f"offload_{part}": host for part in parts[self._config.engine.offload]}

    def _restore(self, state: TrainerState) -> None:
        """Bring the optimizer's state into being, then make it that of the checkpoint."""
        # Moments that began anew have fewer updates behind them than the schedule, and Adam corrects their bias by these.
        steps = [int(value) for key, value in state.optimizer.items() if key.endswith("/step")]
        self._moment_updates = max(steps, default=0)
        if self._stage == 0:
            restore_optimizer_state(self.model.module, self.model.optimizer, state.optimizer)
            return
        self._take_empty_step()
        for parameter in trainable(self.model.module).values():
            name = self._names[id(parameter)]
            for slot in ("exp_avg", "exp_avg_sq"):
                stored = state.optimizer.get(f"{name}/{slot}")
                value = torch.zeros(_full_shape(parameter)) if stored is None else stored
                self._set_moment(parameter, slot, value.to(self.device))
        # AdamW counts its updates per parameter, ZeRO per flat partition; skipped steps leave all alike.
        for slots in self.model.optimizer.optimizer.state.values():
            slots["step"].fill_(self._moment_updates)

    def _set_moment(self, parameter: Any, slot: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self._stage < 3:
            safe_set_full_optimizer_state(parameter, value, slot)
            return
        # Its setter of whole values forgets the padding of parameters that the ranks do not divide, and fails on them.
        size = parameter.ds_tensor.numel()
        padded = torch.nn.functional.pad(value.flatten(), (0, size * self.world_size - value.numel()))
        safe_set_local_optimizer_state(parameter, padded[self.rank * size : (self.rank + 1) * size], slot)

    @torch.enable_grad()  # whoever asks for an engine may be about to compute without gradient
    def _take_empty_step(self) -> None:
        ids = torch.zeros((1, 2), dtype=torch.long, device=self.device)
        loss = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.sum() * 0.0
        self.model.set_gradient_accumulation_boundary(True)
        self.model.backward(loss, scale_wrt_gas=False)
        set_learning_rate(self.model.optimizer, 0.0)
        self.model.step()
        if self._stage < 3:
            # DeepSpeed 0.19.8 links moments to parameters once, after the first of its groups has stepped.
            self.model.optimizer._hp_optimizer_states_linked = False
            self.model.optimizer._lazy_init_hp_params_optimizer_state()

    def _moments(self) -> dict[str, Tensor]:
        if self._config.optimizer_state == "none":
            return {}
        if self._stage == 0:
            return optimizer_state(self.model.module, self.model.optimizer)
        from deepspeed.utils import safe_get_full_optimizer_state

        state: dict[str, Tensor] = {}
        if self._moment_updates == 0:
            return state  # as an optimizer that never stepped: the traces of the empty step are not state
        for parameter in trainable(self.model.module).values():
            name = self._names[id(parameter)]
            state[f"{name}/step"] = torch.tensor(float(self._moment_updates))
            for slot in ("exp_avg", "exp_avg_sq"):
                whole = safe_get_full_optimizer_state(parameter, slot)
                if self.rank == 0:  # which writes; a device holds one parameter's at a time
                    state[f"{name}/{slot}"] = whole.cpu()
        return state

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_full_fp32_param

        for name, tensor in model_weights(self.model.module).items():
            if not hasattr(tensor, "ds_tensor"):
                yield name, tensor
            elif tensor.requires_grad:
                yield name, safe_get_full_fp32_param(tensor)
            else:  # no part of the optimizer, which holds the masters of the rest
                yield name, self._gathered(tensor)

    def _gathered(self, parameter: Any) -> Tensor:
        """Return the whole of a partitioned parameter as it is kept, not as it travels; all ranks call it together."""
        own: Tensor = parameter.ds_tensor.to(self.device)
        whole = own.new_empty(self.world_size * own.numel())
        torch.distributed.all_gather_into_tensor(whole, own)
        return whole[: parameter.ds_numel].view(parameter.ds_shape)


def _full_shape(parameter: Any) -> torch.Size:
    """Return the shape of the whole parameter; under ZeRO 3 the tensor itself is an empty placeholder."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape
