"""How parameters are updated: engine, optimizer, precision and schedule. Shared by supervised and policy training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    Field,
    IPvAnyAddress,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from pipeline.config import UNKEYED, Config
from stages.training.hardware import automatic, fixed_order, has_cuda, has_native_bf16, threads

REDUCED_AT_ONCE: Final = 1 << 26
"""Gradients that ZeRO 3 collects before it reduces them: a buffer of 256 MiB. DeepSpeed's default is one of 2 GB."""


class TorchEngineConfig(Config):
    """Plain torch on one device."""

    kind: Literal["torch"] = "torch"
    "Selects plain torch, one device."


class HostConfig(Config):
    """One of several hosts that train together."""

    address: IPvAnyAddress
    """What the others reach it by, on the network that gradients travel: an IP address of the host."""
    ranks: PositiveInt
    """How many of the ranks it has."""
    start: str | None = Field(None, pattern=r"\{command\}")
    """What runs `{command}` there: `ssh node2 {command}`. Null for the first host, which is the flow's."""


class DeepSpeedEngineConfig(Config):
    """DeepSpeed, its optimizer state (stage 1), gradients (2) and parameters (3) partitioned over the ranks."""

    kind: Literal["deepspeed"] = "deepspeed"
    "Selects DeepSpeed: ranks and ZeRO stages."
    zero_stage: Literal[0, 1, 2, 3] = 1
    """ZeRO stage; 0 replicates everything."""
    ranks: PositiveInt = 1
    """Processes that share every batch, one a CUDA device, on this host unless `hosts` names others; 1 trains in the flow's own
    process. Micro-batches are dealt out whole: give a batch at least as many as there are ranks (`micro_batch_tokens`). They
    change the order of sums, and so the last bits."""
    hosts: Annotated[tuple[HostConfig, ...], UNKEYED] = ()
    """Where the ranks are, in their order; none: all are here. Interpreter, sources and store have one path on all hosts."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What lives in host memory instead of the device's: the optimizer's state with its step (ZeRO 1-3), or the parameters
    between their uses as well (ZeRO 3)."""
    deadline: Annotated[PositiveFloat, UNKEYED] = 1800.0
    """Seconds without a sign of progress after which several ranks are killed. Starting, loading and every optimizer step are
    signs; ours."""

    @model_validator(mode="after")
    def _offload_fits(self) -> Self:
        least = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.zero_stage < least:
            raise ValueError(f"offload {self.offload} needs zero_stage {least} or above, found {self.zero_stage}")
        return self

    @model_validator(mode="after")
    def _hosts_have_the_ranks(self) -> Self:
        if not self.hosts:
            return self
        if sum(host.ranks for host in self.hosts) != self.ranks:
            there = " + ".join(str(host.ranks) for host in self.hosts)
            raise ValueError(f"hosts: expected ranks that add up to {self.ranks} (ranks), found {there}")
        if any(host.address.is_unspecified for host in self.hosts):
            raise ValueError(
                "hosts: expected the address of one network, found one that means all of them (0.0.0.0 or ::)"
            )
        if [host.start is None for host in self.hosts] != [True] + [False] * (len(self.hosts) - 1):
            raise ValueError(
                "hosts: the first is the flow's own and has no start; all others need one, such as 'ssh node2 {command}'"
            )
        return self

    def key(self) -> dict[str, Any]:
        """With one rank and nothing offloaded as it was before there was a choice."""
        before = {"ranks": 1, "offload": "none"}
        return {name: value for name, value in super().key().items() if name not in before or value != before[name]}


class AdamWConfig(Config):
    """`torch.optim.AdamW`."""

    kind: Literal["adamw"] = "adamw"
    "Selects AdamW."
    learning_rate: PositiveFloat = 1e-6
    """DeepSeekMath, section 4.2: 1e-6 for the policy. Much larger for small models."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    decayed: Literal["matrices", "all"] = "matrices"
    """What the weight decay pulls towards 0. `matrices`: tensors of two and more dimensions, embeddings and LoRA's factors
    among them; norms and biases are spared, as in nanoGPT and Hugging Face's Trainer, since a norm's scale is neutral at 1 and
    not at 0. `all`: every parameter, as torch does."""

    @model_validator(mode="after")
    def _decays(self) -> Self:
        if self.decayed == "all" and self.weight_decay == 0:
            raise ValueError(
                "decayed: without weight_decay nothing decays; set weight_decay above 0, or decayed=matrices"
            )
        return self


class MuonConfig(Config):
    """`torch.optim.Muon` on the hidden layers' matrices, AdamW on embeddings, output head, biases and norms."""

    kind: Literal["muon"] = "muon"
    "Selects Muon for matrices and AdamW for the rest."
    learning_rate: PositiveFloat = 3e-3
    """For the matrices."""
    momentum: float = Field(0.95, ge=0, lt=1)
    """Decay of the momentum (Nesterov)."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of the matrices."""
    scale: Literal["original", "match_rms_adamw"] = "match_rms_adamw"
    """How the step grows with a matrix's shape: sqrt(max(1, rows / columns)) (Jordan) or 0.2 sqrt(max(rows, columns))
    (Moonshot), whose steps are as large as AdamW's."""
    rest: AdamWConfig = AdamWConfig(learning_rate=3e-3)
    """For all parameters that are not matrices of hidden layers."""


class LoRAConfig(Config):
    """Low-rank adapters (Hu et al. 2021): W x + s B A x, where W [out, in] stays as it is, and A [r, in] and B [out, r] learn.

    B begins at 0, so that the first policy is the base exactly. There is no dropout: ratios must be exactly 1. The best
    learning rate is about ten times that of training in full (Schulman et al. 2025).
    """

    r: PositiveInt = 8
    """Rank: r (in + out) values are trained a matrix. Hu et al. find 1 to 8 enough; rewards carry few bits to learn from."""
    alpha: PositiveFloat = 32.0
    """Numerator of the scale s. 32: Schulman et al. 2025 (LoRA Without Regret), for every rank."""
    scaling: Literal["lora", "rslora"] = "lora"
    """s: alpha / r, or alpha / sqrt(r) (Kalajdzievski 2023), which does not fade as r grows."""
    target_modules: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = "all-linear"
    """Which linear layers: all but the output head, or those of these names or name endings (`q_proj`). Neither embeddings nor
    output head can be among them: where they share one matrix, a change to one would not reach the other."""
    seed: NonNegativeInt = 0
    """Draws A, uniform in +-1/sqrt(in) as peft does."""


class ComputeConfig(Config):
    """What a model is computed with. `auto` is settled on the machine where a stage runs."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of matrix products. Parameters, gradients and optimizer state stay float32: an update of 1e-6 is lost in a
    bfloat16 weight. `auto`: bf16 on a CUDA device and on a CPU that multiplies it in hardware, else fp32, since emulation is
    many times slower. Keys of stage calls hold what it was."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """Attention implementation; the choice changes last bits only. `auto`: sdpa on a CUDA device, where it needs no memory for
    T^2 weights; eager on a CPU, where it has the faster backward at small sizes."""
    share_prompts: bool = True
    """Forward a prompt once for all of its outputs in a micro-batch: P + G R tokens in place of G (P + R). Values and gradients
    are those of separate sequences but for the last bits. Where no prompt repeats, where attention is flash_attention_2, and
    for architectures that it is not known for (`stages/training/sharing.py`), every output has a sequence of its own."""
    threads: PositiveInt | Literal["auto"] = "auto"
    """Torch threads on a CPU; the number changes the order of sums, and so the last bits. `auto`: torch's own choice, at most
    the cores that a container grants."""

    @property
    def products(self) -> Literal["fp32", "bf16"]:
        """The precision of matrix products on this machine."""
        return self._automatic()[0] if self.precision == "auto" else self.precision

    @property
    def bf16(self) -> bool:
        """Whether it is bfloat16."""
        return self.products == "bf16"

    @property
    def attention_kind(self) -> Literal["eager", "sdpa", "flash_attention_2"]:
        """The attention implementation on this machine."""
        return self._automatic()[1] if self.attention == "auto" else self.attention

    @staticmethod
    def _automatic() -> tuple[Literal["fp32", "bf16"], Literal["eager", "sdpa"]]:
        return automatic(cuda=has_cuda(), bf16=has_native_bf16())

    def key(self) -> dict[str, Any]:
        """With the precision that `auto` is on this machine: another one is another result."""
        return super().key() | {"precision": self.products}


class TrainingConfig(ComputeConfig):
    """One way of updating parameters."""

    engine: Annotated[TorchEngineConfig | DeepSpeedEngineConfig, Field(discriminator="kind")] = TorchEngineConfig()
    """What runs backward and step."""
    optimizer: Annotated[AdamWConfig | MuonConfig, Field(discriminator="kind")] = AdamWConfig()
    """The update rule; its state is part of a checkpoint."""
    adapter: LoRAConfig | None = None
    """Trained in place of the weights (None: the weights). An adapter of these settings that the checkpoint has goes on;
    otherwise the checkpoint's weights are the base of a new one. `--set update.training.adapter.r=8` asks for one."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients of a larger global L2 norm are scaled down to it; 0 never clips."""
    warmup_steps: NonNegativeInt = 0
    """Updates over which the learning rate rises linearly: the first has 1 / warmup_steps of it."""
    schedule: Literal["constant", "linear"] = "constant"
    """After warm-up: constant (the paper gives one rate), or linear to 0 at `total_steps`."""
    total_steps: PositiveInt | None = None
    """Updates of the whole run, for the linear schedule."""
    optimizer_state: Literal["carry", "reset_once", "none"] = "carry"
    """What becomes of the optimizer's moments from one stage call to the next. The counters of updates, and so warm-up and
    schedule, go on in each case. The paper is silent.

    `carry`: they go on; those of another optimizer, or of other trained parameters, are an error. `reset_once`: a checkpoint
    whose moments were made under another setting than `reset_once`, by another optimizer or for other trained parameters
    begins with none, and from that call on they are carried: for going on from a checkpoint whose moments do not fit, or
    shall not count. `none`: every stage call begins with none, and checkpoints hold none."""
    max_skipped_steps: Annotated[PositiveInt | None, UNKEYED] = 3
    """Steps in a row that may be skipped because their gradient was not finite, over all stage calls, before training stops
    with the cause; null: any number. Parameters stay as they are while steps are skipped: more of them seldom help. Ours."""
    max_logits: PositiveInt | None = 1 << 25
    """Logits (scored positions times vocabulary) that exist at a time, 128 MiB in float32. A micro-batch that has more computes
    them in chunks, and again in backward: the same values and gradients but for the last bits, for one more product of the
    head's size. Small vocabularies never come near it. None: always all at once."""
    head_precision: Literal["fp32", "as_computed"] = "fp32"
    """Precision of a policy's logits under bf16. `as_computed`: bfloat16, whose steps are 0.125 at 16 to 32. Log-probabilities
    then carry noise of hundredths of a nat, also into KL and ratios. `fp32`: the same products of bfloat16 operands, added up
    and left in float32; on a CPU that takes a second product of the head. With precision fp32, and for critics and reward
    models, both are the same. `rollout.backend.head_precision` is the sampler's."""
    activation_checkpointing: bool = False
    """Keep only the inputs of the model's layers for backward, which computes the rest again: a third more arithmetic, and far
    less memory (one hidden state per layer and token). The same values and gradients."""
    deterministic: bool = False
    """Compute with kernels that add in a fixed order, so that an update made again has equal bits on the same kind and number
    of GPUs with the same packages. It is slower, and an operation without such a kernel is an error. On a CPU updates have
    equal bits without it. False on a GPU: an update that is replayed may differ in its last bits, with a warning."""

    @property
    def float32_logits(self) -> bool:
        """Whether logits are to be left in float32, of products in bfloat16."""
        return self.bf16 and self.head_precision == "fp32"

    @contextlib.contextmanager
    def arithmetic(self) -> Iterator[None]:
        """Run the block with these threads and this order of sums."""
        with threads(self.threads), fixed_order(self.deterministic):
            yield

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.schedule == "constant" and self.total_steps is not None:
            raise ValueError("total_steps has no effect where schedule is constant; set schedule=linear, or it to null")
        if self.schedule == "linear" and (self.total_steps or 0) <= self.warmup_steps:
            raise ValueError(f"schedule linear needs total_steps above warmup_steps ({self.warmup_steps})")
        if self.optimizer.kind == "muon" and self.engine.kind == "deepspeed" and self.engine.zero_stage > 0:
            raise ValueError("optimizer muon needs engine.zero_stage 0: ZeRO 1-3 flatten the matrices it works on")
        if self.optimizer.kind == "muon" and self.adapter is not None:
            raise ValueError(
                "optimizer muon cannot train an adapter: it makes all singular values of a step equal, of a matrix and not of "
                "its factors; set optimizer.kind to adamw"
            )
        return self

    def key(self) -> dict[str, Any]:
        """Without an adapter, in no fixed order and in float32 as it was before there were such choices."""
        before: dict[str, Any] = {"adapter": None, "deterministic": False}
        if not self.bf16:
            before["head_precision"] = self.head_precision
        return {name: value for name, value in super().key().items() if name not in before or value != before[name]}
